"""The training loop: from a config and a work directory to checkpoints, or on from what is there.

W/config.json         the resolved config; the same command resumes, another config is refused
W/checkpoints/<step>  see checkpoint.py
W/metrics.jsonl       a line per logged step, also in W/tensorboard
"""

import contextlib
import dataclasses
import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array
from ml_collections import ConfigDict

from data_pipes.errors import InputError
from vr_jax.configs import base_config, check_keys, diff, from_json, to_json
from vr_jax.sharding import batch_sharding, check_rules, make_mesh, param_shardings
from vr_jax.training.checkpoint import Checkpoints, make_meta
from vr_jax.training.metrics import MetricsWriter, Progress, resident_gb
from vr_jax.training.schedule import Optimizer, Params, count_steps, make_optimizer, merge, sub_tree
from vr_jax.training.step import Metrics, TrainState, check_metrics, make_step, micro_batches
from vr_jax.training.task import Task, make_task

# Fields that may change between the runs of one work directory: they decide where things lie and
# what is reported, not what is computed (up to the order of sums on another mesh).
MAY_CHANGE = (
  "mesh",
  "sharding_strategy",
  "sharding_rules",
  "log_steps",
  "ckpt_steps",
  "keep_ckpts",
  "keep_ckpt_steps",
  "input.threads",
  "input.media",
  "input.max_unreadable",
)


class Result(NamedTuple):
  """How a run ended: `step` optimizer steps are done and saved; `finished` unless it was stopped.

  `metrics` are those of the last step that this process made, {} if it made none.
  """

  step: int
  finished: bool
  metrics: dict[str, float]


def train(config: ConfigDict, workdir: Path | str) -> Result:
  """Trains until the config's total, or resumes what is in `workdir`.

  Precedence: the newest checkpoint in `workdir`, then `model_init`, then random initialisation.
  SIGTERM and the first Ctrl-C save and stop. Killed in any other way, the run goes on from its last
  checkpoint when started again, and ends with the same parameters, bit for bit on the same mesh.

  Raises:
    InputError: a config that does not fit, a work directory of another config, data that cannot be
      trained on.
  """
  workdir = Path(workdir)
  _check_workdir(workdir, config)
  task = make_task(config)
  check_keys(config, [*base_config(), *task.fields], "config")
  check_keys(config.input, base_config().input, "config.input")
  total = total_steps(config, task.data_size)
  mesh = make_mesh(config.mesh)
  check_rules(config.sharding_rules, mesh)
  rows_sharding = batch_sharding(mesh, config.sharding_rules, leading=1)
  parts = accum_steps(config, rows_sharding)
  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.set_mesh(mesh))
    key = jax.random.key(config.seed)
    shapes = jax.eval_shape(task.init, key)
    optimizer = make_optimizer(config, shapes, total_steps=total, data_size=task.data_size)
    target = state_target(config, shapes, optimizer, mesh)
    checkpoints = stack.enter_context(
      Checkpoints(
        workdir / "checkpoints", keep=config.keep_ckpts, keep_every=config.keep_ckpt_steps
      )
    )
    saved = checkpoints.latest_step()
    if saved is not None:
      state, position = checkpoints.restore(saved, target)
    else:
      state, position = initial_state(task, optimizer, target, key), 0
    first = int(state.step)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, target)
    train_step = make_step(
      task.loss, optimizer, accum_mean=config.accum_mean, shardings=shardings, cuts=task.cuts
    )
    if jax.process_index() == 0:
      (workdir / "config.json").write_text(to_json(config) + "\n", encoding="utf-8")
    meta = make_meta(task.model, task.tokenizer_files, task.generation, json.loads(to_json(config)))
    batches = task.batches(position, total) if first < total else iter(())
    report = stack.enter_context(Report(config, task, workdir, first, total))
    stopped = stack.enter_context(stop_signals(checkpoints))

    for step in range(first, total):
      stop = stopped(step)
      # Save, then draw: drawing moves the position, which must be that of the saved state.
      if stop or (step % config.ckpt_steps == 0 and step > first):
        report.flush()
        checkpoints.save(state, position, meta)
      if stop:
        return Result(step, False, report.last)
      rows = report.timed(next, batches)
      rows = micro_batches(rows, parts)
      rows = {k: jax.make_array_from_process_local_data(rows_sharding, v) for k, v in rows.items()}
      position += 1
      state, metrics = train_step(state, rows)
      report.add(step + 1, metrics)
    report.flush()
    checkpoints.save(state, position, meta)
    return Result(total, True, report.last)


def total_steps(config: ConfigDict, data_size: int) -> int:
  """Optimizer steps of the whole run, from total_{steps,examples,epochs}; rounded up.

  Raises:
    InputError: none of them is set, or more than one, or less than one step.
  """
  total = count_steps("total", config, "config", 0, config.input.batch_size, data_size)
  if total is None or total < 1:
    raise InputError(
      f"config: found a total of {total} steps; "
      "set one of total_steps, total_examples, total_epochs"
    )
  return total


def accum_steps(config: ConfigDict, rows: NamedSharding) -> int:
  """Micro-batches of a step: `input.accum_steps`, or as many as leave a device `device_rows` rows.

  Args:
    rows: sharding of the rows [A, B/A, ...].

  Raises:
    InputError: the batch does not spread evenly over micro-batches and devices.
  """
  size, parts = config.input.batch_size, config.input.accum_steps
  devices = rows.mesh.size // rows.shard_shape((1, rows.mesh.size))[1]
  if not parts:
    parts = max(1, size // (devices * max(1, config.input.device_rows)))
  if size % (parts * devices):
    fitting = -(-size // (parts * devices)) * parts * devices
    raise InputError(
      f"input.batch_size={size} is not divisible by input.accum_steps={parts} x the devices of the "
      f"batch axis, {devices}; use {fitting}"
    )
  return parts


def state_target(
  config: ConfigDict, shapes: Params, optimizer: Optimizer, mesh: Mesh
) -> TrainState:
  """The state as jax.ShapeDtypeStructs with shardings, before anything is allocated.

  Raises:
    InputError: schedule, sharding_strategy or frozen_dtype do not fit.
  """
  if config.frozen_dtype not in ("float32", "bfloat16"):
    raise InputError(f"config.frozen_dtype={config.frozen_dtype!r}: accepted: float32, bfloat16")

  def create():
    params = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return TrainState.create(params, config.schedule, optimizer, config.frozen_dtype)

  state = jax.eval_shape(create)
  placed = param_shardings(shapes, mesh, config.sharding_strategy)
  train, frozen = (sub_tree(placed, like) for like in (state.params_train, state.params_frozen))
  shardings = dataclasses.replace(
    state,
    step=NamedSharding(mesh, P()),
    params_train=train,
    params_frozen=frozen,
    opt_state=dict.fromkeys(state.opt_state, train),
  )
  return jax.tree.map(
    lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), state, shardings
  )


def initial_state(task: Task, optimizer: Optimizer, target: TrainState, key: Array) -> TrainState:
  """The state of step 0: weights that the task starts from, the rest initialised in place."""
  wanted = target.params()
  loaded = task.start(wanted)
  loaded = jax.tree.map(
    lambda x, like: jax.device_put(x.astype(like.dtype), like.sharding),
    loaded,
    sub_tree(wanted, loaded),
  )
  rest = _without(wanted, loaded)

  def init(key):
    return jax.tree.map(lambda x, like: x.astype(like.dtype), sub_tree(task.init(key), rest), rest)

  if rest:
    shardings = jax.tree.map(lambda leaf: leaf.sharding, rest)
    loaded = merge(loaded, jax.jit(init, out_shardings=shardings)(key))
  train = sub_tree(loaded, target.params_train)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, target.opt_state)
  return TrainState(
    step=jax.device_put(jnp.zeros((), jnp.int32), target.step.sharding),
    params_train=train,
    params_frozen=sub_tree(loaded, target.params_frozen),
    opt_state=jax.jit(optimizer.init, out_shardings=shardings)(train),
  )


class Report:
  """Reads a step's metrics while the next one runs; checks, logs and shows them."""

  def __init__(self, config: ConfigDict, task: Task, workdir: Path, first: int, total: int):
    self.last: dict[str, float] = {}
    self._config, self._task, self._total = config, task, total
    self._pending: tuple[int, Metrics] | None = None
    self._input_seconds = 0.0
    self._since = time.perf_counter()
    self._first = first
    self._leader = jax.process_index() == 0
    if self._leader:
      self._writer = MetricsWriter(workdir, first)
      self._progress = Progress(total, first)
      done = f"resuming after step {first} of {total}" if first else f"{total} steps"
      self._progress.say(f"{workdir}: {done}, {task.data_size} examples")

  def timed(self, fn: Callable, *args: Any) -> Any:
    """Calls `fn`, counting the time as waiting for input."""
    start = time.perf_counter()
    result = fn(*args)
    self._input_seconds += time.perf_counter() - start
    return result

  def add(self, step: int, metrics: Metrics) -> None:
    """Takes the metrics of step `step` (from 1); reads those of the step before."""
    self.flush()
    self._pending = (step, metrics)

  def flush(self) -> None:
    """Waits for the step that is under way and reports it.

    Raises:
      InputError, FloatingPointError: see `step.check_metrics`.
    """
    if self._pending is None:
      return
    step, metrics = self._pending
    self._pending = None
    metrics = jax.device_get(metrics)
    check_metrics(step, metrics)
    now = time.perf_counter()
    self.last = {
      **{k: v.item() for k, v in metrics.items() if v.ndim == 0 and k != "overflow"},
      "seconds": now - self._since,
      "input_seconds": self._input_seconds,
      "epoch": step * self._config.input.batch_size / self._task.data_size,
      "rss_gb": resident_gb(),
      **self._task.counts(),
    }
    self._since, self._input_seconds = now, 0.0
    logged = step % self._config.log_steps == 0 or step in (self._first + 1, self._total)
    if self._leader:
      if logged:
        self._writer.write(step, self.last)
      self._progress.update(step, self.last, line=logged)

  def __enter__(self) -> "Report":
    return self

  def __exit__(self, *_) -> None:
    if self._leader:
      self._progress.close()
      self._writer.close()


@contextlib.contextmanager
def stop_signals(checkpoints: Checkpoints) -> Iterator[Callable[[int], bool]]:
  """Gives `stopped(step)`: SIGTERM or Ctrl-C came. A second Ctrl-C interrupts at once."""
  came: list[int] = []

  def note(number, frame):
    came.append(number)
    signal.signal(number, before[number])

  try:
    before = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
  except ValueError:  # not the main thread; signals are somebody else's
    before = {}
  try:
    if jax.process_count() == 1:
      yield lambda step: bool(came)
    else:  # all processes must stop at the same step
      yield checkpoints.reached_preemption
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def _check_workdir(workdir: Path, config: ConfigDict) -> None:
  """Refuses a work directory with checkpoints of another config."""
  workdir.mkdir(parents=True, exist_ok=True)
  file = workdir / "config.json"
  if not any((workdir / "checkpoints").glob("[0-9]*")):
    return
  if not file.is_file():
    raise InputError(f"{workdir}: found checkpoints without config.json; use another workdir")
  changed = diff(from_json(file.read_text(encoding="utf-8")), config)
  changed = {key: pair for key, pair in changed.items() if key not in MAY_CHANGE}
  if changed:
    listed = "; ".join(f"{key} was {old!r}, is {new!r}" for key, (old, new) in changed.items())
    raise InputError(f"{workdir} was made with another config: {listed}; use another workdir")


def _without(tree: Params, other: Params) -> Params:
  """The leaves of `tree` that `other` has not."""
  out = {}
  for key, value in tree.items():
    if key not in other:
      out[key] = value
    elif isinstance(value, dict) and (rest := _without(value, other[key])):
      out[key] = rest
  return out
