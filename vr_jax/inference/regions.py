"""What a user points at: masks, boxes and points on frames of a video, as objects with masks.

A region on the command line is a SPEC, optionally with the object's name in front (`cat=...`):

    mask.png@FRAME           an image of the video's size: black and white, or the object alone in
                             its transparency; mask.png#2 is object 2 of an image that numbers some
    box:x1,y1,x2,y2@FRAME    pixels of the source video, x to the right, y down; or shares of its
                             size, as in box:30%,20%,60%,70%
    point:x,y@FRAME          a disc around the point
    rle.json                 {"12": M, "20": M, ...}: a mask for each frame number; M is
                             {"size": [height, width], "counts": ...} (COCO run lengths, compressed
                             or a list), polygons, the published {"segmentation": ...}, or
                             {"box": [x1, y1, x2, y2]}; null or {} where the object is not seen
    rle.json@FRAME           one such M

FRAME is the 0-based number of a presented frame, or a time such as `1.5s` or `0:01.5`. It may be
left out where the video has only one frame.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipes.errors import InputError, one_line, reading, shown
from data_pipes.json_items import check_text
from data_pipes.mask_images import mask_of_array, read_mask_picture
from data_pipes.masks import (
  GridMask,
  annotation_to_mask,
  check_size,
  grid_mask,
  in_pixels,
  mask_from_box,
  mask_from_point,
)
from data_pipes.records import FRAME_DIGITS, frame_segmentation, object_frames
from data_pipes.video import Video, open_video

ACCEPTED = "mask.png@FRAME, box:x1,y1,x2,y2@FRAME, point:x,y@FRAME, rle.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Region:
  """One object on one frame (`rle` by frame number: on several).

  Exactly one of the first four is given. Regions with the same `name` are one object; a region
  without a name is an object of its own.

  Attributes:
    mask: [H, W] bool, 0/1 or 0/255 of the video's size, or the path of a mask image ("m.png#2": of
      object 2).
    box: x1, y1, x2, y2 in pixels of the source video, or shares of its size such as "30%".
    point: x, y likewise.
    rle: the content of an `rle.json`, see this module's text, or the path of one.
    frame: 0-based number of a presented frame, or a time such as "1.5s" or "0:01.5".
    name: the object's name.
  """

  mask: Any = None
  box: Sequence[float | str] | None = None
  point: Sequence[float | str] | None = None
  rle: Any = None
  frame: int | str | None = None
  name: str | None = None

  def __post_init__(self):
    given = [f for f in ("mask", "box", "point", "rle") if getattr(self, f) is not None]
    if len(given) != 1:
      raise InputError(
        f"a region takes one of mask, box, point, rle; found {', '.join(given) or 'none'}"
      )
    if not isinstance(self.name, str | int | None):
      raise InputError(f"a region's name {shown(self.name)}; accepted: text")
    check_text([self.name], "a region's name")

  def __str__(self) -> str:
    """The region as a SPEC, for messages."""
    numbers = self.box if self.point is None else self.point
    if numbers is not None:
      listed = isinstance(numbers, list | tuple | np.ndarray)
      values = ",".join(map(str, numbers)) if listed else shown(numbers)
      text = one_line(f"{'box' if self.point is None else 'point'}:{values}", 80)
    else:
      source, kind = (self.rle, "rle") if self.mask is None else (self.mask, "mask")
      text = str(source) if isinstance(source, str | os.PathLike) else kind
    name = "" if self.name is None else f"{self.name}="
    return f"{name}{text}" + ("" if self.frame is None else f"@{self.frame}")


@dataclasses.dataclass(frozen=True)
class MarkedObject:
  """An object of the question: its name, and masks uint8 [H, W] by frame number, ascending.

  The masks are what `convert` of `objects_of` made of them, where that is given. `notes` say what a
  user should know of how its regions were read.
  """

  name: str
  masks: Mapping[int, Any]
  notes: tuple[str, ...] = ()


def parse_regions(specs: Sequence[str]) -> list[Region]:
  """Region SPECs of the command line, in their order; files are not opened yet."""
  return [_parse(spec) for spec in specs]


def read_regions(
  video: Any, regions: Region | str | Sequence[Region | str]
) -> dict[str, dict[int, np.ndarray]]:
  """What regions mark, as a model gets it: {name: {frame number: mask bool [H, W]}}.

  Args:
    video: what `open_video` takes; a photo stands upright, as in `Model.ask`.
    regions: SPECs of the command line or Regions, in any mixture, or one of them. One without a
      name is called "object i", i being its place among the objects.

  Raises:
    InputError: as `objects_of`; or two objects would have one name.
  """
  with reading(f"regions {shown(regions)}", "SPECs or Regions"):
    several = [regions] if isinstance(regions, Region | str) else list(regions)
  for region in several:
    if not isinstance(region, Region | str):
      raise InputError(f"region {shown(region)}; accepted: a SPEC or a Region")
  parsed = [_parse(region) if isinstance(region, str) else region for region in several]
  marked = objects_of(parsed, open_video(video, upright=True))
  masks = {m.name: {number: mask.astype(bool) for number, mask in m.masks.items()} for m in marked}
  if len(masks) < len(marked):
    names = ", ".join(m.name for m in marked)
    raise InputError(f"two of the objects {names} have one name; accepted: a name of its own each")
  return masks


def objects_of(
  regions: Sequence[Region], video: Video, convert: Callable[[np.ndarray], Any] | None = None
) -> list[MarkedObject]:
  """The objects that regions mark, in the order in which each is first named.

  `convert` is applied to each mask as it is drawn, so that not all are held at full size.

  Raises:
    InputError: one line naming the region: a frame that the video does not have, a box or point
      outside it, a mask of another size, a file that cannot be read, an object with nothing in it.
  """
  objects: dict[tuple[str, Any], dict[int, Any]] = {}
  notes: dict[tuple[str, Any], list[str]] = {}
  seen = set()
  for i, region in enumerate(regions):
    # A place cannot be mistaken for a name, so a region without a name stays alone.
    key = ("place", i) if region.name is None else ("name", region.name)
    masks = objects.setdefault(key, {})
    try:
      for number, mask in _masks(region, video, notes.setdefault(key, [])):
        if number in masks:
          raise InputError(f"frame {number} has a region of this object already; one is accepted")
        if mask.any():
          seen.add(key)
        masks[number] = mask if convert is None else convert(mask)
    except InputError as error:
      raise InputError(f"region {region}: {error}") from error
  marked = []
  for i, (key, masks) in enumerate(objects.items()):
    name = str(key[1]) if key[0] == "name" else f"object {i}"
    if key not in seen:
      raise InputError(f"{name}: its mask is empty; at least one pixel must belong to the object")
    lines = tuple(f"{name}: {note}" for note in notes[key])
    marked.append(MarkedObject(name, dict(sorted(masks.items())), lines))
  return marked


def warnings_of(
  objects: Sequence[MarkedObject],
  grid: int,
  aspect_ratio: str = "square",
  rule: str = "keep",
) -> list[str]:
  """The notes of the objects, and one line for each that is too small for the grid on some frame.

  Under "published" it may be in no cell there, and the model cannot see it; otherwise the cells it
  covers most stand for it.

  `grid` is the number of cells per side of the vision tower, the rest as in `mask_to_grid`. The
  masks may be on that grid already.
  """
  lines = []
  for marked in objects:
    lines += marked.notes
    if rule == "area":
      continue
    on_grid = {
      number: mask if isinstance(mask, GridMask) else grid_mask(mask, grid, aspect_ratio, rule)
      for number, mask in marked.masks.items()
    }
    lost = [number for number, mask in on_grid.items() if mask.lost]
    small = [number for number, mask in on_grid.items() if mask.lost or mask.small]
    unseen = rule == "published" and bool(lost)
    numbers = lost if unseen else small
    if not numbers:
      continue
    where = (
      f"frame {numbers[0]}" if len(numbers) == 1 else f"{len(numbers)} of {len(on_grid)} frames"
    )
    if not unseen:
      effect = "the cell it lies in stands for it, most of which is its surroundings"
    elif len(lost) == len(on_grid):
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
  """A frame number, or a time as it stands; None where it is neither."""
  if text.isdecimal() and len(text) <= FRAME_DIGITS:
    return int(text)
  return text if parse_seconds(text) is not None else None


def _marking(text: str) -> dict[str, Any]:
  kind, colon, numbers = text.partition(":")
  if colon and kind in ("box", "point"):
    if "@" in numbers:
      frame = numbers.partition("@")[2]
      raise InputError(
        f"FRAME: found {shown(frame)}; accepted: a frame number, or a time such as 1.5s"
      )
    return {kind: tuple(_number(n) for n in numbers.split(","))}
  path, _ = _object_of_file(text)
  if os.path.isfile(path):
    return {"rle" if text.lower().endswith(".json") else "mask": text}
  raise InputError(f"found neither a file nor a region; accepted: {ACCEPTED}")


def _object_of_file(text: str) -> tuple[str, int | None]:
  """The path of `mask.png#2` and its object; a file of the whole name comes first."""
  path, mark, number = text.rpartition("#")
  if mark and number.isdecimal() and not os.path.isfile(text):
    return path, int(number)
  return text, None


def _number(text: str) -> float | str:
  share = text.strip().endswith("%")
  try:
    value = float(text.strip().removesuffix("%"))
  except ValueError:
    value = math.nan
  if not math.isfinite(value):
    raise InputError(f"found {text!r}; accepted: numbers, in pixels of the source video, or as 30%")
  if share:
    return text.strip()
  return int(value) if value.is_integer() else value


def _masks(region: Region, video: Video, notes: list[str]) -> Iterator[tuple[int, np.ndarray]]:
  """The region's masks with their frame numbers, drawn one by one; `notes` gets what to tell."""
  if region.rle is not None:
    content = _content(region.rle)
    by_frame = _frames_of_rle(content, region, video)
    if by_frame is None:
      by_frame = {_frame_number(region, video): frame_segmentation(content, "the mask")}
    for number, segmentation in by_frame.items():
      number = _in_video(number, video)
      try:
        mask = _drawn(segmentation, video, notes)
      except InputError as error:
        raise InputError(f"frame {number}: {error}") from error
      yield number, mask
    return
  number = _frame_number(region, video)
  height, width = video.size
  if region.box is not None:
    mask = _box_mask(region.box, video, notes)
  elif region.point is not None:
    mask = mask_from_point(region.point, height, width)
  elif isinstance(region.mask, str | os.PathLike):
    path, number_in_file = _object_of_file(os.fspath(region.mask))
    mask, note = read_mask_picture(path, number_in_file)
    try:
      mask = check_size(mask, height, width)
    except InputError as error:
      raise InputError(f"{path}: {error}") from None
    notes += [note] if note else []
  else:
    mask = check_size(mask_of_array(region.mask), height, width)
  if not mask.any():
    raise InputError("the mask is empty; at least one pixel must belong to the object")
  yield number, mask


def _drawn(segmentation: Any, video: Video, notes: list[str]) -> np.ndarray:
  if isinstance(segmentation, dict) and "box" in segmentation:
    return _box_mask(segmentation["box"], video, notes)
  return annotation_to_mask({"segmentation": segmentation}, *video.size)


def _box_mask(box: Sequence[float | str], video: Video, notes: list[str]) -> np.ndarray:
  height, width = video.size
  mask = mask_from_box(box, height, width)
  x1, y1, x2, y2 = in_pixels(box, height, width, "box", "x1,y1,x2,y2")
  if x1 < 0 or y1 < 0 or x2 > width or y2 > height:
    notes.append(
      f"the box {x1:g},{y1:g},{x2:g},{y2:g} leaves the picture of {width}x{height} (width x "
      "height) and is cut to it"
    )
  return mask


def parse_seconds(text: str) -> float | None:
  """Seconds of a time such as `1.5s`, `0:01.5` or `1:02:03`."""
  if re.fullmatch(r"\d+(?:\.\d*)?s|\.\d+s", text):
    return float(text[:-1])
  if re.fullmatch(r"(?:\d+:)?\d{1,2}:\d{1,2}(?:\.\d*)?", text):
    seconds = 0.0
    for part in text.split(":"):
      seconds = 60 * seconds + float(part)
    return seconds
  return None


def _frame_number(region: Region, video: Video) -> int:
  if region.frame is None:
    if len(video) > 1:
      raise InputError(f"no frame; accepted: a frame from 0 to {len(video) - 1}, as in {region}@0")
    return 0
  return frame_number(region.frame, video)


def frame_number(frame: int | str, video: Video) -> int:
  """The number of a presented frame, given by itself or by a time such as "1.5s" or "0:01.5"."""
  if isinstance(frame, str):
    parsed = _frame(frame)
    if parsed is None:
      raise InputError(f"frame {shown(frame)}; accepted: a frame number, or a time such as '1.5s'")
    seconds = parse_seconds(parsed) if isinstance(parsed, str) else None
    frame = parsed if seconds is None else video.time_to_frame(seconds)
  return _in_video(frame, video)


def _in_video(number: Any, video: Video) -> int:
  if isinstance(number, bool) or not isinstance(number, int | np.integer):
    raise InputError(f"frame {shown(number)}; accepted: a frame number, or a time such as '1.5s'")
  if not 0 <= number < len(video):
    raise InputError(f"frame {number}; {video.name} has frames 0 to {len(video) - 1}")
  return int(number)


def _frames_of_rle(content: Any, region: Region, video: Video) -> dict[int, Any] | None:
  """Segmentations by frame number; None where the content is the mask of one frame."""
  objects = content if isinstance(content, list) else []
  if all(isinstance(entry, list) for entry in objects):  # or polygons, whose entries are numbers
    objects = [entry for inner in objects for entry in inner]
  if objects and all(isinstance(entry, dict) for entry in objects):  # as in the published files
    if len(objects) > 1:
      raise InputError(f"found {len(objects)} objects; accepted: one object in a file")
    content = objects[0]
  one_frame = {"counts", "segmentation", "box"}
  if not isinstance(content, dict) or not content or one_frame & content.keys():
    return None
  for key in content:
    if not str(key).isdecimal():
      raise InputError(
        f'key {key!r}; accepted: frame numbers such as "12", or "size" and "counts" of one mask'
      )
  if region.frame is not None:
    raise InputError("its masks have frame numbers of their own; leave the frame out")
  return object_frames(content, "the object", "image" if video.kind == "image" else "video")


def _content(rle: Any) -> Any:
  if not isinstance(rle, str | os.PathLike):
    return rle
  with reading("cannot be read as JSON"), open(rle, encoding="utf-8") as file:
    return json.load(file)
