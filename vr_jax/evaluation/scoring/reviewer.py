"""Table 8 of the paper: a reviewer's decisions against people's, with intervals.

A sample with as many kept as dropped items makes recall and specificity look as they would if the
reviewer kept half of everything; its true accept rate, as weight, gives the population's values.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from data_pipes.errors import InputError
from vr_jax.evaluation.metrics import Interval
from vr_jax.evaluation.scoring.judge import read_records
from vr_jax.evaluation.scoring.statistics import wilson

_CELLS = ((True, True), (True, False), (False, True), (False, False))


@dataclass(frozen=True)
class Confusion:
  """A reviewer's verdicts against a manual check (Table 8 of the paper).

  Every share is (value, interval, n); the intervals are Wilson's. `precision` is the share of
  accepted items that are good, `npv` of rejected ones that are bad; they hold however many of
  either kind were checked. `recall`, `specificity`, `accuracy` and what is computed from them hold
  for the population only where items were checked in the proportion in which they occur: with
  `accept_rate`, the share the reviewer accepts, they are re-weighted to it (and have no interval).
  """

  precision: tuple[float, Interval, int]
  npv: tuple[float, Interval, int]
  recall: tuple[float, Interval | None, int]
  specificity: tuple[float, Interval | None, int]
  accuracy: tuple[float, Interval | None, int]
  f1: float
  mcc: float
  kappa: float
  accept_rate: float | None


def confusion(
  true_positive: int,
  false_positive: int,
  false_negative: int,
  true_negative: int,
  accept_rate: float | None = None,
) -> Confusion:
  """Counts of accepted and good, accepted and bad, rejected and good, rejected and bad items."""
  counts = [true_positive, false_positive, false_negative, true_negative]
  accepted, rejected = sum(counts[:2]), sum(counts[2:])
  if min(counts) < 0 or not accepted or not rejected:
    raise InputError(f"counts {counts}; accepted: at least one accepted and one rejected item")
  if accept_rate is not None and not 0 < accept_rate < 1:
    raise InputError(f"accept rate {accept_rate}; accepted: between 0 and 1")
  up = down = 1.0
  if accept_rate is not None:
    up, down = accept_rate / accepted, (1 - accept_rate) / rejected
  tp, fp, fn, tn = (
    true_positive * up,
    false_positive * up,
    false_negative * down,
    true_negative * down,
  )
  total = tp + fp + fn + tn

  def share(part: float, whole: float, k: int, n: int) -> tuple[float, Interval | None, int]:
    return (part / whole if whole else 0.0), (wilson(k, n) if accept_rate is None else None), n

  good, bad = true_positive + false_negative, false_positive + true_negative
  right = true_positive + true_negative
  accuracy = (tp + tn) / total
  chance = ((tp + fp) * (tp + fn) + (fn + tn) * (fp + tn)) / total**2
  spread = sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
  return Confusion(
    precision=(true_positive / accepted, wilson(true_positive, accepted), accepted),
    npv=(true_negative / rejected, wilson(true_negative, rejected), rejected),
    recall=share(tp, tp + fn, true_positive, good),
    specificity=share(tn, tn + fp, true_negative, bad),
    accuracy=share(tp + tn, total, right, sum(counts)),
    f1=2 * tp / (2 * tp + fp + fn) if tp else 0.0,
    mcc=(tp * tn - fp * fn) / spread if spread else 0.0,
    kappa=(accuracy - chance) / (1 - chance) if chance < 1 else 0.0,
    accept_rate=accept_rate,
  )


def cells(pairs: Sequence[tuple[bool, bool]]) -> tuple[int, int, int, int]:
  """How many (accepted by the reviewer, good to people) pairs there are of each sort.

  Accepted and good, accepted and bad, rejected and good, rejected and bad.
  """
  tp, fp, fn, tn = (sum(pair == cell for pair in pairs) for cell in _CELLS)
  return tp, fp, fn, tn


def score_reviewer(path: Path, accept_rate: float | None) -> Confusion:
  """The table of a file's records with `reviewer` and `manual`, true or false each."""
  pairs: list[tuple[bool, bool]] = []
  for i, record in enumerate(read_records(path)):
    reviewer, manual = record.get("reviewer"), record.get("manual")
    if not isinstance(reviewer, bool) or not isinstance(manual, bool):
      raise InputError(f"{path}: record {i}: accepted: 'reviewer' and 'manual', true or false")
    pairs.append((reviewer, manual))
  return confusion(*cells(pairs), accept_rate=accept_rate)


def reviewer_table(table: Confusion) -> Iterator[str]:
  """One table, at one rate, for people."""
  yield "reviewer against manual check"
  for name in ("precision", "npv", "recall", "specificity", "accuracy"):
    value, interval, n = getattr(table, name)
    between = f"  {interval.low:.3f} to {interval.high:.3f}" if interval else ""
    yield f"  {name:14}{value:.3f}{between}  n={n}"
  yield f"  F1 {table.f1:.3f}, MCC {table.mcc:.3f}, kappa {table.kappa:.3f}"
  if table.accept_rate is None:
    yield "  recall, specificity and accuracy hold for this sampling only; --accept-rate re-weights"
  else:
    yield f"  recall, specificity and accuracy re-weighted to {table.accept_rate:.1%} accepted"


@dataclass(frozen=True)
class Review:
  """tp, fp: kept by the Reviewer, and right or wrong; fn, tn: dropped, and wrongly or rightly so.

  `sampled` are the values of the sample as drawn, `weighted` those at the true accept rate.
  """

  tp: int
  fp: int
  fn: int
  tn: int
  sampled: Confusion
  weighted: Confusion

  def to_dict(self) -> dict[str, Any]:
    return asdict(self)


def review(judged: Sequence[tuple[bool, bool]], accept_rate: float) -> Review:
  """The table of (kept by the Reviewer, good to people) pairs.

  Raises:
    InputError: no verdicts on kept, or none on dropped items.
  """
  tp, fp, fn, tn = counts = cells(judged)
  if not tp + fp or not fn + tn:
    raise InputError(
      f"verdicts: found {tp + fp} on kept and {fn + tn} on dropped items; accepted: some of each"
    )
  return Review(tp, fp, fn, tn, confusion(*counts), confusion(*counts, accept_rate=accept_rate))


def lines(table: Review) -> list[str]:
  """The table as sampled beside the table at the true accept rate, for people."""
  sampled, weighted = table.sampled, table.weighted
  (precision, interval, _), (npv, bad, _) = sampled.precision, sampled.npv
  out = [
    "reviewer \\ people       good      bad",
    f"kept              {table.tp:10d} {table.fp:8d}",
    f"dropped           {table.fn:10d} {table.tn:8d}",
    f"precision {precision:.3f} ({interval.low:.3f} to {interval.high:.3f}, Wilson 95 %)",
    f"good among the dropped {1 - npv:.3f} ({1 - bad.high:.3f} to {1 - bad.low:.3f})",
    f"{'':12}{'as sampled':>12}{f'at accept rate {weighted.accept_rate:.3f}':>24}",
  ]
  for name in ("recall", "specificity", "accuracy"):
    values = getattr(sampled, name)[0], getattr(weighted, name)[0]
    out.append(f"{name:12}{values[0]:12.3f}{values[1]:24.3f}")
  for name in ("f1", "mcc", "kappa"):
    out.append(f"{name:12}{getattr(sampled, name):12.3f}{getattr(weighted, name):24.3f}")
  return out
