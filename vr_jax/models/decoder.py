"""The language model: one decoder whose switches give Gemma 1, Gemma 2, Gemma 3 and Qwen2.

Letters: B batch, L slot of this call, S key slot, D width, N query head, K key/value head,
H head width, F MLP width, W vocabulary, X layer, Z kind of layer (local, global), R rank of an
adapter.

Parameters carry big_vision's Gemma names, with the layer axis X in front:
  embedder/{input_embedding, output_embedding}  [W,D]   (output only if the head is untied)
  layers/attn/q_einsum/w [X,N,D,H], kv_einsum/w [X,2,K,D,H], attn_vec_einsum/w [X,N,H,D]
  layers/attn/qkv_einsum/w [X,3,N,D,H]                  (instead of q and kv where N == K)
  layers/attn/{q_einsum,kv_einsum,qkv_einsum}/b         (Qwen2)
  layers/attn/{q_norm,k_norm}/scale [X,H]               (Gemma 3)
  layers/mlp/{gating_einsum [X,2,D,F], linear [X,F,D]}
  layers/{pre_attention_norm,pre_ffw_norm}/scale [X,D], final_norm/scale [D]
  layers/{post_attention_norm,post_ffw_norm}/scale      (Gemma 2, Gemma 3)
  layers/…/<matrix>_lora_{a,b}                          (with `lora_rank`: see `_adapter`)

`fuse` lays them out for inference: layers apart (layers_0, …), one matrix for q, k and v, one for
gate and up, matmul weights in the dtype of the matmuls.

Sources: Gemma (arXiv 2403.08295), Gemma 2 (2408.00118), Gemma 3 (2503.19786), Qwen2 (2407.10671),
LoRA (2106.09685).
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from data_pipes.errors import InputError
from vr_jax.attention import Causal, attention
from vr_jax.remat import remat
from vr_jax.sharding import ActivationRules, shard_act

ACTIVATIONS = {"gelu_tanh": lambda x: nn.gelu(x, approximate=True), "silu": nn.silu}


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


@flax.struct.dataclass
class KVCache:
  """Keys and values of the slots seen so far; passed in, returned, never mutated.

  k, v [X,B,K,S,H], in the fused layout a tuple of X arrays [B,K,S,H]; positions i32 [B,S], -1 =
  empty slot; end i32, the next slot to write: [] where the rows are written together (a row that
  pads or has ended writes slots of position -1, which no query sees), in the fused layout also [B],
  each row's own. `fresh` is static: nothing is cached yet, so a prefill need not look at the cache.
  """

  k: Float[Array, "X B K S H"] | tuple[Float[Array, "B K S H"], ...]
  v: Float[Array, "X B K S H"] | tuple[Float[Array, "B K S H"], ...]
  positions: Int[Array, "B S"]
  end: Int[Array, ""] | Int[Array, "B"]
  fresh: bool = flax.struct.field(pytree_node=False, default=False)

  @classmethod
  def empty(cls, cfg: DecoderConfig, rows: int, slots: int) -> "KVCache":
    """A cache with room for `slots` slots of each row."""
    shape = (rows, cfg.kv_heads, slots, cfg.head_dim)

    def zeros():
      if cfg.layout == "fused":
        return tuple(jnp.zeros(shape, cfg.dtype) for _ in range(cfg.depth))
      return jnp.zeros((cfg.depth, *shape), cfg.dtype)

    return cls(
      k=zeros(),
      v=zeros(),
      positions=jnp.full((rows, slots), -1, jnp.int32),
      end=jnp.zeros((), jnp.int32),
      fresh=True,
    )

  def take(self, rows: Int[Array, "B"]) -> "KVCache":
    """The cache of the given rows, repeated or reordered: one video prefix for many questions."""
    k, v = jax.tree.map(lambda x: jnp.take(x, rows, axis=x.ndim - 4), (self.k, self.v))
    return self.replace(k=k, v=v, positions=self.positions[rows])


@flax.struct.dataclass
class Tables:
  """What layers of one kind share in a call: which keys are seen, and the rotary angles.

  mask bool [Z,B,L,S]; cos, sin f32 [Z,B,L,H/2]; end: cache slot of this call's first key;
  fresh: the keys are those of this call alone (and of `past`). causal: what the masks say, for
  kernels that take no mask; None where they say more (a prefix, earlier keys) or differ between the
  kinds.
  """

  mask: Bool[Array, "Z B L S"]
  cos: Float[Array, "Z B L H/2"]
  sin: Float[Array, "Z B L H/2"]
  end: Int[Array, ""] | Int[Array, "B"] | None
  fresh: bool = flax.struct.field(pytree_node=False)
  causal: Causal | None = None


def visible(
  positions: Int[Array, "B L"],
  key_positions: Int[Array, "B S"],
  *,
  window: int | None = None,
  prefix: Int[Array, "B"] | None = None,
) -> Bool[Array, "B L S"]:
  """Which keys a query sees, from positions alone (-1: padding or empty, never seen).

  Causal; `window` w keeps keys closer than w; slots below `prefix` see all slots below it, however
  far: no window cuts a prefix (as transformers runs PaliGemma 2).
  """
  q, k = positions[:, :, None], key_positions[:, None, :]
  mask = k <= q
  if window is not None:
    mask &= q - k < window
  if prefix is not None:
    mask |= jnp.maximum(q, k) < prefix[:, None, None]
  return mask & (k >= 0)


def rotate(
  x: Float[Array, "B L N H"], cos: Float[Array, "B L H/2"], sin: Float[Array, "B L H/2"]
) -> Float[Array, "B L N H"]:
  """Rotary position embedding in float32, halves as pairs (RoFormer, arXiv 2104.09864)."""
  cos, sin = cos[:, :, None], sin[:, :, None]
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


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


def _scaled_by(*in_axes: int):
  """Normal initialiser with variance 1 / (size of the axes that are summed over)."""

  def init(key, shape, dtype=jnp.float32):
    return jax.random.normal(key, shape, dtype) * math.prod(shape[a] for a in in_axes) ** -0.5

  return init


def _matmul(x: Float[Array, "... D"], w: Any) -> Float[Array, "... F"]:
  """x @ w in the dtype of x; the last axis of w stays. w may be int8, a scale for each column."""
  values = getattr(w, "qvalue", w)  # qwix.QArray, see `quantized`
  y = x @ values.reshape(x.shape[-1], -1).astype(x.dtype)
  return y if values is w else y * w.scale.reshape(-1).astype(x.dtype)


def is_factor(path: str) -> bool:
  """Whether a parameter's path is that of a factor of an adapter."""
  return path.endswith(("_lora_a", "_lora_b"))


def _adapter(
  module: nn.Module,
  cfg: DecoderConfig,
  name: str,
  x: Float[Array, "B L *inputs"],
  outputs: tuple[int, ...],
  stack: tuple[int, ...] = (),
) -> Float[Array, "..."]:
  """What the adapter of the matrix `name` of `module` adds to the matrix's product with `x`.

  The matrix is [*stack, *inputs, *outputs], the result [*stack, B, L, *outputs]; the factors are
  `<name>_lora_a` [*stack, *inputs, R], random, and `<name>_lora_b` [*stack, R, *outputs], zeros at
  first.
  """
  rank, inputs, n = cfg.lora_rank, x.shape[2:], len(stack)
  # The start of the library peft: uniform, to 1 / sqrt(size of the inputs).
  axes = {"in_axis": range(n, n + len(inputs)), "out_axis": -1, "batch_axis": range(n)}
  init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", **axes)
  a = module.param(f"{name}_lora_a", init, (*stack, *inputs, rank)).astype(x.dtype)
  b = module.param(f"{name}_lora_b", nn.initializers.zeros, (*stack, rank, *outputs))
  T = math.prod(stack)
  low = jnp.einsum("BLI,TIR->TBLR", x.reshape(*x.shape[:2], -1), a.reshape(T, -1, rank))
  # T makes it a batched matmul even where it is 1: remat "dots" keeps `low`, not what is as large
  # as the product and cheap to make again.
  y = jnp.einsum("TBLR,TRO->TBLO", low, b.astype(x.dtype).reshape(T, rank, -1))
  return y.reshape(*stack, *x.shape[:2], *outputs) * (cfg.lora_alpha / rank)


class Einsum(nn.Module):
  """A projection with big_vision's parameter names: `w`, and `b` of shape `bias` if given."""

  cfg: DecoderConfig
  shape: tuple[int, ...]
  bias: tuple[int, ...] | None = None

  @nn.compact
  def __call__(self, equation: str, x: Float[Array, "B L D"]) -> Float[Array, "... B L N H"]:
    w = self.param("w", _scaled_by(-2), self.shape)
    values = getattr(w, "qvalue", w)  # qwix.QArray, see `quantized`
    y = jnp.einsum(equation, x, values.astype(x.dtype))
    if values is not w:
      y *= jnp.expand_dims(w.scale.squeeze(-2).astype(x.dtype), (-4, -3))
    if self.cfg.lora_rank:
      *stack, N, _, H = self.shape
      y += _adapter(self, self.cfg, "w", x, (N, H), tuple(stack))
    if self.bias is not None:
      b = self.param("b", nn.initializers.zeros, self.bias).astype(x.dtype)
      y = y + jnp.expand_dims(b, (-4, -3))  # [N,H] or [T,N,H] onto [B,L,N,H] or [T,B,L,N,H]
    return y


class FusedProjection(nn.Module):
  """q, k and v in one matmul: each shard's heads of q, then of k, then of v."""

  cfg: DecoderConfig

  @nn.compact
  def __call__(self, x: Float[Array, "B L D"]) -> list[Float[Array, "B L N H"]]:
    c = self.cfg
    N, K, H = c.heads, c.kv_heads, c.head_dim
    y = _matmul(x, self.param("w", _scaled_by(0), (c.width, (N + 2 * K) * H)))
    if c.qkv_bias:
      y = y + self.param("b", nn.initializers.zeros, ((N + 2 * K) * H,)).astype(x.dtype)
    y = y.reshape(*x.shape[:-1], c.shards, -1, H)
    parts = jnp.split(y, (N // c.shards, (N + K) // c.shards), axis=-2)
    return [part.reshape(*x.shape[:-1], -1, H) for part in parts]


class OutputProjection(nn.Module):
  """Heads back to the residual stream; big_vision's `attn_vec_einsum`."""

  cfg: DecoderConfig

  @nn.compact
  def __call__(self, x: Float[Array, "B L N H"]) -> Float[Array, "B L D"]:
    N, H = x.shape[-2:]
    w = self.param("w", _scaled_by(0, 1), (N, H, self.cfg.width))
    y = _matmul(x.reshape(*x.shape[:-2], N * H), w)
    return y + _adapter(self, self.cfg, "w", x, (self.cfg.width,)) if self.cfg.lora_rank else y


class Attention(nn.Module):
  """Grouped-query self-attention with rotary positions."""

  cfg: DecoderConfig
  rules: ActivationRules = ()

  @nn.compact
  def __call__(self, x, tables: Tables, kind, layer, past, kv):
    c = self.cfg
    N, K, H, D = c.heads, c.kv_heads, c.head_dim, c.width

    def project(name, equation, *shape):
      bias = (*shape[:-2], H) if c.qkv_bias else None
      return Einsum(c, shape, bias, name=name)(equation, x)

    if c.layout == "fused":
      q, k, v = FusedProjection(c, name="qkv")(x)
    elif N == K:
      q, k, v = project("qkv_einsum", "BLD,TNDH->TBLNH", 3, N, D, H)
    else:
      q = project("q_einsum", "BLD,NDH->BLNH", N, D, H)
      k, v = project("kv_einsum", "BLD,TKDH->TBLKH", 2, K, D, H)
    q = shard_act(q, self.rules, "batch", None, "heads", None)
    k, v = (shard_act(t, self.rules, "batch", None, "kv_heads", None) for t in (k, v))
    if c.qk_norm:
      q, k = RMSNorm(c, name="q_norm")(q), RMSNorm(c, name="k_norm")(k)
    cos, sin = tables.cos[kind], tables.sin[kind]
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)

    if past is not None:
      past = (old.swapaxes(1, 2) for old in past)
      k, v = (jnp.concatenate(pair, axis=1) for pair in zip(past, (k, v), strict=True))
    if kv is not None:
      new = (k.swapaxes(1, 2), v.swapaxes(1, 2))
      if layer is None:
        kv = seen = tuple(map(functools.partial(_write, end=tables.end, axis=2), kv, new))
      else:
        start, new = (layer, 0, 0, tables.end, 0), (new[0][None], new[1][None])
        kv = tuple(jax.lax.dynamic_update_slice(a, b, start) for a, b in zip(kv, new, strict=True))
        seen = (kv[0][layer], kv[1][layer])
      if not tables.fresh:
        k, v = seen[0].swapaxes(1, 2), seen[1].swapaxes(1, 2)
    scale = H**-0.5 if c.query_scale is None else c.query_scale
    y = attention(
      q,
      k,
      v,
      tables.mask[kind],
      scale=scale,
      soft_cap=c.attn_soft_cap,
      causal=tables.causal,
      rules=self.rules,
    )
    return OutputProjection(c, name="attn_vec_einsum")(y), kv


def _write(old: Array, new: Array, end: Array, axis: int) -> Array:
  """`new` in the slots from `end` on; the slots are that axis of [B,...], `end` is [] or [B]."""
  if end.ndim == 0:
    return jax.lax.dynamic_update_slice_in_dim(old, new, end, axis)
  write = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=axis - 1)
  return jax.vmap(write)(old, new, end)


class FeedForward(nn.Module):
  """Gated MLP."""

  cfg: DecoderConfig
  rules: ActivationRules = ()

  @nn.compact
  def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
    c = self.cfg
    D, F = c.width, c.mlp_dim
    if c.layout == "fused":
      both = _matmul(x, self.param("gate_up", _scaled_by(0), (D, 2 * F)))
      both = both.reshape(*x.shape[:-1], c.shards, 2, -1)
      gate, up = (both[..., i, :].reshape(*x.shape[:-1], F) for i in range(2))
    else:
      gating = self.param("gating_einsum", _scaled_by(1), (2, D, F))
      gate, up = (_matmul(x, gating[i]) for i in range(2))
      if c.lora_rank:
        share = _adapter(self, c, "gating_einsum", x, (F,), (2,))
        gate, up = gate + share[0], up + share[1]
    linear = self.param("linear", _scaled_by(0), (F, D))
    gate, up = (shard_act(t, self.rules, "batch", None, "mlp") for t in (gate, up))
    hidden = ACTIVATIONS[c.activation](gate) * up
    y = _matmul(hidden, linear)
    return y + _adapter(self, c, "linear", hidden, (D,)) if c.lora_rank else y


class Block(nn.Module):
  """One layer; may be scanned, so it takes (carry, tables, what is particular to the layer).

  The carry is x and the cache's (k, v): of all layers with `layer` an index into them, or of this
  layer alone with `layer` None. `past` is this layer's (k, v) of earlier slots, only read.
  """

  cfg: DecoderConfig
  rules: ActivationRules = ()

  @nn.compact
  def __call__(self, carry, tables: Tables, of_layer):
    x, kv = carry
    kind, layer, past = of_layer
    c = self.cfg

    def post(name, y):
      return RMSNorm(c, name=name)(y) if c.post_norms else y

    y = RMSNorm(c, name="pre_attention_norm")(x)
    y, kv = Attention(c, self.rules, name="attn")(y, tables, kind, layer, past, kv)
    y = shard_act(y, self.rules, "batch", "len", None)
    x = x + post("post_attention_norm", y)
    y = FeedForward(c, self.rules, name="mlp")(RMSNorm(c, name="pre_ffw_norm")(x))
    y = shard_act(y, self.rules, "batch", "len", None)
    return (x + post("post_ffw_norm", y), kv), None


LOOKUP_CHUNK = 16_384  # rows of the token table that are whole on a device at a time


def lookup(
  table: Float[Array, "W D"], tokens: Int[Array, "B L"], rules: ActivationRules
) -> Float[Array, "B L D"]:
  """`table[tokens]`. A table that lies spread over a mesh is gathered a chunk at a time, so that
  neither it nor its gradient is ever whole on a device."""
  W, C = len(table), LOOKUP_CHUNK
  if not rules or W <= C:
    return whole(table, rules)[tokens]

  def add(x, first):
    start = jnp.minimum(first, W - C)  # the last chunk overlaps the one before it
    part = whole(jax.lax.dynamic_slice_in_dim(table, start, C), rules)
    here = (tokens >= first) & (tokens < start + C)
    found = part[jnp.clip(tokens - start, 0, C - 1)]
    return shard_act(x + jnp.where(here[..., None], found, 0), rules, "batch", None, None), None

  zeros = jnp.zeros((*tokens.shape, table.shape[1]), table.dtype)
  return jax.lax.scan(add, shard_act(zeros, rules, "batch", None, None), jnp.arange(0, W, C))[0]


def whole(part: Float[Array, "C D"], rules: ActivationRules) -> Float[Array, "C D"]:
  """A piece of the token table on every device; the piece is gathered, not the table.

  Its gradient is summed whole and then cut, which compilers make a reduce-scatter of; left alone,
  gradients of slots would be exchanged to suit the table.
  """
  return shard_act(shard_act(part, rules, None, "table"), rules, None, None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def whole_head(part: Float[Array, "C D"], rules: ActivationRules) -> Float[Array, "C D"]:
  """As `whole`; the gradient, which a matmul sums, is scattered at once."""
  return whole(part, rules)


whole_head.defvjp(
  lambda part, rules: (whole(part, rules), None),
  lambda rules, _, gradient: (shard_act(gradient, rules, None, "table"),),
)


class Embedder(nn.Module):
  """Token table and head."""

  cfg: DecoderConfig
  rules: ActivationRules = ()

  def setup(self):
    shape, init = (self.cfg.vocab_size, self.cfg.width), _scaled_by(1)
    self.input_embedding = self.param("input_embedding", init, shape)
    if not self.cfg.tied_head:
      self.output_embedding = self.param("output_embedding", init, shape)

  def encode(self, tokens):
    x = lookup(self.input_embedding, tokens, self.rules).astype(self.cfg.dtype)
    return x * jnp.asarray(self.cfg.width**0.5, x.dtype) if self.cfg.scale_embedding else x

  def decode(self, x, rows=None):
    table = self.input_embedding if self.cfg.tied_head else self.output_embedding
    if rows is not None:
      table = jax.lax.dynamic_slice_in_dim(table, *rows)
    table = whole_head(table.astype(self.cfg.dtype), self.rules)
    x = x.astype(self.cfg.dtype)
    return jnp.einsum("...D,WD->...W", x, table, preferred_element_type=jnp.float32)


class Decoder(nn.Module):
  """Token embedding, scanned layers, final norm and head."""

  cfg: DecoderConfig
  rules: ActivationRules = ()

  def setup(self):
    c = self.cfg
    self.embedder = Embedder(c, self.rules)
    if c.layout == "fused":
      self.layers = [Block(c, self.rules) for _ in range(c.depth)]
    else:
      self.layers = nn.scan(
        remat(Block, c.remat, scanned=True),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, 0),
        length=c.depth,
      )(c, self.rules)
    self.final_norm = RMSNorm(c)

  def embed(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
    """Token ids to the residual stream, scaled by sqrt(D) for Gemma; dtype `cfg.dtype`."""
    return self.embedder.encode(tokens)

  def __call__(
    self,
    x: Float[Array, "B L D"],
    positions: Int[Array, "B L"],
    cache: KVCache | None = None,
    *,
    past: KVCache | None = None,
    prefix: Int[Array, "B"] | None = None,
    segments: Int[Array, "B L"] | None = None,
  ) -> tuple[Float[Array, "B L D"], KVCache | None]:
    """Hidden states after the final norm, in `cfg.dtype`, and the cache with these slots added.

    `positions` count from 0 in each row (or segment), ascending; -1 marks padding. Slots see each
    other and what the cache holds, which must have L free slots. `past` is a cache that is seen but
    not written: no gradient reaches it. `prefix` gives the length of each row's prefix
    (`cfg.prefix_lm`; all of it must be in one call). `segments` keeps the documents of a packed row
    apart; it does not go with a cache.
    """
    c = self.cfg
    if prefix is not None and not c.prefix_lm:
      raise ValueError("prefix was given, but the config is causal (prefix_lm=False)")
    if segments is not None and cache is not None:
      raise ValueError("segments are for packed training rows and do not go with a KV cache")
    if past is not None and not (cache is None and segments is None):
      raise ValueError("past goes with neither a cache to write nor segments")
    key_positions = positions
    if past is not None:
      key_positions = jnp.concatenate([past.positions, positions], axis=1)
    if cache is not None:
      stored = _write(cache.positions, positions, cache.end, axis=1)
      key_positions = positions if cache.fresh else stored
    kinds = sorted(set(c.layer_kinds()))
    tables = [self._tables(k, positions, key_positions, prefix, segments) for k in kinds]
    mask, cos, sin = (jnp.stack(t) for t in zip(*tables, strict=True))
    end, fresh = (cache.end, cache.fresh) if cache is not None else (None, True)
    causal = None
    if prefix is None and past is None and fresh:
      causal = self._causal(positions, segments)
    tables = Tables(mask, cos, sin, end, fresh, causal)

    x = shard_act(x.astype(c.dtype), self.rules, "batch", "len", None)
    kv = None if cache is None else (cache.k, cache.v)
    of_layer = [kinds.index(k) for k in c.layer_kinds()]
    seen = None if past is None else (past.k, past.v)
    if c.layout == "fused":
      per_layer = [None] * c.depth if kv is None else list(zip(*kv, strict=True))
      seen = [None] * c.depth if seen is None else list(zip(*seen, strict=True))
      for i, (layer, kind) in enumerate(zip(self.layers, of_layer, strict=True)):
        (x, per_layer[i]), _ = layer((x, per_layer[i]), tables, (kind, None, seen[i]))
      kv = None if kv is None else tuple(zip(*per_layer, strict=True))
    else:
      xs = (jnp.asarray(of_layer, jnp.int32), jnp.arange(c.depth, dtype=jnp.int32), seen)
      (x, kv), _ = self.layers((x, kv), tables, xs)
    if cache is not None:
      end = cache.end + positions.shape[1]
      cache = KVCache(k=kv[0], v=kv[1], positions=stored, end=end)
    return self.final_norm(x), cache

  def logits(
    self, hidden: Float[Array, "... D"], rows: tuple[Int[Array, ""], int] | None = None
  ) -> Float[Array, "... W"]:
    """Float32 scores over the vocabulary; apply to the slots that need them, not to all.

    `rows`: (start, size) of a part of the vocabulary, to have the scores of that part alone.
    """
    logits = self.embedder.decode(hidden, rows)
    cap = self.cfg.final_soft_cap
    return logits if cap is None else jnp.tanh(logits / cap) * cap

  def prefill(self, batch: dict[str, Array], cache: KVCache) -> tuple[Float[Array, "B W"], KVCache]:
    """Text alone: `tokens` i32 [B,L], `valid` bool [B,L] with the padding at the end of rows.

    Returns the logits after each row's last token, and the filled cache.
    """
    valid = batch["valid"]
    positions = jnp.where(valid, jnp.arange(valid.shape[1]), -1).astype(jnp.int32)
    hidden, cache = self(self.embed(batch["tokens"]), positions, cache)
    last = jnp.maximum(valid.sum(axis=1) - 1, 0)
    return self.logits(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]), cache

  def extend(
    self, tokens: Int[Array, "B K"], positions: Int[Array, "B K"], cache: KVCache
  ) -> tuple[Float[Array, "B K W"], KVCache]:
    """Logits after each of K more tokens per row; positions -1 mark rows that have ended."""
    hidden, cache = self(self.embed(tokens), positions, cache)
    return self.logits(hidden), cache

  def _causal(self, positions, segments) -> Causal | None:
    """The masks of all kinds of layers in one, if they are the same."""
    L, kinds = positions.shape[1], set(self.cfg.layer_kinds())
    window = self.cfg.window if "local" in kinds else None
    window = None if window is None or window >= L else window
    if window is not None and len(kinds) > 1:
      return None
    ids = jnp.where(positions >= 0, 0 if segments is None else segments, -1)
    return Causal(ids, packed=segments is not None, window=window)

  def _tables(self, kind, positions, key_positions, prefix, segments):
    """Mask, cos and sin of one kind of layer."""
    c = self.cfg
    local = kind == "local"
    base = c.local_rope_base if local and c.local_rope_base else c.rope_base
    scale = 1.0 if local and c.local_rope_base else c.rope_scale
    window = c.window if local else None
    mask = visible(positions, key_positions, window=window, prefix=prefix)
    if segments is not None:
      mask &= segments[:, :, None] == segments[:, None, :]
    powers = jnp.arange(0, c.head_dim, 2, dtype=jnp.float32) / c.head_dim
    angles = positions.astype(jnp.float32)[:, :, None] * (1.0 / (base**powers) / scale)
    return mask, jnp.cos(angles), jnp.sin(angles)


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
    of_layer = cast(jax.tree.map(lambda w: w[i], params["layers"]))
    attn, mlp = dict(of_layer["attn"]), of_layer["mlp"]
    names = [name for name in ("q_einsum", "kv_einsum", "qkv_einsum") if name in attn]
    projections = [attn.pop(name) for name in names]
    w = np.concatenate([p["w"].reshape(-1, cfg.width, cfg.head_dim) for p in projections])
    attn["qkv"] = {"w": w[heads].swapaxes(0, 1).reshape(cfg.width, -1)}
    if cfg.qkv_bias:
      b = np.concatenate([p["b"].reshape(-1, cfg.head_dim) for p in projections])
      attn["qkv"]["b"] = b[heads].reshape(-1)
    gate_up = np.concatenate(list(mlp["gating_einsum"]), axis=-1)[:, columns]
    return {**of_layer, "attn": attn, "mlp": {"gate_up": gate_up, "linear": mlp["linear"]}}

  fused = cast({k: v for k, v in params.items() if k != "layers"})
  fused |= {f"layers_{i}": layer(i) for i in range(cfg.depth)}
  return dataclasses.replace(cfg, layout="fused", shards=shards), fused


def _interleaved(sizes: tuple[int, ...], shards: int) -> np.ndarray:
  """Indices that bring concatenated parts of these sizes into the order of the shards."""
  parts = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
  blocks = [np.split(part, shards) for part in parts]
  return np.concatenate([block[i] for i in range(shards) for block in blocks])


# The axes that a matrix of a layer is summed over; the others have each their own scale.
_SUMMED = (
  (r"attn/(q|kv|qkv)_einsum/w|attn/qkv/w|mlp/(gating_einsum|gate_up|linear)", (-2,)),
  (r"attn/attn_vec_einsum/w", (-3, -2)),
)


def quantized(path: str, w: Array) -> Any:
  """A matrix of a decoder's layer, in either layout, as a qwix.QArray: int8, scales by column.

  Norms, biases, adapters and the token tables stay as they are. Needs the extra [int8].

  Raises:
    InputError: qwix is not installed.
  """
  found = re.search(r"(?:^|/)layers(_\d+)?/(.+)", path)
  summed = [axes for pattern, axes in _SUMMED if found and re.fullmatch(pattern, found[2])]
  if not summed:
    return w
  try:
    import qwix
  except ModuleNotFoundError:
    raise InputError("int8 weights need qwix; pip install 'vr-jax[int8]'") from None

  def of_layer(w):
    columns = [axis for axis in range(w.ndim) if axis - w.ndim not in summed[0]]
    return qwix.quantize(w, jnp.int8, channelwise_axes=columns)

  # Of a stack layer by layer, in float32: little memory, and scales as exact as the weights.
  return of_layer(w) if found[1] else jax.lax.map(lambda w: of_layer(w.astype(jnp.float32)), w)


def is_quantized(leaf: Any) -> bool:
  """Whether a leaf of a parameter tree is int8 values with scales (not an array)."""
  return hasattr(leaf, "qvalue")


def quantize(params: Mapping[str, Any]) -> dict[str, Any]:
  """The decoder's parameters with the matrices of its layers in int8; see `quantized`."""

  def of_leaf(path, w):
    return quantized(jax.tree_util.keystr(path, simple=True, separator="/"), jnp.asarray(w))

  return jax.tree_util.tree_map_with_path(of_leaf, params)
