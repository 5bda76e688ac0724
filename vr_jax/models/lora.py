"""Low-rank adapters of the decoder's matrices.

Letters: B batch, L slot, I input, O output, R rank, T matrix of a stack.

Source: LoRA (arXiv 2106.09685).
"""

import math

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float

from vr_jax.arrays import Array


def is_factor(path: str) -> bool:
  """Whether a parameter's path is that of a factor of an adapter."""
  return path.endswith(("_lora_a", "_lora_b"))


def adapter(
  module: nn.Module,
  name: str,
  x: Float[Array, "B L *inputs"],
  outputs: tuple[int, ...],
  rank: int,
  alpha: float,
  stack: tuple[int, ...] = (),
) -> Float[Array, "..."]:
  """What the adapter of the matrix `name` of `module` adds to the matrix's product with `x`.

  The matrix is [*stack, *inputs, *outputs], the result [*stack, B, L, *outputs]; the factors are
  `<name>_lora_a` [*stack, *inputs, R], random, and `<name>_lora_b` [*stack, R, *outputs], zeros at
  first. Their product counts `alpha` / `rank` times.
  """
  inputs, n = x.shape[2:], len(stack)
  # The start of the library peft: uniform, to 1 / sqrt(size of the inputs).
  axes = {"in_axis": range(n, n + len(inputs)), "out_axis": -1, "batch_axis": range(n)}
  init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", **axes)
  a = module.param(f"{name}_lora_a", init, (*stack, *inputs, rank)).astype(x.dtype)
  b = module.param(f"{name}_lora_b", nn.initializers.zeros, (*stack, rank, *outputs))
  T = math.prod(stack)
  low = jnp.einsum("BLI,TIR->TBLR", x.reshape(*x.shape[:2], -1), a.reshape(T, -1, rank))
  # T makes it a batched matmul even where it is 1: remat "dots" keeps `low`, not what is as large
  # as the product and cheap to make again.
  y = jnp.einsum("TBLR,TRO->TBLO", low, b.astype(x.dtype).reshape(T, rank, -1))
  return y.reshape(*stack, *x.shape[:2], *outputs) * (alpha / rank)
