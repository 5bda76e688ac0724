"""The recipe of the paper at full size, as shapes: what trains, what lies where."""

import math

import jax
import pytest

from vr_jax.configs import load_config
from vr_jax.models.videorefer import init_params
from vr_jax.sharding import batch_sharding, make_mesh
from vr_jax.training.loop import accum_steps, state_target
from vr_jax.training.schedule import make_optimizer
from vr_jax.training.start import model_config

CONNECTOR, REGION = 376_889_248, 16_980_992
DECODER = 7_615_616_512 - 2 * (152_064 - 151_647) * 3584  # Qwen2-7B, its spare tokens cut off


def elements(tree):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def target_of(name):
  config = load_config(name)
  cfg = model_config(config)
  shapes = jax.eval_shape(lambda key: init_params(cfg, key), jax.random.key(0))
  optimizer = make_optimizer(config, shapes, total_steps=100)
  return state_target(config, shapes, optimizer, make_mesh(config.mesh))


@pytest.mark.parametrize(
  ("name", "trained", "parts"),
  [
    ("stage1_align", CONNECTOR, {"connector"}),
    ("stage2_region", REGION, {"region"}),
    ("stage2p5_knowledge", CONNECTOR + REGION + DECODER, {"connector", "region", "llm"}),
    ("stage3_instruct", CONNECTOR + REGION + DECODER, {"connector", "region", "llm"}),
  ],
)
def test_each_stage_trains_what_the_paper_says(name, trained, parts):
  target = target_of(name)
  assert set(target.params_train) == parts
  assert elements(target.params_train) == trained
  assert elements(target.opt_state) == 2 * trained
  assert {leaf.dtype.name for leaf in jax.tree.leaves(target.params_frozen)} == {"bfloat16"}
  assert {leaf.dtype.name for leaf in jax.tree.leaves(target.params_train)} == {"float32"}


@pytest.mark.parametrize(
  ("name", "dtypes"),
  [
    ("transfer_lora", {"bfloat16"}),
    pytest.param("transfer_lora:qlora", {"bfloat16", "int8", "float32"}, marks=pytest.mark.int8),
  ],
)
def test_transfer_trains_adapters_and_what_is_beside_the_decoder(name, dtypes):
  target = target_of(name)
  sides = 2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944)
  adapters = 28 * 64 * sides
  assert elements(target.params_train["llm"]) == adapters == 161_480_704
  assert elements(target.params_train) == adapters + CONNECTOR + REGION
  assert {leaf.dtype.name for leaf in jax.tree.leaves(target.params_frozen)} == dtypes
  config = load_config(name)
  assert config.schedule[0][1].get("peak", 1) == 10 * config.schedule[1][1]["peak"]
  lora = model_config(config).llm
  assert (lora.lora_rank, lora.lora_alpha) == (64, 128)


def test_large_parameters_are_spread_over_the_fsdp_axis():
  target = target_of("stage3_instruct")
  whole = elements(target.params_train)
  share = sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape))
    for leaf in jax.tree.leaves(target.params_train)
  )
  assert share < whole / 8 * 1.01  # what is below 4 MiB stays whole


@pytest.mark.parametrize(
  ("name", "lr", "batch", "masks", "templated"),
  [
    ("stage1_align", 1e-3, 256, "multi", False),
    ("stage2_region", 1e-3, 256, "single", True),
    ("stage2p5_knowledge", 2e-5, 128, "half", True),
    ("stage3_instruct", 2e-5, 128, "half", True),
  ],
)
def test_the_numbers_are_those_of_the_paper(name, lr, batch, masks, templated):
  config = load_config(name)
  assert (config.lr, config.input.batch_size, config.input.masks) == (lr, batch, masks)
  assert config.input.templated is templated
  assert (config.total_epochs, config.wd, config.seed, config.grad_clip_norm) == (1.0, 0.0, 42, 1.0)
  assert config.schedule[-1][1] is None or config.schedule[-1][1]["warmup_percent"] == 0.03
  rows = batch_sharding(make_mesh(config.mesh), config.sharding_rules, leading=1)
  assert config.input.batch_size == accum_steps(config, rows) * 8  # one row of each device
