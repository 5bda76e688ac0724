"""A task of toy rows for runs in processes of their own; it notes which examples it gave out."""

import json
import os
import signal

import numpy as np
from toy import LENGTH, ToyModel, init_params, make_rows

from vr_jax.training.loss import model_loss
from vr_jax.training.task import Task

EXAMPLES = 80


def make(config):
  """Rows of `EXAMPLES` examples, in an order that each epoch shuffles anew.

  TOY_LOG: a file to which [position, examples] of each batch is added. TOY_SIGNAL: "SIGTERM:3",
  the process
  sends itself that signal when it is asked for that batch.
  """
  rows = make_rows(EXAMPLES)
  size = config.input.batch_size

  def batches(position, total_steps):
    for index in range(position, total_steps):
      numbers = range(index * size, (index + 1) * size)
      order = [
        int(np.random.default_rng((config.seed, n // EXAMPLES)).permutation(EXAMPLES)[n % EXAMPLES])
        for n in numbers
      ]
      number, _, position = os.environ.get("TOY_SIGNAL", "").partition(":")
      if position == str(index):
        os.kill(os.getpid(), signal.Signals[number])
      if log := os.environ.get("TOY_LOG"):
        with open(log, "a") as file:
          file.write(json.dumps([index, order]) + "\n")
      yield {k: v[order] for k, v in rows.items()}

  return Task(
    init=init_params,
    loss=model_loss(ToyModel()),
    data_size=EXAMPLES,
    batches=batches,
    model={"name": "toy", "length": LENGTH},
  )
