"""Next-token loss over the supervised tokens, without logits for the other slots.

Letters: B row, L slot, D width, K supervised tokens a row can hold, W vocabulary, C chunk of it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Bool, Float, Int

from vr_jax.arrays import Array


class LossSums(NamedTuple):
  """A loss as a sum and its weight; the mean is taken once, after everything is added up.

  sum f32 [], nats; weight f32 [], supervised tokens counted; overflow i32 [], supervised tokens
  that found no room in the budget (anything but 0 means that `sum` is incomplete); rows: the sum
  and the weight of each row, f32 [B], where the loss tells them apart.
  """

  sum: Float[Array, ""]
  weight: Float[Array, ""]
  overflow: Int[Array, ""]
  rows: tuple[Float[Array, " B"], Float[Array, " B"]] | None = None


def supervised_loss(
  hidden: Float[Array, "B L D"],
  tokens: Int[Array, "B L"],
  supervised: Bool[Array, "B L"],
  logits_fn: Callable[..., Float[Array, "B K C"]],
  budget: int = 0,
  chunk: int = 16_384,
) -> LossSums:
  """Cross entropy of the supervised tokens, each predicted from the slot before it.

  The slots that predict one are gathered (`budget` a row, a static size), then logits are made and
  used up in chunks of the vocabulary; the backward pass makes them again. No array of [B, L, W]
  exists, and of a head that is spread over devices only a chunk is ever whole.

  Args:
    hidden: decoder output; the rows are compacted (valid slots first, no holes).
    tokens: ids, the targets where supervised.
    supervised: the slot's own token is a target. Slot 0 has no slot before it and is not counted.
    logits_fn: hidden states to logits over the vocabulary; with `rows=(start, size)` over that part
      of it. A vocabulary of one chunk is never asked for in parts.
    budget: supervised tokens a row can hold; 0 takes L - 1. Rows with more are reported in
      `overflow`, never shortened silently.
    chunk: vocabulary entries in one piece of logits.
  """
  L = hidden.shape[1]
  K = min(budget, L - 1) if budget else L - 1
  is_target = supervised[:, 1:]  # of the slots that predict
  count = is_target.sum(axis=1)
  order = jnp.argsort(~is_target, axis=1, stable=True)[:, :K]
  weights = (jnp.arange(K) < count[:, None]).astype(jnp.float32)
  states = jnp.take_along_axis(hidden, order[:, :, None], axis=1)
  targets = jnp.take_along_axis(tokens, order + 1, axis=1)
  vocabulary = jax.eval_shape(logits_fn, states).shape[-1]

  if vocabulary <= chunk:
    nll = jax.checkpoint(
      lambda states: optax.softmax_cross_entropy_with_integer_labels(
        logits_fn(states).astype(jnp.float32), targets
      )
    )(states)
  else:
    nll = _chunked_nll(states, targets, logits_fn, vocabulary, chunk)
  weighted = nll * weights
  rows = weighted.sum(axis=1), weights.sum(axis=1)
  return LossSums(weighted.sum(), weights.sum(), jnp.maximum(count - K, 0).sum(), rows)


def _chunked_nll(states, targets, logits_fn, vocabulary, chunk) -> Float[Array, "B K"]:
  """-log softmax of the targets, the sum of exponentials kept relative to the maximum so far."""

  @jax.checkpoint
  def add(carry, first):
    top, total, hit = carry
    start = jnp.minimum(first, vocabulary - chunk)  # the last chunk overlaps the one before it
    ids = start + jnp.arange(chunk)
    logits = logits_fn(states, rows=(start, chunk)).astype(jnp.float32)
    logits = jnp.where(ids >= first, logits, -jnp.inf)
    new_top = jnp.maximum(top, jax.lax.stop_gradient(logits.max(-1)))
    total = total * jnp.exp(top - new_top) + jnp.exp(logits - new_top[..., None]).sum(-1)
    is_hit = (ids == targets[..., None]) & (ids >= first)
    return (new_top, total, hit + jnp.where(is_hit, logits, 0).sum(-1)), None

  zeros = jnp.zeros(targets.shape, jnp.float32)
  firsts = jnp.arange(0, vocabulary, chunk)
  (top, total, hit), _ = jax.lax.scan(add, (zeros - jnp.inf, zeros, zeros), firsts)
  return top + jnp.log(total) - hit


def model_loss(model: Any, budget: int = 0, chunk: int = 16_384) -> Callable[..., LossSums]:
  """The loss of a model as a function of (params, rows).

  `model` is a Linen module whose `__call__(rows)` gives (hidden [B,L,D], spliced) with
  `spliced.tokens` and `spliced.supervised` [B,L], and whose method `logits` maps hidden states to
  logits (of a part of the vocabulary with `rows=(start, size)`, if it exceeds `chunk`):
  `models.videorefer.VideoRefer`, or anything with that interface.
  """

  def loss(params: Any, rows: Any) -> LossSums:
    hidden, spliced = model.apply({"params": params}, rows)

    def logits_fn(states, **part):
      return model.apply({"params": params}, states, method="logits", **part)

    return supervised_loss(hidden, spliced.tokens, spliced.supervised, logits_fn, budget, chunk)

  return loss
