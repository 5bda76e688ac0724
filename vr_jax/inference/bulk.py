"""Many questions from a JSON-lines file, answers into another: one line each, resumable.

A line of the requests, its regions SPECs of the command line or the fields of a Region:

    {"id": "a1", "video": "a.mp4", "question": "What is <region> doing?", "regions": ["box:…@12"]}
    {"video": "dog.jpg", "question": "Describe <region>.", "regions": [{"point": [40, 60]}]}

`id` is by default the number of the line. A line of the answers holds id, video and question, and
either what an Answer holds or, under "error", why the request could not be answered.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_pipes.errors import InputError
from vr_jax.inference.model import Model, Request
from vr_jax.inference.regions import Region, parse_regions

KEYS = {"id": (str, int), "video": (str,), "question": (str,), "regions": (list,)}


@dataclasses.dataclass(frozen=True)
class Asked:
  """A line of the requests; `regions` as they stand there."""

  id: str | int
  video: str
  question: str
  regions: tuple[Any, ...]

  def request(self) -> Request:
    """Raises InputError where a region is none."""
    parts = []
    for region in self.regions:
      if isinstance(region, str):
        parts += parse_regions([region])
        continue
      try:
        parts.append(Region(**region))
      except TypeError as error:
        raise InputError(f"region {region!r}: {error}; accepted: a SPEC or a Region") from None
    return Request(self.video, self.question, parts)


@dataclasses.dataclass(frozen=True)
class Summary:
  """How many requests were answered now, refused now, and answered by an earlier run."""

  answered: int
  refused: int
  before: int

  def __str__(self) -> str:
    earlier = f", {self.before} answered before" if self.before else ""
    return f"{self.answered} answered, {self.refused} refused{earlier}"


def run(model: Model, requests: Path | str, out: Path | str, **options: Any) -> Summary:
  """Answers the requests that `out` does not answer yet, each written as soon as it is there.

  Those that were refused are asked again. `options` are those of `Model.ask_many`.

  Raises:
    InputError: a line that is no request, an id given twice, or an `out` with answers to others.
  """
  asked = read_requests(requests)
  known = _answered(Path(out), {one.id: one for one in asked})
  remaining = [one for one in asked if one.id not in known]
  counts = {True: 0, False: 0}
  with open(out, "a", encoding="utf-8") as file, _progress(len(asked), len(known)) as advance:
    for one, result in _results(model, remaining, options):
      record = {"id": one.id, "video": one.video, "question": one.question, **result}
      file.write(json.dumps(record) + "\n")
      file.flush()
      counts["error" not in result] += 1
      advance()
  return Summary(counts[True], counts[False], len(known))


def read_requests(path: Path | str) -> list[Asked]:
  """The requests of a file, checked for form; their media are not opened yet."""
  asked: dict[str | int, Asked] = {}
  for number, line in _lines(Path(path)):
    where = f"{path}: line {number}"
    try:
      fields = json.loads(line)
    except json.JSONDecodeError as error:
      raise InputError(f"{where}: cannot be read as JSON ({error})") from None
    if not isinstance(fields, dict):
      raise InputError(f"{where}: found {type(fields).__name__}; accepted: an object")
    for key, value in fields.items():
      if key not in KEYS or not isinstance(value, KEYS[key]) or isinstance(value, bool):
        kinds = " or ".join(kind.__name__ for kind in KEYS.get(key, ()))
        raise InputError(
          f"{where}: key {key!r}: found {value!r}; accepted: {kinds or 'keys ' + ', '.join(KEYS)}"
        )
    for key in ("video", "question"):
      if key not in fields:
        raise InputError(f"{where}: no key {key!r}; accepted: {', '.join(KEYS)}")
    one = Asked(
      fields.get("id", number),
      fields["video"],
      fields["question"],
      tuple(fields.get("regions", ())),
    )
    if one.id in asked:
      raise InputError(f"{where}: id {one.id!r} was given to an earlier line; accepted: one line")
    asked[one.id] = one
  return list(asked.values())


def _answered(out: Path, asked: dict[str | int, Asked]) -> set[str | int]:
  """Ids that `out` answers. Refusals, and a last line that was cut off, are taken out of it."""
  if not out.exists():
    return set()
  kept = {}
  for number, line in _lines(out, whole=True):
    where = f"{out}: line {number}"
    try:
      record = json.loads(line)
      key = record["id"]
      same = key in asked and all(
        record[k] == getattr(asked[key], k) for k in ("video", "question")
      )
    except (json.JSONDecodeError, KeyError, TypeError):
      raise InputError(f"{where}: not a line that vr ask wrote; give another --out") from None
    if not same:
      raise InputError(
        f"{where}: id {key!r} answers another request than that of the requests file; give another "
        "--out"
      )
    if "error" not in record:
      kept[key] = line
  text = "".join(line + "\n" for line in kept.values())
  if text != out.read_text(encoding="utf-8"):
    beside = out.with_name(out.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, out)
  return set(kept)


def _lines(path: Path, whole: bool = False) -> Iterator[tuple[int, str]]:
  """(number, text) of lines that are not blank; with `whole`, without one that lacks its end."""
  try:
    lines = path.read_text(encoding="utf-8").split("\n")
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(f"{path}: cannot be read ({error})") from None
  for number, line in enumerate(lines[:-1] if whole else lines, 1):
    if line.strip():
      yield number, line


def _results(model: Model, asked: list[Asked], options) -> Iterator[tuple[Asked, dict[str, Any]]]:
  requests, order = [], []
  for one in asked:
    try:
      requests.append(one.request())
      order.append(one)
    except InputError as error:
      yield one, {"error": str(error)}
  for index, answer in model.answer_each(requests, **options):
    failed = isinstance(answer, InputError)
    yield order[index], {"error": str(answer)} if failed else answer.to_dict()


class _progress:
  """A bar on a terminal, nothing elsewhere; entering gives the function that moves it on."""

  def __init__(self, total: int, done: int):
    columns = (TextColumn("answers"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(file=sys.stderr)
    self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
    self._task = self._bar.add_task("answers", total=total, completed=done)

  def __enter__(self):
    self._bar.start()
    return lambda: self._bar.advance(self._task)

  def __exit__(self, *_) -> None:
    self._bar.stop()
