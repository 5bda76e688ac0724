"""Results as lines of text, and how their numbers are written everywhere."""

from collections.abc import Iterator, Sequence

from vr_jax.evaluation.benchmarks.registry import benchmark
from vr_jax.evaluation.metrics import BY_VIDEO, Metric
from vr_jax.evaluation.results import Result
from vr_jax.evaluation.scoring.comparison import Comparison


def table(result: Result) -> Iterator[str]:
  """The result as lines of text."""
  yield f"{benchmark(result.benchmark).title}: {result.label}"
  counts = {k: str(v) for k, v in result.counts.items() if v or k in ("total", "missing_media")}
  counts["total"] = result.items_text
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
  for name, pairs in (result.extra.get("agreement") or {}).items():
    if pairs["pairs"]:
      yield (
        f"  judge with itself, {name}: equal in {pairs['equal']:.0%} of {pairs['pairs']} pairs, "
        f"{pairs['mean_difference']:.2f} points apart"
      )
  for key in ("tokenizer", "length_filter", "java"):
    if result.extra.get(key):
      yield f"  {key.replace('_', ' ')}: {result.extra[key]}"
  for warning in result.warnings:
    yield f"  note: {warning}"


_METHODS = {"wilson": "Wilson", BY_VIDEO: "by video"}


def by_slice(result: Result) -> list[tuple[str, list[Metric]]]:
  """The metrics by name as a reader knows it; those that differ only in their interval together."""
  rows: dict[str, list[Metric]] = {}
  for m in result.metrics:
    name = m.name.replace("_", " ")
    if m.name in ("accuracy", "mean"):
      name = m.slice
    elif m.slice != "All":
      name = f"{m.slice}, {name}"
    rows.setdefault(name, []).append(m)
  return list(rows.items())


def interval_text(metric: Metric) -> str:
  return f"{shown(metric.ci_low, metric.unit)} – {shown(metric.ci_high, metric.unit)}"


def shown(value: float | None, unit: str) -> str:
  """A value as people read it: percent, points, or a caption score times 100."""
  if value is None:
    return "n/a"
  return (
    f"{100 * value:.1f} %"
    if unit == "share"
    else f"{value:.3f}"
    if unit == "points"
    else f"{100 * value:.2f}"
  )


def comparison_table(parts: Sequence[Comparison], unit: str) -> Iterator[str]:
  """Differences as lines of text."""
  yield f"  {'first minus second':32}{'first':>10}{'second':>10}{'difference':>12}  95 % (by video)"
  for c in parts:
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
  return result.metric(*benchmark(result.benchmark).kind.headline)
