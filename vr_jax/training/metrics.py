"""What a run reports: JSON lines always, TensorBoard, progress, where the time went, traces."""

import json
import logging
import math
import os
import re
import resource
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax
import rich.console
import rich.progress

from data_pipes.errors import InputError, one_line
from data_pipes.files import JsonLines, read_json_lines, replaced, write_text
from vr_jax.compiling import compile_seconds
from vr_jax.training.tensorboard import EventWriter

log = logging.getLogger(__name__)


class MetricsWriter:
  """Appends to W/metrics.jsonl (one object a line, with `step`) and to W/tensorboard.

  Made for step `first_step`, it forgets what was written for later steps: a run that was killed
  after its last checkpoint does them again. (Weights & Biases keeps the first numbers of a step;
  they are the same.) Lines that are damaged are left out; the file as it was stays beside it.

  Args:
    wandb: project there to which the numbers go too; "": none.
    config: what Weights & Biases shows of the run.

  Raises:
    InputError: Weights & Biases is asked for and not installed, or does not let the run in.
  """

  def __init__(
    self,
    workdir: Path | str,
    first_step: int = 0,
    wandb: str = "",
    config: Mapping[str, Any] | None = None,
  ):
    self._wandb = _wandb_run(wandb, Path(workdir), config) if wandb else None
    file = Path(workdir) / "metrics.jsonl"
    _set_damage_aside(file)
    self._lines = JsonLines(
      file,
      key=lambda line: line["step"],
      keep=lambda line: line["step"] <= first_step,
    )
    self._events = EventWriter(Path(workdir) / "tensorboard", first_step)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Writes numbers (floats in full precision) of one finished step; what is no number as null."""
    numbers = {name: value for name, value in values.items() if math.isfinite(value)}
    self._lines.add({"step": step, **dict.fromkeys(values), **numbers})
    self._events.scalars(step, values)
    if self._wandb:
      self._wandb.log(numbers, step=step)

  def close(self) -> None:
    self._lines.close()
    self._events.close()
    if self._wandb:
      self._wandb.finish()

  def __enter__(self) -> "MetricsWriter":
    return self

  def __exit__(self, *_) -> None:
    self.close()


def _set_damage_aside(file: Path) -> None:
  """Keeps the lines of a metrics file that can be read, where there are others too."""
  try:
    lines = file.read_bytes().split(b"\n")
  except OSError:  # none, or none that can be read: writing says which
    return
  kept = [line for line in lines if not line.strip() or _is_step(line)]
  if kept[:-1] != lines[:-1]:  # what a kill cut off is no damage
    aside = file.with_name("metrics.damaged.jsonl")
    log.warning("%s: damaged lines are left out; the file as it was is %s", file, aside.name)
    shutil.copyfile(file, aside)
    with replaced(file) as part:
      part.write_bytes(b"".join(line + b"\n" for line in kept if line.strip()))


def _is_step(line: bytes) -> bool:
  try:
    return isinstance(json.loads(line.decode()).get("step"), int)
  except (ValueError, AttributeError):
    return False


def _wandb_run(project: str, workdir: Path, config: Mapping[str, Any] | None) -> Any:
  """The run of this work directory, which a resumed one goes on with."""
  try:
    import wandb
  except ImportError:
    raise InputError(
      f"config.wandb={project!r}: wandb is not installed; pip install 'vr-jax[wandb]'"
    ) from None
  try:
    return wandb.init(
      project=project,
      id=_wandb_id(workdir / "wandb_id"),
      name=workdir.name,
      dir=workdir,
      config=config,
      resume="allow",
      settings=wandb.Settings(silent=True),
    )
  except (wandb.errors.Error, OSError) as error:
    raise InputError(f"config.wandb={project!r}: {one_line(error)}") from error


def _wandb_id(file: Path) -> str:
  """The run's name there; a new one where none is kept, or something else."""
  name = file.read_bytes() if file.is_file() else b""
  if not re.fullmatch(rb"[0-9a-zA-Z_-]{1,64}", name):
    name = uuid.uuid4().hex[:16].encode()
    write_text(file, name.decode())
  return name.decode()


def read_metrics(workdir: Path | str) -> list[dict[str, Any]]:
  """The lines of W/metrics.jsonl; one that a kill cut short is left out."""
  return read_json_lines(Path(workdir) / "metrics.jsonl")


class Progress:
  """A bar with the time left on a terminal, otherwise lines, on stderr."""

  def __init__(self, total: int, first: int = 0, stream: TextIO | None = None):
    self._total, self._first = total, first
    self._stream = stream or sys.stderr
    self._started: tuple[int, float] | None = None
    self._bar = None
    if self._stream.isatty():
      self._bar = rich.progress.Progress(
        rich.progress.TextColumn("step"),
        rich.progress.MofNCompleteColumn(),
        rich.progress.BarColumn(),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("{task.fields[shown]}"),
        console=rich.console.Console(file=self._stream),
      )
      self._task = self._bar.add_task("train", total=total, completed=first, shown="compiling")
      self._bar.start()

  def update(self, step: int, values: Mapping[str, float], line: bool) -> None:
    """Step `step` is done; `line` asks for a log line where there is no bar."""
    shown = f"loss {values['loss']:.4f}  lr {values['lr']:.2e}"
    if "tokens_per_second" in values:
      shown += f"  {values['tokens_per_second']:.0f} tok/s"
    if "mfu" in values:
      shown += f"  MFU {values['mfu']:.1%}"
    if self._bar:
      self._bar.update(self._task, completed=step, shown=shown)
    elif line:
      left = self._time_left(step)
      self.say(f"step {step}/{self._total}  {shown}{f'  {left} left' if left else ''}")
    if self._started is None:  # the first step compiles and would spoil the estimate
      self._started = (step, time.monotonic())

  def say(self, text: str) -> None:
    """A line that stays."""
    if self._bar:
      self._bar.console.print(text, markup=False, highlight=False)
    else:
      print(text, file=self._stream, flush=True)

  def close(self) -> None:
    if self._bar:
      self._bar.stop()

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def _time_left(self, step: int) -> str:
    if self._started is None or step == self._started[0]:
      return ""
    per_step = (time.monotonic() - self._started[1]) / (step - self._started[0])
    minutes, seconds = divmod(round(per_step * (self._total - step)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


class Ledger:
  """Where the wall time of this process went, in seconds.

  Waiting for input and for checkpoints is timed, and so are evaluations; compiling is what JAX says
  it took, wherever that was, and the rest is the step's.
  """

  def __init__(self):
    self._began, self._compiled = time.perf_counter(), compile_seconds()
    self._parts = {"input": 0.0, "checkpoint": 0.0, "eval": 0.0}

  def timed(self, part: str, fn: Callable, *args: Any) -> Any:
    """Calls `fn`, counting its time as "input", "checkpoint" or "eval"."""
    start, compiled = time.perf_counter(), compile_seconds()
    result = fn(*args)
    self._parts[part] += time.perf_counter() - start - (compile_seconds() - compiled)
    return result

  def seconds(self) -> dict[str, float]:
    """So far: step, input, checkpoint, eval, compile."""
    known = {**self._parts, "compile": compile_seconds() - self._compiled}
    step = time.perf_counter() - self._began - sum(known.values())
    return {"step": max(step, 0.0), **known}


class Profiler:
  """Traces the steps from `window[0]` to `window[1]` (from 1) to a folder; none where it is ().

  Raises:
    InputError: a window that is neither.
  """

  def __init__(self, window: Sequence[int], folder: Path):
    pair = [n for n in window if isinstance(n, int) and n > 0]
    if window and (len(window) != 2 or len(pair) != 2 or pair[0] > pair[1]):
      raise InputError(f"config.profile_steps={window!r}: accepted: (first, last), from 1, or ()")
    self._window, self._folder, self._running = tuple(window), folder, False

  def before(self, step: int, wait: Callable[[], None]) -> None:
    """Step `step` is about to be drawn; `wait` waits for the one before it."""
    if self._running and step > self._window[1]:
      wait()
      self.close()
    if self._window and step == self._window[0]:
      wait()
      jax.profiler.start_trace(self._folder)
      self._running = True

  def close(self) -> None:
    if self._running:
      jax.profiler.stop_trace()
      self._running = False

  def __enter__(self) -> "Profiler":
    return self

  def __exit__(self, *_) -> None:
    self.close()


def resident_gb() -> float:
  """Memory of this process now, in 1e9 bytes (its peak where the system does not tell)."""
  try:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9
  except OSError:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
