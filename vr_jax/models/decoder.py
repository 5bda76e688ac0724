"""The language model: one decoder whose switches give Gemma 1, Gemma 2, Gemma 3 and Qwen2.

    tokens ── embedder ─► x ─► layers (layer.py; in one of two layouts) ─► final norm ─► head
    positions ── masks, rotary angles (Tables) ──┘ └── KV cache, in and out

Letters: B batch, L slot of this call, S key slot, D width, N query head, K key/value head,
H head width, F MLP width, W vocabulary, X layer, Z kind of layer (local, global), R rank of an
adapter.

Parameters carry big_vision's Gemma names, with the layer axis X in front (`scanned.py`):
  embedder/{input_embedding, output_embedding}  [W,D]   (output only if the head is untied)
  layers/attn/q_einsum/w [X,N,D,H], kv_einsum/w [X,2,K,D,H], attn_vec_einsum/w [X,N,H,D]
  layers/attn/qkv_einsum/w [X,3,N,D,H]                  (instead of q and kv where N == K)
  layers/attn/{q_einsum,kv_einsum,qkv_einsum}/b         (Qwen2)
  layers/attn/{q_norm,k_norm}/scale [X,H]               (Gemma 3)
  layers/mlp/{gating_einsum [X,2,D,F], linear [X,F,D]}
  layers/{pre_attention_norm,pre_ffw_norm}/scale [X,D], final_norm/scale [D]
  layers/{post_attention_norm,post_ffw_norm}/scale      (Gemma 2, Gemma 3)
  layers/…/<matrix>_lora_{a,b}                          (with `lora_rank`: see `lora.adapter`)

`fused.fuse` lays them out for inference: layers apart (layers_0, …), one matrix for q, k and v, one
for gate and up, matmul weights in the dtype of the matmuls.

Sources: Gemma (arXiv 2403.08295), Gemma 2 (2408.00118), Gemma 3 (2503.19786), Qwen2 (2407.10671),
LoRA (2106.09685).
"""

from typing import no_type_check

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from vr_jax.arrays import Array
from vr_jax.attention import Causal
from vr_jax.models.embedder import Embedder
from vr_jax.models.fused import FUSED
from vr_jax.models.layer import DecoderConfig, RMSNorm, Tables, write_slots
from vr_jax.models.scanned import SCANNED
from vr_jax.sharding import ActivationRules, shard_act

LAYOUTS = {"scanned": SCANNED, "fused": FUSED}


@no_type_check  # JAX rebuilds it with leaves of any kind
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
  end: Int[Array, ""] | Int[Array, " B"]
  fresh: bool = flax.struct.field(pytree_node=False, default=False)

  @classmethod
  def empty(cls, cfg: DecoderConfig, rows: int, slots: int) -> "KVCache":
    """A cache with room for `slots` slots of each row."""
    empty = LAYOUTS[cfg.layout].empty
    shape = (rows, cfg.kv_heads, slots, cfg.head_dim)
    return cls(
      k=empty(cfg, shape),
      v=empty(cfg, shape),
      positions=jnp.full((rows, slots), -1, jnp.int32),
      end=jnp.zeros((), jnp.int32),
      fresh=True,
    )

  def take(self, rows: Int[Array, " B"]) -> "KVCache":
    """The cache of the given rows, repeated or reordered: one video prefix for many questions."""
    k, v = jax.tree.map(lambda x: jnp.take(x, rows, axis=x.ndim - 4), (self.k, self.v))
    return self.replace(k=k, v=v, positions=self.positions[rows])


def visible(
  positions: Int[Array, "B L"],
  key_positions: Int[Array, "B S"],
  *,
  window: int | None = None,
  prefix: Int[Array, " B"] | None = None,
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


class Decoder(nn.Module):
  """Token embedding, scanned layers, final norm and head."""

  cfg: DecoderConfig
  rules: ActivationRules = ()

  def setup(self):
    c = self.cfg
    self.embedder = Embedder(c, self.rules)
    self.layers = LAYOUTS[c.layout].layers(c, self.rules)
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
    prefix: Int[Array, " B"] | None = None,
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
    stored = None if cache is None else write_slots(cache.positions, positions, cache.end, axis=1)
    tables = self._tables(positions, stored, cache, past, prefix, segments)
    x = shard_act(x.astype(c.dtype), self.rules, "batch", "len", None)
    kv = None if cache is None else (cache.k, cache.v)
    seen = None if past is None else (past.k, past.v)
    x, kv = LAYOUTS[c.layout].run(self.layers, x, kv, seen, tables)
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

  def _tables(self, positions, stored, cache, past, prefix, segments) -> Tables:
    """Masks and angles of the call, for each kind of layer; which keys there are decides the rest.

    keys of the call     what is cached             key positions
    its own slots        nothing, or a fresh cache  positions
    the cache's slots    earlier calls' slots       `stored`: the cache's, with these written
    past, then its own   `past`, only read          past's, then positions
    """
    key_positions = positions if cache is None or cache.fresh else stored
    if past is not None:
      key_positions = jnp.concatenate([past.positions, positions], axis=1)
    kinds = sorted(set(self.cfg.layer_kinds()))
    tables = [self._table(k, positions, key_positions, prefix, segments) for k in kinds]
    mask, cos, sin = (jnp.stack(t) for t in zip(*tables, strict=True))
    fresh = cache is None or cache.fresh
    plain = prefix is None and past is None and fresh
    return Tables(
      mask,
      cos,
      sin,
      end=None if cache is None else cache.end,
      fresh=fresh,
      causal=self._causal(positions, segments) if plain else None,
      kinds=tuple(kinds.index(kind) for kind in self.cfg.layer_kinds()),
    )

  def _table(self, kind, positions, key_positions, prefix, segments):
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

  def _causal(self, positions, segments) -> Causal | None:
    """The masks of all kinds of layers in one, if they are the same."""
    L, kinds = positions.shape[1], set(self.cfg.layer_kinds())
    window = self.cfg.window if "local" in kinds else None
    window = None if window is None or window >= L else window
    if window is not None and len(kinds) > 1:
      return None
    ids = jnp.where(positions >= 0, 0 if segments is None else segments, -1)
    return Causal(ids, packed=segments is not None, window=window)
