"""The jitted step: accumulation, frozen parameters, meshes, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rounding import assert_same_up_to_rounding
from toy import ToyModel, init_params, make_rows

from data_pipes.errors import InputError
from vr_jax.configs import base_config
from vr_jax.params import param_shardings
from vr_jax.sharding import batch_sharding, make_mesh
from vr_jax.training.loss import model_loss
from vr_jax.training.schedule import make_optimizer
from vr_jax.training.step import TrainState, check_metrics, make_step, micro_batches

SCHEDULE = (("tower/.*", None), (".*", {"decay": "constant"}))


def start(**fields):
  config = base_config()
  config.update({"schedule": SCHEDULE, "lr": 0.01, **fields})
  optimizer = make_optimizer(config, init_params(), total_steps=100)
  return TrainState.create(init_params(), config.schedule, optimizer), optimizer


def run(batches, parts=1, accum_mean="tokens", loss=None, **fields):
  state, optimizer = start(**fields)
  step = make_step(loss or model_loss(ToyModel()), optimizer, accum_mean=accum_mean)
  history = []
  for rows in batches:
    state, metrics = step(state, micro_batches(rows, parts))
    history.append(jax.device_get(metrics))
  return state, history


BATCHES = [make_rows(8, seed) for seed in range(3)]

# Terms of the toy model's sums: the mean of 12 tokens, three widths of 16, 32 logits, 88 tokens;
# in a gradient twice more. AdamW's default eps would turn a gradient that is only rounding into
# a whole step; one of the gradients' size hands roundings on as they are. A bias, which starts at
# zero, has moved by a third of what its gradient would have made of it.
LOSS = 12 + 3 * 16 + 32 + 8 * 11
GRADIENT = 3 * LOSS
STEADY = {"eps": 0.1}


def assert_same_run(ours, expected, metrics, expected_metrics):
  """Three steps with `STEADY`: parameters, losses and gradient norms."""
  assert_same_up_to_rounding(ours.params(), expected.params(), 3**2 * GRADIENT)
  for a, b in zip(metrics, expected_metrics, strict=True):
    assert_same_up_to_rounding(a["loss"], b["loss"], LOSS)
    assert_same_up_to_rounding(a["grad_norm"], b["grad_norm"], GRADIENT)


@pytest.fixture(scope="module")
def whole_batches():
  return run(BATCHES, **STEADY)


@pytest.mark.parametrize("parts", [2, 8])
def test_accumulation_is_exact_in_tokens(whole_batches, parts):
  whole, whole_metrics = whole_batches
  split, split_metrics = run(BATCHES, parts, **STEADY)
  assert_same_run(split, whole, split_metrics, whole_metrics)
  for a, b in zip(whole_metrics, split_metrics, strict=True):
    assert a["supervised_tokens"] == b["supervised_tokens"]
    assert b["micro_loss"].shape == (parts,)


def test_the_published_mean_is_one_of_means():
  (_, [token_mean]), (_, [mean_of_means]) = (
    run(BATCHES[:1], 4, accum_mean=kind) for kind in ("tokens", "published")
  )
  micro = mean_of_means["micro_loss"]
  assert_same_up_to_rounding(mean_of_means["loss"], micro.mean(), LOSS)
  assert_same_up_to_rounding(micro, token_mean["micro_loss"], LOSS)
  assert abs(mean_of_means["loss"] - token_mean["loss"]) > 1e-3


def test_frozen_parameters_stay_and_take_no_room(whole_batches):
  state, _ = whole_batches
  jax.tree.map(np.testing.assert_array_equal, state.params()["tower"], init_params()["tower"])
  assert "tower" not in state.opt_state["mu"]
  assert "tower" not in state.params_train
  assert int(state.step) == 3


def test_the_state_is_donated():
  state, optimizer = start()
  state = jax.device_put(state)
  make_step(model_loss(ToyModel()), optimizer)(state, micro_batches(BATCHES[0], 1))
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.opt_state))


def test_eight_examples_are_learned_by_heart():
  rows = make_rows(8)
  rows["supervised"][:, :3] = False  # the rest follows from what was seen
  _, history = run([rows] * 250, lr=0.03)
  assert history[0]["loss"] > 3
  assert history[-1]["loss"] < 0.01


@pytest.mark.parametrize(
  "sizes",
  [
    pytest.param((8, 1), marks=pytest.mark.slow),
    (4, 2),
    pytest.param((2, 4), marks=pytest.mark.slow),
  ],
)
def test_meshes_agree_with_one_device(whole_batches, sizes):
  one, one_metrics = whole_batches
  config = base_config()
  mesh = make_mesh(zip(("data", "fsdp"), sizes, strict=True))
  strategy = [(".*", "fsdp(axis='fsdp', min_size_to_shard_mb=0)")]

  with jax.set_mesh(mesh):
    state, optimizer = start(**STEADY)
    shapes = jax.eval_shape(lambda: state)
    shardings = TrainState(
      step=jax.sharding.NamedSharding(mesh, jax.P()),
      params_train=param_shardings(shapes.params_train, mesh, strategy),
      params_frozen=param_shardings(shapes.params_frozen, mesh, strategy),
      opt_state=param_shardings(shapes.opt_state, mesh, strategy),
    )
    state = jax.device_put(state, shardings)
    step = make_step(model_loss(ToyModel()), optimizer, shardings=shardings)
    rows_sharding = batch_sharding(mesh, config.sharding_rules, leading=1)
    history = []
    for rows in BATCHES:
      # Sixteen rows, so that each of two micro-batches spreads over eight devices.
      doubled = {k: np.concatenate([v, v]) for k, v in rows.items()}
      state, metrics = step(state, jax.device_put(micro_batches(doubled, 2), rows_sharding))
      history.append(jax.device_get(metrics))
  assert_same_run(state, one, history, one_metrics)
  kernel = state.params_train["head"]["kernel"].sharding
  assert kernel.shard_shape((16, 32)) == (16, 32 // sizes[1])


def no_gradient(params, rows):
  """A finite loss whose gradient is not: the slope of a square root at nothing."""
  sums = model_loss(ToyModel())(params, rows)
  return sums._replace(sum=sums.sum + jnp.sqrt(0 * jnp.abs(params["head"]["bias"]).sum()))


@pytest.mark.parametrize("what", ["nothing supervised", "gradient"])
def test_a_step_that_cannot_learn_changes_nothing(what):
  rows = make_rows(8)
  if what == "nothing supervised":
    rows["supervised"][:] = False
  before, _ = start(ema_decay=0.5, wd=0.1)
  loss = no_gradient if what == "gradient" else None
  state, [metrics] = run([rows], loss=loss, ema_decay=0.5, wd=0.1)
  assert metrics["skipped"]
  assert np.isfinite(metrics["loss"])
  assert int(state.step) == 1
  jax.tree.map(np.testing.assert_array_equal, state.params(), before.params())
  jax.tree.map(np.testing.assert_array_equal, state.opt_state, before.opt_state)


def test_targets_beyond_the_budget_are_refused():
  _, [metrics] = run(BATCHES[:1], loss=model_loss(ToyModel(), budget=4))
  with pytest.raises(InputError, match=r"step 1: \d+ supervised tokens do not fit"):
    check_metrics(1, metrics)


def test_batches_that_do_not_divide_name_the_next_size():
  with pytest.raises(InputError, match=r"batch_size=8 is not divisible by .*accum_steps=3; use 9"):
    micro_batches(BATCHES[0], 3)


def test_accum_mean_is_checked():
  with pytest.raises(InputError, match="accum_mean='mean': accepted: tokens, published"):
    run(BATCHES, accum_mean="mean")
