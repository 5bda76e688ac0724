"""The layout for inference: layers apart (layers_0, …), few large matmuls, and weights made so.

Letters: B batch, L slot of this call, S key slot, D width, N query head, K key/value head,
H head width, F MLP width, C shard.

A step of decoding is bound by reading weights: each is read once, by one matmul for q, k and v and
one for gate and values, and no layer is sliced out of a stack.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Float

from vr_jax.arrays import Array
from vr_jax.models.layer import (
  Attention,
  Block,
  DecoderConfig,
  FeedForward,
  KeysValues,
  Layout,
  Tables,
  matmul,
  scaled_by,
  write_slots,
)
from vr_jax.sharding import ActivationRules


class FusedProjection(nn.Module):
  """q, k and v in one matmul: each shard's heads of q, then of k, then of v."""

  cfg: DecoderConfig

  @nn.compact
  def __call__(self, x: Float[Array, "B L D"]) -> tuple[Array, Array, Array]:
    c = self.cfg
    N, K, H = c.heads, c.kv_heads, c.head_dim
    y = matmul(x, self.param("w", scaled_by(0), (c.width, (N + 2 * K) * H)))
    if c.qkv_bias:
      y = y + self.param("b", nn.initializers.zeros, ((N + 2 * K) * H,)).astype(x.dtype)
    y = rearrange(y, "B L (C M H) -> B L C M H", C=c.shards, H=H)  # M heads of q, k and v
    q, k, v = (
      rearrange(part, "B L C N H -> B L (C N) H")
      for part in jnp.split(y, (N // c.shards, (N + K) // c.shards), axis=-2)
    )
    return q, k, v


class FusedAttention(Attention):
  """q, k and v in one matmul; the cache is that of this layer, [B,K,S,H]."""

  def project(self, x: Float[Array, "B L D"]) -> tuple[Array, Array, Array]:
    return FusedProjection(self.cfg, name="qkv")(x)

  def write(
    self, kv: KeysValues, new: KeysValues, layer: Any, end: Array
  ) -> tuple[KeysValues, KeysValues]:
    """Writes L slots from `end` on: [] where the rows move together, [B] where each has its own."""
    kv = tuple(map(functools.partial(write_slots, end=end, axis=2), kv, new))
    return kv, kv


class FusedFeedForward(FeedForward):
  """Gate and values in one matmul: each shard's columns of the gate, then of the values."""

  def gate_up(self, x: Float[Array, "B L D"]) -> tuple[Array, Array]:
    c = self.cfg
    both = matmul(x, self.param("gate_up", scaled_by(0), (c.width, 2 * c.mlp_dim)))
    both = rearrange(both, "B L (C two F) -> B L C two F", C=c.shards, two=2)
    gate, up = (rearrange(both[..., i, :], "B L C F -> B L (C F)") for i in range(2))
    return gate, up


class FusedBlock(Block):
  """A layer with parameters and a cache of its own."""

  attention = FusedAttention
  feed_forward = FusedFeedForward


def layers(cfg: DecoderConfig, rules: ActivationRules) -> list[FusedBlock]:
  """A module for each layer."""
  return [FusedBlock(cfg, rules) for _ in range(cfg.depth)]


def run(
  blocks: Sequence[FusedBlock],
  x: Array,
  kv: KeysValues | None,
  seen: KeysValues | None,
  tables: Tables,
) -> tuple[Array, KeysValues | None]:
  """One layer after the other, each with its part of the caches (tuples of X arrays)."""
  nothing = [None] * len(blocks)
  caches = nothing if kv is None else list(zip(*kv, strict=True))
  pasts = nothing if seen is None else list(zip(*seen, strict=True))
  written = []
  for block, kind, past, cache in zip(blocks, tables.kinds, pasts, caches, strict=True):
    (x, cache), _ = block((x, cache), tables, (kind, None, past))
    written.append(cache)
  return x, None if kv is None else tuple(zip(*written, strict=True))


def empty(cfg: DecoderConfig, shape: tuple[int, ...]) -> tuple[Float[Array, "B K S H"], ...]:
  """Zeros for the keys of all layers, an array for each."""
  return tuple(jnp.zeros(shape, cfg.dtype) for _ in range(cfg.depth))


FUSED = Layout(layers, run, empty)


def fuse(
  cfg: DecoderConfig, params: Mapping[str, Any], shards: int = 1
) -> tuple[DecoderConfig, dict[str, Any]]:
  """A scanned decoder in the fused layout, for inference: (config, parameters).

  A step then reads every weight once, in few large matmuls, and no layer is sliced out of a stack.
  Heads and MLP columns come in `shards` equal parts, so that each device of a tensor axis holds all
  of what its part of a fused matmul belongs to. Works on the host: the result is of numpy arrays.
  """
  if cfg.layout != "scanned":
    raise ValueError(f"layout={cfg.layout!r}: only a scanned decoder can be fused")
  heads = _interleaved((cfg.heads, cfg.kv_heads, cfg.kv_heads), shards)
  columns = _interleaved((cfg.mlp_dim, cfg.mlp_dim), shards)

  def cast(tree):
    return jax.tree_util.tree_map_with_path(
      lambda path, w: np.asarray(w, "float32" if path[-1].key == "scale" else jnp.dtype(cfg.dtype)),
      tree,
    )

  def layer(i: int) -> dict[str, Any]:
    weights = cast(jax.tree.map(lambda w: w[i], params["layers"]))
    attn, mlp = dict(weights["attn"]), weights["mlp"]
    names = [name for name in ("q_einsum", "kv_einsum", "qkv_einsum") if name in attn]
    projections = [attn.pop(name) for name in names]
    w = np.concatenate([p["w"].reshape(-1, cfg.width, cfg.head_dim) for p in projections])
    attn["qkv"] = {"w": rearrange(w[heads], "N D H -> D (N H)")}
    if cfg.qkv_bias:
      b = np.concatenate([p["b"].reshape(-1, cfg.head_dim) for p in projections])
      attn["qkv"]["b"] = rearrange(b[heads], "N H -> (N H)")
    gate_up = np.concatenate(list(mlp["gating_einsum"]), axis=-1)[:, columns]
    return {**weights, "attn": attn, "mlp": {"gate_up": gate_up, "linear": mlp["linear"]}}

  fused = cast({k: v for k, v in params.items() if k != "layers"})
  fused |= {f"layers_{i}": layer(i) for i in range(cfg.depth)}
  return dataclasses.replace(cfg, layout="fused", shards=shards), fused


def _interleaved(sizes: tuple[int, ...], shards: int) -> np.ndarray:
  """Indices that bring concatenated parts of these sizes into the order of the shards."""
  parts = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
  blocks = [np.split(part, shards) for part in parts]
  return np.concatenate([block[i] for i in range(shards) for block in blocks])
