"""Files that survive a kill: written whole, or line by line and gone on with."""

import contextlib
import json
import os
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from data_pipes.errors import InputError

BREAKS = "\x85\u2028\u2029"  # line breaks to `str.splitlines` that JSON leaves as they are


@contextlib.contextmanager
def replaced(path: Path | str, *, durable: bool = True, alone: bool = True) -> Iterator[Path]:
  """Gives a path to write to; if the block ends well it takes the place of `path` in one go.

  A reader sees the old file or the new one, never a part. If the block raises, the part is removed
  and the old file stays.

  Args:
    durable: the new file is on the disk before it takes its place, so that a power cut leaves the
      old file or the new one.
    alone: no other process writes this path meanwhile, not even one that a killed run left behind.
      Then the part has one name, and what a kill leaves is overwritten by the next write.
  """
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(f".{path.name}.tmp" if alone else f".{path.name}.{os.getpid()}.tmp")
  try:
    yield part
    if durable:
      with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
  finally:
    part.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
  """Writes a file whole, in UTF-8."""
  with replaced(path) as part:
    part.write_text(text, encoding="utf-8")


def json_line(record: Mapping[str, Any]) -> str:
  """A record as one line of UTF-8, its end included; `str.splitlines` finds one line too."""
  text = json.dumps(record, ensure_ascii=False)
  try:
    text.encode()
  except UnicodeEncodeError:  # half a surrogate pair, which JSON can hold and UTF-8 cannot
    text = json.dumps(record)
  for character in BREAKS:
    text = text.replace(character, f"\\u{ord(character):04x}")
  return text + "\n"


def read_json_lines(path: Path | str) -> list[dict[str, Any]]:
  """The records of a file of JSON lines, one object a line; none if there is no such file.

  A last line without an end is what a kill cut off; it is left out.

  Raises:
    InputError: another line is no object, or the file is not UTF-8.
  """
  path = Path(path)
  try:
    content = path.read_bytes()
  except FileNotFoundError:
    return []
  except OSError as error:
    raise InputError(f"{path}: cannot be read ({error.strerror})") from None
  records = []
  # Not splitlines: U+2028 within a text is no line break.
  for number, line in enumerate(content.split(b"\n")[:-1], 1):
    if not line.strip():
      continue
    try:
      record = json.loads(line)
    except ValueError as error:  # UnicodeDecodeError is one
      raise InputError(f"{path}: line {number}: cannot be read as JSON ({error})") from None
    if not isinstance(record, dict):
      kind = type(record).__name__
      raise InputError(f"{path}: line {number}: found {kind}; accepted: an object a line")
    records.append(record)
  return records


class JsonLines:
  """Records appended to a file as they come, one object a line; a run that was killed goes on.

  Attributes:
    records: the latest record of each key, in the order in which the keys came first.

  The line that a kill cut off is taken out of the file when it is opened, since the next record
  would be written behind it. `add` may be called by several threads; one process has the file.
  """

  def __init__(
    self,
    path: Path | str,
    key: Callable[[dict[str, Any]], Hashable],
    keep: Callable[[dict[str, Any]], bool] = lambda record: True,
  ):
    """Reads what is there.

    Args:
      key: what tells a record from the others.
      keep: records for which it is false are taken out of the file: they will be made again.

    Raises:
      InputError: the file is none of JSON lines.
    """
    self.path, self._key = Path(path), key
    before = read_json_lines(self.path)
    kept = [record for record in before if keep(record)]
    self.records = {key(record): record for record in kept}
    self._lock = threading.Lock()
    if len(kept) != len(before) or _is_torn(self.path):
      write_text(self.path, "".join(map(json_line, kept)))
    self.path.parent.mkdir(parents=True, exist_ok=True)
    self._file = self.path.open("a", encoding="utf-8")

  def __contains__(self, key: Hashable) -> bool:
    return key in self.records

  def __len__(self) -> int:
    return len(self.records)

  def add(self, record: dict[str, Any]) -> None:
    """Appends a record; a kill of this process after the call does not lose it."""
    with self._lock:
      self._file.write(json_line(record))
      self._file.flush()
      self.records[self._key(record)] = record

  def close(self) -> None:
    self._file.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


def _is_torn(path: Path) -> bool:
  """Whether a file's last line has no end."""
  if not path.exists() or not path.stat().st_size:
    return False
  with path.open("rb") as file:
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"
