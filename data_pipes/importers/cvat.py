"""CVAT: "CVAT for video 1.1" and "CVAT for images 1.1", as XML or as the ZIP that it downloads."""

import collections
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any
from xml.etree import ElementTree

import numpy as np

from data_pipes.errors import InputError, reading
from data_pipes.images import IMAGE_SUFFIXES
from data_pipes.importers.marked import (
  Left,
  Marked,
  Media,
  box_segmentation,
  ellipse,
  turned,
  usable,
)
from data_pipes.importers.parts import Source, number, size_of
from data_pipes.masks import counts_to_mask, encode_mask
from data_pipes.video import open_video

SHAPES = ("box", "polygon", "ellipse", "mask")


def read(source: Source, left: Left) -> Iterator[Media]:
  """Tracks: a video each task, with the frames where an object is not `outside`.

  Images: an image each, or where they are frames of a video (`frame_000012`, with no ending) that
  video, for each frame. Frame numbers count in the source, as CVAT writes them.
  """
  root = _parse(source)
  where = str(source.path)
  tasks = _tasks(root, where)
  tracks = collections.defaultdict(list)
  for i, track in enumerate(root.iter("track")):
    tracks[_task_of(track, tasks, f"{where}: track {track.get('id', i)}")].append((i, track))
  for task, entries in tracks.items():
    path = source.located(task.source or task.name or source.path.stem)
    size = task.size
    if size is None and (source.media / path).exists():
      size = open_video(source.media / path).size
    media = Media("video", path, size, [], keys=(task.name,))
    for i, track in entries:
      media.objects.append(_track(track, size, f"{where}: track {track.get('id', i)}", left))
    yield media
  for i, image in enumerate(root.iter("image")):
    place = f"{where}: image {image.get('id', i)}"
    yield _image(image, source, _task_of(image, tasks, place), place, left)


def _parse(source: Source) -> ElementTree.Element:
  with reading(f"{source.path}: cannot be read as CVAT's XML"):
    if source.path.suffix.lower() == ".zip":
      with zipfile.ZipFile(source.path) as archive, archive.open("annotations.xml") as file:
        root = ElementTree.parse(file).getroot()
    else:
      root = ElementTree.parse(source.path).getroot()
  if root.tag != "annotations":
    raise InputError(f"{source.path}: found <{root.tag}>; accepted: <annotations>, CVAT 1.1")
  return root


@dataclass(frozen=True)
class _Task:
  """What the file's head says of a task.

  `source` is the name of its video, "" of a task of pictures: then they lie in a folder of the
  task's name.
  """

  id: str
  name: str
  source: str
  size: tuple[int, int] | None


def _tasks(root: ElementTree.Element, where: str) -> dict[str, _Task]:
  tasks = {}
  heads = ("meta/task", "meta/job", "meta/project/tasks/task")
  for head in (one for path in heads for one in root.iterfind(path)):
    key, name = head.findtext("id") or "", head.findtext("name") or ""
    size = head.find("original_size")
    shape = None
    if size is not None:
      shape = size_of({e.tag: e.text for e in size}, f"{where}: original_size of task {name!r}")
    tasks[key] = _Task(key, name, (head.findtext("source") or _common(root)).strip(), shape)
  return tasks or {"": _Task("", "", _common(root), None)}


def _common(root: ElementTree.Element) -> str:
  """The video's name where the head has it for all."""
  return root.findtext("meta/source") or ""


def _task_of(element: ElementTree.Element, tasks: dict[str, _Task], where: str) -> _Task:
  key = element.get("task_id")
  if key is None and len(tasks) == 1:
    return next(iter(tasks.values()))
  if key not in tasks:
    raise InputError(f"{where}: task_id {key!r}; accepted: one of {', '.join(tasks)}")
  return tasks[key]


def _track(
  track: ElementTree.Element, size: tuple[int, int] | None, where: str, left: Left
) -> Marked:
  marked = Marked(track.get("label", ""), (track.get("id", ""),))
  for shape in track:
    if shape.tag not in SHAPES:
      left.add(f"shapes <{shape.tag}>", where)
      continue
    if shape.get("outside") == "1":
      continue
    frame = int(number(shape.attrib, "frame", where))
    place = f"{where}, frame {frame}"
    if (mask := _mask(shape, size, place, left)) is not None:
      marked.masks[frame] = mask
    _count_attributes(shape, place, left)
  return marked


def _image(
  image: ElementTree.Element, source: Source, task: _Task, where: str, left: Left
) -> Media:
  size = size_of(image.attrib, where)
  name = image.get("name") or ""
  frame, kind, path = 0, "image", name
  if PurePosixPath(name).suffix.lower() not in IMAGE_SUFFIXES and task.source:
    numbered = re.search(r"(\d+)$", name) or re.search(r"(\d+)$", image.get("id", ""))
    if numbered is None:
      raise InputError(f"{where}: name {name!r}; accepted: a picture, or frame_000012 of a video")
    frame, kind, path = int(numbered[1]), "video", task.source
  media = Media(kind, source.located(path), size, [], keys=(image.get("id", ""), name))
  for k, shape in enumerate(image):
    place = f"{where}, shape {k}"
    if shape.tag not in SHAPES:
      left.add("tags" if shape.tag == "tag" else f"shapes <{shape.tag}>", place)
      continue
    mask = _mask(shape, size, place, left)
    key = f"{image.get('id', '')}/{k}"
    media.objects.append(
      Marked(shape.get("label", ""), (key,), {} if mask is None else {frame: mask})
    )
    _count_attributes(shape, place, left)
  return media


def _count_attributes(shape: ElementTree.Element, where: str, left: Left) -> None:
  for attribute in shape.iterfind("attribute"):
    left.add("attributes", f"{where}: {attribute.get('name')}={attribute.text}")


def _mask(shape: ElementTree.Element, size: tuple[int, int] | None, where: str, left: Left) -> Any:
  values = shape.attrib
  turn = number(values, "rotation", where, 0.0)
  if shape.tag == "box":
    corners = tuple(number(values, key, where) for key in ("xtl", "ytl", "xbr", "ybr"))
    return usable(box_segmentation(corners, size, where, left, turn), size, where, left)
  if shape.tag == "ellipse":
    cx, cy, rx, ry = (number(values, key, where) for key in ("cx", "cy", "rx", "ry"))
    return usable([ellipse((cx, cy), (rx, ry), turn)], size, where, left)
  if shape.tag == "polygon":
    points = _numbers(values.get("points", ""), where)
    if turn:
      xy = list(zip(points[::2], points[1::2], strict=False))
      middle = tuple(np.mean([np.min(xy, 0), np.max(xy, 0)], 0).tolist())
      points = turned(xy, middle, turn)
    return usable([points], size, where, left)
  return _bitmap(values, size, where, left)


def _bitmap(values: dict[str, str], size: tuple[int, int] | None, where: str, left: Left) -> Any:
  """CVAT's own run lengths: along the rows of a box, beginning with the run of zeros."""
  keys = ("left", "top", "width", "height")
  x, y, width, height = (int(number(values, key, where)) for key in keys)
  counts = [int(n) for n in _numbers(values.get("rle", ""), where)]
  if size is None:
    left.add("masks on media of unknown size (give --media DIR)", where)
    return None
  if not (x >= 0 and y >= 0 and 0 < width <= size[1] - x and 0 < height <= size[0] - y):
    left.add("masks that leave their picture", where)
    return None
  # COCO's run lengths go down the columns: the same numbers, of the mirror image.
  try:
    part = counts_to_mask(counts, width, height).T
  except InputError as error:
    left.add("masks that cannot be drawn", f"{where}: {error}")
    return None
  mask = np.zeros(size, np.uint8)
  mask[y : y + height, x : x + width] = part
  return usable(encode_mask(mask), size, where, left)


def _numbers(text: str, where: str) -> list[float]:
  entries = enumerate(re.split(r"[,;\s]+", text.strip()))
  return [number({"points": value}, "points", f"{where}, value {k}") for k, value in entries]
