"""A number of a result, with its interval."""

import dataclasses
from typing import Any

BY_VIDEO = "cluster-bootstrap by video"


@dataclasses.dataclass(frozen=True)
class Interval:
  low: float
  high: float


@dataclasses.dataclass(frozen=True)
class Metric:
  """One number.

  Attributes:
    slice: "All", a type, or "<grouping>: <group>".
    value: None where it cannot be computed; `note` says why.
    unit: "share" (0 to 1), "points" (0 to 5) or "score" (of a caption metric).
    n: the items it is over; `n_failed` those it leaves out.
  """

  name: str
  slice: str
  value: float | None
  unit: str
  n: int
  n_failed: int = 0
  ci_low: float | None = None
  ci_high: float | None = None
  ci_method: str | None = None
  note: str | None = None

  @classmethod
  def with_interval(cls, interval: Interval, method: str, **fields: Any) -> "Metric":
    """The metric of these fields, with an interval that `method` gave."""
    return cls(ci_low=interval.low, ci_high=interval.high, ci_method=method, **fields)
