"""Files of tensors that are written piece by piece, in any order, and taken up again after a kill.

The layout of a safetensors or npy file follows from names, shapes and dtypes, so a file is laid out
first and each tensor then goes to its place. (The safetensors library writes a file from tensors
that are all in memory.)
"""

import json
import math
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vr_jax.interop.table import dtype_name

Entries = Mapping[str, tuple[tuple[int, ...], np.dtype]]
SHARD_BYTES = 5_000_000_000  # as transformers 4.40, which wrote the published shards


def size_of(shape: tuple[int, ...], dtype: np.dtype) -> int:
  """Bytes of an array."""
  return math.prod(shape) * dtype.itemsize


class ShardWriter:
  """A folder of safetensors shards with their index; one file where everything fits."""

  def __init__(
    self, folder: Path, entries: Entries, shard_bytes: int = SHARD_BYTES, stem: str = "model"
  ):
    self.folder, self._stem = folder, stem
    self._place: dict[str, tuple[Path, int, int]] = {}  # file, offset, bytes
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[str]] = [[]]
    used = 0
    for name, (shape, dtype) in entries.items():
      size = size_of(shape, dtype)
      if shards[-1] and used + size > shard_bytes:
        shards.append([])
        used = 0
      shards[-1].append(name)
      used += size
    count = len(shards)
    self.files = [
      f"{stem}.safetensors" if count == 1 else f"{stem}-{i + 1:05}-of-{count:05}.safetensors"
      for i in range(count)
    ]
    for file, names in zip(self.files, shards, strict=True):
      # Wide elements first keeps every tensor aligned; the library does so too.
      names.sort(key=lambda name: -entries[name][1].itemsize)
      self._lay_out(folder / file, {name: entries[name] for name in names})
    total = sum(size_of(*entry) for entry in entries.values())
    weight_map = {n: f for f, names in zip(self.files, shards, strict=True) for n in names}
    self._index = {
      "metadata": {"total_size": total},
      "weight_map": dict(sorted(weight_map.items())),
    }

  def _lay_out(self, file: Path, entries: Entries) -> None:
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in entries.items():
      start, end = end, end + size_of(shape, dtype)
      header[name] = {
        "dtype": dtype_name(dtype),
        "shape": list(shape),
        "data_offsets": [start, end],
      }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = 8 + len(text)
    for name, entry in entries.items():
      offset = header[name]["data_offsets"][0]
      self._place[name] = (file, data + offset, size_of(*entry))
    lay_out(file, len(text).to_bytes(8, "little") + text, data + end)

  def write(self, name: str, array: np.ndarray) -> None:
    """Writes a tensor, which has the shape and dtype that were announced."""
    file, offset, size = self._place[name]
    if array.nbytes != size:
      raise ValueError(f"{name}: {array.nbytes} bytes instead of {size}")
    write_at(file, offset, array)

  def finish(self) -> None:
    """Writes the index where there are several shards."""
    if len(self.files) > 1:
      text = json.dumps(self._index, indent=2) + "\n"
      (self.folder / f"{self._stem}.safetensors.index.json").write_text(text)


class NpzWriter:
  """An uncompressed npz; bfloat16 as numpy stores it, two void bytes (V2)."""

  def __init__(self, file: Path, entries: Entries):
    self.file, self._parts = file, file.parent / f"{file.name}.parts"
    self._parts.mkdir(parents=True, exist_ok=True)
    self._place = {}
    for i, (name, (shape, dtype)) in enumerate(entries.items()):
      known = dtype.kind != "V" and dtype_name(dtype) != "BF16"
      fields = {
        "descr": np.lib.format.dtype_to_descr(dtype if known else np.dtype("V2")),
        "fortran_order": False,
        "shape": shape,
      }
      header = _Buffer()
      np.lib.format.write_array_header_2_0(header, fields)
      part = self._parts / f"{i:05}.npy"
      lay_out(part, header.content, len(header.content) + size_of(shape, dtype))
      self._place[name] = (part, len(header.content))

  def write(self, name: str, array: np.ndarray) -> None:
    """Writes an array, which has the shape and dtype that were announced."""
    write_at(*self._place[name], array)

  def finish(self) -> None:
    """Puts the arrays into one file."""
    with zipfile.ZipFile(self.file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
      for name, (part, _) in self._place.items():
        archive.write(part, f"{name}.npy")
    for part, _ in self._place.values():
      part.unlink()
    self._parts.rmdir()


class _Buffer:
  """What numpy writes a header to."""

  def __init__(self):
    self.content = b""

  def write(self, data: bytes) -> None:
    self.content += data


def lay_out(file: Path, header: bytes, size: int) -> None:
  """Makes a file of `size` bytes that begins with `header`; one of this layout stays as it is."""
  if file.is_file() and file.stat().st_size == size:
    with file.open("rb") as handle:
      if handle.read(len(header)) == header:
        return
  with file.open("wb") as handle:
    handle.write(header)
    handle.truncate(size)


def write_at(file: Path, offset: int, array: np.ndarray) -> None:
  """Writes the bytes of a contiguous array at an offset; not mapped, so it needs no memory."""
  data = np.ascontiguousarray(array).view(np.uint8).reshape(-1).data
  handle = os.open(file, os.O_WRONLY)
  try:
    while data:
      written = os.pwrite(handle, data[: 1 << 30], offset)
      data, offset = data[written:], offset + written
  finally:
    os.close(handle)
