"""Checkpoints: round trips, other meshes, and files that are not what they should be."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import ToyModel, init_params, make_rows

from data_pipes.errors import InputError
from vr_jax.checkpoint import export, find_checkpoint, load_for_inference, load_params, make_meta
from vr_jax.configs import base_config
from vr_jax.params import param_shardings
from vr_jax.sharding import make_mesh
from vr_jax.training.checkpoints import Checkpoints
from vr_jax.training.loss import model_loss
from vr_jax.training.schedule import make_optimizer
from vr_jax.training.step import TrainState, make_step, micro_batches

MODEL = {"name": "toy", "sizes": [1, 2]}
TOKENIZER = {"tokenizer.model": b"\xff\x00binary", "merges.txt": b"a b\nc d\n"}
META = make_meta(MODEL, TOKENIZER, {"eos_ids": [2]}, {"lr": 0.1})


def make_state():
  config = base_config()
  config.schedule = (("tower/.*", None), (".*", {"decay": "constant"}))
  optimizer = make_optimizer(config, init_params(), total_steps=10)
  return TrainState.create(init_params(), config.schedule, optimizer), optimizer


def target_of(state, sharding=None):
  sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


def assert_trees_equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A run's folder with the state after two steps, and that state."""
  folder = tmp_path_factory.mktemp("run")
  state, optimizer = make_state()
  step = make_step(model_loss(ToyModel()), optimizer)
  for seed in range(2):
    state, _ = step(state, micro_batches(make_rows(4, seed), 1))
  kept = jax.device_get(state)
  with Checkpoints(folder / "checkpoints") as checkpoints:
    checkpoints.save(state, 2, META)
    # Saving is asynchronous: the arrays it saves are donated at once.
    state, _ = step(state, micro_batches(make_rows(4, 9), 1))
  return folder, kept


def test_the_whole_state_comes_back(saved):
  folder, state = saved
  with Checkpoints(folder / "checkpoints") as checkpoints:
    assert checkpoints.latest_step() == 2
    restored, position = checkpoints.restore(2, target_of(state))
  assert position == 2
  assert_trees_equal(jax.device_get(restored), state)


def test_restores_onto_another_mesh(saved):
  folder, state = saved
  mesh = make_mesh([("data", 2), ("fsdp", 4)])
  rules = [(".*", "fsdp(axis='fsdp', min_size_to_shard_mb=0)")]
  target = jax.tree.map(
    lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
    target_of(state),
    param_shardings(target_of(state), mesh, rules),
  )
  with Checkpoints(folder / "checkpoints") as checkpoints:
    restored, _ = checkpoints.restore(2, target)
  kernel = restored.params_train["mlp"]["kernel"]
  assert kernel.sharding.shard_shape(kernel.shape) == (4, 16)
  assert_trees_equal(jax.device_get(restored), state)


def test_keeps_the_newest_and_every_so_many(tmp_path):
  state, _ = make_state()
  with Checkpoints(tmp_path, keep=1, keep_every=4) as checkpoints:
    for step in range(1, 7):
      checkpoints.save(state.replace(step=jnp.int32(step)), step, META)
      checkpoints.save(state.replace(step=jnp.int32(step)), step, META)  # twice is once
  assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdigit()) == ["4", "6"]


def test_inference_needs_nothing_but_the_folder(saved):
  folder, state = saved
  for path in (folder, folder / "checkpoints", folder / "checkpoints" / "2"):
    loaded = load_for_inference(path)
    assert loaded.model == MODEL
    assert loaded.tokenizer_files == TOKENIZER
    assert loaded.generation == {"eos_ids": [2]}
    assert loaded.config == {"lr": 0.1}
    assert_trees_equal(jax.device_get(loaded.params), state.params())


def test_an_exported_folder_loads_like_a_checkpoint(tmp_path):
  params = {"a": {"w": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3)}}
  export(tmp_path / "mini", params, META)
  loaded = load_for_inference(tmp_path / "mini")
  assert loaded.model == MODEL
  assert_trees_equal(loaded.params, params)
  assert loaded.params["a"]["w"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda p: {k: v for k, v in p.items() if k != "mlp"}, "mlp/bias is not expected"),
    (lambda p: p | {"new": {"w": p["mlp"]["bias"]}}, "new/w is missing"),
    (
      lambda p: p | {"mlp": jax.tree.map(lambda x: x.astype(jnp.bfloat16), p["mlp"])},
      r"mlp/bias is float32\[16\] instead of bfloat16\[16\]",
    ),
    (
      lambda p: p | {"mlp": p["mlp"] | {"bias": jnp.zeros(3)}},
      r"mlp/bias is float32\[16\] instead of float32\[3\]",
    ),
  ],
)
def test_another_tree_shape_or_dtype_is_refused(saved, change, message):
  folder, state = saved
  target = target_of(state.replace(params_train=change(state.params_train)))
  with (
    Checkpoints(folder / "checkpoints") as checkpoints,
    pytest.raises(InputError, match=message),
  ):
    checkpoints.restore(2, target)


def damage_manifest(step):
  (step / "params" / "manifest.ocdbt").write_bytes(b"junk")


def lose_data(step):
  for folder in (step / "params").rglob("d"):
    shutil.rmtree(folder)


def truncate_data(step):
  for path in (step / "params").rglob("d/*"):
    path.write_bytes(path.read_bytes()[:10])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
  "damage",
  [
    damage_manifest,
    lose_data,
    truncate_data,
    lambda step: (step / "params" / "_METADATA").unlink(),
    lambda step: (step / "meta" / "metadata").write_text('{"model": '),
    lambda step: (step / "meta" / "metadata").unlink(),
    lambda step: (step / "meta" / "metadata").write_text('{"other": 1}'),
  ],
)
def test_a_damaged_checkpoint_is_one_clear_line(saved, tmp_path, damage):
  step = tmp_path / "2"
  shutil.copytree(saved[0] / "checkpoints" / "2", step)
  damage(step)
  with pytest.raises(
    InputError, match=r"truncated, damaged or not one of|is not one of vr_jax"
  ) as e:
    load_for_inference(step)
  assert "\n" not in str(e.value)
  assert str(step) in str(e.value)


def test_an_unfinished_save_is_not_a_checkpoint(saved, tmp_path):
  folder = tmp_path / "checkpoints"
  shutil.copytree(saved[0] / "checkpoints", folder)
  shutil.copytree(folder / "2", folder / "3.orbax-checkpoint-tmp")
  assert find_checkpoint(tmp_path).name == "2"
  with Checkpoints(folder, keep=2) as checkpoints:
    assert checkpoints.latest_step() == 2
    checkpoints.save(make_state()[0].replace(step=jnp.int32(3)), 3, META)
  assert sorted(p.name for p in folder.iterdir()) == ["2", "3"]  # what the kill left is gone


def test_a_folder_without_checkpoint_says_what_was_expected(tmp_path):
  with pytest.raises(InputError, match="no checkpoint here; expected a work directory"):
    load_for_inference(tmp_path)
  with pytest.raises(InputError, match="no checkpoint here"):
    load_params(tmp_path / "absent")
