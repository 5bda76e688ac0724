"""`vr sweep`: the members of a config's `sweep(add)`, trained, evaluated and set side by side.

A sweep is a config file with one function more, in big_vision's style, and an optional second one:

    def sweep(add, arg=None):            # each add(...) is a member
      for lr in (1e-3, 1e-4):
        add(lr=lr, **{"input.masks": "single"}, **vr_jax.configs.arg(tokens=4))

    def metrics(arg=None):               # what is measured of each: {name: arguments of vr eval}
      return {"single": ("bench-q", "--data", "set", "--mode", "single")}

`add` takes fields of the config; `arg(...)` gives arguments of `get_config`, after those of the
sweep itself. W/<name>/ is the work directory of a member, W/<name>/<metric>/ a run of `vr eval`:

W/<name>/log.txt      what its commands printed
W/<name>/done.json    its commands, when the last of them has ended well
W/<name>/failed.json  the command that did not, and its last line
W/budget.json         who goes on after which step (config.sweep_budget)
W/sweep.md, .html, .tex   the tables (and plots) of all members, see sweep_table.py

A name holds neither a comma nor a blank, so that a member is given as the weights of another run:
`--config F.py:init=W/lr=0.02+b1=0.5`.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import inspect
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipes.errors import InputError
from vr_jax.configs import (
  fault_in,
  find_config,
  load_config,
  load_module,
  normalized,
  split_spec,
)
from vr_jax.evaluation.benchmarks.registry import benchmark
from vr_jax.evaluation.results import write
from vr_jax.search import survivors
from vr_jax.training.metrics import read_metrics

TAKEN = ("checkpoints", "frozen", "tensorboard", "heartbeat", "profile", "ema")  # by `vr train`
LONGEST = 60  # letters of a member's name
_DEVICES = re.compile(r"--(gpu|gres|tres|exclusive|cpus-per-gpu|mem-per-gpu|constraint)|-[GC]")
STOPPED = 143  # what `vr train` ends with when it was told to stop


@dataclasses.dataclass(frozen=True)
class Member:
  """One run of a sweep.

  name: of its folder. title: what was added, from which the name is made. group: the same without
  the seed, which those that differ in it alone have in common. spec: the config with its arguments.
  overrides: "config.key=value". metrics: see the module.
  """

  name: str
  title: str
  group: str
  spec: str
  overrides: tuple[str, ...]
  metrics: Mapping[str, Sequence[str]]

  def commands(self, workdir: Path) -> list[list[str]]:
    """Arguments of `vr`, in order; each goes on where it was stopped."""
    home = workdir / self.name
    train = ["train", "--config", self.spec, "--workdir", str(home)]
    out = [train + [f"--{override}" for override in self.overrides]]
    for name, args in self.metrics.items():
      run = str(home / name)
      out.append(["eval", *args, "--checkpoint", str(home), "--out", run])
      out.append(["score", args[0], run])
    return out


def read_sweep(spec: str, seeds: int = 1) -> list[Member]:
  """The members of a sweep: its names are what was added, and `seed=` where there are several.

  A long name is cut and ends in a hash of what was added; so does one that another member has.

  Raises:
    InputError: no sweep in the file, a member added twice, a member whose config does not
      resolve, a metric that is not one of `vr eval`.
  """
  name, spec_arg = split_spec(spec)
  path = find_config(name)
  module = load_module(path)
  if not callable(getattr(module, "sweep", None)):
    raise InputError(f"{path}: the file defines no sweep(add)")
  added: list[dict[str, Any]] = []
  _call(path, module.sweep, spec_arg, lambda **values: added.append(values))
  if not added:
    raise InputError(f"{path}: sweep(add) added nothing")
  metrics = _call(path, module.metrics, spec_arg) if hasattr(module, "metrics") else {}
  for key, args in metrics.items():
    if re.search(r"[^\w.-]", key) or not args or key in TAKEN:
      raise InputError(
        f"{path}: metrics: {key!r}: {args!r}; accepted: a name, arguments of vr eval"
      )
    benchmark(args[0])
  members: dict[str, Member] = {}  # by name, upper and lower case alike, as some disks have it
  identities: set[str] = set()
  for values in added:
    arg = values.pop("config_arg", "")
    values = {key: normalized(value, f"config.{key}") for key, value in values.items()}
    member_spec = _with_arg(path, spec_arg, arg)
    base = load_config(member_spec, _overrides(values))
    for n in range(seeds):
      both = {**values, "seed": base.seed + n} if seeds > 1 else values
      title, group = (_title(arg, fields) for fields in (both, {**both, "seed": None}))
      identity = repr((arg, sorted(both.items())))
      if identity in identities:
        raise InputError(f"{path}: sweep(add) added {title} twice")
      identities.add(identity)
      name = _folder_name(title)
      if name.lower() in members or len(name) > LONGEST:
        name = _folder_name(title, identity)
      load_config(member_spec, _overrides(both))
      overrides = _overrides(both)
      members[name.lower()] = Member(name, title, group, member_spec, overrides, dict(metrics))
  return list(members.values())


def _title(arg: str, fields: Mapping[str, Any]) -> str:
  """What was added, in words; a seed of None is left out."""
  words = [
    f"{key.rpartition('.')[2]}={v}" for key, v in fields.items() if key != "seed" or v is not None
  ]
  return ",".join([*filter(None, [arg]), *words]) or "base"


def adopt(members: Sequence[Member], workdir: Path) -> None:
  """Gives the folders of members that an older version named the names of today."""
  for member in members:
    old = workdir / re.sub(r"[^\w.,=+-]+", "_", member.title, flags=re.ASCII)
    with contextlib.suppress(OSError):  # too long for a name: such a one never was
      if old.name != member.name and old.is_dir() and not (workdir / member.name).exists():
        old.rename(workdir / member.name)


def _folder_name(title: str, identity: str = "") -> str:
  """A title as the name of a folder; with an identity cut, and told from others by its hash."""
  name = re.sub(r"[^\w.,=+-]+", "_", title, flags=re.ASCII).replace(",", "+")
  if not identity:
    return name
  return f"{name[: LONGEST - 9]}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"


def run_member(
  member: Member,
  workdir: Path,
  watch: Callable[[subprocess.Popen | None], None] = lambda p: None,
  until: int | None = None,
) -> int:
  """Runs what is left of a member's commands; the exit code of the one that failed, or 0.

  `watch` is told the process that runs, and None when it has ended. With `until` the member is
  trained to that step alone.
  """
  home, commands = workdir / member.name, member.commands(workdir)
  if until is not None:
    commands = [[*commands[0], "--until", str(until)]]
  home.mkdir(parents=True, exist_ok=True)
  (home / "failed.json").unlink(missing_ok=True)
  for command in commands:
    with open(home / "log.txt", "a+b") as log:
      log.write(f"$ vr {shlex.join(command)}\n".encode())
      log.flush()
      process = subprocess.Popen(
        [sys.executable, "-m", "vr_jax", *command], stdout=log, stderr=subprocess.STDOUT
      )
      watch(process)
      code = process.wait()
      code = 128 - code if code < 0 else code  # of a signal, as a shell tells it
      watch(None)
    if code:
      if code not in (STOPPED, 130):
        failure = {"command": command, "code": code, "line": _last_line(home / "log.txt")}
        write(home / "failed.json", json.dumps(failure, indent=2) + "\n")
      return code
  if until is None:
    write(home / "done.json", json.dumps(commands, indent=2) + "\n")
  return 0


def unfinished(members: Sequence[Member], workdir: Path) -> list[Member]:
  """The members that have not ended well, or did so with other commands."""

  def done(member: Member) -> bool:
    file = workdir / member.name / "done.json"
    return file.is_file() and json.loads(file.read_text()) == member.commands(workdir)

  return [member for member in members if not done(member)]


def run_local(
  members: Sequence[Member],
  workdir: Path,
  jobs: int,
  say: Callable[[str], None],
  near: Callable[[int], None] = lambda number: None,
  until: int | None = None,
) -> list[int]:
  """Runs members in processes of this machine, `jobs` at a time; their exit codes.

  One that fails does not stop the others. SIGTERM, SIGHUP, Ctrl-C and SIGUSR1 stop all, which save;
  `near` is told of SIGUSR1.
  """
  running: dict[int, subprocess.Popen] = {}
  stopping = threading.Event()

  def stop(number: int, frame: Any) -> None:
    stopping.set()
    if number == signal.SIGUSR1:
      near(number)
    for process in list(running.values()):
      process.terminate()

  def one(index: int) -> int:
    member = members[index]

    def watch(process: subprocess.Popen | None) -> None:
      if process is None:
        running.pop(index, None)
      else:
        running[index] = process
        if stopping.is_set():
          process.terminate()

    if stopping.is_set():
      return STOPPED
    say(f"{member.name}: {workdir / member.name / 'log.txt'}")
    code = run_member(member, workdir, watch, until)
    ended = {0: "done" if until is None else f"at step {until}", STOPPED: "stopped"}.get(
      code, f"failed with exit code {code}"
    )
    say(f"{member.name}: {ended}")
    return code

  with _handled(stop), concurrent.futures.ThreadPoolExecutor(jobs) as pool:
    return list(pool.map(one, range(len(members))))


def run_budget(
  members: Sequence[Member], workdir: Path, jobs: int, say: Callable[[str], None]
) -> list[int]:
  """Runs members by `config.sweep_budget`: after each number of steps the best of them go on.

  Who goes on is written once (W/budget.json). A call that was stopped is repeated: members that are
  as far have nothing to do.
  """
  budget = load_config(members[0].spec, members[0].overrides).sweep_budget
  for until in budget.steps:
    going = [member for member in members if not dropped_at(member, workdir)]
    if str(until) in (chosen := _chosen(workdir)):
      continue
    codes = run_local(going, workdir, jobs, say, until=until)
    if any(codes):
      return codes
    values = {m.name: metric_at(workdir / m.name, budget.metric, until) for m in going}
    best = survivors(values, budget.keep, smaller=budget.metric.endswith("loss"))
    if not best:
      raise InputError(
        f"config.sweep_budget: no member has {budget.metric} by step {until}; accepted: a metric "
        "of config.evals that is due by then"
      )
    write(workdir / "budget.json", json.dumps({**chosen, str(until): best}, indent=2) + "\n")
    say(f"after {until} steps {len(best)} of {len(going)} members go on: {', '.join(best)}")
  left = [member for member in members if not dropped_at(member, workdir)]
  return run_local(unfinished(left, workdir), workdir, jobs, say)


def dropped_at(member: Member, workdir: Path) -> int:
  """The steps after which `run_budget` dropped a member; 0 if it did not."""
  chosen = _chosen(workdir)
  return min((int(steps) for steps, best in chosen.items() if member.name not in best), default=0)


def _chosen(workdir: Path) -> dict[str, list[str]]:
  file = workdir / "budget.json"
  return json.loads(file.read_text()) if file.is_file() else {}


def metric_at(home: Path, metric: str, step: int) -> float | None:
  """The last value of a metric up to a step; None if there is none."""
  lines = read_metrics(home) if (home / "metrics.jsonl").is_file() else []
  values = [line[metric] for line in lines if line.get(metric) is not None and line["step"] <= step]
  return values[-1] if values else None


@contextlib.contextmanager
def _handled(stop: Callable) -> Iterator[None]:
  numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
  main = threading.current_thread() is threading.main_thread()
  before = {number: signal.signal(number, stop) for number in numbers} if main else {}
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def slurm_commands(
  spec: str, members: Sequence[Member], workdir: Path, options: Sequence[str], seeds: int
) -> list[list[str]]:
  """`sbatch` of each member; what it wraps is `vr sweep` with `--only`.

  Slurm sends it SIGUSR1 before the time limit: it saves, and `queue_again` has it go on.

  Raises:
    InputError: options that ask for several nodes.
  """
  _refuse_nodes(options)
  lead = f"--signal=B:USR1@{_lead_seconds(options)}"
  again = ["vr", "sweep", spec, "--workdir", str(workdir), "--seeds", str(seeds)]
  return [
    [
      "sbatch", "--parsable", "--requeue", "--open-mode=append", lead,
      f"--job-name={job_name(member, workdir)}", f"--output={workdir / member.name / 'slurm.log'}",
      *options, f"--wrap={shlex.join(['exec', *again, '--only', member.name])}",
    ]
    for member in members
  ]  # fmt: skip


def _given(options: Sequence[str], long: str, short: str) -> str | None:
  """The value of an option of sbatch in any of its spellings; None if it is not given."""
  for word, value in itertools.pairwise([*options, ""]):
    if word in (f"--{long}", f"-{short}"):
      return value
    for start in (f"--{long}=", f"-{short}"):
      if word.startswith(start) and not word.startswith("--" if start[1] != "-" else "---"):
        return word.removeprefix(start)
  return None


def _refuse_nodes(options: Sequence[str]) -> None:
  nodes = _given(options, "nodes", "N")
  if nodes not in (None, "1"):
    raise InputError(
      f"--slurm: --nodes {nodes}: a member is one process on one node, the others would be idle; "
      "accepted: 1 node, or launch/slurm.sh for each of the commands of --via print"
    )


def _lead_seconds(options: Sequence[str]) -> int:
  """Seconds before the time limit at which a member saves: 300, or a quarter of a short limit."""
  limit = _given(options, "time", "t") or ""
  days, dash, rest = limit.rpartition("-")
  parts = rest.split(":")
  if not all(part.isdecimal() for part in parts) or not (days or "0").isdecimal():
    return 300
  # MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS; behind DAYS-: HOURS, HOURS:MINUTES, …
  units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
  seconds = sum(int(n) * unit for n, unit in zip(parts, units, strict=False))
  return max(1, min(300, (int(days or 0) * 86_400 + seconds) // 4))


def queue_again(code: int, near: bool) -> None:
  """Has Slurm queue this job again where it stopped a member: at its time limit, or by preemption.

  Args:
    code: what the member ended with. near: Slurm has said that the time limit is near.
  """
  job = os.environ.get("SLURM_JOB_ID")
  if not job or code != STOPPED:
    return
  if near or re.search(r" PreemptTime=\d", _slurm(["scontrol", "show", "job", job])):
    _slurm(["scontrol", "requeue", job])


def job_name(member: Member, workdir: Path) -> str:
  return f"{workdir.resolve().name}/{member.name}"


def run_slurm(
  spec: str, members: Sequence[Member], workdir: Path, options: Sequence[str], seeds: int
) -> list[str]:
  """Queues the members that are not in the queue yet; the numbers of their jobs.

  The table is made by a job that waits for them.

  Raises:
    InputError: no Slurm here, or it refuses a job.
  """
  listed = _slurm(["squeue", "--me", "--noheader", "--format=%j"]).splitlines()
  members = [m for m in members if job_name(m, workdir) not in {line.strip() for line in listed}]
  numbers = []
  for member, command in zip(
    members, slurm_commands(spec, members, workdir, options, seeds), strict=True
  ):
    (workdir / member.name).mkdir(parents=True, exist_ok=True)
    numbers.append(_slurm(command).strip().partition(";")[0])
  if numbers:
    table = ["vr", "sweep", spec, "--workdir", str(workdir), "--seeds", str(seeds), "--table"]
    after = f"--dependency=afterany:{':'.join(numbers)}"
    log = f"--output={workdir / 'table.log'}"
    _slurm(["sbatch", after, log, *_for_the_table(options), f"--wrap={shlex.join(table)}"])
  return numbers


def _for_the_table(options: Sequence[str]) -> list[str]:
  """The options of a job that needs no device: without those that ask for one or for a node."""
  kept: list[str] = []
  for word, before in zip(options, ["", *options], strict=False):
    value = not word.startswith("-") and _DEVICES.match(before) and "=" not in before
    if not value and not _DEVICES.match(word):
      kept.append(word)
  return kept


def _slurm(command: Sequence[str]) -> str:
  try:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
  except FileNotFoundError:
    raise InputError(f"--via slurm: no {command[0]} here; accepted: local, print") from None
  except subprocess.CalledProcessError as error:
    reason = " ".join(error.stderr.split())
    raise InputError(f"--via slurm: {command[0]} ended with {error.returncode}: {reason}") from None


# --- Reading the file.


def _call(path: Path, function: Callable, arg: str | None, *args: Any) -> Any:
  """`function(*args)` of a config file, with the sweep's argument where it takes one more."""
  takes = len(inspect.signature(function).parameters) > len(args)
  try:
    return function(*args, arg) if takes else function(*args)
  except InputError as error:
    raise InputError(f"{path.name}: {error}") from error
  except Exception as error:
    raise fault_in(path, error) from error


def _with_arg(path: Path, *args: str | None) -> str:
  joined = ",".join(filter(None, args))
  return f"{path}:{joined}" if joined else str(path)


def _overrides(values: Mapping[str, Any]) -> tuple[str, ...]:
  return tuple(f"config.{key}={value}" for key, value in values.items())


def _last_line(log: Path) -> str:
  lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
  return next((line.strip() for line in reversed(lines) if line.strip()), "")[:300]
