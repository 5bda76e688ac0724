"""`vr report`: results as one self-contained page and a Markdown table.

O/report.html   headline beside the paper's rows, bars with intervals, gallery, differences
O/report.md     the tables of the page
O/report.tex    or they in LaTeX; or O/tables/*.csv, one each (`--format`)
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipes.errors import InputError
from data_pipes.page import Bar
from vr_jax.evaluation.benchmark import Benchmark, Dataset, Kind
from vr_jax.evaluation.benchmarks import registry
from vr_jax.evaluation.metrics import BY_VIDEO, Metric
from vr_jax.evaluation.pages.formats import (
  FORMATS,
  Table,
  csv_text,
  file_name,
  latex,
  tables,
)
from vr_jax.evaluation.pages.gallery import choice_examples, text_examples
from vr_jax.evaluation.pages.page import (
  Example,
  TextExample,
  example_cells,
  render,
  text_cells,
)
from vr_jax.evaluation.pages.terminal import by_slice, headline, interval_text, shown
from vr_jax.evaluation.results import Result, load, write
from vr_jax.evaluation.scoring.comparison import Comparison, compare
from vr_jax.evaluation.settings import ReportOptions

MOST_COLUMNS = 9  # of the headline; more types are in the bars and tables below
MODES = {"single": "Single-frame", "multi": "Multi-frame"}

# Columns of the tables below the headline: title, key of the row.
DETAILS = (
  ("Value", "value"),
  ("95 %, Wilson", "wilson"),
  ("95 %, by video", "by_video"),
  ("n", "n"),
  ("Left out", "left_out"),
)
DIFFERENCES = (
  ("First", "a"),
  ("Second", "b"),
  ("Difference", "difference"),
  ("95 %, by video", "interval"),
  ("McNemar p", "p"),
  ("Holm", "holm"),
  ("n", "n"),
  ("So", "verdict"),
)


@dataclasses.dataclass(frozen=True)
class Cell:
  text: str
  note: str = ""
  best: bool = False


@dataclasses.dataclass(frozen=True)
class Line:
  """A row of the headline table; `paper` is its source, "" for our own."""

  name: str
  cells: list[Cell]
  paper: str = ""


def write_reports(
  folders: Sequence[Path | str],
  out: Path | str,
  options: ReportOptions | None = None,
) -> list[Path]:
  """Writes the page and its tables, or the tables in another format; returns the paths.

  Args:
    folders: result folders, or run folders with results in them, all of one benchmark; the gallery
      is of the first.
  """
  options = options or ReportOptions()
  if options.format not in FORMATS:
    raise InputError(f"--format {options.format!r}; accepted: {', '.join(FORMATS)}")
  results = [load(f) for f in _result_folders(folders)]
  names = {r.benchmark for r in results}
  if len(names) > 1:
    raise InputError(f"results of {', '.join(sorted(names))}; accepted: of one benchmark a report")
  benchmark, first = registry.benchmark(results[0].benchmark), results[0]
  labels = _labels(results)
  dataset, problem = _dataset(benchmark, first, options.data, options.media)
  questions, texts = _gallery(benchmark.kind, first, dataset, options.examples)
  columns, lines = headline_table(benchmark, results, labels)
  note = paper_note(benchmark, results, lines)
  content = {
    "title": benchmark.title,
    "results": list(zip(labels, results, strict=True)),
    "benchmark": benchmark,
    "kind": benchmark.kind,
    "columns": columns,
    "lines": lines,
    "paper_note": note,
    "bars": bar_rows(benchmark, results, labels),
    "groups": [_details(label, r) for label, r in zip(labels, results, strict=True)],
    "examples": [example_cells(e) for e in questions],
    "texts": [text_cells(t) for t in texts],
    "right": sum(e.correct for e in questions),
    "pictures_problem": problem,
    "histograms": histograms(benchmark.kind.dimensions, results, labels),
    "differences": list(_differences(results, labels, options.common)),
    "provenance": [(label, provenance(r)) for label, r in zip(labels, results, strict=True)],
    "warnings": list(dict.fromkeys(w for r in results for w in r.warnings)),
  }
  out = Path(out)
  if options.format != "html":
    return _write_tables(out, list(tables(content)), options.format, note)
  render(out / "report.html", "results.html.j2", **content)
  write(out / "report.md", "\n".join(markdown(content)) + "\n")
  return [out / "report.html", out / "report.md"]


def _write_tables(out: Path, parts: Sequence[Table], form: str, note: str) -> list[Path]:
  if form == "latex":
    write(out / "report.tex", latex(parts, note))
    return [out / "report.tex"]
  paths = [out / "tables" / file_name(i, part) for i, part in enumerate(parts, 1)]
  for path, part in zip(paths, parts, strict=True):
    write(path, csv_text(part))
  return paths


def _result_folders(folders: Sequence[Path | str]) -> list[Path]:
  paths: list[Path] = []
  for folder in map(Path, folders):
    below = sorted(p.parent for p in folder.glob("*/result.json"))
    below.sort(key=lambda p: not p.name.startswith("strict"))
    here = [folder] if (folder / "result.json").is_file() else below
    if not here:
      raise InputError(f"{folder}: no results; accepted: a folder that vr score wrote, or its run")
    paths += here
  return paths


def _differences(
  results: Sequence[Result], labels: Sequence[str], common: bool
) -> Iterator[dict[str, Any]]:
  """A table for every two results that were read in the same way."""
  unit = headline(results[0]).unit
  for i, j in itertools.combinations(range(len(results)), 2):
    if _comparable(results[i], results[j]):
      rows = [_difference(c, unit) for c in compare(results[i], results[j], common)]
      title = f"{labels[i]} minus {labels[j]}"
      yield {"title": title, "columns": filled(DIFFERENCES, rows), "rows": rows}


def _comparable(a: Result, b: Result) -> bool:
  """Two runs read in the same way; one run read in two ways says nothing about models."""
  same_judge = (a.judge or {}).get("name") == (b.judge or {}).get("name")
  return a.parser == b.parser and a.by == b.by and same_judge and a.run != b.run


def _labels(results: Sequence[Result]) -> list[str]:
  """The model and what tells its results apart, in few words."""
  labels = [f"{r.model}: {r.label}" if r.model else r.label for r in results]
  seen = Counter(labels)
  return [f"{label} ({i})" if seen[label] > 1 else label for i, label in enumerate(labels, 1)]


# --- Tables and bars.


def headline_table(
  benchmark: Benchmark, results: Sequence[Result], labels: Sequence[str]
) -> tuple[list[str], list[Line]]:
  """Columns, and our rows above the paper's. Caption values are times 100, as printed.

  The paper's rows are there where a result is of the published file's items. The best value of a
  column is marked where there are several.
  """
  ours = [main_metrics(benchmark.kind, r) for r in results]
  columns = list(dict.fromkeys(name for values in ours for name in values))
  columns.sort(key=lambda name: name not in ("All", "Average"))  # the one number first
  if len(columns) > MOST_COLUMNS:
    columns = columns[:1]
  lines = []
  for label, values in zip(labels, ours, strict=True):
    cells = []
    for name in columns:
      metric = values.get(name)
      if metric is None or metric.value is None:
        cells.append(Cell("n/a" if metric else "", metric.note or "" if metric else ""))
      else:
        interval = interval_text(metric).replace(" %", "") if metric.ci_method else ""
        cells.append(Cell(_number(metric.value, metric.unit), interval))
    lines.append(Line(label, cells))
  unit = headline(results[0]).unit
  numbers = [[m.value if m else None for m in map(row.get, columns)] for row in ours]
  published = any(benchmark.is_published(result.items) for result in results)
  for row in benchmark.paper if published else ():
    cells = [Cell(_number(row.values[n], unit) if n in row.values else "") for n in columns]
    if any(cell.text for cell in cells):
      lines.append(Line(row.system, cells, row.source))
      numbers.append([row.values.get(n) for n in columns])
  if len(lines) > 1:
    for j, column in enumerate(zip(*numbers, strict=True)):
      best = max((value for value in column if value is not None), default=None)
      for line, value in zip(lines, column, strict=True):
        marked = value is not None and value == best
        line.cells[j] = dataclasses.replace(line.cells[j], best=marked)
  return columns, lines


def paper_note(benchmark: Benchmark, results: Sequence[Result], lines: Sequence[Line]) -> str:
  """What the paper's rows are, or why there are none."""
  if any(line.paper for line in lines):
    return (
      "The paper's rows are copied from it, not measured here; they are comparable only if the "
      "judge and the settings are the same."
    )
  if not benchmark.paper:
    return ""
  counts = ", ".join(dict.fromkeys(result.items_text for result in results))
  return f"The paper's rows are left out: the items ({counts}) are not those of the published file."


def _number(value: float, unit: str) -> str:
  """Percent without the sign, which the caption says once."""
  return shown(value, unit).removesuffix(" %")


def _signed(value: float, unit: str) -> str:
  return ("+" if value > 0 else "") + _number(value, unit)


def main_metrics(kind: Kind, result: Result) -> dict[str, Metric]:
  """The metrics of the headline by column: types and the whole, dimensions, or caption metrics."""
  if not kind.columns:
    return {m.name: m for m in result.metrics}
  columns: dict[str, Metric] = {}
  for m in result.metrics:
    if m.name == kind.columns and ": " not in m.slice:
      columns.setdefault(m.slice, m)
  return columns


def bar_rows(
  benchmark: Benchmark, results: Sequence[Result], labels: Sequence[str]
) -> list[tuple[str, list[Bar]]]:
  """Per type (or dimension, or metric) a bar for each result, with the paper's value to compare.

  The paper's value is that of VideoRefer-7B in the same mode, where there is one.
  """
  whole = benchmark.kind.whole
  rows: dict[str, list[Bar]] = {}
  for label, result in zip(labels, results, strict=True):
    reference = _reference(benchmark, result) if benchmark.is_published(result.items) else {}
    for name, m in main_metrics(benchmark.kind, result).items():
      if m.value is None:
        continue
      paper = reference.get(name)
      rows.setdefault(name, []).append(
        Bar(
          label,
          min(m.value / whole, 1.0),
          shown(m.value, m.unit),
          m.n,
          None if m.ci_low is None else max(0.0, m.ci_low / whole),
          None if m.ci_high is None else min(m.ci_high / whole, 1.0),
          None if paper is None else paper / whole,
        )
      )
  return list(rows.items())


def _reference(benchmark: Benchmark, result: Result) -> Mapping[str, float]:
  inference = result.run.get("inference") or {}
  way = inference.get("mode") or ""
  if benchmark.subtitles:
    way = "with subtitles" if inference.get("subtitles") else "no subtitles"
  rows = (row for row in benchmark.paper if row.system.startswith("VideoRefer-7B"))
  return next((row.values for row in rows if way in row.system), {})


def _details(label: str, result: Result) -> dict[str, Any]:
  """Every number of one result, with both intervals."""
  rows = []
  for name, metrics in by_slice(result):
    by_method = {m.ci_method: interval_text(m) for m in metrics if m.ci_method}
    first = metrics[0]
    rows.append(
      {
        "name": name,
        "value": shown(first.value, first.unit),
        "wilson": by_method.get("wilson", ""),
        "by_video": by_method.get(BY_VIDEO, ""),
        "n": str(first.n),
        "left_out": str(first.n_failed or ""),
        "note": first.note or "",
      }
    )
  counts = {k.replace("_", " "): v for k, v in result.counts.items()}
  agreement = result.extra.get("agreement") or {}
  columns = filled(DETAILS, rows)
  return {
    "label": label,
    "columns": columns,
    "rows": rows,
    "counts": counts,
    "agreement": agreement,
  }


def filled(
  columns: Sequence[tuple[str, str]], rows: Sequence[Mapping[str, str]]
) -> list[tuple[str, str]]:
  """The columns (title, key) in which a row has something: scores have no Wilson interval or p."""
  return [(title, key) for title, key in columns if any(row[key] for row in rows)]


def _difference(c: Comparison, unit: str) -> dict[str, Any]:
  low, high = c.difference.interval.low, c.difference.interval.high
  return {
    "name": c.slice,
    "n": str(c.n),
    "a": shown(c.a, unit),
    "b": shown(c.b, unit),
    "difference": _signed(c.difference.value, unit),
    "interval": f"{_signed(low, unit)} to {_signed(high, unit)}",
    "p": "" if c.p is None else f"{c.p:.3g}",
    "holm": "" if c.p_holm is None else f"{c.p_holm:.3g}",
    "verdict": c.verdict.replace(">=", "≥"),
  }


def histograms(
  dimensions: Sequence[str], results: Sequence[Result], labels: Sequence[str]
) -> list[dict[str, Any]]:
  """How often each score was given, per dimension and result."""
  out = []
  for name in dimensions:
    rows = []
    for label, result in zip(labels, results, strict=True):
      given = [i["parsed"][name] for i in result.items if i["parsed"] and name in i["parsed"]]
      counts = Counter(min(max(round(v), 0), 5) for v in given)
      most = max(counts.values(), default=1)
      bars = [(score, counts[score], counts[score] / most) for score in range(6)]
      rows.append({"label": label, "bars": bars})
    out.append({"name": name, "rows": rows})
  return out


def provenance(result: Result) -> dict[str, str]:
  """What a result rests on, in words."""
  run = result.run
  task, model = run.get("task") or {}, run.get("model") or {}
  code, inference = run.get("code") or {}, run.get("inference") or {}
  env, judge = run.get("env") or {}, result.judge
  facts = {
    "Benchmark": f"{task.get('title', result.benchmark)}, {result.items_text} items"
    + (f", split {task['split']}" if task.get("split") else ""),
    "Data": _sha(task.get("data_sha256")),
    "Checkpoint": f"{model.get('name', '')} {_sha(model.get('checkpoint_sha256'))}".strip(),
    "Parameters": f"{model['params']:,}, {model['dtype']}" if model.get("params") else "",
    "Code": " ".join(
      filter(
        None,
        (
          f"vr-jax {code['version']}" if code.get("version") else "",
          f"commit {code['git'][:12]}" if code.get("git") not in (None, "unknown") else "",
          "with changes" if code.get("dirty") else "",
        ),
      )
    ),
    "Scene frames": f"{inference['frames']}, {inference['sampler']} rule"
    if inference.get("frames")
    else "",
    "Mask frames": MODES.get(inference.get("mode") or "", ""),
    "Mask rule": inference.get("mask_rule") or "",
    "Tokens per object (u)": str(inference.get("u") or ""),
    "Weights": inference.get("weights") or "",
    "Decoding": f"{inference['decoding']}, up to {inference.get('max_new_tokens')} tokens"
    if inference.get("decoding")
    else "",
    "Options": "chosen by likelihood, nothing generated" if result.by == "likelihood" else "",
    "Subtitles": {True: "with", False: "without", None: ""}[inference.get("subtitles")],
    "Parser": result.parser,
    "Judge": _judge_text(judge) if judge else "",
    "Environment": f"Python {env['python']}, JAX {env['jax']}, {env['device']}"
    if env.get("jax")
    else "",
    "Run": str(run.get("run_id") or run.get("published_file") or ""),
    **{
      k.replace("_", " ").capitalize(): str(v)
      for k, v in result.extra.items()
      if isinstance(v, str)
    },
  }
  return {name: fact for name, fact in facts.items() if fact}


def _judge_text(judge: Mapping[str, Any]) -> str:
  answered = ", ".join(m for m in judge["models"] if m != judge["name"])
  kind = "" if judge["comparable"] else " — a rule-based stand-in, not comparable"
  return (
    f"{judge['name']}{f' (answered as {answered})' if answered else ''}{kind}; {judge['prompt']} "
    f"prompt {judge['prompt_sha256'][:12]}; temperature {judge['temperature']:g}, "
    f"{judge['repeats']} {'reply' if judge['repeats'] == 1 else 'replies'} an item"
  )


def _sha(value: str | None) -> str:
  return f"sha256 {value[:16]}…" if value else ""


# --- Gallery.


def _dataset(
  benchmark: Benchmark, result: Result, data: Path | str | None, media: Path | str | None
) -> tuple[Dataset | None, str]:
  """The benchmark's items, or why there are no pictures."""
  task = result.run.get("task") or {}
  paths = [data] if data else task.get("data") or []
  if not paths:
    return None, "no pictures: give --data"
  split = task.get("split") or "any"
  try:
    return registry.read(benchmark, Path(paths[0]), media or task.get("media"), split), ""
  except InputError as error:
    return None, f"no pictures: {error}"


def _gallery(
  kind: Kind, result: Result, dataset: Dataset | None, count: int
) -> tuple[list[Example], list[TextExample]]:
  items = list(dataset.items) if dataset else []
  media = dataset.media if dataset else Path()
  if kind.graded:
    mode = MODES.get((result.run.get("inference") or {}).get("mode") or "", "")
    return choice_examples(result, items, media, count, mode), []
  return [], text_examples(kind, result, items, media, count)


# --- Markdown.


def markdown(content: Mapping[str, Any]) -> Iterator[str]:
  """The page's tables."""
  yield f"# {content['title']}"
  yield ""
  for warning in content["warnings"]:
    yield f"> {warning}"
    yield ""
  yield from _rows(
    ["", *content["columns"]],
    [
      [
        f"{line.name} (from the {line.paper})" if line.paper else f"**{line.name}**",
        *(_marked(c) + (f" ({c.note})" if c.note else "") for c in line.cells),
      ]
      for line in content["lines"]
    ],
  )
  yield ""
  yield f"{content['kind'].unit}; in brackets 95 % intervals. {content['paper_note']}"
  for group in content["groups"]:
    yield ""
    yield f"## {group['label']}"
    yield ""
    yield ", ".join(f"{v} {k}" for k, v in group["counts"].items())
    yield ""
    yield from _table(group)
  for difference in content["differences"]:
    yield ""
    yield f"## {difference['title']}"
    yield ""
    yield from _table(difference)
  yield ""
  yield "## Provenance"
  for label, facts in content["provenance"]:
    yield ""
    yield f"**{label}**"
    yield ""
    for name, fact in facts.items():
      yield f"- {name}: {fact}"


def _marked(cell: Cell) -> str:
  return f"**{cell.text}**" if cell.best else cell.text


def _table(part: Mapping[str, Any]) -> Iterator[str]:
  head = ["", *(title for title, _ in part["columns"])]
  keys = ["name", *(key for _, key in part["columns"])]
  return _rows(head, [[row[key] for key in keys] for row in part["rows"]])


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
  def line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"

  yield line(head)
  yield "|---" + "|---:" * (len(head) - 1) + "|"
  for row in rows:
    yield line(row)
