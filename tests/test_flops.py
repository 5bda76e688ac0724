"""The FLOP walk against counts made by hand, and against the needed FLOPs of whole models."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas

from data_pipes.errors import InputError
from vr_jax.flops import count_flops


def shape(*sizes):
  return jax.ShapeDtypeStruct(sizes, jnp.float32)


def test_a_matmul():
  assert count_flops(jnp.dot, shape(3, 5), shape(5, 7)) == 2 * 3 * 5 * 7
  batched = functools.partial(jnp.einsum, "bij,bjk->bik")
  assert count_flops(batched, shape(4, 3, 5), shape(4, 5, 7)) == 4 * 2 * 3 * 5 * 7


def test_convolutions():
  def conv(x, kernel, groups=1, padding="VALID"):
    return jax.lax.conv_general_dilated(
      x,
      kernel,
      (1, 1),
      padding,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      feature_group_count=groups,
    )

  assert count_flops(conv, shape(2, 8, 8, 6), shape(3, 3, 6, 10)) == 2 * (2 * 6 * 6 * 10) * 9 * 6
  depthwise = functools.partial(conv, groups=6, padding="SAME")
  assert count_flops(depthwise, shape(1, 8, 8, 6), shape(3, 3, 1, 6)) == 2 * 8 * 8 * 6 * 9


def test_element_wise_work_is_not_counted():
  assert count_flops(lambda x: jnp.tanh(x * 2 + x).sum(), shape(100)) == 0


def chain(x, weights):
  return jax.lax.scan(lambda x, w: (x @ w, None), x, weights)[0]


def test_a_scan_counts_every_trip():
  once = 2 * 4 * 8 * 8
  assert count_flops(chain, shape(4, 8), shape(5, 8, 8)) == 5 * once
  assert count_flops(jax.jit(chain), shape(4, 8), shape(5, 8, 8)) == 5 * once
  nested = lambda x, w: jax.lax.fori_loop(0, 3, lambda _, x: chain(x, w), x)  # noqa: E731
  assert count_flops(nested, shape(4, 8), shape(5, 8, 8)) == 15 * once


def test_gradients_cost_twice_and_only_for_what_is_differentiated():
  once = 5 * 2 * 4 * 8 * 8
  loss = lambda x, w: chain(x, w).sum()  # noqa: E731
  args = shape(4, 8), shape(5, 8, 8)
  assert count_flops(jax.grad(loss, (0, 1)), *args) == 3 * once
  assert count_flops(jax.grad(loss, 0), *args) == 2 * once


def test_remat_counts_what_it_computes_again():
  def loss(x, w):
    return jax.lax.scan(jax.checkpoint(lambda x, w: (jnp.sin(x @ w) @ w, None)), x, w)[0].sum()

  once = 5 * 2 * 4 * 8 * 8
  # Forward 2, again 1 (the second product is not needed), backward 4.
  assert count_flops(jax.grad(loss, (0, 1)), shape(4, 8), shape(5, 8, 8)) == 7 * once


def test_custom_derivatives_count_as_written():
  @jax.custom_vjp
  def dot(x, w):
    return x @ w

  dot.defvjp(
    lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, jnp.zeros_like(saved[1]))
  )
  args = shape(4, 8), shape(8, 8)
  assert count_flops(dot, *args) == 2 * 4 * 8 * 8
  gradient = jax.grad(lambda x, w: dot(x, w).sum(), (0, 1))
  assert count_flops(gradient, *args) == 2 * 2 * 4 * 8 * 8


def test_the_dearest_branch_counts():
  def either(x, w):
    return jax.lax.cond(x.sum() > 0, lambda: x @ w, lambda: x @ w @ w)

  assert count_flops(either, shape(4, 8), shape(8, 8)) == 2 * 2 * 4 * 8 * 8


def test_a_loop_of_unknown_length_must_be_declared():
  def loop(x, w):
    return jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ w, x)

  args = shape(4, 8), shape(8, 8)
  with pytest.raises(InputError, match="while_trips"):
    count_flops(loop, *args)
  assert count_flops(loop, *args, while_trips=7) == 7 * 2 * 4 * 8 * 8


def test_a_kernel_counts_what_it_declares():
  def kernel(x_ref, o_ref):
    o_ref[...] = x_ref[...] @ x_ref[...]

  def call(x, cost):
    return pallas.pallas_call(kernel, out_shape=shape(8, 8), cost_estimate=cost)(x)

  cost = pallas.CostEstimate(flops=123, bytes_accessed=0, transcendentals=0)
  assert count_flops(functools.partial(call, cost=cost), shape(8, 8)) == 123
  with pytest.raises(InputError, match="declares no cost_estimate"):
    count_flops(functools.partial(call, cost=None), shape(8, 8))
