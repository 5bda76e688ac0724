"""The training loop: from a config and a work directory to checkpoints, or on from what is there.

W/config.json         the resolved config; the same command resumes, another config is refused
W/checkpoints/<step>  see checkpoint.py
W/metrics.jsonl       a line per logged or evaluated step, also in W/tensorboard (and
                      config.wandb, if set)
W/ema                 checkpoint for inference of the running mean, where there is one (ema_decay)
W/heartbeat           what each process does, see heartbeat.py
W/profile             a trace of the steps of config.profile_steps
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from data_pipes.buckets import as_path, remove
from data_pipes.errors import InputError
from data_pipes.files import locked, write_text
from vr_jax.addresses import local_or_bucket
from vr_jax.arrays import Array
from vr_jax.checkpoint import export, load_meta, make_meta
from vr_jax.configs import base_config, check_config, check_keys, to_json
from vr_jax.hardware import chip_of
from vr_jax.models.quantize import is_quantized, quantized
from vr_jax.params import Params, merge, param_shardings, path_names, sub_tree
from vr_jax.sharding import batch_sharding, check_rules, make_mesh
from vr_jax.training.batches import on_mesh
from vr_jax.training.checkpoints import Checkpoints
from vr_jax.training.evals import make_evals
from vr_jax.training.heartbeat import Heartbeat
from vr_jax.training.metrics import Profiler
from vr_jax.training.processes import agree, agree_on_data, check_devices, together
from vr_jax.training.report import Report
from vr_jax.training.schedule import Optimizer, count_steps, make_optimizer
from vr_jax.training.step import Metrics, TrainState, make_step, micro_batches
from vr_jax.training.stopping import stop_signals
from vr_jax.training.task import Rows, Task, make_task
from vr_jax.training.workdir import (
  Before,
  check_data,
  check_same_run,
  check_shared,
  home_of,
  make_workdir,
  read_before,
  weights_of,
)

FROZEN_DTYPES = ("float32", "bfloat16", "int8")


class Result(NamedTuple):
  """How a run ended: `step` optimizer steps are done and saved; `finished` unless it was stopped.

  A run that `config.early_stop` ended is finished.

  `metrics` are those of the last step that this process made, {} if it made none.
  """

  step: int
  finished: bool
  metrics: dict[str, float]


def train(
  config: ConfigDict, workdir: Path | str, *, extend: bool = False, until: int | None = None
) -> Result:
  """Trains until the config's total, or resumes what is in `workdir`.

  Precedence: the newest checkpoint in `workdir`, then `model_init`, then random initialisation. A
  run that goes on needs its checkpoint and its data, nothing else that it began with.
  SIGTERM, SIGHUP and the first Ctrl-C save and stop. Killed in any other way, the run goes on from
  its last checkpoint when started again, and ends with the same parameters, bit for bit on the same
  mesh.

  Args:
    extend: the total may differ from that which the run in `workdir` had. From here on learning
      rates are those of a run that had the new total from its first step.
    until: stops and saves after so many steps, as a signal would; the run goes on later.

  Raises:
    InputError: a config that does not fit, a work directory of another config, data that cannot be
      trained on, processes that were not started alike.
  """
  workdir = as_path(local_or_bucket(str(workdir), "--workdir"))
  agree(config)
  together(check_devices)
  check_config(config)
  together(lambda: make_workdir(workdir))
  check_shared(workdir)
  part = f"process {jax.process_index()}" if jax.process_count() > 1 else None
  with locked(workdir, to_json(config), part):
    return _train(config, workdir, extend, until)


def _train(config: ConfigDict, workdir: Path, extend: bool, until: int | None) -> Result:
  before = together(lambda: _check_workdir(workdir, config, extend=extend))
  going_on = before.going_on(config)
  task = together(lambda: make_task(going_on))
  check_keys(config, [*base_config(), *task.fields], "config")
  check_keys(config.input, base_config().input, "config.input")
  check_data(workdir, before.meta.get("data", {}), task.data)
  start = before.meta.get("start")
  if start is None:  # what the run begins with; one that goes on needs it no more
    start = together(lambda: weights_of(config)) if before.checkpoint is None else {}
  agree_on_data({**task.data, **start})
  total = total_steps(config, task.data_size)
  mesh = make_mesh(config.mesh)
  check_rules(config.sharding_rules, mesh)
  parts, place = _placement(config, mesh)
  with contextlib.ExitStack() as stack:
    home, bring = stack.enter_context(home_of(workdir))
    profiler = stack.enter_context(Profiler(config.profile_steps, home / "profile"))
    stack.enter_context(jax.set_mesh(mesh))
    checkpoints = stack.enter_context(
      Checkpoints(
        workdir / "checkpoints",
        keep=config.keep_ckpts,
        keep_every=config.keep_ckpt_steps,
        keep_best=config.keep_best,
      )
    )
    state, position, train_step = _begin(config, task, total, mesh, checkpoints)
    first = int(state.step)
    if first > total:
      raise InputError(f"{workdir}: {first} steps are done; accepted: a total of at least that")
    if jax.process_index() == 0:
      write_text(workdir / "config.json", to_json(config) + "\n")
      if first < total:
        remove(workdir / "ema")  # of a run that is extended
    saved = load_meta(workdir / "checkpoints" / str(first)) if first else {}
    counts = saved.get("counts", {})
    micro_rows = config.input.batch_size // parts
    evals = together(
      lambda: make_evals(going_on, task, mesh, micro_rows, total, counts.get("evals"))
    )
    report = stack.enter_context(
      Report(config, task, workdir, first, total, chip_of(jax.devices()[0]), counts, home)
    )

    def save() -> None:
      meta = make_meta(
        task.model, task.tokenizer_files, task.generation, json.loads(to_json(config))
      )
      counts = report.counts() | {"evals": evals.counts()}
      meta |= {"data": dict(task.data), "start": start, "counts": counts}
      meta |= {"epoch_seeds": going_on.input.epoch_seeds}
      checkpoints.save(state, position, meta, report.measured)
      bring()

    batches = task.batches(position, total) if first < total else iter(())
    heartbeat = stack.enter_context(
      Heartbeat(
        workdir / "heartbeat", jax.process_index(), jax.process_count(), config.stall_seconds
      )
    )
    stopped = stack.enter_context(stop_signals(checkpoints))

    def read_and_evaluate(step: int) -> None:
      heartbeat.at(step, "eval")
      report.flush((lambda: evals.run(step, state)) if evals.due(step) else None)

    done = first
    for step in range(first, total):
      stop = stopped(step)
      if evals.due(step) and not stop:
        read_and_evaluate(step)
      if evals.ended:
        break
      stop = stop or (until is not None and step >= until)
      # Save, then draw: drawing moves the position, which must be that of the saved state. And read
      # what the step before gave, then save.
      if stop or (step % config.ckpt_steps == 0 and step > first):
        report.flush()
        heartbeat.at(step, "checkpoint")
        report.ledger.timed("checkpoint", save)
      if stop:
        return Result(step, False, report.last)
      profiler.before(step + 1, report.flush)
      heartbeat.at(step + 1, "input")
      rows = report.ledger.timed("input", next, batches)
      heartbeat.at(step + 1, "step")
      position += 1
      state, metrics = train_step(state, place(rows))
      report.add(step + 1, metrics, rows)
      done = step + 1
    read_and_evaluate(done)
    if evals.ended and done < total:
      report.say(f"{config.early_stop.metric} is not getting better: {done} of {total} steps")
    save()
    checkpoints.tell_best()
    if "ema" in state.opt_state and not (workdir / "ema").exists():
      mean = merge(state.opt_state["ema"], state.params_frozen)
      meta = make_meta(
        task.model, task.tokenizer_files, task.generation, json.loads(to_json(config))
      )
      export(workdir / "ema", mean, meta)
    return Result(done, True, report.last)


def _check_workdir(workdir: Path, config: ConfigDict, *, extend: bool = False) -> Before:
  """What a work directory holds; refuses one of another config."""
  before = read_before(workdir)
  check_same_run(workdir, config, before, extend=extend)
  return before


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
    task.loss,
    optimizer,
    accum_mean=config.accum_mean,
    shardings=shardings,
    cuts=task.cuts,
    kinds=task.kinds,
  )
  return state, position, train_step


def _placement(config: ConfigDict, mesh: Mesh) -> tuple[int, Callable[[Rows], dict[str, Array]]]:
  """A, and from this process's host rows [B, ...] to the step's arrays [A, B/A, ...] on the mesh.

  Raises:
    InputError: the batch does not spread evenly, see `accum_steps`.
  """
  sharding = batch_sharding(mesh, config.sharding_rules, leading=1)
  parts = accum_steps(config, sharding)

  def place(rows: Rows) -> dict[str, Array]:
    return on_mesh(micro_batches(rows, parts), sharding)

  return parts, place


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
    opt_state={
      slot: jax.tree.map(
        lambda leaf, p, sharding: sharding if leaf.shape == p.shape else NamedSharding(mesh, P()),
        tree,
        sub_tree(state.params_train, tree),
        sub_tree(train, tree),
      )
      for slot, tree in state.opt_state.items()
    },
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


def _without(tree: Params, other: Params) -> Params:
  """The leaves of `tree` that `other` has not."""
  out = {}
  for key, value in tree.items():
    if key not in other:
      out[key] = value
    elif isinstance(value, dict) and (rest := _without(value, other[key])):
      out[key] = rest
  return out
