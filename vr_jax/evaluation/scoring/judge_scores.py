"""VideoRefer-Bench-D: a judge's reply to four scores, and their means.

Two parsers, as for answers: *strict* (ours) finds the four dimensions by name whatever markup is
around them and refuses what is missing or out of range; *published* is upstream's expression, which
silently leaves items out of single dimensions and so can raise an average.
"""

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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


# One number, perhaps of a stated maximum; no range (3-4), power (5e3), share or decimal comma.
_NUMBER = (
  r"([-+]?\d+(?:\.\d*)?)(?:\s*(?:/|out\s+of)\s*(\d+))?"
  r"(?![.,]?\d|\w|%|[ \t]*(?:/|[-–—~+±×^][ \t]*\d|(?:to|or|and|out)\b))"
)
_REFUSAL = re.compile(
  r"\b(?:can(?:no|')t|can not|unable to|not able to|won't|will not|not possible to|decline to|"
  r"refuse to)\s+(?:\w+\s+){0,2}?"
  r"(?:judge|score|rate|evaluate|assess|grade|compare|assist|help|comply|provide|give|complete|"
  r"fulfil+|do\s+(?:that|this|so)|answer|continue)\b",
  re.IGNORECASE,
)
_SCORE_KEYS = ("score", "value", "rating", "points")
_NAME_KEYS = ("name", "dimension", "criterion", "aspect", "metric")


def strict_scores(reply: str | None) -> Scores:
  """Our parser: the four names, in any case and markup, each with one number from 0 to 5.

  "4/5" is read as 4, a full-width digit as the digit; JSON is read by the same names. Lines quoted
  with ">" count for nothing. Failed: a missing reply or dimension, a number out of range or out of
  another maximum, two different numbers for one dimension, a refusal beside the scores, the
  example of the prompt repeated.
  """
  if not reply or not reply.strip():
    return Scores({}, "no reply")
  text = unicodedata.normalize("NFKC", reply).replace("\\n", "\n").replace("’", "'")
  text = re.sub(r"(?m)^[ \t]*>.*$", "", _json_as_lines(text))
  text = re.sub(r"[*_`#>|]+", " ", text)
  values, examples = {}, 0
  for name in DIMENSIONS:
    words = r"\s+".join(name.split())
    score = rf"{words}\s*(?:\([^)\n]*\))?\s*[:=–-]\s*(?:score\s*:?\s*)?{_NUMBER}"
    # At the start of a line (numbered or not) it is the score; elsewhere it may be a quotation.
    lines = list(re.finditer(rf"(?im)^[ \t-]*(?:\d+\s*[.)])?\s*{score}", text))
    lines = lines or list(re.finditer(rf"(?i)\d\s*[.)]\s*{score}", text))
    given = [(match[1], match[2] or "") for match in lines]
    if not given:
      return Scores({}, f"no score for {name}")
    if len(set(given)) > 1:
      return Scores({}, f"{len(set(given))} different scores for {name}")
    value, maximum = float(given[0][0]), given[0][1]
    if not 0 <= value <= HIGHEST or (maximum and int(maximum) != HIGHEST):
      shown = "/".join(filter(None, given[0]))
      return Scores({}, f"{name}: {shown} is not between 0 and {HIGHEST:g}")
    values[name] = value
    examples += any(text[match.end() :].lstrip().startswith("(reason)") for match in lines)
  named = re.compile("|".join(r"\s+".join(name.split()) for name in DIMENSIONS), re.IGNORECASE)
  if any(_REFUSAL.search(line) and not named.search(line) for line in text.splitlines()):
    return Scores({}, "a refusal beside the scores")
  if examples == len(DIMENSIONS):
    return Scores({}, "the prompt's example repeated")
  return Scores(values)


def _json_as_lines(text: str) -> str:
  """The text with the scores of its JSON objects and lists as lines `Name: 5`."""
  decoder, at, out = json.JSONDecoder(), 0, []
  for match in re.finditer(r"[\[{]", text):
    if match.start() < at:
      continue
    try:
      content, end = decoder.raw_decode(text, match.start())
    except (ValueError, RecursionError):
      continue
    lines = [f"{name}: {value}" for name, value in _json_scores(content)]
    if lines:
      out += [text[at : match.start()], "\n", "\n".join(lines), "\n"]
      at = end
  return "".join([*out, text[at:]])


def _json_scores(content: Any) -> Iterator[tuple[str, Any]]:
  """(dimension, score) of JSON: {name: score}, {name: {"score": …}}, [{"name": …, …}]."""
  if isinstance(content, list):
    for part in content:
      yield from _json_scores(part)
  if not isinstance(content, dict):
    return
  plain = {re.sub(r"[\W_\d]+", " ", key).strip().casefold(): v for key, v in content.items()}
  names = {name.casefold(): name for name in DIMENSIONS}
  score = next((plain[key] for key in _SCORE_KEYS if key in plain), None)
  for key, value in plain.items():
    if key in names:
      inner = value if isinstance(value, dict) else {"score": value}
      yield names[key], next((inner[k] for k in _SCORE_KEYS if k in inner), None)
    elif key in _NAME_KEYS and isinstance(value, str) and value.strip().casefold() in names:
      yield names[value.strip().casefold()], score
    else:
      yield from _json_scores(value)


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
