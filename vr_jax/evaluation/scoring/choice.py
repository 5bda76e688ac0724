"""Scores of multiple-choice benchmarks: accuracies per type, micro and macro, with intervals."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_pipes.errors import InputError
from vr_jax.evaluation.answers import Graded, grade, published_truth, strict_letter
from vr_jax.evaluation.benchmarks.registry import Benchmark
from vr_jax.evaluation.items import Prediction
from vr_jax.evaluation.results import BY_VIDEO, Metric, Result
from vr_jax.evaluation.scoring.statistics import (
  Accuracy,
  Answered,
  Summary,
  accuracy,
  summarize,
  wilson,
)


def score(
  of: Benchmark, predictions: Sequence[Prediction], run: Mapping[str, Any], parser: str
) -> Result:
  """Grades every answer.

  Items whose truth is hidden are left out and counted. Items that were not answered (missing media,
  unusable) are not among those of `accuracy`, as with the published scripts, but are wrong ones in
  `accuracy_all`.
  """
  known = [p for p in predictions if p.truth is not None]
  if not known:
    raise InputError(
      f"{of.title}: the answers of this split are hidden, so it cannot be scored here; "
      "submission.json is what the challenge's server takes"
    )
  graded = [(p, grade_one(of, p, parser)) for p in known if p.pred is not None]
  found = {p.id: g for p, g in graded}
  items = [_record(p, found.get(p.id)) for p in known]
  answered = [of_record(item) for item in items if item["error"] is None]
  summary = summarize(answered)
  failed = len(known) - len(answered)
  metrics = [m for part in (*summary.types, summary.micro) for m in _metrics(part)]
  right = summary.micro.correct
  metrics.append(
    Metric.of(
      wilson(right, len(known)),
      "wilson",
      name="accuracy_all",
      slice="All",
      value=right / len(known),
      unit="share",
      n=len(known),
      note="items that were not answered count as wrong" if failed else None,
    )
  )
  metrics.append(
    Metric("macro", "All", summary.macro, "share", len(answered), failed, note="mean of the types")
  )
  metrics.append(
    Metric.of(
      wilson(summary.micro.unparsed, len(answered)),
      "wilson",
      name="unparsed",
      slice="All",
      value=summary.micro.unparsed / len(answered),
      unit="share",
      n=len(answered),
    )
  )
  for grouping, groups in _groupings(items).items():
    for group, members in groups.items():
      metrics += list(_metrics(accuracy(f"{grouping}: {group}", [of_record(i) for i in members])))
  counts = {
    "total": len(predictions),
    "hidden": len(predictions) - len(known),
    "answered": len(answered),
    "missing_media": sum(p.missing for p in known),
    "unusable": sum(bool(p.error) and not p.missing for p in known),
    "empty": sum(g.problem == "empty" for _, g in graded),
    "unparsed": summary.micro.unparsed,
    "correct": right,
  }
  printed = published_text(summary) if parser == "published" and of.name == "bench-q" else ""
  return Result(of.name, run, parser, metrics, counts, items, printed=printed)


def grade_one(of: Benchmark, prediction: Prediction, parser: str) -> Graded:
  """One answer, read as the benchmark's published script does or strictly."""
  text, truth = prediction.pred or "", prediction.truth or ""
  if parser == "published" and of.published_index and prediction.options:
    letter = chr(ord("A") + of.published_index(text, prediction.options))
    right = published_truth(truth)
    return Graded(letter, right, letter == right)
  return grade(text, truth, prediction.options, parser)


def of_record(item: Mapping[str, Any]) -> Answered:
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
  return summarize([of_record(item) for item in result.items if item["error"] is None])


def _record(p: Prediction, graded: Graded | None) -> dict[str, Any]:
  return {
    "id": p.id,
    "video": p.video,
    "type": p.type,
    "slices": dict(p.slices),
    "prompt": p.question,
    "options": list(p.options),
    "raw": p.pred,
    "parsed": graded and graded.letter,
    "gt": graded.truth if graded else strict_letter(p.truth or "", p.options),
    "score": graded and int(graded.correct),
    "problem": graded and graded.problem,
    "error": p.error,
  }


def _metrics(part: Accuracy) -> Iterator[Metric]:
  fields = {"slice": part.name, "value": part.value, "unit": "share", "n": part.n}
  yield Metric.of(part.wilson, "wilson", name="accuracy", **fields)
  yield Metric.of(part.by_video, BY_VIDEO, name="accuracy", **fields)


def _groupings(items: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list]]:
  """Answered items by grouping and group; groupings with a group an item (ids) are left out."""
  found: dict[str, dict[str, list]] = {}
  for item in items:
    for grouping, group in item["slices"].items():
      if item["error"] is None and grouping != "video_id" and group:
        found.setdefault(grouping, {}).setdefault(group, []).append(item)
  return found


def published_text(summary: Summary) -> str:
  """What videorefer/eval/eval_videorefer_bench_q.py prints."""
  parts = [(f"  {part.name}  ", part) for part in summary.types] + [(" average ", summary.micro)]
  return "".join(
    f"#######{title}#######\nall num:  {part.n}\nright num:  {part.correct}\n"
    f"accuracy:  {part.value}\n"
    for title, part in parts
  )
