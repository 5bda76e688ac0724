"""VideoRefer-Bench-D: a judge's reply to four scores, and their means.

Two parsers, as for answers: *strict* (ours) finds the four dimensions by name whatever markup is
around them and refuses what is missing or out of range; *published* is upstream's expression, which
silently leaves items out of single dimensions and so can raise an average.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

DIMENSIONS = (
  "Subject Correspondence",
  "Appearance Description",
  "Temporal Description",
  "Hallucination Detection",
)
HIGHEST = 5.0


@dataclass(frozen=True)
class Scores:
  """One reply: dimension -> score (0 to 5 unless the parser is the published one).

  `error` says why the reply counts as failed; a failed reply has no scores. Published scores may
  lack dimensions or hold other names without being failed.
  """

  values: Mapping[str, float]
  error: str | None = None


@dataclass(frozen=True)
class DimensionMean:
  """Mean over the `n` of `total` items that have the dimension (None: no item has it).

  `lower_bound` counts the others as 0, so nothing gains from a reply that was not understood.
  """

  name: str
  mean: float | None
  n: int
  total: int
  lower_bound: float


@dataclass(frozen=True)
class BenchD:
  """The benchmark's result: four means and the mean of the means (None if one has no items)."""

  dimensions: tuple[DimensionMean, ...]
  average: float | None
  lower_bound: float
  failed: int
  total: int


def published_scores(reply: str | None) -> Scores:
  """Upstream's parser: `1. Name: 5`, the name exact, any number; a later duplicate wins.

  A number such as "5.0.1" or "..." drops the whole item, as does a missing reply (None). An empty
  reply is kept with no scores. Source: videorefer/eval/videorefer_bench_d/2.extract_re.py.
  """
  if reply is None:
    return Scores({}, "no reply")
  pairs = re.findall(r"\d+\.\s+(.*?):\s+([\d.]+)", reply)
  try:
    return Scores({name: float(score) for name, score in pairs})
  except ValueError as error:
    return Scores({}, str(error))


_NUMBER = r"([-+]?\d+(?:\.\d*)?)(?:\s*/\s*(\d+))?(?!\.?\d|[ \t]*/)"


def strict_scores(reply: str | None) -> Scores:
  """Our parser: the four names, in any case and markup, each with one number from 0 to 5.

  "4/5" is read as 4, a full-width digit as the digit. Failed: a missing reply or dimension, a
  number out of range or out of another maximum, two different numbers for one dimension.
  """
  if not reply or not reply.strip():
    return Scores({}, "no reply")
  text = re.sub(r"[*_`#>|]+", " ", unicodedata.normalize("NFKC", reply).replace("\\n", "\n"))
  values = {}
  for name in DIMENSIONS:
    words = r"\s+".join(name.split())
    score = rf"{words}\s*(?:\([^)\n]*\))?\s*[:=–-]\s*(?:score\s*:?\s*)?{_NUMBER}"
    # At the start of a line (numbered or not) it is the score; elsewhere it may be a quotation.
    given = re.findall(rf"(?im)^[ \t-]*(?:\d+\s*[.)])?\s*{score}", text)
    given = given or re.findall(rf"(?i)\d\s*[.)]\s*{score}", text)
    if not given:
      return Scores({}, f"no score for {name}")
    if len(set(given)) > 1:
      return Scores({}, f"{len(set(given))} different scores for {name}")
    value, maximum = float(given[0][0]), given[0][1]
    if not 0 <= value <= HIGHEST or (maximum and int(maximum) != HIGHEST):
      shown = "/".join(filter(None, given[0]))
      return Scores({}, f"{name}: {shown} is not between 0 and {HIGHEST:g}")
    values[name] = value
  return Scores(values)


def mean_scores(items: Sequence[Scores]) -> BenchD:
  """Means per dimension over whatever items have it, and the unweighted mean of the four.

  With published scores the numbers equal videorefer/eval/videorefer_bench_d/3.analyze_score.py.
  """
  dimensions = []
  for name in DIMENSIONS:
    values = [item.values[name] for item in items if name in item.values]
    # Added one by one: sum() compensates its rounding from Python 3.12 on, upstream's loop did not.
    total = 0.0
    for value in values:
      total += value
    mean = total / len(values) if values else None
    lower = total / len(items) if items else 0.0
    dimensions.append(DimensionMean(name, mean, len(values), len(items), lower))
  average: float | None = 0.0
  for dimension in dimensions:
    average = None if average is None or dimension.mean is None else average + dimension.mean
  return BenchD(
    tuple(dimensions),
    None if average is None else average / len(DIMENSIONS),
    sum(d.lower_bound for d in dimensions) / len(DIMENSIONS),
    sum(item.error is not None for item in items),
    len(items),
  )
