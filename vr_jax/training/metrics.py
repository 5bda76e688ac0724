"""What a run reports: JSON lines always, TensorBoard, and progress on the terminal."""

import json
import os
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import rich.console
import rich.progress

from vr_jax.training.tensorboard import EventWriter


class MetricsWriter:
  """Appends to W/metrics.jsonl (one object a line, with `step`) and to W/tensorboard.

  Made for step `first_step`, it forgets what was written for later steps: a run that was killed
  after its last checkpoint does them again.
  """

  def __init__(self, workdir: Path | str, first_step: int = 0):
    path = Path(workdir) / "metrics.jsonl"
    if path.exists():
      _forget_after(path, first_step)
    self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
    self._events = EventWriter(Path(workdir) / "tensorboard", first_step)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Writes numbers (floats in full precision) of one finished step."""
    self._file.write(json.dumps({"step": step, **values}) + "\n")
    self._file.flush()
    self._events.scalars(step, values)

  def close(self) -> None:
    self._file.close()
    self._events.close()

  def __enter__(self) -> "MetricsWriter":
    return self

  def __exit__(self, *_) -> None:
    self.close()


def read_metrics(workdir: Path | str) -> list[dict[str, Any]]:
  """The lines of W/metrics.jsonl; one that a kill cut short is left out."""
  lines = (Path(workdir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
  return [entry for line in lines if (entry := _parse(line)) is not None]


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


def resident_gb() -> float:
  """Memory of this process now, in 1e9 bytes (its peak where the system does not tell)."""
  try:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9
  except OSError:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _forget_after(path: Path, step: int) -> None:
  kept = [
    line
    for line in path.read_text(encoding="utf-8").splitlines()
    if (entry := _parse(line)) is not None and entry["step"] <= step
  ]
  # Replaced in one go, so that a kill here loses nothing.
  new = path.with_suffix(".jsonl.new")
  new.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
  new.replace(path)


def _parse(line: str) -> dict[str, Any] | None:
  try:
    return json.loads(line)
  except json.JSONDecodeError:
    return None
