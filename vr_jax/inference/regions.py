"""What a user points at: masks, boxes and points on frames of a video, as objects with masks.

A region on the command line is a SPEC, optionally with the object's name in front (`cat=...`):

    mask.png@FRAME           an image of the video's size; what is not black is the object
    box:x1,y1,x2,y2@FRAME    pixels of the source video, x to the right, y down
    point:x,y@FRAME          a disc around the point
    rle.json                 {"12": M, "20": M, ...}: a mask for each frame number; M is
                             {"size": [height, width], "counts": ...} (COCO run lengths, compressed
                             or a list), polygons, or the published {"segmentation": ...}
    rle.json@FRAME           one such M

FRAME is the 0-based number of a presented frame, or a time such as `1.5s`. It may be left out where
the video has only one frame.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipes.errors import InputError
from data_pipes.masks import (
  annotation_to_mask,
  check_size,
  mask_from_box,
  mask_from_point,
  mask_to_grid,
  read_mask,
  vanished,
)
from data_pipes.video import Video

ACCEPTED = "mask.png@FRAME, box:x1,y1,x2,y2@FRAME, point:x,y@FRAME, rle.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Region:
  """One object on one frame (`rle` by frame number: on several).

  Exactly one of the first four is given. Regions with the same `name` are one object; a region
  without a name is an object of its own.

  Attributes:
    mask: [H, W] bool or 0/1 of the video's size, or the path of a mask image.
    box: x1, y1, x2, y2 in pixels of the source video.
    point: x, y in pixels.
    rle: the content of an `rle.json`, see this module's text, or the path of one.
    frame: 0-based number of a presented frame, or a time such as "1.5s".
    name: the object's name.
  """

  mask: Any = None
  box: Sequence[float] | None = None
  point: Sequence[float] | None = None
  rle: Any = None
  frame: int | str | None = None
  name: str | None = None

  def __post_init__(self):
    given = [f for f in ("mask", "box", "point", "rle") if getattr(self, f) is not None]
    if len(given) != 1:
      raise InputError(
        f"a region takes one of mask, box, point, rle; found {', '.join(given) or 'none'}"
      )

  def __str__(self) -> str:
    """The region as a SPEC, for messages."""
    numbers = self.box if self.point is None else self.point
    if numbers is not None:
      text = f"{'box' if self.point is None else 'point'}:{','.join(str(v) for v in numbers)}"
    else:
      source, kind = (self.rle, "rle") if self.mask is None else (self.mask, "mask")
      text = str(source) if isinstance(source, str | os.PathLike) else kind
    name = "" if self.name is None else f"{self.name}="
    return f"{name}{text}" + ("" if self.frame is None else f"@{self.frame}")


@dataclasses.dataclass(frozen=True)
class MarkedObject:
  """An object of the question: its name, and masks uint8 [H, W] by frame number, ascending."""

  name: str
  masks: Mapping[int, np.ndarray]


def parse_regions(specs: Sequence[str]) -> list[Region]:
  """Region SPECs of the command line, in their order; files are not opened yet."""
  return [_parse(spec) for spec in specs]


def objects_of(regions: Sequence[Region], video: Video) -> list[MarkedObject]:
  """The objects that regions mark, in the order in which each is first named.

  Raises:
    InputError: one line naming the region: a frame that the video does not have, a box or point
      outside it, a mask of another size, a file that cannot be read, an object with nothing in it.
  """
  objects: dict[str | int, dict[int, np.ndarray]] = {}
  for i, region in enumerate(regions):
    # An index cannot be mistaken for a name, so a region without a name stays alone.
    masks = objects.setdefault(i if region.name is None else region.name, {})
    try:
      further = _masks(region, video)
      twice = masks.keys() & further.keys()
      if twice:
        raise InputError(f"frame {min(twice)} has a region of this object already; one is accepted")
    except InputError as error:
      raise InputError(f"region {region}: {error}") from error
    masks.update(further)
  marked = []
  for i, (key, masks) in enumerate(objects.items()):
    name = key if isinstance(key, str) else f"object {i}"
    if not any(mask.any() for mask in masks.values()):
      raise InputError(f"{name}: its mask is empty; at least one pixel must belong to the object")
    marked.append(MarkedObject(name, dict(sorted(masks.items()))))
  return marked


def warnings_of(
  objects: Sequence[MarkedObject],
  grid: int,
  aspect_ratio: str = "square",
  rule: str = "keep",
) -> list[str]:
  """One line for each object too small for the grid on some frame.

  Under "published" it is in no cell there, and the model cannot see it; under "keep" the cells it
  covers most stand for it.

  `grid` is the number of cells per side of the vision tower, the rest as in `mask_to_grid`.
  """
  lines = []
  for marked in objects:
    lost = [
      number
      for number, mask in marked.masks.items()
      if vanished(mask, mask_to_grid(mask, grid, aspect_ratio, "published"))
    ]
    if lost and rule != "area":
      every = len(lost) == len(marked.masks)
      where = f"frame {lost[0]}" if len(lost) == 1 else f"{len(lost)} of {len(marked.masks)} frames"
      if rule == "keep":
        effect = "the cell it lies in stands for it, most of which is its surroundings"
      elif every:
        effect = "the model learns nothing about it"
      else:
        effect = "those frames tell nothing of it"
      lines.append(
        f"{marked.name} is too small for the model's {grid}x{grid} grid on {where}: {effect}; "
        "mark a larger area or a frame where it is larger"
      )
  return lines


def _parse(spec: str) -> Region:
  named = re.match(r"([\w.-]+)=", spec)
  name, text = (named[1], spec[named.end() :]) if named else (None, spec)
  body, at, end = text.rpartition("@")
  frame = _frame(end) if at else None
  if frame is None:  # no @FRAME, or an @ of a file's name
    body = text
  try:
    return Region(**_marking(body), frame=frame, name=name)
  except InputError as error:
    raise InputError(f"region {spec!r}: {error}") from error


def _frame(text: str) -> int | str | None:
  if text.isdecimal():
    return int(text)
  return text if re.fullmatch(r"\d+(?:\.\d*)?s|\.\d+s", text) else None


def _marking(text: str) -> dict[str, Any]:
  kind, colon, numbers = text.partition(":")
  if colon and kind in ("box", "point"):
    if "@" in numbers:
      frame = numbers.partition("@")[2]
      raise InputError(f"FRAME: found {frame!r}; accepted: a frame number, or a time such as 1.5s")
    return {kind: tuple(_number(n) for n in numbers.split(","))}
  if os.path.isfile(text):
    return {"rle" if text.lower().endswith(".json") else "mask": text}
  raise InputError(f"found neither a file nor a region; accepted: {ACCEPTED}")


def _number(text: str) -> float:
  try:
    value = float(text)
  except ValueError:
    value = math.nan
  if not math.isfinite(value):
    raise InputError(f"found {text!r}; accepted: numbers, in pixels of the source video")
  return int(value) if value.is_integer() else value


def _masks(region: Region, video: Video) -> dict[int, np.ndarray]:
  """The region's masks by frame number, checked against the video."""
  height, width = video.size
  if region.rle is not None:
    by_frame = _frames_of_rle(region)
    if by_frame is not None:
      return {
        _in_video(number, video): annotation_to_mask(entry, height, width)
        for number, entry in by_frame.items()
      }
  number = _frame_number(region, video)
  if region.rle is not None:
    mask = annotation_to_mask(_entry(_content(region.rle)), height, width)
  elif region.box is not None:
    mask = mask_from_box(region.box, height, width)
  elif region.point is not None:
    mask = mask_from_point(region.point, height, width)
  elif isinstance(region.mask, str | os.PathLike):
    mask = read_mask(region.mask, height, width)
  else:
    mask = (np.asarray(region.mask) != 0).astype(np.uint8)
    if mask.ndim != 2:
      raise InputError(f"a mask array is [H, W]; found {list(mask.shape)}")
    mask = check_size(mask, height, width)
  if region.rle is None and not mask.any():
    raise InputError("the mask is empty; at least one pixel must belong to the object")
  return {number: mask}


def _frame_number(region: Region, video: Video) -> int:
  frame = region.frame
  if frame is None:
    if len(video) > 1:
      raise InputError(f"no frame; accepted: a frame from 0 to {len(video) - 1}, as in {region}@0")
    return 0
  if isinstance(frame, str):
    parsed = _frame(frame)
    if parsed is None:
      raise InputError(f"frame {frame!r}; accepted: a frame number, or a time such as '1.5s'")
    frame = video.time_to_frame(float(parsed[:-1])) if isinstance(parsed, str) else parsed
  return _in_video(frame, video)


def _in_video(number: Any, video: Video) -> int:
  if isinstance(number, bool) or not isinstance(number, int | np.integer):
    raise InputError(f"frame {number!r}; accepted: a frame number, or a time such as '1.5s'")
  if not 0 <= number < len(video):
    raise InputError(f"frame {number}; {video.name} has frames 0 to {len(video) - 1}")
  return int(number)


def _frames_of_rle(region: Region) -> dict[int, Any] | None:
  """Masks by frame number; None where the content is the mask of one frame."""
  content = _content(region.rle)
  if isinstance(content, list) and content and all(isinstance(o, dict) for o in content):
    if len(content) > 1:
      raise InputError(f"found {len(content)} objects; accepted: one object in a file")
    content = content[0]  # the published list of objects
  if not isinstance(content, dict) or not content or {"counts", "segmentation"} & content.keys():
    return None
  for key in content:
    if not str(key).isdecimal():
      raise InputError(
        f'key {key!r}; accepted: frame numbers such as "12", or "size" and "counts" of one mask'
      )
  if region.frame is not None:
    raise InputError("its masks have frame numbers of their own; leave the frame out")
  return {int(key): _entry(value) for key, value in content.items()}


def _entry(value: Any) -> dict[str, Any]:
  """A mask as the published {"segmentation": ...}."""
  if isinstance(value, dict) and "segmentation" in value:
    return value
  return {"segmentation": value}


def _content(rle: Any) -> Any:
  if not isinstance(rle, str | os.PathLike):
    return rle
  try:
    with open(rle, encoding="utf-8") as file:
      return json.load(file)
  except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
    raise InputError(f"cannot be read as JSON ({error})") from error
