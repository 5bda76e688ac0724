"""Weights go straight to their final place: read once each, in pieces, or refused before that."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from test_interop_videorefer import model, random_params

from data_pipes.errors import InputError
from vr_jax.inference import opening
from vr_jax.inference.opening import free_memory, open_weights
from vr_jax.inference.placement import Placement
from vr_jax.models import layer
from vr_jax.models.embedder import Embedder
from vr_jax.models.fused import fuse
from vr_jax.models.layer import widened
from vr_jax.models.quantize import quantized
from vr_jax.models.siglip import Siglip, SiglipConfig
from vr_jax.params import Tree, by_path
from vr_jax.sharding import make_mesh


class Watched(Tree):
  """Parameters that note what is read of them."""

  def __init__(self, params):
    super().__init__(params)
    self.reads = []

  def read(self, path, index=()):
    self.reads.append((path, index))
    return super().read(path, index)


@pytest.fixture(scope="module")
def tiny():
  """A small model and parameters in bfloat16, as a published folder has them."""
  cfg = model("linear")
  params = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), random_params(cfg))
  return cfg, params


@pytest.mark.parametrize("weights", [None, "bfloat16"])
def test_each_parameter_is_read_once_and_layer_by_layer(weights, tiny):
  cfg, params = tiny
  watched = Watched(params)
  ready_cfg, ready = open_weights(cfg, watched, weights, Placement())
  assert len(set(watched.reads)) == len(watched.reads)
  for path in watched.shapes:
    layers = range(cfg.llm.depth) if path.startswith("llm/layers/") else [None]
    expected = [(path, () if i is None else (i,)) for i in layers]
    assert [read for read in watched.reads if read[0] == path] == expected
  dtype = weights or "float32"
  llm, fused = fuse(dataclasses.replace(cfg.llm, dtype=dtype), params["llm"])
  assert ready_cfg.llm == llm
  for path, value in by_path(fused).items():
    np.testing.assert_array_equal(by_path(ready["llm"])[path], value, err_msg=path)
  kernel = ready["region"]["fc1"]["kernel"]
  assert (kernel.dtype, ready["region"]["fc1"]["bias"].dtype) == (dtype, "float32")


def test_on_a_mesh_each_device_gets_its_share(tiny):
  cfg, params = tiny
  mesh = make_mesh([("tensor", 3)], jax.devices()[:3])
  _, ready = open_weights(cfg, Tree(params), "bfloat16", Placement(mesh))
  gate_up = ready["llm"]["layers_1"]["mlp"]["gate_up"]
  assert {s.data.shape for s in gate_up.addressable_shards} == {(48, 24)}


@pytest.mark.parametrize(("mesh", "share"), [(None, 1), (3, 0.6)])
def test_what_does_not_fit_is_refused_before_anything_is_read(mesh, share, tiny):
  cfg, params = tiny
  watched = Watched(params)
  bytes_ = sum(2 * x.size for x in jax.tree.leaves(params))
  placement = Placement(mesh and make_mesh([("tensor", mesh)], jax.devices()[:mesh]))
  with pytest.raises(InputError, match=r"the weights take .* GiB and .* GiB are free; accepted"):
    open_weights(cfg, watched, "bfloat16", placement, int(0.4 * share * bytes_))
  assert watched.reads == []
  assert 1 << 28 < free_memory() < 1 << 50


@pytest.mark.int8
@pytest.mark.parametrize(
  ("path", "shape"), [("mlp/gate_up", (64, 333)), ("attn/attn_vec_einsum/w", (4, 16, 100))]
)
def test_a_matrix_is_quantised_by_pieces_as_it_is_whole(path, shape, monkeypatch):
  monkeypatch.setattr(opening, "PIECE", 1000)
  w = np.random.default_rng(0).normal(size=shape).astype(ml_dtypes.bfloat16)
  pieces = opening._quantized(f"llm/layers_0/{path}", w, np.dtype(np.float32))
  whole = quantized(f"llm/layers_0/{path}", jnp.asarray(w, jnp.float32))
  jax.tree.map(np.testing.assert_array_equal, pieces, whole)


# --- Matrices that a CPU widens ------------------------------------------------------------------


@pytest.fixture
def narrow(monkeypatch):
  monkeypatch.setattr(layer, "PIECE", 1 << 10)
  cfg = model("linear").llm
  return dataclasses.replace(cfg, width=64, vocab_size=900, layout="fused", tied_head=False)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("columns", [0, 1])
def test_pieces_give_the_product(columns, dtype, narrow):
  rng = np.random.default_rng(0)
  x = rng.integers(-8, 8, (2, 3, 64)).astype(np.float32)
  w = rng.integers(-8, 8, (64, 333)).astype(jnp.dtype(dtype))
  given = w if columns else np.ascontiguousarray(w.T)
  made = jax.jit(lambda x, w: widened(x, w, narrow, columns))(x, given)
  np.testing.assert_array_equal(made, x @ w.astype(np.float32))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_no_matrix_is_whole_in_float32_while_answers_are_decoded(dtype, narrow):
  """Left to the compiler, all are widened before the loop: 4 bytes for each 2 of the weights."""
  cfg = dataclasses.replace(narrow, dtype=dtype)
  embedder = Embedder(cfg)
  table = jax.ShapeDtypeStruct((cfg.vocab_size, cfg.width), jnp.bfloat16)
  tables = {"input_embedding": table, "output_embedding": table}
  matrices = [jax.ShapeDtypeStruct((64, 640), jnp.bfloat16)] * 4

  def decode(tables, matrices, tokens):
    def step(_, tokens):
      x = embedder.apply({"params": tables}, tokens, method="encode")
      for w in matrices:
        x = widened(x, w, cfg, columns=1)[..., :64]
      logits = embedder.apply({"params": tables}, x, method="decode")
      return logits.argmax(-1).astype(jnp.int32)

    return jax.lax.fori_loop(0, 9, step, tokens)

  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  program = jax.jit(decode).lower(tables, matrices, tokens).compile()
  weights = 2 * (2 * 900 * 64 + 4 * 64 * 640)
  assert program.memory_analysis().temp_size_in_bytes < weights / 10


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_kernels_of_a_tower_are_widened_layer_by_layer(dtype):
  cfg = SiglipConfig(image_size=28, width=64, depth=9, heads=2, mlp_dim=512, dtype=dtype)
  tower, pixels = Siglip(cfg), jnp.zeros((1, 28, 28, 3))
  wide = jax.jit(lambda: tower.init(jax.random.key(0), pixels)["params"])()
  narrow = jax.tree.map(lambda w: w.astype(jnp.bfloat16) if w.ndim > 1 else w, wide)
  program = jax.jit(lambda p: tower.apply({"params": p}, pixels)[0]).lower(narrow).compile()
  held = sum(w.nbytes for w in jax.tree.leaves(narrow))
  assert program.memory_analysis().temp_size_in_bytes < held / 2
  again = jax.tree.map(lambda w: w.astype(jnp.float32), narrow)
  np.testing.assert_array_equal(program(narrow), jax.jit(tower.apply)({"params": again}, pixels)[0])
