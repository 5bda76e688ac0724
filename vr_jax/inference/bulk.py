"""Many questions from a JSON-lines file, answers into another: one line each, resumable.

A line of the requests, its regions SPECs of the command line or the fields of a Region:

    {"id": "a1", "video": "a.mp4", "question": "What is <region> doing?", "regions": ["box:…@12"]}
    {"video": "dog.jpg", "question": "Describe <region>.", "regions": [{"point": [40, 60]}]}

`id` is by default the number of the line. A line of the answers holds id, video, question, the hash
of the request, the settings, and either what an Answer holds or, under "error", why the request
could not be answered. That of a line which is no request holds its number under "line", and no id.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_pipes.errors import InputError
from vr_jax.checkpoint import checkpoint_sha256
from vr_jax.inference.model import Model
from vr_jax.inference.regions import Region, parse_regions
from vr_jax.inference.requests import Options, Request

KEYS = {"id": (str, int), "video": (str,), "question": (str,), "regions": (list,)}
EVERY = 30.0  # seconds between lines of progress, where there is no terminal for a bar
FREE = ("batch_size", "share")  # options that change no answer


@dataclasses.dataclass(frozen=True)
class Asked:
  """A request and the line it stands on; `regions` as they stand there."""

  line: int
  id: str | int
  video: str
  question: str
  regions: tuple[Any, ...]

  @property
  def sha256(self) -> str:
    """Hash of what is asked, so that an answer to another request is known as such."""
    content = json.dumps([self.video, self.question, self.regions], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]

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


def run(
  load: Callable[[], Model],
  requests: Path | str,
  out: Path | str,
  *,
  checkpoint: Path | str | None = None,
  **options: Any,
) -> Summary:
  """Answers the requests that `out` does not answer yet, each written as soon as it is there.

  A line that is no request costs a line of the answers, as a request that is refused does; both are
  tried again by the next run.

  Args:
    load: gives the model, once the files are known to be usable.
    checkpoint: what it is loaded from.
    **options: of `Model.ask_many`.

  Raises:
    InputError: not one line is a request; `out` cannot be written, or holds answers to other
      requests, of another checkpoint or with other options.
  """
  asked, refused = read_requests(requests)
  out = Path(out)
  if not (out.parent.is_dir() and os.access(out.parent, os.W_OK)) or out.is_dir():
    raise InputError(f"--out {out}: cannot be written; accepted: a file in a folder that is there")
  model = load()
  settings = _settings(model, checkpoint, Options(**options))
  known = _answered(out, {one.id: one for one in asked}, settings)
  remaining = [one for one in asked if one.id not in known]
  counts = {True: 0, False: 0}
  total = len(asked) + len(refused)
  with open(out, "a", encoding="utf-8") as file, _progress(total, len(known)) as advance:

    def write(record: Mapping[str, Any]) -> None:
      file.write(json.dumps(record) + "\n")
      file.flush()
      counts["error" not in record] += 1
      advance()

    for line, error in refused.items():
      write({"id": None, "line": line, "settings": settings, "error": error})
    for one, result in _results(model, remaining, options):
      write(
        {
          "id": one.id,
          "video": one.video,
          "question": one.question,
          "request": one.sha256,
          "settings": settings,
          **result,
        }
      )
  return Summary(counts[True], counts[False], len(known))


def read_requests(path: Path | str) -> tuple[list[Asked], dict[int, str]]:
  """The requests of a file, and by line number what is wrong with lines that are none.

  Their media are not opened yet.

  Raises:
    InputError: the file cannot be read, or not one line is a request.
  """
  path = Path(path)
  try:
    lines = path.read_bytes().split(b"\n")
  except OSError as error:
    raise InputError(f"{path}: cannot be read ({error})") from None
  asked: dict[str | int, Asked] = {}
  refused: dict[int, str] = {}
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    try:
      one = _asked(line, number)
      if one.id in asked:
        earlier = asked[one.id].line
        raise InputError(
          f"id {one.id!r} was given to line {earlier}; accepted: one line of each id"
        )
      asked[one.id] = one
    except InputError as error:
      refused[number] = f"{path}: line {number}: {error}"
  if refused and not asked:
    raise InputError(f"{next(iter(refused.values()))}; no other line is a request either")
  return list(asked.values()), refused


def _asked(line: bytes, number: int) -> Asked:
  try:
    fields = json.loads(line)
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise InputError(f"cannot be read as JSON ({error})") from None
  if not isinstance(fields, dict):
    raise InputError(f"found {type(fields).__name__}; accepted: an object")
  for key, value in fields.items():
    if key not in KEYS or not isinstance(value, KEYS[key]) or isinstance(value, bool):
      kinds = " or ".join(kind.__name__ for kind in KEYS.get(key, ()))
      accepted = kinds or f"keys {', '.join(KEYS)}"
      raise InputError(f"key {key!r}: found {value!r}; accepted: {accepted}")
  for key in ("video", "question"):
    if key not in fields:
      raise InputError(f"no key {key!r}; accepted: {', '.join(KEYS)}")
  return Asked(
    number,
    fields.get("id", number),
    fields["video"],
    fields["question"],
    tuple(fields.get("regions", ())),
  )


def _settings(model: Model, checkpoint: Path | str | None, options: Options) -> dict[str, Any]:
  """What an answer depends on beside the request; JSON-ready."""
  sha256 = checkpoint_sha256(checkpoint)
  given = {k: v for k, v in dataclasses.asdict(options).items() if k not in FREE}
  if options.temperature == 0:
    given = {k: v for k, v in given.items() if k not in ("top_k", "top_p", "seed")}
  return {"checkpoint": sha256 and sha256[:16], "weights": model.weights, **given}


def _answered(
  out: Path, asked: Mapping[str | int, Asked], settings: Mapping[str, Any]
) -> set[str | int]:
  """Ids that `out` answers. Refusals, and a last line that was cut off, are taken out of it."""
  if not out.exists():
    return set()
  try:
    text = out.read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(f"{out}: cannot be read ({error})") from None
  kept: dict[str | int, str] = {}
  for number, line in enumerate(text.split("\n")[:-1], 1):
    where = f"{out}: line {number}"
    try:
      record = json.loads(line)
      key, held = record["id"], dict(record["settings"])
      if "error" in record:
        continue
      other = key not in asked or record["request"] != asked[key].sha256
    except (json.JSONDecodeError, KeyError, TypeError, ValueError):
      raise InputError(f"{where}: not a line that vr ask wrote; give another --out") from None
    if other:
      raise InputError(
        f"{where}: id {key!r} answers another request than that of the requests file; give another "
        "--out"
      )
    for name in settings:
      if held.get(name) != settings[name]:
        raise InputError(
          f"{where}: answered with {name}={held.get(name)!r}, not {settings[name]!r}; accepted: "
          "the same to go on, or another --out"
        )
    if key in kept:
      raise InputError(f"{where}: id {key!r} was answered by an earlier line; give another --out")
    kept[key] = line
  whole = "".join(line + "\n" for line in kept.values())
  if whole != text:
    beside = out.with_name(out.name + ".tmp")
    beside.write_text(whole, encoding="utf-8")
    os.replace(beside, out)
  return set(kept)


def _results(model: Model, asked: list[Asked], options) -> Iterator[tuple[Asked, dict[str, Any]]]:
  # By line, not by what is left: sampled answers are those of a run that was not stopped.
  requests: dict[int, Request] = {}
  by_line = {one.line: one for one in asked}
  for one in asked:
    try:
      requests[one.line] = one.request()
    except InputError as error:
      yield one, {"error": str(error)}
  for line, answer in model.answer_each(requests, **options):
    failed = isinstance(answer, InputError)
    yield by_line[line], {"error": str(answer)} if failed else answer.to_dict()


@contextlib.contextmanager
def _progress(total: int, done: int) -> Iterator[Callable[[], None]]:
  """A bar on a terminal, a line now and then elsewhere; gives the function that moves it on."""
  columns = (TextColumn("answers"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
  console = Console(file=sys.stderr)
  with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
    task = bar.add_task("answers", total=total, completed=done)
    started = told = time.monotonic()
    count = 0

    def advance() -> None:
      nonlocal told, count
      count += 1
      bar.advance(task)
      now = time.monotonic()
      if not console.is_terminal and now - told >= EVERY:
        told = now
        rate = count / (now - started)
        print(f"{done + count} of {total}, {rate:.2f} a second", file=sys.stderr, flush=True)

    yield advance
