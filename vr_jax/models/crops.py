"""Object tokens of crops: the cells under a mask, joined to at most K by k-means.

Letters: B row, n patch of the row, R object (or mask), N cell that a mask keeps, D tower width,
K token of an object, G patch of a context picture, E decoder width.

    crop ─ tower ─► features ─ under the mask ─► N cells ─ k-means ─► K ─ (context) ─ MLP ─► tokens

What a mask and a box decide is known before the device: which patches a cell is made of (four, by
bilinear weights, where the mask's grid is not that of the patches) and where the cell lies. A batch
holds
  cells i32 [B,R,N,4], numbers among the row's patches; cell_weights f32 [B,R,N,4];
  cell_places f32 [B,R,N,2], what the position is told by
  cell_counts i32 [B,R]: how many of the N cells there are, -1 where there is no object
  cell_starts i32 [B,R,K]: the cells that k-means starts from; without k-means 0, 1, 2, …
  local, whole i32 [B,R,G]: patches of the context pictures, -1 behind them (PixelRefer-Lite)

Parameters: fc1 [D,E], fc2 [E,E]; position [2,D]; local_norm, whole_norm, and local_attention,
whole_attention/{query,key,value,out} [D,D], all with biases.

Source: PixelRefer (arXiv 2510.23603) section 3; published `region_encoder.py` of VideoRefer's
videollama3 package, PixelRefer and PixelRefer-Lite.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Bool, Float, Int

from vr_jax.arrays import Array
from vr_jax.models.connector import Mlp
from vr_jax.models.siglip import LayerNorm, MultiHeadDotProductAttention
from vr_jax.sharding import ActivationRules, shard_act

CLOSE, CLOSE_SHARE = 1e-6, 1e-5  # centres that move less than this (allclose) have settled


class ContextAttention(NamedTuple):
  """Sizes of a cross-attention over a context picture."""

  width: int
  heads: int
  dtype: str


def k_means(
  x: Float[Array, "N D"],
  valid: Bool[Array, " N"],
  start: Int[Array, " K"],
  iterations: int,
) -> Float[Array, "K D"]:
  """Centres of K clusters, float32, in the order of the cells they start from.

  The first of equally near centres takes a cell; a cluster without a cell keeps its centre. Once
  the centres have settled the step before stands: the published code returns the old ones. The
  gradient passes the means; which cluster a cell belongs to is a constant.
  """
  x = x.astype(jnp.float32)

  def step(carry, _):
    centres, settled = carry
    distance = jnp.square(x[:, None] - centres[None]).sum(-1)
    nearest = jnp.argmin(jax.lax.stop_gradient(distance), axis=-1)
    member = (nearest[:, None] == jnp.arange(len(start))) & valid[:, None]
    count = member.sum(0)
    mean = jnp.einsum("NK,ND->KD", member.astype(jnp.float32), x, precision="highest")
    mean = mean / jnp.maximum(count, 1)[:, None]
    new = jnp.where(count[:, None] > 0, mean, centres)
    near = jnp.abs(centres - new) <= CLOSE + CLOSE_SHARE * jnp.abs(new)
    settled |= near.all()
    return (jnp.where(settled, centres, new), settled), None

  carry = (x[start], jnp.zeros((), bool))
  return jax.lax.scan(step, carry, None, length=iterations)[0][0]


def cell_features(
  features: Float[Array, "B n D"], batch: Mapping[str, Array]
) -> Float[Array, "B R N D"]:
  """The features of each cell, float32: four patches by their weights."""
  corners = _taken(features, batch["cells"]).astype(jnp.float32)
  return jnp.einsum("BRNcD,BRNc->BRND", corners, batch["cell_weights"], precision="highest")


def _taken(features: Float[Array, "B n D"], index: Int[Array, "B ..."]) -> Float[Array, "B ... D"]:
  """The patches of each row by number; where there is none (-1), any."""
  return jax.vmap(lambda row, index: row[jnp.maximum(index, 0)])(features, index)


class CellEncoder(nn.Module):
  """VideoRefer-VideoLLaMA3: cells, k-means, MLP.

  `cfg` is a `region.RegionConfig`: `width` E and `tokens` K.
  """

  cfg: Any
  rules: ActivationRules = ()

  iterations: ClassVar[int] = 20
  placed: ClassVar[bool] = False
  context: ClassVar[bool] = False

  @nn.compact
  def objects(
    self, features: Float[Array, "B n D"], batch: Mapping[str, Array]
  ) -> tuple[Float[Array, "B R K E"], Bool[Array, "B R K"]]:
    """(object tokens in `cfg.dtype`, which of them count) of the rows of a batch."""
    features = shard_act(features, self.rules, "batch", None, None)
    x = cell_features(features, batch)
    if self.placed:
      x = x + nn.Dense(features.shape[-1], name="position")(batch["cell_places"])
    counts = batch["cell_counts"]
    tokens, kept = joined(x, counts, batch["cell_starts"], self.iterations)
    if self.context:
      kept = jnp.broadcast_to(counts[..., None] >= 0, kept.shape)  # rows without a cell attend too
      for name in ("local", "whole"):
        tokens = self._attend(name, tokens, _taken(features, batch[name]), batch[name] >= 0)
    tokens = shard_act(tokens, self.rules, "batch", "object", None, None)
    mlp = Mlp(self.cfg.width, 2, self.cfg.dtype, self.rules)
    nn.share_scope(self, mlp)
    return mlp(tokens.astype(self.cfg.dtype)), kept

  def _attend(
    self,
    name: str,
    tokens: Float[Array, "B R K D"],
    picture: Float[Array, "B R G D"],
    seen: Bool[Array, "B R G"],
  ) -> Float[Array, "B R K D"]:
    """The tokens with what they gather from a context picture; its features are not normed."""
    B, _, K, D = tokens.shape
    sizes = ContextAttention(D, self.heads, self.cfg.dtype)
    y = LayerNorm(self.cfg.dtype, epsilon=1e-5, name=f"{name}_norm")(tokens)
    y, picture, seen = (rearrange(t, "B R ... -> (B R) ...") for t in (y, picture, seen))
    mask = jnp.broadcast_to(seen[:, None], (len(seen), K, seen.shape[-1]))
    attention = MultiHeadDotProductAttention(sizes, self.rules, name=f"{name}_attention")
    y = attention(y, picture.astype(self.cfg.dtype), mask=mask)
    return tokens + rearrange(y, "(B R) K D -> B R K D", B=B).astype(tokens.dtype)

  @property
  def heads(self) -> int:
    """Heads of the cross-attentions, a number of the published code."""
    return 8


class PlacedCells(CellEncoder):
  """PixelRefer: cells know where in the picture they lie."""

  iterations = 5
  placed = True


class CellsInContext(PlacedCells):
  """PixelRefer-Lite: always K tokens, which look at the surroundings and the whole picture."""

  iterations = 3
  context = True


def joined(
  x: Float[Array, "B R N D"],
  counts: Int[Array, "B R"],
  starts: Int[Array, "B R K"],
  iterations: int,
) -> tuple[Float[Array, "B R K D"], Bool[Array, "B R K"]]:
  """At most K tokens of each object: its cells as they are, or the centres of K clusters.

  Returns (tokens float32, which count); those that do not count are zero.
  """

  def one(x, count, start):
    K = len(start)
    centres = k_means(x, jnp.arange(len(x)) < count, start, iterations)
    kept = jnp.arange(K) < count
    cells = x[start]  # without k-means the starts are the cells in order
    return jnp.where(kept[:, None], jnp.where(count > K, centres, cells), 0), kept

  return jax.vmap(jax.vmap(one))(x, counts, starts)
