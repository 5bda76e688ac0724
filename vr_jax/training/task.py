"""What a run trains: parameters, loss and batches; the interface between the loop and a model."""

import dataclasses
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from data_pipes.errors import InputError
from data_pipes.failures import Failures
from vr_jax.arrays import Array
from vr_jax.params import Params
from vr_jax.training.loss import LossSums
from vr_jax.training.step import Cuts

Rows = Mapping[str, np.ndarray]
PLAN = "plan of the rows"  # in `Task.data`, where samples are packed or sorted into buckets
TASKS = {"videorefer": "vr_jax.training.videorefer_task:videorefer_task"}
# Names that configs in work directories may still have.
MOVED = {
  "vr_jax.training.pretrain_tower:tower_task": "vr_jax.mini.pretrain_tower:tower_task",
  "vr_jax.training.pretrain_decoder:decoder_task": "vr_jax.mini.pretrain_decoder:decoder_task",
}


@dataclasses.dataclass(frozen=True)
class Task:
  """All that the loop needs to know about what it trains.

  Attributes:
    init: random key -> parameters; pure, run under `jax.eval_shape` and `jax.jit`.
    loss: (parameters, rows of one micro-batch) -> LossSums.
    data_size: examples in an epoch.
    batches: (position, total steps) -> this process's part of the global batches from that one on,
      host arrays [B / processes, ...]; there are as many as total steps.
    names: (position, total steps) -> what is in this process's part of that batch, for messages.
    model: JSON fields of the model, stored in checkpoints.
    start: shapes of the parameters -> those the run starts from, a part of the tree; the others
      are initialised.
    tokenizer_files, generation: stored in checkpoints for inference.
    data: digests of what the rows are made from, by name ("size digest"), and of which samples
      share rows (`PLAN`), stored in checkpoints, compared when a run goes on and between processes.
    failures: samples that could not be read.
    counts: numbers to report beside the loss, such as unreadable samples so far.
    work: rows of a step -> (slots that are not empty, FLOPs that they need), for rates.
    kinds: rows of a micro-batch, traced -> slots of each kind, i32 [], for the metrics.
    cuts: smaller shapes that micro-batches may be cut to (see `step.Cuts`).
    fields: top-level keys of the config that only this task knows.
  """

  init: Callable[[Array], Params]
  loss: Callable[[Params, Any], LossSums]
  data_size: int
  batches: Callable[[int, int], Iterator[Rows]]
  model: Mapping[str, Any]
  names: Callable[[int, int], list[str]] = lambda position, total: []
  start: Callable[[Params], Params] = lambda shapes: {}
  tokenizer_files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
  generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  data: Mapping[str, str] = dataclasses.field(default_factory=dict)
  failures: Failures = dataclasses.field(default_factory=Failures)
  counts: Callable[[], Mapping[str, float]] = dict
  work: Callable[[Rows], tuple[int, int]] | None = None
  kinds: Callable[[Any], Mapping[str, Array]] | None = None
  cuts: Cuts | None = None
  fields: tuple[str, ...] = ()


def task_name(name: str) -> str:
  """The name of a task today."""
  return MOVED.get(name, name)


def make_task(config: ConfigDict) -> Task:
  """The task that `config.task` names: one of TASKS, or "module:function" (config -> Task).

  Raises:
    InputError: no such task, or what the task finds wrong with the config.
  """
  name = task_name(config.task)
  module, _, function = TASKS.get(name, name).partition(":")
  try:
    make = getattr(importlib.import_module(module), function)
  except (ModuleNotFoundError, AttributeError, ValueError) as error:
    raise InputError(
      f"config.task={config.task!r}: {error}; accepted: {', '.join(TASKS)}, or module:function"
    ) from error
  return make(config)
