"""The engine: many answers at once in rows of fixed shape, refilled as answers end.

Letters: B row (an answer under way), S cache slot, M new token, Q row of one extend, K slot of one
extend, E decoder width, W vocabulary.

    prefix of the video ─ open ─► Q rows ─ extend by K slots, as often as the question needs ─┐
    state of B rows ◄────────────────────────── admit into rows that are free ◄───────────────┘
    state ─ decode until a row ends or some steps are done ─► new tokens ─► free rows

All programs are compiled before the first request and none later. Their shapes do not depend on
the requests, and each row is computed by itself, so an answer does not depend on the others.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from data_pipes.errors import InputError
from vr_jax.inference import generate
from vr_jax.inference.generate import Decoding
from vr_jax.inference.placement import Placement
from vr_jax.inference.prefix import KEPT, Prefix
from vr_jax.inference.programs import Programs, bytes_of
from vr_jax.inference.sampling import RowSampling, Sampling
from vr_jax.models.decoder import KVCache
from vr_jax.models.videorefer import VideoRefer

CHUNK, CPU_CHUNK = 64, 16  # K on accelerators and on CPUs
WAITING = 8  # the most prefixes that wait for rows of another size, see `Model._run`


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Static sizes: B rows, and the slots that prefix, question and answer have in each."""

  rows: int
  prefix: int
  question: int
  new_tokens: int

  @property
  def slots(self) -> int:
    return self.prefix + self.question + self.new_tokens


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
  """One question, ready for the decoder.

  Attributes:
    index: the caller's number.
    prefix: of its video.
    tokens: i32 [n], what follows the scene; 0 where an object token stands.
    visual: [n,E], the object tokens; anything elsewhere.
    is_visual: bool [n].
    limit: the most new tokens.
    sampling, seed, place: sampled tokens are a function of them.
  """

  index: int
  prefix: Prefix
  tokens: np.ndarray
  visual: np.ndarray
  is_visual: np.ndarray
  limit: int
  sampling: Sampling = generate.GREEDY
  seed: int = 0
  place: int = 0

  def followed_by(self, ids: np.ndarray) -> "Prompt":
    """The prompt with more text behind it, i32 [m]."""
    return dataclasses.replace(
      self,
      tokens=np.concatenate([self.tokens, ids]),
      visual=np.pad(self.visual, ((0, len(ids)), (0, 0))),
      is_visual=np.pad(self.is_visual, (0, len(ids))),
    )


@dataclasses.dataclass(frozen=True)
class Progress:
  """New token ids of the prompt `index`, and whether its answer is complete."""

  index: int
  tokens: tuple[int, ...]
  done: bool


@dataclasses.dataclass(frozen=True)
class Plan:
  """Bytes on a device, and how many it has."""

  weights: int
  rows: int
  prefixes: int
  scratch: int
  limit: int

  @property
  def total(self) -> int:
    return self.weights + self.rows + self.prefixes + self.scratch

  def __str__(self) -> str:
    parts = ("weights", "rows", "prefixes") + ("scratch",) * (self.scratch > 0)
    listed = " + ".join(f"{part} {_size(getattr(self, part))}" for part in parts)
    return f"{listed} = {_size(self.total)} of {_size(self.limit)}"


class Engine:
  """Answers prompts on B rows. Compiles on construction; `run` only runs."""

  def __init__(
    self,
    module: VideoRefer,
    params: Any,
    programs: Programs,
    placement: Placement,
    sizes: Sizes,
    *,
    eos_ids: tuple[int, ...],
    pad_id: int,
    memory_limit: int | None = None,
  ):
    """`module` has its decoder in the fused layout; `memory_limit` bytes, default the device's.

    Raises:
      InputError: the sizes do not fit the memory; the message holds the numbers.
    """
    self.sizes, self._params = sizes, params
    # Each extend reads every weight, so several questions share one. A CPU pays for the padding of
    # slots, and for that of rows where there are few.
    cpu = placement.platform == "cpu"
    self._chunk = CPU_CHUNK if cpu else CHUNK
    self._together = placement.whole_rows(min(4, sizes.rows) if cpu else 4)
    self._llm = module.cfg.llm
    limit = device_memory() if memory_limit is None else memory_limit
    self.plan = self._planned(programs, placement, limit, scratch=False)
    if self.plan.total <= limit:
      self._compile(module, programs, placement, eos_ids, pad_id)
      self.plan = self._planned(programs, placement, limit, scratch=True)
    if self.plan.total > limit:
      raise InputError(
        f"{sizes.rows} rows of {sizes.slots} slots (prefix {sizes.prefix}, question "
        f"{sizes.question}, answer {sizes.new_tokens}) do not fit the memory: {self.plan}; "
        "accepted: a smaller batch_size, max_new_tokens or question, or weights='int8'"
      )

  def run(
    self,
    prompts: Iterable[Prompt | None],
    *,
    every: int | None = None,
    is_dropped: Callable[[int], bool] = lambda index: False,
  ) -> Iterator[Progress | None]:
    """Answers the prompts, taking the next one whenever a row is free.

    Yields None when there is nothing to do and more may come.

    Args:
      prompts: drawn one by one, so they may be made as they are needed; None where there is none
        yet.
      every: report after so many steps; by default when answers are complete.
      is_dropped: whether nobody waits for the answer to a prompt any more; its row is then free.
    """
    waiting = _Waiting(prompts, is_dropped)
    state = self._empty()
    # By index, so that no row keeps its prompt's prefix on the device.
    rows: list[int | None] = [None] * self.sizes.rows
    reported = [0] * len(rows)  # tokens
    while True:
      dropped = np.array([index is not None and is_dropped(index) for index in rows])
      if dropped.any():
        state = self._release(state, dropped)
        rows = [None if gone else index for index, gone in zip(rows, dropped, strict=True)]
      while None in rows and (batch := waiting.take(min(self._together, rows.count(None)))):
        free = [i for i, index in enumerate(rows) if index is None][: len(batch)]
        state = self._fill(state, batch, free)
        for i, prompt in zip(free, batch, strict=True):
          rows[i], reported[i] = prompt.index, 0
      if all(index is None for index in rows):
        if waiting.empty:
          return
        yield None
        continue
      steps = np.int32(self.sizes.new_tokens if every is None else every)
      state = self._decode(self._params, state, steps, np.bool_(not waiting.empty))
      tokens, lengths, done = jax.device_get((state.tokens, state.lengths, state.done))
      for i, index in enumerate(rows):
        if index is None or (every is None and not done[i]):
          continue
        new = tuple(int(t) for t in tokens[i, reported[i] : lengths[i]])
        reported[i] = int(lengths[i])
        rows[i] = None if done[i] else index
        yield Progress(index, new, bool(done[i]))

  def score(self, prompts: Sequence[Prompt], counts: Sequence[int]) -> list[float]:
    """The log-likelihood, in nats, of the last `counts[i]` tokens of each prompt.

    That is the sum of their log-probabilities, each given all that stands before it; 0 for none.
    """
    Q, totals = self._together, []
    for at in range(0, len(prompts), Q):
      batch = list(prompts[at : at + Q])
      filled = batch + batch[:1] * (Q - len(batch))
      scored = [*counts[at : at + Q], *[0] * (Q - len(batch))]
      rows = self._open(tuple(p.prefix.cache for p in filled))
      total = np.zeros(Q, np.float32)
      for part in self._chunks(filled, scored):
        rows, total = self._scorer()(self._params, rows, total, *part)
      totals += np.asarray(total)[: len(batch)].tolist()
    return totals

  def _chunks(
    self, filled: Sequence[Prompt], scored: Sequence[int] | None = None
  ) -> Iterator[list[np.ndarray]]:
    """Tokens, visual, is_visual and positions of Q rows, K slots at a time, padded at the end.

    With `scored`, also what each slot must foretell: the last so many tokens of its row, else -1.
    """
    Q, K, E = self._together, self._chunk, self._llm.width
    padded = -(-max(len(p.tokens) for p in filled) // K) * K
    tokens, is_visual = np.zeros((Q, padded), np.int32), np.zeros((Q, padded), bool)
    visual = np.zeros((Q, padded, E), self._llm.dtype)
    positions, targets = np.full((2, Q, padded), -1, np.int32)
    for i, p in enumerate(filled):
      n = len(p.tokens)
      tokens[i, :n], visual[i, :n], is_visual[i, :n] = p.tokens, p.visual, p.is_visual
      positions[i, :n] = p.prefix.length + np.arange(n)
      if scored is not None:
        first = n - scored[i]
        targets[i, first - 1 : n - 1] = p.tokens[first:]
    arrays = [tokens, visual, is_visual, positions] + ([] if scored is None else [targets])
    for at in range(0, padded, K):
      yield [x[:, at : at + K] for x in arrays]

  def _fill(self, state: Decoding, batch: list[Prompt], free: list[int]) -> Decoding:
    """Prefills the questions of the batch and puts them into free rows."""
    Q = self._together
    filled = batch + batch[:1] * (Q - len(batch))  # the rest is computed and dropped
    counts = np.array([len(p.tokens) for p in filled], np.int32)
    rows = self._open(tuple(p.prefix.cache for p in filled))
    logits = np.zeros((Q, self._llm.vocab_size), np.float32)
    for part in self._chunks(filled):
      rows, logits = self._extend(self._params, rows, logits, *part)
    where = np.array(free + [self.sizes.rows] * (Q - len(batch)), np.int32)
    ends = self.sizes.prefix + counts
    limits = np.array([p.limit for p in filled], np.int32)
    seeds = np.array([p.seed for p in filled], np.uint32)
    places = np.array([p.place for p in filled], np.int32)
    sampling = jax.tree.map(lambda *xs: np.concatenate(xs), *(p.sampling.rows(1) for p in filled))
    return self._admit(state, rows, logits, ends, where, limits, seeds, places, sampling)

  # --- Programs -------------------------------------------------------------------------------

  def _state(self, pad_id: int) -> Decoding:
    """B rows without an answer."""
    B, M, W = self.sizes.rows, self.sizes.new_tokens, self._llm.vocab_size
    cache = KVCache.empty(self._llm, B, self.sizes.slots)
    return Decoding(
      cache=dataclasses.replace(cache, end=jnp.zeros(B, jnp.int32), fresh=False),
      tokens=jnp.full((B, M), pad_id, jnp.int32),
      lengths=jnp.zeros(B, jnp.int32),
      done=jnp.ones(B, bool),
      start=jnp.zeros(B, jnp.int32),
      limits=jnp.zeros(B, jnp.int32),
      keys=jax.random.split(jax.random.key(0), B),
      seen=jnp.zeros((B, W), bool),
      sampling=jax.tree.map(jnp.asarray, Sampling().rows(B)),
    )

  def _opened(self, prefixes: tuple[KVCache, ...]) -> KVCache:
    """The prefixes as rows with room for question and answer."""
    room = self.sizes.slots - self.sizes.prefix

    def rows(xs, axis, value=0):
      widths = [(0, room if i == axis else 0) for i in range(xs[0].ndim)]
      return jnp.pad(jnp.concatenate(xs), widths, constant_values=value)

    return KVCache(
      k=tuple(rows(layer, 2) for layer in zip(*(p.k for p in prefixes), strict=True)),
      v=tuple(rows(layer, 2) for layer in zip(*(p.v for p in prefixes), strict=True)),
      positions=rows([p.positions for p in prefixes], 1, -1),
      end=jnp.full(len(prefixes), self.sizes.prefix, jnp.int32),
    )

  def _shapes(self, placement: Placement):
    """Shapes of the state, of Q rows and of a prefix, with their shardings."""

    def placed(shapes, shardings):
      if shardings is None:
        return shapes
      return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
      )

    def prefix():
      cache = KVCache.empty(self._llm, 1, self.sizes.prefix)
      return dataclasses.replace(cache, fresh=False)

    Q, B = self._together, self.sizes.rows
    prefix_shapes = placed(jax.eval_shape(prefix), placement.prefix(self._llm))
    row_shapes = jax.eval_shape(self._opened, (prefix_shapes,) * Q)
    state = jax.eval_shape(lambda: self._state(0))
    return (
      placed(state, placement.state(self._llm, B)),
      placed(row_shapes, placement.cache(self._llm, Q)),
      prefix_shapes,
    )

  def _planned(self, programs, placement, limit: int, scratch: bool) -> Plan:
    state, rows, prefix = self._shapes(placement)
    return Plan(
      weights=bytes_of(self._params),
      rows=bytes_of(state) + bytes_of(rows),
      prefixes=(KEPT + WAITING + 1) * bytes_of(prefix),
      scratch=programs.scratch() if scratch else 0,
      limit=limit,
    )

  def _compile(self, module, programs, placement, eos_ids, pad_id) -> None:
    llm, array, name = self._llm, placement.array, (self.sizes, eos_ids, pad_id)
    state, rows, prefix = self._shapes(placement)
    state_placed = placement.state(llm, self.sizes.rows)
    rows_placed = placement.cache(llm, self._together)
    Q, K, W = self._together, self._chunk, llm.vocab_size
    axis = placement.rows(Q)

    def per_row(dtype, *shape):
      return array((Q, *shape), dtype, axis)

    def extend(params, rows, logits, *slots):
      new, rows = module.apply({"params": params}, *slots, rows, method="extend_visual")
      return rows, jnp.where((slots[-1] >= 0).any(1)[:, None], new, logits)

    def admit(state, rows, logits, ends, where, limits, seeds, places, sampling):
      keys = jax.vmap(lambda seed, place: jax.random.fold_in(jax.random.key(seed), place))(
        seeds, places
      )
      rows = dataclasses.replace(rows, end=ends)
      M = self.sizes.new_tokens
      new = generate.first(logits, rows, limits, keys, sampling, M, eos_ids, pad_id)
      return jax.tree.map(lambda x, y: x.at[where].set(y, mode="drop"), state, new)

    def release(state, gone):
      return state.replace(done=state.done | gone)

    def decode(params, state, steps, stop_at_end):
      return generate.decode(module, params, state, steps, stop_at_end, eos_ids, pad_id)

    logits, whole = per_row("float32", W), placement.whole
    out = None if whole is None else (rows_placed, logits.sharding)
    slots = (
      per_row("int32", K),
      per_row(llm.dtype, K, llm.width),
      per_row(bool, K),
      per_row("int32", K),
    )
    integers, one = per_row("int32"), array((), "int32")
    self._empty = programs(("empty", name), lambda: self._state(pad_id), out=state_placed)
    self._open = programs(("open", self.sizes), self._opened, (prefix,) * Q, out=rows_placed)
    self._extend = programs(
      ("extend", self.sizes), extend, self._params, rows, logits, *slots, donate=(1,), out=out
    )
    targets, totals = per_row("int32", K), per_row("float32")

    def score(params, rows, totals, *slots):
      new, rows = module.apply({"params": params}, *slots, rows, method=_likelihoods)
      return rows, totals + new

    self._scorer = functools.partial(  # compiled when first asked for
      programs,
      ("score", self.sizes),
      score,
      self._params,
      rows,
      totals,
      *slots,
      targets,
      donate=(1,),
      out=None if whole is None else (rows_placed, totals.sharding),
    )
    floats, seeds = per_row("float32"), per_row("uint32")
    sampling = RowSampling(floats, integers, floats, floats)
    arguments = (state, rows, logits, integers, integers, integers, seeds, integers, sampling)
    self._admit = programs(("admit", name), admit, *arguments, donate=(0,), out=state_placed)
    arguments = (self._params, state, one, array((), bool))
    self._decode = programs(("decode", name), decode, *arguments, donate=(1,), out=state_placed)
    gone = array((self.sizes.rows,), bool, placement.rows(self.sizes.rows))
    self._release = programs(
      ("release", self.sizes), release, state, gone, donate=(0,), out=state_placed
    )


def _likelihoods(
  module: VideoRefer, tokens, visual, is_visual, positions, targets, cache: KVCache
) -> tuple[Float[jax.Array, " Q"], KVCache]:
  """As `extend_visual`, but with each row's sum of log-probabilities of `targets` (-1: none)."""
  text = module.llm.embed(tokens)
  embeds = jnp.where(is_visual[..., None], visual.astype(text.dtype), text)
  hidden, cache = module.llm(embeds, positions, cache)
  logits = module.llm.logits(hidden).astype(jnp.float32)
  chosen = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
  each = chosen - jax.nn.logsumexp(logits, axis=-1)
  return jnp.where(targets >= 0, each, 0).sum(axis=1), cache


class _Waiting:
  """Prompts not yet begun; `empty` looks one ahead, and is False where more may come."""

  def __init__(self, prompts: Iterable[Prompt | None], is_dropped: Callable[[int], bool]):
    self._prompts = iter(prompts)
    self._is_dropped = is_dropped
    self._next: Prompt | None = None
    self.empty = False

  def take(self, count: int) -> list[Prompt]:
    """Up to `count` prompts; fewer where there are no more, or none yet."""
    taken: list[Prompt] = []
    while len(taken) < count and self._look():
      assert self._next is not None
      taken.append(self._next)
      self._next = None
    self._look()
    return taken

  def _look(self) -> bool:
    """Whether there is a next prompt now."""
    while self._next is None and not self.empty:
      try:
        prompt = next(self._prompts)
      except StopIteration:
        self.empty = True
        return False
      if prompt is None:
        return False
      if not self._is_dropped(prompt.index):
        self._next = prompt
    return self._next is not None


def device_memory() -> int:
  """Bytes that one device offers; of a CPU, the machine's memory."""
  stats = jax.local_devices()[0].memory_stats() or {}
  return stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _size(count: int) -> str:
  return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.1f} MiB"
