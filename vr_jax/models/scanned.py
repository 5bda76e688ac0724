"""The layout for training and checkpoints: layers stacked along an axis X, run by a scan.

Letters: X layer, B batch, L slot of this call, S key slot, D width, N query head, K key/value head,
H head width, F MLP width, T matrix of a stack (q, k, v; or k, v).

The program holds one layer whatever the depth, so it compiles fast; optimizer and sharding see few
large arrays; and a matrix keeps its own axes, as its adapter and its int8 scales need them.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
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
)
from vr_jax.models.lora import adapter
from vr_jax.models.quantize import values_and_scale
from vr_jax.remat import remat
from vr_jax.sharding import ActivationRules


class Einsum(nn.Module):
  """A projection with big_vision's parameter names: `w`, and `b` of shape `bias` if given."""

  cfg: DecoderConfig
  shape: tuple[int, ...]
  bias: tuple[int, ...] | None = None

  @nn.compact
  def __call__(self, equation: str, x: Float[Array, "B L D"]) -> Float[Array, "*T B L N H"]:
    c = self.cfg
    values, scale = values_and_scale(self.param("w", scaled_by(-2), self.shape))
    y = jnp.einsum(equation, x, values.astype(x.dtype))
    # Scales and biases are [N,H] or [T,N,H], what they meet is [B,L,N,H] or [T,B,L,N,H].
    if scale is not None:
      y *= rearrange(scale.astype(x.dtype), "... N 1 H -> ... 1 1 N H")
    if c.lora_rank:
      *stack, N, _, H = self.shape
      y += adapter(self, "w", x, (N, H), c.lora_rank, c.lora_alpha, tuple(stack))
    if self.bias is not None:
      b = self.param("b", nn.initializers.zeros, self.bias).astype(x.dtype)
      y = y + rearrange(b, "... N H -> ... 1 1 N H")
    return y


class ScannedAttention(Attention):
  """q, k and v by big_vision's matrices; the cache is that of all layers, [X,B,K,S,H]."""

  def project(self, x: Float[Array, "B L D"]) -> tuple[Array, Array, Array]:
    c = self.cfg
    N, K, H, D = c.heads, c.kv_heads, c.head_dim, c.width

    def einsum(name, equation, *shape):
      bias = (*shape[:-2], H) if c.qkv_bias else None
      return Einsum(c, shape, bias, name=name)(equation, x)

    if N == K:
      q, k, v = einsum("qkv_einsum", "BLD,TNDH->TBLNH", 3, N, D, H)
    else:
      q = einsum("q_einsum", "BLD,NDH->BLNH", N, D, H)
      k, v = einsum("kv_einsum", "BLD,TKDH->TBLKH", 2, K, D, H)
    return q, k, v

  def write(
    self, kv: KeysValues, new: KeysValues, layer: Any, end: Array
  ) -> tuple[KeysValues, KeysValues]:
    """Writes L slots of one layer into the stack, which the scan carries from layer to layer.

    The stack is carried whole, so that XLA updates it in place. Were it handed to the scan a layer
    at a time (as its xs and ys), a step of decoding would copy all of the cache:

        k [X,B,K,S,H]   layer 0  ▓▓▓▓▓▓▓▓▓·····
                        layer 1  ▓▓▓▓▓▓▓▓▓·····
               layer ─► layer 2  ▓▓▓▓▓▓░░░·····   ░ new, L slots from `end` on, in all B and K
                        layer 3  ▓▓▓▓▓▓········   ▓ written, · free
    """
    start = (layer, 0, 0, end, 0)
    kv = tuple(
      jax.lax.dynamic_update_slice(stack, slots[None], start)
      for stack, slots in zip(kv, new, strict=True)
    )
    return kv, (kv[0][layer], kv[1][layer])


class ScannedFeedForward(FeedForward):
  """Gate and values as the two matrices of big_vision's `gating_einsum`."""

  def gate_up(self, x: Float[Array, "B L D"]) -> tuple[Array, Array]:
    c = self.cfg
    gating = self.param("gating_einsum", scaled_by(1), (2, c.width, c.mlp_dim))
    gate, up = (matmul(x, gating[i], cfg=c) for i in range(2))
    if c.lora_rank:
      share = adapter(self, "gating_einsum", x, (c.mlp_dim,), c.lora_rank, c.lora_alpha, stack=(2,))
      gate, up = gate + share[0], up + share[1]
    return gate, up


class ScannedBlock(Block):
  """A layer of the stack."""

  attention = ScannedAttention
  feed_forward = ScannedFeedForward


def layers(cfg: DecoderConfig, rules: ActivationRules) -> nn.Module:
  """All layers as one module, whose parameters have the axis X in front."""
  return nn.scan(
    remat(ScannedBlock, cfg.remat, scanned=True),
    variable_axes={"params": 0},
    split_rngs={"params": True},
    in_axes=(nn.broadcast, 0),
    length=cfg.depth,
  )(cfg, rules)


def run(
  stack: nn.Module, x: Array, kv: KeysValues | None, seen: KeysValues | None, tables: Tables
) -> tuple[Array, KeysValues | None]:
  """All layers; kind, place and `seen` [X,B,K,S,H] are scanned over, the tables are not."""
  kinds = jnp.asarray(tables.kinds, jnp.int32)
  places = jnp.arange(len(tables.kinds), dtype=jnp.int32)
  (x, kv), _ = stack((x, kv), tables, (kinds, places, seen))
  return x, kv


def empty(cfg: DecoderConfig, shape: tuple[int, ...]) -> Float[Array, "X B K S H"]:
  """Zeros for the keys of all layers, one array."""
  return jnp.zeros((cfg.depth, *shape), cfg.dtype)


SCANNED = Layout(layers, run, empty)
