"""YouTube-VIS and OVIS: one JSON file, a list of masks for each object of each video."""

import collections
import os
from collections.abc import Iterator

from data_pipes.importers.coco import box_of, categories
from data_pipes.importers.marked import Left, Marked, Media, usable
from data_pipes.importers.parts import Source, checked, part, size_of


def read(source: Source, left: Left) -> Iterator[Media]:
  """A folder of frames each; frame i is the i-th of `file_names`, as far as the folder has more."""
  content = source.json()
  names = categories(content, str(source.path))
  marks = collections.defaultdict(list)
  for i, entry in enumerate(part(content, "annotations", list, str(source.path), [])):
    where = f"{source.path}: annotation {entry.get('id', i) if isinstance(entry, dict) else i}"
    marks[part(entry, "video_id", (int, str), where)].append((where, entry))
  for i, video in enumerate(part(content, "videos", list, str(source.path))):
    where = f"{source.path}: video {i}"
    key = part(video, "id", (int, str), where)
    files = [checked(name, str, where) for name in part(video, "file_names", list, where)]
    size = size_of(video, where)
    folder = os.path.dirname(files[0].replace("\\", "/")) if files else ""
    path = source.located(folder)
    numbers = source.numbers(path, files)
    media = Media("video", path, size, [], keys=(str(key),))
    for place, entry in marks.pop(key, ()):
      if part(entry, "iscrowd", (int, bool), place, 0):
        left.add("crowds, which are no single object", place)
        continue
      marked = Marked(
        names.get(part(entry, "category_id", (int, str), place, None), ""), (str(entry.get("id")),)
      )
      masks = part(entry, "segmentations", list, place, [])
      boxes = part(entry, "bboxes", list, place, [])
      if len(masks) > len(files):
        left.add("masks of more frames than the video has", place)
      for k, number in enumerate(numbers):
        mask = masks[k] if k < len(masks) else None
        if mask is None and not masks and k < len(boxes) and boxes[k] is not None:
          mask = box_of(boxes[k], size, f"{place}: frame {k}", left)
        mask = usable(mask, size, f"{place}: frame {k}", left)
        if mask is not None and number is None:
          left.add("frames that the folder lacks", f"{place}: {files[k]}")
        elif mask is not None and number is not None:
          marked.masks[number] = mask
      media.objects.append(marked)
    yield media
  for entries in marks.values():
    for place, _ in entries:
      left.add("annotations of videos that are not listed", place)
