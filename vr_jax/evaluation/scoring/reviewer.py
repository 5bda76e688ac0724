"""Table 8 of people's verdicts: the Reviewer's decisions against theirs, with intervals.

A sample with as many kept as dropped items makes recall and specificity look as they would if the
Reviewer kept half of everything; its true accept rate, as weight, gives the population's values.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from data_pipes.errors import InputError
from vr_jax.evaluation.scoring.statistics import Confusion, confusion


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
  tp, fp, fn, tn = cells = [sum(pair == cell for pair in judged) for cell in _CELLS]
  if not tp + fp or not fn + tn:
    raise InputError(
      f"verdicts: found {tp + fp} on kept and {fn + tn} on dropped items; accepted: some of each"
    )
  return Review(tp, fp, fn, tn, confusion(*cells), confusion(*cells, accept_rate=accept_rate))


_CELLS = ((True, True), (True, False), (False, True), (False, False))


def lines(found: Review) -> list[str]:
  """The table for people."""
  sampled, weighted = found.sampled, found.weighted
  (precision, interval, _), (npv, bad, _) = sampled.precision, sampled.npv
  out = [
    "reviewer \\ people       good      bad",
    f"kept              {found.tp:10d} {found.fp:8d}",
    f"dropped           {found.fn:10d} {found.tn:8d}",
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
