"""Content of files: digests by which they are known wherever they lie, and what took long to make
from them, kept on disk under these.
"""

import functools
import hashlib
import logging
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from data_pipes.buckets import here, size_of
from data_pipes.files import replaced

log = logging.getLogger(__name__)

WHOLE = 1 << 26  # bytes up to which a file of weights is read whole
PIECES, PIECE = 64, 1 << 20  # of a larger one so many pieces of so many bytes, evenly spread

Arrays = dict[str, np.ndarray]


def digest_of_data(path: Path | str) -> str:
  """ "size digest" of an annotation file, or of a folder of shards: its indices and all sizes."""
  path = here(path)
  if path.is_file():
    stat = path.stat()
    return _digest_of_file(path, stat.st_size, stat.st_mtime_ns, stat.st_ino)
  files = [(p.name, p) for p in sorted(path.iterdir()) if p.suffix in (".json", ".array_record")]
  digest = hashlib.sha256()
  for name, file in files:
    digest.update(f"{name} {file.stat().st_size}\n".encode())
    if file.suffix == ".json":  # which hold checksums of the rest
      digest.update(file.read_bytes())
  return f"{sum(file.stat().st_size for _, file in files)} bytes {digest.hexdigest()[:16]}"


@functools.lru_cache(64)
def _digest_of_file(path: Path, *_: int) -> str:
  """Read once a process, as long as the file is not another."""
  return summary([("", path)], whole=True)


def summary(files: list[tuple[str, Path]], whole: bool) -> str:
  """ "size digest" of files with their names; `whole`: of large ones every byte counts."""
  digest, size = hashlib.sha256(), 0
  for name, path in files:
    length = size_of(path)
    size += length
    digest.update(f"{name}\0{length}\n".encode())
    for block in _blocks(path, length, whole or length <= WHOLE):
      digest.update(block)
  return f"{size} bytes {digest.hexdigest()[:16]}"


def _blocks(path: Path, length: int, whole: bool) -> Iterator[bytes]:
  with path.open("rb") as file:
    if whole:
      while block := file.read(1 << 22):
        yield block
      return
    for i in range(PIECES):
      file.seek((length - PIECE) * i // (PIECES - 1))
      yield file.read(PIECE)


def digest_of(*parts: object) -> str:
  """A name for what decides a result: digests, settings."""
  return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


def kept_path(name: str) -> Path | None:
  """Where a user's kept results lie, by name; None where there is no place for them."""
  try:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
  except RuntimeError:  # no home
    return None
  return Path(cache) / "vr_jax" / "sets" / name


def kept(path: Path | None, make: Callable[[], Arrays]) -> Arrays:
  """What `make` gives; from the file where it is there and whole, else made and kept there.

  A folder that cannot be written is no error: it is made again next time.
  """
  if path is None:
    return make()
  try:
    with np.load(path) as file:
      return {name: file[name] for name in file.files}
  except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
    arrays = make()
  try:
    with replaced(path, durable=False, alone=False) as part, open(part, "wb") as file:
      np.savez(file, **arrays)  # type: ignore[arg-type]  # arrays, not allow_pickle
  except OSError as error:
    log.info("%s: not kept: %s", path, error)
  return arrays
