"""Pages that need nothing else: no network, no other file. One style sheet, frame and bar for all.

`templates/page.html.j2` is the frame that every page extends, `page.css` the style sheet, and
`parts.html.j2` holds the bar. A package that has pages of its own keeps them in `templates`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jinja2


@dataclass(frozen=True)
class Bar:
  """One bar, in shares of the whole width.

  Attributes:
    text: its value in words; `note` goes on for those who hear the page.
    n: what the value is over.
    low, high: the ends of its interval, where it has one.
    reference: a value to compare with, such as the paper's or chance.
  """

  name: str
  value: float
  text: str
  n: int = 0
  low: float | None = None
  high: float | None = None
  reference: float | None = None
  note: str = ""


def count_bars(
  counts: Mapping[Any, int], shares: bool = False, total: int | None = None
) -> list[Bar]:
  """A bar for each count, the largest one full.

  With `shares` its text says the part of `total`, by default of all counts.
  """
  most = max(counts.values(), default=1)
  total = max(sum(counts.values()) if total is None else total, 1)
  return [
    Bar(str(name), n / max(most, 1), f"{n} ({n / total:.1%})" if shares else str(n), n)
    for name, n in counts.items()
  ]


def percent(share: float, digits: int = 0) -> str:
  return f"{100 * share:.{digits}f}"


def render(template: str, package: str = "data_pipes", **content: Any) -> str:
  """A page from a template of `package`, which extends this package's."""
  environment = jinja2.Environment(
    loader=jinja2.ChoiceLoader([jinja2.PackageLoader(name) for name in (package, "data_pipes")]),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
  )
  environment.globals["percent"] = percent
  return environment.get_template(template).render(**content)
