"""The layout for inference: layers apart (layers_0, …), few large matmuls, and weights made so.

Letters: B batch, L slot of this call, S key slot, D width, N query head, K key/value head,
H head width, F MLP width, C shard.

A step of decoding is bound by reading weights: each is read once, by one matmul for q, k and v and
one for gate and values, and no layer is sliced out of a stack.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax
import flax.linen as nn
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
    y = matmul(x, self.param("w", scaled_by(0), (c.width, (N + 2 * K) * H)), cfg=c)
    if c.qkv_bias:
      y = y + self.param("b", nn.initializers.zeros, ((N + 2 * K) * H,)).astype(x.dtype)
    # Cut before the heads are told apart: a TPU's compiler else turns the matrix round first, and
    # keeps a copy of it.
    y = rearrange(y, "B L (C F) -> B L C F", C=c.shards)
    ends = (N * H // c.shards, (N + K) * H // c.shards)
    q, k, v = (
      rearrange(part, "B L C (N H) -> B L (C N) H", H=H) for part in jnp.split(y, ends, axis=-1)
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
    both = matmul(x, self.param("gate_up", scaled_by(0), (c.width, 2 * c.mlp_dim)), cfg=c)
    both = rearrange(both, "B L (C F) -> B L C F", C=c.shards)
    gate, up = (rearrange(x, "B L C F -> B L (C F)") for x in jnp.split(both, 2, axis=-1))
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


Read = Callable[[str, tuple[int, ...]], Any]


def fused_leaves(
  cfg: DecoderConfig, paths: Iterable[str], read: Read, shards: int = 1
) -> Iterator[tuple[str, np.ndarray]]:
  """The parameters of a scanned decoder in the fused layout, one after another: (path, array).

  A step then reads every weight once, in few large matmuls, and no layer is sliced out of a stack.
  Heads and MLP columns come in `shards` equal parts, so that each device of a tensor axis holds all
  of what its part of a fused matmul belongs to. Dtypes are those of what is read.

  Args:
    paths: of the scanned parameters.
    read: (path, leading indices) -> a parameter or one layer of it. What lies in one array is read
      layer after layer, since where a file holds it in one piece, it is then read once.
  """
  if cfg.layout != "scanned":
    raise ValueError(f"layout={cfg.layout!r}: only a scanned decoder can be fused")
  heads = _interleaved((cfg.heads, cfg.kv_heads, cfg.kv_heads), shards)
  columns = _interleaved((cfg.mlp_dim, cfg.mlp_dim), shards)
  names = [path.removeprefix("layers/") for path in paths if path.startswith("layers/")]
  projections = ("attn/q_einsum", "attn/kv_einsum", "attn/qkv_einsum")
  projections = tuple(name for name in projections if f"{name}/w" in names)

  def projected(kind: str, i: int, *axes: int) -> np.ndarray:
    parts = [read(f"layers/{name}/{kind}", (i,)) for name in projections]
    return np.concatenate([part.reshape(-1, *axes) for part in parts])[heads]

  def gate_up(i: int) -> np.ndarray:
    both = np.concatenate(list(read("layers/mlp/gating_einsum", (i,))), axis=-1)
    return both if shards == 1 else both[:, columns]

  for path in paths:
    if not path.startswith("layers/"):
      array = read(path, ())
      spare = -len(array) % shards if path.startswith("embedder/") else 0
      yield path, np.pad(array, ((0, spare), (0, 0))) if spare else array
  for i in range(cfg.depth):
    w = projected("w", i, cfg.width, cfg.head_dim)
    yield f"layers_{i}/attn/qkv/w", rearrange(w, "N D H -> D (N H)")
    if cfg.qkv_bias:
      b = projected("b", i, cfg.head_dim)
      yield f"layers_{i}/attn/qkv/b", rearrange(b, "N H -> (N H)")
  for i in range(cfg.depth):
    yield f"layers_{i}/mlp/gate_up", gate_up(i)
  for name in names:
    if not name.startswith((*projections, "mlp/gating_einsum")):
      for i in range(cfg.depth):
        yield f"layers_{i}/{name}", read(f"layers/{name}", (i,))


def fuse(
  cfg: DecoderConfig, params: Mapping[str, Any], shards: int = 1
) -> tuple[DecoderConfig, dict[str, Any]]:
  """A scanned decoder in the fused layout, for inference: (config, parameters, numpy arrays).

  See `fused_leaves`; matrices are in the dtype of the matmuls, the scales of norms in float32.
  """
  flat = flax.traverse_util.flatten_dict(params, sep="/")

  def read(path: str, index: tuple[int, ...]) -> np.ndarray:
    return np.asarray(flat[path][index] if index else flat[path])

  fused = {
    path: np.asarray(w, "float32" if path.endswith("/scale") else jnp.dtype(cfg.dtype))
    for path, w in fused_leaves(cfg, flat, read, shards)
  }
  return fused_config(cfg, shards), flax.traverse_util.unflatten_dict(fused, sep="/")


def fused_config(cfg: DecoderConfig, shards: int = 1) -> DecoderConfig:
  """The config of a decoder in the fused layout."""
  return dataclasses.replace(cfg, layout="fused", shards=shards)


def _interleaved(sizes: tuple[int, ...], shards: int) -> np.ndarray:
  """Indices that bring concatenated parts of these sizes into the order of the shards."""
  parts = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
  blocks = [np.split(part, shards) for part in parts]
  return np.concatenate([block[i] for i in range(shards) for block in blocks])
