"""COCO instances, LVIS, and what CVAT, Roboflow, Label Studio … write as COCO."""

import collections
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipes.images import open_image
from data_pipes.importers.marked import Left, Marked, Media, Text, box_segmentation, usable
from data_pipes.importers.parts import Source, checked, number, part, size_of


def read(source: Source, left: Left) -> Iterator[Media]:
  """An image each. A crowd is no object; a box counts where there is no mask."""
  content = source.json()
  names = categories(content, str(source.path))
  marks = collections.defaultdict(list)
  for i, entry in enumerate(part(content, "annotations", list, str(source.path))):
    where = f"{source.path}: annotation {entry.get('id', i) if isinstance(entry, dict) else i}"
    marks[part(entry, "image_id", (int, str), where)].append((where, entry))
  for i, image in enumerate(part(content, "images", list, str(source.path))):
    where = f"{source.path}: image {i}"
    key = part(image, "id", (int, str), where)
    name = part(image, "file_name", str, where, "") or part(image, "coco_url", str, where)
    path = source.located(name)
    size = _size(image, source.media / path, where)
    media = Media("image", path, size, [], keys=(str(key), name))
    for place, entry in marks.pop(key, ()):
      marked = _marked(entry, names, size, place, left)
      if marked is None:
        continue
      media.objects.append(marked)
      if text := part(entry, "caption", str, place, ""):
        media.texts.append(Text(text, marked.keys))
    yield media
  for entries in marks.values():
    for place, _ in entries:
      left.add("annotations of images that are not listed", place)


def categories(content: Any, where: str) -> dict[Any, str]:
  """Names by id."""
  listed = part(content, "categories", list, where, [])
  places = [f"{where}: category {i}" for i in range(len(listed))]
  return {
    part(entry, "id", (int, str), place): part(entry, "name", str, place)
    for entry, place in zip(listed, places, strict=True)
  }


def _size(image: Any, path: Path, where: str) -> tuple[int, int] | None:
  """What the entry states, or else the picture, where it is there."""
  if image.get("height") is not None or not path.is_file():
    return None if image.get("height") is None else size_of(image, where)
  with open_image(path) as picture:
    return picture.height, picture.width


def _marked(
  entry: Any, names: dict[Any, str], size: tuple[int, int] | None, where: str, left: Left
) -> Marked | None:
  if part(entry, "iscrowd", (int, bool), where, 0):
    left.add("crowds, which are no single object", where)
    return None
  if part(entry, "num_keypoints", int, where, 0):
    left.add("keypoints", where)
  segmentation = entry.get("segmentation")
  if segmentation in (None, [], {}):
    if entry.get("bbox") is None:
      left.add("annotations without a mask and a box", where)
      return None
    segmentation = box_of(entry["bbox"], size, where, left)
  mask = usable(segmentation, size, where, left)
  name = names.get(part(entry, "category_id", (int, str), where, None), "")
  return Marked(name, (str(entry.get("id")),), {} if mask is None else {0: mask})


def box_of(bbox: Any, size: tuple[int, int] | None, where: str, left: Left) -> Any:
  """COCO's x, y, width, height as a segmentation."""
  values = dict(zip("xywh", checked(bbox, list, f"{where}: key 'bbox'"), strict=False))
  x, y, width, height = (number(values, key, f"{where}: key 'bbox'") for key in "xywh")
  return box_segmentation((x, y, x + width, y + height), size, where, left)
