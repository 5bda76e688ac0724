"""One attention for every module; a table says which kernel takes a call, and why not another.

Letters: B batch, L query, S key, N query head, K key/value head, G query heads of one K, H head.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

MASKED = -2.0e38  # finite, so that a padding query with no visible key gives numbers, not NaN


@dataclasses.dataclass(frozen=True)
class Kernel:
  """A way to compute attention and its limits: `refuses(q, soft_cap)` gives a reason or None."""

  name: str
  run: Callable[..., Array]
  refuses: Callable[[Array, float | None], str | None]


def attention(
  q: Float[Array, "B L N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  mask: Bool[Array, "B L S"] | None = None,
  *,
  scale: float,
  soft_cap: float | None = None,
) -> Float[Array, "B L N H"]:
  """Softmax attention of N query heads over K = N/G key heads, softmax in float32.

  A query sees the keys where `mask` is True (None: all). `soft_cap` c replaces a score s by
  c * tanh(s / c) (Gemma 2, arXiv 2408.00118 section 2). Returns q's dtype.
  """
  kernel = next(kernel for kernel in KERNELS if kernel.refuses(q, soft_cap) is None)
  return kernel.run(q, k, v, mask, scale, soft_cap)


def choice(q: jax.ShapeDtypeStruct, soft_cap: float | None = None) -> dict[str, str]:
  """Kernel name -> 'taken' or the reason it was passed over, in order of preference."""
  report = {}
  for kernel in KERNELS:
    reason = kernel.refuses(q, soft_cap)
    report[kernel.name] = reason or "taken"
    if reason is None:
      break
  return report


def _xla(q, k, v, mask, scale, soft_cap):
  B, L, N, H = q.shape
  S, K = k.shape[1:3]
  # One matmul for each key head: its G query heads stand above each other as G*L rows.
  q = q.reshape(B, L, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)
  k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
  scores = jnp.einsum("BKRH,BKSH->BKRS", q, k, preferred_element_type=jnp.float32) * scale
  if soft_cap is not None:
    scores = jnp.tanh(scores / soft_cap) * soft_cap
  if mask is not None:
    scores = scores.reshape(B, K, -1, L, S)
    scores = jnp.where(mask[:, None, None], scores, MASKED).reshape(B, K, -1, S)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  y = jnp.einsum("BKRS,BKSH->BKRH", weights, v)
  return y.reshape(B, K, -1, L, H).transpose(0, 3, 1, 2, 4).reshape(B, L, N, H)


KERNELS = (Kernel("xla", _xla, lambda q, soft_cap: None),)
