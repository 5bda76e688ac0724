"""Sides of a comparison timed by turns, and the rows that report them.

Import this before jax and torch: it keeps the process on two processors, so that both sides have
the same two threads. The same matmul may drift by half within minutes on a busy machine while the
ratio of two sides hardly moves; so the sides alternate (A B A B …) within one process, and what is
reported is the median of the ratios of neighbours, with their 10th and 90th percentile.

A ratio belongs to its processor: XLA and PyTorch use other instruction sets and matmul libraries.
So the first row of speed stands under a line that names the processor, and each ends with what a
bare float32 matmul reached at that moment on both sides.
"""

import functools
import gc
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

THREADS = 2
PAIRS = 9

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if hasattr(os, "sched_setaffinity"):  # Linux
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])

# Names in Linux's /proc/cpuinfo of the sets that matmuls are written for.
SETS = (
  *("sse4_2", "avx", "fma", "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16"),
  *("amx_tile", "amx_bf16", "asimd", "sve"),
)

Rates = Mapping[str, float]  # what a side reached, by name; more is better


class Spread(NamedTuple):
  """Median, 10th and 90th percentile."""

  median: float
  low: float
  high: float

  @classmethod
  def over(cls, values: list[float]) -> "Spread":
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
  return Spread.over([a[name] / b[name] for a, b in pairs])


def typical(rates: Mapping[str, list], side: str, name: str) -> float:
  """Median of what a side reached."""
  return statistics.median(reached[name] for reached in rates[side])


def processor() -> str:
  """Name of the processor, its instruction sets, and how many of its threads this process has."""
  try:
    text = Path("/proc/cpuinfo").read_text()
  except OSError:  # no Linux
    return f"{platform.processor() or platform.machine()}, instruction sets unknown"
  names = re.findall(r"^model name\s*:\s*(.+)$", text, re.MULTILINE) or [platform.machine()]
  flags = re.findall(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE) or [""]
  sets = [name for name in SETS if name in flags[0].split()]
  return f"{names[0]} ({' '.join(sets)}), {len(os.sched_getaffinity(0))} threads"


def matmul_rates(size: int = 1024, repeats: int = 5) -> dict[str, float]:
  """GFLOP/s of the best of some bare float32 matmuls, by library, of those that are imported."""
  sides: dict[str, Callable[[], object]] = {}
  if "jax" in sys.modules:
    import jax
    import jax.numpy as jnp

    ours = jnp.ones((size, size))
    product = jax.jit(jnp.matmul)
    sides["XLA"] = lambda: product(ours, ours).block_until_ready()
  if "torch" in sys.modules:
    import torch

    theirs = torch.ones(size, size)
    sides["PyTorch"] = lambda: theirs @ theirs
  rates = {}
  for name, multiply in sides.items():
    multiply()
    seconds = []
    for _ in range(repeats):
      start = time.perf_counter()
      multiply()
      seconds.append(time.perf_counter() - start)
    rates[name] = 2 * size**3 / min(seconds) / 1e9
  return rates


@functools.cache
def _print_processor() -> None:
  print(f"# {processor()}", flush=True)


def row(key: str, value: Spread | float, goal: str, *, detail: str = "") -> bool:
  """Prints `key value (p10–p90) goal met|missed detail`; says whether the goal is met.

  `goal` is ">= x", "<= x" or "" for a figure without one. A value of nan (the sides did not agree,
  so their times say nothing) misses every goal. A row of speed (`cpu.…`) ends with
  the bare matmuls.
  """
  spread = value if isinstance(value, Spread) else Spread(value, value, value)
  met, verdict = True, ""
  if goal:
    kind, bound = goal.split()
    met = spread.median >= float(bound) if kind == ">=" else spread.median <= float(bound)
    verdict = "met" if met else "missed"
  ends = f"{spread.low:.2f}–{spread.high:.2f}" if isinstance(value, Spread) else ""
  if key.startswith("cpu."):
    _print_processor()
    rates = ", ".join(f"{name} {rate:.0f}" for name, rate in matmul_rates().items())
    detail = f"{detail}{'; ' if detail else ''}matmul GFLOP/s: {rates}"
  print(f"{key:24} {spread.median:8.3f}  {ends:11}  {goal:8} {verdict:7} {detail}", flush=True)
  return met
