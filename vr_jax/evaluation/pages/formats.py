"""The tables of a report as LaTeX and as CSV."""

import csv
import dataclasses
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

FORMATS = ("html", "latex", "csv")
_ESCAPED = {
  "\\": r"\textbackslash{}",
  **{c: f"\\{c}" for c in "&%$#_{}"},
  "~": r"\textasciitilde{}",
  "^": r"\textasciicircum{}",
  "≥": r"$\geq$",
  "±": r"$\pm$",
  "–": "--",
}


@dataclasses.dataclass(frozen=True)
class Table:
  """A table as text: `rows` of cells under `head`; `best` are the (row, column) of best values."""

  title: str
  head: Sequence[str]
  rows: Sequence[Sequence[str]]
  best: frozenset[tuple[int, int]] = frozenset()


def tables(content: Mapping[str, Any]) -> Iterator[Table]:
  """Every table of a report's content (pages/results.py): headline, results, differences."""
  lines = content["lines"]
  rows = [
    [line.name + (f" (from the {line.paper})" if line.paper else ""), *(c.text for c in line.cells)]
    for line in lines
  ]
  best = {(i, j) for i, line in enumerate(lines) for j, c in enumerate(line.cells, 1) if c.best}
  yield Table(content["title"], ["System", *content["columns"]], rows, frozenset(best))
  for part in (*content["groups"], *content["differences"]):
    keys = ["name", *(key for _, key in part["columns"])]
    head = ["", *(title for title, _ in part["columns"])]
    title = part.get("label") or part["title"]
    yield Table(title, head, [[row[key] for key in keys] for row in part["rows"]])


def latex(parts: Sequence[Table], note: str) -> str:
  """A `table` environment each (package booktabs), the best value of a column in bold."""
  out = [f"% {note}", r"% \usepackage{booktabs}"]
  for part in parts:
    out += [
      "",
      r"\begin{table}",
      r"\centering",
      rf"\caption{{{_escape(part.title)}}}",
      rf"\begin{{tabular}}{{l{'r' * (len(part.head) - 1)}}}",
      r"\toprule",
      _line(map(_escape, part.head)),
      r"\midrule",
    ]
    for i, row in enumerate(part.rows):
      cells = [_escape(text) for text in row]
      bold = [rf"\textbf{{{c}}}" if (i, j) in part.best else c for j, c in enumerate(cells)]
      out.append(_line(bold))
    out += [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
  return "\n".join(out) + "\n"


def csv_text(part: Table) -> str:
  """One table; the last column of a table with best values names those of the row."""
  out = io.StringIO()
  writer = csv.writer(out, lineterminator="\n")
  writer.writerow([*part.head, "best"] if part.best else part.head)
  for i, row in enumerate(part.rows):
    best = "; ".join(part.head[j] for j in range(len(row)) if (i, j) in part.best)
    writer.writerow([*row, best] if part.best else row)
  return out.getvalue()


def file_name(number: int, part: Table) -> str:
  """A name for a table's file, such as `2_m_multi-frame_16_scene_frames.csv`."""
  return f"{number}_{re.sub(r'[^A-Za-z0-9.-]+', '_', part.title).strip('_')[:80]}.csv"


def _line(cells: Iterable[str]) -> str:
  return " & ".join(cells) + r" \\"


def _escape(text: str) -> str:
  return "".join(_ESCAPED.get(character, character) for character in text)
