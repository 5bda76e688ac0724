"""The training loop: from a config and a work directory to checkpoints, or on from what is there.

W/config.json         the resolved config; the same command resumes, another config is refused
W/checkpoints/<step>  see checkpoint.py
W/metrics.jsonl       a line per logged step, also in W/tensorboard (and config.wandb, if set)
W/ema                 checkpoint for inference of the running mean, where there is one (ema_decay)
W/heartbeat           what each process does, see heartbeat.py
W/profile             a trace of the steps of config.profile_steps
"""

import contextlib
import dataclasses
import functools
import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from data_pipes.errors import InputError
from data_pipes.files import locked, write_text
from vr_jax.arrays import Array
from vr_jax.checkpoint import export, make_meta
from vr_jax.configs import base_config, check_keys, diff, from_json, to_json
from vr_jax.hardware import chip_of
from vr_jax.models.quantize import is_quantized, quantized
from vr_jax.params import Params, merge, param_shardings, path_names, sub_tree
from vr_jax.sharding import batch_sharding, check_rules, make_mesh
from vr_jax.training.checkpoints import Checkpoints
from vr_jax.training.heartbeat import Heartbeat
from vr_jax.training.metrics import Ledger, MetricsWriter, Profiler, Progress, resident_gb
from vr_jax.training.processes import agree
from vr_jax.training.schedule import Optimizer, count_steps, make_optimizer
from vr_jax.training.step import Metrics, TrainState, check_metrics, make_step, micro_batches
from vr_jax.training.task import Rows, Task, make_task, task_name

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
  "profile_steps",
  "stall_seconds",
  "wandb",
  "input.threads",
  "input.media",
  "input.max_unreadable",
)

FROZEN_DTYPES = ("float32", "bfloat16", "int8")


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
      trained on, processes that were not started alike.
  """
  agree(config)
  part = f"process {jax.process_index()}" if jax.process_count() > 1 else None
  with locked(workdir, to_json(config), part):
    return _train(config, Path(workdir))


def _train(config: ConfigDict, workdir: Path) -> Result:
  _check_workdir(workdir, config)
  task = make_task(config)
  check_keys(config, [*base_config(), *task.fields], "config")
  check_keys(config.input, base_config().input, "config.input")
  total = total_steps(config, task.data_size)
  mesh = make_mesh(config.mesh)
  check_rules(config.sharding_rules, mesh)
  place = _placement(config, mesh)
  with contextlib.ExitStack() as stack:
    profiler = stack.enter_context(Profiler(config.profile_steps, workdir / "profile"))
    stack.enter_context(jax.set_mesh(mesh))
    checkpoints = stack.enter_context(
      Checkpoints(
        workdir / "checkpoints", keep=config.keep_ckpts, keep_every=config.keep_ckpt_steps
      )
    )
    state, position, train_step = _begin(config, task, total, mesh, checkpoints)
    first = int(state.step)
    if jax.process_index() == 0:
      write_text(workdir / "config.json", to_json(config) + "\n")
    meta = make_meta(task.model, task.tokenizer_files, task.generation, json.loads(to_json(config)))
    batches = task.batches(position, total) if first < total else iter(())
    report = stack.enter_context(Report(config, task, workdir, first, total))
    heartbeat = stack.enter_context(
      Heartbeat(
        workdir / "heartbeat", jax.process_index(), jax.process_count(), config.stall_seconds
      )
    )
    stopped = stack.enter_context(stop_signals(checkpoints))

    for step in range(first, total):
      stop = stopped(step)
      # Save, then draw: drawing moves the position, which must be that of the saved state.
      if stop or (step % config.ckpt_steps == 0 and step > first):
        report.flush()
        heartbeat.at(step, "checkpoint")
        report.ledger.timed("checkpoint", checkpoints.save, state, position, meta)
      if stop:
        return Result(step, False, report.last)
      profiler.before(step + 1, report.flush)
      heartbeat.at(step + 1, "input")
      rows = report.ledger.timed("input", next, batches)
      heartbeat.at(step + 1, "step")
      position += 1
      state, metrics = train_step(state, place(rows))
      report.add(step + 1, metrics, rows)
    report.flush()
    checkpoints.save(state, position, meta)
    if "ema" in state.opt_state and not (workdir / "ema").exists():
      export(workdir / "ema", merge(state.opt_state["ema"], state.params_frozen), meta)
    return Result(total, True, report.last)


def _begin(
  config: ConfigDict, task: Task, total: int, mesh: Mesh, checkpoints: Checkpoints
) -> tuple[TrainState, int, Callable[[TrainState, Any], tuple[TrainState, Metrics]]]:
  """What the loop begins with: the state, the position in the data, and the compiled step.

  The state is described first, with its place on the mesh, and then filled: from the newest
  checkpoint, else from what the task starts from. No array is ever whole on one device first.
  """
  key = jax.random.key(config.seed)
  shapes = jax.eval_shape(task.init, key)
  optimizer = make_optimizer(config, shapes, total_steps=total, data_size=task.data_size)
  target = state_target(config, shapes, optimizer, mesh)
  restored = checkpoints.restore_latest(target)
  state, position = restored or (initial_state(task, optimizer, target, key), 0)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, target)
  train_step = make_step(
    task.loss, optimizer, accum_mean=config.accum_mean, shardings=shardings, cuts=task.cuts
  )
  return state, position, train_step


def _placement(config: ConfigDict, mesh: Mesh) -> Callable[[Rows], dict[str, Array]]:
  """From this process's host rows [B, ...] to the step's arrays [A, B/A, ...] on the mesh.

  Raises:
    InputError: the batch does not spread evenly, see `accum_steps`.
  """
  sharding = batch_sharding(mesh, config.sharding_rules, leading=1)
  parts = accum_steps(config, sharding)

  def place(rows: Rows) -> dict[str, Array]:
    local = micro_batches(rows, parts)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in local.items()}

  return place


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
    InputError: the batch does not spread evenly over micro-batches and devices, or two processes
      would hold the same rows.
  """
  size, parts = config.input.batch_size, config.input.accum_steps
  devices = rows.mesh.size // rows.shard_shape((1, rows.mesh.size))[1]
  held: dict[int, set[str]] = {}  # parts of the batch by process
  for device, at in rows.devices_indices_map((1, rows.mesh.size)).items():
    held.setdefault(device.process_index, set()).add(str(at))
  if sum(map(len, held.values())) != devices:
    raise InputError(
      f"config.mesh: the batch falls into {devices} parts, of which each of {len(held)} processes "
      f"holds {max(map(len, held.values()))}; accepted: a mesh whose axes that do not split the "
      "batch lie within a process"
    )
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
  if config.frozen_dtype not in FROZEN_DTYPES:
    accepted = ", ".join(FROZEN_DTYPES)
    raise InputError(f"config.frozen_dtype={config.frozen_dtype!r}: accepted: {accepted}")

  def create():
    params = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return TrainState.create(params, config.schedule, optimizer, config.frozen_dtype)

  state = jax.eval_shape(create)
  placed = param_shardings(shapes, mesh, config.sharding_strategy)
  train, frozen = (sub_tree(placed, like) for like in (state.params_train, state.params_frozen))
  if config.frozen_dtype == "int8":
    if not any(map(is_quantized, jax.tree.leaves(state.params_frozen, is_leaf=is_quantized))):
      raise InputError(
        "config.frozen_dtype='int8': config.schedule freezes no matrix of the decoder; accepted "
        "then: float32, bfloat16"
      )
    frozen = jax.tree.map(_like_the_matrix, state.params_frozen, frozen, is_leaf=is_quantized)
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
  shapes = target.params()
  loaded = task.start(shapes)

  def put(path, x, like):
    if not is_quantized(like):
      return jax.device_put(x.astype(like.dtype), like.sharding)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
    quantize = jax.jit(functools.partial(quantized, path), out_shardings=shardings)
    return quantize(jax.device_put(x, like.qvalue.sharding))

  loaded = jax.tree.map(put, path_names(loaded), loaded, sub_tree(shapes, loaded))
  rest = _without(shapes, loaded)

  def init(key):
    def cast(path, x, like):
      return quantized(path, x) if is_quantized(like) else x.astype(like.dtype)

    fresh = sub_tree(task.init(key), rest)
    return jax.tree.map(cast, path_names(fresh), fresh, rest)

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


def _like_the_matrix(leaf: Any, sharding: NamedSharding) -> Any:
  """The shardings of a parameter's arrays: the scales of int8 values lie with their columns."""
  if not is_quantized(leaf):
    return sharding

  def place(array):
    axes = zip(sharding.spec, array.shape, strict=True)
    return NamedSharding(sharding.mesh, P(*(axis if n > 1 else None for axis, n in axes)))

  return jax.tree.map(place, leaf)


class Report:
  """Reads a step's metrics while the next one runs; checks, logs and shows them."""

  def __init__(self, config: ConfigDict, task: Task, workdir: Path, first: int, total: int):
    self.last: dict[str, float] = {}
    self._config, self._task, self._total = config, task, total
    self._pending: tuple[int, Metrics, tuple[int, int] | None] | None = None
    self.ledger = Ledger()
    self._spent, self._since = self.ledger.seconds(), time.perf_counter()
    self._chip = chip_of(jax.devices()[0])
    self._first = first
    self._leader = jax.process_index() == 0
    if self._leader:
      self._writer = MetricsWriter(workdir, first, config.wandb, json.loads(to_json(config)))
      self._progress = Progress(total, first)
      done = f"resuming after step {first} of {total}" if first else f"{total} steps"
      self._progress.say(f"{workdir}: {done}, {task.data_size} examples")

  def add(self, step: int, metrics: Metrics, rows: Rows) -> None:
    """Takes the metrics of step `step` (from 1) on these host rows; reads those before them."""
    self.flush()
    self._pending = (step, metrics, self._task.work(rows) if self._task.work else None)

  def flush(self) -> None:
    """Waits for the step that is under way and reports it.

    Raises:
      InputError: see `step.check_metrics`; names what the batch holds.
    """
    if self._pending is None:
      return
    step, metrics, work = self._pending
    self._pending = None
    metrics = jax.device_get(metrics)
    try:
      check_metrics(step, metrics)
    except InputError as error:
      if names := self._task.names(step - 1, self._total):
        shown = ", ".join(names[:16]) + (f" and {len(names) - 16} more" if names[16:] else "")
        raise InputError(f"{error}; the batch holds {shown}") from None
      raise
    now, spent = time.perf_counter(), self.ledger.seconds()
    seconds = now - self._since
    self.last = {
      **{k: v.item() for k, v in metrics.items() if v.ndim == 0 and k != "overflow"},
      "seconds": seconds,
      **{f"{part}_seconds": spent[part] - self._spent[part] for part in spent if part != "step"},
      **(self._rates(*work, seconds) if work else {}),
      "epoch": step * self._config.input.batch_size / self._task.data_size,
      "rss_gb": resident_gb(),
      **self._task.counts(),
    }
    self._since, self._spent = now, spent
    logged = step % self._config.log_steps == 0 or step in (self._first + 1, self._total)
    if self._leader:
      if logged:
        self._writer.write(step, self.last)
      self._progress.update(step, self.last, line=logged)

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


@contextlib.contextmanager
def stop_signals(checkpoints: Checkpoints) -> Iterator[Callable[[int], bool]]:
  """Gives `stopped(step)`: SIGTERM or Ctrl-C came. A second Ctrl-C interrupts at once.

  Where there are several processes, all stop at the same step, whichever got the signal.
  """
  came: list[int] = []
  several = jax.process_count() > 1

  def note(number, frame):
    came.append(number)
    signal.signal(number, before[number])
    if several:
      os.kill(os.getpid(), signal.SIGTERM)

  # With several processes JAX itself watches for SIGTERM and tells the others.
  watched = (signal.SIGINT,) if several else (signal.SIGTERM, signal.SIGINT)
  try:
    before = {s: signal.signal(s, note) for s in watched}
  except ValueError:  # not the main thread; signals are somebody else's
    before = {}
  try:
    yield checkpoints.reached_preemption if several else lambda step: bool(came)
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def make_workdir(workdir: Path) -> None:
  """Makes a work directory; raises InputError if it cannot be written."""
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=workdir):
      pass
  except OSError as error:
    raise InputError(f"--workdir {workdir}: cannot be written: {error.strerror}") from error


def _check_workdir(workdir: Path, config: ConfigDict) -> None:
  """Refuses a work directory that cannot be written, or with checkpoints of another config."""
  make_workdir(workdir)
  file = workdir / "config.json"
  if not any((workdir / "checkpoints").glob("[0-9]*")):
    return
  if not file.is_file():
    raise InputError(f"{workdir}: found checkpoints without config.json; use another workdir")
  changed = diff(from_json(file.read_text(encoding="utf-8")), config)
  changed = {key: pair for key, pair in changed.items() if key not in MAY_CHANGE}
  if "task" in changed and len({task_name(name) for name in changed["task"]}) == 1:
    del changed["task"]  # the module of the task has moved
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
