"""Scores of VideoRefer-Bench-D: a judge's four numbers for each description, and their means."""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from data_pipes.errors import InputError
from vr_jax.evaluation.benchmark import Benchmark, Kind
from vr_jax.evaluation.items import Prediction, counts, item_record
from vr_jax.evaluation.metrics import BY_VIDEO, Metric
from vr_jax.evaluation.results import Result
from vr_jax.evaluation.scoring.judge import (
  SYSTEM,
  Judge,
  Replay,
  Sampling,
  Verdict,
  holds_markers,
  open_judge,
  read_records,
)
from vr_jax.evaluation.scoring.judge_scores import (
  DIMENSIONS,
  HIGHEST,
  BenchD,
  Scores,
  mean_scores,
)
from vr_jax.evaluation.scoring.settings import ScoreSettings
from vr_jax.evaluation.scoring.statistics import (
  bootstrap_mean_of_means,
  cluster_bootstrap,
  clustered_standard_error,
)
from vr_jax.evaluation.settings import JudgeSettings

EMPTY = "empty prediction"


def score(
  benchmark: Benchmark,
  predictions: Sequence[Prediction],
  run: Mapping[str, Any],
  parser: str,
  judge: Judge,
  progress: Callable[[int, int], None] = lambda done, total: None,
) -> Result:
  """Has every description judged.

  A strict score of an empty description is 0 in all four, unjudged: there is nothing to judge, and
  leaving it out would raise the means. Items without a prediction, and replies that cannot be read,
  have no scores; `lower_bound` counts them as 0.
  """
  strict = parser == "strict"
  answered = [p for p in predictions if p.pred is not None]
  judged = [p for p in answered if not strict or (p.pred or "").strip()]
  verdicts = judge.judge([(p.id, p.truth or "", p.pred or "") for p in judged], progress)
  by_id: dict[Any, Verdict] = dict(zip((p.id for p in judged), verdicts, strict=True))
  zero = Verdict((Scores(dict.fromkeys(DIMENSIONS, 0.0)),), (None,))
  merged = {p.id: _mean(by_id.get(p.id, zero)) for p in answered}
  items = [_record(p, by_id.get(p.id), merged.get(p.id)) for p in predictions]
  # The published means know only of items in the prediction file.
  whole = mean_scores([merged.get(p.id, Scores({}, p.error)) for p in predictions])
  means = mean_scores([merged[p.id] for p in answered])
  numbers = counts(predictions) | {
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
  return Result(
    benchmark.name,
    run,
    parser,
    list(_metrics(means, whole, answered, merged)),
    numbers,
    items,
    list(_warnings(facts, numbers["injected_markers"], strict)),
    facts,
    {"agreement": agreement(verdicts)} if judge.repeats > 1 else {},
    "" if strict else benchmark.printed(means),
  )


def _warnings(facts: Mapping[str, Any], markers: int, strict: bool) -> Iterator[str]:
  if not facts["comparable"]:
    yield (
      f"judge {facts['name']} is a rule-based stand-in: its scores are not comparable with any "
      "published ones"
    )
  if markers:
    handled = "taken apart before judging" if strict else "kept, as published"
    yield f"{markers} predictions hold the judge's markers: {handled}"
  if len(facts["models"]) > 1:
    yield f"the judge answered as several models: {', '.join(facts['models'])}"


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
  return item_record(
    p,
    parsed=dict(merged.values) if merged and not merged.error else None,
    gt=p.truth,
    score=fmean(merged.values.values()) if merged and merged.values else None,
    problem=EMPTY if empty else merged.error if merged else None,
    scores=[dict(s.values) or None for s in verdict.scores] if verdict else [],
    replies=list(verdict.replies) if verdict else [],
  )


def _metrics(
  means: BenchD, whole: BenchD, answered: Sequence[Prediction], merged: Mapping[Any, Scores]
) -> Iterator[Metric]:
  columns = []
  for dimension, bound in zip(means.dimensions, whole.dimensions, strict=True):
    valid = [p for p in answered if dimension.name in merged[p.id].values]
    values = [merged[p.id].values[dimension.name] for p in valid]
    videos = [p.video for p in valid]
    columns.append((values, videos))
    fields: dict[str, Any] = {
      "slice": dimension.name,
      "value": dimension.mean,
      "unit": "points",
      "n": dimension.n,
      "n_failed": whole.total - dimension.n,
    }
    if values:
      error = clustered_standard_error(values, videos)
      yield Metric.with_interval(
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
    yield Metric.with_interval(bootstrap_mean_of_means(columns), BY_VIDEO, **fields)
  yield Metric("lower_bound", "Average", whole.lower_bound, "points", whole.total)


def _score(
  benchmark: Benchmark,
  predictions: Sequence[Prediction],
  run: Mapping[str, Any],
  settings: ScoreSettings,
) -> Result:
  judge = judge_of(settings.judge, settings.source, settings.home, settings.parser, benchmark.title)
  progress = progress_of(settings)
  return score(benchmark, predictions, run, settings.parser, judge, progress)


def progress_of(settings: ScoreSettings) -> Callable[[int, int], None]:
  """Tells of every fiftieth reply."""

  def progress(done: int, total: int) -> None:
    if done % 50 == 0 or done == total:
      settings.progress(f"judged {done} of {total}")

  return progress


def judge_of(settings: JudgeSettings, source: Path, home: Path, parser: str, title: str) -> Judge:
  """The judge that the settings name; its log stands in `home`."""
  spec = settings.spec
  recorded = source.is_file() and any("gpt" in r for r in read_records(source))
  if not spec and recorded:  # upstream keeps the judge's replies in the file itself
    spec = f"replay:{source}"
  if not spec:
    raise InputError(
      f"{title} needs a judge; accepted: --judge URL (an OpenAI-compatible endpoint), "
      "--judge replay:FILE, --judge rule (not comparable)"
    )
  options: dict[str, Any] = {}
  if spec.startswith("http"):
    for field in ("timeout", "tries", "first_pause"):
      options[field] = getattr(settings, field)
  backend = open_judge(spec, settings.model, settings.key_variable, settings.allow_alias, **options)
  system = SYSTEM
  if settings.prompt is not None:
    try:
      system = settings.prompt.read_text(encoding="utf-8")
    except OSError as error:
      raise InputError(f"--judge-prompt {settings.prompt}: {error.strerror}") from None
  sampling = None
  if settings.temperature is not None:
    sampling = Sampling(temperature=settings.temperature)
  return Judge(
    backend,
    home / "judge.jsonl",
    system=system,
    sampling=sampling,
    parser=parser,
    repeats=settings.repeats,
    budget=settings.budget,
    concurrency=1 if isinstance(backend, Replay) else settings.concurrency,
  )


JUDGED = Kind(
  name="judged",
  score=_score,
  headline=("mean", "Average"),
  columns="mean",
  unit="Points from 0 to 5",
  axis=("0", "1", "2", "3", "4", "5 points"),
  bars_title="Mean score by dimension",
  bars_text="Points from 0 to 5 by the judge, over the items that it scored.",
  dimensions=DIMENSIONS,
  whole=HIGHEST,
  item_scores=lambda record: [(n, f"{v:g}") for n, v in (record["parsed"] or {}).items()],
  item_mark="Mean {:.2f}".format,
  files=lambda result: {"published_judged.json": published_file(result)},
)
