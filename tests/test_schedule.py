"""Which parameters train, learning rates, and AdamW's arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy import ToyModel, init_params, make_rows

from data_pipes.errors import InputError
from vr_jax.configs import base_config
from vr_jax.params import merge
from vr_jax.training.loss import model_loss
from vr_jax.training.schedule import make_optimizer, split_by_table


def params():
  rng = np.random.default_rng(0)

  def array(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  return {
    "img": {"kernel": array(4, 4)},
    "connector": {"kernel": array(4, 3), "norm": {"scale": array(3), "bias": array(3)}},
    "llm": {"embed": array(5, 3), "norm": {"scale": array(3)}},
  }


def config(**fields):
  config = base_config()
  config.update(fields)
  return config


@pytest.mark.parametrize(
  ("total", "ratio", "want"),
  [
    # Recorded runs of the published trainer (transformers 4.40, cosine).
    (6, 0.34, [0.0, 1 / 3, 2 / 3, 1.0, 0.75, 0.25]),
    (4, 0.25, [0.0, 1.0, 0.75, 0.25]),
    (3, 0.03, [0.0, 1.0, 0.5]),
    (2, 0.0, [1.0, 0.5]),
  ],
)
def test_warmup_and_cosine_are_the_published_ones(total, ratio, want):
  c = config(lr=2e-5, schedule=((".*", {"warmup_percent": ratio}),))
  optimizer = make_optimizer(c, params(), total_steps=total)
  got = [float(optimizer.lrs(step)["lr"]) for step in range(total)]
  np.testing.assert_allclose(got, np.array(want) * 2e-5, rtol=1e-6, atol=1e-12)


def test_groups_have_their_own_rate_and_decay():
  c = config(
    lr=1.0,
    schedule=(
      ("img/.*", None),
      ("connector/.*", {"peak": 0.2, "decay": "linear"}),
      (".*", {"decay": "constant", "warmup_examples": 17}),
    ),
    input={"batch_size": 8},
  )
  lrs = make_optimizer(c, params(), total_steps=10).lrs
  assert lrs(0) == {"lr": pytest.approx(0.2), "lr/connector/.*": pytest.approx(0.2), "lr/.*": 0}
  assert float(lrs(5)["lr/connector/.*"]) == pytest.approx(0.1)
  assert [float(lrs(k)["lr/.*"]) for k in (1, 2, 3, 9)] == pytest.approx([1 / 3, 2 / 3, 1, 1])


def test_frozen_parameters_leave_the_tree_and_have_no_optimizer_slots():
  table = (("img/.*", None), ("llm/embed", None), (".*", {}))
  train, frozen = split_by_table(params(), table)
  assert set(train) == {"connector", "llm"}
  assert set(train["llm"]) == {"norm"}
  assert set(frozen) == {"img", "llm"}
  assert set(frozen["llm"]) == {"embed"}
  jax.tree.map(np.testing.assert_array_equal, merge(train, frozen), params())
  state = make_optimizer(config(schedule=table), params(), total_steps=1).init(train)
  assert jax.tree.structure(state["mu"]) == jax.tree.structure(train)
  assert len(jax.tree.leaves(state)) == 2 * len(jax.tree.leaves(train))


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"schedule": (("img/.*", None),)}, "schedule: no rule covers parameter 'connector/kernel'"),
    ({"schedule": ((".*", {}), ("imge/.*", None))}, "rule 'imge/.*' matches no parameter"),
    ({"schedule": ((".*", {"peek": 1}),)}, "schedule.0.1.peek is not known; did you mean 'peak'"),
    ({"schedule": ((".*", 3),)}, "expected .regex, None. or"),
    ({"schedule": ((".*", {"decay": "cos"}),)}, "decay='cos': accepted: cosine, linear"),
    ({"schedule": ((".*", {"warmup_steps": 1, "warmup_percent": 0.1}),)}, "set only one of"),
    ({"schedule": ((".*", {"warmup_epochs": 1}),)}, "the size of the data is not known; use steps"),
    ({"schedule": ((".*", {"optimizer": "adam"}),)}, "optimizer='adam': accepted: adamw, lion"),
    ({"schedule": ((".*", {"optimizer": "lion", "eps": 1.0}),)}, "0.1.eps is not known"),
    ({"optimizer": "muon", "schedule": ((".*", {"rms": 0}),)}, "0.1.rms=0: accepted: more than 0"),
    ({"wd_mults": (("img/.*", 0.0),)}, "config.wd_mults: no rule covers"),
  ],
)
def test_tables_are_checked(fields, message):
  with pytest.raises(InputError, match=message):
    make_optimizer(config(**fields), params(), total_steps=1)


def test_all_frozen_is_refused():
  with pytest.raises(InputError, match="every parameter is frozen"):
    split_by_table(params(), ((".*", None),))


@pytest.mark.torch
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_updates_equal_torch_adamw_with_groups(clip):
  import torch

  c = config(
    lr=3e-3,
    wd=0.1,
    grad_clip_norm=clip,
    schedule=(
      ("img/.*", None),
      ("connector/.*", {"peak": 0.2, "warmup_steps": 2}),
      (".*", {"warmup_steps": 2}),
    ),
    wd_mults=((".*/bias", 0.0), ("connector/norm/scale", 0.0), (".*", 1.0)),
  )
  steps = 8
  optimizer = make_optimizer(c, params(), total_steps=steps)
  train, _ = split_by_table(params(), c.schedule)
  leaves, treedef = jax.tree.flatten(train)
  names = [
    jax.tree_util.keystr(p, simple=True, separator="/")
    for p, _ in jax.tree_util.tree_leaves_with_path(train)
  ]

  theirs = [torch.nn.Parameter(torch.tensor(np.array(leaf))) for leaf in leaves]
  groups = [
    {
      "params": [p],
      "weight_decay": 0.0 if name.endswith("bias") or name == "connector/norm/scale" else 0.1,
      "lr": 3e-3 * (0.2 if name.startswith("connector") else 1.0),
    }
    for name, p in zip(names, theirs, strict=True)
  ]
  torch_adam = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)

  def factor(k):  # transformers.get_cosine_schedule_with_warmup
    return k / 2 if k < 2 else 0.5 * (1 + np.cos(np.pi * (k - 2) / (steps - 2)))

  torch_lr = torch.optim.lr_scheduler.LambdaLR(torch_adam, factor)
  state, rng = optimizer.init(train), np.random.default_rng(1)
  update = jax.jit(optimizer.update)
  for step in range(steps):
    grads = [rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
    for p, g in zip(theirs, grads, strict=True):
      p.grad = torch.tensor(g)
    norm = torch.nn.utils.clip_grad_norm_(theirs, clip or 1e9)
    torch_adam.step()
    torch_lr.step()
    train, state, metrics = update(jax.tree.unflatten(treedef, grads), state, train, step)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
  for ours, p in zip(jax.tree.leaves(train), theirs, strict=True):
    np.testing.assert_allclose(ours, p.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_moments_in_bfloat16_take_half_and_step_nearly_the_same():
  def after_two_steps(dtype):
    optimizer = make_optimizer(
      config(lr=0.1, moments_dtype=dtype, schedule=((".*", {"decay": "constant"}),)),
      params(),
      total_steps=10,
    )
    train, state = params(), optimizer.init(params())
    for step in range(2):
      grads = jax.tree.map(lambda p: jnp.sin(p + step), train)  # noqa: B023
      train, state, _ = optimizer.update(grads, state, train, jnp.asarray(step))
    return train, state

  (exact, _), (train, state) = after_two_steps("float32"), after_two_steps("bfloat16")
  assert {m.dtype.name for m in jax.tree.leaves(state)} == {"bfloat16"}
  assert {p.dtype.name for p in jax.tree.leaves(train)} == {"float32"}
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), train, exact)


def test_the_running_mean_is_that_of_the_parameters():
  c = config(lr=0.1, ema_decay=0.75, schedule=((".*", {"decay": "constant"}),))
  optimizer = make_optimizer(c, params(), total_steps=4)
  trained, mean = params(), params()
  state = optimizer.init(trained)
  for step, decay in enumerate((1 / 10, 2 / 11, 3 / 12)):  # it warms up: far below 0.75 as yet
    grads = jax.tree.map(lambda p, n=step: jnp.cos(p + n), trained)
    trained, state, _ = optimizer.update(grads, state, trained, jnp.asarray(step))
    mean = jax.tree.map(lambda m, p, d=decay: d * m + (1 - d) * p, mean, trained)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), state["ema"], mean)


def test_an_unknown_moments_dtype_is_refused():
  with pytest.raises(InputError, match="moments_dtype='float16': accepted: float32, bfloat16"):
    make_optimizer(config(moments_dtype="float16"), params(), total_steps=1)


# --- Optimizers by name -----------------------------------------------------------------------


def stepped(c, trained, steps=3):
  """Parameters and state after a few steps, and the updates' metrics."""
  optimizer = make_optimizer(c, trained, total_steps=10)
  state = optimizer.init(trained)
  update = jax.jit(optimizer.update)
  for step in range(steps):
    grads = jax.tree.map(lambda p, n=step: jnp.cos(3 * p + n), trained)
    trained, state, metrics = update(grads, state, trained, jnp.asarray(step))
  return trained, state, metrics


def by_optax(transformation, trained, steps=3):
  state = transformation.init(trained)
  for step in range(steps):
    grads = jax.tree.map(lambda p, n=step: jnp.cos(3 * p + n), trained)
    updates, state = transformation.update(grads, state, trained)
    trained = optax.apply_updates(trained, updates)
  return trained


def matrices():
  rng = np.random.default_rng(0)
  array = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
  return {
    "region": {"fc1": {"kernel": array(40, 32), "bias": array(32)}},
    "llm": {"layers": {"attn": {"q_einsum": {"w": array(2, 3, 8, 4)}}}},
  }


PLAIN = {"lr": 0.01, "grad_clip_norm": 0.0, "schedule": ((".*", {"decay": "constant"}),)}


@pytest.mark.parametrize("name", ["lion", "adafactor"])
def test_an_optimizer_by_name_is_that_of_optax(name):
  rms = optax.scale_by_factored_rms(
    min_dim_size_to_factor=32, decay_rate_fn=lambda i, p: jnp.minimum(0.999, 1 - (i + 1.0) ** -p)
  )
  theirs = {
    "lion": optax.lion(0.01, b1=0.9, b2=0.99, weight_decay=0.1),
    "adafactor": optax.chain(
      rms,
      optax.ema(0.9, debias=False),
      optax.add_decayed_weights(0.1),
      optax.scale_by_learning_rate(0.01),
    ),
  }[name]
  trained, state, _ = stepped(config(optimizer=name, wd=0.1, **PLAIN), matrices())
  expected = by_optax(theirs, matrices())
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), trained, expected)
  kept = {slot: tree["region"]["fc1"]["kernel"].shape for slot, tree in state.items()}
  factored = {"v_row": (32,), "v_col": (40,), "v": (1,)} if name == "adafactor" else {}
  assert kept == {"mu": (40, 32), **factored}


def test_muon_makes_matrices_orthogonal_layer_by_layer_and_leaves_the_rest_to_adamw():
  before = matrices()
  trained, state, _ = stepped(config(optimizer="muon", **PLAIN), before, steps=1)
  adamw, _, _ = stepped(config(**PLAIN), before, steps=1)
  biases = (tree["region"]["fc1"]["bias"] for tree in (trained, adamw))
  np.testing.assert_allclose(*biases, rtol=1e-6)
  assert list(state["nu"]["region"]["fc1"]) == ["bias"]
  assert "llm" not in state["nu"]
  # (3 heads of 4) x 8 of each layer: all singular values of the step are nearly one size, and its
  # size is about that of AdamW's steps, 0.2 of the rate.
  moved = (
    trained["llm"]["layers"]["attn"]["q_einsum"]["w"]
    - before["llm"]["layers"]["attn"]["q_einsum"]["w"]
  )
  for layer in moved:
    values = np.linalg.svd(layer.transpose(1, 0, 2).reshape(8, 12), compute_uv=False)
    values /= 0.01 * 0.2 * np.sqrt(12)
    assert (values > 0.6).all()
    assert (values < 1.3).all()


def test_groups_may_have_optimizers_settings_and_decay_of_their_own():
  schedule = (
    ("llm/.*", {"decay": "constant", "optimizer": "lion", "b2": 0.5, "wd": 0.0}),
    (".*", {"decay": "constant", "peak": 2.0}),
  )
  trained, state, metrics = stepped(config(**{**PLAIN, "schedule": schedule}, wd=0.1), matrices())
  lion = by_optax(optax.lion(0.01, b2=0.5, weight_decay=0.0), matrices()["llm"])
  adamw = by_optax(optax.adamw(0.02, weight_decay=0.1), matrices()["region"])
  for ours, theirs in ((trained["llm"], lion), (trained["region"], adamw)):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), ours, theirs)
  assert set(state["mu"]) == {"llm", "region"}
  assert set(state["nu"]) == {"region"}
  parts = [metrics["grad_norm/llm"], metrics["grad_norm/region"]]
  np.testing.assert_allclose(np.hypot(*parts), metrics["grad_norm"], rtol=1e-6)
  size = np.sqrt(2 * 3 * 8 * 4)  # each of Lion's steps is the rate
  np.testing.assert_allclose(metrics["update_norm/llm"], 0.01 * size, rtol=1e-4)


def test_moments_in_bfloat16_do_not_stand_still():
  """A gradient of 1 over 2 000 steps, then of 0.01: rounded to the nearest, AdamW's second moment
  stops at a third of its value and never falls. Also with noise, where what is lost is drawn."""
  rng = np.random.default_rng(0)
  noise = jnp.asarray(rng.normal(size=(4_000, 8, 9)), jnp.float32)

  def run(dtype, noisy):
    trained = {"region": {"fc1": {"kernel": jnp.zeros((8, 9) if noisy else (1, 1))}}}
    c = config(**{**PLAIN, "moments_dtype": dtype})
    update = make_optimizer(c, trained, total_steps=10)

    def one(carry, step):
      trained, state = carry
      size = jnp.where(step < 2_000, 1.0, 0.01)
      grad = size * (1 + noise[step]) if noisy else size
      grads = jax.tree.map(lambda p: jnp.zeros_like(p) + grad, trained)
      return update.update(grads, state, trained, step)[:2], None

    carry = trained, update.init(trained)
    run = jax.jit(lambda carry: jax.lax.scan(one, carry, jnp.arange(4_000))[0][0])
    return jax.tree.leaves(run(carry))[0]

  for noisy in (False, True):
    exact, half = run("float32", noisy), run("bfloat16", noisy)
    assert np.linalg.norm(half - exact) / np.linalg.norm(exact) <= 0.02


@pytest.mark.slow
def test_a_run_with_moments_in_bfloat16_ends_where_that_in_float32_ends():
  loss, rows, steps = model_loss(ToyModel()), jax.tree.map(jnp.asarray, make_rows(320)), 300

  def run(dtype):
    c = config(lr=3e-3, moments_dtype=dtype)
    trained = init_params()
    optimizer = make_optimizer(c, trained, total_steps=steps)

    def one(carry, step):
      trained, state = carry
      order = jax.random.permutation(jax.random.fold_in(jax.random.key(0), step), 320)[:32]
      some = jax.tree.map(lambda x: x[order], rows)
      grads = jax.grad(lambda p: (sums := loss(p, some)).sum / sums.weight)(trained)
      return optimizer.update(grads, state, trained, step)[:2], None

    scan = jax.jit(lambda carry: jax.lax.scan(one, carry, jnp.arange(steps))[0][0])
    return jnp.concatenate(
      [p.ravel() for p in jax.tree.leaves(scan((trained, optimizer.init(trained))))]
    )

  before = jnp.concatenate([p.ravel() for p in jax.tree.leaves(init_params())])
  exact, half = run("float32"), run("bfloat16")
  assert np.linalg.norm(half - exact) <= 0.02 * np.linalg.norm(exact - before)  # 0.003
