"""The rows of one engine: the answers that are decoded together, and which row each has."""

import dataclasses
from collections.abc import Callable, Generator, Sequence
from typing import Any

import jax
import numpy as np

from vr_jax.inference.batching import Engine, Prompt
from vr_jax.inference.requests import TokenScore

IDLE = 8  # decoding slices that few answers are computed on many rows before they move to few


@dataclasses.dataclass(frozen=True)
class Progress:
  """New tokens of the answer `key`, with their scores if it has any; `done`: it is complete."""

  key: Any
  tokens: tuple[int, ...]
  scores: tuple[TokenScore, ...]
  done: bool


class Rows:
  """Answers under way, each known by a key of the caller's; for the device thread."""

  def __init__(self, engine: Engine):
    self._engine = engine
    self._state: Any = None
    self._keys: list[Any] = []  # by row; None: the row is free
    self._reported: list[int] = []  # tokens, by row
    self._scored: list[bool] = []
    self._coming = 0
    self._idle = 0

  @property
  def busy(self) -> int:
    """Rows with an answer, or for which one is being prefilled."""
    return sum(key is not None for key in self._keys) + self._coming

  @property
  def free(self) -> int:
    return self._engine.sizes.rows - self.busy

  @property
  def keys(self) -> list[Any]:
    return [key for key in self._keys if key is not None]

  @property
  def together(self) -> int:
    """The most prompts of one `fill`."""
    return self._engine.together

  def fill(self, prompts: Sequence[Prompt], keys: Sequence[Any]) -> Generator[None, None, None]:
    """Prefills the prompts, with a pause after each part of them, and puts them into free rows."""
    self._coming += len(prompts)
    try:
      prefilled = yield from self._engine.prefill(prompts)
    finally:
      self._coming -= len(prompts)
    self._resize(self.busy + len(prompts))
    free = [i for i, key in enumerate(self._keys) if key is None][: len(prompts)]
    self._state = self._engine.admit(self._state, prefilled, prompts, free)
    for i, key, prompt in zip(free, keys, prompts, strict=True):
      self._keys[i], self._reported[i], self._scored[i] = key, 0, prompt.sampling.scored

  def release(self, is_gone: Callable[[Any], bool]) -> None:
    """Frees the rows whose answers are gone."""
    gone = np.array([key is not None and is_gone(key) for key in self._keys], bool)
    if gone.any():
      self._state = self._engine.release(self._state, gone)
      self._keys = [None if g else key for g, key in zip(gone, self._keys, strict=True)]

  def decode(self, steps: int, stop_at_end: bool) -> list[Progress]:
    """Up to so many steps, or until a row ends, and what is new in every row."""
    self._shrink_if_idle()
    self._state = state = self._engine.decode(self._state, steps, stop_at_end)
    tokens, lengths, done = jax.device_get((state.tokens, state.lengths, state.done))
    scored = any(key is not None and s for key, s in zip(self._keys, self._scored, strict=True))
    scores, ids = jax.device_get((state.scores, state.likeliest)) if scored else (None, None)
    news = []
    for i, key in enumerate(self._keys):
      if key is None:
        continue
      new = range(self._reported[i], int(lengths[i]))
      self._reported[i] = int(lengths[i])
      noted = [_score(tokens[i, j], scores[i, j], ids[i, j]) for j in new if self._scored[i]]
      news.append(Progress(key, tuple(int(tokens[i, j]) for j in new), tuple(noted), bool(done[i])))
      if done[i]:
        self._keys[i] = None
    return news

  def _shrink_if_idle(self) -> None:
    smaller = any(self.busy <= rows < len(self._keys) for rows in self._engine.sizes.fewer)
    self._idle = self._idle + 1 if smaller else 0
    if self._idle > IDLE:
      self._idle = 0
      self._resize(self.busy, shrink=True)

  def _resize(self, count: int, shrink: bool = False) -> None:
    """Rows for so many answers."""
    rows = next(rows for rows in self._engine.sizes.classes if rows >= count)
    if self._state is None:
      self._state = self._engine.empty(rows)
      kept: list[int] = []
    elif rows > len(self._keys) or (shrink and rows < len(self._keys)):
      kept = [i for i, key in enumerate(self._keys) if key is not None]
      self._state = self._engine.resize(self._state, kept, rows)
    else:
      return
    room = rows - len(kept)
    self._keys = [self._keys[i] for i in kept] + [None] * room
    self._reported = [self._reported[i] for i in kept] + [0] * room
    self._scored = [self._scored[i] for i in kept] + [False] * room


def _score(token: Any, values: np.ndarray, ids: np.ndarray) -> TokenScore:
  top = tuple((int(i), float(v)) for i, v in zip(ids, values[1:], strict=True))
  return TokenScore(int(token), float(values[0]), top)
