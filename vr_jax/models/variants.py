"""Models by name, what they weigh and what they compute.

Letters in the formulas: N patch, D tower width, H decoder width, T scene frame, S slot.

FLOPs are those the mathematics asks for (a multiply-add is 2; causal attention sees half its
slots; no padding, no recomputation); element-wise work is not counted.
"""

import dataclasses
import math
from collections.abc import Collection

import jax
import jax.numpy as jnp

from data_pipes.errors import InputError
from vr_jax.models.connector import KINDS, ConnectorConfig, scene_token_count
from vr_jax.models.decoder import Decoder, DecoderConfig
from vr_jax.models.region import RegionConfig
from vr_jax.models.siglip import SiglipConfig
from vr_jax.models.videorefer import VideoReferConfig, init_params

# --- Decoders, as released --------------------------------------------------------------------

DECODERS = {
  "qwen2-7b": DecoderConfig(
    width=3584,
    depth=28,
    heads=28,
    kv_heads=4,
    head_dim=128,
    mlp_dim=18944,
    vocab_size=152_064,
    activation="silu",
    norm_plus_one=False,
    scale_embedding=False,
    tied_head=False,
    qkv_bias=True,
    rope_base=1e6,
  ),
  "gemma-2b": DecoderConfig(
    width=2048,
    depth=18,
    heads=8,
    kv_heads=1,
    head_dim=256,
    mlp_dim=16384,
    vocab_size=256_000,
  ),
  "gemma-7b": DecoderConfig(
    width=3072,
    depth=28,
    heads=16,
    kv_heads=16,
    head_dim=256,
    mlp_dim=24576,
    vocab_size=256_000,
  ),
  "gemma2-9b": DecoderConfig(
    width=3584,
    depth=42,
    heads=16,
    kv_heads=8,
    head_dim=256,
    mlp_dim=14336,
    vocab_size=256_000,
    post_norms=True,
    attn_soft_cap=50.0,
    final_soft_cap=30.0,
    pattern=("local", "global"),
    window=4096,
  ),
  "gemma3-4b": DecoderConfig(
    width=2560,
    depth=34,
    heads=8,
    kv_heads=4,
    head_dim=256,
    mlp_dim=10240,
    vocab_size=262_144,
    post_norms=True,
    qk_norm=True,
    pattern=("local",) * 5 + ("global",),
    window=1024,
    rope_base=1e6,
    local_rope_base=1e4,
    rope_scale=8.0,
  ),
}

# Rows of the token table: what the family's tokenizer knows, and `<region>` behind it, as the
# published code resizes to len(tokenizer) after adding it. (Released tables have spare rows.)
TOKENS_WITH_REGION = {
  "qwen2-7b": 151_646 + 1,
  "gemma-2b": 256_000 + 1,
  "gemma2-9b": 256_000 + 1,
  "gemma3-4b": 262_145 + 1,  # <image_soft_token> is the last of Gemma 3's own
}


def _full_size(name: str, decoder: str) -> VideoReferConfig:
  """SigLIP so400m/14 at 384 pixels and the STC connector v35 before a decoder."""
  llm = dataclasses.replace(DECODERS[decoder], vocab_size=TOKENS_WITH_REGION[decoder])
  return VideoReferConfig(
    name=name,
    img=SiglipConfig(),
    connector=ConnectorConfig(width=llm.width),
    region=RegionConfig(width=llm.width),
    llm=llm,
  )


VARIANTS = {
  cfg.name: cfg
  for cfg in (
    # The demonstration model of the embedded set; Qwen2's switches, so that it exports as one.
    VideoReferConfig(
      name="vr-mini",
      img=SiglipConfig(image_size=96, patch_size=8, width=96, depth=4, heads=3, mlp_dim=384),
      connector=ConnectorConfig(width=128),
      region=RegionConfig(width=128),
      llm=DecoderConfig(
        width=128,
        depth=6,
        heads=4,
        kv_heads=4,
        head_dim=32,
        mlp_dim=384,
        vocab_size=784,
        activation="silu",
        norm_plus_one=False,
        scale_embedding=False,
        qkv_bias=True,
      ),
      num_frames=8,
    ),
    _full_size("videorefer-7b", "qwen2-7b"),
    _full_size("videorefer-gemma-2b", "gemma-2b"),
    _full_size("videorefer-gemma2-9b", "gemma2-9b"),
    _full_size("videorefer-gemma3-4b", "gemma3-4b"),
  )
}


def get_variant(name: str) -> VideoReferConfig:
  """The named model. Raises InputError on a name that is not in VARIANTS."""
  if name not in VARIANTS:
    raise InputError(f"model {name!r} is not one of {', '.join(VARIANTS)}")
  return VARIANTS[name]


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
