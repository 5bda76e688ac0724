"""Models by name: their sizes, from one for a CPU to the published 7B."""

import dataclasses

from data_pipes.errors import InputError
from vr_jax.models.connector import ConnectorConfig
from vr_jax.models.decoder import DecoderConfig
from vr_jax.models.navit import NavitConfig
from vr_jax.models.region import RegionConfig
from vr_jax.models.siglip import SiglipConfig
from vr_jax.models.videorefer import VideoReferConfig

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
  "qwen2.5-1.5b": DecoderConfig(
    width=1536,
    depth=28,
    heads=12,
    kv_heads=2,
    head_dim=128,
    mlp_dim=8960,
    vocab_size=151_936,
    activation="silu",
    norm_plus_one=False,
    scale_embedding=False,
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


# Of the demonstration models; Qwen2's switches, so that they export as one.
MINI_DECODER = DecoderConfig(
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
)

VARIANTS = {
  cfg.name: cfg
  for cfg in (
    # The demonstration model of the embedded set.
    VideoReferConfig(
      name="vr-mini",
      img=SiglipConfig(image_size=96, patch_size=8, width=96, depth=4, heads=3, mlp_dim=384),
      connector=ConnectorConfig(width=128),
      region=RegionConfig(width=128),
      llm=MINI_DECODER,
      num_frames=8,
    ),
    _full_size("videorefer-7b", "qwen2-7b"),
    _full_size("videorefer-gemma-2b", "gemma-2b"),
    _full_size("videorefer-gemma2-9b", "gemma2-9b"),
    _full_size("videorefer-gemma3-4b", "gemma3-4b"),
  )
}


def _any_size(name: str, decoder: str, kind: str, tokens: int) -> VideoReferConfig:
  """A successor of VideoRefer: SigLIP-NaViT, crops of objects, Qwen2.5 with seven more tokens."""
  llm = dataclasses.replace(DECODERS[decoder], vocab_size=151_669)
  return VideoReferConfig(
    name=name,
    img=NavitConfig(),
    connector=ConnectorConfig(kind="mlp2x_gelu", width=llm.width),
    region=RegionConfig(width=llm.width, tokens=tokens, kind=kind),
    llm=llm,
    num_frames=180,
    image_aspect_ratio="any",
    max_text_ids=16_384,
  )


# The demonstration model of PixelRefer's kind: the layers of vr-mini's tower that run, its decoder
# with the ids up to <REGION>. 256 tokens a call let one crop have 16 x 16 patches.
MINI_NAVIT = VideoReferConfig(
  name="vr-mini-navit",
  img=NavitConfig(width=96, depth=3, heads=3, mlp_dim=384, max_tokens=256),
  connector=ConnectorConfig(kind="mlp2x_gelu", width=128),
  region=RegionConfig(width=128, tokens=2, kind="placed_cells"),
  llm=dataclasses.replace(MINI_DECODER, vocab_size=788),
  num_frames=16,
  image_aspect_ratio="any",
)

# Models whose tower reads pictures of any size; by name as VARIANTS.
SUCCESSORS = {
  cfg.name: cfg
  for size, decoder in (("2b", "qwen2.5-1.5b"), ("7b", "qwen2-7b"))
  for cfg in (
    _any_size(f"videorefer-videollama3-{size}", decoder, "cells", 10),
    _any_size(f"pixelrefer-{size}", decoder, "placed_cells", 32),
    _any_size(f"pixelrefer-lite-{size}", decoder, "cells_in_context", 32),
  )
} | {MINI_NAVIT.name: MINI_NAVIT}


def get_variant(name: str) -> VideoReferConfig:
  """The named model. Raises InputError on a name that is in neither table."""
  known = {**VARIANTS, **SUCCESSORS}
  if name not in known:
    raise InputError(f"model {name!r} is not one of {', '.join(known)}")
  return known[name]
