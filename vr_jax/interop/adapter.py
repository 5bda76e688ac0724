"""LoRA adapters of the decoder as parameters, and a model with one merged in.

An adapter's factors lie beside the matrices, as in a decoder with `lora_rank`: for a matrix at
`layers/attn/q_einsum/w` they are `layers/attn/q_einsum/w_lora_a` [X,D,r] and `w_lora_b` [X,r,N,H],
whose product over r, times alpha / r, is added to the matrix.

Source: LoRA (arXiv 2106.09685).
"""

import dataclasses

import numpy as np

from vr_jax.interop.table import Parameters, Part
from vr_jax.models.lora import is_factor


@dataclasses.dataclass(frozen=True)
class Adapter:
  """The factors by our path (relative to the decoder), and what scales their product."""

  params: Parameters
  rank: int
  alpha: float

  @property
  def scale(self) -> float:
    return self.alpha / self.rank


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
