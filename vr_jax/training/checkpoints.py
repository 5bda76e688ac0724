"""The checkpoints of a run: saved while it trains, restored when it goes on."""

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
import orbax.checkpoint.checkpoint_managers as policies
from jax.experimental import multihost_utils

from data_pipes.buckets import absolute, remove
from data_pipes.errors import InputError, one_line
from vr_jax.checkpoint import FROZEN, Damaged, frozen_folder, restore_items
from vr_jax.params import Params, merge, sub_tree
from vr_jax.training.digests import digest_of_params
from vr_jax.training.step import TrainState

log = logging.getLogger(__name__)
ITEMS = ("state", "params", "data", "meta")
STORAGE = (
  "No space left on device",
  "Disk quota exceeded",
  "File too large",
  "Read-only file system",
  "Permission denied",
)


class Checkpoints:
  """The checkpoints of one run. Saving is asynchronous; `close` waits for it.

  A save first copies the arrays to the host, so the state may be donated to the next step.
  """

  def __init__(
    self,
    folder: Path | str,
    *,
    keep: int = 1,
    keep_every: int | None = None,
    keep_best: tuple[str, str] | tuple[()] = (),
  ):
    """`keep` newest ones stay, and those whose step is a multiple of `keep_every`.

    Args:
      keep_best: (metric, "min" or "max"): the one with the best value of the metric stays too.
    """
    self.folder = absolute(folder)
    self._metric, self._frozen = keep_best[0] if keep_best else None, ""
    kept: list[policies.PreservationPolicy] = [policies.LatestN(keep)]
    if keep_every:
      kept.append(policies.EveryNSteps(keep_every))
    ranked: dict[str, Any] = {}
    if keep_best:
      metric, mode = keep_best
      # Of a checkpoint with another metric, from before the config changed, nothing is known.
      worst = math.inf if mode == "min" else -math.inf
      ranked = {"best_fn": lambda values: values.get(metric, worst), "best_mode": mode}
      kept.append(
        policies.BestN(
          get_metric_fn=ranked["best_fn"],
          reverse=mode == "min",
          n=1,
          keep_checkpoints_without_metrics=False,
        )
      )
    options = ocp.CheckpointManagerOptions(
      preservation_policy=policies.AnyPreservationPolicy(kept),
      **ranked,
      cleanup_tmp_directories=True,  # what a killed save left behind
      enable_async_checkpointing=True,
    )
    self._manager = ocp.CheckpointManager(self.folder, options=options, item_names=ITEMS)

  def latest_step(self) -> int | None:
    """The newest complete checkpoint, None if there is none."""
    return self._manager.latest_step()

  def save(
    self,
    state: TrainState,
    position: int,
    meta: Mapping[str, Any],
    measured: Mapping[str, float] | None = None,
  ) -> None:
    """Starts to save the state; nothing happens if its step is saved already.

    Raises InputError where the disk is full or refuses, for the save before this one too.

    Args:
      position: global batches used so far.
      meta: JSON, see `make_meta`.
      measured: metrics of this state, of which `keep_best` takes its own.
    """
    step = int(state.step)
    if step == self.latest_step():
      return
    with self._storage():
      frozen = self._write_frozen(state.params_frozen)
    value = (measured or {}).get(self._metric or "", math.nan)
    if self._metric and not math.isfinite(value):
      log.warning("step %s: keep_best: no %s was measured at this step", step, self._metric)
    args = ocp.args.Composite(
      state=ocp.args.StandardSave({"step": state.step, "opt_state": state.opt_state}),
      params=ocp.args.StandardSave(state.params_train if frozen else state.params()),
      data=ocp.args.JsonSave({"next_index": position}),
      meta=ocp.args.JsonSave({**meta, **frozen}),
    )
    metrics = {self._metric: value} if self._metric and math.isfinite(value) else None
    with self._storage():
      self._manager.save(step, args=args, metrics=metrics)

  def tell_best(self) -> None:
    """Says in the log which step `keep_best` has kept."""
    if self._metric is None:
      return
    with self._storage():
      self._manager.wait_until_finished()
    step = self._manager.best_step()
    values = self._manager.metrics(step) if step is not None else None
    if values and (value := values.get(self._metric)) is not None:
      log.info("%s: the best %s is %.6g", self.folder / str(step), self._metric, value)

  def _write_frozen(self, params: Params) -> dict[str, str]:
    """Writes what no step changes, where that is not done yet; the hash, for `meta`."""
    if not jax.tree.leaves(params):
      return {}
    if not self._frozen:
      name = digest_of_params(params)
      folder = self.folder.parent / FROZEN / name
      if not (folder / "params").is_dir():
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
          args = ocp.args.Composite(params=ocp.args.StandardSave(params))
          checkpointer.save(folder, args=args)
      self._frozen = name
    return {FROZEN: self._frozen}

  def restore_latest(self, target: TrainState) -> tuple[TrainState, int] | None:
    """The newest checkpoint that can be read, see `restore`; None if there is none at all.

    A damaged one is named in the log and set aside under another name, so that its step can be
    saved again.

    Raises:
      InputError: one that does not fit the target, or the only one is damaged.
    """
    while (step := self.latest_step()) is not None:
      try:
        return self.restore(step, target)
      except Damaged as error:
        if len(self._manager.all_steps()) == 1:
          raise InputError(f"{error}; there is no older one") from error
        aside = self.folder / f"damaged-{step}"
        log.warning("%s; set aside as %s, going back to the one before", error, aside.name)
      if jax.process_index() == 0:
        remove(aside)
        (self.folder / str(step)).rename(aside)
      if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"set aside {step}")
      self._manager.reload()
    return None

  def restore(self, step: int, target: TrainState) -> tuple[TrainState, int]:
    """The state and the data position of a step.

    Args:
      target: a state of `jax.ShapeDtypeStruct`s with shardings; those of another mesh than the one
        that saved are fine.

    Raises:
      InputError: the checkpoint has another tree, shape or dtype, or is damaged.
    """
    path = self.folder / str(step)
    frozen = restore_items(path, {}, ("meta",))["meta"].get(FROZEN)
    items = {"state": {"step": target.step, "opt_state": target.opt_state}}
    items["params"] = target.params_train if frozen else target.params()
    read = restore_items(path, items, ("data",))
    params = read["params"]
    if frozen:
      folder = frozen_folder(path, frozen)
      try:
        rest = restore_items(folder, {"params": target.params_frozen}, ())["params"]
      except Damaged as error:  # no fault of the step, which going back would not mend
        raise InputError(str(error)) from error
      params, self._frozen = merge(params, rest), frozen
    state = TrainState(
      step=read["state"]["step"],
      params_train=sub_tree(params, target.params_train),
      params_frozen=sub_tree(params, target.params_frozen),
      opt_state=read["state"]["opt_state"],
    )
    return state, int(read["data"]["next_index"])

  def reached_preemption(self, step: int) -> bool:
    """Whether the system told any process that it will stop; the same answer in all of them."""
    return self._manager.reached_preemption(step)

  def close(self) -> None:
    """Waits until the last save is complete."""
    with self._storage():
      self._manager.wait_until_finished()
      self._manager.close()

  @contextlib.contextmanager
  def _storage(self) -> Iterator[None]:
    """A disk that is full or refuses is no fault of ours: one line, also from a save's thread."""
    try:
      yield
    except Exception as error:  # orbax and tensorstore raise all kinds
      text = one_line(error, limit=10_000)
      if reason := next((words for words in STORAGE if words in text), None):
        raise InputError(
          f"{self.folder}: a checkpoint could not be saved: {reason}; those before it are intact"
        ) from error
      raise

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind, *_) -> None:
    if kind is not KeyboardInterrupt:  # who interrupts does not wait; a part of a save is no harm
      self.close()
