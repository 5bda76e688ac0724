"""Accuracies and means with their uncertainty.

Questions on one video are not independent: means and differences are resampled by video (cluster
bootstrap, percentile, fixed seed); a proportion also has its Wilson interval. All intervals are
95 % unless a `confidence` is given.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, comb, sqrt
from statistics import NormalDist, fmean

import numpy as np

from data_pipes.errors import InputError
from vr_jax.evaluation.metrics import Interval

DRAWS = 10_000
_CELLS = 10_000_000  # of a table of draws held at once, 80 MB: 1 000 clusters in one part


@dataclass(frozen=True)
class Answered:
  """One graded multiple-choice question.

  `options` is their number (chance is 1/options); `unparsed` answers are wrong ones too.
  """

  type: str
  video: Hashable
  correct: bool
  options: int
  unparsed: bool = False


@dataclass(frozen=True)
class Accuracy:
  """The accuracy of one slice. Shares are from 0 to 1.

  Attributes:
    wilson: interval of a proportion of independent answers.
    by_video: cluster bootstrap interval; wider where answers on one video go together, but of no
      width where all answers are right or all wrong.
    chance: mean of 1/options.
  """

  name: str
  n: int
  correct: int
  unparsed: int
  value: float
  wilson: Interval
  by_video: Interval
  chance: float

  @property
  def above_chance(self) -> bool:
    """Both intervals lie above chance."""
    return min(self.wilson.low, self.by_video.low) > self.chance


@dataclass(frozen=True)
class Summary:
  """Accuracy per type (in order of first appearance), over all answers, and the mean of types."""

  types: tuple[Accuracy, ...]
  micro: Accuracy
  macro: float


@dataclass(frozen=True)
class Difference:
  """Mean of `a` minus mean of `b` over the same items, resampled by cluster."""

  value: float
  interval: Interval


def summarize(answers: Sequence[Answered]) -> Summary:
  """Accuracies of a run; InputError where it has no answers."""
  if not answers:
    raise InputError("no answers to score; at least one is needed")
  names = list(dict.fromkeys(answer.type for answer in answers))
  types = tuple(accuracy(name, [a for a in answers if a.type == name]) for name in names)
  return Summary(types, accuracy("All", answers), fmean(t.value for t in types))


def accuracy(name: str, answers: Sequence[Answered]) -> Accuracy:
  """Counts one slice and puts intervals on it."""
  right = [answer.correct for answer in answers]
  n, correct = len(right), sum(right)
  return Accuracy(
    name=name,
    n=n,
    correct=correct,
    unparsed=sum(answer.unparsed for answer in answers),
    value=correct / n,
    wilson=wilson(correct, n),
    by_video=cluster_bootstrap(right, [answer.video for answer in answers]),
    chance=fmean(1 / answer.options for answer in answers),
  )


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
  """Wilson's score interval of a proportion; n = 0 gives [0, 1]."""
  if n == 0:
    return Interval(0.0, 1.0)
  z = NormalDist().inv_cdf((1 + confidence) / 2)
  share, spread = successes / n, z * z / n
  centre = (share + spread / 2) / (1 + spread)
  half = sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
  return Interval(max(0.0, centre - half), min(1.0, centre + half))


def cluster_bootstrap(
  values: Sequence[float],
  clusters: Sequence[Hashable],
  draws: int = DRAWS,
  seed: int = 0,
  confidence: float = 0.95,
) -> Interval:
  """Percentile interval of the mean when whole clusters are drawn with replacement."""
  sums, counts = _by_cluster(values, clusters)
  means = np.concatenate(
    [(times @ sums) / (times @ counts) for times in resampled(len(sums), draws, seed)]
  )
  tail = (1 - confidence) / 2
  low, high = np.quantile(means, [tail, 1 - tail])
  return Interval(float(low), float(high))


def resampled(clusters: int, draws: int, seed: int = 0) -> Iterator[np.ndarray]:
  """How often each cluster is drawn, int64 [some, clusters], `draws` rows in all.

  That is all a draw is. A table of all rows would take 1.6 GB for 20 000 clusters, and as much
  again as floats; the parts hold the same numbers.
  """
  rng = np.random.default_rng(seed)
  shares, rows = np.full(clusters, 1 / clusters), max(1, _CELLS // clusters)
  for first in range(0, draws, rows):
    yield rng.multinomial(clusters, shares, size=min(rows, draws - first))


def clustered_standard_error(values: Sequence[float], clusters: Sequence[Hashable]) -> float:
  """CR0 standard error of the mean: residuals are added up within a cluster before squaring."""
  sums, counts = _by_cluster(values, clusters)
  residuals = sums - counts * sums.sum() / counts.sum()
  return float(np.sqrt((residuals**2).sum()) / counts.sum())


def paired_difference(
  a: Sequence[float],
  b: Sequence[float],
  clusters: Sequence[Hashable],
  draws: int = DRAWS,
  seed: int = 0,
  confidence: float = 0.95,
) -> Difference:
  """Mean(a) - mean(b) for two runs on the same items in the same order."""
  gaps = np.subtract(np.asarray(a, float), np.asarray(b, float))
  interval = cluster_bootstrap(gaps, clusters, draws, seed, confidence)
  return Difference(float(gaps.mean()), interval)


def bootstrap_mean_of_means(
  columns: Sequence[tuple[Sequence[float], Sequence[Hashable]]],
  draws: int = DRAWS,
  seed: int = 0,
  confidence: float = 0.95,
) -> Interval:
  """Percentile interval of the unweighted mean of several means, the clusters drawn once for all.

  `columns` are (values, clusters); a column may lack clusters that another has.
  """
  names = dict.fromkeys(cluster for _, clusters in columns for cluster in clusters)
  numbers = {cluster: i for i, cluster in enumerate(names)}
  indices = [[numbers[c] for c in clusters] for _, clusters in columns]
  sums = np.stack(
    [
      np.bincount(index, np.asarray(values, float), len(numbers))
      for index, (values, _) in zip(indices, columns, strict=True)
    ]
  )
  counts = np.stack([np.bincount(index, minlength=len(numbers)) for index in indices])
  parts = []
  for times in resampled(len(numbers), draws, seed):
    means = np.zeros(len(times))
    for column, count in zip(sums, counts, strict=True):
      drawn = times @ count
      # A draw without any item of a column says nothing about it: left out of that quantile.
      means += np.divide(times @ column, drawn, out=np.full(len(times), np.nan), where=drawn > 0)
    parts.append(means)
  means = np.concatenate(parts)
  tail = (1 - confidence) / 2
  low, high = np.nanquantile(means / len(columns), [tail, 1 - tail])
  return Interval(float(low), float(high))


def needed_items(
  a: Sequence[float], b: Sequence[float], clusters: Sequence[Hashable], confidence: float = 0.95
) -> int | None:
  """How many such items it takes until the interval of this paired difference excludes 0.

  The clustered standard error is taken to fall with the root of the number of items. None where
  the runs do not differ.
  """
  gaps = np.subtract(np.asarray(a, float), np.asarray(b, float))
  if not gaps.mean():
    return None
  z = NormalDist().inv_cdf((1 + confidence) / 2)
  error = clustered_standard_error(gaps, clusters)
  return max(1, ceil(len(gaps) * (z * error / gaps.mean()) ** 2))


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> float:
  """Exact two-sided p value that two runs on the same items are equally often right."""
  only_a = sum(bool(x) and not y for x, y in zip(a, b, strict=True))
  only_b = sum(bool(y) and not x for x, y in zip(a, b, strict=True))
  n = only_a + only_b
  tail = sum(comb(n, k) for k in range(min(only_a, only_b) + 1))
  return min(1.0, 2 * tail / 2**n)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
  """Holm's adjusted p values for several comparisons, in the order given."""
  adjusted, largest = {}, 0.0
  for rank, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
    largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
    adjusted[name] = largest
  return {name: adjusted[name] for name in p_values}


def _by_cluster(
  values: Sequence[float], clusters: Sequence[Hashable]
) -> tuple[np.ndarray, np.ndarray]:
  """Sum and number of the values of each cluster, float64 [clusters]."""
  numbers = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
  index = [numbers[cluster] for cluster in clusters]
  sums = np.bincount(index, weights=np.asarray(values, float), minlength=len(numbers))
  return sums, np.bincount(index, minlength=len(numbers)).astype(float)
