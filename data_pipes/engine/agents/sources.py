"""What a run starts from: a folder of videos, a list with captions, or annotated objects."""

import collections
import csv
import functools
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_pipes.errors import InputError
from data_pipes.files import path_below
from data_pipes.images import IMAGE_SUFFIXES
from data_pipes.json_items import read_items
from data_pipes.records import parse_objects
from data_pipes.video_index import VIDEO_SUFFIXES

log = logging.getLogger(__name__)

_VIDEO_KEYS, _CAPTION_KEYS = ("video", "path", "file"), ("caption", "text", "cap")


def list_sources(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
  """One row a video, in the order of their names: key, path, caption, given, size, mtime.

  Reads `input.videos` (a folder) and `input.files`: JSON arrays, JSON lines or CSV of
  {"video", "caption"}; on the QA path items of the published JSON, whose objects (and `texts`, one
  an object, if there) are taken. Without files, all videos of the folder, without captions. A
  folder of frames in which a video lies as well is left out, and so is the work directory.

  Raises:
    InputError: nothing there, or an item that is not in the format, or leads out of the folder or
      into the work directory.
  """
  root, work = Path(settings["input"]["videos"]), settings["workdir"]
  if not root.is_dir():
    raise InputError(f"input.videos={str(root)!r}: no such folder; accepted: a folder of videos")
  if belongs_to(work, root):
    raise InputError(f"input.videos={str(root)!r} lies in the work directory, {work}")
  by_name: dict[str, dict[str, Any]] = {}
  files = settings["input"]["files"]
  entries = _from_files(files) if files else _from_folder(root, work)
  for where, entry in entries:
    name, caption, given = _read_entry(where, entry, settings["path"] == "qa")
    name = printable(_below(root, name, where))
    path = path_of(root, name)
    if belongs_to(work, path):
      if not files:
        continue
      raise InputError(f"{where}: video {name!r} lies in the work directory, {work}")
    if name in by_name and not given:
      continue  # the first caption of a video counts
    row = by_name.setdefault(
      name, {"key": name, "path": str(path), "caption": caption, "given": []}
    )
    row["given"] = row["given"] + given
  for name in _folders_around(by_name):
    del by_name[name]
  if not by_name:
    raise InputError(
      f"{root}: found no videos; accepted: {', '.join(VIDEO_SUFFIXES[:8])}, …, "
      "and folders of frames"
    )
  rows = [_stamped(by_name[name]) for name in sorted(by_name)]
  limit = settings["input"]["limit"]
  return rows[:limit] if limit else rows


def printable(name: str) -> str:
  """A file name as text that can be written anywhere: \\udcff stands for a byte 0xff that is not
  UTF-8."""
  return name.encode("utf-8", "backslashreplace").decode()


def path_of(root: Path | str, name: str) -> Path:
  """The file that a `printable` name stands for."""
  path = Path(root) / name
  if "\\udc" in name and not os.path.lexists(path):
    path = Path(root) / re.sub(
      r"\\udc([89a-f][0-9a-f])", lambda m: chr(0xDC00 + int(m[1], 16)), name
    )
  return path


def lies_in(path: Path | str, folder: Path | str) -> bool:
  """Whether a path is a folder or leads into it, wherever links take both."""
  real, inside = os.path.realpath(path), os.path.realpath(folder)
  return real == inside or real.startswith(os.path.join(inside, ""))


def belongs_to(work: Path | str, path: Path | str) -> bool:
  """Whether a path is one of a work directory's (its links too), or leads to one."""
  return lies_in(path, work) or lies_in(os.path.dirname(path), work)


def _below(root: Path, name: str, where: str) -> str:
  """A listed name as a path below the folder of videos. Raises InputError: it leads out."""
  below = path_below(root, name)
  if below is None:
    raise InputError(f"{where}: video {name!r} leads out of {root}; accepted: a path inside it")
  return below


def _folders_around(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
  """The names of folders that hold another source, a file: frames beside the video that they are
  of, or pictures beside videos."""
  real = {name: os.path.realpath(row["path"]) for name, row in rows.items()}
  folders = {name for name, path in real.items() if os.path.isdir(path)}
  if not folders:
    return []
  above: set[str] = set()
  for name in real.keys() - folders:
    path = os.path.dirname(real[name])
    while path not in above:
      above.add(path)
      path = os.path.dirname(path)
  around = sorted(name for name in folders if real[name] in above)
  if around:
    _warn(f"left out {len(around)} folders of frames in which a video lies too: {around[0]}, ...")
  return around


@functools.cache
def _warn(text: str) -> None:
  """Once, however often the sources are listed."""
  log.warning("%s", text)


def _stamped(row: dict[str, Any]) -> dict[str, Any]:
  """With size and time of the file, which tell when it was replaced."""
  try:
    stat = os.stat(row["path"])
  except OSError:
    return {**row, "size": -1, "mtime_ns": 0}  # quarantined when it is opened
  return {**row, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _from_folder(root: Path, work: Path | str) -> Iterator[tuple[str, dict[str, Any]]]:
  for path in videos_below(root, work):
    if path != root:
      yield str(path), {"video": str(path.relative_to(root))}


def videos_below(root: Path, work: Path | str) -> list[Path]:
  """Videos and folders of frames at or below a folder; a warning names the other files.

  Hidden files (the `._a.mp4` that a Mac puts beside each copy) and those of the work directory are
  neither.
  """
  below = (p for p in sorted(root.rglob("*")) if not _hidden(p.relative_to(root)))
  videos, others = [], []
  for path in (root, *below):
    suffix = path.suffix.lower()
    if path.is_dir():
      pictures = (p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
      if not all(p.name.startswith(".") for p in pictures):
        videos.append(path)
    elif suffix in VIDEO_SUFFIXES:
      videos.append(path)
    elif suffix not in IMAGE_SUFFIXES and not belongs_to(work, path):
      others.append(path)
  if others:
    kinds = collections.Counter(p.suffix.lower() or "no ending" for p in others).most_common()
    counts = ", ".join(f"{count} of {kind}" for kind, count in kinds)
    _warn(f"{root}: left out {len(others)} files that are no videos ({counts}): {others[0]}, ...")
  return videos


def _hidden(path: Path) -> bool:
  return any(part.startswith(".") for part in path.parts)


def _from_files(files) -> Iterator[tuple[str, Any]]:
  for name in files:
    path = Path(name)
    if not path.is_file():
      raise InputError(f"input.files: {path}: no such file; accepted: .json, .jsonl or .csv")
    if path.suffix == ".jsonl":
      with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
          if line.strip():
            yield f"{path}:{number}", _loads(line, f"{path}:{number}")
    elif path.suffix == ".csv":
      with open(path, encoding="utf-8", newline="") as file:
        for number, entry in enumerate(csv.DictReader(file), 2):
          yield f"{path}:{number}", entry
    else:
      for number, entry in enumerate(read_items(path)):
        yield f"{path}: item {number}", entry


def _loads(line: str, where: str) -> Any:
  try:
    return json.loads(line)
  except ValueError as error:
    raise InputError(f"{where}: found {error}; accepted: one JSON object a line") from None


def _read_entry(where: str, entry: Any, with_objects: bool) -> tuple[str, str, list]:
  if not isinstance(entry, dict):
    raise InputError(f"{where}: found {type(entry).__name__}; accepted: an object with 'video'")
  names = [entry[key] for key in _VIDEO_KEYS if isinstance(entry.get(key), str) and entry[key]]
  if not names:
    raise InputError(f"{where}: found keys {sorted(entry)}; accepted: 'video' and 'caption'")
  captions = [entry[key] for key in _CAPTION_KEYS if isinstance(entry.get(key), str)]
  if not with_objects:
    return names[0], (captions or [""])[0], []
  objects = parse_objects(entry, where)
  texts = entry.get("texts") or [""] * len(objects)
  if not objects or len(texts) != len(objects):
    raise InputError(
      f"{where}: found {len(objects)} annotated objects and {len(texts)} texts; accepted on the QA "
      "path: key 'annotation' with objects, and no 'texts' or one for each"
    )
  given = [
    {"masks": {str(n): mask for n, mask in masks.items()}, "text": str(text)}
    for masks, text in zip(objects, texts, strict=True)
  ]
  return names[0], (captions or [""])[0], given
