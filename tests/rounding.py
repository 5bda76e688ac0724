"""Limits of float32 comparisons that follow from the arithmetic and hold on every processor.

Two programs of one computation round in other places: vector width, fused multiply-adds, threads
and the compiler decide in which order a sum is taken. A sum of n terms rounds at most n times in
any order, each time by at most 2^-24 of its size, so results differ by no more than n roundings
where n counts the terms of all sums on the way from inputs to result. Rounding errors have both
signs: n of them come to some sqrt(n), and 8 sqrt(n) is passed with a probability below n exp(-32)
(Higham and Mary 2019, "A new approach to probabilistic rounding error analysis", theorem 2.4). A
limit is the lesser of both, of the largest element: partial sums in the small random models here
are about as large as what they come to.
"""

import jax
import numpy as np

from vr_jax.models.connector import KINDS

ROUNDING = 2.0**-24  # of a float32 number


def share(roundings):
  """What so many roundings may come to, as a share of the numbers' size."""
  return min(roundings, 8 * roundings**0.5) * ROUNDING


def assert_same_up_to_rounding(ours, expected, roundings):
  """Arrays, or trees of arrays leaf by leaf: within so many roundings of the largest element."""

  def close(path, a, b):
    limit = share(roundings) * np.abs(b).max(initial=0)
    np.testing.assert_allclose(a, b, rtol=0, atol=limit, err_msg=jax.tree_util.keystr(path))

  jax.tree_util.tree_map_with_path(close, jax.device_get(ours), jax.device_get(expected))


def decoder_roundings(cfg, length):
  """Terms of the sums from a decoder's embeddings to its logits, `length` slots a row."""
  heads = cfg.heads * cfg.head_dim
  # Norm, q and k, scores, softmax, mean of the values, output; norm, gate, down.
  attention = 2 * cfg.width + cfg.head_dim + 2 * length + heads
  mlp = 2 * cfg.width + cfg.mlp_dim
  return cfg.depth * (attention + mlp) + 2 * cfg.width  # last norm, head


def tower_roundings(cfg):
  """Terms of the sums from pixels to the features of a SigLIP tower."""
  attention = 2 * cfg.width + cfg.width // cfg.heads + 2 * cfg.grid**2 + cfg.width
  return 3 * cfg.patch_size**2 + cfg.layers * (attention + 2 * cfg.width + cfg.mlp_dim)


def connector_roundings(cfg, width_in, cells):
  """Terms of the sums from features of `cells` patches a frame to scene tokens."""
  # Three convolutions with their norms, the mean over the cells and its two products.
  block = 6 * cfg.width + 9 + cells + 2 * cfg.width
  # Two stages, the sampler over eight places of every channel; frames may be averaged instead.
  return 2 * KINDS[cfg.kind].stage_depth * block + 8 * cfg.width + width_in + 2 * cfg.width


def loss_roundings(cfg, length):
  """Terms of the sums from pixels to a model's loss over rows of `length` slots."""
  connector = connector_roundings(cfg.connector, cfg.img.width, cfg.img.grid**2)
  visual = tower_roundings(cfg.img) + connector  # objects pass fewer
  return visual + decoder_roundings(cfg.llm, length) + cfg.llm.vocab_size


def gradient_roundings(cfg, length):
  """As `loss_roundings`: each sum of the way forward has two in the gradient."""
  return 3 * loss_roundings(cfg, length)
