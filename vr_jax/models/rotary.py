"""Rotary position embedding, of the decoder's slots and of a tower's patches.

Letters: B row, L slot, N head, H head width, A angle (H / 2 of them).
"""

import jax.numpy as jnp
from jaxtyping import Float

from vr_jax.arrays import Array


def rotate(
  x: Float[Array, "B L N H"], cos: Float[Array, "B L A"], sin: Float[Array, "B L A"]
) -> Float[Array, "B L N H"]:
  """Rotary position embedding in float32, halves as pairs (RoFormer, arXiv 2104.09864)."""
  cos, sin = cos[:, :, None], sin[:, :, None]
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
