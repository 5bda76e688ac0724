"""Scores of VideoRefer-Bench-D: a judge's four numbers for each description, and their means."""

import itertools
import json
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from vr_jax.evaluation.benchmarks.registry import Benchmark
from vr_jax.evaluation.items import Prediction
from vr_jax.evaluation.results import BY_VIDEO, Metric, Result
from vr_jax.evaluation.scoring.judge import Judge, Verdict, holds_markers
from vr_jax.evaluation.scoring.judge_scores import DIMENSIONS, BenchD, Scores, mean_scores
from vr_jax.evaluation.scoring.statistics import (
  bootstrap_mean_of_means,
  cluster_bootstrap,
  clustered_standard_error,
)

EMPTY = "empty prediction"


def score(
  of: Benchmark,
  predictions: Sequence[Prediction],
  run: Mapping[str, Any],
  parser: str,
  judge: Judge,
  progress=lambda done, total: None,
) -> Result:
  """Has every description judged.

  A strict score of an empty description is 0 in all four, unasked: there is nothing to judge, and
  leaving it out would raise the means. Items without a prediction, and replies that cannot be read,
  have no scores; `lower_bound` counts them as 0.
  """
  strict = parser == "strict"
  answered = [p for p in predictions if p.pred is not None]
  asked = [p for p in answered if not strict or (p.pred or "").strip()]
  verdicts = judge.judge([(p.id, p.truth or "", p.pred or "") for p in asked], progress)
  found: dict[Any, Verdict] = dict(zip((p.id for p in asked), verdicts, strict=True))
  zero = Verdict((Scores(dict.fromkeys(DIMENSIONS, 0.0)),), (None,))
  merged = {p.id: _mean(found.get(p.id, zero)) for p in answered}
  items = [_record(p, found.get(p.id), merged.get(p.id)) for p in predictions]
  # The published means know only of items in the prediction file.
  whole = mean_scores([merged.get(p.id, Scores({}, p.error)) for p in predictions])
  means = mean_scores([merged[p.id] for p in answered])
  metrics = list(_metrics(means, whole, answered, merged))
  counts = {
    "total": len(predictions),
    "answered": len(answered),
    "missing_media": sum(p.missing for p in predictions),
    "unusable": sum(bool(p.error) and not p.missing for p in predictions),
    "empty": sum(not (p.pred or "").strip() for p in answered),
    "judged": sum(not s.error for s in merged.values()),
    "judge_failed": means.failed,
    "failed_replies": sum(s.error is not None for v in verdicts for s in v.scores),
    "no_reply": sum((s.error or "").startswith("judge:") for s in merged.values()),
    "parse_failed": sum(
      bool(s.error) and not (s.error or "").startswith("judge:") for s in merged.values()
    ),
    "injected_markers": sum(holds_markers(p.pred or "") for p in answered),
  }
  facts = judge.facts()
  warnings = []
  if not facts["comparable"]:
    warnings.append(
      f"judge {facts['name']} is a rule-based stand-in: its scores are not comparable with any "
      "published ones"
    )
  if counts["injected_markers"]:
    handled = "taken apart before judging" if strict else "kept, as published"
    warnings.append(f"{counts['injected_markers']} predictions hold the judge's markers: {handled}")
  if len(facts["models"]) > 1:
    warnings.append(f"the judge answered as several models: {', '.join(facts['models'])}")
  extra = {"agreement": agreement(verdicts)} if judge.repeats > 1 else {}
  printed = "" if strict else published_text(means)
  return Result(of.name, run, parser, metrics, counts, items, warnings, facts, extra, printed)


def agreement(verdicts: Sequence[Verdict]) -> dict[str, dict[str, float | int | None]]:
  """How far a judge agrees with itself, by dimension, over all pairs of repeats of an item."""
  out: dict[str, dict[str, float | int | None]] = {}
  for name in DIMENSIONS:
    gaps = [
      abs(a.values[name] - b.values[name])
      for verdict in verdicts
      for a, b in itertools.combinations(verdict.scores, 2)
      if name in a.values and name in b.values
    ]
    out[name] = {
      "pairs": len(gaps),
      "equal": fmean(gap == 0 for gap in gaps) if gaps else None,
      "mean_difference": fmean(gaps) if gaps else None,
    }
  return out


def published_text(means: BenchD) -> str:
  """What 2.extract_re.py and 3.analyze_score.py of videorefer/eval/videorefer_bench_d print."""
  text = f"####error num:  {means.failed}\n" if means.failed else ""
  text += "".join(f"{d.name} :  {d.mean}\n{d.n}\n" for d in means.dimensions if d.mean is not None)
  return text + (f"all....\n{means.average}\n" if means.average is not None else "")


def published_file(result: Result) -> str:
  """What 1.eval_gpt.py leaves for 2.extract_re.py: the predictions with the judge's first reply."""
  records = [
    {"video": i["video"], "caption": i["gt"], "pred": i["raw"], "gpt": i["replies"][0]}
    for i in result.items
    if i["replies"] and i["replies"][0] is not None
  ]
  return json.dumps(records, ensure_ascii=False, indent=1)


def _mean(verdict: Verdict) -> Scores:
  """The mean of the repeats that could be read; the first error where none could."""
  read = [s for s in verdict.scores if s.error is None]
  if not read:
    return verdict.scores[0]
  if len(read) == 1:
    return read[0]
  names = dict.fromkeys(name for s in read for name in s.values)
  return Scores({n: fmean(s.values[n] for s in read if n in s.values) for n in names})


def _record(p: Prediction, verdict: Verdict | None, merged: Scores | None) -> dict[str, Any]:
  empty = merged is not None and verdict is None
  return {
    "id": p.id,
    "video": p.video,
    "type": p.type,
    "prompt": p.question,
    "raw": p.pred,
    "parsed": dict(merged.values) if merged and not merged.error else None,
    "gt": p.truth,
    "score": fmean(merged.values.values()) if merged and merged.values else None,
    "scores": [dict(s.values) or None for s in verdict.scores] if verdict else [],
    "replies": list(verdict.replies) if verdict else [],
    "problem": EMPTY if empty else merged.error if merged else None,
    "error": p.error,
  }


def _metrics(
  means: BenchD, whole: BenchD, answered: Sequence[Prediction], merged: Mapping[Any, Scores]
):
  columns = []
  for dimension, bound in zip(means.dimensions, whole.dimensions, strict=True):
    valid = [p for p in answered if dimension.name in merged[p.id].values]
    values = [merged[p.id].values[dimension.name] for p in valid]
    videos = [p.video for p in valid]
    columns.append((values, videos))
    fields = {
      "slice": dimension.name,
      "value": dimension.mean,
      "unit": "points",
      "n": dimension.n,
      "n_failed": whole.total - dimension.n,
    }
    if values:
      error = clustered_standard_error(values, videos)
      yield Metric.of(
        cluster_bootstrap(values, videos),
        BY_VIDEO,
        name="mean",
        note=f"clustered standard error {error:.4f}",
        **fields,
      )
    else:
      yield Metric(name="mean", note="no item has a score", **fields)
    yield Metric("lower_bound", dimension.name, bound.lower_bound, "points", whole.total)
  fields = {
    "name": "mean",
    "slice": "Average",
    "value": means.average,
    "unit": "points",
    "n": min(d.n for d in means.dimensions),
    "n_failed": whole.total - min(d.n for d in means.dimensions),
  }
  if means.average is None:
    yield Metric(note="a dimension has no scores", **fields)
  else:
    yield Metric.of(bootstrap_mean_of_means(columns), BY_VIDEO, **fields)
  yield Metric("lower_bound", "Average", whole.lower_bound, "points", whole.total)
