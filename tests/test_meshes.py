"""The whole model on simulated meshes: the loss and the gradients of one device, to rounding."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
import small_model
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from rounding import assert_same_up_to_rounding, gradient_roundings, loss_roundings, share

from vr_jax.hlo import Program
from vr_jax.models import embedder
from vr_jax.models.connector import ConnectorConfig
from vr_jax.models.region import RegionConfig, RegionEncoder
from vr_jax.models.videorefer import VideoRefer
from vr_jax.params import param_shardings
from vr_jax.sharding import (
  FSDP_RULES,
  FSDP_STRATEGY,
  SEQUENCE_RULES,
  TENSOR_RULES,
  TENSOR_STRATEGY,
  batch_sharding,
  make_mesh,
)
from vr_jax.training.loss import model_loss

# A light connector in the default tests; the STC, whose blocks are not scanned, compiles for long.
LIGHT = dataclasses.replace(
  small_model.CONFIG,
  img=dataclasses.replace(small_model.CONFIG.img, width=64),
  connector=ConnectorConfig(kind="spatial_conv", width=64),
)
STC = small_model.CONFIG
# Results are compared, not timed: code that is made fast, not fast code.
QUICK = {"xla_backend_optimization_level": 0}


def loss_and_grads(cfg, rules=(), **sizes):
  def mean(params, rows):
    sums = model_loss(VideoRefer(cfg, rules), **sizes)(params, rows)
    return sums.sum / sums.weight

  return jax.value_and_grad(mean)


@functools.cache
def on_one_device(cfg):
  """(parameters, rows, (loss, gradients)) without a mesh."""
  params, rows = jax.device_get(small_model.params(cfg)), small_model.rows(8, cfg)
  both = jax.jit(loss_and_grads(cfg), compiler_options=QUICK)(params, rows)
  return params, rows, jax.device_get(both)


def small(strategy):
  """The table with the threshold for splitting an array taken away."""
  return [
    (pattern, re.sub(r"fsdp\((.*?\)?)\)", r"fsdp(\1, min_size_to_shard_mb=0)", rule))
    for pattern, rule in strategy
  ]


MESHES = {
  "8x1": ((("data", 8), ("fsdp", 1)), FSDP_RULES, FSDP_STRATEGY),
  "4x2": ((("data", 4), ("fsdp", 2)), FSDP_RULES, FSDP_STRATEGY),
  "2x4": ((("data", 2), ("fsdp", 4)), FSDP_RULES, FSDP_STRATEGY),
  "2x2x2": ((("data", 2), ("fsdp", 2), ("tensor", 2)), TENSOR_RULES, TENSOR_STRATEGY),
  "1x2x4": ((("data", 1), ("fsdp", 2), ("tensor", 4)), TENSOR_RULES, TENSOR_STRATEGY),
  "2x2x2 sequence": ((("data", 2), ("fsdp", 2), ("tensor", 2)), SEQUENCE_RULES, TENSOR_STRATEGY),
}


@pytest.mark.parametrize(
  ("name", "cfg"),
  [
    pytest.param("8x1", LIGHT, id="8x1"),
    # Eight simulated devices wait for one another: on few, busy cores XLA may give up and abort.
    *(
      pytest.param(name, LIGHT, id=name, marks=pytest.mark.slow) for name in ("4x2", "2x4", "2x2x2")
    ),
    *(
      pytest.param(name, STC, id=f"{name} STC", marks=pytest.mark.slow)
      for name in ("2x4", "2x2x2", "1x2x4", "2x2x2 sequence")
    ),
  ],
)
def test_meshes_agree_with_one_device(name, cfg, monkeypatch):
  """With table and head gathered in three chunks, which one device does not do."""
  monkeypatch.setattr(embedder, "LOOKUP_CHUNK", 64)
  axes, rules, strategy = MESHES[name]
  params, rows, (loss, grads) = on_one_device(cfg)
  mesh = make_mesh(axes)
  placed = param_shardings(params, mesh, small(strategy))
  with jax.set_mesh(mesh):
    step = jax.jit(
      loss_and_grads(cfg, rules, chunk=64),
      in_shardings=(placed, batch_sharding(mesh, rules)),
      out_shardings=(None, placed),
      compiler_options=QUICK,
    )
    compiled = step.lower(params, rows).compile()
    rows = jax.device_put(rows, batch_sharding(mesh, rules))
    got_loss, got_grads = compiled(jax.device_put(params, placed), rows)
  found = Program(compiled.as_text()).collectives()
  if rules is FSDP_RULES:  # weights and their gradients move, activations do not
    assert not {"all-to-all", "collective-permute"} & set(found)
  length = rows["tokens"].shape[1]
  assert_same_up_to_rounding(got_loss, loss, loss_roundings(cfg, length))
  # The bias of keys has gradient zero (it moves all scores of a query alike): only noise there.
  noise = 1e-7 * max(np.abs(g).max() for g in jax.tree.leaves(grads))

  def close(path, want, got):
    atol = share(gradient_roundings(cfg, length)) * np.abs(want).max() + noise
    np.testing.assert_allclose(got, want, rtol=0, atol=atol, err_msg=str(path))

  jax.tree_util.tree_map_with_path(close, grads, got_grads)
  gate = got_grads["llm"]["layers"]["mlp"]["gating_einsum"]
  assert gate.addressable_shards[0].data.size == gate.size // mesh.size * mesh.shape["data"]


def test_region_encoder_needs_no_collective():
  """Objects over one mesh axis, rows over another: pooling, merge and MLP stay where they are."""
  mesh = make_mesh([("data", 4), ("fsdp", 1), ("tensor", 2)])
  rules = TENSOR_RULES
  cfg = RegionConfig(width=64, tokens=2)
  rows = small_model.rows(8, objects=4)
  features = np.zeros((*rows["frames"].shape[:2], 16, 32), np.float32)
  args = (features, rows["region_masks"], rows["region_frames"])
  params = RegionEncoder(cfg).init(jax.random.key(0), *args)
  split = NamedSharding(mesh, P("data", "tensor"))

  def tokens(features, *args):
    return RegionEncoder(cfg, rules).apply(params, features, *args)[0]

  with jax.set_mesh(mesh):
    encode = jax.jit(tokens, in_shardings=(batch_sharding(mesh, rules), split, split))
    text = encode.lower(*args).compile().as_text()
    assert "num_partitions=8" in text
    assert not re.findall(r"all-\w+|reduce-scatter|collective-permute", text)
    assert encode(*args).sharding.is_equivalent_to(split, 4)
