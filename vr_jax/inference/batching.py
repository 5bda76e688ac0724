"""The engine: the programs that answer many questions at once in rows of fixed shape.

Letters: B row (an answer under way), S cache slot, M new token, Q row of one extend, K slot of one
extend, E decoder width, W vocabulary.

    prefix of the video ─ open ─► Q rows ─ extend by K slots, as often as the question needs ─┐
    state of B rows ◄────────────────────────── admit into rows that are free ◄───────────────┘
    state ─ decode until a row ends or some steps are done ─► new tokens ─► free rows
    state of few rows ◄─ resize ─► state of more rows

`rows.py` keeps the rows, `scheduling.py` says what runs next.

All programs are compiled before the first request and none later. Their shapes do not depend on
the requests, and each row is computed by itself, so an answer does not depend on the others.
"""

import dataclasses
import functools
import os
from collections.abc import Generator, Iterator, Sequence
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
WAITING = 8  # prefixes that prompts may hold while they wait for a row


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Static sizes: B rows, and the slots that prefix, question and answer have in each.

  `fewer`: numbers of rows below B, ascending, that few answers are computed on.
  """

  rows: int
  prefix: int
  question: int
  new_tokens: int
  fewer: tuple[int, ...] = ()

  @property
  def slots(self) -> int:
    return self.prefix + self.question + self.new_tokens

  @property
  def row(self) -> tuple[int, int, int]:
    """What a row of these sizes is made of."""
    return self.prefix, self.question, self.new_tokens

  @property
  def classes(self) -> tuple[int, ...]:
    return (*self.fewer, self.rows)

  def holds(self, other: "Sizes") -> bool:
    """Whether rows of these sizes do for a request that asks for others."""
    same = (self.rows, self.prefix, self.question) == (other.rows, other.prefix, other.question)
    return same and self.new_tokens >= other.new_tokens


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
  """The programs of B rows. Compiles on construction; what follows only runs."""

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
    self.together = placement.whole_rows(min(4, sizes.rows) if cpu else 4)
    alone = placement.whole_rows(1)
    self._counts = (alone, self.together) if sizes.fewer and cpu else (self.together,)
    self._llm = module.cfg.llm
    # By Q, by B, or by both.
    self._open: dict[int, Any] = {}
    self._extend: dict[int, Any] = {}
    self._empty: dict[int, Any] = {}
    self._admit: dict[tuple[int, int], Any] = {}
    self._decode: dict[int, Any] = {}
    self._release: dict[int, Any] = {}
    self._resize: dict[tuple[int, int], Any] = {}
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

  def empty(self, rows: int) -> Decoding:
    """So many rows without an answer, one of the sizes' classes."""
    return self._empty[rows]()

  def prefill(self, batch: Sequence[Prompt]) -> Generator[None, None, tuple[KVCache, jax.Array]]:
    """Caches and logits [Q,W] of rows behind the prompts, up to Q of them; a pause after each part.

    The caches are those of `admit`.
    """
    Q = next(Q for Q in self._counts if len(batch) <= Q)
    filled = _filled(batch, Q)
    rows = self._open[Q](tuple(p.prefix.cache for p in filled))
    logits = np.zeros((Q, self._llm.vocab_size), np.float32)
    for i, part in enumerate(self._chunks(filled)):
      if i:
        yield
      rows, logits = self._extend[Q](self._params, rows, logits, *part)
    return rows, logits

  def admit(
    self,
    state: Decoding,
    prefilled: tuple[KVCache, jax.Array],
    batch: Sequence[Prompt],
    free: Sequence[int],
  ) -> Decoding:
    """The state, consumed, with the prompts in these free rows and their first token chosen."""
    rows, logits = prefilled
    B, Q = len(state.done), len(logits)
    filled = _filled(batch, Q)
    where = np.array([*free, *[B] * (Q - len(batch))], np.int32)
    ends = self.sizes.prefix + np.array([len(p.tokens) for p in filled], np.int32)
    limits = np.array([p.limit for p in filled], np.int32)
    seeds = np.array([p.seed for p in filled], np.uint32)
    places = np.array([p.place for p in filled], np.int32)
    sampling = jax.tree.map(lambda *xs: np.concatenate(xs), *(p.sampling.rows(1) for p in filled))
    return self._admit[B, Q](state, rows, logits, ends, where, limits, seeds, places, sampling)

  def decode(self, state: Decoding, steps: int, stop_at_end: bool) -> Decoding:
    """The state, consumed, up to so many steps later; with `stop_at_end` until a row ends."""
    program = self._decode[len(state.done)]
    return program(self._params, state, np.int32(steps), np.bool_(stop_at_end))

  def release(self, state: Decoding, gone: np.ndarray) -> Decoding:
    """The state, consumed, without the answers of these rows, bool [B]."""
    return self._release[len(gone)](state, gone)

  def resize(self, state: Decoding, kept: Sequence[int], rows: int) -> Decoding:
    """As many rows as said, the first of which are these of the state."""
    where = np.array([*kept, *[-1] * (rows - len(kept))], np.int32)
    return self._resize[len(state.done), rows](state, where)

  def score(self, prompts: Sequence[Prompt], counts: Sequence[int]) -> list[float]:
    """The log-likelihood, in nats, of the last `counts[i]` tokens of each prompt.

    That is the sum of their log-probabilities, each given all that stands before it; 0 for none.
    """
    Q, totals = self.together, []
    for at in range(0, len(prompts), Q):
      batch = list(prompts[at : at + Q])
      filled = _filled(batch, Q)
      scored = [*counts[at : at + Q], *[0] * (Q - len(batch))]
      rows = self._open[Q](tuple(p.prefix.cache for p in filled))
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
    Q, K, E = len(filled), self._chunk, self._llm.width
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

  # --- Programs -------------------------------------------------------------------------------

  def _state(self, B: int, pad_id: int) -> Decoding:
    """B rows without an answer."""
    M, W = self.sizes.new_tokens, self._llm.vocab_size
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
      **generate.empty_scores(B, M),
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

  def _shapes(self, placement: Placement, B: int, Q: int):
    """Shapes of the state of B rows, of Q rows and of a prefix, with their shardings."""

    def placed(shapes, shardings):
      if shardings is None:
        return shapes
      return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
      )

    def prefix():
      cache = KVCache.empty(self._llm, 1, self.sizes.prefix)
      return dataclasses.replace(cache, fresh=False)

    prefix_shapes = placed(jax.eval_shape(prefix), placement.prefix(self._llm))
    row_shapes = jax.eval_shape(self._opened, (prefix_shapes,) * Q)
    state = jax.eval_shape(lambda: self._state(B, 0))
    return (
      placed(state, placement.state(self._llm, B)),
      placed(row_shapes, placement.cache(self._llm, Q)),
      prefix_shapes,
    )

  def _planned(self, programs, placement, limit: int, scratch: bool) -> Plan:
    states = [self._shapes(placement, B, self.together)[0] for B in self.sizes.classes]
    _, rows, prefix = self._shapes(placement, self.sizes.rows, self.together)
    return Plan(
      weights=bytes_of(self._params),
      rows=sum(map(bytes_of, states[-2:])) + bytes_of(rows),  # two while one becomes the other
      prefixes=(KEPT + WAITING + 1) * bytes_of(prefix),
      scratch=programs.scratch() if scratch else 0,
      limit=limit,
    )

  def _compile(self, module, programs, placement, eos_ids, pad_id) -> None:
    for Q in self._counts:
      self._compile_prefill(module, programs, placement, Q)
    for B in self.sizes.classes:
      self._compile_rows(module, programs, placement, B, eos_ids, pad_id)

  def _compile_prefill(self, module, programs, placement, Q: int) -> None:
    llm, name = self._llm, (self.sizes.row, Q)
    _, rows, prefix = self._shapes(placement, self.sizes.rows, Q)
    rows_placed, axis = placement.cache(llm, Q), placement.rows(Q)
    K = self._chunk

    def per_row(dtype, *shape):
      return placement.array((Q, *shape), dtype, axis)

    def extend(params, rows, logits, *slots):
      new, rows = module.apply({"params": params}, *slots, rows, method="extend_visual")
      return rows, jnp.where((slots[-1] >= 0).any(1)[:, None], new, logits)

    def score(params, rows, totals, *slots):
      new, rows = module.apply({"params": params}, *slots, rows, method=_likelihoods)
      return rows, totals + new

    logits = per_row("float32", llm.vocab_size)
    slots = (
      per_row("int32", K),
      per_row(llm.dtype, K, llm.width),
      per_row(bool, K),
      per_row("int32", K),
    )
    on_mesh = placement.whole is not None
    out = (rows_placed, logits.sharding) if on_mesh else None
    self._open[Q] = programs(("open", name), self._opened, (prefix,) * Q, out=rows_placed)
    self._extend[Q] = programs(
      ("extend", name), extend, self._params, rows, logits, *slots, donate=(1,), out=out
    )
    targets, totals = per_row("int32", K), per_row("float32")
    self._scorer = functools.partial(  # compiled when first asked for
      programs,
      ("score", name),
      score,
      self._params,
      rows,
      totals,
      *slots,
      targets,
      donate=(1,),
      out=(rows_placed, totals.sharding) if on_mesh else None,
    )

  def _compile_rows(self, module, programs, placement, B: int, eos_ids, pad_id) -> None:
    array, name, M = placement.array, (self.sizes.row, B, eos_ids, pad_id), self.sizes.new_tokens
    state, _, _ = self._shapes(placement, B, self.together)
    placed = placement.state(self._llm, B)

    def admit(state, rows, logits, ends, where, limits, seeds, places, sampling):
      keys = jax.vmap(lambda seed, place: jax.random.fold_in(jax.random.key(seed), place))(
        seeds, places
      )
      rows = dataclasses.replace(rows, end=ends)
      new = generate.first(logits, rows, limits, keys, sampling, M, eos_ids, pad_id)
      return jax.tree.map(lambda x, y: x.at[where].set(y, mode="drop"), state, new)

    def release(state, gone):
      return state.replace(done=state.done | gone)

    def decode(params, state, steps, stop_at_end):
      return generate.decode(module, params, state, steps, stop_at_end, eos_ids, pad_id)

    def resize(state, where):
      rows = jax.tree.map(lambda x: x[jnp.maximum(where, 0)], state)
      return rows.replace(done=rows.done | (where < 0))

    self._empty[B] = programs(("empty", name), lambda: self._state(B, pad_id), out=placed)
    for Q in self._counts:
      _, rows, _ = self._shapes(placement, B, Q)
      axis = placement.rows(Q)
      logits = array((Q, self._llm.vocab_size), "float32", axis)
      integers, floats = array((Q,), "int32", axis), array((Q,), "float32", axis)
      seeds, bools = array((Q,), "uint32", axis), array((Q,), bool, axis)
      sampling = RowSampling(floats, integers, floats, floats, bools)
      arguments = (state, rows, logits, integers, integers, integers, seeds, integers, sampling)
      key = ("admit", name, Q)
      self._admit[B, Q] = programs(key, admit, *arguments, donate=(0,), out=placed)
    arguments = (self._params, state, array((), "int32"), array((), bool))
    self._decode[B] = programs(("decode", name), decode, *arguments, donate=(1,), out=placed)
    gone = array((B,), bool, placement.rows(B))
    key = ("release", self.sizes.row, B)
    self._release[B] = programs(key, release, state, gone, donate=(0,), out=placed)
    for other in set(self.sizes.classes) - {B}:
      where = array((other,), "int32", placement.rows(other))
      out = placement.state(self._llm, other)
      key = ("resize", self.sizes.row, B, other)
      self._resize[B, other] = programs(key, resize, state, where, out=out)


def classes(question_slots: int) -> list[int]:
  """Sizes for the question's slots, up to the one that holds so many."""
  sizes = [2 * CHUNK]
  while sizes[-1] < question_slots:
    sizes.append(4 * sizes[-1])
  return sizes


def _filled(batch: Sequence[Prompt], Q: int) -> list[Prompt]:
  """The batch as Q prompts; what is computed of the rest is dropped."""
  return [*batch, *[batch[0]] * (Q - len(batch))]


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


def device_memory() -> int:
  """Bytes that one device offers; of a CPU, the machine's memory."""
  stats = jax.local_devices()[0].memory_stats() or {}
  return stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _size(count: int) -> str:
  return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.1f} MiB"
