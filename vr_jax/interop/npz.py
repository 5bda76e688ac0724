"""Arrays of an npz file, read piece by piece: big_vision's checkpoints."""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from data_pipes.errors import InputError

CONFIG = "vr_jax_model"  # the entry in which our own files carry their config, JSON as bytes


class Npz:
  """The arrays under one of the roots that big_vision writes, `params/`, `opt/target/` or none.

  Two void bytes are bfloat16. `file.npz:img` selects a sub-tree. Uncompressed arrays are mapped,
  so that a layer can be read alone.
  """

  def __init__(self, path: str | Path):
    file, key = split_key(path)
    self.path = Path(file)
    self._entries: dict[str, tuple[zipfile.ZipInfo, tuple[int, ...], np.dtype, bool]] = {}
    self.config: dict[str, Any] | None = None
    try:
      with zipfile.ZipFile(self.path) as archive:
        names = [n.removesuffix(".npy") for n in archive.namelist() if n.endswith(".npy")]
        root = next((r for r in ("params/", "opt/target/") if _any_under(names, r)), "")
        root += f"{key}/" if key else ""
        for name in names:
          with archive.open(f"{name}.npy") as entry:
            if name == CONFIG:
              self.config = json.loads(np.lib.format.read_array(entry).tobytes())
            elif name.startswith(root):
              shape, fortran, dtype = _header(entry)
              if dtype.kind == "V" and dtype.itemsize == 2:
                dtype = np.dtype(ml_dtypes.bfloat16)
              info = archive.getinfo(f"{name}.npy")
              self._entries[name[len(root) :]] = (info, shape, dtype, fortran)
    except (zipfile.BadZipFile, OSError, ValueError, EOFError) as error:
      raise InputError(f"{self.path}: not a complete npz file ({error})") from None
    if not self._entries:
      tops = sorted({name[len(root) - len(key or "") - 1 :].split("/")[0] for name in names})
      raise InputError(f"{self.path}: no arrays under {key!r}; it holds {', '.join(tops)}")

  def __iter__(self) -> Iterator[str]:
    return iter(sorted(self._entries))

  def __contains__(self, name: object) -> bool:
    return name in self._entries

  def shape(self, name: str) -> tuple[int, ...]:
    return self._entries[name][1]

  def dtype(self, name: str) -> np.dtype:
    return self._entries[name][2]

  def read(self, name: str, index: tuple[int, ...] = ()) -> np.ndarray:
    info, shape, dtype, fortran = self._entries[name]
    if info.compress_type == zipfile.ZIP_STORED and not fortran:
      with self.path.open("rb") as file:
        file.seek(info.header_offset + 26)
        lengths = np.frombuffer(file.read(4), "<u2")
        file.seek(int(lengths.sum()), 1)
        _header(file)
        offset = file.tell()
      if 0 in shape or not shape:
        mapped = np.fromfile(self.path, dtype, int(np.prod(shape)), offset=offset).reshape(shape)
      else:
        mapped = np.memmap(self.path, dtype, "r", offset, shape)
      return np.array(mapped[index])
    with zipfile.ZipFile(self.path) as archive, archive.open(info) as entry:
      array = np.lib.format.read_array(entry)
    return (array.view(dtype) if array.dtype.kind == "V" else array)[index]


def split_key(path: str | Path) -> tuple[str, str | None]:
  """`file.npz:img/head` as (file, sub-tree)."""
  text = str(path)
  if Path(text).exists() or ":" not in text:
    return text, None
  file, _, key = text.rpartition(":")
  return file, key.strip("/")


def is_npz(path: str | Path) -> bool:
  """Whether it is a zip of npy files, by its content; with or without `:sub-tree`."""
  file = Path(split_key(path)[0])
  if not file.is_file() or not zipfile.is_zipfile(file):
    return False
  with zipfile.ZipFile(file) as archive:
    return any(name.endswith(".npy") for name in archive.namelist())


def _any_under(names: list[str], root: str) -> bool:
  return any(name.startswith(root) for name in names)


def _header(entry: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
  version = np.lib.format.read_magic(entry)
  read = np.lib.format.read_array_header_1_0 if version == (1, 0) else None
  return (read or np.lib.format.read_array_header_2_0)(entry)
