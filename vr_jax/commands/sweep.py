"""`vr sweep`: the members of a config's sweep, run and set side by side (vr_jax/sweep.py)."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from data_pipes.errors import InputError, nearest
from data_pipes.files import locked

if TYPE_CHECKING:
  from vr_jax.sweep import Member


@dataclass(frozen=True)
class Sweep:
  config: str = field(
    metadata={
      "positional": True,
      "help": "a config file with sweep(add)",
      "metavar": "F.py[:ARGS]",
    }
  )
  workdir: str | None = field(default=None, metadata={"help": "default: sweeps/F"})
  via: Literal["local", "slurm", "print"] = field(
    default="local", metadata={"help": "processes here (default), Slurm jobs, or commands to read"}
  )
  jobs: int = field(default=1, metadata={"help": "members at a time (local)", "metavar": "N"})
  seeds: int = field(default=1, metadata={"help": "of every member", "metavar": "N"})
  slurm: str = field(
    default="", metadata={"help": "of sbatch, in one string", "metavar": "OPTIONS"}
  )
  only: str | None = field(
    default=None, metadata={"help": "one member, without the table", "metavar": "NAME"}
  )
  table: bool = field(default=False, metadata={"help": "the table alone, of what is there"})
  baseline: str = field(
    default="",
    metadata={
      "help": "the member that the others are compared with (the first)",
      "metavar": "NAME",
    },
  )


def run(options: Sweep) -> int:
  """Returns 0, or the exit code of the first member that failed or was stopped."""
  from vr_jax.addresses import local
  from vr_jax.configs import find_config, split_spec
  from vr_jax.sweep import adopt, queue_again, read_sweep, run_local, unfinished
  from vr_jax.sweep_table import write_table

  members = read_sweep(options.config, options.seeds)
  path = find_config(split_spec(options.config)[0])
  workdir = Path(local(options.workdir or f"sweeps/{path.stem}", "--workdir"))
  run = f"{options.config} {options.seeds}"
  if min(options.jobs, options.seeds) < 1:
    raise InputError("--jobs and --seeds: accepted: at least 1")
  adopt(members, workdir)
  left = unfinished(members, workdir)
  if options.via == "print":
    _print_commands(left, workdir)
    return 0
  if options.only:
    left = _only(members, left, options.only)
    near: list[int] = []  # SIGUSR1: Slurm says that the time limit is near
    with locked(workdir, run, options.only):
      code = _first_failure(run_local(left, workdir, 1, _say, near.append))
    queue_again(code, bool(near))
    return code
  codes: Sequence[int] = []
  if not options.table:
    _say(f"{workdir}: {len(members)} members, {len(left)} of them to run")
    if options.via == "local":
      with locked(workdir, run):
        codes = _run_here(members, left, workdir, options.jobs)
    else:
      with locked(workdir, run, "queueing"):  # the first members may begin meanwhile
        if _queue(options, left, workdir):
          return 0
  table, *pages = write_table(members, workdir, options.baseline)
  print(table.read_text(encoding="utf-8"), end="")
  _say(", ".join(map(str, [table, *pages])))
  return _first_failure(codes)


def _run_here(
  members: Sequence["Member"], left: Sequence["Member"], workdir: Path, jobs: int
) -> list[int]:
  from vr_jax.configs import load_config
  from vr_jax.sweep import run_budget, run_local

  if load_config(members[0].spec, members[0].overrides).sweep_budget.steps:
    return run_budget(members, workdir, jobs, _say)
  return run_local(left, workdir, jobs, _say)


def _print_commands(members: Sequence["Member"], workdir: Path) -> None:
  for member in members:
    print(f"# {member.name}")
    print("\n".join(f"vr {shlex.join(words)}" for words in member.commands(workdir)))


def _only(members: Sequence["Member"], left: Sequence["Member"], name: str) -> list["Member"]:
  """The member of this name, or none if it has ended well."""
  names = [member.name for member in members]
  if name not in names:
    raise InputError(f"--only {name}{nearest(name, names)}; members: {', '.join(names)}")
  return [member for member in left if member.name == name]


def _queue(options: Sweep, left: Sequence["Member"], workdir: Path) -> bool:
  """Gives the members to Slurm; whether there were any."""
  from vr_jax.sweep import run_slurm

  words = shlex.split(options.slurm)
  numbers = run_slurm(options.config, left, workdir, words, options.seeds)
  _say(f"jobs {', '.join(numbers) or 'none'}; the table follows them: {workdir / 'sweep.md'}")
  return bool(left)


def _first_failure(codes: Sequence[int]) -> int:
  return next((code for code in codes if code), 0)


def _say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)
