"""The objects of a chat request drawn on its clip: a Request that the model answers."""

import base64
import binascii
import collections
import dataclasses
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from data_pipes.errors import InputError
from data_pipes.mask_images import read_mask_picture
from data_pipes.masks import mask_from_point
from data_pipes.tokenizer import REGION
from data_pipes.video import Video
from vr_jax.inference.regions import Region, frame_number, objects_of
from vr_jax.inference.requests import Request, Turn
from vr_jax.serving.body import Node
from vr_jax.serving.chat import Chat, Key, Mark, Message, keys
from vr_jax.serving.media import Medium

POINTS = 256  # of a region
MASK = 64 << 20  # characters of a mask's data URL
TAG = "<image>"  # that DAM's clients write for each picture


def to_request(chat: Chat, medium: Medium | None) -> Request:
  """What a chat asks about its clip.

  Raises:
    ApiError: 400 with the path of the region or message that is wrong.
  """
  video = None if medium is None else medium.info.video(medium.name)
  named: dict[str, list[Region]] = {}  # the objects of the messages so far
  texts: list[str] = []
  regions: list[list[Region]] = []
  for place, message in enumerate(chat.messages):
    if medium and medium.pictures and chat.media and chat.media.message == place:
      text, marked = _pictured(message, medium.pictures[1])
    else:
      text, marked = message.text, _marked(message, video, named)
    texts.append(text)
    regions.append(marked)
  turns = [Turn(texts[i], texts[i + 1], regions[i]) for i in range(0, len(texts) - 1, 2)]
  return Request(
    None if medium is None else medium.source,
    texts[-1],
    regions[-1],
    fps=None if chat.media is None else chat.media.fps,
    turns=turns,
    system=chat.system,
  )


def _marked(message: Message, video: Video | None, named: dict[str, list[Region]]) -> list[Region]:
  """The regions of a message, those of each `<region>` in turn; adds to the named objects."""
  objects: dict[Key, list[Region]] = {}
  for key, mark in zip(keys(message.marks), message.marks, strict=True):
    if video is None:
      raise mark.node.refusal("a region without a video or image")
    region = _region(mark, video)
    known = named.setdefault(key, []) if isinstance(key, str) else objects.setdefault(key, [])
    if not any(_are_equal(region, other) for other in known):  # a client sends its history again
      known.append(region)
  if None in message.mentions:
    raise message.node["content"].refusal(f"found a {REGION} without an object")
  regions, uses = [], collections.Counter[Key]()
  for key in message.mentions:
    assert key is not None
    uses[key] += 1
    for region in named[key] if isinstance(key, str) else objects[key]:
      # A second `<region cat>` is an object of its own to the model.
      name = f"{key} ({uses[key]})" if uses[key] > 1 else region.name
      regions.append(dataclasses.replace(region, name=name))
  return regions


def _are_equal(one: Region, other: Region) -> bool:
  return all(
    np.array_equal(getattr(one, field.name), getattr(other, field.name))
    for field in dataclasses.fields(Region)
  )


def _pictured(message: Message, masks: Sequence[np.ndarray]) -> tuple[str, list[Region]]:
  """A message whose pictures' transparency marks its object, as DAM's clients send it."""
  content = message.node["content"]
  if message.marks:
    raise content.refusal(
      "regions, and a picture whose transparency marks an object; accepted: one way a message"
    )
  for number, mask in enumerate(masks):
    if not mask.any():
      raise content.refusal(f"picture {number} is transparent everywhere")
  text = message.text.replace(TAG, "").strip()
  if len(message.mentions) > 1:
    raise content.refusal(f"found {len(message.mentions)} {REGION} but 1 objects")
  text = text if message.mentions else f"{text} {REGION}".strip()
  # Regions with one name are one object.
  return text, [Region(mask=m, frame=n, name="object") for n, m in enumerate(masks)]


# --- One region


def _region(mark: Mark, video: Video) -> Region:
  """The region, checked against the clip."""
  node = mark.node
  height, width = video.size
  relative = "coordinates" in node and node.value["coordinates"] == "relative"
  scale = (width, height) if relative else (1, 1)
  fields: dict[str, Any] = {"name": mark.name}
  if "masks" not in node:
    fields["frame"] = _frame(node, video)
  shape = next(s for s in _SHAPES if s in node)
  part = node[shape]
  if relative and shape in ("rle", "masks", "mask"):
    raise node["coordinates"].refusal(f"{shape} is in pixels")
  try:
    fields |= _SHAPES[shape](part, scale, video)
    region = Region(**fields)
    objects_of([region], video)
  except InputError as error:
    raise part.refusal(error) from None
  return region


def _frame(node: Node, video: Video) -> int:
  part = node["frame"]
  if "frame" not in node:
    if len(video) > 1:
      raise part.refusal(f"absent; accepted: a frame from 0 to {len(video) - 1}, or a time")
    return 0
  try:
    return frame_number(part.value, video)
  except InputError as error:
    raise part.refusal(error) from None


def _pair(part: Node, scale: Sequence[int]) -> tuple[float | str, ...]:
  """Numbers in pixels, x and y by turns; shares such as "30%" stay as they are."""
  values = [
    entry.value if isinstance(entry.value, str) else entry.number() * scale[i % 2]
    for i, entry in enumerate(part.items(2, 1 << 16))
  ]
  return tuple(values)


def _box(part: Node, scale: Sequence[int], video: Video) -> dict[str, Any]:
  return {"box": _pair(part, scale)}


def _point(part: Node, scale: Sequence[int], video: Video) -> dict[str, Any]:
  return {"point": _pair(part, scale)}


def _points(part: Node, scale: Sequence[int], video: Video) -> dict[str, Any]:
  """Discs around the points of label 1, without those around the points of label 0."""
  mask = np.zeros(video.size, bool)
  away = np.zeros(video.size, bool)
  for entry in part.items(1, POINTS):
    values = list(entry.items(2, 3))
    label = values[2].whole(0, 1) if len(values) == 3 else 1
    point = [values[i].number() * scale[i] for i in (0, 1)]
    (mask if label else away)[mask_from_point(point, *video.size) > 0] = True
  return {"mask": mask & ~away}


def _polygon(part: Node, scale: Sequence[int], video: Video) -> dict[str, Any]:
  """[x, y, x, y, …], [[x, y], …], or a list of several of the first form."""
  entries = list(part.items(1, 1 << 16))
  if not isinstance(entries[0].value, list):
    return {"rle": [list(_pair(part, scale))]}
  rows = [list(_pair(entry, scale)) for entry in entries]
  pairs = all(len(row) == 2 for row in rows)
  return {"rle": [[value for row in rows for value in row]] if pairs else rows}


def _rle(part: Node, scale: Sequence[int], video: Video) -> dict[str, Any]:
  return {"rle": part.fields(("size", "counts")).value}


def _masks(part: Node, scale: Sequence[int], video: Video) -> dict[str, Any]:
  if not isinstance(part.value, dict) or not part.value:
    raise part.error("an object {frame: run lengths}")
  for frame in part.value:
    part[frame].fields(("size", "counts"))
  return {"rle": part.value}


class _Picture(io.BytesIO):
  """A picture in memory, which messages call by its name."""

  def __str__(self) -> str:
    return "the mask"


def _mask(part: Node, scale: Sequence[int], video: Video) -> dict[str, Any]:
  head, _, text = part.text(MASK).partition(",")
  if not head.startswith("data:") or not head.endswith(";base64"):
    raise part.error("a PNG as data:image/png;base64,…")
  try:
    picture = _Picture(base64.b64decode(text, validate=True))
    with Image.open(picture, formats=["PNG"]) as image:
      size = image.height, image.width
  except (binascii.Error, ValueError, OSError, Image.DecompressionBombError, SyntaxError):
    raise part.error("a PNG as data:image/png;base64,…") from None
  if size != video.size:
    raise part.refusal(
      f"a mask of {size[0]}x{size[1]} (height x width); accepted: {video.size[0]}x{video.size[1]}, "
      "as the clip"
    )
  return {"mask": read_mask_picture(picture).mask}  # type: ignore[arg-type]


def _object(part: Node, scale: Sequence[int], video: Video) -> dict[str, Any]:
  raise part.refusal("no such object, or it has expired", status=404, code="no_such_object")


_SHAPES = {
  "box": _box,
  "point": _point,
  "points": _points,
  "polygon": _polygon,
  "rle": _rle,
  "masks": _masks,
  "mask": _mask,
  "object": _object,
}
