"""big_vision's npz files: names, bfloat16, sub-trees, layouts; and a checkout of big_vision itself.

With BIG_VISION_DIR at a checkout, its own towers and decoders run on our parameters.
"""

import dataclasses
import importlib
import os
import sys
import types

import flax
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from test_interop_videorefer import model

from data_pipes.errors import InputError
from vr_jax.checkpoint import export, load_params, make_meta
from vr_jax.interop import big_vision, hf_decoder, hf_tower, videorefer
from vr_jax.interop.convert import convert
from vr_jax.interop.npz import Npz
from vr_jax.interop.sources import open_source
from vr_jax.interop.table import arrays, nested
from vr_jax.models.decoder import Decoder, DecoderConfig
from vr_jax.models.siglip import Siglip, SiglipConfig

IMG = SiglipConfig(
  image_size=32, patch_size=8, width=24, depth=3, heads=2, mlp_dim=20, select_layer=None
)
LLM = DecoderConfig(
  width=16, depth=2, heads=4, kv_heads=1, head_dim=8, mlp_dim=24, vocab_size=30, prefix_lm=True
)
QUIET = {"report": lambda line: None}


def paligemma(img=IMG, llm=LLM, seed=0):
  """The arrays of a PaliGemma under big_vision's names, written down here and not by our tables."""
  rng = np.random.default_rng(seed)
  shapes = {f"img/{k}": v for k, v in hf_tower.tower_shapes(img).items()}
  shapes |= {f"llm/{k}": v for k, v in hf_decoder.decoder_shapes(llm).items()}
  shapes |= {"img/head/kernel": (img.width, llm.width), "img/head/bias": (llm.width,)}
  return {k: rng.normal(size=v).astype(np.float32) * 0.1 for k, v in shapes.items()}


def unscanned(tensors):
  out = {}
  for name, array in tensors.items():
    for stack, single in (("encoderblock/", "encoderblock_{}/"), ("layers/", "layers/{}/")):
      if f"/{stack}" in name:
        out |= {name.replace(stack, single.format(i)): a for i, a in enumerate(array)}
        break
    else:
      out[name] = array
  return out


@pytest.mark.parametrize("root", ["", "params/", "opt/target/"])
@pytest.mark.parametrize("layout", [dict, unscanned])
def test_paligemma_loads_by_its_names(root, layout, tmp_path):
  tensors = paligemma()
  file = tmp_path / "any name.bin"
  with file.open("wb") as handle:
    np.savez(handle, **{root + k: v for k, v in layout(tensors).items()})
  source = open_source(file)
  assert source.kind == "big_vision npz"
  assert source.parts["img"] == IMG
  assert source.parts["llm"] == LLM
  found = arrays(source.params)
  for name, array in tensors.items():
    ours = name.replace("img/head", "connector/readout/fc1")
    np.testing.assert_array_equal(found.pop(ours), array, err_msg=name)
  assert not found


def test_bfloat16_comes_as_two_void_bytes_and_goes_out_so(tmp_path):
  tensors = {k: v.astype(ml_dtypes.bfloat16) for k, v in paligemma().items()}
  np.savez(tmp_path / "a.npz", **{f"params/{k}": v for k, v in tensors.items()})
  with np.load(tmp_path / "a.npz") as file:
    assert file["params/llm/final_norm/scale"].dtype == np.dtype("V2")
  convert(tmp_path / "a.npz", tmp_path / "vr", "vr", logits="never", **QUIET)
  parity = convert(tmp_path / "vr", tmp_path / "b.npz", "big_vision", logits="never", **QUIET)
  assert parity["bit_identical"]
  assert (tmp_path / "b.npz.parity.json").is_file()
  with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b:
    assert set(a) == set(b) - {"vr_jax_model"}
    for name in a:
      assert b[name].dtype == np.dtype("V2")
      assert a[name].tobytes() == b[name].tobytes(), name


def test_a_sub_tree_and_a_siglip_with_its_head(tmp_path):
  img = dataclasses.replace(IMG, pool=True)
  tensors = {k: v for k, v in paligemma(img).items() if "head/" not in k}
  tensors |= {"txt/Embed_0/embedding": np.zeros((3, 2), np.float32), "t": np.zeros(1, np.float32)}
  np.savez_compressed(tmp_path / "siglip.npz", **{f"params/{k}": v for k, v in tensors.items()})
  source = open_source(f"{tmp_path}/siglip.npz:img")
  assert source.parts == {"img": img}
  np.testing.assert_array_equal(
    source.params.read("img/MAPHead_0/probe"), tensors["img/MAPHead_0/probe"]
  )
  with pytest.raises(InputError, match="no arrays under 'vid'; it holds "):
    Npz(f"{tmp_path}/siglip.npz:vid")


def test_spare_rows_of_the_vocabulary_are_cut(tmp_path):
  llm = dataclasses.replace(LLM, vocab_size=256_128, width=4, prefix_lm=False)
  tensors = {k: v for k, v in paligemma(llm=llm).items() if k.startswith("llm/")}
  np.savez(tmp_path / "gemma.npz", **{k.removeprefix("llm/"): v for k, v in tensors.items()})
  source = open_source(tmp_path / "gemma.npz")
  assert source.parts["llm"].vocab_size == 256_000
  table = source.params.read("llm/embedder/input_embedding")
  np.testing.assert_array_equal(table, tensors["llm/embedder/input_embedding"][:256_000])


def test_load_as_big_vision_calls_it(tmp_path):
  tensors = paligemma()
  np.savez(tmp_path / "a.npz", **tensors)
  init = nested({k.replace("img/head", "connector/readout/fc1"): v for k, v in tensors.items()})
  init["region"] = {"fc1": {"bias": np.ones(3, np.float32)}}
  with pytest.raises(InputError, match="region/fc1/bias is missing"):
    big_vision.load(init, str(tmp_path / "a.npz"))
  loaded = big_vision.load(init, str(tmp_path / "a.npz"), None, dont_load=("region/.*",))
  np.testing.assert_array_equal(
    loaded["connector"]["readout"]["fc1"]["kernel"], tensors["img/head/kernel"]
  )
  np.testing.assert_array_equal(loaded["region"]["fc1"]["bias"], 1)
  cfg = model()
  assert big_vision.Model(**cfg.to_dict()).cfg == cfg


def test_a_whole_videorefer_goes_out_as_npz_and_back(tmp_path):
  cfg = model()
  rng = np.random.default_rng(0)
  shapes = videorefer.model_shapes(cfg)
  params = nested({k: rng.normal(size=v).astype(np.float32) for k, v in shapes.items()})
  export(tmp_path / "vr", params, make_meta(cfg.to_dict()))
  parity = convert(tmp_path / "vr", tmp_path / "a.npz", "big_vision", logits="never", **QUIET)
  assert parity["bit_identical"]
  with np.load(tmp_path / "a.npz") as file:
    assert "params/region/fc1/kernel" in file
    assert "params/img/Transformer/encoderblock/LayerNorm_0/scale" in file
  convert(tmp_path / "a.npz", tmp_path / "again", "vr", logits="never", **QUIET)
  jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path / "again"), params)
  assert open_source(tmp_path / "again").model_config() == dataclasses.replace(cfg)


@pytest.mark.parametrize("content", [b"PK\x03\x04broken", b"\x93NUMPY"])
def test_files_that_are_none(content, tmp_path):
  (tmp_path / "a.npz").write_bytes(content)
  with pytest.raises(InputError, match=r"a\.npz: "):
    open_source(tmp_path / "a.npz")


# --- Gemma's own layout -----------------------------------------------------------------------


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_gemma_in_orbax_layout(family, flat, tmp_path):
  import orbax.checkpoint as ocp

  llm = dataclasses.replace(LLM, prefix_lm=False, kv_heads=4 if family == "gemma" else 2)
  norms = {"post_norms": family != "gemma", "qk_norm": family == "gemma3"}
  llm = dataclasses.replace(llm, **norms)
  tensors = {k: v for k, v in paligemma(llm=llm).items() if k.startswith("llm/")}
  theirs = {}
  for name, array in unscanned(tensors).items():
    name = name.removeprefix("llm/").replace("layers/", "layer_")
    if name.endswith("gating_einsum"):
      array = array if family == "gemma" else array.swapaxes(-1, -2)
    if name.endswith(("gating_einsum", "linear")):
      name += "/w"
    name = name.replace("q_norm", "_query_norm").replace("k_norm", "_key_norm")
    theirs[f"transformer/{name}"] = np.ascontiguousarray(array)
  if flat:  # {"transformer/layer_0/attn/q_einsum": {"w": …}}
    tree = {}
    for name, array in theirs.items():
      module, _, leaf = name.rpartition("/")
      tree.setdefault(module, {})[leaf] = array
  else:
    tree = flax.traverse_util.unflatten_dict(theirs, sep="/")
  ocp.PyTreeCheckpointer().save(tmp_path / "gemma", tree)
  source = open_source(tmp_path / "gemma")
  assert source.kind == "Gemma folder in Orbax layout"
  found = source.parts["llm"]
  assert (found.depth, found.heads, found.kv_heads, found.mlp_dim) == (2, 4, llm.kv_heads, 24)
  assert (found.post_norms, found.qk_norm) == (llm.post_norms, llm.qk_norm)
  assert found.attn_soft_cap == (50.0 if family == "gemma2" else None)
  read = arrays(source.params)
  for name, array in tensors.items():
    np.testing.assert_array_equal(read[name], array, err_msg=name)
  parity = convert(tmp_path / "gemma", tmp_path / "vr", "vr", logits="never", **QUIET)
  assert parity["bit_identical"]


# --- big_vision itself ------------------------------------------------------------------------


@pytest.fixture
def checkout(monkeypatch):
  """Modules of a big_vision checkout; its utils, which need tensorflow, are not loaded."""
  folder = os.environ.get("BIG_VISION_DIR")
  if not folder:
    pytest.skip("BIG_VISION_DIR is not set")
  monkeypatch.syspath_prepend(folder)
  for name in ("big_vision.utils", "orbax", "orbax.checkpoint"):
    if name not in sys.modules:
      monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
  return importlib.import_module


@pytest.mark.slow
def test_a_checkout_of_big_vision_agrees_on_towers_and_decoders(checkout, tmp_path):
  tensors = paligemma()
  np.savez(tmp_path / "a.npz", **tensors)
  source = open_source(tmp_path / "a.npz")
  params = nested(arrays(source.params))
  theirs = nested(tensors)
  images = np.random.default_rng(1).uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)

  vit = checkout("big_vision.models.vit")
  tower = vit.Model(
    num_classes=LLM.width, patch_size=(8, 8), width=24, depth=3, mlp_dim=20, num_heads=2,
    pool_type="none", scan=True,
  )  # fmt: skip
  init = jax.eval_shape(lambda: tower.init(jax.random.key(0), jnp.asarray(images))["params"])
  assert_same_tree(init, theirs["img"])
  _, out = tower.apply({"params": theirs["img"]}, jnp.asarray(images))
  ours, _ = Siglip(IMG).apply({"params": params["img"]}, images)
  np.testing.assert_allclose(ours, out["encoded"], atol=1e-5)

  gemma = checkout("big_vision.models.ppp.gemma")
  words = np.random.default_rng(2).integers(0, 30, (2, 7))
  decoder = gemma.Model(
    variant="x", width=16, depth=2, mlp_dim=24, num_heads=4, num_kv_heads=1, head_dim=8,
    norm_eps=1e-6, vocab_size=30, scan=True,
  )  # fmt: skip
  init = jax.eval_shape(lambda: decoder.init(jax.random.key(0), jnp.asarray(words))["params"])
  assert_same_tree(init, theirs["llm"])
  logits, _ = decoder.apply({"params": theirs["llm"]}, jnp.asarray(words))
  llm, own = Decoder(LLM), {"params": params["llm"]}
  x = llm.apply(own, jnp.asarray(words), method="embed")
  hidden, _ = llm.apply(own, x, jnp.broadcast_to(jnp.arange(7), words.shape))
  np.testing.assert_allclose(llm.apply(own, hidden, method="logits"), logits, atol=1e-5)


def assert_same_tree(shapes, tensors):
  ours, theirs = (flax.traverse_util.flatten_dict(t, sep="/") for t in (tensors, shapes))
  assert {k: v.shape for k, v in ours.items()} == {k: tuple(v.shape) for k, v in theirs.items()}
