"""LoRA adapters of the decoder as parameters, and a model with one merged in.

An adapter's factors lie beside the matrices, as in a decoder with `lora_rank`: for a matrix at
`layers/attn/q_einsum/w` they are `layers/attn/q_einsum/w_lora_a` [X,D,r] and `w_lora_b` [X,r,N,H],
whose product over r, times alpha / r, is added to the matrix.

Source: LoRA (arXiv 2106.09685).
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipes.errors import InputError
from vr_jax.interop.table import Parameters, Part, Slot, Tensors
from vr_jax.models.lora import is_factor


@dataclasses.dataclass(frozen=True)
class Adapter:
  """The factors by our path (relative to the decoder), and what scales their product.

  `replaced`: tensors that came with them and take the place of the decoder's own.
  """

  params: Parameters
  rank: int
  alpha: float
  replaced: "Replaced | None" = None

  @property
  def scale(self) -> float:
    return self.alpha / self.rank

  def factors_alone(self, where: str | Path) -> "Adapter":
    """The same; InputError where it is more than factors."""
    if self.replaced:
      raise InputError(
        f"{where}: holds whole tensors too (modules_to_save), such as {self.replaced.first}; merge "
        f"it into its base: vr convert BASE MERGED --to vr --adapter {where}"
      )
    return self


class Replaced:
  """Tensors of a file that take the place of the decoder's own: where each of them goes."""

  def __init__(self, tensors: Tensors, table: Sequence[Slot]):
    self._tensors, self.first = tensors, table[0].theirs
    self._slots: dict[str, list[Slot]] = {}
    for slot in table:
      self._slots.setdefault(slot.ours, []).append(slot)

  def put(self, path: str, shape: tuple[int, ...], index: tuple[int, ...], value: Any) -> Any:
    """The parameter at `index`, with the tensors that lie there; dtype unchanged."""
    for slot in self._slots.get(path, ()):
      common = min(len(index), len(slot.at))
      if slot.at[:common] == index[:common]:
        theirs = self._tensors.read(slot.theirs)
        new = slot.transform.load(theirs, shape[len(slot.at) :]).astype(value.dtype)
        value = np.array(value)
        value[slot.at[common:]] = new[index[common:]]
    return value


def factors_of(params: Parameters) -> Parameters:
  """The factors among a model's parameters, by paths relative to the decoder."""
  factors = Part(params, "llm/")
  factors.shapes = {path: shape for path, shape in factors.shapes.items() if is_factor(path)}
  return factors


class Merged:
  """A model's parameters with an adapter added to its decoder, in float32; dtype unchanged.

  `base` are those without it.
  """

  def __init__(self, base: Parameters, adapter: Adapter):
    self.shapes = base.shapes
    self.base, self._adapter = base, adapter

  def dtype(self, path: str) -> np.dtype:
    return self.base.dtype(path)

  def read(self, path: str, index: tuple[int, ...] = ()) -> np.ndarray:
    value = self.base.read(path, index)
    matrix = path.removeprefix("llm/")
    if path.startswith("llm/") and self._adapter.replaced:
      value = self._adapter.replaced.put(matrix, self.shapes[path], index, value)
    if not path.startswith("llm/") or f"{matrix}_lora_a" not in self._adapter.params.shapes:
      return value
    a = self._adapter.params.read(f"{matrix}_lora_a", index).astype(np.float32)
    b = self._adapter.params.read(f"{matrix}_lora_b", index).astype(np.float32)
    return (value + self._adapter.scale * _product(matrix, a, b)).astype(value.dtype)


def _product(path: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """The change of a matrix from its factors, with whatever axes lead."""
  if path.endswith("attn_vec_einsum/w"):
    return np.einsum("...NHr,...rD->...NHD", a, b)
  if path.endswith("_einsum/w"):
    return np.einsum("...Dr,...rNH->...NDH", a, b)
  return np.einsum("...ir,...ro->...io", a, b)
