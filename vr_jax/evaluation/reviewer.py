"""Table 8: the Reviewer's decisions against people's, with intervals and re-weighted.

A sample with as many kept as dropped items makes recall and specificity look as they would if the
Reviewer kept half of everything; its true accept rate, as weight, gives the population's values.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

from data_pipes.errors import InputError
from vr_jax.evaluation.statistics import Interval, wilson


@dataclass(frozen=True)
class Confusion:
  """Rows: what the Reviewer said; columns: what people said.

  Attributes:
    tp, fp: kept, and right or wrong. fn, tn: dropped, and wrongly or rightly so.
    accept_rate: share of all candidates that the Reviewer keeps.
    precision, npv: of the kept (dropped), the share that people agree with; free of the sampling.
    sampled: recall, specificity, accuracy, f1, mcc, kappa of the sample as drawn.
    weighted: the same at the true accept rate.
  """

  tp: int
  fp: int
  fn: int
  tn: int
  accept_rate: float
  precision: float
  precision_interval: Interval
  npv: float
  npv_interval: Interval
  dropped_good_interval: Interval
  sampled: dict[str, float]
  weighted: dict[str, float]

  def to_dict(self) -> dict[str, Any]:
    return asdict(self)


def confusion(judged: Sequence[tuple[bool, bool]], accept_rate: float) -> Confusion:
  """The table of (kept by the Reviewer, good to people) pairs.

  Raises:
    InputError: no verdicts on kept, or none on dropped items.
  """
  cells = [sum(pair == cell for pair in judged) for cell in _CELLS]
  tp, fp, fn, tn = cells
  if not tp + fp or not fn + tn:
    raise InputError(
      f"verdicts: found {tp + fp} on kept and {fn + tn} on dropped items; accepted: some of each"
    )
  if not 0 < accept_rate < 1:
    raise InputError(f"accept rate {accept_rate:g}; accepted: between 0 and 1")
  kept, dropped = accept_rate / (tp + fp), (1 - accept_rate) / (fn + tn)
  return Confusion(
    tp, fp, fn, tn,
    accept_rate=accept_rate,
    precision=tp / (tp + fp),
    precision_interval=wilson(tp, tp + fp),
    npv=tn / (fn + tn),
    npv_interval=wilson(tn, fn + tn),
    dropped_good_interval=wilson(fn, fn + tn),
    sampled=_scores(tp, fp, fn, tn),
    weighted=_scores(tp * kept, fp * kept, fn * dropped, tn * dropped),
  )  # fmt: skip


_CELLS = ((True, True), (True, False), (False, True), (False, False))


def _scores(tp: float, fp: float, fn: float, tn: float) -> dict[str, float]:
  total = tp + fp + fn + tn
  accuracy = (tp + tn) / total
  chance = ((tp + fp) * (tp + fn) + (fn + tn) * (fp + tn)) / total**2
  spread = sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
  return {
    "recall": _share(tp, tp + fn),
    "specificity": _share(tn, tn + fp),
    "accuracy": accuracy,
    "f1": _share(2 * tp, 2 * tp + fp + fn),
    "mcc": _share(tp * tn - fp * fn, spread),
    "kappa": _share(accuracy - chance, 1 - chance),
  }


def _share(part: float, whole: float) -> float:
  return part / whole if whole else 0.0


def lines(table: Confusion) -> list[str]:
  """The table for people."""
  low, high = table.precision_interval.low, table.precision_interval.high
  good = table.dropped_good_interval
  out = [
    "reviewer \\ people       good      bad",
    f"kept              {table.tp:10d} {table.fp:8d}",
    f"dropped           {table.fn:10d} {table.tn:8d}",
    f"precision {table.precision:.3f} ({low:.3f} to {high:.3f}, Wilson 95 %)",
    f"good among the dropped {1 - table.npv:.3f} ({good.low:.3f} to {good.high:.3f})",
    f"{'':12}{'as sampled':>12}{f'at accept rate {table.accept_rate:.3f}':>24}",
  ]
  for name in table.sampled:
    out.append(f"{name:12}{table.sampled[name]:12.3f}{table.weighted[name]:24.3f}")
  return out
