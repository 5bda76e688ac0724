"""A small but whole VideoRefer (tower, STC connector, regions, grouped-query decoder), and rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from vr_jax.models.connector import ConnectorConfig, scene_token_count
from vr_jax.models.decoder import DecoderConfig
from vr_jax.models.region import RegionConfig
from vr_jax.models.siglip import SiglipConfig
from vr_jax.models.videorefer import VideoReferConfig, init_params

CONFIG = VideoReferConfig(
  name="small",
  img=SiglipConfig(image_size=32, patch_size=8, width=32, depth=2, heads=2, mlp_dim=64),
  connector=ConnectorConfig(width=64),
  region=RegionConfig(width=64, tokens=2),
  llm=DecoderConfig(
    width=64,
    depth=2,
    heads=8,
    kv_heads=4,
    head_dim=16,
    mlp_dim=128,
    vocab_size=151,
    activation="silu",
    norm_plus_one=False,
    scale_embedding=False,
    tied_head=False,
    qkv_bias=True,
  ),
  num_frames=4,
)


def params(cfg=CONFIG):
  """Random float32 parameters, none of them zero; norms scale by about one, the rest is about
  1 / sqrt(width). From numpy: compiling the model's own beginning takes half a minute.
  """
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(lambda key: init_params(cfg, key), jax.random.key(0))

  def draw(path, leaf):
    noise = 0.1 * rng.standard_normal(leaf.shape, np.float32)
    return jnp.asarray(noise + (path[-1].key == "scale"))

  return jax.tree_util.tree_map_with_path(draw, shapes)


def rows(count, cfg=CONFIG, *, objects=2, mask_frames=3, text=24, seed=0):
  """Rows of random content: all scene frames, some objects on some frames, uneven lengths."""
  rng = np.random.default_rng(seed)
  T, N, U = cfg.num_frames, cfg.img.grid**2, cfg.region.tokens
  V = scene_token_count(cfg.connector, T, cfg.img.grid)
  L = V + objects * U + text
  size = cfg.img.image_size
  frames = rng.integers(0, 255, (count, T + 1, size, size, 3), dtype=np.uint8)
  masks = rng.random((count, objects, T + 1, N)) < 0.3
  order = np.arange(mask_frames)
  region_frames = np.where(order < rng.integers(1, mask_frames + 1, (count, objects, 1)), order, -1)
  visual = np.full((count, L), -1, np.int32)
  visual[:, 2 : 2 + V + objects * U] = np.arange(V + objects * U)
  length = rng.integers(L - text // 2, L + 1, (count, 1))
  slot = np.arange(L)
  supervised = (slot >= L - text + 6) & (slot < length)
  return {
    "frames": frames,
    "scene": np.tile(np.arange(T, dtype=np.int32), (count, 1)),
    "region_masks": masks.astype(np.uint8),
    "region_frames": region_frames.astype(np.int32),
    "tokens": rng.integers(0, cfg.llm.vocab_size, (count, L)).astype(np.int32) * (visual < 0),
    "visual": visual,
    "valid": slot < length,
    "supervised": supervised & (visual < 0),
  }


def with_llm(cfg=CONFIG, **fields):
  return dataclasses.replace(cfg, llm=dataclasses.replace(cfg.llm, **fields))
