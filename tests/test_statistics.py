"""Intervals and tests against known values, and against brute force."""

import tracemalloc
from itertools import product
from statistics import fmean

import numpy as np
import pytest

from data_pipes.errors import InputError
from vr_jax.evaluation.scoring import statistics
from vr_jax.evaluation.scoring.statistics import (
  Answered,
  bootstrap_mean_of_means,
  cluster_bootstrap,
  clustered_standard_error,
  holm,
  mcnemar,
  paired_difference,
  summarize,
  wilson,
)


@pytest.mark.parametrize(
  ("successes", "n", "low", "high"),
  [
    (719, 1000, 0.690, 0.746),  # VideoRefer's Bench-Q row
    (89, 114, 0.696, 0.847),
    (713, 1000, 0.684, 0.740),
    (88, 100, 0.802, 0.930),
    (64, 100, 0.542, 0.727),
    (0, 0, 0.0, 1.0),
    (0, 10, 0.0, 0.2775),
    (10, 10, 0.7225, 1.0),
  ],
)
def test_wilson_at_known_counts(successes, n, low, high):
  interval = wilson(successes, n)
  assert (interval.low, interval.high) == pytest.approx((low, high), abs=6e-4)


def test_wilson_covers_the_truth_about_as_often_as_it_says():
  counts = np.random.default_rng(0).binomial(60, 0.3, 4000)
  covered = [interval.low <= 0.3 <= interval.high for interval in (wilson(k, 60) for k in counts)]
  assert fmean(covered) == pytest.approx(0.95, abs=0.02)


def clustered_sample(seed=0, clusters=40, size=5):
  """Answers that go together: each video has its own accuracy."""
  rng = np.random.default_rng(seed)
  shares = rng.beta(1, 1, clusters)
  return rng.random((clusters, size)) < shares[:, None]


def test_cluster_bootstrap_agrees_with_the_clustered_standard_error():
  values = clustered_sample()
  videos = np.repeat(np.arange(40), 5)
  error = clustered_standard_error(values.ravel(), videos)
  means = values.mean(1)  # equal sizes: the error of the mean of 40 independent means (CR0)
  assert error == pytest.approx(means.std() / np.sqrt(40), rel=1e-12)
  interval = cluster_bootstrap(values.ravel(), videos)
  assert (interval.high - interval.low) / 2 / 1.96 == pytest.approx(error, rel=0.05)
  naive = values.std() / np.sqrt(values.size)
  assert error > 1.3 * naive


def test_cluster_bootstrap_is_reproducible_and_order_free():
  values, videos = clustered_sample().ravel(), np.repeat(np.arange(40), 5)
  once = cluster_bootstrap(values, videos)
  assert once == cluster_bootstrap(values, videos)
  assert once != cluster_bootstrap(values, videos, seed=1)
  names = [f"video {i}" for i in videos]
  assert once == cluster_bootstrap(values, names)


def test_cluster_bootstrap_weighs_clusters_by_their_size():
  """Against every possible draw of three clusters of different size."""
  values, clusters = [1, 0, 0, 1, 1, 0], ["a", "b", "b", "b", "c", "c"]
  sums, counts = np.array([1, 1, 1]), np.array([1, 3, 2])
  every = [sums[list(d)].sum() / counts[list(d)].sum() for d in product(range(3), repeat=3)]
  interval = cluster_bootstrap(values, clusters, draws=50_000)
  assert (interval.low, interval.high) == pytest.approx((min(every), max(every)))
  middle = cluster_bootstrap(values, clusters, draws=50_000, confidence=0.5)
  assert (middle.low, middle.high) == pytest.approx(
    tuple(np.quantile(every, [0.25, 0.75])), abs=0.05
  )


@pytest.mark.parametrize(
  ("only_a", "only_b", "p"),
  [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 0.0625), (8, 2, 0.109375), (3, 3, 1.0), (10, 1, 0.01171875)],
)
def test_mcnemar_is_the_binomial_tail(only_a, only_b, p):
  a = [True] * only_a + [False] * only_b + [True, False]
  b = [False] * only_a + [True] * only_b + [True, False]
  assert mcnemar(a, b) == pytest.approx(p)
  assert mcnemar(b, a) == pytest.approx(p)


def test_mcnemar_at_the_size_of_the_benchmark():
  a, b = [True] * 700 + [False] * 300, [True] * 600 + [False] * 350 + [True] * 50
  assert 0 < mcnemar(a, b) < 1e-3


def test_paired_difference_is_narrower_than_the_runs_apart():
  a = clustered_sample().ravel()
  b = a.copy()
  b[:20] = False
  videos = np.repeat(np.arange(40), 5)
  difference = paired_difference(a, b, videos)
  assert difference.value == pytest.approx(a.mean() - b.mean())
  assert difference.interval.low <= difference.value <= difference.interval.high
  apart = cluster_bootstrap(a, videos)
  assert difference.interval.high - difference.interval.low < apart.high - apart.low
  same = paired_difference(a, a, videos)
  assert (same.value, same.interval.low, same.interval.high) == (0, 0, 0)


def test_holm():
  adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
  assert adjusted == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
  assert list(adjusted) == ["a", "b", "c", "d"]
  assert holm({"x": 0.9, "y": 0.8}) == {"x": 1.0, "y": 1.0}


def test_summary_counts_types_micro_and_macro():
  answers = [
    Answered("Basic", "v1", True, 4),
    Answered("Basic", "v1", True, 4),
    Answered("Basic", "v2", False, 4, unparsed=True),
    Answered("Basic", "v3", True, 2),
    Answered("Sequential", "v2", False, 4),
  ]
  summary = summarize(answers)
  basic, sequential = summary.types
  assert (basic.name, basic.n, basic.correct, basic.unparsed) == ("Basic", 4, 3, 1)
  assert basic.chance == pytest.approx((3 / 4 + 1 / 2) / 4)
  assert (sequential.value, summary.micro.value, summary.macro) == (0, 0.6, 0.375)
  assert (summary.micro.n, summary.micro.unparsed) == (5, 1)
  assert not summary.micro.above_chance
  with pytest.raises(InputError, match="no answers"):
    summarize([])


def test_above_chance_needs_both_intervals():
  sure = summarize([Answered("T", i, i % 10 != 0, 4) for i in range(200)]).micro
  assert sure.above_chance
  one_video = summarize([Answered("T", i // 100, i < 100, 4) for i in range(200)]).micro
  assert one_video.wilson.low > one_video.chance
  assert not one_video.above_chance  # half of two videos: nothing is known


def test_the_bootstrap_of_many_clusters_takes_little_memory_and_the_same_numbers(monkeypatch):
  rng = np.random.default_rng(3)
  right, values, clusters = rng.random(900) < 0.6, rng.random(900), list(range(300)) * 3
  columns = [(values, clusters), (values[:100], clusters[:100])]

  def intervals():
    means = cluster_bootstrap(values, clusters), bootstrap_mean_of_means(columns)
    return cluster_bootstrap(right, clusters), np.array([(m.low, m.high) for m in means])

  share, means = intervals()
  monkeypatch.setattr(statistics, "_CELLS", 300 * 7)  # parts that do not divide the draws
  share_of_parts, means_of_parts = intervals()
  assert share_of_parts == share
  # A sum of products may be grouped otherwise: the last bit.
  np.testing.assert_allclose(means_of_parts, means, rtol=1e-14)
  tracemalloc.start()
  cluster_bootstrap(rng.random(20_000), range(20_000), draws=300)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 45e6, peak  # 300 rows at once are 48 MB, and as much again as floats
