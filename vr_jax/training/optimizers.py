"""Optimizers by name: from gradients to directions, over the arrays that each keeps.

An optimizer keeps its arrays in slots, {"mu": tree, "nu": tree, …}, trees of its parameters' paths:
those of all groups lie in one tree a slot, which is saved, placed on the mesh and rounded alike.
The arithmetic is optax's; what the settings of a group may be stands in `config_values.OPTIMIZERS`.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int
from optax import contrib

from vr_jax.arrays import Array
from vr_jax.config_values import OPTIMIZERS
from vr_jax.params import Params, path_names

Slots = dict[str, Params]
Settings = Mapping[str, float]
ROUNDED = ("mu", "nu")  # slots that are kept in `moments_dtype`


class Direction(NamedTuple):
  """The part of an optimizer before learning rate and weight decay.

  `init(params)` gives the slots, float32; `update(grads, slots, params, step)` the directions and
  the slots after optimizer step `step` (i32, 0-based).
  """

  init: Callable[[Params], Slots]
  update: Callable[[Params, Slots, Params, Int[Array, ""]], tuple[Params, Slots]]


def direction(name: str, settings: Settings, params: Params) -> Direction:
  """The optimizer `name` for a tree of parameters (or their shapes), by settings of OPTIMIZERS."""
  return _DIRECTIONS[name]({**OPTIMIZERS[name].defaults, **settings}, params)


def _zeros(params: Params) -> Params:
  return jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)


def _adamw(settings: Settings, params: Params) -> Direction:
  adam = optax.scale_by_adam(b1=settings["b1"], b2=settings["b2"], eps=settings["eps"])

  def update(grads, slots, params, step):
    state = optax.ScaleByAdamState(count=step, mu=slots["mu"], nu=slots["nu"])
    directions, state = adam.update(grads, state)
    return directions, {"mu": state.mu, "nu": state.nu}

  return Direction(lambda params: {"mu": _zeros(params), "nu": _zeros(params)}, update)


def _lion(settings: Settings, params: Params) -> Direction:
  lion = optax.scale_by_lion(b1=settings["b1"], b2=settings["b2"])

  def update(grads, slots, params, step):
    directions, state = lion.update(grads, optax.ScaleByLionState(count=step, mu=slots["mu"]))
    return directions, {"mu": state.mu}

  return Direction(lambda params: {"mu": _zeros(params)}, update)


def _adafactor(settings: Settings, params: Params) -> Direction:
  """As big_vision's scale_by_adafactor (Zhai et al., arXiv 2106.04560): a capped decay, then the
  running mean of the directions."""
  cap = settings["b2_cap"]
  factored = optax.scale_by_factored_rms(
    decay_rate=settings["decay_rate"],
    min_dim_size_to_factor=int(settings["min_dim"]),
    epsilon=settings["eps"],
    decay_rate_fn=lambda step, power: jnp.minimum(cap, 1 - (step + 1.0) ** -power),
  )
  mean = optax.ema(settings["b1"], debias=False)

  def init(params):
    state = factored.init(params)
    return {"v_row": state.v_row, "v_col": state.v_col, "v": state.v, "mu": _zeros(params)}

  def update(grads, slots, params, step):
    second = {name: slots[name] for name in ("v_row", "v_col", "v")}
    directions, state = factored.update(grads, optax.FactoredState(count=step, **second), params)
    directions, means = mean.update(directions, optax.EmaState(count=step, ema=slots["mu"]))
    slots = {"v_row": state.v_row, "v_col": state.v_col, "v": state.v, "mu": means.ema}
    return directions, slots

  return Direction(init, update)


# Of each matrix, by its path from behind the axis of layers: the axes that its input and its output
# have, counted from the end. What is no matrix (tables, norms, biases, convolutions, adapters) goes
# by AdamW, as Muon's author has it.
MATRICES = (
  (r"llm/layers/attn/(q|kv|qkv)_einsum/w", (-2,), (-3, -1)),
  (r"llm/layers/attn/attn_vec_einsum/w", (-3, -2), (-1,)),
  (r"llm/layers/mlp/(gating_einsum|linear)", (-2,), (-1,)),
  (r"img/.*/MultiHeadDotProductAttention_0/(query|key|value)/kernel", (-3,), (-2, -1)),
  (r"img/.*/MultiHeadDotProductAttention_0/out/kernel", (-3, -2), (-1,)),
  (r"img/.*/Dense_[01]/kernel", (-2,), (-1,)),
  (r"(connector|region)/.*(fc\d|conv[13]|downsample)/kernel", (-2,), (-1,)),
)


def is_matrix(path: str) -> bool:
  """Whether Muon takes this parameter."""
  return any(re.fullmatch(pattern, path) for pattern, _, _ in MATRICES)


def _muon(settings: Settings, params: Params) -> Direction:
  """Muon, each step as large as AdamW's: `rms` sqrt(max(inputs, outputs)) (arXiv 2502.16982)."""

  def numbers(path):
    _, inputs, outputs = next(row for row in MATRICES if re.fullmatch(row[0], path))
    return contrib.MuonDimensionNumbers(inputs, outputs)

  dims = jax.tree.map(numbers, path_names(params))
  muon = contrib.scale_by_muon(beta=settings["b1"], weight_dimension_numbers=dims)

  def scaled(x, dim):
    most = max(math.prod(x.shape[axis] for axis in axes) for axes in dim)
    return x * (settings["rms"] * math.sqrt(most))

  def update(grads, slots, params, step):
    constants = muon.init(grads)
    state = constants._replace(count=step, mu=slots["mu"])
    directions, state = muon.update(grads, state)
    return jax.tree.map(scaled, directions, dims), {"mu": state.mu}

  return Direction(lambda params: {"mu": _zeros(params)}, update)


_DIRECTIONS = {"adamw": _adamw, "lion": _lion, "adafactor": _adafactor, "muon": _muon}


# --- Slots in half precision ------------------------------------------------------------------

_GOLDEN = 40_503  # 2^16 over the golden ratio, made odd: steps of it visit every threshold


def rounded(x: Float[Array, "*s"], dtype: Any, step: Int[Array, ""], slot: str) -> Array:
  """A slot in the dtype that it is kept in; to bfloat16, right on average over the steps.

  To the nearest, a moment stands still once a step would change it by less than half a unit of the
  last place: with b2 = 0.999 the second moment stops at a third of its value and never falls.
  Here the bits that are dropped are compared with a threshold that changes from step to step, as
  evenly spread over any stretch of steps as can be (multiples of the golden ratio); so what is lost
  in one step is made up for in others, and with no random numbers: the error of a sum stays within
  about a unit of the last place, where that of drawn thresholds grows.
  """
  if jnp.dtype(dtype) != jnp.bfloat16 or x.dtype != jnp.float32:
    return x.astype(dtype)
  shift = ROUNDED.index(slot) * 2**15  # apart, so that the errors of two moments are not one
  threshold = (step.astype(jnp.uint32) * np.uint32(_GOLDEN) + np.uint32(shift)) & 0xFFFF
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + threshold
  high = (bits >> 16).astype(jnp.uint16)
  return jax.lax.bitcast_convert_type(high, jnp.bfloat16)
