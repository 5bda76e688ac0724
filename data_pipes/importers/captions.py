"""Texts in a file of their own (`--captions`), by the medium and the object that they are about.

    {"clip.mp4": "A man opens a door.", "b.mp4": {"3": "the red car", "dog": ["a dog", "a pet"]}}
    [{"video": "clip.mp4", "object": "3", "caption": "the red car"}, …]
    {"annotations": [{"image_id": 139, "caption": "A room."}, …]}                (COCO captions)
    {"videos": {"0a1b": {"expressions": {"0": {"exp": "a dog", "obj_id": "1"}}}}}
                                      (Ref-YouTube-VOS, and MeViS, whose objects are `anno_id`)
    bear 1 "a brown bear walking"                           (a .txt file, Ref-DAVIS)

A medium is named by its path, its file or folder name with or without the ending, or its id; an
object by its id, or its name where no other object of the medium has it.
"""

import collections
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_pipes.errors import InputError, reading
from data_pipes.importers.marked import Left, Media, Text
from data_pipes.importers.parts import checked, load_json, part

_MEDIA = ("video", "image", "path", "file", "file_name", "video_id", "image_id")
_TEXT = ("caption", "text", "cap", "exp")
_OBJECT = ("object", "object_id", "obj_id")


class Captions:
  """Texts that media take; those that none takes are counted by `unused`."""

  def __init__(self, path: Path | None = None):
    self._texts: dict[str, list[Text]] = collections.defaultdict(list)
    self._path, self._taken = path, set[str]()
    for medium, text in _read(path) if path else ():
      self._texts[medium].append(text)

  def take(self, media: Media) -> list[Text]:
    """The texts about a medium."""
    name = os.path.basename(media.path)
    keys = dict.fromkeys((media.path, name, os.path.splitext(name)[0], *media.keys))
    texts: list[Text] = []
    for key in keys:
      texts += self._texts.get(key, ())
      self._taken.add(key)
    return texts

  def count_unused(self, left: Left) -> None:
    for medium, texts in self._texts.items():
      if medium not in self._taken:
        for text in texts:
          left.add("texts about media that are not there", f"{self._path}: {medium}: {text.text!r}")


def _read(path: Path) -> Iterator[tuple[str, Text]]:
  if path.suffix.lower() == ".txt":
    yield from read_davis_texts(path)
    return
  content = load_json(path)
  if isinstance(content, list):
    yield from _listed(content, str(path))
  elif isinstance(checked(content, dict, str(path)).get("annotations"), list):
    yield from _listed(content["annotations"], f"{path}: annotations")
  elif isinstance(content.get("videos"), dict):
    yield from expressions(content, str(path), ("obj_id",))
  else:
    for medium, entry in content.items():
      by_object = entry if isinstance(entry, dict) else {None: entry}
      for key, texts in by_object.items():
        where = f"{path}: {medium}" + ("" if key is None else f": {key}")
        for text in texts if isinstance(texts, list) else [texts]:
          yield medium, Text(checked(text, str, where), () if key is None else (key,))


def _listed(entries: Sequence[Any], path: str) -> Iterator[tuple[str, Text]]:
  for i, entry in enumerate(entries):
    where = f"{path}: item {i}"
    medium = _first(entry, _MEDIA, where)
    text = checked(entry[_first_key(entry, _TEXT, where)], str, where)
    marked = next((entry[key] for key in _OBJECT if entry.get(key) is not None), None)
    yield medium, Text(text, () if marked is None else _ids(marked, where))


def expressions(content: Any, path: str, objects: Sequence[str]) -> Iterator[tuple[str, Text]]:
  """Texts of a meta_expressions.json; an expression's objects are under the first key it has."""
  for name, video in part(content, "videos", dict, path).items():
    where = f"{path}: {name}"
    for key, entry in part(video, "expressions", dict, where).items():
      place = f"{where}: expression {key}"
      text = part(entry, "exp", str, place)
      marked = next((entry[k] for k in objects if entry.get(k) is not None), None)
      yield name, Text(text, () if marked is None else _ids(marked, place))


def read_davis_texts(path: Path) -> Iterator[tuple[str, Text]]:
  """Lines `sequence object "text"`, as in Davis17_annot1.txt."""
  with reading(f"{path}: cannot be read"):
    lines = path.read_bytes().decode("utf-8", "replace").splitlines()
  for i, line in enumerate(lines, 1):
    if line.strip():
      parsed = re.fullmatch(r'\s*(\S+)\s+(\d+)\s+"?(.*?)"?\s*', line)
      if parsed is None:
        raise InputError(f'{path}: line {i}: found {line[:60]!r}; accepted: sequence object "text"')
      yield parsed[1], Text(parsed[3], (parsed[2],))


def _first_key(entry: Any, keys: Sequence[str], where: str) -> str:
  checked(entry, dict, where)
  key = next((key for key in keys if entry.get(key) is not None), None)
  if key is None:
    raise InputError(f"{where}: found keys {sorted(entry)}; accepted: one of {', '.join(keys)}")
  return key


def _first(entry: Any, keys: Sequence[str], where: str) -> str:
  key = _first_key(entry, keys, where)
  return str(checked(entry[key], (str, int), f"{where}: key {key!r}"))


def _ids(value: Any, where: str) -> tuple[str, ...]:
  values = value if isinstance(value, list) else [value]
  return tuple(str(checked(v, (str, int), where)) for v in values)
