"""The type of arrays in signatures, beside jaxtyping's shapes: `Float[Array, "B L D"]`."""

import jax
import numpy as np

Array = jax.Array | np.ndarray  # functions of JAX take those of the host too
