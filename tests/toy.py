"""A toy model and task with the interfaces of the real ones, small enough to train in a second."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

VOCABULARY = 32
LENGTH = 12


class Spliced(NamedTuple):
  tokens: jax.Array
  supervised: jax.Array


class ToyModel(nn.Module):
  """Predicts the next token from the one before it and the mean of all before that."""

  width: int = 16

  def setup(self):
    self.tower = nn.Dense(self.width)
    self.table = nn.Embed(VOCABULARY, self.width)
    self.mlp = nn.Dense(self.width)
    self.head = nn.Dense(VOCABULARY)

  def __call__(self, rows):
    x = self.table(rows["tokens"])
    seen = jnp.cumsum(x, axis=1) / jnp.arange(1, x.shape[1] + 1)[:, None]
    x = x + nn.gelu(self.mlp(self.tower(seen)))
    return x, Spliced(rows["tokens"], rows["supervised"])

  def logits(self, hidden):
    return self.head(hidden)


def everything(model, rows):
  hidden, _ = model(rows)
  return model.logits(hidden)


def make_rows(count, seed=0):
  """Rows whose number of supervised tokens differs a lot."""
  rng = np.random.default_rng(seed)
  lengths = rng.integers(1, LENGTH - 1, count)
  return {
    "tokens": rng.integers(0, VOCABULARY, (count, LENGTH)).astype(np.int32),
    "supervised": np.arange(LENGTH) >= LENGTH - lengths[:, None],
  }


def init_params(key=None):
  rows = jax.tree.map(jnp.asarray, make_rows(1))
  key = jax.random.key(0) if key is None else key
  return ToyModel().init(key, rows, method=everything)["params"]
