"""SA-V: a JSON file of masklets for each video, NAME_manual.json and NAME_auto.json."""

from collections.abc import Iterator
from pathlib import Path

from data_pipes.errors import InputError
from data_pipes.importers.marked import Left, Marked, Media, usable
from data_pipes.importers.parts import Source, checked, load_json, number, part, size_of


def read(source: Source, left: Left) -> Iterator[Media]:
  """A video each, NAME.mp4 beside its JSON file. Masks are 6 a second, of 24 frames a second."""
  files = [source.path]
  if source.path.is_dir():
    files = sorted(f for kind in ("manual", "auto") for f in source.path.rglob(f"*_{kind}.json"))
  if not files:
    raise InputError(f"{source.path}: no JSON files; accepted: NAME_manual.json, NAME_auto.json")
  for file in files:
    yield _media(file, source, left)


def _media(file: Path, source: Source, left: Left) -> Media:
  content = load_json(file)
  where = str(file)
  name = part(content, "video_id", str, where)
  size = size_of(content, where, ("video_height", "video_width"))
  by_frame = part(content, "masklet", list, where)
  count = number(content, "video_frame_count", where, 4 * len(by_frame))
  step = max(1, round(count / max(1, len(by_frame))))
  ids = part(content, "masklet_id", list, where, [])
  folder = file.parent.relative_to(source.path).as_posix() if source.path.is_dir() else ""
  media = Media("video", source.located(f"{folder}/{name}.mp4"), size, [], keys=(name,))
  for k, masks in enumerate(by_frame):
    place = f"{where}: frame {k}"
    for i, mask in enumerate(checked(masks, list, place)):
      while i >= len(media.objects):
        at = len(media.objects)
        key = ids[at] if at < len(ids) else at
        media.objects.append(Marked("", (str(key),)))
      mask = usable(mask, size, f"{place}, masklet {i}", left)
      if mask is not None and step * k < count:
        media.objects[i].masks[step * k] = mask
      elif mask is not None:
        left.add("masks past the end of the video", f"{place}, masklet {i}")
  return media
