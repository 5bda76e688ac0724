"""`vr score`: from predictions to results, and one result against another.

Results of a run folder O go to O/<parser>, with a judge to O/<parser>-<judge>; those of a file of
predictions in the published shape to a folder beside it.
"""

import argparse
import dataclasses
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipes.errors import InputError
from vr_jax.evaluation.answers import PARSERS
from vr_jax.evaluation.benchmarks.registry import Benchmark, benchmark
from vr_jax.evaluation.items import Prediction, check_ids
from vr_jax.evaluation.results import (
  BY_VIDEO,
  Metric,
  Result,
  load,
  read_predictions,
  save,
  to_dict,
  write,
)
from vr_jax.evaluation.scoring import captions, choice, descriptions
from vr_jax.evaluation.scoring.judge import (
  SYSTEM,
  Judge,
  Replay,
  Sampling,
  open_judge,
  read_records,
)
from vr_jax.evaluation.scoring.statistics import (
  Confusion,
  Difference,
  confusion,
  holm,
  mcnemar,
  needed_items,
  paired_difference,
)
from vr_jax.evaluation.settings import CaptionSettings, JudgeSettings


def score(
  name: str,
  source: Path | str,
  parser: str = "strict",
  *,
  out: Path | str | None = None,
  judge: JudgeSettings | None = None,
  captions_by: CaptionSettings | None = None,
  progress: Callable[[str], None] = lambda text: None,
) -> tuple[Result, Path]:
  """Scores a run folder or a file in the published shape; returns the result and its folder.

  Raises:
    InputError: the source cannot be read, or more than `judge.max_failed` of the descriptions have
      no scores (the result is written all the same, and a further call asks only for those).
  """
  if parser not in PARSERS:
    raise InputError(f"--parser {parser!r}; accepted: {', '.join(PARSERS)}")
  of, source = benchmark(name), Path(source)
  run, predictions = read_source(of, source)
  home = source if source.is_dir() else source.with_suffix("")
  if of.kind == "choice":
    result, folder = choice.score(of, predictions, run, parser), home / parser
  elif of.kind == "caption":
    result = captions.score(of, predictions, run, parser, captions_by or CaptionSettings())
    folder = home / parser
  else:
    settings = judge or JudgeSettings()
    asked = _judge(settings, source, home, parser)

    def tell(done: int, total: int) -> None:
      if done % 50 == 0 or done == total:
        progress(f"judged {done} of {total}")

    result = descriptions.score(of, predictions, run, parser, asked, tell)
    folder = home / f"{parser}-{_slug(asked.backend.name)}"
  if dict(run).get("published_file"):
    result = dataclasses.replace(
      result, warnings=[*result.warnings, "scored from a file in the published shape"]
    )
  folder = Path(out) if out else folder
  save(result, folder)
  if of.kind == "judged":
    write(folder / "published_judged.json", descriptions.published_file(result))
  if of.kind == "judged":
    _check_failures(result, (judge or JudgeSettings()).max_failed, folder)
  return result, folder


def read_source(of: Benchmark, source: Path) -> tuple[Mapping[str, Any], list[Prediction]]:
  """The run and its predictions; of a file in the published shape, {"published_file": path}."""
  if source.is_dir():
    run, predictions = read_predictions(source)
    if run["task"]["name"] != of.name:
      raise InputError(f"{source}: is a run of {run['task']['name']}, not of {of.name}")
    return run, predictions
  if not source.is_file():
    raise InputError(f"{source}: no such run folder or file of predictions")
  predictions = list(_published(of, source))
  if not predictions:
    raise InputError(f"{source}: no predictions; at least one is needed")
  check_ids(predictions, str(source))
  return {"published_file": str(source)}, predictions


_PUBLISHED_KEYS = {
  "bench-q": ("video", "Answer", "pred", "type"),
  "bench-d": ("video", "caption", "pred"),
  "hc-stvg": ("video", "Answer", "pred"),
  "mvbench": ("vid", "task_type", "pred", "gt"),
  "videomme": ("questions", "missing"),
}


def _published(of: Benchmark, path: Path) -> Iterator[Prediction]:
  """Predictions in the published shape; they have no ids, so their place in the file is one."""
  if of.name not in _PUBLISHED_KEYS:
    raise InputError(f"{path}: {of.title} files hold no truths; accepted: a folder of vr eval")
  for i, record in enumerate(read_records(path)):
    keys = _PUBLISHED_KEYS[of.name]
    if of.name == "bench-d" and "Answer" in record:  # the later edition's name
      record = {**record, "caption": record["Answer"]}
    missing = [key for key in keys if key not in record]
    if missing:
      raise InputError(
        f"{path}: record {i}: no key {missing[0]!r}; accepted: {of.title} predictions, with "
        f"{', '.join(keys)}"
      )
    if of.name == "videomme":
      yield from _published_videomme(record, f"{path}: record {i}")
    elif of.name == "mvbench":
      said, truth = (f"({chr(ord('A') + int(record[k]))})" for k in ("pred", "gt"))
      yield Prediction(i, str(record["vid"]), said, truth, str(record["task_type"]))
    else:
      truth = record["caption" if of.name == "bench-d" else "Answer"]
      kind = str(record.get("type") or "")
      yield Prediction(record.get("id", i), str(record["video"]), record["pred"], truth, kind)


def _published_videomme(record: Mapping[str, Any], where: str) -> Iterator[Prediction]:
  slices = {k: str(record.get(k, "")) for k in ("duration", "domain", "sub_category")}
  video = str(record.get("video_id") or record.get("youtube_id"))
  for question in record["questions"]:
    yield Prediction(
      id=question["question_id"],
      video=video,
      pred=None if record["missing"] else question.get("response", ""),
      truth=question["answer"],
      type=question["task_type"],
      options=tuple(question.get("choices") or ()),
      slices=slices,
      error="missing media" if record["missing"] else None,
    )


def _judge(settings: JudgeSettings, source: Path, home: Path, parser: str) -> Judge:
  spec = settings.spec
  recorded = source.is_file() and any("gpt" in r for r in read_records(source))
  if not spec and recorded:  # upstream keeps the judge's replies in the file itself
    spec = f"replay:{source}"
  if not spec:
    raise InputError(
      "VideoRefer-Bench-D needs a judge; accepted: --judge URL (an OpenAI-compatible endpoint), "
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


def _check_failures(result: Result, most: float, folder: Path) -> None:
  answered, failed = result.counts["answered"], result.counts["judge_failed"]
  if result.parser == "strict" and failed > most * answered:
    first = next(i["problem"] for i in result.items if i["problem"] and i["parsed"] is None)
    raise InputError(
      f"{failed} of {answered} descriptions have no scores, more than {most:.0%} (--max-failed); "
      f"the first: {first}. What there is stands in {folder}; run again to ask for the rest"
    )


def _slug(name: str) -> str:
  return re.sub(r"[^\w.-]+", "_", name)


# --- One result against another.


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Mean of `a` minus mean of `b` in one slice, over the same items.

  `p` is McNemar's exact value (accuracies only), `p_holm` adjusted for the number of types; None
  where it does not apply. `needed`: about how many items it takes to tell such a gap from none.
  """

  slice: str
  n: int
  a: float
  b: float
  difference: Difference
  p: float | None
  p_holm: float | None
  needed: int | None

  @property
  def certain(self) -> bool:
    """The interval excludes 0 and, of accuracies, the adjusted p value is below 0.05."""
    low, high = self.difference.interval.low, self.difference.interval.high
    p = self.p if self.p_holm is None else self.p_holm
    return (low > 0 or high < 0) and (p is None or p < 0.05)

  @property
  def verdict(self) -> str:
    if self.certain:
      return "differs"
    if self.needed is None:
      return "no difference"
    needs = f"; needs >= {self.needed:,} items for this gap" if self.needed > self.n else ""
    return f"within the noise{needs}"


def compare(a: Result, b: Result, common: bool = False) -> list[Comparison]:
  """Compares two results item by item: per type, "All" last.

  Items that one of the two has no score for are left out of both.

  Raises:
    InputError: the results are of different benchmarks, or of different items unless `common`.
  """
  if a.benchmark != b.benchmark:
    raise InputError(f"a result of {a.benchmark} against one of {b.benchmark}: nothing to compare")
  ours, theirs = ({item["id"]: item for item in r.items} for r in (a, b))
  apart = len(ours.keys() ^ theirs.keys())
  different = [i for i in ours if i in theirs and ours[i]["gt"] != theirs[i]["gt"]]
  if different:
    raise InputError(
      f"item {different[0]!r} has another truth in the other result: they are not of the same data"
    )
  if apart and not common:
    raise InputError(
      f"the results are of different items: {len(ours.keys() - theirs.keys())} only in the first, "
      f"{len(theirs.keys() - ours.keys())} only in the second; accepted: the same items, or "
      "--common to compare those that both have"
    )
  pairs = [
    (item, theirs[i])
    for i, item in ours.items()
    if i in theirs and item["score"] is not None and theirs[i]["score"] is not None
  ]
  if not pairs:
    raise InputError("no item has a score in both results")
  types = list(dict.fromkeys(x["type"] for x, _ in pairs if x["type"]))
  accuracies = benchmark(a.benchmark).kind == "choice"
  found = [_compare(t, [p for p in pairs if p[0]["type"] == t], accuracies) for t in types]
  if accuracies and len(types) > 1:
    adjusted = holm({c.slice: c.p or 0.0 for c in found})
    found = [dataclasses.replace(c, p_holm=adjusted[c.slice]) for c in found]
  return [*found, _compare("All", pairs, accuracies)]


def _compare(
  name: str, pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], accuracies: bool
) -> Comparison:
  x, y = ([float(pair[side]["score"]) for pair in pairs] for side in (0, 1))
  videos = [a["video"] for a, _ in pairs]
  return Comparison(
    slice=name,
    n=len(pairs),
    a=sum(x) / len(x),
    b=sum(y) / len(y),
    difference=paired_difference(x, y, videos),
    p=mcnemar([bool(v) for v in x], [bool(v) for v in y]) if accuracies else None,
    p_holm=None,
    needed=needed_items(x, y, videos),
  )


# --- On the terminal.


def command(args: argparse.Namespace) -> None:
  """`vr score`."""
  if args.benchmark == "reviewer":
    found = score_reviewer(Path(args.predictions), args.accept_rate)
    text = json.dumps(dataclasses.asdict(found), indent=2)
    print(text if args.json else "\n".join(reviewer_table(found)))
    return
  settings = JudgeSettings(
    spec=args.judge,
    model=args.judge_model,
    key_variable=args.judge_key_env,
    allow_alias=args.allow_alias,
    prompt=Path(args.judge_prompt) if args.judge_prompt else None,
    temperature=args.judge_temperature,
    repeats=args.repeats,
    budget=args.budget,
    concurrency=args.concurrency,
    max_failed=args.max_failed,
  )
  result, folder = score(
    args.benchmark,
    args.predictions,
    args.parser,
    out=args.out,
    judge=settings,
    captions_by=CaptionSettings(
      args.tokenizer,
      not args.no_meteor,
      args.length_filter,
      Path(args.spice_home) if args.spice_home else None,
    ),
    progress=lambda text: print(text, file=sys.stderr, flush=True),
  )
  found = compare(result, load(args.against), args.common) if args.against else []
  if args.json:
    content = to_dict(result) | (
      {"against": [dataclasses.asdict(c) for c in found]} if found else {}
    )
    print(json.dumps(content, indent=2, ensure_ascii=False))
    return
  if result.printed:
    print(result.printed)
  print("\n".join(table(result)))
  if found:
    print("\n".join(comparison_table(found, headline(result).unit)))
  print(f"{folder / 'result.json'}")


def score_reviewer(path: Path, accept_rate: float | None) -> Confusion:
  """Table 8: records with `reviewer` and `manual`, true or false each."""
  counts = dict.fromkeys(itertools.product((True, False), repeat=2), 0)
  for i, record in enumerate(read_records(path)):
    pair = record.get("reviewer"), record.get("manual")
    if not all(isinstance(v, bool) for v in pair):
      raise InputError(f"{path}: record {i}: accepted: 'reviewer' and 'manual', true or false")
    counts[pair] += 1
  order = ((True, True), (True, False), (False, True), (False, False))
  return confusion(*(counts[pair] for pair in order), accept_rate=accept_rate)


def reviewer_table(found: Confusion) -> Iterator[str]:
  yield "reviewer against manual check"
  for name in ("precision", "npv", "recall", "specificity", "accuracy"):
    value, interval, n = getattr(found, name)
    shown = f"  {interval.low:.3f} to {interval.high:.3f}" if interval else ""
    yield f"  {name:14}{value:.3f}{shown}  n={n}"
  yield f"  F1 {found.f1:.3f}, MCC {found.mcc:.3f}, kappa {found.kappa:.3f}"
  if found.accept_rate is None:
    yield "  recall, specificity and accuracy hold for this sampling only; --accept-rate re-weights"
  else:
    yield f"  recall, specificity and accuracy re-weighted to {found.accept_rate:.1%} accepted"


def table(result: Result) -> Iterator[str]:
  """The result as lines of text."""
  yield f"{benchmark(result.benchmark).title}: {result.label}"
  counts = {k: v for k, v in result.counts.items() if v or k in ("total", "missing_media")}
  yield "  " + ", ".join(f"{v} {k.replace('_', ' ')}" for k, v in counts.items())
  rows = by_slice(result)
  wide = max(len(name) for name, _ in rows) + 2
  methods = list(dict.fromkeys(m.ci_method for m in result.metrics if m.ci_method))
  heads = "".join(f"{f'95 %, {_METHODS[m]}':>22}" for m in methods)
  yield f"  {'':{wide}}{'value':>9}{heads}{'n':>7}{'left out':>10}"
  for name, metrics in rows:
    first = metrics[0]
    intervals = {m.ci_method: m for m in metrics}
    cells = "".join(f"{interval_text(intervals[m]) if m in intervals else '':>22}" for m in methods)
    note = f"  {first.note}" if first.value is None and first.note else ""
    yield (
      f"  {name:{wide}}{shown(first.value, first.unit):>9}{cells}{first.n:>7}"
      f"{first.n_failed or '':>10}{note}"
    )
  for name, found in (result.extra.get("agreement") or {}).items():
    if found["pairs"]:
      yield (
        f"  judge with itself, {name}: equal in {found['equal']:.0%} of {found['pairs']} pairs, "
        f"{found['mean_difference']:.2f} points apart"
      )
  for key in ("tokenizer", "length_filter", "java"):
    if result.extra.get(key):
      yield f"  {key.replace('_', ' ')}: {result.extra[key]}"
  for warning in result.warnings:
    yield f"  note: {warning}"


_METHODS = {"wilson": "Wilson", BY_VIDEO: "by video"}


def by_slice(result: Result) -> list[tuple[str, list[Metric]]]:
  """The metrics by name as a reader knows it; those that differ only in their interval together."""
  found: dict[str, list[Metric]] = {}
  for m in result.metrics:
    name = m.name.replace("_", " ")
    if m.name in ("accuracy", "mean"):
      name = m.slice
    elif m.slice != "All":
      name = f"{m.slice}, {name}"
    found.setdefault(name, []).append(m)
  return list(found.items())


def interval_text(metric: Metric) -> str:
  return f"{shown(metric.ci_low, metric.unit)} – {shown(metric.ci_high, metric.unit)}"


def shown(value: float | None, unit: str) -> str:
  if value is None:
    return "n/a"
  return (
    f"{100 * value:.1f} %"
    if unit == "share"
    else f"{value:.3f}"
    if unit == "points"
    else f"{100 * value:.2f}"
  )


def comparison_table(found: Sequence[Comparison], unit: str) -> Iterator[str]:
  """Differences as lines of text."""
  yield f"  {'first minus second':32}{'first':>10}{'second':>10}{'difference':>12}  95 % (by video)"
  for c in found:
    low, high = c.difference.interval.low, c.difference.interval.high
    p = "" if c.p is None else f"  p {c.p:.3g}"
    p += "" if c.p_holm is None else f" (Holm {c.p_holm:.3g})"
    yield (
      f"  {c.slice:32}{shown(c.a, unit):>10}{shown(c.b, unit):>10}"
      f"{shown(c.difference.value, unit):>12}  {shown(low, unit)} to {shown(high, unit)}, n={c.n}"
      f"{p}  {c.verdict}"
    )


def headline(result: Result) -> Metric:
  """The one number that stands for a result."""
  kind = benchmark(result.benchmark).kind
  if kind == "choice":
    return result.metric("accuracy")
  return result.metric("mean", "Average") if kind == "judged" else result.metric("CIDEr")
