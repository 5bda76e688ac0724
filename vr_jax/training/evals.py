"""How good a run is while it trains: `config.evals`, and the end that their numbers may bring.

An evaluation is either the loss on held-out files or a benchmark (questions.py). Both run on the
run's mesh with the parameters where the step left them; every process takes part and has the same
numbers in the end, `eval/<name>/<metric>`, which go where the metrics of a step go.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from data_pipes.errors import InputError
from vr_jax.params import Params, merge
from vr_jax.sharding import batch_sharding
from vr_jax.training.batches import Kept, on_mesh
from vr_jax.training.questions import Questions
from vr_jax.training.step import TrainState
from vr_jax.training.task import Rows, Task, make_task

ROWS = 16  # the least that an evaluation works on at a time, where the config does not say


class Evaluation(Protocol):
  """One entry of `config.evals`."""

  def __call__(self, state: TrainState) -> dict[str, float]:
    """Its numbers by name, the same in all processes."""
    ...


@dataclasses.dataclass
class EarlyStop:
  """Ends a run whose metric has not become better in `patience` evaluations in a row.

  `best` and `worse` (evaluations since the best) are kept in the checkpoint.
  """

  metric: str | None
  patience: int
  best: float | None = None
  worse: int = 0

  @property
  def reached(self) -> bool:
    return self.metric is not None and self.worse >= self.patience

  def add(self, values: Mapping[str, float]) -> None:
    """Raises InputError: the evaluation that the metric is of does not give it."""
    if self.metric is None:
      return
    name = self.metric.rpartition("/")[0] + "/"
    given = [key for key in values if key.startswith(name)]
    if not given:
      return  # another evaluation's turn
    if self.metric not in values:
      raise InputError(
        f"config.early_stop.metric={self.metric!r}: accepted: {', '.join(sorted(given))}"
      )
    value = values[self.metric]
    better = self.best is None or is_better(self.metric, value, self.best)
    self.best, self.worse = (value, 0) if better else (self.best, self.worse + 1)


def is_better(metric: str, value: float, best: float) -> bool:
  """Whether a value of a metric is: a smaller loss, more of anything else; NaN never."""
  return value < best if metric.endswith("loss") else value > best


class Evals:
  """All evaluations of a run, and when they are due."""

  def __init__(
    self,
    config: ConfigDict,
    entries: Mapping[str, Evaluation],
    total: int,
    before: Mapping[str, Any] | None = None,
  ):
    """`before`: what `counts` gave when the run that goes on was saved."""
    before = before or {}
    self._entries, self._total = entries, total
    self._every = {name: config.evals[name].every for name in entries}
    self._last: dict[str, int] = dict(before.get("last", {}))
    self._stop = EarlyStop(
      config.early_stop.metric,
      config.early_stop.patience,
      before.get("best"),
      before.get("worse", 0),
    )

  @property
  def ended(self) -> bool:
    """Whether the run has learned what it will (`config.early_stop`)."""
    return self._stop.reached

  def due(self, step: int) -> list[str]:
    """The evaluations of the state after `step` steps that have not been done."""
    return [
      name
      for name, every in self._every.items()
      if step and (step % every == 0 or step == self._total) and self._last.get(name) != step
    ]

  def run(self, step: int, state: TrainState) -> dict[str, float]:
    """The numbers of those that are due after `step` steps."""
    values: dict[str, float] = {}
    for name in self.due(step):
      values |= {f"eval/{name}/{key}": value for key, value in self._entries[name](state).items()}
      self._last[name] = step
    self._stop.add(values)
    return values

  def counts(self) -> dict[str, Any]:
    """What a run that goes on has to know: JSON, the same in all processes."""
    return {"last": self._last, "best": self._stop.best, "worse": self._stop.worse}


def make_evals(
  config: ConfigDict, task: Task, mesh: Mesh, micro_rows: int, total: int, before: Any = None
) -> Evals:
  """The evaluations of a config; what they ask is read here, before the first step.

  Args:
    micro_rows: global rows that the step works on at a time.

  Raises:
    InputError: an entry that cannot be evaluated, naming it.
  """
  entries: dict[str, Evaluation] = {}
  for name in config.evals:
    options = config.evals[name]
    rows = options.get("rows") or max(micro_rows, ROWS)
    rows = -(-rows // mesh.size) * mesh.size
    try:
      if options.get("files"):
        entries[name] = HeldOut(_held_out_task(config, options, rows), config, mesh, rows, options)
      else:
        entries[name] = Questions(config, task, mesh, rows, options)
    except InputError as error:
      raise InputError(f"config.evals.{name}: {error}") from error
  return Evals(config, entries, total, before)


def _held_out_task(config: ConfigDict, options: ConfigDict, rows: int) -> Task:
  """The run's task on other files: each sample once and in order, a row each where that is free."""
  held_out = config.copy_and_resolve_references().unlock()
  held_out.loss_budget = 0
  held_out.total_steps = held_out.total_examples = None
  held_out.total_epochs = 1.0
  given = held_out.input
  given.files, given.media = options.files, options.get("media") or given.media
  given.shuffle, given.weights, given.features, given.buckets = False, (), (), ()
  given.batch_size, given.accum_steps = rows, 1
  for name in ("frames", "clips", "objects", "object_frames", "length"):
    given[f"row_{name}"] = 0
  return make_task(held_out.lock())


class HeldOut:
  """The loss on held-out files: the mean over their supervised tokens.

  `loss_low` and `loss_high` hold 95 % of such samples of rows (the ratio's linearised standard
  error); `n` counts the rows with a supervised token.
  """

  def __init__(self, task: Task, config: ConfigDict, mesh: Mesh, rows: int, options: ConfigDict):
    size = min(task.data_size, options.get("limit") or task.data_size)
    self._sharding = batch_sharding(mesh, config.sharding_rules)
    whole = NamedSharding(mesh, P())

    def losses(params_train: Params, params_frozen: Params, batch: Any) -> Any:
      sums = task.loss(merge(params_train, params_frozen), batch)
      if sums.rows is None:  # a loss that does not say more: the batch stands for its rows
        return sums.sum[None], sums.weight[None]
      return sums.rows

    self._losses = jax.jit(losses, out_shardings=(whole, whole))

    def read() -> Iterator[Rows]:
      count = -(-size // rows)
      for k, batch in zip(range(count), task.batches(0, count), strict=False):
        local = len(batch["supervised"])
        numbers = k * rows + np.arange(local) * jax.process_count() + jax.process_index()
        yield batch | {"supervised": batch["supervised"] & (numbers < size)[:, None]}

    self._batches = Kept(read)

  def __call__(self, state: TrainState) -> dict[str, float]:
    parts = [
      self._losses(state.params_train, state.params_frozen, on_mesh(batch, self._sharding))
      for batch in self._batches
    ]
    sums, weights = (np.concatenate([np.asarray(p[i], np.float64) for p in parts]) for i in (0, 1))
    return mean_of_ratio(sums, weights)


def mean_of_ratio(sums: np.ndarray, weights: np.ndarray) -> dict[str, float]:
  """`loss`, its 95 % interval and `n`, from the sum and the weight of each row."""
  sums, weights = sums[weights > 0], weights[weights > 0]
  n = len(sums)
  if not n:
    raise InputError("the held-out files have no supervised token; accepted: at least one answer")
  mean = float(sums.sum() / weights.sum())
  values = {"loss": mean, "n": n}
  if n > 1:
    spread = np.square(sums - mean * weights).sum() * n / (n - 1)
    error = 1.96 * math.sqrt(spread) / float(weights.sum())
    values |= {"loss_low": mean - error, "loss_high": mean + error}
  return values
