"""Questions from a file of JSON lines, answers into another: one line each, resumable.

A line of the requests; its regions are SPECs as on the command line, or the fields of a Region:

    {"id": "a1", "video": "a.mp4", "question": "What is <region> doing?", "regions": ["box:…@12"]}
    {"video": "dog.jpg", "question": "Describe <region>.", "regions": [{"point": [40, 60]}]}

`id` is by default the number of the line; "seconds": [start, end] takes the scene from that part of
the video; "fps" are the frames a second of a folder of frames, for times in regions; "starts" are
the cells that k-means begins with, of each crop, see `Request`. A line of the answers holds id,
video, question, the hash of the request, the settings, and either what an Answer holds or, under
"error", why the request could not be answered. That of a line which is no request holds its number
under "line", and no id.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_pipes.errors import InputError, reading, shown
from data_pipes.files import JsonLines, read_json_lines
from vr_jax.checkpoint import checkpoint_sha256
from vr_jax.inference.model import Model
from vr_jax.inference.options import Options
from vr_jax.inference.regions import Region, parse_regions
from vr_jax.inference.requests import Answer, Request

KEYS = {
  "id": (str, int),
  "video": (str,),
  "question": (str,),
  "regions": (list,),
  "seconds": (list,),
  "fps": (int, float),
  "starts": (list,),
}
EVERY = 30.0  # seconds between lines of progress, where there is no terminal for a bar
FREE = ("batch_size", "share")  # options that change no answer
# Options that files of earlier code say nothing of.
LATER = ("repetition_penalty", "stop", "logprobs", "literal")


@dataclasses.dataclass(frozen=True)
class RequestLine:
  """A request and the number of its line; `regions` and `seconds` as they stand there."""

  line: int
  id: str | int
  video: str
  question: str
  regions: tuple[Any, ...]
  seconds: tuple[Any, ...] | None = None
  fps: float | None = None
  starts: tuple[Any, ...] = ()

  @property
  def sha256(self) -> str:
    """Hash of the request, so that an answer to another request is known as such."""
    more: list[Any] = [] if self.seconds is None else [self.seconds]
    more += [] if self.fps is None else [{"fps": self.fps}]
    more += [{"starts": self.starts}] if self.starts else []
    content = json.dumps([self.video, self.question, self.regions, *more], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]

  def request(self) -> Request:
    """Raises InputError where a region is none, or the seconds are not two numbers."""
    parts: list[Region] = []
    for region in self.regions:
      if isinstance(region, str):
        parts += parse_regions([region])
        continue
      with reading(f"region {shown(region)}", "a SPEC, or the fields of a Region"):
        fields = dict(region)
        accepted = [f.name for f in dataclasses.fields(Region)]
      unknown = [key for key in fields if key not in accepted]
      if unknown:
        raise InputError(f"region: key {unknown[0]!r}; accepted: {', '.join(accepted)}")
      parts.append(Region(**fields))
    return Request(
      self.video,
      self.question,
      parts,
      seconds=self.seconds,
      fps=self.fps,
      starts=self.starts,
    )


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

  A line that is no request gets a line of the answers, and so does a request that is refused; the
  next run tries both again.

  Args:
    load: gives the model, once the files are known to be usable.
    checkpoint: what it is loaded from.
    **options: of `Model.ask_many`.

  Raises:
    InputError: not one line is a request; `out` cannot be written, or holds answers to other
      requests, of another checkpoint or with other options.
  """
  lines, refused = read_requests(requests)
  out = Path(out)
  if not (out.parent.is_dir() and os.access(out.parent, os.W_OK)) or out.is_dir():
    raise InputError(f"--out {out}: cannot be written; accepted: a file in a folder that is there")
  model = load()
  settings = _settings(model, checkpoint, Options(**options))
  answered = _check_answers(out, {line.id: line for line in lines}, settings)
  remaining = [line for line in lines if line.id not in answered]
  counts = {True: 0, False: 0}
  total = len(lines) + len(refused)
  with _open_answers(out) as file, _progress(total, len(answered)) as advance:

    def write(record: dict[str, Any]) -> None:
      file.add(record)
      counts["error" not in record] += 1
      advance()

    for number, error in refused.items():
      write({"id": None, "line": number, "settings": settings, "error": error})
    for line, result in _results(model, remaining, options):
      write(
        {
          "id": line.id,
          "video": line.video,
          "question": line.question,
          "request": line.sha256,
          "settings": settings,
          **result,
        }
      )
  return Summary(counts[True], counts[False], len(answered))


def read_requests(path: Path | str) -> tuple[list[RequestLine], dict[int, str]]:
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
  requests: dict[str | int, RequestLine] = {}
  refused: dict[int, str] = {}
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    try:
      request = _parse(line, number)
      if request.id in requests:
        earlier = requests[request.id].line
        raise InputError(
          f"id {request.id!r} was given to line {earlier}; accepted: one line of each id"
        )
      requests[request.id] = request
    except InputError as error:
      refused[number] = f"{path}: line {number}: {error}"
  if refused and not requests:
    raise InputError(f"{next(iter(refused.values()))}; no other line is a request either")
  return list(requests.values()), refused


def _parse(line: bytes, number: int) -> RequestLine:
  with reading("cannot be read as JSON"):
    fields = json.loads(line)
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
  return RequestLine(
    number,
    fields.get("id", number),
    fields["video"],
    fields["question"],
    tuple(fields.get("regions", ())),
    tuple(fields["seconds"]) if "seconds" in fields else None,
    fields.get("fps"),
    tuple(fields.get("starts", ())),
  )


def _settings(model: Model, checkpoint: Path | str | None, options: Options) -> dict[str, Any]:
  """What an answer depends on beside the request; JSON-ready."""
  sha256 = checkpoint_sha256(checkpoint)
  given = {k: v for k, v in dataclasses.asdict(options).items() if k not in FREE}
  usual = dataclasses.asdict(Options())
  given = {k: v for k, v in given.items() if k not in LATER or v != usual[k]}
  if options.temperature == 0:
    given = {k: v for k, v in given.items() if k not in ("top_k", "top_p", "seed")}
  return {"checkpoint": sha256 and sha256[:16], "weights": model.weights, **given}


def _check_answers(
  out: Path, requests: Mapping[str | int, RequestLine], settings: Mapping[str, Any]
) -> set[str | int]:
  """Ids that `out` answers; InputError where it holds anything else than answers to `requests`."""
  answered: set[str | int] = set()
  for number, record in enumerate(read_json_lines(out), 1):
    where = f"{out}: line {number}"
    try:
      key, held = record["id"], dict(record["settings"])
      if "error" in record:
        continue
      other = key not in requests or record["request"] != requests[key].sha256
    except (KeyError, TypeError, ValueError):
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
    if key in answered:
      raise InputError(f"{where}: id {key!r} was answered by an earlier line; give another --out")
    answered.add(key)
  return answered


def _open_answers(out: Path) -> JsonLines:
  """The answers file, to be gone on with; refusals are taken out, since they are tried again."""
  return JsonLines(
    out, lambda record: (record["id"], record.get("line")), lambda record: "error" not in record
  )


def _results(
  model: Model, lines: Sequence[RequestLine], options: Mapping[str, Any]
) -> Iterator[tuple[RequestLine, dict[str, Any]]]:
  # By line, not by what is left: sampled answers are those of a run that was not stopped.
  requests: dict[int, Request] = {}
  by_number = {line.line: line for line in lines}
  for line in lines:
    try:
      requests[line.line] = line.request()
    except InputError as error:
      yield line, {"error": str(error)}
  for number, answer in model.answer_each(requests, **options):
    failed = isinstance(answer, InputError)
    yield by_number[number], {"error": str(answer)} if failed else _record(answer)


def _record(answer: Answer) -> dict[str, Any]:
  """What a line holds of an answer: what depends on the request alone."""
  record = answer.to_dict()
  for name in ("usage", "timings", *(("logprobs",) if answer.logprobs is None else ())):
    del record[name]
  return record


@contextlib.contextmanager
def _progress(total: int, done: int) -> Iterator[Callable[[], None]]:
  """A bar on a terminal, a line now and then elsewhere; gives the function that moves it on."""
  columns = (TextColumn("answers"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
  console = Console(file=sys.stderr)
  with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
    task = bar.add_task("answers", total=total, completed=done)
    started = printed = time.monotonic()
    count = 0

    def advance() -> None:
      nonlocal printed, count
      count += 1
      bar.advance(task)
      now = time.monotonic()
      if not console.is_terminal and now - printed >= EVERY:
        printed = now
        rate = count / (now - started)
        print(f"{done + count} of {total}, {rate:.2f} a second", file=sys.stderr, flush=True)

    yield advance
