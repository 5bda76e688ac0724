"""Compiled generation: prefill, then one `lax.while_loop` on the device with a donated cache.

`generate` answers one batch of rows; the engine (batching.py) refills rows of the same state as
they end.

Letters: B row, M new token, W vocabulary, A alternative of a token. A model is a Linen module with
the methods `prefill(batch, cache) -> (logits [B,W], cache)` and
`extend(tokens [B,K], positions [B,K], cache) -> (logits [B,K,W], cache)`: VideoRefer, or a Decoder.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vr_jax.inference.options import ALTERNATIVES
from vr_jax.inference.sampling import RowSampling, Sampling, penalize, pick
from vr_jax.models.decoder import KVCache

GREEDY = Sampling()


@flax.struct.dataclass
class Decoding:
  """Rows between two steps; every leaf has the axis B in front, but for a cache with one `end`.

  Attributes:
    cache: keys and values of prompt and answer, without those of the newest token: the next step
      writes them.
    tokens: the answer so far; padding beyond the row's length.
    lengths: tokens that each row has.
    done: the row has met an end token or its limit, and writes nothing more.
    start: position of the row's first new token, which follows its prompt.
    limits: the most tokens of the row.
    keys: the row's random key; token i is drawn with `fold_in(key, i)`.
    seen: tokens that the row has generated, for the repetition penalty.
    sampling: how each row's tokens are chosen.
    scores: of each token its log-probability, then those of the likeliest; in rows that are scored.
    likeliest: ids of the likeliest tokens in the place of each.
  """

  cache: KVCache
  tokens: Int[Array, "B M"]
  lengths: Int[Array, " B"]
  done: Bool[Array, " B"]
  start: Int[Array, " B"]
  limits: Int[Array, " B"]
  keys: Array
  seen: Bool[Array, "B W"]
  sampling: RowSampling
  scores: Float[Array, "B M A1"]
  likeliest: Int[Array, "B M A"]


def bucket(length: int, smallest: int = 64) -> int:
  """The static size to pad `length` to: at most a quarter more, and few sizes in all."""
  quarter = smallest // 4
  while length > 8 * quarter:
    quarter *= 2
  return max(smallest, -(-length // quarter) * quarter)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def prefill(
  model: nn.Module, params: Any, batch: Any, cache: KVCache
) -> tuple[Float[Array, "B W"], KVCache]:
  """Logits after each row's last slot, and the filled cache; consumes the empty one."""
  return model.apply({"params": params}, batch, cache, method="prefill")


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def extend(
  model: nn.Module, params: Any, tokens: Int[Array, "B K"], positions: Int[Array, "B K"], cache
) -> tuple[Float[Array, "B K W"], KVCache]:
  """Logits after each of K more tokens per row, and the cache with them; consumes the one given."""
  return model.apply({"params": params}, tokens, positions, cache, method="extend")


def generate(
  model: nn.Module,
  params: Any,
  logits: Float[Array, "B W"],
  cache: KVCache,
  *,
  max_new_tokens: int | Sequence[int],
  eos_ids: Sequence[int],
  pad_id: int = 0,
  sampling: Sampling = GREEDY,
  keys: Array | None = None,
) -> tuple[Int[np.ndarray, "B M"], Int[np.ndarray, " B"]]:
  """New tokens [B,M] and how many each row has; a row's last is its end token, if it met one.

  Starts from what `prefill` (or `extend`, after a shared prefix) returned; the cache, which must
  have M - 1 free slots, is consumed. M is the largest of `max_new_tokens`, which may differ by
  row. Greedy rows do not depend on the batch they are in; neither do sampled ones, given `keys`
  (default: `jax.random.key(0)` split over the rows).
  """
  state = _start(logits, cache, max_new_tokens, eos_ids, pad_id, sampling, keys)
  most = int(np.max(max_new_tokens))
  state = decode(model, params, state, most, False, tuple(eos_ids), pad_id)
  return np.asarray(state.tokens)[:, :most], np.asarray(state.lengths)


class Generator:
  """A model and its parameters, ready to answer batches of rows.

  Cache and token buffers take `bucket` sizes, so that few programs are compiled.
  """

  def __init__(self, model: nn.Module, params: Any):
    self.model, self.params = model, params

  def prefill(self, batch: Any, max_new_tokens: int) -> tuple[Float[Array, "B W"], KVCache]:
    """Logits after each row of the batch, and a cache with room for so many more tokens."""
    rows, length = batch["tokens"].shape
    cfg = getattr(self.model.cfg, "llm", self.model.cfg)  # VideoRefer holds a decoder, or is one
    cache = KVCache.empty(cfg, rows, bucket(length + max_new_tokens))
    return prefill(self.model, self.params, batch, cache)

  def __call__(
    self, batch: Any, *, max_new_tokens: int | Sequence[int], **decoding: Any
  ) -> tuple[Int[np.ndarray, "B M"], Int[np.ndarray, " B"]]:
    """New tokens of each row and their number; `decoding` are the other keywords of `generate`."""
    logits, cache = self.prefill(batch, int(np.max(max_new_tokens)))
    return generate(
      self.model, self.params, logits, cache, max_new_tokens=max_new_tokens, **decoding
    )


def _start(logits, cache, max_new_tokens, eos_ids, pad_id, sampling, keys) -> Decoding:
  B = logits.shape[0]
  limits = np.broadcast_to(np.asarray(max_new_tokens, np.int32), (B,))
  free = cache.positions.shape[1] - int(cache.end)
  if limits.min() < 1 or limits.max() - 1 > free:
    raise ValueError(
      f"max_new_tokens={max_new_tokens}: give at least 1 and at most {free + 1}, the free cache "
      "slots and one"
    )
  if keys is None:
    keys = jax.random.split(jax.random.key(0), B)
  if isinstance(cache.k, tuple):
    # Slots of rows with ends of their own are scattered, which XLA does in place; with a common end
    # XLA:CPU copies the whole cache in every step.
    cache = cache.replace(end=jnp.broadcast_to(cache.end, B))
  columns = bucket(int(limits.max()), smallest=16)  # a static size that many limits share
  return first(logits, cache, limits, keys, sampling.rows(B), columns, tuple(eos_ids), pad_id)


@functools.partial(jax.jit, static_argnums=(5, 6, 7), donate_argnums=1)
def first(logits, cache, limits, keys, sampling, columns, eos_ids, pad_id) -> Decoding:
  """The state that holds the first new token of each row, with room for `columns` tokens."""
  B, W = logits.shape
  state = Decoding(
    cache=cache,
    tokens=jnp.full((B, columns), pad_id, jnp.int32),
    lengths=jnp.zeros(B, jnp.int32),
    done=jnp.zeros(B, bool),
    start=cache.positions.max(axis=1) + 1,
    limits=limits,
    keys=keys,
    seen=jnp.zeros((B, W), bool),
    sampling=jax.tree.map(jnp.asarray, sampling),
    **empty_scores(B, columns),
  )
  return _choose(logits, state, eos_ids, pad_id)


@functools.partial(jax.jit, static_argnums=(0, 5, 6), donate_argnums=2)
def decode(model, params, state: Decoding, steps, stop_at_end, eos_ids, pad_id) -> Decoding:
  """Up to `steps` more tokens a row, until all rows, or with `stop_at_end` one, have ended."""
  before = state.done

  def go_on(carry):
    i, state = carry
    ended = state.done.all() | (stop_at_end & (state.done & ~before).any())
    return (i < steps) & ~ended

  def step(carry):
    i, state = carry
    last = jnp.take_along_axis(state.tokens, jnp.maximum(state.lengths - 1, 0)[:, None], axis=1)
    position = jnp.where(state.done, -1, state.start + state.lengths - 1)
    logits, cache = model.apply(
      {"params": params}, last, position[:, None], state.cache, method="extend"
    )
    return i + 1, _choose(logits[:, 0], state.replace(cache=cache), eos_ids, pad_id)

  return jax.lax.while_loop(go_on, step, (0, state))[1]


def _choose(logits, state: Decoding, eos_ids, pad_id) -> Decoding:
  """Writes the next token of every row that is not done."""
  plain = logits
  # A row that has ended asks for nothing: what it was shall cost the others no more.
  penalty = jnp.where(state.done, 1, state.sampling.penalty)
  sampling = state.sampling.replace(
    temperature=jnp.where(state.done, 0, state.sampling.temperature)
  )
  logits = jax.lax.cond(
    (penalty != 1).any(),
    lambda: penalize(logits, state.seen, penalty[:, None]),
    lambda: logits,
  )
  keys = jax.vmap(jax.random.fold_in)(state.keys, state.lengths)
  token = jnp.where(state.done, pad_id, pick(logits, keys, sampling))
  rows = jnp.arange(token.shape[0])
  column = jnp.where(state.done, state.tokens.shape[1], state.lengths)  # beyond the end: dropped
  lengths = state.lengths + ~state.done
  ended = jnp.isin(token, jnp.asarray(eos_ids, jnp.int32)) | (lengths >= state.limits)
  noted = lambda: _note_scores(plain, token, rows, column, state.scores, state.likeliest)  # noqa: E731
  scores, likeliest = jax.lax.cond(
    (state.sampling.scored & ~state.done).any(), noted, lambda: (state.scores, state.likeliest)
  )
  return state.replace(
    scores=scores,
    likeliest=likeliest,
    tokens=state.tokens.at[rows, column].set(token, mode="drop"),
    lengths=lengths,
    done=state.done | ended,
    seen=state.seen.at[rows, token].set(True),
  )


def _note_scores(logits, token, rows, column, scores, likeliest):
  """The arrays with the log-probabilities of the tokens that were chosen from these logits."""
  top, ids = jax.lax.top_k(logits, ALTERNATIVES)
  chosen = jnp.take_along_axis(logits, token[:, None], axis=1)
  values = jnp.concatenate([chosen, top], axis=1) - jax.nn.logsumexp(logits, axis=1)[:, None]
  scores = scores.at[rows, column].set(values, mode="drop")
  return scores, likeliest.at[rows, column].set(ids.astype(jnp.int32), mode="drop")


def empty_scores(rows: int, columns: int) -> dict[str, Array]:
  """`scores` and `likeliest` of rows without tokens."""
  return {
    "scores": jnp.zeros((rows, columns, 1 + ALTERNATIVES), jnp.float32),
    "likeliest": jnp.zeros((rows, columns, ALTERNATIVES), jnp.int32),
  }
