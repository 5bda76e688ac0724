"""Files of other tools, read with one clear line for whatever is not as it should be."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from data_pipes.errors import InputError, reading
from data_pipes.images import MAX_PIXELS
from data_pipes.video import frame_files

_REQUIRED = object()
_NAMES = {dict: "an object", list: "a list", str: "text", int: "a whole number", bool: "a boolean"}


@dataclass(frozen=True)
class Source:
  """What is imported: `path`, a file or folder, and `media`, the folder where its media may lie."""

  path: Path
  media: Path

  def json(self) -> Any:
    return load_json(self.path)

  def located(self, path: str) -> str:
    """A media path or address as an item names it, relative to `media`.

    The longest end of it that is there counts, or else all of it without host, drive, and "..".
    """
    parts = [p for p in _local(path).replace("\\", "/").split("/") if p not in ("", ".", "..")]
    for i in range(len(parts)):
      if os.path.exists(self.media / (end := "/".join(parts[i:]))):
        return end
    return "/".join(parts)

  def numbers(self, folder: str, names: Sequence[str]) -> list[int | None]:
    """The number of each named frame of a folder: its place among the files there.

    Where the folder is not there, its place among the names; None for a name that it lacks.
    """
    if not os.path.isdir(self.media / folder):
      return list(range(len(names)))
    places = {path.stem: i for i, path in enumerate(frame_files(self.media / folder))}
    return [places.get(Path(name).stem) for name in names]


def _local(address: str) -> str:
  """The path in an address: of Label Studio's local files, of a bucket, of a web server."""
  if "?d=" in address:  # /data/local-files/?d=clips/a.mp4
    return parse_qs(urlsplit(address).query).get("d", [""])[0]
  if "://" in address:
    return unquote(urlsplit(address).path)
  return address.removeprefix("/data/")


def load_json(path: Path) -> Any:
  with reading(f"{path}: cannot be read as JSON"):
    return json.loads(path.read_bytes())


def part(value: Any, key: str, kind: type | tuple, where: str, default: Any = _REQUIRED) -> Any:
  """value[key], which must be of that kind; `default` where it is absent or null."""
  entry = checked(value, dict, where).get(key)
  if entry is None:
    if default is _REQUIRED:
      raise InputError(f"{where}: no key {key!r}")
    return default
  return checked(entry, kind, f"{where}: key {key!r}")


def checked(value: Any, kind: type | tuple, where: str) -> Any:
  """The value itself, if it is of that kind."""
  kinds = kind if isinstance(kind, tuple) else (kind,)
  if not isinstance(value, kinds) or (
    isinstance(value, bool) and int in kinds and bool not in kinds
  ):
    names = " or ".join(_NAMES[k] for k in kinds)
    raise InputError(f"{where}: found {_NAMES.get(type(value), 'a number')}; accepted: {names}")
  return value


def number(value: Any, key: str, where: str, default: Any = _REQUIRED) -> float:
  """value[key] as a finite float; text of XML attributes too."""
  entry = part(value, key, object, where, default)
  if entry is default:
    return default
  try:
    result = math.nan if isinstance(entry, bool) else float(entry)
  except (TypeError, ValueError, OverflowError):
    result = math.nan
  if not math.isfinite(result):
    raise InputError(f"{where}: key {key!r}: found {entry!r}; accepted: a number")
  return result


def size_of(value: Any, where: str, keys: Sequence[str] = ("height", "width")) -> tuple[int, int]:
  """(height, width) in pixels."""
  height, width = (number(value, key, where) for key in keys)
  if min(height, width) < 1 or height % 1 or width % 1:
    raise InputError(f"{where}: found {height:g}x{width:g}; accepted: a size in whole pixels")
  if height * width > MAX_PIXELS:
    raise InputError(f"{where}: found {height:g}x{width:g}; accepted: up to {MAX_PIXELS} pixels")
  return int(height), int(width)
