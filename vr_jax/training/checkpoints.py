"""The checkpoints of a run: saved while it trains, restored when it goes on."""

import contextlib
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from data_pipes.errors import InputError, one_line
from vr_jax.checkpoint import Damaged, restore_items
from vr_jax.params import sub_tree
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

  def __init__(self, folder: Path | str, *, keep: int = 1, keep_every: int | None = None):
    """`keep` newest ones stay, and those whose step is a multiple of `keep_every`."""
    self.folder = Path(folder).absolute()
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep,
      keep_period=keep_every,
      cleanup_tmp_directories=True,  # what a killed save left behind
      enable_async_checkpointing=True,
    )
    self._manager = ocp.CheckpointManager(self.folder, options=options, item_names=ITEMS)

  def latest_step(self) -> int | None:
    """The newest complete checkpoint, None if there is none."""
    return self._manager.latest_step()

  def save(self, state: TrainState, position: int, meta: Mapping[str, Any]) -> None:
    """Starts to save the state; nothing happens if its step is saved already.

    Raises InputError where the disk is full or refuses, for the save before this one too.

    Args:
      position: global batches used so far.
      meta: JSON, see `make_meta`.
    """
    step = int(state.step)
    if step == self.latest_step():
      return
    args = ocp.args.Composite(
      state=ocp.args.StandardSave({"step": state.step, "opt_state": state.opt_state}),
      params=ocp.args.StandardSave(state.params()),
      data=ocp.args.JsonSave({"next_index": position}),
      meta=ocp.args.JsonSave(dict(meta)),
    )
    with self._storage():
      self._manager.save(step, args=args)

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
        shutil.rmtree(aside, ignore_errors=True)
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
    items = {"state": {"step": target.step, "opt_state": target.opt_state}}
    items["params"] = target.params()
    read = restore_items(path, items, ("data",))
    params = read["params"]
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
