"""The recorded runs of the published trainer, and what the comparison finds wrong."""

import copy
import functools

import numpy as np
import pytest

from vr_jax.parity.forward import Published
from vr_jax.parity.golden import FAIL, PASS, Golden
from vr_jax.parity.training import Run, compare_run, run, run_config


@pytest.fixture(scope="module")
def case_runs(golden):
  """id -> (case, config, published model, our run); each run is made once."""
  folder = Golden(golden)
  cases = {case.id: case for case in folder.cases("06b_training")}
  published = Published(folder)

  @functools.cache
  def made(name):
    config = run_config(cases[name].meta)
    ours = run(folder, published, config, cases[name].meta["sample_order"])
    return cases[name], config, published, ours

  return made


def test_the_recorded_run_of_stage_2_is_repeated(case_runs):
  result = compare_run(*case_runs("stage2_region"))
  assert result.status == PASS, result.note
  assert result.max_error < 2e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stage1_projector", "stage3_full", "stage3_accum_wd"])
def test_the_other_recorded_runs_are_repeated(case_runs, name):
  result = compare_run(*case_runs(name))
  assert result.status == PASS, result.note
  assert result.max_error < 2e-4


def change_loss(case, ours):
  case.meta["micro_losses"][2] += 0.0021


def change_gradient_norm(case, ours):
  case.meta["grad_norms_before_clip"][0] *= 1.001


def change_rate(case, ours):
  case.meta["lrs"][1] = [lr * 0.999 for lr in case.meta["lrs"][1]]


def change_trainable(case, ours):
  case.meta["trainable"] = case.meta["trainable"][1:]


def change_direction(case, ours):
  name = "model.region_encoder.feat_linear.2.weight"
  delta = ours.after[name] - ours.before[name]
  ours.after[name] = ours.before[name] + delta[::-1]  # the norms stay


def change_norm(case, ours):
  name = "model.region_encoder.feat_linear.0.weight"
  ours.after[name] = ours.after[name] + 0.05 * (ours.after[name] - ours.before[name])


@pytest.mark.parametrize(
  ("change", "says"),
  [
    (change_loss, "loss of micro-batch 2"),
    (change_gradient_norm, "gradient norm of step 0"),
    (change_rate, "learning rate of step 1"),
    (change_trainable, "trainable"),
    (change_direction, "distance model.region_encoder.feat_linear.2.weight"),
    (change_norm, "change model.region_encoder.feat_linear.0.weight"),
  ],
)
def test_each_difference_fails_the_case(case_runs, change, says):
  case, config, published, ours = case_runs("stage2_region")
  case, ours = copy.copy(case), Run(list(ours.metrics), dict(ours.before), dict(ours.after))
  case.meta = copy.deepcopy(case.meta)
  change(case, ours)
  result = compare_run(case, config, published, ours)
  assert result.status == FAIL
  assert says in result.note


def test_arguments_of_the_published_trainer_become_our_config():
  meta = {
    "args": {
      "per_device_train_batch_size": 2,
      "gradient_accumulation_steps": 3,
      "max_steps": 6,
      "learning_rate": 1e-3,
      "warmup_ratio": 0.5,
      "lr_scheduler_type": "cosine",
      "weight_decay": 0.1,
      "mm_projector_lr": 1e-4,
    },
    "optimizer": {"betas": [0.8, 0.9], "eps": 1e-6},
  }
  config = run_config(meta)
  assert (config.input.batch_size, config.input.accum_steps, config.wd) == (6, 3, 0.1)
  assert (config.b1, config.b2, config.eps) == (0.8, 0.9, 1e-6)
  assert config.accum_mean == "published"
  assert config.input.templated
  np.testing.assert_allclose(dict(config.schedule)["connector/.*"]["peak"], 0.1)
  meta["args"]["tune_mm_mlp_adapter"] = True
  config = run_config(meta)
  assert not config.input.templated
  assert config.schedule[-1] == (".*", None)
