"""A task of toy rows for runs in processes of their own; it notes which examples it gave out."""

import json
import os
import signal
import time
from pathlib import Path

import jax
import numpy as np
from toy import LENGTH, ToyModel, init_params, make_rows

from data_pipes.content import digest_of_data
from vr_jax.training.loss import model_loss
from vr_jax.training.task import Task

EXAMPLES = 80


def note(index, examples):
  """What the environment asks for when a process draws its part of batch `index`.

  TOY_LOG: a file to which [position, examples] of each batch is added, those of this process;
  TOY_SECONDS: how long a batch takes, for what comes by the clock;
  TOY_SIGNAL: "SIGTERM:3", the process sends itself that signal when it is asked for that batch;
  "SIGTERM:3:1", only process 1 does.
  """
  name, *where = os.environ.get("TOY_SIGNAL", "").split(":")
  if where in ([str(index)], [str(index), str(jax.process_index())]):
    os.kill(os.getpid(), signal.Signals[name])
  time.sleep(float(os.environ.get("TOY_SECONDS", "0")))
  if log := os.environ.get("TOY_LOG"):
    with open(log, "a") as file:
      file.write(json.dumps([index, examples]) + "\n")


def make(config):
  """Rows of `EXAMPLES` examples, in an order that each epoch shuffles anew; `note` sees them.

  A file of the config, if there is one, holds the seed of the rows. TOY_EMPTY: the number of the
  batch in which nothing is supervised.
  """
  files = config.input.files
  rows = make_rows(EXAMPLES, seed=int(Path(files[0]).read_text()) if files else 0)
  mine = slice(jax.process_index(), None, jax.process_count())
  size = config.input.batch_size

  def drawn(index):
    numbers = range(index * size, (index + 1) * size)
    return [
      int(np.random.default_rng((config.seed, n // EXAMPLES)).permutation(EXAMPLES)[n % EXAMPLES])
      for n in numbers
    ][mine]

  def batches(position, total_steps):
    for index in range(position, total_steps):
      order = drawn(index)
      note(index, order)
      batch = {k: v[order] for k, v in rows.items()}
      if os.environ.get("TOY_EMPTY") == str(index):
        batch["supervised"] = np.zeros_like(batch["supervised"])
      yield batch

  return Task(
    init=init_params,
    loss=model_loss(ToyModel()),
    data_size=EXAMPLES,
    batches=batches,
    names=lambda position, total_steps: [f"example {n}" for n in drawn(position)],
    model={"name": "toy", "length": LENGTH},
    data={f"input.files[{i}]": digest_of_data(file) for i, file in enumerate(files)},
  )
