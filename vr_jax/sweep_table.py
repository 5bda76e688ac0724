"""The tables of a sweep: its members, their results, means over seeds, differences to one of them.

W/sweep.md, sweep.html, sweep.tex
"""

import dataclasses
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipes.errors import InputError, nearest
from vr_jax.evaluation.benchmark import Benchmark
from vr_jax.evaluation.benchmarks.registry import benchmark
from vr_jax.evaluation.pages.formats import Table, latex
from vr_jax.evaluation.pages.page import render
from vr_jax.evaluation.pages.results import Line, bar_rows, headline_table, main_metrics
from vr_jax.evaluation.pages.terminal import headline, shown
from vr_jax.evaluation.results import Result, load, write
from vr_jax.evaluation.scoring.statistics import paired_difference
from vr_jax.sweep import LONGEST, Member, dropped_at, unfinished
from vr_jax.training.metrics import read_metrics


@dataclasses.dataclass(frozen=True)
class Section:
  """One metric: what `vr report` shows of the members' results, without the paper's rows."""

  name: str
  title: str
  columns: Sequence[str]
  lines: Sequence[Line]
  bars: Sequence[tuple[str, Sequence[Any]]]
  axis: Sequence[str]
  tables: Sequence[Table] = ()


def write_table(members: Sequence[Member], workdir: Path, baseline: str = "") -> list[Path]:
  """Writes sweep.md, sweep.html and sweep.tex; the members that have no results are listed with the
  reason.

  Args:
    baseline: the member (or, with seeds, what was added) that the others are compared with; by
      default the first.

  Raises:
    InputError: a baseline that is no member.
  """
  groups = list(dict.fromkeys(member.group for member in members))
  known = {name: m.group for m in members for name in (m.name, m.title, m.group)}
  if baseline and baseline not in known:
    raise InputError(
      f"--baseline {baseline}{nearest(baseline, groups)}; members: {', '.join(groups)}"
    )
  base = known[baseline] if baseline else groups[0]
  states = [(_shown(member), *_state(member, workdir)) for member in members]
  names = _metric_names(members)
  sections = [s for s in (_section(n, members, workdir, base) for n in names) if s]
  text = "\n".join(_markdown(workdir.resolve().name, states, sections)) + "\n"
  write(workdir / "sweep.md", text)
  page = render(
    workdir / "sweep.html",
    "sweep.html.j2",
    title=workdir.resolve().name,
    states=states,
    sections=sections,
    count=len(members),
  )
  note = "Tables of a sweep; accuracies in percent."
  write(workdir / "sweep.tex", latex(list(_tables(states, sections)), note))
  return [workdir / "sweep.md", page, workdir / "sweep.tex"]


def _tables(states: Sequence[tuple[str, ...]], sections: Sequence[Section]) -> Iterator[Table]:
  """All tables as text, for LaTeX."""
  for section in sections:
    rows = [[line.name, *(cell.text for cell in line.cells)] for line in section.lines]
    cells = enumerate(section.lines)
    best = {(i, j) for i, line in cells for j, c in enumerate(line.cells, 1) if c.best}
    title = f"{section.name}: {section.title}"
    yield Table(title, ["Member", *section.columns], rows, frozenset(best))
    yield from section.tables
  yield Table("Members", ["Member", "State", "Steps", "Last loss"], states)


def _shown(member: Member) -> str:
  """A member's name; where it was cut, with all that was added."""
  return f"{member.name}: {member.title}" if len(member.title) > LONGEST else member.name


def _metric_names(members: Sequence[Member]) -> list[str]:
  return list(dict.fromkeys(name for member in members for name in member.metrics))


def _state(member: Member, workdir: Path) -> tuple[str, str, str]:
  """(how far a member is, its steps, its last loss)."""
  home = workdir / member.name
  lines = read_metrics(home) if (home / "metrics.jsonl").is_file() else []
  steps = str(lines[-1]["step"]) if lines else ""
  # None: of a skipped step, or of an evaluation before the first one.
  losses = [line["loss"] for line in lines if line.get("loss") is not None]
  loss = f"{losses[-1]:.4f}" if losses else ""
  if (home / "failed.json").is_file():
    failure = json.loads((home / "failed.json").read_text())
    return f"failed: {failure['line']}", steps, loss
  if steps_done := dropped_at(member, workdir):
    return f"dropped after {steps_done} steps", steps, loss
  if not unfinished([member], workdir):
    return "done", steps, loss
  return "under way" if lines else "not started", steps, loss


def _section(
  metric: str, members: Sequence[Member], workdir: Path, baseline: str
) -> Section | None:
  measured: list[tuple[str, Result]] = []
  groups: dict[str, list[Result]] = {}
  for member in members:
    folders = sorted((workdir / member.name / metric).glob("*/result.json"))
    if folders and (workdir / member.name / "done.json").is_file():
      measured.append((member.name, load(folders[0].parent)))
      groups.setdefault(member.group, []).append(measured[-1][1])
  if not measured:
    return None
  labels, results = [name for name, _ in measured], [result for _, result in measured]
  task = benchmark(results[0].benchmark)
  columns, lines = headline_table(task, results, labels)
  ours = [line for line in lines if not line.paper]
  # The paper's values are of other questions, or stand in the paper's own table.
  bars = [
    (name, [dataclasses.replace(bar, reference=None) for bar in row])
    for name, row in bar_rows(task, results, labels)
  ]
  tables = [t for t in (over_seeds(task, groups), differences(task, groups, baseline)) if t]
  return Section(metric, task.title, columns, ours, bars, task.kind.axis, tables)


def over_seeds(task: Benchmark, groups: Mapping[str, Sequence[Result]]) -> Table | None:
  """Mean and sample standard deviation over the seeds of each group; None where there is one."""
  if all(len(results) < 2 for results in groups.values()):
    return None
  values: dict[str, dict[str, list[float]]] = {}
  unit = ""
  for group, results in groups.items():
    for result in results:
      for name, metric in main_metrics(task.kind, result).items():
        if metric.value is not None:
          unit = metric.unit
          values.setdefault(group, {}).setdefault(name, []).append(metric.value)
  columns = list(dict.fromkeys(name for row in values.values() for name in row))
  columns.sort(key=lambda name: name not in ("All", "Average"))

  def cell(given: Sequence[float]) -> str:
    if not given:
      return ""
    mean = shown(statistics.fmean(given), unit).removesuffix(" %")
    if len(given) < 2:
      return mean
    return f"{mean} ± {shown(statistics.stdev(given), unit).removesuffix(' %')}"

  rows = [
    [group, str(len(groups[group])), *(cell(row.get(name, [])) for name in columns)]
    for group, row in values.items()
  ]
  return Table("Mean and standard deviation over seeds", ["Member", "Seeds", *columns], rows)


def differences(
  task: Benchmark, groups: Mapping[str, Sequence[Result]], baseline: str
) -> Table | None:
  """Each group minus the baseline, item by item, an item's score being its mean over the seeds.

  The interval is resampled by video: it says what other videos would change, not what other seeds
  would. None where nothing is there to compare.
  """
  if baseline not in groups or len(groups) < 2:
    return None
  scores = {group: item_scores(results) for group, results in groups.items()}
  base, unit = scores[baseline], headline(groups[baseline][0]).unit
  videos = {item["id"]: item["video"] for item in groups[baseline][0].items}
  rows = []
  for group, ours in scores.items():
    common = [number for number in base if number in ours]
    if group == baseline or not common:
      continue
    here, there = ([part[number] for number in common] for part in (ours, base))
    gap = paired_difference(here, there, [videos[number] for number in common])
    texts = [
      ("+" if value > 0 else "") + shown(value, unit).removesuffix(" %")
      for value in (gap.value, gap.interval.low, gap.interval.high)
    ]
    rows.append([group, texts[0], f"{texts[1]} – {texts[2]}", str(len(common))])
  head = ["Member", "Difference", "95 %, by video", "n"]
  return Table(f"Difference to {baseline}", head, rows) if rows else None


def item_scores(results: Sequence[Result]) -> dict[Any, float]:
  """The mean score of each item that all results have a score of."""
  given: dict[Any, list[float]] = {}
  for result in results:
    for item in result.items:
      if item["score"] is not None:
        given.setdefault(item["id"], []).append(float(item["score"]))
  return {
    number: statistics.fmean(values)
    for number, values in given.items()
    if len(values) == len(results)
  }


def _markdown(
  title: str, states: Sequence[tuple[str, str, str, str]], sections: Sequence[Section]
) -> Iterator[str]:
  yield f"# {title}"
  yield ""
  yield "| member | state | steps | last loss |"
  yield "|---|---|---|---|"
  for state in states:
    yield f"| {' | '.join(cell.replace('|', '/') for cell in state)} |"
  for section in sections:
    yield ""
    yield f"## {section.name}: {section.title}"
    yield ""
    yield f"| member | {' | '.join(section.columns)} |"
    yield "|---|" + "---|" * len(section.columns)
    for line in section.lines:
      cells = [f"{c.text} ({c.note})" if c.note else c.text for c in line.cells]
      yield f"| {line.name} | {' | '.join(cells)} |"
    for table in section.tables:
      yield ""
      yield f"### {table.title}"
      yield ""
      yield f"| {' | '.join(table.head)} |"
      yield "|" + "---|" * len(table.head)
      for row in table.rows:
        yield f"| {' | '.join(row)} |"
