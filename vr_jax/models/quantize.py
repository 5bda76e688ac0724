"""Int8 weights: the matrices of a decoder's layers, each with a scale for every column."""

import re
from typing import Any

import jax
import jax.numpy as jnp

from data_pipes.errors import InputError
from vr_jax.arrays import Array

# The axes that a matrix of a layer is summed over; the others have each their own scale.
_SUMMED = (
  (r"attn/(q|kv|qkv)_einsum/w|attn/qkv/w|mlp/(gating_einsum|gate_up|linear)", (-2,)),
  (r"attn/attn_vec_einsum/w", (-3, -2)),
)


def _matrix(path: str) -> tuple[re.Match | None, list[tuple[int, ...]]]:
  """The layer and name in a path, and the axes that such a matrix is summed over, if it is one."""
  matrix = re.search(r"(?:^|/)layers(_\d+)?/(.+)", path)
  return matrix, [axes for pattern, axes in _SUMMED if matrix and re.fullmatch(pattern, matrix[2])]


def is_matrix(path: str) -> bool:
  """Whether a parameter is a matrix of a decoder's layer, in either layout."""
  return bool(_matrix(path)[1])


def values_and_scale(w: Any) -> tuple[Array, Array | None]:
  """The values of a matrix and, if it is int8, the scales of its columns."""
  return (w.qvalue, w.scale) if is_quantized(w) else (w, None)


def quantized(path: str, w: Array) -> Any:
  """A matrix of a decoder's layer, in either layout, as a qwix.QArray: int8, scales by column.

  Norms, biases, adapters and the token tables stay as they are. Needs the extra [int8].

  Raises:
    InputError: qwix is not installed.
  """
  matrix, summed = _matrix(path)
  if not matrix or not summed:
    return w
  try:
    import qwix
  except ModuleNotFoundError:
    raise InputError("int8 weights need qwix; pip install 'vr-jax[int8]'") from None

  def one_layer(w):
    columns = [axis for axis in range(w.ndim) if axis - w.ndim not in summed[0]]
    return qwix.quantize(w, jnp.int8, channelwise_axes=columns)

  if matrix[1]:  # fused: "layers_3/…" is one layer's
    return one_layer(w)
  # A stack goes layer by layer, in float32: little memory, and scales as exact as the weights.
  return jax.lax.map(lambda w: one_layer(w.astype(jnp.float32)), w)


def is_quantized(leaf: Any) -> bool:
  """Whether a leaf of a parameter tree is int8 values with scales (not an array)."""
  return hasattr(leaf, "qvalue")
