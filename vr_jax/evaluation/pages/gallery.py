"""Examples of a result with their frames and masks, for the pages."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipes.errors import InputError
from data_pipes.masks import segmentation_to_mask
from data_pipes.video import open_video
from vr_jax.evaluation.benchmark import Kind
from vr_jax.evaluation.items import Item
from vr_jax.evaluation.pages.page import Example, Frame, TextExample
from vr_jax.evaluation.results import Result

SHOWN_FRAMES = 6
SCENE_FRAMES = 4  # where no object is marked


def choice_examples(
  result: Result, items: Sequence[Item], media: Path, count: int, mode: str
) -> list[Example]:
  """Right and wrong answers of every type, turn about; frames where `items` has them."""
  by_id = {item.id: item for item in items}
  kinds: dict[tuple[str, bool], list] = {}
  for record in result.items:
    if record["error"] is None:
      kinds.setdefault((record["type"], bool(record["score"])), []).append(record)
  order = [records[i] for i in range(count) for records in kinds.values() if i < len(records)]
  return [
    Example(
      type=record["type"],
      mode=mode,
      video=record["video"],
      frames=shown_frames(by_id.get(record["id"]), media, mode_of(result)),
      question=by_id[record["id"]].bare_question if record["id"] in by_id else record["prompt"],
      options=record["options"],
      answer=record["raw"],
      letter=record["parsed"],
      truth=record["gt"],
    )
    for record in order[:count]
  ]


def text_examples(
  kind: Kind, result: Result, items: Sequence[Item], media: Path, count: int
) -> list[TextExample]:
  """Descriptions from the worst to the best in equal steps, those without scores first."""
  by_id = {item.id: item for item in items}
  failed = [r for r in result.items if r["error"] is None and r["score"] is None]
  scored = sorted(
    (r for r in result.items if r["score"] is not None), key=lambda record: record["score"]
  )
  failed = failed[: count // 4]
  steps = np.linspace(0, len(scored) - 1, min(count - len(failed), len(scored))).round()
  return [
    _text_example(kind, result, r, by_id, media)
    for r in (*failed, *(scored[int(i)] for i in steps))
  ]


def _text_example(
  kind: Kind, result: Result, record: Mapping[str, Any], by_id: Mapping[Any, Item], media: Path
) -> TextExample:
  replies = [reply for reply in record.get("replies", ()) if reply]
  return TextExample(
    video=record["video"],
    frames=shown_frames(by_id.get(record["id"]), media, mode_of(result)),
    question=record["prompt"],
    reference=record["gt"] or "",
    answer=record["raw"] or "",
    score=record["score"],
    scores=kind.item_scores(record),
    explanation="\n\n".join(replies),
    problem=record["problem"] or "",
  )


def mode_of(result: Result) -> str:
  return (result.run.get("inference") or {}).get("mode") or ""


def shown_frames(item: Item | None, media: Path, mode: str) -> list[Frame]:
  """Frames of the item with its objects as the model saw them.

  The frame of single-frame mode, or some of multi-frame mode; none where the media is not at hand.
  """
  if item is None or not (media / item.video).exists():
    return []
  try:
    if item.objects:
      return frames_of(item, media, [item.frame] if mode == "single" else spread(item))
    video = open_video(media / item.video)
    places = np.linspace(0, len(video) - 1, SCENE_FRAMES + 2).round().astype(int)[1:-1]
    numbers = list(dict.fromkeys(int(n) for n in places))
    return [Frame(f, {}, f"frame {n}") for n, f in zip(numbers, video.frames(numbers), strict=True)]
  except InputError:
    return []


def frames_of(item: Item, media: Path, numbers: Sequence[int]) -> list[Frame]:
  """Frames of an item's video with the masks of its objects."""
  video = open_video(Path(media) / item.video)
  shown = []
  for number, image in zip(numbers, video.frames(numbers), strict=True):
    masks = {
      i: segmentation_to_mask(by_frame[number], *image.shape[:2])
      for i, by_frame in enumerate(item.objects)
      if by_frame.get(number) is not None
    }
    shown.append(Frame(image, masks, f"frame {number}"))
  return shown


def spread(item: Item, count: int = SHOWN_FRAMES) -> list[int]:
  """`count` of an item's annotated frames, first and last among them."""
  numbers = list(item.objects[0])
  return [numbers[i] for i in np.linspace(0, len(numbers) - 1, count).round().astype(int)]
