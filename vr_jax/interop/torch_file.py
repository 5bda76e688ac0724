"""Tensors in files that PyTorch wrote (extra [torch]), beside safetensors: a file, or shards."""

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from data_pipes.errors import InputError, one_line
from data_pipes.lfs import refuse_pointer
from vr_jax.interop.fields import read_json
from vr_jax.interop.table import Safetensors, Tensors


class TorchFile:
  """The tensors of a file that torch.save wrote; mapped, nothing but tensors is unpickled."""

  def __init__(self, path: Path):
    self.path = path
    try:
      import torch
    except ImportError:
      raise InputError(
        f"{path}: a PyTorch file needs PyTorch; install the extra: pip install 'vr-jax[torch]'"
      ) from None
    try:
      mapped = zipfile.is_zipfile(path)
      self._tensors: dict[str, Any] = dict(
        torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
      )
    except Exception as error:  # the unpickler raises all kinds
      reason = one_line(error, 120)
      raise InputError(f"{path}: not a complete PyTorch file of tensors ({reason})") from None
    if not all(isinstance(t, torch.Tensor) for t in self._tensors.values()):
      raise InputError(f"{path}: holds other things than tensors by name")
    self._bfloat16 = torch.bfloat16
    self._int16 = torch.int16

  def __iter__(self) -> Iterator[str]:
    return iter(sorted(self._tensors))

  def __contains__(self, name: object) -> bool:
    return name in self._tensors

  def shape(self, name: str) -> tuple[int, ...]:
    return tuple(self._tensors[name].shape)

  def dtype(self, name: str) -> np.dtype:
    tensor = self._tensors[name]
    if tensor.dtype == self._bfloat16:
      return np.dtype(ml_dtypes.bfloat16)
    return tensor.new_empty(0).numpy().dtype

  def read(self, name: str, index: tuple[int, ...] = ()) -> np.ndarray:
    tensor = self._tensors[name][index] if index else self._tensors[name]
    if tensor.dtype == self._bfloat16:
      return tensor.contiguous().view(self._int16).numpy().copy().view(ml_dtypes.bfloat16)
    return tensor.numpy().copy()


def open_tensors(path: Path) -> Tensors:
  """A file of tensors, safetensors or PyTorch's, by its content."""
  refuse_pointer(path)
  with path.open("rb") as file:
    start = file.read(9)
  if start[8:9] == b"{":
    return Safetensors(path)
  if start[:2] == b"PK" or start[:1] == b"\x80":
    return TorchFile(path)
  raise InputError(f"{path}: neither a safetensors file, nor a PyTorch file, nor an npz")


class TorchShards:
  """The tensors of several PyTorch files, each opened when a tensor of it is first asked for."""

  def __init__(self, path: Path, weight_map: dict[str, str]):
    self.path, self._weight_map = path, weight_map
    self._files: dict[str, TorchFile] = {}

  def _file(self, name: str) -> TorchFile:
    file = self._weight_map[name]
    if file not in self._files:
      refuse_pointer(self.path / file)
      self._files[file] = TorchFile(self.path / file)
    if name not in self._files[file]:
      raise InputError(f"{self.path / file}: no tensor {name}, which the index says it holds")
    return self._files[file]

  def __iter__(self) -> Iterator[str]:
    return iter(sorted(self._weight_map))

  def __contains__(self, name: object) -> bool:
    return name in self._weight_map

  def shape(self, name: str) -> tuple[int, ...]:
    return self._file(name).shape(name)

  def dtype(self, name: str) -> np.dtype:
    return self._file(name).dtype(name)

  def read(self, name: str, index: tuple[int, ...] = ()) -> np.ndarray:
    return self._file(name).read(name, index)


def open_shards(folder: Path) -> Tensors:
  """The weights of a folder of transformers: safetensors if there are any, else pytorch_model*.bin.

  Raises:
    InputError: neither, or shards that are damaged or absent.
  """
  if any(folder.glob("*.safetensors")) or any(folder.glob("*.safetensors.index.json")):
    return Safetensors(folder)
  index = folder / "pytorch_model.bin.index.json"
  if index.is_file():
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
      raise InputError(f"{index}: no weight_map")
    absent = sorted({n for n in weight_map.values() if not (folder / n).is_file()})
    if absent:
      raise InputError(f"{index}: names shards that are not there: {', '.join(absent)}")
    return TorchShards(folder, weight_map)
  files = sorted(folder.glob("pytorch_model*.bin"))
  if not files:
    raise InputError(f"{folder}: no weights; accepted: *.safetensors or pytorch_model*.bin")
  held = {name: file.name for file in files for name in TorchFile(file)}
  return TorchShards(folder, held)
