"""What a run tells of itself: its steps in the log, its steps and samples that taught nothing."""

import collections
import dataclasses
import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from data_pipes.errors import InputError
from vr_jax.configs import to_json
from vr_jax.hardware import Chip
from vr_jax.training.metrics import Ledger, MetricsWriter, Progress, resident_gb
from vr_jax.training.processes import gather
from vr_jax.training.step import Metrics, check_metrics
from vr_jax.training.task import Rows, Task

log = logging.getLogger(__name__)
_OF_CHECKS = ("overflow", "skipped")  # metrics that are not reported themselves
# Metrics of which the log has the mean over the steps since its last line, by how they begin.
_MEANS = ("loss", "grad_norm", "update_norm", "supervised_tokens", "tokens/")


@dataclasses.dataclass
class Skipped:
  """Steps that changed nothing, over the whole run; too many of them end it.

  Attributes:
    not_finite: steps whose gradient was not finite. empty: batches without a supervised token.
    in_row: skipped steps since the last that was none.
  """

  limit: int  # in a row
  share: float  # of batches without a supervised token
  not_finite: int = 0
  empty: int = 0
  in_row: int = 0

  def add(self, step: int, total: int, metrics: Mapping[str, Any], names: list[str]) -> None:
    """Counts step `step` (from 1) of `total` on the samples `names`.

    Raises:
      InputError: too many steps in a row, or too large a share of empty batches.
    """
    if not metrics["skipped"]:
      self.in_row = 0
      return
    self.in_row += 1
    shown = ", ".join(names[:16]) + (f" and {len(names) - 16} more" if names[16:] else "")
    if metrics["supervised_tokens"]:
      self.not_finite += 1
      line = (
        f"step {step}: the gradient is not finite (loss {float(metrics['loss'])}, gradient norm "
        f"{float(metrics['grad_norm'])})"
      )
      advice = "go on from the last checkpoint with a smaller config.lr, or without these samples"
    else:
      self.empty += 1
      line = (
        f"step {step}: the batch has no supervised token, so there is nothing to learn from; "
        "expected answers ('gpt' turns) that fit the row length"
      )
      advice = "mend the answers"
    line += f"; the batch holds {shown}" if shown else ""
    if self.in_row >= self.limit:
      raise InputError(
        f"{line}; {self.in_row} steps in a row have changed nothing, accepted: fewer than "
        f"config.max_skipped={self.limit}; {advice}"
      )
    if self.empty > self.share * total:
      raise InputError(
        f"{line}; {self.empty} of the {total} batches, accepted: a share up to "
        f"config.input.max_empty={self.share:g}"
      )
    log.warning("%s; the step is skipped", line)

  def counts(self) -> dict[str, int]:
    """What goes to the metrics and the checkpoint."""
    return {"not_finite_steps": self.not_finite, "empty_batches": self.empty}


class Window:
  """Means over the steps since the last line of the log, those alone that taught something."""

  def __init__(self, before: Mapping[str, Any] | None = None):
    """`before`: what `counts` gave."""
    before = before or {"steps": 0, "sums": {}}
    self._steps, self._sums = before["steps"], collections.Counter(before["sums"])

  def add(self, values: Mapping[str, float]) -> None:
    self._steps += 1
    self._sums.update({name: value for name, value in values.items() if name.startswith(_MEANS)})

  def means(self) -> dict[str, float]:
    return {name: total / self._steps for name, total in self._sums.items()}

  def counts(self) -> dict[str, Any]:
    """JSON, the same in all processes; with it a run that goes on has the means of its twin."""
    return {"steps": self._steps, "sums": dict(self._sums)}


class Report:
  """Reads a step's metrics while the next one runs; checks, logs and shows them."""

  def __init__(
    self,
    config: ConfigDict,
    task: Task,
    workdir: Path,
    first: int,
    total: int,
    chip: Chip | None,
    before: Mapping[str, Any] | None = None,
    home: Path | None = None,
  ):
    """`chip`: what the devices are; `before`: what `counts` gave when step `first` was saved.

    `home`: a folder of this machine for the log, where `workdir` is in a bucket.
    """
    self.last: dict[str, float] = {}
    self.measured: dict[str, float] = {}  # at the last step: what its line in the log holds
    self._config, self._task, self._total = config, task, total
    self._pending: tuple[int, Metrics, tuple[int, int] | None] | None = None
    before = before or {}
    self._skipped = Skipped(
      config.max_skipped,
      config.input.max_empty,
      before.get("not_finite_steps", 0),
      before.get("empty_batches", 0),
      before.get("skipped_in_row", 0),
    )
    self._window = Window(before.get("window"))
    task.failures.add_known(before.get("unreadable", ()))
    self._told = set(task.failures.known())
    self.ledger = Ledger()
    self._spent, self._since = self.ledger.seconds(), time.perf_counter()
    self._chip, self._first, self._step = chip, first, first
    self._leader = jax.process_index() == 0
    if self._leader:
      self._writer = MetricsWriter(
        home or workdir, first, config.wandb, json.loads(to_json(config))
      )
      self._progress = Progress(total, first)
      done = f"resuming after step {first} of {total}" if first else f"{total} steps"
      where = f"{jax.process_count()} x {jax.local_device_count()} {jax.devices()[0].device_kind}"
      self._progress.say(f"{workdir}: {done}, {task.data_size} examples, {where}")

  def add(self, step: int, metrics: Metrics, rows: Rows) -> None:
    """Takes the metrics of step `step` (from 1) on these host rows; reads those before them."""
    self.flush()
    self._pending = (step, metrics, self._task.work(rows) if self._task.work else None)

  def flush(self, evaluate: Callable[[], Mapping[str, float]] | None = None) -> None:
    """Waits for the step that is under way and reports it.

    Args:
      evaluate: gives numbers of the state after that step, which are reported with it.

    Raises:
      InputError: see `step.check_metrics` and `Skipped`; names what the batch holds.
    """
    logged = self._read()
    evals: Mapping[str, float] = {}
    if evaluate is not None:
      before, began = self.ledger.seconds()["eval"], time.perf_counter()
      evals = self.ledger.timed("eval", evaluate)
      self._since += time.perf_counter() - began  # which is no step's
      self._spent = self.ledger.seconds()
      evals = {**evals, "eval_seconds": self._spent["eval"] - before}
      self.measured |= evals
    if not logged and not evals:
      return
    values = {**self.last, **self._window.means()}
    self._window = Window()
    if self._leader:
      self._writer.write(self._step, {**values, **evals})
      if values:  # none before the first step of a run that goes on
        self._progress.update(self._step, values, line=logged)
      if evals:
        self._progress.say(f"step {self._step}/{self._total}  {shown(evals)}")

  def _read(self) -> bool:
    """Waits for the step that is under way; whether the log has a line of it."""
    if self._pending is None:
      return False
    step, metrics, work = self._pending
    self._step = step
    self._pending = None
    metrics = jax.device_get(metrics)
    check_metrics(step, metrics)
    names = self._task.names(step - 1, self._total) if metrics["skipped"] else []
    self._skipped.add(step, self._total, metrics, names)
    now, spent = time.perf_counter(), self.ledger.seconds()
    seconds = now - self._since
    logged = step % self._config.log_steps == 0 or step in (self._first + 1, self._total)
    if logged:
      self._share_failures()
    self.last = {
      **{k: v.item() for k, v in metrics.items() if v.ndim == 0 and k not in _OF_CHECKS},
      "seconds": seconds,
      **{f"{part}_seconds": spent[part] - self._spent[part] for part in spent if part != "step"},
      **(self._rates(*work, seconds) if work else {}),
      "epoch": step * self._config.input.batch_size / self._task.data_size,
      "rss_gb": resident_gb(),
      **self._skipped.counts(),
      **self._task.counts(),
    }
    self.measured = dict(self.last)
    self._since, self._spent = now, spent
    if not metrics["skipped"]:
      self._window.add(self.last)
    if self._leader and not logged:
      self._progress.update(step, self.last, line=False)
    return logged

  def say(self, text: str) -> None:
    """A line on the terminal."""
    if self._leader:
      self._progress.say(text)

  def counts(self) -> dict[str, Any]:
    """What a run that goes on has to know: JSON, the same in all processes."""
    self._share_failures()
    return {
      **self._skipped.counts(),
      "skipped_in_row": self._skipped.in_row,
      "unreadable": sorted(self._task.failures.known()),
      "window": self._window.counts(),
    }

  def _share_failures(self) -> None:
    """Tells the other processes which samples failed here, so that all count them all."""
    if jax.process_count() == 1:
      return
    failures = self._task.failures
    news = sorted(failures.known() - self._told)
    for text in gather(json.dumps([news, failures.last])):
      numbers, last = json.loads(text)
      failures.add_known(numbers)
      failures.last = max(failures.last, tuple(last))
    self._told = failures.known()
    failures.check()

  def _rates(self, tokens: int, flops: int, seconds: float) -> dict[str, float]:
    """Rates over all processes, as if the others' rows were like these; MFU on a known chip."""
    count = jax.process_count()
    rates = {"tokens_per_second": tokens * count / seconds}
    if self._chip:
      peak = self._chip.tflops * 1e12 * jax.device_count()
      rates["mfu"] = flops * count / seconds / peak
    return rates

  def __enter__(self) -> "Report":
    return self

  def __exit__(self, error, *_) -> None:
    if self._leader:
      spent = self.ledger.seconds()
      shares = (f"{part} {s / sum(spent.values()):.0%}" for part, s in spent.items())
      if error is None:
        self._progress.say(f"{sum(spent.values()):.0f} s: {', '.join(shares)}")
      self._progress.close()
      self._writer.close()


def shown(evals: Mapping[str, float]) -> str:
  """The numbers of evaluations in a line: those of all items that have an interval, else all."""
  parts = []
  for name, value in evals.items():
    if f"{name}_low" in evals and "/" not in name.removeprefix("eval/").partition("/")[2]:
      low, high = evals[f"{name}_low"], evals[f"{name}_high"]
      parts.append(f"{name.removeprefix('eval/')} {value:.4f} [{low:.4f}, {high:.4f}]")
  return ", ".join(parts) or ", ".join(f"{name} {value:.4f}" for name, value in evals.items())
