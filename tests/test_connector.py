"""Connectors: golden cases of every kind, convolutions against XLA's, sizes at full scale."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rounding import assert_same_up_to_rounding

from data_pipes.errors import InputError
from vr_jax.models import connector
from vr_jax.models.connector import (
  KINDS,
  Connector,
  ConnectorConfig,
  DepthwiseConv3x3,
  Sampler,
  Stage,
  scene_token_count,
)
from vr_jax.parity.golden import FAIL, Golden, run_parity
from vr_jax.parity.model import projectors

SAME_WIDTH = {"spatial_conv", "spatial_pool"}


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def params_like(init, *args):
  """Random parameters of the shapes that `init` would make (and would compile for)."""
  shapes = jax.eval_shape(init, jax.random.key(0), *args)["params"]
  rng = np.random.default_rng(1)
  return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32) * 0.3, shapes)


def count(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


def test_golden(golden):
  results = run_parity(golden, ["02_projectors"])
  assert not [str(r) for r in results if r.status != "pass"]
  assert len(results) == 12
  assert not [str(r) for r in results if r.unknown]


def test_golden_notices_another_epsilon(golden, monkeypatch):
  def norm(dtype, epsilon=None, **kwargs):
    return connector_norm(dtype, epsilon=1e-6, **kwargs)

  connector_norm = connector.LayerNorm
  monkeypatch.setattr(connector, "LayerNorm", norm)
  folder = Golden(golden)
  monkeypatch.setattr(
    folder, "cases", lambda stage: [c for c in Golden.cases(folder, stage) if "lowvar" in c.id]
  )
  assert [r.status for r in projectors(folder)] == [FAIL]


def test_parameter_counts_at_full_size():
  features = jax.ShapeDtypeStruct((1, 16, 729, 1152), jnp.float32)
  cfg = ConnectorConfig()
  params = jax.eval_shape(Connector(cfg).init, jax.random.key(0), features)["params"]
  assert {k: count(v) for k, v in params.items()} == {
    "s1": 119_744_416,
    "sampler": 102_764_032,
    "s2": 128_683_520,
    "readout": 25_697_280,
  }
  assert params["s1"]["b1"]["se"]["fc1"]["kernel"].shape == (3584, 288)
  assert params["s1"]["b2"]["se"]["fc1"]["kernel"].shape == (3584, 896)
  assert "downsample" in params["s1"]["b1"]
  assert "downsample" not in params["s2"]["b1"]


@pytest.mark.parametrize("kind", KINDS)
def test_scene_token_count(kind):
  cfg = ConnectorConfig(kind=kind, width=32)
  for frames, grid in [(16, 27), (3, 5), (1, 4)]:
    shape = (2, frames, grid * grid, 32 if kind in SAME_WIDTH else 24)
    features = jax.ShapeDtypeStruct(shape, jnp.float32)
    if not (count := scene_token_count(cfg, frames, grid)):
      assert (kind, frames) in [("stc_connector_v35", 1), ("stp_connector", 1)]
      with pytest.raises(InputError, match="no scene token of 1 frames with 4x4"):
        jax.eval_shape(Connector(cfg).init, jax.random.key(0), features)
      continue
    tokens, _ = jax.eval_shape(Connector(cfg).init_with_output, jax.random.key(0), features)
    assert tokens.shape == (2, count, 32)


def test_published_scene_token_counts():
  counts = {k: scene_token_count(ConnectorConfig(kind=k), 16, 27) for k in KINDS}
  assert counts == {
    "stc_connector_v35": 1352,
    "stc_connector": 1764,
    "stp_connector": 1352,
    "spatial_conv": 18 * 14 * 14,
    "spatial_pool": 16 * 13 * 13,
    "mlp2x_gelu": 729,
    "linear": 729,
  }
  assert scene_token_count(ConnectorConfig(), 8, 27) == 676


def test_depthwise_convolution_is_the_grouped_one():
  x, module = normal(2, 5, 7, 12), DepthwiseConv3x3()
  params = params_like(module.init, x)

  @jax.jit
  def grouped(params, x):
    return jax.lax.conv_general_dilated(
      x,
      params["kernel"][:, :, None],
      (1, 1),
      "SAME",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      feature_group_count=12,
    )

  @jax.jit
  def shifted(params, x):
    return module.apply({"params": params}, x)

  assert_same_up_to_rounding(shifted(params, x), grouped(params, x), 9)
  weigh = normal(2, 5, 7, 12, seed=1)
  ours, theirs = (
    jax.grad(lambda p, x, f=f: jnp.sum(f(p, x) * weigh), argnums=(0, 1))(params, x)
    for f in (shifted, grouped)
  )
  assert_same_up_to_rounding(ours, theirs, 2 * 5 * 7)  # a tap's gradient sums over all places


@pytest.mark.parametrize("kind", ["stc_connector_v35", "stc_connector", "spatial_conv"])
def test_sampler_is_the_strided_convolution(kind):
  x, cfg = normal(2, 5, 5, 4, 6), ConnectorConfig(kind=kind, width=10)
  params = params_like(Sampler(cfg).init, x)
  pad = KINDS[kind].padding
  conv = jax.lax.conv_general_dilated(
    x,
    params["kernel"],
    KINDS[kind].stride,
    [(pad, pad)] * 3,
    dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
  )
  expected = jax.nn.silu(conv + params["bias"])
  ours = Sampler(cfg).apply({"params": params}, x)
  assert_same_up_to_rounding(ours, expected, params["kernel"][..., 0].size + 8)


def test_odd_frames_rows_and_columns_are_dropped():
  cfg = ConnectorConfig(kind="stp_connector", width=8)
  x = normal(1, 3, 5, 5, 8)
  changed = x.copy()
  changed[:, 2], changed[:, :, 4], changed[:, :, :, 4] = 7, 7, 7
  np.testing.assert_array_equal(Sampler(cfg).apply({}, x), Sampler(cfg).apply({}, changed))


@pytest.mark.slow  # the decoder's and the tower's stay
def test_remat_changes_no_gradient():
  x, cfg = normal(1, 2, 4, 4, 12), ConnectorConfig(width=16)
  params = params_like(Stage(cfg, 2).init, x)

  @functools.partial(jax.jit, static_argnums=1)
  def grad(params, cfg):
    return jax.grad(lambda p: jnp.sum(jnp.sin(Stage(cfg, 2).apply({"params": p}, x))))(params)

  plain, again = grad(params, cfg), grad(params, dataclasses.replace(cfg, remat="full"))
  # Two blocks: 1x1, 3x3, mean, two of the gate, 1x1 and three norms; in the gradient twice more,
  # and there over all 32 places.
  assert_same_up_to_rounding(again, plain, 3 * 2 * (8 * 16 + 9 + 2 * 16 + 32))


def test_bfloat16_matmuls():
  x, cfg = normal(1, 2, 16, 12), ConnectorConfig(width=16)
  half = dataclasses.replace(cfg, dtype="bfloat16")
  params = params_like(Connector(cfg).init, x)
  exact, rounded = (jax.jit(Connector(c).apply)({"params": params}, x) for c in (cfg, half))
  assert rounded.dtype == jnp.bfloat16
  error = np.sqrt(np.mean((np.float32(rounded) - exact) ** 2))
  assert error < 0.05 * np.sqrt(np.mean(exact**2))


def test_bad_kinds_and_widths_are_named():
  with pytest.raises(InputError, match=r"'mlp3x_gelu'.*mlp2x_gelu"):
    ConnectorConfig(kind="mlp3x_gelu")
  with pytest.raises(InputError, match=r"spatial_pool.*24.*32"):
    params_like(
      Connector(ConnectorConfig(kind="spatial_pool", width=32)).init, normal(1, 2, 16, 24)
    )
