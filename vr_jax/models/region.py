"""Object tokens: spatial token extractor and temporal token merge.

Letters: B batch, P frame of the row, N patch, D tower width, R object, F frame of an object,
U token kept per object, E decoder width.

An object's features under its mask are averaged in each of its frames; more than U frames are
merged into at most U runs of consecutive, similar frames; an MLP lifts each to the decoder.

Source: VideoRefer Suite (arXiv 2501.00599) section 3.2; published `layer.py`.
"""

import dataclasses
import functools
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Num

from data_pipes.errors import InputError
from vr_jax.arrays import Array
from vr_jax.models.connector import Mlp
from vr_jax.models.crops import CellEncoder, CellsInContext, PlacedCells
from vr_jax.sharding import ActivationRules, shard_act


@dataclasses.dataclass(frozen=True)
class RegionConfig:
  """`width` is that of the decoder (E), `tokens` the union number U of the temporal merge.

  `kind` is a key of KINDS: which encoder reads the config.
  """

  width: int = 3584
  tokens: int = 4
  dtype: str = "float32"
  kind: str = "token_merge"

  def __post_init__(self):
    if self.kind not in KINDS:
      raise InputError(f"region kind {self.kind!r} is not one of {', '.join(KINDS)}")
    if self.tokens < 1:
      raise InputError(f"tokens={self.tokens}: an object needs at least one token")


def pool_regions(
  features: Float[Array, "B P N D"], masks: Num[Array, "B R P N"]
) -> Float[Array, "B R P D"]:
  """Mean of the features under each 0/1 mask, in float32; an empty mask gives an exact zero."""
  masks = masks.astype(jnp.float32)
  weights = masks / jnp.maximum(masks.sum(-1, keepdims=True), 1)
  features = features.astype(jnp.float32)
  return jnp.einsum("BPND,BRPN->BRPD", features, weights, precision="highest")


def neighbour_similarity(x: Float[Array, "*b F D"]) -> Float[Array, "*b F-1"]:
  """Cosine similarity of each frame and the next, float32; 0 beside a zero vector.

  The merge asks which similarities are equal, so frames that tie in exact arithmetic must tie
  here. Unit vectors do not promise that: a compiler that fuses product and sum makes
  0.6·0.6 + 0.8·0.8 1.0000001 in one row and 1 in another. dot / sqrt(d_i·d_j), d = x·x, does:

  - Sums of products that float32 holds exactly (integers, 3-4-5) are the same however they are
    fused. sqrt(fl(a·a)) is a where roots are correctly rounded, as on CPUs; so a similarity that
    is a quotient of such sums is that quotient, rounded once.
  - The sums of a pair are one reduction, their terms in one order, so that two equal frames of
    any numbers have dot = d_i = d_j.
  - Programs for GPUs may hold an approximate root and quotient (sqrt.approx, div.full), those for
    TPUs vrsqrt and vrcp. They are still functions: pairs of equal dot and equal d_i·d_j tie.
    Equal frames (a static object) do not depend on them and give exactly 1. Pairs of one
    similarity below 1 by other numbers (1/3 and 3/9) may there differ in the last bits and be cut.

  A norm below 1e-12 counts as 1e-12, as in the published code.
  """
  # Each frame by a power of two, exactly, so that no product of sums over- or underflows. A float
  # without sign and mantissa is that power; 254 less its biased exponent is the reciprocal's.
  smallest, largest = 127 - 40, 127 + 126  # of 2^-40, which is below 1e-12, and of 2^126
  bits = jax.lax.bitcast_convert_type(jnp.abs(x).max(-1, keepdims=True), jnp.int32)
  exponent = jnp.clip(bits >> 23, smallest, largest)
  scale = jax.lax.bitcast_convert_type((254 - exponent) << 23, jnp.float32)
  x, floor = x * scale, (1e-12 * scale[..., 0]) ** 2
  a, b = x[..., :-1, :], x[..., 1:, :]
  d_a, d_b, dot = jax.lax.reduce(
    (a * a, b * b, a * b),
    (np.float32(0),) * 3,
    functools.partial(jax.tree.map, jnp.add),
    [x.ndim - 1],
  )
  product = jnp.maximum(d_a, floor[..., :-1]) * jnp.maximum(d_b, floor[..., 1:])
  # Without the barrier XLA makes it dot * rsqrt(product), which is rounded twice.
  root = jax.lax.optimization_barrier(jnp.sqrt(product))
  # Where root and quotient are correctly rounded, equal squares give ±1 by themselves.
  return jnp.where(dot * dot == product, jnp.sign(dot), dot / root)


def merge_segments(
  x: Float[Array, "*b F D"], valid: Bool[Array, "*b F"], u: int
) -> tuple[Int[Array, "*b F"], Float[Array, "*b F-1"]]:
  """Which merged token each frame goes to, and the cosine similarity of neighbouring frames.

  The valid frames come first; k is their number. With k <= u every frame is its own segment.
  Otherwise a cut falls after a frame whose similarity to the next is *strictly* below the
  (k-u)-th largest of the k-1 similarities, so ties keep frames together and fewer than u
  segments may come out. Frames beyond k get segment -1; their similarities mean nothing.
  """
  similarity = neighbour_similarity(jax.lax.stop_gradient(x.astype(jnp.float32)))
  cut = valid[..., 1:]
  if similarity.shape[-1] >= u:
    # The (k-u)-th largest of k-1 numbers is their u-th smallest: a static place in the order.
    threshold = jnp.sort(jnp.where(cut, similarity, jnp.inf), axis=-1)[..., u - 1, None]
    keep_all = valid.sum(-1, keepdims=True) <= u
    cut &= keep_all | (similarity < threshold)
  first = jnp.zeros_like(valid[..., :1], jnp.int32)
  segment = jnp.concatenate([first, jnp.cumsum(cut, axis=-1, dtype=jnp.int32)], axis=-1)
  return jnp.where(valid, segment, -1), similarity


def merge_tokens(
  x: Float[Array, "*b F D"], valid: Bool[Array, "*b F"], u: int
) -> tuple[Float[Array, "*b u D"], Bool[Array, "*b u"]]:
  """Temporal token merge: each segment of `merge_segments` becomes the mean of its frames.

  Returns (tokens float32, valid); tokens that are not valid are zero.
  """
  segment, _ = merge_segments(x, valid, u)
  member = (segment[..., None, :] == jnp.arange(u)[:, None]).astype(jnp.float32)
  count = member.sum(-1, keepdims=True)
  x = jnp.where(valid[..., None], x.astype(jnp.float32), 0)
  tokens = jnp.einsum("...uF,...FD->...uD", member, x, precision="highest")
  return tokens / jnp.maximum(count, 1), count[..., 0] > 0


def object_features(
  features: Float[Array, "B P N D"],
  region_masks: Num[Array, "B R P N"],
  region_frames: Int[Array, "B R F"],
) -> tuple[Float[Array, "B R F D"], Bool[Array, "B R F"]]:
  """Pooled features of each object in the order of its frames, and which of them exist."""
  return in_order(pool_regions(features, region_masks), region_frames)


def in_order(
  pooled: Float[Array, "B R P D"], region_frames: Int[Array, "B R F"]
) -> tuple[Float[Array, "B R F D"], Bool[Array, "B R F"]]:
  """Each object's features in the order of its frames, and which of them exist.

  `region_frames` indexes the P frames; -1, only behind the object's frames, means none.
  """
  index = jnp.maximum(region_frames, 0)[..., None]
  return jnp.take_along_axis(pooled, index, axis=2), region_frames >= 0


class RegionEncoder(nn.Module):
  """Masks on frames to object tokens: pool, merge, lift. Parameters: fc1 [D,E], fc2 [E,E], biases.

  The steps are apart because each is also needed alone: inference pools frame by frame as a video
  is seen and merges per object (`pool`, `tokens`), caches keep what no weight of the encoder has
  touched (`merged_features`). Another encoder overrides the steps in which it differs.
  """

  cfg: RegionConfig
  rules: ActivationRules = ()

  def __call__(
    self,
    features: Float[Array, "B P N D"],
    region_masks: Num[Array, "B R P N"] | None,
    region_frames: Int[Array, "B R F"] | None,
    merged: tuple[Float[Array, "B R U D"], Bool[Array, "B R U"]] | None = None,
  ) -> tuple[Float[Array, "B R U E"], Bool[Array, "B R U"]]:
    """(object tokens in `cfg.dtype`, which of them count); the merge comes before the MLP.

    `merged` are cached features of the objects, as `merged_features` gives them; masks are not
    looked at then.
    """
    merged = merged or self.merged_features(features, region_masks, region_frames)
    tokens, kept = self.lift(*merged)
    return shard_act(tokens, self.rules, "batch", "object", None, None), kept

  def objects(
    self, features: Float[Array, "B P N D"], batch: Mapping[str, Array]
  ) -> tuple[Float[Array, "B R U E"], Bool[Array, "B R U"]]:
    """`__call__` with the arrays of a batch: masks and frames, or cached features instead."""
    if "object_tokens" in batch:
      return self(features, None, None, (batch["object_tokens"], batch["object_kept"]))
    return self(features, batch["region_masks"], batch["region_frames"])

  def merged_features(
    self,
    features: Float[Array, "B P N D"],
    region_masks: Num[Array, "B R P N"],
    region_frames: Int[Array, "B R F"],
  ) -> tuple[Float[Array, "B R U D"], Bool[Array, "B R U"]]:
    """Pooled and merged features of the objects, float32, and which of them count."""
    features = shard_act(features, self.rules, "batch", None, None, None)
    region_masks = shard_act(region_masks, self.rules, "batch", "object", None, None)
    region_frames = shard_act(region_frames, self.rules, "batch", "object", None)
    x, valid = in_order(self.pool(features, region_masks), region_frames)
    return merge_tokens(x, valid, self.cfg.tokens)

  def pool(
    self, features: Float[Array, "B P N D"], masks: Num[Array, "B R P N"]
  ) -> Float[Array, "B R P D"]:
    """One feature for each object and frame, float32: those under its mask, pooled."""
    return pool_regions(features, masks)

  def tokens(
    self, x: Float[Array, "*b F D"], valid: Bool[Array, "*b F"]
  ) -> tuple[Float[Array, "*b U E"], Bool[Array, "*b U"]]:
    """As `__call__`, from the features that `pool` gave for each frame of an object."""
    return self.lift(*merge_tokens(x, valid, self.cfg.tokens))

  @nn.compact
  def lift(
    self, merged: Float[Array, "*b U D"], kept: Bool[Array, "*b U"]
  ) -> tuple[Float[Array, "*b U E"], Bool[Array, "*b U"]]:
    """Merged features to the decoder's width."""
    mlp = Mlp(self.cfg.width, 2, self.cfg.dtype, self.rules)
    nn.share_scope(self, mlp)
    return mlp(merged.astype(self.cfg.dtype)), kept


# What a region encoder can be; each is made of (config, rules) and has the method `objects`. Those
# that read masks on a grid have all methods of `RegionEncoder`.
KINDS: dict[str, type[nn.Module]] = {
  "token_merge": RegionEncoder,
  "cells": CellEncoder,
  "placed_cells": PlacedCells,
  "cells_in_context": CellsInContext,
}
