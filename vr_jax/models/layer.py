"""One layer of the decoder: what it computes, whatever the layout of its parameters.

Letters: B batch, L slot of this call, S key slot, D width, N query head, K key/value head,
H head width, A rotary angle (H / 2 of them), F MLP width, X layer, Z kind of layer (local, global).

A layout (`scanned.py`, `fused.py`) says how the layers' matrices lie, and with them the cache: it
makes `Attention.project`, `Attention.write` and `FeedForward.gate_up`, and a `Layout` of the whole.
"""

import abc
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, no_type_check

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Bool, Float, Int

from vr_jax.arrays import Array
from vr_jax.attention import Causal, attention
from vr_jax.models.lora import adapter
from vr_jax.models.quantize import values_and_scale
from vr_jax.models.rotary import rotate
from vr_jax.sharding import ActivationRules, shard_act

ACTIVATIONS = {"gelu_tanh": lambda x: nn.gelu(x, approximate=True), "silu": nn.silu}


KeysValues = tuple[Any, Any]  # k and v: of a layer [B,K,S,H], or as a layout keeps those of all


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """Sizes and switches; the defaults are those of Gemma 1.

  `pattern` repeats over the layers, each "local" (sees `window` slots back, itself included) or
  "global". `rope_scale` divides the positions of global layers (Gemma 3: 8). `norm_plus_one`:
  norms multiply by 1 + scale. `query_scale` None means head_dim ** -0.5. `dtype` is that of the
  matmuls and the KV cache. `remat` is none, dots, full or offload. `prefix_lm`: slots of a prefix
  see the whole prefix (PaliGemma); otherwise causal. `layout` is that of the parameters: "scanned"
  (training, checkpoints) or "fused" (what `fuse` makes, for `shards` devices of a tensor axis).
  `lora_rank`: every matrix of a layer has an adapter of that rank (0: none), whose product counts
  `lora_alpha` / `lora_rank` times.
  """

  width: int
  depth: int
  heads: int
  kv_heads: int
  head_dim: int
  mlp_dim: int
  vocab_size: int
  activation: str = "gelu_tanh"
  norm_eps: float = 1e-6
  norm_plus_one: bool = True
  scale_embedding: bool = True
  tied_head: bool = True
  qkv_bias: bool = False
  post_norms: bool = False
  qk_norm: bool = False
  attn_soft_cap: float | None = None
  final_soft_cap: float | None = None
  query_scale: float | None = None
  pattern: tuple[str, ...] = ("global",)
  window: int | None = None
  rope_base: float = 10_000.0
  local_rope_base: float | None = None
  rope_scale: float = 1.0
  prefix_lm: bool = False
  dtype: str = "float32"
  remat: str = "none"
  layout: str = "scanned"
  shards: int = 1
  lora_rank: int = 0
  lora_alpha: float = 16.0

  def layer_kinds(self) -> tuple[str, ...]:
    """ "local" or "global" for each layer."""
    return tuple(self.pattern[i % len(self.pattern)] for i in range(self.depth))


@no_type_check  # JAX rebuilds it with leaves of any kind
@flax.struct.dataclass
class Tables:
  """What the layers share in a call: which keys are seen, and the rotary angles.

  mask bool [Z,B,L,S]; cos, sin f32 [Z,B,L,A]; end: cache slot of this call's first key;
  fresh: the keys are those of this call alone (and of `past`). causal: what the masks say, for
  kernels that take no mask; None where they say more (a prefix, earlier keys) or differ between the
  kinds. kinds: for each layer, which of the Z it takes.
  """

  mask: Bool[Array, "Z B L S"]
  cos: Float[Array, "Z B L A"]
  sin: Float[Array, "Z B L A"]
  end: Int[Array, ""] | Int[Array, " B"] | None
  fresh: bool = flax.struct.field(pytree_node=False)
  causal: Causal | None = None
  kinds: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())


@dataclasses.dataclass(frozen=True)
class Layout:
  """How the layers' parameters and their cache lie.

  Attributes:
    layers: (config, activation rules) -> the layers' module or modules, for `Decoder.layers`.
    run: (layers, x, kv, seen, tables) -> (x, kv): all layers, one after the other. `kv` is the
      cache that the new keys are written to, `seen` one that is only read; either may be None.
    empty: (config, shape [B,K,S,H] of a layer) -> zeros for the keys of all layers.
  """

  layers: Callable[[DecoderConfig, ActivationRules], Any]
  run: Callable[..., tuple[Array, KeysValues | None]]
  empty: Callable[[DecoderConfig, tuple[int, ...]], Any]


class RMSNorm(nn.Module):
  """Root mean square norm over the last axis, in float32."""

  cfg: DecoderConfig

  @nn.compact
  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    init = nn.initializers.zeros if self.cfg.norm_plus_one else nn.initializers.ones
    scale = self.param("scale", init, (x.shape[-1],)) + float(self.cfg.norm_plus_one)
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.cfg.norm_eps)
    return (y * scale).astype(x.dtype)


def scaled_by(*in_axes: int):
  """Normal initialiser with variance 1 / (size of the axes that are summed over)."""

  def init(key, shape, dtype=jnp.float32):
    return jax.random.normal(key, shape, dtype) * math.prod(shape[a] for a in in_axes) ** -0.5

  return init


def matmul(x: Float[Array, "... D"], w: Any, *, cfg: DecoderConfig) -> Float[Array, "... F"]:
  """x @ w in the dtype of x; the last axis of w stays. w may be int8, a scale for each column."""
  values, scale = values_and_scale(w)
  values = values.reshape(x.shape[-1], -1)
  y = widened(x, values, cfg, columns=1)
  return y if scale is None else y * scale.reshape(-1).astype(x.dtype)


PIECE = 1 << 22  # elements of a matrix that are whole in a wider dtype at a time


def widened(
  x: Float[Array, "... D"], w: Array, cfg: DecoderConfig, columns: int, dtype: Any = None
) -> Float[Array, "... F"]:
  """x @ w in the dtype of x (or `dtype`), where `columns` is the axis of w that stays.

  A CPU multiplies in float32. Left to the compiler, it widens every matrix of a decoder before the
  first step and keeps them: twice the weights in bfloat16, four times those in int8, beside them.
  Answering (the fused layout, on one device) it widens a piece at a time.
  """
  dims = (((x.ndim - 1,), (1 - columns,)), ((), ()))

  def whole(x, w):
    return jax.lax.dot_general(x, w.astype(x.dtype), dims, preferred_element_type=dtype)

  def by_pieces(x, w):
    count = -(-w.size // PIECE)
    width = -(-w.shape[columns] // count)
    last = w.shape[columns] - width  # where the last piece begins: it may overlap the one before it

    def piece(i, y):
      # Without the barrier all of w is widened before the loop, as it does not change in it.
      kept, i = jax.lax.optimization_barrier((w, i))
      start = jnp.minimum(i * width, last)
      part = jax.lax.dynamic_slice_in_dim(kept, start, width, columns)
      return jax.lax.dynamic_update_slice_in_dim(y, whole(x, part), start, y.ndim - 1)

    empty = jnp.zeros((*x.shape[:-1], w.shape[columns]), dtype or x.dtype)
    return jax.lax.fori_loop(0, count, piece, empty)

  narrow = w.dtype != jnp.float32 and w.size > 2 * PIECE
  if not narrow or cfg.layout != "fused" or cfg.shards > 1:
    return whole(x, w)
  return jax.lax.platform_dependent(x, w, cpu=by_pieces, default=whole)


def write_slots(old: Array, new: Array, end: Array, axis: int) -> Array:
  """`new` in the slots from `end` on; the slots are that axis of [B,...], `end` is [] or [B]."""
  if end.ndim == 0:
    return jax.lax.dynamic_update_slice_in_dim(old, new, end, axis)
  write = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=axis - 1)
  return jax.vmap(write)(old, new, end)


class OutputProjection(nn.Module):
  """Heads back to the residual stream; big_vision's `attn_vec_einsum`."""

  cfg: DecoderConfig

  @nn.compact
  def __call__(self, x: Float[Array, "B L N H"]) -> Float[Array, "B L D"]:
    c = self.cfg
    N, H = x.shape[-2:]
    w = self.param("w", scaled_by(0, 1), (N, H, c.width))
    y = matmul(rearrange(x, "B L N H -> B L (N H)"), w, cfg=c)
    return y + adapter(self, "w", x, (c.width,), c.lora_rank, c.lora_alpha) if c.lora_rank else y


class Attention(nn.Module):
  """Grouped-query self-attention with rotary positions."""

  cfg: DecoderConfig
  rules: ActivationRules = ()

  @abc.abstractmethod
  def project(self, x: Float[Array, "B L D"]) -> tuple[Array, Array, Array]:
    """q [B,L,N,H], k and v [B,L,K,H]."""

  @abc.abstractmethod
  def write(
    self, kv: KeysValues, new: KeysValues, layer: Any, end: Array
  ) -> tuple[KeysValues, KeysValues]:
    """New keys and values [B,K,L,H] in the slots from `end` on: (the cache, this layer's part)."""

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B L D"],
    tables: Tables,
    kind: Any,
    layer: Any,
    past: KeysValues | None,
    kv: KeysValues | None,
  ) -> tuple[Float[Array, "B L D"], KeysValues | None]:
    """(what is added to the residual stream, the cache); see `Block`."""
    c = self.cfg
    q, k, v = self.project(x)
    q = shard_act(q, self.rules, "batch", None, "heads", None)
    k, v = (shard_act(t, self.rules, "batch", None, "kv_heads", None) for t in (k, v))
    if c.qk_norm:
      q, k = RMSNorm(c, name="q_norm")(q), RMSNorm(c, name="k_norm")(k)
    cos, sin = tables.cos[kind], tables.sin[kind]
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)

    # Caches keep heads before slots, so that a step reads each head's slots in one piece.
    if past is not None:
      earlier = (rearrange(t, "B K S H -> B S K H") for t in past)
      k, v = (jnp.concatenate(pair, axis=1) for pair in zip(earlier, (k, v), strict=True))
    if kv is not None:
      new = (rearrange(k, "B L K H -> B K L H"), rearrange(v, "B L K H -> B K L H"))
      kv, cached = self.write(kv, new, layer, tables.end)
      if not tables.fresh:  # a prefill need not read back what it has just written
        k, v = (rearrange(t, "B K S H -> B S K H") for t in cached)
    y = attention(
      q,
      k,
      v,
      tables.mask[kind],
      scale=c.head_dim**-0.5 if c.query_scale is None else c.query_scale,
      soft_cap=c.attn_soft_cap,
      causal=tables.causal,
      rules=self.rules,
    )
    return OutputProjection(c, name="attn_vec_einsum")(y), kv


class FeedForward(nn.Module):
  """Gated MLP."""

  cfg: DecoderConfig
  rules: ActivationRules = ()

  @abc.abstractmethod
  def gate_up(self, x: Float[Array, "B L D"]) -> tuple[Array, Array]:
    """The products [B,L,F] with the matrix of the gate and with that of the values."""

  @nn.compact
  def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
    c = self.cfg
    gate, up = self.gate_up(x)
    linear = self.param("linear", scaled_by(0), (c.mlp_dim, c.width))
    gate, up = (shard_act(t, self.rules, "batch", None, "mlp") for t in (gate, up))
    hidden = ACTIVATIONS[c.activation](gate) * up
    y = matmul(hidden, linear, cfg=c)
    if not c.lora_rank:
      return y
    return y + adapter(self, "linear", hidden, (c.width,), c.lora_rank, c.lora_alpha)


class Block(nn.Module):
  """One layer; may be scanned, so it takes (carry, tables, what is particular to the layer).

  The carry is x and the cache's (k, v), as the layout keeps them. Particular to the layer are its
  kind (which of the tables it takes), `layer` (its place in a cache of all layers; None if the
  cache is its own) and `past`, the (k, v) of earlier slots, only read.
  """

  cfg: DecoderConfig
  rules: ActivationRules = ()

  attention: ClassVar[type[Attention]]
  feed_forward: ClassVar[type[FeedForward]]

  @nn.compact
  def __call__(
    self, carry: tuple[Array, KeysValues | None], tables: Tables, particular: tuple[Any, Any, Any]
  ) -> tuple[tuple[Array, KeysValues | None], None]:
    x, kv = carry
    kind, layer, past = particular
    c = self.cfg

    def post(name, y):
      return RMSNorm(c, name=name)(y) if c.post_norms else y

    y = RMSNorm(c, name="pre_attention_norm")(x)
    y, kv = self.attention(c, self.rules, name="attn")(y, tables, kind, layer, past, kv)
    y = shard_act(y, self.rules, "batch", "len", None)
    x = x + post("post_attention_norm", y)
    y = self.feed_forward(c, self.rules, name="mlp")(RMSNorm(c, name="pre_ffw_norm")(x))
    y = shard_act(y, self.rules, "batch", "len", None)
    return (x + post("post_ffw_norm", y), kv), None
