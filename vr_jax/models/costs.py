"""What a model weighs and computes, from its configuration alone.

Letters in the formulas: N patch, D tower width, H decoder width, T scene frame, S slot.

FLOPs are those the mathematics asks for (a multiply-add is 2; causal attention sees half its
slots; no padding, no recomputation); element-wise work is not counted.
"""

import math
from collections.abc import Collection

import jax
import jax.numpy as jnp

from vr_jax.models.connector import KINDS, ConnectorConfig, scene_token_count
from vr_jax.models.decoder import Decoder, DecoderConfig
from vr_jax.models.navit import NavitConfig
from vr_jax.models.siglip import SiglipConfig
from vr_jax.models.videorefer import VideoReferConfig, init_params

# --- Parameters -------------------------------------------------------------------------------


def parameter_counts(cfg: VideoReferConfig) -> dict[str, int]:
  """Parameters of img, connector, region and llm; builds shapes only."""
  shapes = jax.eval_shape(lambda key: init_params(cfg, key), jax.random.key(0))
  return {part: _size(tree) for part, tree in shapes.items()}


def decoder_parameters(cfg: DecoderConfig) -> int:
  """Parameters of a decoder alone; builds shapes only."""
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)

  def init(tokens):
    return Decoder(cfg).init(jax.random.key(0), tokens, method=lambda m, t: m(m.embed(t), t))

  return _size(jax.eval_shape(init, tokens))


def _size(tree) -> int:
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


# --- FLOPs ------------------------------------------------------------------------------------


def tower_flops(cfg: SiglipConfig) -> int:
  """One frame through the layers that run."""
  N, D, F = cfg.grid**2, cfg.width, cfg.mlp_dim
  layer = N * (2 * (4 * D * D + 2 * D * F) + 4 * N * D)
  return cfg.layers * layer + 2 * 3 * cfg.patch_size**2 * D * N


def picture_flops(cfg: NavitConfig, patches: int) -> int:
  """One picture of this many patches through a tower that reads pictures of any size."""
  N, D, F = patches, cfg.width, cfg.mlp_dim
  layer = N * (2 * (4 * D * D + 2 * D * F) + 4 * N * D)
  return cfg.layers * layer + 2 * 3 * cfg.patch_size**2 * D * N


def connector_flops(cfg: ConnectorConfig, tower_width: int, frames: int, grid: int) -> int:
  """`frames` scene frames to scene tokens, without squeeze-excite (its means make it negligible).

  An image is one frame whose slot stands for all: its sampler sums two equal slices.
  """
  kind, D, H = KINDS[cfg.kind], tower_width, cfg.width
  merged = kind.stride[0] if kind.stride else 1  # frames in one slot
  tokens = scene_token_count(cfg, max(frames, merged), grid)
  total = 0
  if kind.stage_depth:
    block = 2 * (2 * H * H + 9 * H)
    patches = frames * grid * grid
    total += patches * (2 * (2 * D * H + H * H + 9 * H) + (kind.stage_depth - 1) * block)
    total += tokens * kind.stage_depth * block
  if kind.conv:
    taps = math.prod(kind.stride) * min(frames, merged) // merged
    total += tokens * 2 * taps * (H if kind.stage_depth else D) * H
  width_in = H if kind.stage_depth or kind.conv else D
  total += tokens * 2 * (width_in * H + (kind.readout_depth - 1) * H * H)
  return total


def adapter_parameters(cfg: DecoderConfig) -> int:
  """Parameters of the adapters of a decoder's matrices."""
  D, attn, kv = cfg.width, cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
  sides = 2 * (D + attn) + 2 * (D + kv) + 3 * (D + cfg.mlp_dim)
  return cfg.depth * cfg.lora_rank * sides


def decoder_flops(cfg: DecoderConfig, slots: int, head_rows: int) -> int:
  """A prefill of `slots` slots, with the head applied to `head_rows` of them."""
  D, attn, kv = cfg.width, cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
  matmuls = cfg.depth * (2 * D * attn + 2 * D * kv + 3 * D * cfg.mlp_dim) + adapter_parameters(cfg)
  keys = sum(
    _mean_keys(slots, cfg.window if kind == "local" else None) for kind in cfg.layer_kinds()
  )
  return int(slots * (2 * matmuls + 4 * keys * attn)) + 2 * D * cfg.vocab_size * head_rows


def _mean_keys(slots: int, window: int | None) -> float:
  """Keys a query sees on average: half of the slots, or less in a window."""
  if window is None or window >= slots:
    return slots / 2
  return window * (1 - window / (2 * slots))


def prefill_flops(cfg: VideoReferConfig, frames: int, slots: int) -> dict[str, int]:
  """A prefill of one row with `frames` different frames (scene and mask), by part."""
  return {
    "img": frames * tower_flops(cfg.img),
    "connector": connector_flops(cfg.connector, cfg.img.width, cfg.num_frames, cfg.img.grid),
    "llm": decoder_flops(cfg.llm, slots, 1),
  }


def training_flops(
  cfg: VideoReferConfig,
  trained: Collection[str],
  frames: int,
  slots: int,
  supervised: int,
  scene_frames: int | None = None,
) -> int:
  """What the mathematics asks of forward and backward for a row: no recomputation, no padding.

  Forward once; gradients of activations and of weights only where something behind or in it trains;
  before the first object token nothing where the region encoder alone trains.

  Args:
    trained: the parts that train; "adapters" where of the decoder they alone do.
    frames: different frames that the tower sees.
    scene_frames: of the connector, 1 for an image, 0 for text alone (default: the model's).
  """
  scene_frames = cfg.num_frames if scene_frames is None else scene_frames
  tower = frames * tower_flops(cfg.img) * (3 if "img" in trained else 1)
  connector = 0
  if scene_frames:
    connector = connector_flops(cfg.connector, cfg.img.width, scene_frames, cfg.img.grid)
  decoder = decoder_flops(cfg.llm, slots, supervised)
  if "llm" in trained:
    decoder *= 3
  elif "adapters" in trained:
    decoder = 2 * decoder + 2 * slots * adapter_parameters(cfg.llm)
  elif "connector" in trained:
    decoder *= 2
  elif scene_frames:
    prefix = scene_token_count(cfg.connector, cfg.num_frames, cfg.img.grid)
    decoder = 2 * decoder - decoder_flops(cfg.llm, min(prefix, slots), 0)
  return tower + connector * (3 if "connector" in trained else 1) + decoder
