"""The `vr` command: the table of commands, and the way from a command line to a call.

A command is a function in vr_jax/commands whose arguments are dataclasses: their fields are its
options (commands/options.py). It returns its exit code, None for 0. To add one: a file there and a
line of COMMANDS. A command's file is imported when it is called, and imports jax later still, in
its function: no --help waits for it.

Exit codes: 0 done, 1 our fault (a traceback), 2 the user's input is wrong (one line on stderr), 3
it does not fit or cannot go on, 130 Ctrl-C, 141 nobody reads what is printed any more (`| head`),
143 training was stopped and has saved.
"""

import argparse
import itertools
import os
import pkgutil
import select
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import IO, Any, NamedTuple

from data_pipes.errors import InputError, nearest
from vr_jax.commands.options import (
  OVERRIDES,
  add_options,
  options_of,
  read_options,
  takes_overrides,
  unknown_option,
)


class Command(NamedTuple):
  """A command: "file:function" in vr_jax/commands, and for --help a summary and a note."""

  target: str
  summary: str
  note: str = ""

  def function(self) -> Callable[..., int | None]:
    return pkgutil.resolve_name(f"vr_jax.commands.{self.target}")


class Group(NamedTuple):
  """Commands of one subject; `noun` stands for their names in --help."""

  summary: str
  noun: str
  commands: Mapping[str, "Command | Group"]


COMMANDS: dict[str, Command | Group] = {
  "quickstart": Command("quickstart:run", "make a small video set, train, score, ask"),
  "train": Command("train:run", "train, or resume what is in the work directory"),
  "sweep": Command("sweep:run", "run a config's sweep, or what is left of it, and compare"),
  "ask": Command("ask:ask", "answer a question about objects in a video"),
  "serve": Command("serve:run", "the model over HTTP, in OpenAI's shapes"),
  "batch": Command("batch:run", "a file of chat requests, answered as by vr serve; resumable"),
  "frames": Command("frames:run", "frames by number and time, with rulers, as files or a sheet"),
  "describe": Command("ask:describe", "describe an object in a video"),
  "eval": Command("evaluate:run", "a model's answers to a benchmark; goes on where it was stopped"),
  "score": Command("score:run", "predictions to scores with intervals"),
  "report": Command("report:run", "results as a page and a table"),
  "convert": Command("convert:run", "weights of one format into another, with proof"),
  "parity": Command("parity:run", "run a golden-case folder of the published code"),
  "data": Group(
    "import, check, shard, count, show and time annotation files",
    "VERB",
    {
      "check": Command(
        "data_check:run",
        "validate annotation files and their media; exit code 2 on defects",
      ),
      "import": Command(
        "data_import:run", "masks and texts of COCO, CVAT, Label Studio … as annotation files"
      ),
      "prepare": Command(
        "data_prepare:run",
        "decode once and write ArrayRecord shards; goes on where it was ended",
      ),
      "features": Command(
        "data_features:run", "cache what a frozen tower makes of prepared shards"
      ),
      "stats": Command(
        "data_stats:run", "count by type, source, length, objects, mask area and frames"
      ),
      "show": Command(
        "data_show:run",
        "one item: frames with its objects drawn on them, and the dialogue",
      ),
      "bench": Command("data_bench:run", "time the input pipeline alone, stage by stage"),
    },
  ),
  "engine": Group(
    "make object-level data from videos with agents",
    "STEP",
    {
      "probe": Command("engine:probe", "what the backends of a config can do, their licences"),
      "run": Command("engine:run", "run the engine, or go on with a run that was stopped"),
      "review": Command("engine:review", "sample for human checking; reads the verdicts back"),
      "status": Command("engine:status", "attrition, rates, cost, what is running"),
      "report": Command("engine:report", "data card and plots"),
    },
  ),
  "config": Command("config:run", "resolve configs without running them"),
  "doctor": Command("doctor:run", "versions, devices, caches, and what each extra would add"),
  "compile": Command(
    "compile:run",
    "compile the training step for hardware that is not here",
    "Exit code 3: it does not fit.",
  ),
}
DESCRIPTION = "VideoRefer in JAX: ask about objects in a video; train and check the model."


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one `vr` command and returns its exit code."""
  try:
    try:
      return _run(argv)
    finally:
      sys.stdout.flush()  # here, not when the interpreter ends, a reader that is gone is known
  except BrokenPipeError:
    if not (gone := [stream for stream in (sys.stdout, sys.stderr) if _is_unread(stream)]):
      raise
    for stream in gone:  # the interpreter flushes what is left at its end
      os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return 141


def _is_unread(stream: IO[str]) -> bool:
  """Whether a stream is a pipe whose other end is closed."""
  try:
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
  except (AttributeError, OSError, ValueError):  # no such call on this system, no file of it
    return False


def _run(argv: Sequence[str] | None) -> int:
  args = parse(sys.argv[1:] if argv is None else argv)
  try:
    return call(args) or 0
  except InputError as error:
    print(f"vr {args.command}: {error}", file=sys.stderr)
    return 2
  except BrokenPipeError:
    raise
  except Exception:
    if _has_devices():
      raise
    print(
      f"vr {args.command}: JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')!r}: JAX has no such "
      "device here; accepted: one whose plug-in is installed (extras [tpu], [cuda]), cpu, or unset",
      file=sys.stderr,
    )
    return 2
  except KeyboardInterrupt:
    return 130


def _has_devices() -> bool:
  """Whether JAX, if it is used at all, has devices to run on."""
  if (jax := sys.modules.get("jax")) is None:
    return True
  try:
    return bool(jax.devices())
  except Exception:  # a plug-in may fail in any way
    return False


def call(args: argparse.Namespace) -> int | None:
  """Calls the command that `parse` chose."""
  values: dict[str, Any] = {
    name: read_options(args, kind) for name, kind in options_of(args.function).items()
  }
  if takes_overrides(args.function):
    values[OVERRIDES] = args.overrides
  return args.function(**values)


def parse(argv: Sequence[str]) -> argparse.Namespace:
  """The options of the command that the words name, and with them:

  command: its name, the first word. function: what to call. overrides: every `config.key=value`.

  Raises:
    SystemExit: --help, --version, or words that are not understood: code 2, the reason and the
      usage on stderr.
  """
  if list(argv) == ["--version"]:
    print(f"vr-jax {metadata.version('vr-jax')}")
    raise SystemExit(0)
  for word, value in itertools.pairwise([*argv, ""]):
    if word.startswith("--config.") and "=" not in word:
      shown = "VALUE" if not value or value.startswith("--") else shlex.quote(value)
      raise SystemExit(_complain(f"vr: {word}: write {word}={shown}"))
  overrides = [a.removeprefix("--") for a in argv if a.startswith("--config.")]
  words = [a for a in argv if not a.startswith("--config.")]
  entry: Command | Group = Group(DESCRIPTION, "COMMAND", COMMANDS)
  path = ["vr"]
  while isinstance(entry, Group):
    name = _chosen(entry, " ".join(path), words)
    entry, words = entry.commands[name], words[1:]
    path.append(name)
  return _parse(entry, path, words, overrides)


def _chosen(group: Group, prog: str, words: Sequence[str]) -> str:
  """The first word, if it is a command of the group."""
  if words and words[0] in group.commands:
    return words[0]
  parser = argparse.ArgumentParser(prog=prog, description=group.summary)
  names = parser.add_subparsers(dest="command", required=True, metavar=group.noun)
  for name, entry in group.commands.items():
    names.add_parser(name, help=entry.summary)
  if words and not words[0].startswith("-"):
    hint = nearest(words[0], group.commands) or f"; accepted: {', '.join(group.commands)}"
    _refuse(parser, f"unknown command {words[0]!r}{hint}")
  if words and words[0] not in ("-h", "--help"):
    _refuse(parser, f"unknown option {words[0]!r}")
  parser.parse_args(words)  # prints the help, or names what is missing
  raise AssertionError("argparse has ended the process")


def _parse(
  entry: Command, path: Sequence[str], words: Sequence[str], overrides: Sequence[str]
) -> argparse.Namespace:
  function = entry.function()
  notes = [entry.note] if entry.note else []
  if takes_overrides(function):
    notes.append("Any field of the config: --config.key=value")
  parser = argparse.ArgumentParser(
    prog=" ".join(path), description=entry.summary, epilog=" ".join(notes)
  )
  kinds = options_of(function).values()
  names = ["--help", *(name for kind in kinds for name in add_options(parser, kind))]
  unknown = unknown_option(words, names)
  if unknown and not {"-h", "--help"} & set(words):
    _refuse(parser, f"unknown option {unknown!r}{nearest(unknown, names)}")
  if overrides and not takes_overrides(function):
    takers = ", ".join(_takers(COMMANDS))
    parser.error(f"--config.… belongs to vr {takers}; not to {parser.prog}")
  args = parser.parse_args(words)
  args.command, args.function, args.overrides = path[1], function, list(overrides)
  return args


def _complain(line: str) -> int:
  print(line, file=sys.stderr)
  return 2


def _takers(commands: Mapping[str, Command | Group]) -> Iterator[str]:
  """The names of the commands that take `--config.key=value`."""
  for name, entry in commands.items():
    if isinstance(entry, Group):
      yield from (f"{name} {rest}" for rest in _takers(entry.commands))
    elif takes_overrides(entry.function()):
      yield name


def _refuse(parser: argparse.ArgumentParser, reason: str) -> None:
  parser.exit(2, f"{parser.prog}: {reason}\n{parser.format_usage()}")


if __name__ == "__main__":
  sys.exit(main())
