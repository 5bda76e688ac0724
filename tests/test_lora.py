"""Adapters of the decoder: what they add, what they train, what they cost."""

import dataclasses
import functools
import os
import signal

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_model
from jax.sharding import PartitionSpec as P
from rounding import assert_same_up_to_rounding, decoder_roundings, gradient_roundings
from small_model import CONFIG, with_llm
from test_decoder import FAMILIES, apply, example, init
from test_meshes import small

import vr_jax
from data_pipes.errors import InputError
from vr_jax.checkpoint import (
  export,
  load_for_inference,
  load_params,
  make_meta,
  read_tokenizer_files,
)
from vr_jax.configs import base_config
from vr_jax.flops import count_flops
from vr_jax.interop import peft
from vr_jax.interop import videorefer as published
from vr_jax.interop.adapter import Adapter, Merged
from vr_jax.interop.convert import convert
from vr_jax.interop.sources import open_source
from vr_jax.interop.table import Tree, arrays, nested
from vr_jax.models.connector import ConnectorConfig
from vr_jax.models.costs import adapter_parameters, decoder_flops
from vr_jax.models.decoder import Decoder
from vr_jax.models.lora import is_factor
from vr_jax.models.quantize import is_quantized
from vr_jax.models.videorefer import VideoRefer, VideoReferConfig, init_params
from vr_jax.params import merge, path_names
from vr_jax.sharding import TENSOR_RULES, TENSOR_STRATEGY, make_mesh
from vr_jax.training import loop
from vr_jax.training.loop import state_target, train
from vr_jax.training.loss import model_loss
from vr_jax.training.metrics import read_metrics
from vr_jax.training.schedule import make_optimizer, split_by_table
from vr_jax.training.start import model_config, starting_params
from vr_jax.training.step import TrainState
from vr_jax.training.videorefer_task import trained_parts

ADAPTERS = ((".*_lora_.*", {"decay": "constant"}), (".*", None))


def split(params):
  """(base, factors) of a decoder's tree with adapters."""
  return split_by_table(params, ADAPTERS)[::-1]


def merged_roundings(cfg):
  """Of `example`'s logits: to a decoder's own come, in each of 7 matrices, sums over the rank."""
  return decoder_roundings(cfg, 11) + 7 * cfg.depth * cfg.lora_rank


@pytest.fixture(params=["gemma_mha", "qwen2"])  # q, k and v in one matrix, and apart
def cfg(request):
  return dataclasses.replace(FAMILIES[request.param], lora_rank=3, lora_alpha=6.0)


def test_an_adapter_that_is_merged_gives_the_same_logits(cfg):
  params, (tokens, positions) = init(cfg), example(cfg)
  base, factors = split(params["params"])
  adapter = Adapter(Tree(factors), cfg.lora_rank, cfg.lora_alpha)
  merged = nested(arrays(Merged(Tree({"llm": base}), adapter)))["llm"]
  plain = dataclasses.replace(cfg, lora_rank=0)
  adapted = apply(cfg, params, tokens, positions)
  ours = apply(plain, {"params": merged}, tokens, positions)
  assert_same_up_to_rounding(ours, adapted, merged_roundings(cfg))
  without = apply(plain, {"params": base}, tokens, positions)
  assert np.abs(without - adapted).max() > 0.1


def test_a_fresh_adapter_changes_nothing_and_every_matrix_has_one(cfg):
  (tokens, positions), plain = example(cfg), dataclasses.replace(cfg, lora_rank=0)
  base = init(plain)["params"]

  def fresh(key):
    return Decoder(cfg).init(key, tokens, method=lambda m, t: m(m.embed(t), t))["params"]

  _, factors = split(jax.jit(fresh)(jax.random.key(0)))
  params = {"params": merge(base, factors)}
  np.testing.assert_array_equal(
    apply(cfg, params, tokens, positions), apply(plain, {"params": base}, tokens, positions)
  )
  paths = jax.tree.leaves(path_names(factors))
  assert sum(leaf.size for leaf in jax.tree.leaves(factors)) == adapter_parameters(cfg)
  matrices = [p for p in jax.tree.leaves(path_names(base)) if p.startswith("layers/")]
  matrices = [p for p in matrices if p.endswith(("einsum/w", "gating_einsum", "linear"))]
  assert sorted(paths) == sorted(f"{m}_lora_{x}" for m in matrices for x in "ab")
  a = factors["layers"]["mlp"]["linear_lora_a"]
  assert np.abs(a).max() <= cfg.mlp_dim**-0.5
  np.testing.assert_allclose(a.std(), (3 * cfg.mlp_dim) ** -0.5, rtol=0.1)
  assert np.abs(a[0] - a[1]).max() > 0  # each layer its own


LIGHT = dataclasses.replace(
  with_llm(lora_rank=4, lora_alpha=8.0), connector=ConnectorConfig(kind="linear", width=64)
)


def lora_config(**fields):
  config = base_config()
  config.update({"schedule": ADAPTERS, "lr": 1e-2, **fields})
  return config


def test_frozen_matrices_get_no_gradient_and_no_large_product_is_kept():
  """FLOPs are those of forward, of the activations' gradients and of the adapters' own."""
  config = lora_config()
  cfg = with_llm(lora_rank=4, depth=6)
  assert trained_parts(config, cfg) == ("adapters",)
  assert trained_parts(lora_config(schedule=((".*", {}),)), cfg)[-1] == "llm"
  tokens = jax.ShapeDtypeStruct((1, 64), jnp.int32)
  decoder = Decoder(cfg.llm)
  shapes = jax.eval_shape(functools.partial(init_params, cfg), jax.random.key(0))
  base, factors = split(shapes["llm"])

  def loss(factors, base, tokens):
    params = {"params": merge(factors, base)}
    return decoder.apply(params, tokens, method=lambda m, t: m(m.embed(t), t)[0]).sum()

  forward = count_flops(loss, factors, base, tokens)
  both = count_flops(jax.value_and_grad(loss), factors, base, tokens)
  adapters = 2 * 64 * adapter_parameters(cfg.llm)
  attention = 64 * 64 * 2 * cfg.llm.heads * cfg.llm.head_dim * cfg.llm.depth  # the masked half
  assert forward == decoder_flops(cfg.llm, 64, 0) + attention
  assert both <= 2 * forward + adapters + attention * 2


# --- Shardings and int8 ------------------------------------------------------------------------

INT8 = [pytest.param("int8", marks=pytest.mark.int8)]
TRAINED = (*ADAPTERS[:1], ("connector/.*", {"decay": "constant"}), (".*", None))


def with_everything(params, seed=1):
  """The factors that start at zero moved away from it."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda path, x: rng.normal(0, 0.1, x.shape).astype("f") if path.endswith("_lora_b") else x,
    path_names(params),
    jax.device_get(params),
  )


def loss_and_grads(state, rows):
  def mean(train):
    sums = model_loss(VideoRefer(LIGHT))(merge(train, state.params_frozen), rows)
    return sums.sum / sums.weight

  return jax.value_and_grad(mean)(state.params_train)


@pytest.fixture(scope="module")
def states():
  """The state of the same parameters for a frozen_dtype, on one device."""
  params = with_everything(small_model.params(LIGHT))
  optimizer = make_optimizer(lora_config(schedule=TRAINED), params, total_steps=8)

  @functools.cache
  def of(frozen_dtype):
    return TrainState.create(params, TRAINED, optimizer, frozen_dtype)

  return of


QUICK = {"xla_backend_optimization_level": 0}


@pytest.mark.int8
def test_int8_is_exact_on_what_it_holds_and_close_to_what_it_was(states):
  """Loss within 1 % and gradients within 10 % of those of bfloat16 weights."""
  rows, int8 = small_model.rows(2, LIGHT), states("int8")
  plain = jax.tree.map(
    lambda w: dequantized(w) if is_quantized(w) else np.asarray(w, "float32"),
    int8.params_frozen,
    is_leaf=is_quantized,
  )
  run = jax.jit(loss_and_grads, compiler_options=QUICK)
  found = run(int8, rows)
  expected = run(dataclasses.replace(int8, params_frozen=plain), rows)
  assert_same_up_to_rounding(found, expected, gradient_roundings(LIGHT, rows["tokens"].shape[1]))
  loss, grads = run(states("bfloat16"), rows)
  np.testing.assert_allclose(found[0], loss, rtol=0.01)
  assert_close(found[1], grads, 0.1)
  matrices = jax.tree.leaves(int8.params_frozen, is_leaf=is_quantized)
  assert sum(map(is_quantized, matrices)) == 5
  assert {str(x.dtype) for x in matrices if not is_quantized(x)} == {"bfloat16"}
  was = flat(states("float32").params_frozen)
  for path, w in flat(int8.params_frozen).items():
    if is_quantized(w):
      assert w.scale.shape[0] == CONFIG.llm.depth
      assert (np.abs(dequantized(w) - was[path]) <= 0.501 * np.asarray(w.scale)).all()


def dequantized(w):
  return np.asarray(w.qvalue) * np.asarray(w.scale)


def flat(tree):
  return flax.traverse_util.flatten_dict(tree, sep="/")


def assert_close(a, b, rtol):
  """Every leaf within rtol of its largest element."""
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
    scale = float(np.abs(y).max())
    np.testing.assert_allclose(x, y, rtol=0, atol=rtol * scale, err_msg=str(path))


@pytest.mark.parametrize("frozen_dtype", [pytest.param("float32", marks=pytest.mark.slow), *INT8])
def test_on_a_mesh_it_is_the_same_and_scales_lie_with_their_columns(states, frozen_dtype):
  axes = (("data", 2), ("fsdp", 2), ("tensor", 2))
  config = lora_config(schedule=TRAINED, frozen_dtype=frozen_dtype)
  config.update({"mesh": axes, "sharding_strategy": tuple(small(TENSOR_STRATEGY))})
  mesh, state, rows = make_mesh(axes), states(frozen_dtype), small_model.rows(4, LIGHT)
  shapes = jax.eval_shape(functools.partial(init_params, LIGHT), jax.random.key(0))
  optimizer = make_optimizer(config, shapes, total_steps=8)
  target = state_target(config, shapes, optimizer, mesh)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, target)
  attn, mlp = (target.params_frozen["llm"]["layers"][name] for name in ("attn", "mlp"))
  if frozen_dtype == "int8":
    assert mlp["linear"].qvalue.sharding.spec == P(None, "tensor", "fsdp")
    assert mlp["linear"].scale.sharding.spec == P(None, None, "fsdp")
    assert attn["q_einsum"]["w"].scale.sharding.spec == P(None, "tensor", None, None)
  for path, leaf in flat(target.params_train).items():
    assert not is_factor(path) or "fsdp" in str(leaf.sharding.spec), path

  def run(state, rows):
    def mean(train):
      model = VideoRefer(LIGHT, TENSOR_RULES)
      sums = model_loss(model)(merge(train, state.params_frozen), rows)
      return sums.sum / sums.weight

    return jax.value_and_grad(mean)(state.params_train)

  with jax.set_mesh(mesh):
    found = jax.jit(run, compiler_options=QUICK)(jax.device_put(state, shardings), rows)
  whole = jax.jit(loss_and_grads, compiler_options=QUICK)(state, rows)
  assert_same_up_to_rounding(found, whole, gradient_roundings(LIGHT, rows["tokens"].shape[1]))


def test_int8_without_a_frozen_matrix_is_refused():
  config = lora_config(schedule=((".*", {}),), frozen_dtype="int8")
  shapes = jax.eval_shape(functools.partial(init_params, LIGHT), jax.random.key(0))
  optimizer = make_optimizer(config, shapes, total_steps=8)
  with pytest.raises(InputError, match="freezes no matrix of the decoder; accepted then: float32"):
    state_target(config, shapes, optimizer, make_mesh(config.mesh))
  config.frozen_dtype = "int4"
  with pytest.raises(InputError, match="'int4': accepted: float32, bfloat16, int8"):
    state_target(config, shapes, optimizer, make_mesh(config.mesh))


# --- Runs --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(golden, tmp_path_factory):
  """The tiny published model as a checkpoint of ours."""
  folder = golden / "tiny_videorefer_qwen2"
  loaded = published.load(folder)
  path = tmp_path_factory.mktemp("base") / "checkpoint"
  export(path, loaded.params, make_meta(loaded.config.to_dict(), read_tokenizer_files(folder)))
  return path


@pytest.fixture
def config_of(golden, base, monkeypatch):
  """Makes a config for runs of four steps on one device, which compile in little time."""
  monkeypatch.setattr(loop, "make_mesh", lambda axes: make_mesh(axes, jax.devices()[:1]))

  def make(init=(), rank=4, **fields):
    config = base_config()
    parts = tuple((part, str(base)) for part in ("img", "region", "llm"))
    config.model_init = (*parts, *init)
    config.model = (
      ("connector.kind", "linear"), ("llm.lora_rank", rank), ("llm.lora_alpha", 8.0)
    )  # fmt: skip
    config.input.files = (str(golden / "data" / "train.json"),)
    config.input.media = str(golden / "media")
    config.input.batch_size = 2
    config.input.max_mask_frames = 2
    config.total_steps = 4
    config.log_steps = 1
    config.lr = 1e-2
    config.schedule = TRAINED
    config.update(fields)
    return config

  return make


@pytest.mark.slow
@pytest.mark.parametrize("frozen_dtype", ["float32", *INT8])
def test_a_run_goes_on_exactly_and_opens_as_a_merged_model(
  config_of, base, frozen_dtype, tmp_path, monkeypatch
):
  config = config_of(frozen_dtype=frozen_dtype)
  assert train(config, tmp_path / "straight").finished
  losses = [line["loss"] for line in read_metrics(tmp_path / "straight")]
  assert losses[-1] < 0.9 * losses[0]
  made = loop.make_task

  def stopping(config):
    task = made(config)

    def batches(position, total):
      for index, rows in enumerate(task.batches(position, total), position):
        if index == 1:
          os.kill(os.getpid(), signal.SIGTERM)
        yield rows

    return dataclasses.replace(task, batches=batches)

  monkeypatch.setattr(loop, "make_task", stopping)
  stopped = train(config, tmp_path / "run")
  assert (stopped.step, stopped.finished) == (2, False)
  halfway = load_params(tmp_path / "run")
  monkeypatch.setattr(loop, "make_task", made)
  assert train(config, tmp_path / "run").finished
  stored = load_params(tmp_path / "run")
  jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path / "straight"), stored)

  # Adapters and connector alone have changed; what is frozen has not, to the bit.
  stored, halfway = without_none(stored), without_none(halfway)
  for path, x in flat(halfway).items():
    trained = is_factor(path) or path.startswith("connector/")
    assert (np.asarray(x) == flat(stored)[path]).all() != trained, path
  was = flat(load_params(base))
  kept = {"float32": ("float32",), "int8": ("bfloat16", "int8", "float32")}[frozen_dtype]
  for path, x in flat(stored["llm"]).items():
    assert str(x.dtype) in kept
    if frozen_dtype == "float32" and not is_factor(path):
      np.testing.assert_array_equal(x, was[f"llm/{path}"])

  # Opened for anything else, the adapters are in the weights.
  source = open_source(tmp_path / "run")
  assert source.parts["llm"].lora_rank == 0
  merged = nested(arrays(source.params))
  assert jax.tree.structure(merged["llm"]) == jax.tree.structure(load_params(base)["llm"])
  adapted = VideoReferConfig.from_dict(load_for_inference(tmp_path / "run").model).llm
  tokens, positions = example(adapted)
  logits = apply(adapted, {"params": as_arrays(stored["llm"])}, tokens, positions)
  plain = apply(source.parts["llm"], {"params": merged["llm"]}, tokens, positions)
  assert_same_up_to_rounding(plain, logits, merged_roundings(adapted))
  model = vr_jax.load(tmp_path / "run")
  assert (model.cfg.llm.lora_rank, model.cfg.llm.layout) == (0, "fused")

  # The adapter alone leaves as PEFT's, and another run begins with it.
  parity = convert(tmp_path / "run", tmp_path / "peft", "peft", logits="never", report=str)
  assert parity["bit_identical"]
  config = config_of(init=(("llm", str(tmp_path / "peft")),))
  again = starting_params(config, shapes_of(config))
  factors = {p: x for p, x in flat(stored).items() if is_factor(p)}
  assert len(factors) == 10
  for path, x in factors.items():
    np.testing.assert_array_equal(flat(again)[path], x, err_msg=path)
  # So does one that goes on from the checkpoint; where its adapters are of another kind, they stay
  # in the weights.
  for rank, apart in ((4, True), (2, False)):
    config = config_of(model_init=(("llm", str(tmp_path / "run")),), rank=rank)
    again = flat(starting_params(config, shapes_of(config)))
    assert {p for p in again if is_factor(p)} == (set(factors) if apart else set())
    wanted = flat(source_of(tmp_path / "run", apart))
    for path, x in again.items():
      np.testing.assert_array_equal(x, wanted[path], err_msg=path)


def source_of(run, apart):
  """What a run's checkpoint holds, as `vr_jax.interop` reads it: adapters apart, or merged."""
  params = open_source(run).params
  found = arrays(params.base if apart else params)
  if apart:
    found |= {p: x for p, x in flat(load_params(run)).items() if is_factor(p)}
  return nested(found)


def shapes_of(config):
  cfg = model_config(config)
  return jax.eval_shape(functools.partial(init_params, cfg), jax.random.key(0))


def without_none(tree):
  """A tree without the zero points that int8 values have not."""
  return flax.traverse_util.unflatten_dict(
    {k: v for k, v in flat(tree).items() if v is not None}, sep="/"
  )


def as_arrays(tree):
  """A tree that was read back, with its int8 matrices as the model takes them."""
  if "qvalue" in tree:
    import qwix

    return qwix.QArray(qvalue=tree["qvalue"], scale=tree["scale"])
  return {k: as_arrays(v) if isinstance(v, dict) else v for k, v in tree.items()}


def test_an_adapter_that_does_not_fit_is_refused(config_of, base, tmp_path):
  llm = model_config(config_of()).llm
  shapes = peft.adapter_shapes(llm, 4, dict.fromkeys(["layers/mlp/linear"]))
  factors = {path: np.ones(shape, "f") for path, shape in shapes.items()}
  peft.write_adapter(tmp_path / "peft", llm, factors, alpha=4)
  config = config_of(init=(("llm", str(tmp_path / "peft")),))
  with pytest.raises(
    InputError, match=r"rank 4 and alpha 4; the model has llm.lora_rank=4 and .*=8"
  ):
    starting_params(config, shapes_of(config))
  config = config_of(init=(("llm", str(tmp_path / "peft")),), rank=0)
  with pytest.raises(InputError, match=r"an adapter, and the model has none; set llm.lora_rank"):
    starting_params(config, shapes_of(config))
  with pytest.raises(InputError, match="holds no adapter; --to peft takes a run"):
    convert(base, tmp_path / "out", "peft", report=str)
