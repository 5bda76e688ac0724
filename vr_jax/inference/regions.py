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
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipes.errors import InputError
from data_pipes.mask_images import mask_of_array, read_mask_picture
from data_pipes.masks import (
  annotation_to_mask,
  check_size,
  mask_from_box,
  mask_from_point,
  mask_to_grid,
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
  """An object of the question: its name, and masks uint8 [H, W] by frame number, ascending.

  `notes` say what a user should know of how its regions were read.
  """

  name: str
  masks: Mapping[int, np.ndarray]
  notes: tuple[str, ...] = ()


def parse_regions(specs: Sequence[str]) -> list[Region]:
  """Region SPECs of the command line, in their order; files are not opened yet."""
  return [_parse(spec) for spec in specs]


def objects_of(regions: Sequence[Region], video: Video) -> list[MarkedObject]:
  """The objects that regions mark, in the order in which each is first named.

  Raises:
    InputError: one line naming the region: a frame that the video does not have, a box or point
      outside it, a mask of another size, a file that cannot be read, an object with nothing in it.
  """
  objects: dict[tuple[str, Any], dict[int, np.ndarray]] = {}
  notes: dict[tuple[str, Any], list[str]] = {}
  for i, region in enumerate(regions):
    # A place cannot be mistaken for a name, so a region without a name stays alone.
    key = ("place", i) if region.name is None else ("name", region.name)
    masks = objects.setdefault(key, {})
    try:
      further = _masks(region, video, notes.setdefault(key, []))
      twice = masks.keys() & further.keys()
      if twice:
        raise InputError(f"frame {min(twice)} has a region of this object already; one is accepted")
    except InputError as error:
      raise InputError(f"region {region}: {error}") from error
    masks.update(further)
  marked = []
  for i, (key, masks) in enumerate(objects.items()):
    name = str(key[1]) if key[0] == "name" else f"object {i}"
    if not any(mask.any() for mask in masks.values()):
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

  Under "published" it is in no cell there, and the model cannot see it; under "keep" the cells it
  covers most stand for it.

  `grid` is the number of cells per side of the vision tower, the rest as in `mask_to_grid`.
  """
  lines = []
  for marked in objects:
    lines += marked.notes
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
  """A frame number, or a time as it stands; None where it is neither."""
  if text.isdecimal():
    return int(text)
  return text if _seconds(text) is not None else None


def _seconds(text: str) -> float | None:
  """Seconds of a time such as `1.5s`, `0:01.5` or `1:02:03`."""
  if re.fullmatch(r"\d+(?:\.\d*)?s|\.\d+s", text):
    return float(text[:-1])
  if re.fullmatch(r"(?:\d+:)?\d{1,2}:\d{1,2}(?:\.\d*)?", text):
    seconds = 0.0
    for part in text.split(":"):
      seconds = 60 * seconds + float(part)
    return seconds
  return None


def _marking(text: str) -> dict[str, Any]:
  kind, colon, numbers = text.partition(":")
  if colon and kind in ("box", "point"):
    if "@" in numbers:
      frame = numbers.partition("@")[2]
      raise InputError(f"FRAME: found {frame!r}; accepted: a frame number, or a time such as 1.5s")
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


def _pixels(values: Sequence[float | str], video: Video, what: str) -> list[Any]:
  """x, y, … in pixels, of numbers and of shares such as "30%"."""
  height, width = video.size
  try:
    numbers = list(values)
  except TypeError:
    raise InputError(f"{what} {values!r}; accepted: numbers, in pixels or as 30%") from None
  for i, value in enumerate(numbers):
    if isinstance(value, str) and value.endswith("%"):
      numbers[i] = float(value[:-1]) / 100 * (height if i % 2 else width)
  plain = [float(v) for v in numbers if isinstance(v, int | float | np.number)]
  inside_a_pixel = len(plain) == len(numbers) and all(0 <= v <= 1 for v in plain)
  if inside_a_pixel and any(v % 1 for v in plain):
    shares = ",".join(f"{100 * v:g}%" for v in plain)
    raise InputError(
      f"{what} {','.join(f'{v:g}' for v in plain)} is smaller than a pixel; relative? write "
      f"{what}:{shares}"
    )
  return numbers


def _masks(region: Region, video: Video, notes: list[str]) -> dict[int, np.ndarray]:
  """The region's masks by frame number, checked against the video; `notes` gets what to tell."""
  if region.rle is not None:
    by_frame = _frames_of_rle(region)
    if by_frame is not None:
      masks = {}
      for number, entry in by_frame.items():
        try:
          masks[_in_video(number, video)] = _entry_mask(entry, video, notes)
        except InputError as error:
          raise InputError(f"frame {number}: {error}") from error
      return masks
  number = _frame_number(region, video)
  if region.rle is not None:
    return {number: _entry_mask(_content(region.rle), video, notes)}
  height, width = video.size
  if region.box is not None:
    mask = _box_mask(region.box, video, notes)
  elif region.point is not None:
    mask = mask_from_point(_pixels(region.point, video, "point"), height, width)
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
  return {number: mask}


def _box_mask(box: Sequence[float | str], video: Video, notes: list[str]) -> np.ndarray:
  height, width = video.size
  numbers = _pixels(box, video, "box")
  mask = mask_from_box(numbers, height, width)
  x1, y1, x2, y2 = map(float, numbers)
  if x1 < 0 or y1 < 0 or x2 > width or y2 > height:
    notes.append(
      f"the box {x1:g},{y1:g},{x2:g},{y2:g} leaves the picture of {width}x{height} (width x "
      "height) and is cut to it"
    )
  return mask


def _entry_mask(entry: Any, video: Video, notes: list[str]) -> np.ndarray:
  """The mask of one frame: run lengths, polygons, the published form, a box, or nothing seen.

  Raises InputError for keys that are not known: a misspelt one must not read as "not seen".
  """
  height, width = video.size
  if isinstance(entry, dict) and "counts" not in entry:
    unknown = sorted(map(str, entry.keys() - {"segmentation", "box", "size", "bbox", "area"}))
    if unknown or ("size" in entry and "segmentation" not in entry):
      raise InputError(
        f"key {(unknown or ['size'])[0]!r}; accepted: segmentation, box, or size and counts"
      )
    if entry.get("segmentation") is None and entry.get("box") is not None:
      return _box_mask(entry["box"], video, notes)
    entry = entry.get("segmentation")
  return annotation_to_mask({"segmentation": entry}, height, width)


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
    seconds = _seconds(parsed) if isinstance(parsed, str) else None
    frame = parsed if seconds is None else video.time_to_frame(seconds)
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
  if (
    not isinstance(content, dict)
    or not content
    or {"counts", "segmentation", "box"} & content.keys()
  ):
    return None
  for key in content:
    if not str(key).isdecimal():
      raise InputError(
        f'key {key!r}; accepted: frame numbers such as "12", or "size" and "counts" of one mask'
      )
  if region.frame is not None:
    raise InputError("its masks have frame numbers of their own; leave the frame out")
  by_frame = {int(key): value for key, value in content.items()}
  if len(by_frame) < len(content):
    raise InputError("two keys name one frame; accepted: one mask for each frame")
  return by_frame


def _content(rle: Any) -> Any:
  if not isinstance(rle, str | os.PathLike):
    return rle
  try:
    with open(rle, encoding="utf-8") as file:
      return json.load(file)
  except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
    raise InputError(f"cannot be read as JSON ({error})") from error
