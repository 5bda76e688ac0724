"""Sides of a comparison timed by turns, and the rows that report them.

Import this before jax and torch: it keeps the process on two processors, so that both sides have
the same two threads. The same matmul may drift by half within minutes on a busy machine while the
ratio of two sides hardly moves; so the sides alternate (A B A B …) within one process, and what is
reported is the median of the ratios of neighbours, with their 10th and 90th percentile.
"""

import gc
import os
import statistics
from collections.abc import Callable, Mapping
from typing import NamedTuple

THREADS = 2
PAIRS = 9

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if hasattr(os, "sched_setaffinity"):  # Linux
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])

Rates = Mapping[str, float]  # what a side reached, by name; more is better


class Spread(NamedTuple):
  """Median, 10th and 90th percentile."""

  median: float
  low: float
  high: float

  @classmethod
  def of(cls, values: list[float]) -> "Spread":
    if len(values) == 1:
      return cls(*values * 3)
    low, *_, high = statistics.quantiles(values, n=10, method="inclusive")
    return cls(statistics.median(values), low, high)


NAN = Spread(float("nan"), float("nan"), float("nan"))


def alternate(sides: Mapping[str, Callable[[], Rates]], pairs: int = PAIRS) -> dict[str, list]:
  """The rates of each side, `pairs` times by turns after one turn that warms up."""
  rates: dict[str, list] = {name: [] for name in sides}
  for turn in range(pairs + 1):
    for name, side in sides.items():
      gc.collect()
      reached = side()
      if turn:
        rates[name].append(reached)
  return rates


def ratio(rates: Mapping[str, list], name: str, ours: str = "ours", theirs: str = "torch"):
  """Spread of the ratios ours / theirs of neighbouring turns."""
  pairs = zip(rates[ours], rates[theirs], strict=True)
  return Spread.of([a[name] / b[name] for a, b in pairs])


def typical(rates: Mapping[str, list], side: str, name: str) -> float:
  """Median of what a side reached."""
  return statistics.median(reached[name] for reached in rates[side])


def row(key: str, value: Spread | float, goal: str, *, detail: str = "") -> bool:
  """Prints `key value (p10–p90) goal met|missed detail`; says whether the goal is met.

  `goal` is ">= x", "<= x" or "" for a figure without one. A value of nan (the sides did not agree,
  so their times say nothing) misses every goal.
  """
  spread = value if isinstance(value, Spread) else Spread(value, value, value)
  met, verdict = True, ""
  if goal:
    kind, bound = goal.split()
    met = spread.median >= float(bound) if kind == ">=" else spread.median <= float(bound)
    verdict = "met" if met else "missed"
  ends = f"{spread.low:.2f}–{spread.high:.2f}" if isinstance(value, Spread) else ""
  print(f"{key:24} {spread.median:8.3f}  {ends:11}  {goal:8} {verdict:7} {detail}", flush=True)
  return met
