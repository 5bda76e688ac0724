"""What samples lie in, and how any of it is opened: JSON arrays, prepared shards, and more kinds.

A new kind of container touches one file, with its subclass of data_pipes.records.Container (copy
records.RecordFile), and this list.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipes.records import Container, RecordFile
from data_pipes.shards import ShardSet

# The first that reads a path has it. RecordFile reads every file, so it stands last.
CONTAINERS: list[type[Container]] = [ShardSet, RecordFile]


def open_records(path: str | Path) -> Container:
  """The samples of an annotation file or of a folder of shards.

  Raises:
    InputError: it is absent or not of the format.
  """
  return _kind(Path(path))(Path(path))  # type: ignore[call-arg]


def scan_records(path: str | Path) -> Iterator[tuple[Any, str]]:
  """Each sample's parsed JSON and its name for messages, in order, in constant memory.

  Raises:
    InputError: as open_records; samples before the defect have been given out by then.
  """
  return _kind(Path(path)).scan(Path(path))


def _kind(path: Path) -> type[Container]:
  return next(kind for kind in CONTAINERS if kind.reads(path))
