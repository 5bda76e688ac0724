"""Next-token loss over the supervised tokens, without logits for the other slots.

Letters: B row, L slot, D width, K supervised tokens a row can hold, C chunk, W vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int


class LossSums(NamedTuple):
  """A loss as a sum and its weight; the mean is taken once, after everything is added up.

  sum f32 [], nats; weight f32 [], supervised tokens counted; overflow i32 [], supervised tokens
  that found no room in the budget (anything but 0 means that `sum` is incomplete).
  """

  sum: Float[Array, ""]
  weight: Float[Array, ""]
  overflow: Int[Array, ""]


def supervised_loss(
  hidden: Float[Array, "B L D"],
  tokens: Int[Array, "B L"],
  supervised: Bool[Array, "B L"],
  logits_fn: Callable[[Float[Array, "B C D"]], Float[Array, "B C W"]],
  budget: int = 0,
  chunk: int = 128,
) -> LossSums:
  """Cross entropy of the supervised tokens, each predicted from the slot before it.

  The slots that predict one are gathered (`budget` a row, a static size), then logits are made and
  used up chunk by chunk; the backward pass makes them again. No array of [B, L, W] exists.

  Args:
    hidden: decoder output; the rows are compacted (valid slots first, no holes).
    tokens: ids, the targets where supervised.
    supervised: the slot's own token is a target. Slot 0 has no slot before it and is not counted.
    logits_fn: hidden states to logits; applied per chunk.
    budget: supervised tokens a row can hold; 0 takes L - 1. Rows with more are reported in
      `overflow`, never shortened silently.
    chunk: predictors per row in one piece of logits.
  """
  L = hidden.shape[1]
  K = min(budget, L - 1) if budget else L - 1
  C = min(chunk, K)
  K = -(-K // C) * C

  is_target = supervised[:, 1:]  # of the slots that predict
  count = is_target.sum(axis=1)
  order = jnp.argsort(~is_target, axis=1, stable=True)[:, :K]  # [B, <=K]
  order = jnp.pad(order, ((0, 0), (0, K - order.shape[1])))
  weights = (jnp.arange(K) < count[:, None]).astype(jnp.float32)
  states = jnp.take_along_axis(hidden, order[:, :, None], axis=1)
  targets = jnp.take_along_axis(tokens, order + 1, axis=1)

  @jax.checkpoint
  def chunk_sum(states, targets, weights):
    logits = logits_fn(states).astype(jnp.float32)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.sum(nll * weights)

  def chunks(x):  # [B, K, ...] -> [K/C, B, C, ...]
    return x.reshape(x.shape[0], K // C, C, *x.shape[2:]).swapaxes(0, 1)

  total, _ = jax.lax.scan(
    lambda total, piece: (total + chunk_sum(*piece), None),
    jnp.zeros((), jnp.float32),
    (chunks(states), chunks(targets), chunks(weights)),
  )
  return LossSums(total, weights.sum(), jnp.maximum(count - K, 0).sum())


def model_loss(model: Any, budget: int = 0, chunk: int = 128) -> Callable[..., LossSums]:
  """The loss of a model as a function of (params, rows).

  `model` is a Linen module whose `__call__(rows)` gives (hidden [B,L,D], spliced) with
  `spliced.tokens` and `spliced.supervised` [B,L], and whose method `logits` maps hidden states to
  logits: `models.videorefer.VideoRefer`, or anything with that interface.
  """

  def loss(params: Any, rows: Any) -> LossSums:
    hidden, spliced = model.apply({"params": params}, rows)

    def logits_fn(states):
      return model.apply({"params": params}, states, method="logits")

    return supervised_loss(hidden, spliced.tokens, spliced.supervised, logits_fn, budget, chunk)

  return loss
