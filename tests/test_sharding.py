"""Mesh, parameter placement by table, activation names."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from data_pipes.errors import InputError
from vr_jax.params import match_table, param_shardings
from vr_jax.sharding import (
  FSDP_RULES,
  TENSOR_RULES,
  act_spec,
  batch_sharding,
  check_rules,
  make_mesh,
  shard_act,
)

SHAPES = {
  "llm": {
    "embed": jax.ShapeDtypeStruct((1000, 64), jnp.float32),
    "mlp": jax.ShapeDtypeStruct((3, 64, 128), jnp.float32),
    "scale": jax.ShapeDtypeStruct((64,), jnp.float32),
  },
  "region": {"kernel": jax.ShapeDtypeStruct((7, 5), jnp.float32)},
}


@pytest.mark.parametrize(
  ("axes", "shape"),
  [
    ([("data", -1), ("fsdp", 1)], {"data": 8, "fsdp": 1}),
    ([("data", 4), ("fsdp", 2)], {"data": 4, "fsdp": 2}),
    ([("data", 2), ("fsdp", -1)], {"data": 2, "fsdp": 4}),
  ],
)
def test_mesh_takes_all_devices_with_auto_axes(axes, shape):
  mesh = make_mesh(axes)
  assert dict(mesh.shape) == shape
  assert set(mesh.axis_types) == {AxisType.Auto}


def test_mesh_that_does_not_fit_names_the_sizes():
  with pytest.raises(InputError, match="data=3 x fsdp=1 does not fit 8 devices"):
    make_mesh([("data", 3), ("fsdp", 1)])


def test_fsdp_takes_the_largest_divisible_dim():
  mesh = make_mesh([("data", 2), ("fsdp", 4)])
  placed = param_shardings(SHAPES, mesh, [(".*", "fsdp(axis='fsdp', min_size_to_shard_mb=0)")])
  specs = jax.tree.map(lambda s: s.spec, placed)
  assert specs["llm"]["embed"] == P("fsdp", None)
  assert specs["llm"]["mlp"] == P(None, None, "fsdp")
  assert specs["llm"]["scale"] == P("fsdp")
  assert specs["region"]["kernel"] == P(None, None)  # nothing divides


def test_small_arrays_stay_whole():
  mesh = make_mesh([("data", 2), ("fsdp", 4)])
  placed = param_shardings(SHAPES, mesh, [(".*", "fsdp('fsdp', min_size_to_shard_mb=0.2)")])
  assert placed["llm"]["embed"].spec == P("fsdp", None)  # 256 kB
  assert placed["llm"]["mlp"].spec == P(None, None, None)  # 98 kB


def test_rules_join_on_free_dims_and_the_first_match_wins():
  mesh = make_mesh([("data", 2), ("fsdp", 2), ("model", 2)])
  placed = param_shardings(
    SHAPES,
    mesh,
    [
      ("llm/mlp", "shard_dim('model', -1) | fsdp(('data', 'fsdp'), min_size_to_shard_mb=0)"),
      ("llm/.*", "replicate"),
      (".*", "replicate"),
    ],
  )
  assert placed["llm"]["mlp"].spec == P(None, ("data", "fsdp"), "model")
  assert placed["llm"]["embed"].spec == P(None, None)


@pytest.mark.parametrize(
  ("table", "message"),
  [
    ([("llm/.*", "replicate")], "no rule covers parameter 'region/kernel'"),
    ([(".*", "replicate"), ("region/.*", "replicate")], "rule 'region/.\\*' matches no parameter"),
    ([(".*", "fdsp(axis='fsdp')")], "fdsp.* is not a rule; accepted: replicate"),
    ([(".*", "fsdp(axis='model')")], "axis 'model' is not in config.mesh; it has data, fsdp"),
    ([(".*", "shard_dim('fsdp', 0)")], "'llm/mlp' of shape .3, 64, 128. cannot be split"),
    ([("(", "replicate")], "config.sharding_strategy: "),
  ],
)
def test_tables_are_total_tight_and_readable(table, message):
  mesh = make_mesh([("data", 2), ("fsdp", 4)])
  with pytest.raises(InputError, match=message):
    param_shardings(SHAPES, mesh, table)


def test_match_table_needs_the_whole_path():
  with pytest.raises(InputError, match="no rule covers parameter 'llm/embed'"):
    match_table(SHAPES, [("llm", 1), ("region/.*", 2)], "schedule")


def test_activation_names_are_looked_up_strictly():
  rules = (("batch", ("data", "fsdp")), ("len", None), ("emb", "fsdp"))
  mesh = make_mesh([("data", 4), ("fsdp", 2)])
  x = jnp.zeros((8, 3, 4))
  with jax.set_mesh(mesh):
    y = jax.jit(lambda x: shard_act(x, rules, "batch", "len", None))(x)
    assert y.sharding.is_equivalent_to(batch_sharding(mesh, rules), 3)
    with pytest.raises(ValueError, match="no 'batsh'"):
      shard_act(x, rules, "batsh", "len", None)
    with pytest.raises(ValueError, match="two axes"):
      shard_act(x, rules, "batch", "len", "emb")
    with pytest.raises(ValueError, match="2 names"):
      shard_act(x, rules, "batch", "len")
  assert shard_act(x, (), "anything") is x


def test_batch_sharding_refuses_axes_the_mesh_has_not():
  with pytest.raises(InputError, match="'model'"):
    batch_sharding(make_mesh([("data", 8)]), (("batch", ("data", "model")),))


def test_an_axis_is_split_over_what_divides_it():
  rules = (("frame", ("data", "fsdp", "tensor")), ("kv_heads", "tensor"))
  with jax.set_mesh(make_mesh([("data", 2), ("fsdp", 2), ("tensor", 2)])):
    assert act_spec((16, 4), rules, "frame", None) == P(("data", "fsdp", "tensor"), None)
    assert act_spec((12, 4), rules, "frame", None) == P(("data", "fsdp"), None)
    assert act_spec((12, 1), rules, "frame", "kv_heads") == P(("data", "fsdp"), None)
    assert act_spec((3, 4), rules, "frame", "kv_heads") == P(None, "tensor")


@pytest.mark.parametrize(
  ("rules", "message"),
  [
    ((*FSDP_RULES, ("lenght", None)), "no activation has an axis 'lenght'; accepted: batch"),
    (FSDP_RULES[:-1], "config.sharding_rules has no 'table'"),
    (TENSOR_RULES, "is on mesh axes .'tensor'., which config.mesh has not"),
  ],
)
def test_rules_that_the_model_or_the_mesh_does_not_know_are_refused(rules, message):
  with pytest.raises(InputError, match=message):
    check_rules(rules, make_mesh([("data", 2), ("fsdp", 4)]))


@pytest.mark.compile
def test_the_first_axis_runs_over_the_slices():
  from vr_jax.hardware import parse_target, target_devices

  devices = target_devices(parse_target("tpu:v5e:2x2", slices=2))
  mesh = make_mesh([("data", 2), ("fsdp", -1)], devices)
  assert [{d.slice_index for d in row} for row in mesh.devices] == [{0}, {1}]
  with pytest.raises(InputError, match="data=1, runs over the 2 slices; make it a multiple of 2"):
    make_mesh([("data", 1), ("fsdp", -1)], devices)
