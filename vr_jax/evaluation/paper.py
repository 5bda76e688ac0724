"""Rows of published tables, to stand beside ours. They are the papers' numbers, not measured here.

VideoRefer Suite (arXiv 2501.00599), Tables 1 to 4. Bench-Q accuracies per type follow from counts
of right answers that reproduce the printed cells and averages; HC-STVG and general QA in percent.
"""

from collections.abc import Mapping
from dataclasses import dataclass

PAPER = "VideoRefer paper"


@dataclass(frozen=True)
class Row:
  """One system in one benchmark: `values` by the slice names of our metrics.

  `unit` as in `results.Metric`: shares from 0 to 1, points from 0 to 5, caption scores from 0.
  """

  benchmark: str
  system: str
  values: Mapping[str, float]
  source: str = PAPER


_TYPES = {
  "Basic Questions": 236,
  "Sequential Questions": 255,
  "Relationship Questions": 253,
  "Reasoning Questions": 142,
  "Future Predictions": 114,
}


def _choice(system: str, *right: int) -> Row:
  values = {name: r / n for (name, n), r in zip(_TYPES.items(), right, strict=True)}
  return Row("bench-q", system, {**values, "All": sum(right) / sum(_TYPES.values())})


_D = (
  "Subject Correspondence",
  "Appearance Description",
  "Temporal Description",
  "Hallucination Detection",
  "Average",
)


def _points(system: str, *values: float) -> Row:
  return Row("bench-d", system, dict(zip(_D, values, strict=True)))


ROWS = (
  _choice("VideoRefer-7B, single-frame", 178, 175, 150, 127, 89),
  _choice("GPT-4o, single-frame", 147, 190, 167, 125, 84),
  _points("VideoRefer-7B, single-frame", 4.41, 3.27, 3.03, 2.97, 3.42),
  _points("VideoRefer-7B, multi-frame", 4.44, 3.27, 3.10, 3.04, 3.46),
  Row("bench-d", "GPT-4o, single-frame", {"Average": 2.95}),
  Row("bench-d", "GPT-4o, multi-frame", {"Average": 3.25}),
  Row("hc-stvg", "VideoRefer-7B", {"CIDEr": 0.686}),
  Row("hc-stvg", "Artemis", {"CIDEr": 0.532}),
  Row("mvbench", "VideoRefer-7B", {"All": 0.596}),
  Row("perception-test", "VideoRefer-7B", {"All": 0.563}),
  Row("videomme", "VideoRefer-7B, no subtitles", {"All": 0.559}),
  Row("videomme", "VideoRefer-7B, with subtitles", {"All": 0.576}),
)


def rows_of(benchmark: str) -> list[Row]:
  return [row for row in ROWS if row.benchmark == benchmark]
