"""The supervised loss against the plain one over full logits."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rounding import assert_same_up_to_rounding

from vr_jax.training.loss import supervised_loss

B, L, D, W = 3, 23, 8, 50


@pytest.fixture
def rows():
  rng = np.random.default_rng(0)
  supervised = np.zeros((B, L), bool)
  supervised[0, 5:9] = supervised[0, 14:20] = True  # two answers
  supervised[1, 22] = supervised[1, 0] = True  # the last slot; and slot 0, which nothing predicts
  return {
    "hidden": jnp.asarray(rng.normal(size=(B, L, D)), jnp.float32),
    "tokens": jnp.asarray(rng.integers(0, W, (B, L)), jnp.int32),
    "supervised": jnp.asarray(supervised),
    "table": jnp.asarray(rng.normal(size=(D, W)), jnp.float32),
  }


def plain(hidden, table, rows):
  nll = optax.softmax_cross_entropy_with_integer_labels(
    hidden[:, :-1] @ table, rows["tokens"][:, 1:]
  )
  weights = rows["supervised"][:, 1:]
  return (nll * weights).sum(), weights.sum()


def chunked(hidden, table, rows, **sizes):
  def logits(h, rows=None):
    return h @ (table if rows is None else jax.lax.dynamic_slice_in_dim(table, *rows, axis=1))

  return supervised_loss(hidden, rows["tokens"], rows["supervised"], logits, **sizes)


@pytest.mark.parametrize("sizes", [{}, {"budget": 10, "chunk": 10}, {"budget": 12, "chunk": 13}])
def test_equals_the_loss_over_full_logits_with_its_gradients(rows, sizes):
  def ours(hidden, table):
    return chunked(hidden, table, rows, **sizes).sum

  def theirs(hidden, table):
    return plain(hidden, table, rows)[0]

  args = rows["hidden"], rows["table"]
  sums = chunked(*args, rows, **sizes)
  want, weight = plain(*args, rows)
  roundings = D + W + 11  # a logit, its softmax, the supervised tokens
  assert_same_up_to_rounding(sums.sum, want, roundings)
  assert (sums.weight, sums.overflow) == (weight, 0) == (11, 0)
  for got, want in zip(jax.grad(ours, (0, 1))(*args), jax.grad(theirs, (0, 1))(*args), strict=True):
    assert_same_up_to_rounding(got, want, 3 * roundings)  # as far back, and over the vocabulary


def test_what_does_not_fit_the_budget_is_reported(rows):
  sums = chunked(rows["hidden"], rows["table"], rows, budget=6, chunk=30)
  assert (sums.weight, sums.overflow) == (7, 4)


def test_a_batch_without_targets_weighs_nothing(rows):
  rows["supervised"] = jnp.zeros((B, L), bool)
  sums = chunked(rows["hidden"], rows["table"], rows)
  assert (sums.sum, sums.weight, sums.overflow) == (0, 0, 0)


def test_logits_in_bfloat16_are_summed_in_float32(rows):
  bf16 = rows["hidden"].astype(jnp.bfloat16)
  table = rows["table"].astype(jnp.bfloat16)
  sums = chunked(bf16, table, rows)
  assert sums.sum.dtype == jnp.float32
  np.testing.assert_allclose(sums.sum, plain(rows["hidden"], rows["table"], rows)[0], rtol=1e-2)


def test_no_logits_for_the_whole_sequence_are_made():
  B, L, D, W = 2, 256, 16, 4096
  shapes = (
    jax.ShapeDtypeStruct((B, L, D), jnp.float32),
    jax.ShapeDtypeStruct((D, W), jnp.float32),
    {
      "tokens": jax.ShapeDtypeStruct((B, L), jnp.int32),
      "supervised": jax.ShapeDtypeStruct((B, L), jnp.bool_),
    },
  )

  def largest(loss) -> int:
    """Elements of the largest array in the compiled gradient."""
    text = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile().as_text()
    sizes = re.findall(r"\b(?:f32|bf16|s32|pred)\[([\d,]+)\]", text)
    return max(int(np.prod([int(n) for n in size.split(",")])) for size in sizes)

  assert largest(lambda h, t, r: plain(h, t, r)[0]) >= B * (L - 1) * W  # the check sees such arrays
  assert largest(lambda h, t, r: chunked(h, t, r, budget=64, chunk=256).sum) <= D * W
