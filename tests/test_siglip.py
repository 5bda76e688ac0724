"""SigLIP tower: golden cases, big_vision's names, and what the config promises."""

import dataclasses
import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rounding import assert_same_up_to_rounding, tower_roundings
from scipy import ndimage

from data_pipes.errors import InputError
from vr_jax.models.siglip import PatchEmbedding, Siglip, SiglipConfig, resample_posemb
from vr_jax.parity.golden import run_parity

SMALL = SiglipConfig(
  image_size=34, patch_size=8, width=144, depth=3, heads=2, mlp_dim=40, select_layer=None, pool=True
)


def count(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


def shapes(cfg):
  pixels = jax.ShapeDtypeStruct((1, cfg.image_size, cfg.image_size, 3), jnp.float32)
  tree = jax.eval_shape(Siglip(cfg).init, jax.random.key(0), pixels)["params"]
  return flax.traverse_util.flatten_dict(tree, sep="/")


def random_params(cfg):
  """Like those of a trained tower in size; no initialiser is compiled."""
  rng = np.random.default_rng(1)

  def values(path, shape):
    x = rng.normal(size=shape).astype(np.float32)
    return 1 + 0.1 * x if path.endswith("scale") else x * 0.1

  flat = {path: values(path, s.shape) for path, s in shapes(cfg).items()}
  return flax.traverse_util.unflatten_dict(flat, sep="/")


def images(cfg, number=2):
  shape = (number, cfg.image_size, cfg.image_size, 3)
  return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


def only(cfg, params):
  """The parameters that a tower of `cfg` has, cut from those of the whole one."""
  wanted = shapes(cfg)
  flat = flax.traverse_util.flatten_dict(params, sep="/")
  cut = {k: flat[k][: s.shape[0]] if "encoderblock" in k else flat[k] for k, s in wanted.items()}
  return flax.traverse_util.unflatten_dict(cut, sep="/")


def test_golden(golden):
  results = run_parity(golden, ["01_siglip"])
  failed = [str(r) for r in results if r.status == "fail"]
  assert not failed, "\n".join(failed)
  skipped = {r.case for r in results if r.status == "skipped"}
  assert skipped == {r.case for r in results if r.case.startswith("clip")}
  assert len(results) - len(skipped) == 7
  assert not [str(r) for r in results if r.unknown]


def test_parameter_counts_of_so400m():
  whole = SiglipConfig(select_layer=None, pool=True)
  assert count(shapes(whole)) == 428_225_600
  assert count(shapes(SiglipConfig(select_layer=None))) == 412_987_248
  assert count(shapes(SiglipConfig())) == 412_987_248 - 15_239_504 - 2 * 1152
  assert SiglipConfig().grid == 27
  assert SiglipConfig().layers == 26


def test_names_and_shapes_are_big_visions():
  attention = {
    f"{name}/{kind}": shape
    for name in ("query", "key", "value")
    for kind, shape in (("kernel", (144, 2, 72)), ("bias", (2, 72)))
  } | {"out/kernel": (2, 72, 144), "out/bias": (144,)}
  mlp = {
    "Dense_0/kernel": (144, 40),
    "Dense_0/bias": (40,),
    "Dense_1/kernel": (40, 144),
    "Dense_1/bias": (144,),
  }
  norm = {"scale": (144,), "bias": (144,)}

  def block(norms):
    return (
      {f"{n}/{k}": v for n in norms for k, v in norm.items()}
      | {f"MultiHeadDotProductAttention_0/{k}": v for k, v in attention.items()}
      | {f"MlpBlock_0/{k}": v for k, v in mlp.items()}
    )

  layers = block(["LayerNorm_0", "LayerNorm_1"])
  assert {k: v.shape for k, v in shapes(SMALL).items()} == {
    "embedding/kernel": (8, 8, 3, 144),
    "embedding/bias": (144,),
    "pos_embedding": (1, 16, 144),
    **{f"Transformer/encoderblock/{k}": (3, *v) for k, v in layers.items()},
    **{f"Transformer/encoder_norm/{k}": v for k, v in norm.items()},
    "MAPHead_0/probe": (1, 1, 144),
    **{f"MAPHead_0/{k}": v for k, v in block(["LayerNorm_0"]).items()},
  }


@pytest.mark.parametrize(("select_layer", "layers"), [(-2, 2), (1, 1), (-4, 0)])
def test_select_layer_is_that_hidden_state(select_layer, layers):
  params, pixels = random_params(SMALL), images(SMALL)
  apply = jax.jit(functools.partial(Siglip(SMALL).apply, intermediates=True))
  _, out = apply({"params": params}, pixels)
  cfg = dataclasses.replace(SMALL, select_layer=select_layer, pool=False)
  assert cfg.layers == layers
  features, extra = jax.jit(Siglip(cfg).apply)({"params": only(cfg, params)}, pixels)
  assert not extra
  assert_same_up_to_rounding(features, out["hidden"][layers], tower_roundings(cfg))


@pytest.mark.parametrize(
  ("wrong", "says"),
  [
    ({"select_layer": -5}, "select_layer=-5"),
    ({"select_layer": 4}, "-4..3"),
    ({"select_layer": -2, "pool": True}, "pool"),
    ({"heads": 5}, "heads=5"),
  ],
)
def test_impossible_configs(wrong, says):
  with pytest.raises(InputError, match=says):
    dataclasses.replace(SMALL, **{"pool": False, **wrong})


def test_pixels_behind_the_last_whole_patch_are_not_seen():
  params, pixels = random_params(SMALL), images(SMALL)
  changed = pixels.copy()
  changed[:, 32:] = 9
  changed[:, :, 32:] = 9
  apply = jax.jit(Siglip(SMALL).apply)
  np.testing.assert_array_equal(
    apply({"params": params}, pixels)[0], apply({"params": params}, changed)[0]
  )
  with pytest.raises(ValueError, match="34"):
    Siglip(SMALL).apply({"params": params}, pixels[:, :32, :32])


def test_patch_embedding_is_the_valid_convolution():
  pixels = images(SMALL)
  params = PatchEmbedding(SMALL).init(jax.random.key(1), pixels)["params"]
  conv = jax.lax.conv_general_dilated(
    pixels, params["kernel"], (8, 8), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  ours = PatchEmbedding(SMALL).apply({"params": params}, pixels)
  assert_same_up_to_rounding(ours, conv.reshape(2, 16, 144), 8 * 8 * 3)


@pytest.mark.slow
def test_remat_changes_no_gradient():
  cfg = dataclasses.replace(SMALL, select_layer=-1, pool=False)
  params, pixels = random_params(cfg), images(cfg, number=1)

  @functools.partial(jax.jit, static_argnums=1)
  def grad(params, remat):
    tower = Siglip(dataclasses.replace(cfg, remat=remat))
    return jax.grad(lambda p: jnp.sum(jnp.sin(tower.apply({"params": p}, pixels)[0])))(params)

  plain = grad(params, "none")
  for remat in ("dots", "full"):
    # Each sum of the way forward has two in the gradient.
    assert_same_up_to_rounding(grad(params, remat), plain, 3 * tower_roundings(cfg))
  with pytest.raises(InputError, match="remat='all'"):
    grad(params, "all")


def test_bfloat16_matmuls_keep_float32_parameters():
  cfg = dataclasses.replace(SMALL, dtype="bfloat16")
  params, pixels = random_params(cfg), images(cfg)
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
  features, _ = jax.jit(Siglip(cfg).apply)({"params": params}, pixels)
  assert features.dtype == jnp.bfloat16
  exact, _ = jax.jit(Siglip(SMALL).apply)({"params": params}, pixels)
  assert np.sqrt(np.mean((np.float32(features) - exact) ** 2)) < 0.05


@pytest.mark.parametrize(("old", "new"), [(4, 7), (9, 4), (5, 5), (3, 2)])
def test_position_embeddings_resample_as_in_big_vision(old, new):
  pos = np.random.default_rng(0).normal(size=(1, old * old, 6)).astype(np.float32)
  zoomed = ndimage.zoom(pos.reshape(old, old, 6), (new / old, new / old, 1), order=1)
  # A sum over the old grid; a coordinate is rounded as a number below `old`, weights as below 1.
  roundings = old * old + 4 * old
  assert_same_up_to_rounding(resample_posemb(pos, new), zoomed.reshape(1, -1, 6), roundings)


def test_position_embeddings_need_a_square_grid():
  with pytest.raises(ValueError, match="12 positions"):
    resample_posemb(np.zeros((1, 12, 4), np.float32), 4)
