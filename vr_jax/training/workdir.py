"""The work directory of a run: whether it can be used, and which run it is of.

W/config.json         the resolved config; the same command resumes, another config is refused
W/checkpoints/<step>  see checkpoint.py; `meta` holds the config too
"""

import contextlib
import json
import logging
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from data_pipes.buckets import copy_files, is_address, reached
from data_pipes.errors import InputError
from vr_jax.checkpoint import load_meta, tokenizer_files_of
from vr_jax.configs import MISSING, base_config, diff, from_json, leaves
from vr_jax.training.digests import digest_of_weights
from vr_jax.training.processes import gather
from vr_jax.training.task import PLAN, task_name
from vr_jax.weights import complete_steps

log = logging.getLogger(__name__)
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
  "keep_best",
  "profile_steps",
  "stall_seconds",
  "max_skipped",
  "wandb",
  "evals",
  "early_stop",
  "sweep_budget",
  "input.epoch_seeds",  # the checkpoint's stands
  "input.threads",
  "input.media",
  "input.max_unreadable",
  "input.max_empty",
)
# How long a run is: may change too where it is told to.
LENGTH = ("total_steps", "total_examples", "total_epochs")
# Where the data lie; `Task.data` has the digests of what is there.
PLACES = ("input.files", "input.features")
LOG = ("metrics.jsonl", "wandb_id")  # what a run that goes on appends to
SECONDS = 10.0  # in which a new file is seen on every host that shares a folder


def make_workdir(workdir: Path) -> None:
  """Makes a work directory; raises InputError if it cannot be written."""
  if is_address(workdir):
    with reached(workdir, "--workdir "):
      probe = workdir / f".probe-{uuid.uuid4().hex}"
      probe.write_text("")
      probe.unlink()
    return
  if "\\" in str(workdir.absolute()):  # Orbax and tensorstore take it for an escape
    raise InputError(f"--workdir {workdir}: accepted: a path without a backslash")
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=workdir):
      pass
  except OSError as error:
    raise InputError(f"--workdir {workdir}: cannot be written: {error.strerror}") from error


@contextlib.contextmanager
def home_of(workdir: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
  """A folder of this machine for what a run appends to, and what brings it to the work directory.

  Objects of a bucket cannot be appended to; the log there is as of the last `bring()`, which is
  called with each checkpoint, and at the end. Of a directory of this machine the folder is itself.
  """
  if not is_address(workdir):
    yield workdir, lambda: None
    return
  with tempfile.TemporaryDirectory(prefix="vr-") as folder:
    home, sent = Path(folder, workdir.name), {}
    home.mkdir()
    leader = jax.process_index() == 0
    for name in LOG if leader else ():
      with reached(workdir):
        if (workdir / name).exists():
          copy_files(workdir / name, home / name)

    def bring() -> None:
      for file in sorted(p for p in home.rglob("*") if leader and p.is_file()):
        stat = file.stat()
        if sent.get(file) != (stat.st_size, stat.st_mtime_ns):
          try:
            with reached(workdir):
              copy_files(file, workdir / file.relative_to(home).as_posix())
            sent[file] = (stat.st_size, stat.st_mtime_ns)
          except InputError as error:  # the next one brings it; the run does not need it
            log.warning("%s", error)

    try:
      yield home, bring
    finally:
      bring()


class Before(NamedTuple):
  """What a work directory holds: its newest checkpoint that can be read, and that one's `meta`."""

  checkpoint: Path | None = None
  meta: Mapping[str, Any] = {}

  def going_on(self, config: ConfigDict) -> ConfigDict:
    """The config of the task: a run that goes on needs nothing that it began with."""
    if self.checkpoint is None:
      return config
    config = config.copy_and_resolve_references().unlock()
    config.model_init = (("", str(self.checkpoint)),)
    config.input.epoch_seeds = self.meta.get("epoch_seeds", "consecutive")
    if tokenizer_files_of(self.meta):
      config.tokenizer = None
    return config.lock()


def read_before(workdir: Path) -> Before:
  """What the newest checkpoint says whose `meta` can be read; nothing where there is none."""
  for folder in sorted(_steps(workdir), key=lambda p: int(p.name), reverse=True):
    try:
      return Before(folder, load_meta(folder))
    except InputError as error:  # restoring sets it aside
      log.warning("%s", error)
  return Before()


def check_same_run(
  workdir: Path, config: ConfigDict, before: Before, *, extend: bool = False
) -> None:
  """Refuses a work directory with checkpoints of another config.

  A field that the stored config lacks counts as its default; one that is not there any more is
  named in the log.

  Args:
    extend: the length of the run may differ.

  Raises:
    InputError: naming the fields with their old and new values.
  """
  if not any(_steps(workdir)):
    return
  stored = _stored_config(workdir / "config.json", before)
  defaults = leaves(base_config())
  free = {*MAY_CHANGE, *(LENGTH if extend else ())}
  if before.meta.get("data"):
    free |= {*PLACES}  # `check_data` compares what is there
  changed = {}
  for key, (old, new) in diff(stored, config).items():
    if new is MISSING:
      log.warning("%s: config.%s=%r is not a field any more; left out", workdir, key, old)
    elif key == "model_init" and new and before.meta.get("start") == weights_of(config):
      continue  # moved
    elif free.isdisjoint((key, key.split(".")[0])) and (
      old is not MISSING or new != defaults.get(key, MISSING)
    ):
      changed[key] = (old, new)
  if "task" in changed and len({task_name(name) for name in changed["task"]}) == 1:
    del changed["task"]  # the module of the task has moved
  if changed:
    listed = "; ".join(f"{key} was {old!r}, is {new!r}" for key, (old, new) in changed.items())
    hint = "use another workdir"
    if set(changed) <= set(LENGTH):
      hint = "use another workdir, or go on for longer with --extend"
    raise InputError(f"{workdir} was made with another config: {listed}; {hint}")


def weights_of(config: ConfigDict) -> dict[str, str]:
  """ "size digest" of each of the weights in `model_init`."""
  return {
    f"model_init[{i}]": digest_of_weights(path) for i, (_, path) in enumerate(config.model_init)
  }


def check_data(workdir: Path, before: Mapping[str, str], now: Mapping[str, str]) -> None:
  """Refuses other data than the checkpoint's; files that have moved are the same.

  Args:
    before, now: `Task.data`, "size digest" by name.

  Raises:
    InputError: naming the first that differs.
  """
  names = {*before, *now} if before else set()
  if PLAN not in before:
    names.discard(PLAN)  # an older version wrote none
  for name in sorted(names):
    old, new = before.get(name, "nothing"), now.get(name, "nothing")
    if old != new:
      raise InputError(
        f"{workdir} was made with other data: {name} was {old}, is {new}; use the same data, or "
        "another workdir"
      )


def check_shared(workdir: Path, seconds: float = SECONDS) -> None:
  """Refuses processes that do not have one and the same work directory.

  Raises:
    InputError: the same line in all of them.
  """
  if jax.process_count() == 1:
    return
  index, mark = jax.process_index(), workdir / f".shared-{uuid.uuid4().hex}"
  if index == 0:
    mark.touch()
  name = gather(mark.name)[0]
  ends = time.monotonic() + seconds
  while not (seen := (workdir / name).exists()) and time.monotonic() < ends:
    time.sleep(0.1)
  answers = gather(json.dumps([seen, socket.gethostname()]))
  if index == 0:
    mark.unlink(missing_ok=True)
  for other, (seen, host) in enumerate(map(json.loads, answers)):
    if not seen:
      raise InputError(
        f"--workdir {workdir}: the work directory is not the same folder on process {other} "
        f"({host}); accepted: one that all hosts share"
      )


def _steps(workdir: Path) -> Collection[Path]:
  """The folders of its checkpoints."""
  return complete_steps(workdir / "checkpoints")


def _stored_config(file: Path, before: Before) -> ConfigDict:
  """The config in config.json; where that cannot be read, the checkpoint's."""
  try:
    return from_json(file.read_text(encoding="utf-8"))
  except Exception as error:  # whatever became of the file, the checkpoint holds what it held
    if not before.meta.get("config"):
      raise InputError(
        f"{file}: cannot be read and the checkpoints hold no config; use another workdir"
      ) from error
    log.warning("%s cannot be read; the config is that of %s", file, before.checkpoint)
    return from_json(json.dumps(before.meta["config"]))
