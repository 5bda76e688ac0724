"""`vr data show`: one item as a page or a picture, its frames with the objects drawn on them."""

from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from PIL import Image

from data_pipes import page
from data_pipes.clips import media_path
from data_pipes.containers import open_records
from data_pipes.drawing import colour_of, contact_sheet, data_uri, draw_objects
from data_pipes.errors import InputError
from data_pipes.files import write_text
from data_pipes.masks import segmentation_to_mask
from data_pipes.records import Record
from data_pipes.tokenizer import REGION
from data_pipes.video import Video, open_video

SHOWN = 12  # frames


def find_item(file: str | Path, item: str) -> tuple[Record, dict[str, Any]]:
  """An item of an annotation file or a folder of shards, by number or as `id=ID`.

  Raises InputError if there is none.
  """
  items = open_records(file)
  if item.startswith("id="):
    matches = (i for i in range(len(items)) if _id(items.item(i)) == item.removeprefix("id="))
    index = next(matches, None)
  else:
    index = int(item) if item.isdecimal() and int(item) < len(items) else None
  if index is None:
    raise InputError(f"{file}: no item {item!r}; accepted: 0 to {len(items) - 1}, or id=ID")
  return items[index], items.item(index)


def _id(item: Any) -> str | None:
  return str(item.get("id")) if isinstance(item, dict) else None


def overlays(record: Record, media: str | Path, width: int = 480) -> list[tuple[int, Image.Image]]:
  """Up to 12 annotated frames (frame 0 where there is none) with the objects on them."""
  video = open_video(record.stored or media_path(media, record.path))
  numbers = sorted({n for by_frame in record.objects for n in by_frame if n < len(video)}) or [0]
  at = np.unique(np.linspace(0, len(numbers) - 1, min(SHOWN, len(numbers))).round().astype(int))
  numbers = [numbers[i] for i in at]
  shown = []
  for number, frame in zip(numbers, video.frames(numbers), strict=True):
    masks = {}
    if frame.shape[:2] != tuple(video.size):
      frame = _at_source_size(frame, video)
    for i, by_frame in enumerate(record.objects):
      if by_frame.get(number) is not None:
        mask = segmentation_to_mask(by_frame[number], *(record.size or video.size))
        masks[i] = mask
    shown.append((number, draw_objects(frame, masks, width)))
  return shown


def _at_source_size(frame: np.ndarray, video: Video) -> np.ndarray:
  """A frame stored square, as wide and high as in the source."""
  height, width = video.size
  if getattr(video, "aspect_ratio", "square") == "square":
    return np.asarray(Image.fromarray(frame).resize((width, height)))
  side = max(height, width)
  top, left = (side - height) // 2, (side - width) // 2
  square = np.asarray(Image.fromarray(frame).resize((side, side)))
  return square[top : top + height, left : left + width]


def write_item(path: str | Path, record: Record, item: dict[str, Any], media: str | Path) -> Path:
  """Writes the item to a `.html` page, or its frames to a `.png` or `.jpg` picture."""
  path = Path(path)
  shown = overlays(record, media) if record.media is not None else []
  if path.suffix in (".png", ".jpg"):
    if not shown:
      raise InputError(f"{record.where}: has no media; give a .html file")
    contact_sheet([image for _, image in shown], columns=3).save(path)
    return path
  if path.suffix != ".html":
    raise InputError(f"--out {path}: accepted: a .html page, or a .png or .jpg picture")
  text = page.render(
    "show.html.j2",
    title=str(record.id),
    where=record.where,
    path=record.path,
    frames=[(data_uri(image), number) for number, image in shown],
    talk=[(who, _marked(text)) for who, text in _dialogue(record, item)],
  )
  write_text(path, text)
  return path


def _dialogue(record: Record, item: dict[str, Any]) -> list[tuple[str, str]]:
  if record.turns:
    return [(t.role, t.text) for t in record.turns]
  options = " ".join(item.get("options", ()))
  question = [("question", f"{item['Question']} {options}")] if "Question" in item else []
  return [*question, ("answer", str(item.get("Answer", item.get("caption"))))]


def _marked(text: str) -> Markup:
  """The text with the i-th `<region>` in the colour of object i."""
  first, *rest = (escape(piece) for piece in text.split(REGION))
  out = [first]
  for i, piece in enumerate(rest):
    out.append(Markup('<b style="color:{}">&lt;region {}&gt;</b>').format(colour_of(i), i) + piece)
  return Markup("").join(out).replace("\n", Markup("<br>"))
