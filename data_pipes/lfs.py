"""Git LFS pointers: the lines that a clone without git-lfs leaves in the place of a large file."""

from pathlib import Path

from data_pipes.errors import InputError

_START = b"version https://git-lfs.github.com/spec/"


def refuse_pointer(path: str | Path) -> None:
  """Raises InputError where a file is a Git LFS pointer; one that is absent is not."""
  try:
    with open(path, "rb") as file:
      start = file.read(len(_START))
  except OSError:
    return
  if start == _START:
    raise InputError(
      f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull` in the clone it is from"
    )
