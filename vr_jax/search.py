"""What a sweep tries: grids, draws, and a budget that the worse half of the members loses.

from vr_jax.search import draws, grid, log_uniform

def sweep(add):
  for values in grid({"lr": (1e-3, 1e-4), "input.masks": ("single", "multi")}):
    add(**values)
  for values in draws(20, {"lr": log_uniform(1e-5, 1e-3), "b2": (0.95, 0.999)}):
    add(**values)
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipes.errors import InputError

Draw = Callable[[np.random.Generator], Any]


def grid(fields: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
  """Every combination of the values of each field, the last one fastest."""
  for values in itertools.product(*fields.values()):
    yield dict(zip(fields, values, strict=True))


def draws(
  count: int, fields: Mapping[str, Sequence[Any] | Draw], seed: int = 0
) -> Iterator[dict[str, Any]]:
  """So many draws: of each field one of its values, or what its function draws.

  The first ones are the same whatever `count` is, so that a sweep can be made longer.
  """
  for number in range(count):
    rng = np.random.default_rng((seed, number))
    yield {
      name: values(rng) if callable(values) else values[int(rng.integers(len(values)))]
      for name, values in fields.items()
    }


def uniform(low: float, high: float) -> Draw:
  return lambda rng: _short(rng.uniform(low, high))


def log_uniform(low: float, high: float) -> Draw:
  """As many draws between 1e-5 and 1e-4 as between 1e-4 and 1e-3."""
  if not 0 < low < high:
    raise InputError(f"log_uniform({low}, {high}): accepted: 0 < low < high")
  return lambda rng: _short(math.exp(rng.uniform(math.log(low), math.log(high))))


def _short(value: float) -> float:
  """Four digits, which names of members show."""
  return float(f"{value:.4g}")


def survivors(values: Mapping[str, float | None], keep: float, smaller: bool) -> list[str]:
  """The best share of the members by their metric, at least one; those without a value go first."""
  known = {name: v for name, v in values.items() if v is not None and math.isfinite(v)}
  ranked = sorted(known, key=lambda name: known[name] if smaller else -known[name])
  return ranked[: max(1, math.ceil(len(values) * keep))]
