"""Digests of what a run reads, by which it knows its data again wherever they lie."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from vr_jax.checkpoint import find_checkpoint, is_checkpoint
from vr_jax.weights import weights_path

WHOLE = 1 << 26  # bytes up to which a file of weights is read whole
PIECES, PIECE = 64, 1 << 20  # of a larger one so many pieces of so many bytes, evenly spread


def digest_of_data(path: Path | str) -> str:
  """ "size digest" of an annotation file, or of a folder of shards: its indices and all sizes."""
  path = Path(path)
  if path.is_file():
    return _summary([("", path)], whole=True)
  files = [(p.name, p) for p in sorted(path.iterdir()) if p.suffix in (".json", ".array_record")]
  digest = hashlib.sha256()
  for name, file in files:
    digest.update(f"{name} {file.stat().st_size}\n".encode())
    if file.suffix == ".json":  # which hold checksums of the rest
      digest.update(file.read_bytes())
  return f"{sum(file.stat().st_size for _, file in files)} bytes {digest.hexdigest()[:16]}"


def digest_of_weights(name: Path | str) -> str:
  """ "size digest" of weights by name; of a work directory its newest checkpoint."""
  path = weights_path(name)
  if is_checkpoint(path):
    path = find_checkpoint(path)
  if path.is_dir():
    files = [(p.relative_to(path).as_posix(), p) for p in sorted(path.rglob("*")) if p.is_file()]
  else:
    files = [("", path)] if path.is_file() else []
  return _summary(files, whole=False) if files else "nothing"


def _summary(files: list[tuple[str, Path]], whole: bool) -> str:
  digest, size = hashlib.sha256(), 0
  for name, path in files:
    length = path.stat().st_size
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
