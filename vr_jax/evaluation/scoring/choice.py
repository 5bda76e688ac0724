"""Scores of multiple-choice benchmarks: accuracies per type, micro and macro, with intervals."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_pipes.errors import InputError
from vr_jax.evaluation.answers import Graded, grade, truth_letter
from vr_jax.evaluation.benchmark import Benchmark, Kind
from vr_jax.evaluation.items import Prediction, counts, item_record
from vr_jax.evaluation.metrics import BY_VIDEO, Metric
from vr_jax.evaluation.results import Result
from vr_jax.evaluation.scoring.statistics import (
  Accuracy,
  Answered,
  Summary,
  accuracy,
  summarize,
  wilson,
)


def score(
  benchmark: Benchmark, predictions: Sequence[Prediction], run: Mapping[str, Any], parser: str
) -> Result:
  """Grades every answer.

  Items whose truth is hidden are left out and counted. Items that were not answered (missing media,
  unusable) are not among those of `accuracy`, as with the published scripts, but are wrong ones in
  `accuracy_all`.
  """
  known = [p for p in predictions if p.truth is not None]
  if not known:
    raise InputError(
      f"{benchmark.title}: the answers of this split are hidden, so it cannot be scored here; "
      "submission.json is what the challenge's server takes"
    )
  graded = {p.id: grade_one(benchmark, p, parser) for p in known if p.pred is not None}
  items = [_record(p, graded.get(p.id)) for p in known]
  answered = [answered_of(item) for item in items if item["error"] is None]
  summary = summarize(answered)
  numbers = {"total": 0, "hidden": len(predictions) - len(known)} | counts(known)
  numbers |= {
    "total": len(predictions),
    "answered": len(answered),
    "empty": sum(g.problem == "empty" for g in graded.values()),
    "unparsed": summary.micro.unparsed,
    "correct": summary.micro.correct,
  }
  metrics = [m for part in (*summary.types, summary.micro) for m in _metrics(part)]
  metrics += _whole(summary, len(known), len(answered))
  for grouping, groups in _groupings(items).items():
    for group, members in groups.items():
      part = accuracy(f"{grouping}: {group}", [answered_of(item) for item in members])
      metrics += _metrics(part)
  printed = benchmark.printed(summary) if parser == "published" else ""
  return Result(benchmark.name, run, parser, metrics, numbers, items, printed=printed)


def _whole(summary: Summary, known: int, answered: int) -> Iterator[Metric]:
  """The metrics of all items: `known` have a truth, `answered` of them an answer."""
  right, unparsed, failed = summary.micro.correct, summary.micro.unparsed, known - answered
  yield Metric.with_interval(
    wilson(right, known),
    "wilson",
    name="accuracy_all",
    slice="All",
    value=right / known,
    unit="share",
    n=known,
    note="items that were not answered count as wrong" if failed else None,
  )
  yield Metric("macro", "All", summary.macro, "share", answered, failed, note="mean of the types")
  yield Metric.with_interval(
    wilson(unparsed, answered),
    "wilson",
    name="unparsed",
    slice="All",
    value=unparsed / answered,
    unit="share",
    n=answered,
  )


def grade_one(benchmark: Benchmark, prediction: Prediction, parser: str) -> Graded:
  """One answer, read as the benchmark's published script does or strictly."""
  text, truth = prediction.pred or "", prediction.truth or ""
  return grade(text, truth, prediction.options, parser, benchmark.parse)


def answered_of(item: Mapping[str, Any]) -> Answered:
  """An item's record as the statistics take it."""
  return Answered(
    item["type"] or "All types",
    item["video"],
    bool(item["score"]),
    max(len(item["options"]), 1),
    item["parsed"] is None,
  )


def summary_of(result: Result) -> Summary:
  """Accuracies of a result's answered items."""
  return summarize([answered_of(item) for item in result.items if item["error"] is None])


def _record(p: Prediction, graded: Graded | None) -> dict[str, Any]:
  return item_record(
    p,
    parsed=graded.letter if graded else None,
    gt=graded.truth if graded else truth_letter(p.truth or "", p.options),
    score=int(graded.correct) if graded else None,
    problem=graded.problem if graded else None,
    slices=dict(p.slices),
    options=list(p.options),
  )


def _metrics(part: Accuracy) -> Iterator[Metric]:
  fields = {"slice": part.name, "value": part.value, "unit": "share", "n": part.n}
  yield Metric.with_interval(part.wilson, "wilson", name="accuracy", **fields)
  yield Metric.with_interval(part.by_video, BY_VIDEO, name="accuracy", **fields)


def _groupings(items: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list]]:
  """Answered items by grouping and group; groupings with a group an item (ids) are left out."""
  groupings: dict[str, dict[str, list]] = {}
  for item in items:
    for grouping, group in item["slices"].items():
      if item["error"] is None and grouping != "video_id" and group:
        groupings.setdefault(grouping, {}).setdefault(group, []).append(item)
  return groupings


CHOICE = Kind(
  name="choice",
  score=lambda benchmark, predictions, run, settings: score(
    benchmark, predictions, run, settings.parser
  ),
  headline=("accuracy", "All"),
  columns="accuracy",
  unit="In percent",
  axis=("0", "20", "40", "60", "80", "100 %"),
  bars_title="Accuracy by type",
  bars_text="Share of questions answered right; an answer from which no option can be read is "
  "wrong.",
  graded=True,
)
