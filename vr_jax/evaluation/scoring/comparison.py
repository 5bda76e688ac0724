"""One result against another, item by item."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipes.errors import InputError
from vr_jax.evaluation.results import Result
from vr_jax.evaluation.scoring.statistics import (
  Difference,
  holm,
  mcnemar,
  needed_items,
  paired_difference,
)


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Mean of `a` minus mean of `b` in one slice, over the same items.

  `p` is McNemar's exact value (accuracies only), `p_holm` adjusted for the number of types; None
  where it does not apply. `needed`: about how many items it takes to tell such a gap from none.
  """

  slice: str
  n: int
  a: float
  b: float
  difference: Difference
  p: float | None
  p_holm: float | None
  needed: int | None

  @property
  def certain(self) -> bool:
    """The interval excludes 0 and, of accuracies, the adjusted p value is below 0.05."""
    low, high = self.difference.interval.low, self.difference.interval.high
    p = self.p if self.p_holm is None else self.p_holm
    return (low > 0 or high < 0) and (p is None or p < 0.05)

  @property
  def verdict(self) -> str:
    if self.certain:
      return "differs"
    if self.needed is None:
      return "no difference"
    needs = f"; needs >= {self.needed:,} items for this gap" if self.needed > self.n else ""
    return f"within the noise{needs}"


def compare(a: Result, b: Result, common: bool = False) -> list[Comparison]:
  """Compares two results item by item: per type, "All" last.

  Items that one of the two has no score for are left out of both.

  Raises:
    InputError: the results are of different benchmarks or ways to choose an option, or of
      different items unless `common`.
  """
  if a.benchmark != b.benchmark:
    raise InputError(f"a result of {a.benchmark} against one of {b.benchmark}: nothing to compare")
  if a.by != b.by:
    raise InputError(
      f"options chosen by {a.by} against options chosen by {b.by}; accepted: results of one way"
    )
  ours, theirs = ({item["id"]: item for item in r.items} for r in (a, b))
  apart = len(ours.keys() ^ theirs.keys())
  different = [i for i in ours if i in theirs and ours[i]["gt"] != theirs[i]["gt"]]
  if different:
    raise InputError(
      f"item {different[0]!r} has another truth in the other result: they are not of the same data"
    )
  if apart and not common:
    raise InputError(
      f"the results are of different items: {len(ours.keys() - theirs.keys())} only in the first, "
      f"{len(theirs.keys() - ours.keys())} only in the second; accepted: the same items, or "
      "--common to compare those that both have"
    )
  pairs = [
    (item, theirs[i])
    for i, item in ours.items()
    if i in theirs and item["score"] is not None and theirs[i]["score"] is not None
  ]
  if not pairs:
    raise InputError("no item has a score in both results")
  types = list(dict.fromkeys(x["type"] for x, _ in pairs if x["type"]))
  accuracies = any(metric.name == "accuracy" for metric in a.metrics)
  parts = [_compare(t, [p for p in pairs if p[0]["type"] == t], accuracies) for t in types]
  if accuracies and len(types) > 1:
    adjusted = holm({c.slice: c.p or 0.0 for c in parts})
    parts = [dataclasses.replace(c, p_holm=adjusted[c.slice]) for c in parts]
  return [*parts, _compare("All", pairs, accuracies)]


def _compare(
  name: str, pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], accuracies: bool
) -> Comparison:
  x, y = ([float(pair[side]["score"]) for pair in pairs] for side in (0, 1))
  videos = [a["video"] for a, _ in pairs]
  return Comparison(
    slice=name,
    n=len(pairs),
    a=sum(x) / len(x),
    b=sum(y) / len(y),
    difference=paired_difference(x, y, videos),
    p=mcnemar([bool(v) for v in x], [bool(v) for v in y]) if accuracies else None,
    p_holm=None,
    needed=needed_items(x, y, videos),
  )
