"""SigLIP at any resolution: packed patches, positions by rotation, attention inside a picture.

Letters: B row of a batch, X row of the tower, N patch of such a row, C number of a patch
(3 * side * side), D width, A rotary angle, M patch of a scene token (merge * merge), V scene token,
E decoder width.

Pictures of all sizes (frames, images, crops of objects) stand behind each other in rows of N
patches, none across two rows. Those that give scene tokens lie in blocks of M patches, so that a
token is the mean of M neighbours:

    patches   a a a a b b b b b b - -    segments 0 0 0 0 1 1 1 1 1 1 -1 -1
    positions (row, column) of each in its own picture, whatever the order

Parameters carry the names of `siglip.py`, all layers and the norm behind them; there is no
pos_embedding.

A batch holds (made by `data_pipes.navit_rows`)
  patches u8 [B,X,N,C] in the order (colour, row, column), patch_segments i32 [B,X,N],
  patch_positions i32 [B,X,N,2]
  scene i32 [B,V,M]: the patches of each token as numbers among the row's X * N; where a picture is
    not merged, one patch M times
  scene_frame i32 [B,V]: number of the token's frame, -1 where there is no token
  scene_before i32 [B,V]: the token of the same block in the frame before; -1 keeps the token
and what the region encoder reads (`crops.py`).

Source: VideoLLaMA3 (arXiv 2501.13106) section 2; published `modeling_damovl_encoder.py`,
`pixelrefer_arch.py`.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Bool, Float, Int, UInt8

from data_pipes.errors import InputError
from vr_jax.arrays import Array
from vr_jax.models.siglip import Encoder, PatchEmbedding, Pictures, pixels
from vr_jax.sharding import ActivationRules, shard_act

ROPE_BASE = 10_000.0
CHANGE = 0.1  # a token stays if its pixels, in units of 2 grey levels, changed by more on average


@dataclasses.dataclass(frozen=True)
class NavitConfig:
  """Sizes of the tower; the defaults are those of VL3-SigLIP-NaViT.

  `merge`: a scene token of a video stands for merge x merge patches. `max_tokens`: the scene tokens
  that the pictures of one call may give (published `mm_max_length`). `compare_dtype`: of the pixels
  when the compressor compares frames; the published code has bfloat16. `dtype` is that of the
  matmuls; `remat` is none, dots, full or offload.
  """

  kind: str = "navit"
  patch_size: int = 14
  width: int = 1152
  depth: int = 27
  heads: int = 16
  mlp_dim: int = 4304
  merge: int = 2
  max_tokens: int = 8192
  compare_dtype: str = "float32"
  dtype: str = "float32"
  remat: str = "none"

  def __post_init__(self):
    if self.width % (4 * self.heads):
      raise InputError(
        f"width={self.width}, heads={self.heads}: a head needs a width divisible by 4, half of it "
        "for rows and half for columns"
      )

  @property
  def layers(self) -> int:
    """Layers that run: all."""
    return self.depth

  @property
  def select_layer(self) -> None:
    """All layers and the norm behind them give the output."""
    return None


def rotary_angles(positions: Int[Array, "X N 2"], head_dim: int) -> Float[Array, "X N A"]:
  """Angles of half a head: those of the row, then those of the column."""
  powers = jnp.arange(0, head_dim // 2, 2, dtype=jnp.float32) / (head_dim // 2)
  angles = positions.astype(jnp.float32)[..., None] * (1.0 / ROPE_BASE**powers)
  return rearrange(angles, "X N two f -> X N (two f)")


def token_changes(tokens: Float[Array, "V C"], before: Int[Array, " V"]) -> Float[Array, " V"]:
  """Mean change of each token's pixels against the token `before`, in units of 1/255.

  Pixels are in [-1, 1]. A token with nothing before it (-1) has changed by 1.1, as published.
  """
  change = jnp.abs(tokens - tokens[jnp.maximum(before, 0)]).astype(jnp.float32).mean(-1) * 255.0
  return jnp.where(before < 0, 1.1, change)


def kept_tokens(changes: Float[Array, " V"], frame: Int[Array, " V"]) -> Bool[Array, " V"]:
  """Which scene tokens the compressor keeps: those that changed, and one of each frame.

  `frame` numbers the frame of each token, ascending, -1 for none. A frame in which nothing changed
  keeps its first token. Each frame is compared with the one before it, not with what was kept last.
  """
  kept = (changes > CHANGE) & (frame >= 0)
  numbers = jnp.maximum(frame, 0)
  some = jax.ops.segment_max(kept.astype(jnp.int32), numbers, num_segments=len(frame))[numbers] > 0
  first = jnp.diff(frame, prepend=-2) != 0
  return kept | (first & ~some & (frame >= 0))


class Navit(nn.Module):
  """Packed patches to features."""

  cfg: NavitConfig
  rules: ActivationRules = ()

  @nn.compact
  def __call__(
    self,
    patches: UInt8[Array, "X N C"],
    segments: Int[Array, "X N"],
    positions: Int[Array, "X N 2"],
    *,
    intermediates: bool = False,
  ) -> tuple[Float[Array, "X N D"], dict[str, Array]]:
    """Features in `cfg.dtype`; those of padding (segment -1) mean nothing.

    The dict holds "hidden" [K+1,X,N,D] (the embeddings, then each layer's output) with
    `intermediates`.
    """
    c = self.cfg
    out: dict[str, Array] = {}
    P = c.patch_size
    patches = shard_act(patches, self.rules, "frame", None, None)
    x = rearrange(pixels(patches), "X N (C p q) -> X N (p q C)", p=P, q=P)
    x = PatchEmbedding(c, name="embedding").of_patches(x)
    angles = rotary_angles(positions, c.width // c.heads)
    pictures = Pictures(segments, jnp.cos(angles), jnp.sin(angles))
    return Encoder(c, self.rules, name="Transformer")(x, out, intermediates, pictures), out

  def features(self, batch: dict[str, Array]) -> Float[Array, "B n D"]:
    """Features of all patches of a row, n = X * N."""
    names = ("patches", "patch_segments", "patch_positions")
    rows = (rearrange(batch[name], "B X ... -> (B X) ...") for name in names)
    x, _ = self(*rows)
    x = rearrange(x, "(B X) N D -> B (X N) D", B=len(batch["patches"]))
    return shard_act(x, self.rules, "batch", None, None)

  def scene(
    self, connector: Any, features: Float[Array, "B n D"], batch: dict[str, Array]
  ) -> tuple[Float[Array, "B V E"], Bool[Array, "B V"]]:
    """Scene tokens, and which the compressor keeps."""
    down = downsampled(features, batch["scene"])
    return connector(down[:, None]), self.kept(batch)

  def kept(self, batch: dict[str, Array]) -> Bool[Array, "B V"]:
    """Which scene tokens the compressor keeps, from the pixels alone."""
    patches = rearrange(batch["patches"], "B X N C -> B (X N) C")

    def row(patches, scene, before, frame):
      values = pixels(patches).astype(self.cfg.compare_dtype)[scene]
      return kept_tokens(token_changes(rearrange(values, "V M C -> V (M C)"), before), frame)

    return jax.vmap(row)(patches, batch["scene"], batch["scene_before"], batch["scene_frame"])

  @staticmethod
  def empty_batch(
    cfg: NavitConfig, frames: int, scene: int, objects: int
  ) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shapes and dtypes of a row's pictures and objects."""
    M, N = cfg.merge**2, 4 * cfg.merge**2
    return {
      "patches": ((1, N, 3 * cfg.patch_size**2), jnp.uint8),
      "patch_segments": ((1, N), jnp.int32),
      "patch_positions": ((1, N, 2), jnp.int32),
      "scene": ((2, M), jnp.int32),
      "scene_frame": ((2,), jnp.int32),
      "scene_before": ((2,), jnp.int32),
      "cells": ((objects, 2, 4), jnp.int32),
      "cell_weights": ((objects, 2, 4), jnp.float32),
      "cell_places": ((objects, 2, 2), jnp.float32),
      "cell_counts": ((objects,), jnp.int32),
      "cell_starts": ((objects, 1), jnp.int32),
      "local": ((objects, 2), jnp.int32),
      "whole": ((objects, 2), jnp.int32),
    }


def downsampled(
  features: Float[Array, "B n D"], scene: Int[Array, "B V M"]
) -> Float[Array, "B V D"]:
  """The mean of the patches of each scene token, in the features' dtype."""
  chosen = jax.vmap(lambda rows, index: rows[index])(features, scene)
  return chosen.mean(2, dtype=jnp.float32).astype(features.dtype)
