"""`vr engine`: probe, run, review, status and report of the data engine."""

import functools
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from data_pipes.engine.options import RunOptions
from vr_jax.commands.options import CONFIG

STOPPED = 3  # exit code: out of budget, endpoint down, disk full


@dataclass(frozen=True)
class Source:
  config: str = field(metadata=CONFIG)


@dataclass(frozen=True)
class Run:
  workdir: str = field(metadata={"help": "folder of the run"})
  limit: int | None = field(
    default=None, metadata={"help": "only N videos: a trial, with a bill", "metavar": "N"}
  )
  shards: int | None = field(
    default=None, metadata={"help": "fixed by the first run", "metavar": "N"}
  )


@dataclass(frozen=True)
class Place:
  workdir: str = field(metadata={"positional": True, "help": "folder of the run"})


@dataclass(frozen=True)
class Review:
  n: int = field(default=100, metadata={"help": "of the kept, and as many of the dropped"})
  seed: int = field(default=0, metadata={"help": "of the sample"})
  verdicts: str | None = field(
    default=None, metadata={"help": "of the page, Label Studio or CVAT", "metavar": "FILE"}
  )


@dataclass(frozen=True)
class Output:
  json: bool = field(default=False, metadata={"help": "print the results as JSON"})

  def show(self, lines: Iterable[str], values: Any) -> None:
    print(json.dumps(values, indent=1) if self.json else "\n".join(lines))


def stoppable(step: Callable[..., int | None]) -> Callable[..., int | None]:
  """The step of the engine, ending with code STOPPED where the run has to stop."""

  @functools.wraps(step)
  def stopping(*args, **values) -> int | None:
    from data_pipes.engine.graph import StopRun

    try:
      return step(*args, **values)
    except StopRun as stop:
      print(f"vr engine: stopped: {stop}", file=sys.stderr)
      return STOPPED

  return stopping


@stoppable
def probe(source: Source, output: Output, overrides: Sequence[str]) -> int:
  from data_pipes.engine import command
  from data_pipes.engine.backends.probe import lines
  from vr_jax.configs import load_config

  probed = command.probe(load_config(source.config, overrides))
  output.show(lines(probed), [asdict(one) for one in probed])
  return 0 if all(one.usable for one in probed) else STOPPED


@stoppable
def run(
  source: Source, options: Run, how: RunOptions, output: Output, overrides: Sequence[str]
) -> int:
  from data_pipes.engine import command
  from vr_jax.configs import load_config

  config = load_config(source.config, overrides)
  with config.unlocked():
    if options.limit is not None:
      config.input.limit = options.limit
    if options.shards is not None:
      config.shards = options.shards
  with _progress(sys.stderr.isatty() and not output.json) as report:
    summary = command.run(
      config,
      options.workdir,
      command=_array_command(source, options, how, overrides),
      report=report,
      **asdict(how),
    )
  output.show(summary.get("commands") or command.status_lines(summary), summary)
  return 0


@contextmanager
def _progress(show: bool) -> Iterator[Callable[[str], None]]:
  """A line on the terminal that is written over."""

  def report(line: str) -> None:
    if show:
      print(f"\r\x1b[2K{line[:180]}", end="", file=sys.stderr, flush=True)

  yield report
  if show:
    print(file=sys.stderr)


def _array_command(source: Source, options: Run, how: RunOptions, overrides: Sequence[str]) -> str:
  words = ["vr", "engine", "run", "--config", source.config, "--workdir", options.workdir]
  seconds = how.item_seconds if how.item_seconds != RunOptions().item_seconds else None
  chosen = {"budget-usd": how.budget_usd, "limit": options.limit, "item-seconds": seconds}
  for flag, value in chosen.items():
    words += [f"--{flag}", str(value)] if value is not None else []
  return shlex.join([*words, *(f"--{override}" for override in overrides)])


@stoppable
def review(place: Place, options: Review, output: Output) -> None:
  from data_pipes.engine import review
  from vr_jax.evaluation.scoring import reviewer

  if options.verdicts is None:
    paths = [str(path) for path in review.write_sample(place.workdir, options.n, options.seed)]
    output.show(paths, {"files": paths})
  else:
    judged, accepted = review.read_verdicts(place.workdir, options.verdicts)
    table = reviewer.review(judged, accepted)
    output.show(reviewer.lines(table), table.to_dict())


@stoppable
def status(place: Place, output: Output) -> None:
  from data_pipes.engine import command

  summary = command.status(place.workdir)
  output.show(command.status_lines(summary), summary)


@stoppable
def report(place: Place, output: Output) -> None:
  from data_pipes.engine.report import write_report

  path, numbers = write_report(place.workdir)
  output.show([str(path)], numbers)
