"""Object tokens: spatial token extractor and temporal token merge.

Letters: B batch, P frame of the row, N patch, D tower width, R object, F frame of an object,
U token kept per object, E decoder width.

An object's features under its mask are averaged in each of its frames; more than U frames are
merged into at most U runs of consecutive, similar frames; an MLP lifts each to the decoder.

Source: VideoRefer Suite (arXiv 2501.00599) section 3.2; published `layer.py`.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Num

from data_pipes.errors import InputError
from vr_jax.arrays import Array
from vr_jax.models.connector import Mlp
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


def merge_segments(
  x: Float[Array, "*b F D"], valid: Bool[Array, "*b F"], u: int
) -> tuple[Int[Array, "*b F"], Float[Array, "*b F-1"]]:
  """Which merged token each frame goes to, and the cosine similarity of neighbouring frames.

  The valid frames come first; k is their number. With k <= u every frame is its own segment.
  Otherwise a cut falls after a frame whose similarity to the next is *strictly* below the
  (k-u)-th largest of the k-1 similarities, so ties keep frames together and fewer than u
  segments may come out. Frames beyond k get segment -1; their similarities mean nothing.
  """
  x = jax.lax.stop_gradient(x.astype(jnp.float32))
  unit = x / jnp.maximum(jnp.sqrt((x * x).sum(-1, keepdims=True)), 1e-12)
  similarity = (unit[..., :-1, :] * unit[..., 1:, :]).sum(-1)
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


# What a region encoder can be; each is made as `RegionEncoder` is, and has its methods.
KINDS: dict[str, type[RegionEncoder]] = {"token_merge": RegionEncoder}
