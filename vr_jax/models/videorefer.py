"""VideoRefer: frames and masks become tokens, tokens become an answer.

    frames ── img (SigLIP) ─┬─ connector ───────────────────► scene tokens ──┐
                            └─ region (pool, merge, project) ► object tokens ┼ splice ─ llm ─ logits
    token ids ── embedding ──────────────────────────────────────────────────┘

The tower and the region encoder are of a kind (TOWERS, region.KINDS), and each reads its own
arrays of a batch; the assembly asks them for features, scene tokens and object tokens.

Letters: B batch, P frame of the row, S pixel, T scene frame, N patch, D tower width, R object,
F frame of an object, U token kept per object, V scene token, L sequence slot, E decoder width,
W vocabulary.

A batch of squares of one size is the dict that `data_pipes.batch` makes (for pictures of any size
see navit.py and crops.py): `frames` u8 [B,P,S,S,3], `scene` i32 [B,T],
`region_masks` u8 [B,R,P,N], `region_frames` i32 [B,R,F], `tokens`, `visual` i32 [B,L], `valid`,
`supervised` bool [B,L]. In packed rows `scene` is [B,C,T] (C clips) and `segments` i32 [B,L]
numbers the samples of a row, which do not see each other. Cached object features, `object_tokens`
[B,R,U,D] and `object_kept` [B,R,U], stand for `region_masks` and `region_frames`; cached features
of frames, [B,P,N,D], for `frames`.

Source: VideoRefer Suite (arXiv 2501.00599) section 3.2; published `videorefer_arch.py`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, no_type_check

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Bool, Float, Int, Num, UInt8

from data_pipes.errors import InputError
from vr_jax.arrays import Array
from vr_jax.models.connector import Connector, ConnectorConfig, scene_token_count
from vr_jax.models.decoder import Decoder, DecoderConfig, KVCache
from vr_jax.models.navit import Navit, NavitConfig
from vr_jax.models.region import KINDS, RegionConfig, merge_segments
from vr_jax.models.siglip import Siglip, SiglipConfig
from vr_jax.sharding import ActivationRules, shard_act

Batch = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class VideoReferConfig:
  """Everything that decides the shapes and the arithmetic of the model; stored in checkpoints.

  `num_frames` is the number of scene frames the model was trained with; `image_aspect_ratio` is
  'square' (resize without keeping the aspect, as VideoRefer-7B) or 'pad'.
  """

  name: str
  img: Any  # the config of a kind of TOWERS
  connector: ConnectorConfig
  region: RegionConfig
  llm: DecoderConfig
  num_frames: int = 16
  image_aspect_ratio: str = "square"
  max_text_ids: int = 2048

  def to_dict(self) -> dict[str, Any]:
    return dataclasses.asdict(self)

  def settings(self) -> dict[str, Any]:
    """The fields beside the parts."""
    return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in PARTS}

  @classmethod
  def from_dict(cls, fields: dict[str, Any]) -> "VideoReferConfig":
    """Reads what `to_dict` (through JSON) wrote.

    Raises:
      InputError: a part is missing (checkpoints of parts alone have only those).
    """
    missing = [part for part in PARTS if part not in fields]
    if missing:
      held = ", ".join(part for part in PARTS if part in fields)
      raise InputError(f"not a whole model: it holds {held or 'nothing'} and no {missing[0]}")
    return cls(**{k: part_config(k, v) if k in PARTS else v for k, v in fields.items()})


class Tower(NamedTuple):
  """A vision tower: its config, and the module that makes features and scene tokens of a batch."""

  config: type[Any]
  module: type[Any]


# What `kind` of a tower's config says; a config without it is that of a SigLIP of one size.
TOWERS = {"siglip": Tower(SiglipConfig, Siglip), "navit": Tower(NavitConfig, Navit)}

PARTS = {
  "img": SiglipConfig,
  "connector": ConnectorConfig,
  "region": RegionConfig,
  "llm": DecoderConfig,
}


def part_config(part: str, fields: Mapping[str, Any]) -> Any:
  """The config of one part from its JSON fields."""

  def frozen(value):
    return tuple(frozen(v) for v in value) if isinstance(value, list | tuple) else value

  return part_class(part, fields)(**{k: frozen(v) for k, v in fields.items()})


def part_class(part: str, fields: Mapping[str, Any]) -> type[Any]:
  """The config class of one part with these JSON fields.

  Raises:
    InputError: a kind of tower that is not in TOWERS.
  """
  if part != "img":
    return PARTS[part]
  kind = fields.get("kind", "siglip")
  if not isinstance(kind, str) or kind not in TOWERS:
    raise InputError(f"img kind {kind!r} is not one of {', '.join(TOWERS)}")
  return TOWERS[kind].config


@no_type_check  # JAX rebuilds it with leaves of any kind
@flax.struct.dataclass
class Spliced:
  """The decoder's input rows after splicing: valid slots first, padding behind them.

  embeds [B,L,E]; tokens i32 [B,L] (0 in visual slots); supervised, valid bool [B,L];
  positions i32 [B,L], 0.. for valid slots (of each segment) and -1 for padding; segments i32 [B,L]
  in packed rows.
  """

  embeds: Float[Array, "B L E"]
  tokens: Int[Array, "B L"]
  supervised: Bool[Array, "B L"]
  valid: Bool[Array, "B L"]
  positions: Int[Array, "B L"]
  segments: Int[Array, "B L"] | None = None


class VideoRefer(nn.Module):
  """The assembly. Pure: `apply({"params": p}, batch)`; the KV cache goes in and comes out.

  `rules` place the activations on the mesh (see `sharding.shard_act`); () leaves them alone.
  `trained` names the parts that gradients are asked of ("adapters" for those of `llm` alone); it
  changes no value, only what is kept for the backward pass.
  """

  cfg: VideoReferConfig
  rules: ActivationRules = ()
  trained: tuple[str, ...] = tuple(PARTS)

  def setup(self):
    self.img = TOWERS[self.cfg.img.kind].module(self.cfg.img, self.rules)
    self.connector = Connector(self.cfg.connector, self.rules)
    self.region = KINDS[self.cfg.region.kind](self.cfg.region, self.rules)
    self.llm = Decoder(self.cfg.llm, self.rules)

  def encode_frames(
    self, frames: UInt8[Array, "B P S S 3"] | Float[Array, "B P N D"]
  ) -> Float[Array, "B P N D"]:
    """Tower features of every frame of the rows, each frame once; cached ones as they are."""
    return self.img.features({"frames": frames})

  def visual_table(
    self, features: Float[Array, "B *n D"], batch: Batch
  ) -> tuple[Float[Array, "B X E"], Bool[Array, "B X"]]:
    """Scene tokens, then the U object tokens of each object: (rows, valid), X = C*V + R*U."""
    scene, counts = self.img.scene(self.connector, features, batch)
    objects, kept = self.region.objects(features, batch)
    scene = shard_act(scene, self.rules, "batch", None, None)
    objects = rearrange(objects, "B R U E -> B (R U) E").astype(scene.dtype)
    rows = jnp.concatenate([scene, objects], axis=1)
    kept = rearrange(kept, "B R U -> B (R U)")
    return rows, jnp.concatenate([counts, kept], axis=1)

  def splice(self, batch: Batch, features: Float[Array, "B *n D"] | None = None) -> Spliced:
    """Text embeddings with scene and object tokens in their slots, compacted.

    An object may keep fewer than U tokens (ties in the merge, few frames). Its spare slots are
    dropped here, so that positions are those of the published splice, whose rows are ragged. Shapes
    are static: what is dropped goes behind the row. With U = 4, V = 2:

        slot        a  b  v0 v1 c  o0 o1 o2 o3 d  e  -     text a-e, scene v, object o, padding -
        valid       1  1  1  1  1  1  1  0  0  1  1  0     the object keeps two tokens
        compacted   a  b  v0 v1 c  o0 o1 d  e  o2 o3 -
        position    0  1  2  3  4  5  6  7  8 -1 -1 -1
    """
    features = self.img.features(batch) if features is None else features
    rows, rows_valid = self.visual_table(features, batch)
    is_visual = batch["visual"] >= 0
    row = jnp.maximum(batch["visual"], 0)
    text = self.llm.embed(batch["tokens"])
    visual = jnp.take_along_axis(rows, row[:, :, None], axis=1).astype(text.dtype)
    valid = batch["valid"] & (~is_visual | jnp.take_along_axis(rows_valid, row, axis=1))

    # False sorts before True, and a stable sort leaves the valid slots in their order.
    order = jnp.argsort(~valid, axis=1, stable=True)
    embeds = jnp.where(is_visual[:, :, None], visual, text)
    valid = jnp.take_along_axis(valid, order, axis=1)
    slots, segments = jnp.arange(valid.shape[1]), batch.get("segments")
    if segments is not None:
      segments = jnp.take_along_axis(segments, order, axis=1)
      slots -= _segment_starts(segments)
    positions = jnp.where(valid, slots, -1).astype(jnp.int32)
    embeds = jnp.take_along_axis(embeds, order[:, :, None], axis=1)
    return Spliced(
      embeds=jnp.where(valid[:, :, None], embeds, 0),
      tokens=jnp.take_along_axis(batch["tokens"], order, axis=1),
      # Nothing predicts the first slot of a sample.
      supervised=jnp.take_along_axis(batch["supervised"], order, axis=1) & (positions > 0),
      valid=valid,
      positions=positions,
      segments=segments,
    )

  def __call__(self, batch: Batch) -> tuple[Float[Array, "B L E"], Spliced]:
    """Hidden states of every slot, and the spliced rows they belong to."""
    spliced = self.splice(batch)
    x, positions = spliced.embeds, spliced.positions
    n = self.constant_slots(batch)
    if not n:
      return self.llm(x, positions, segments=spliced.segments)[0], spliced
    # What no gradient passes is run once and keeps nothing but keys and values.
    constant = jax.lax.stop_gradient(x[:, :n])
    past = KVCache.empty(self.cfg.llm, x.shape[0], n)
    before, past = self.llm(constant, positions[:, :n], past)
    after, _ = self.llm(x[:, n:], positions[:, n:], past=past)
    return jnp.concatenate([before, after], axis=1), spliced

  def constant_slots(self, batch: Batch) -> int:
    """How many slots at the start of every row depend on no trained part.

    Where the region encoder alone trains (stage 2), those before the first object token; objects
    come after the scene tokens of their media, so that their number V is a static bound. (Not so in
    packed rows.)
    """
    if self.trained != ("region",) or "segments" in batch or "frames" not in batch:
      return 0
    V = scene_token_count(self.cfg.connector, batch["scene"].shape[-1], self.cfg.img.grid)
    return V if batch["tokens"].shape[1] > V else 0

  def logits(
    self, hidden: Float[Array, "... E"], rows: tuple[Int[Array, ""], int] | None = None
  ) -> Float[Array, "... W"]:
    """Float32 logits over the vocabulary, or over its part `rows` = (start, size)."""
    return self.llm.logits(hidden, rows)

  def region_tokens(self, batch: Batch) -> tuple[Float[Array, "B R U D"], Bool[Array, "B R U"]]:
    """Merged features of the objects before the region encoder's MLP, for a cache."""
    features = self.encode_frames(batch["frames"])
    return self.region.merged_features(features, batch["region_masks"], batch["region_frames"])

  def prefill(self, batch: Batch, cache: KVCache) -> tuple[Float[Array, "B W"], KVCache]:
    """Fills an empty cache with the rows and gives the logits after each row's last slot."""
    spliced = self.splice(batch)
    hidden, cache = self.llm(spliced.embeds, spliced.positions, cache)
    last = jnp.maximum(spliced.valid.sum(axis=1) - 1, 0)
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    return self.llm.logits(hidden), cache

  def extend(
    self, tokens: Int[Array, "B K"], positions: Int[Array, "B K"], cache: KVCache
  ) -> tuple[Float[Array, "B K W"], KVCache]:
    """Feeds K more text tokens per row; positions -1 mark rows that have ended."""
    hidden, cache = self.llm(self.llm.embed(tokens), positions, cache)
    return self.llm.logits(hidden), cache

  def encode_pictures(
    self, patches: UInt8[Array, "X N C"], segments: Int[Array, "X N"], places: Int[Array, "X N 2"]
  ) -> Float[Array, "X N D"]:
    """Tower features of packed pictures of any size."""
    return self.img(patches, segments, places)[0]

  def prefill_pictures(
    self, features: Float[Array, "B n D"], batch: Batch, cache: KVCache
  ) -> KVCache:
    """Fills an empty cache with rows whose pictures have been encoded."""
    spliced = self.splice(batch, features)
    return self.llm(spliced.embeds, spliced.positions, cache)[1]

  def picture_scene(
    self, features: Float[Array, "B n D"], batch: Batch
  ) -> tuple[Float[Array, "B V E"], Bool[Array, "B V"]]:
    """Scene tokens of pictures that have been encoded, and which of them the compressor keeps."""
    return self.img.scene(self.connector, features, batch)

  def crop_objects(
    self, features: Float[Array, "B n D"], batch: Batch
  ) -> tuple[Float[Array, "B R U E"], Bool[Array, "B R U"]]:
    """Object tokens of crops that have been encoded, and which of them count."""
    return self.region.objects(features, batch)

  def scene_tokens(self, features: Float[Array, "B T N D"]) -> Float[Array, "B V E"]:
    """The connector alone, on the tower features of the scene frames in their order."""
    return self.connector(features)

  def pool_objects(
    self, features: Float[Array, "C N D"], masks: Num[Array, "C R N"]
  ) -> Float[Array, "C R D"]:
    """The tower's features of C frames, pooled under the masks of R objects on each, float32."""
    return self.region.pool(features[:, None], masks[:, :, None])[:, :, 0]

  def object_tokens(
    self, pooled: Float[Array, "R F D"], valid: Bool[Array, "R F"]
  ) -> tuple[Float[Array, "R U E"], Bool[Array, "R U"], Int[Array, "R F"]]:
    """Features pooled under each mask to (tokens, which count, the token each frame went to)."""
    tokens, kept = self.region.tokens(pooled, valid)
    return tokens, kept, merge_segments(pooled, valid, self.cfg.region.tokens)[0]

  def prefill_scene(
    self, head: Int[Array, "B K"], valid: Bool[Array, "B K"], scene: Float[Array, "B V E"], cache
  ) -> KVCache:
    """Fills an empty cache with what all questions about a video begin with.

    `head` is the text before the media, its padding at the end and no slot that counts; the scene
    tokens follow.
    """
    text = self.llm.embed(head)
    count = valid.sum(axis=1, keepdims=True)
    slots = jnp.arange(head.shape[1])
    after = count + jnp.arange(scene.shape[1])
    positions = jnp.concatenate([jnp.where(valid, slots, -1), after], axis=1).astype(jnp.int32)
    embeds = jnp.concatenate([text, scene.astype(text.dtype)], axis=1)
    return self.llm(embeds, positions, cache)[1]

  def extend_visual(
    self,
    tokens: Int[Array, "B K"],
    visual: Float[Array, "B K E"],
    is_visual: Bool[Array, "B K"],
    positions: Int[Array, "B K"],
    cache: KVCache,
  ) -> tuple[Float[Array, "B W"], KVCache]:
    """Feeds K more slots per row, text or visual tokens; logits after the row's last slot here.

    Positions are -1 for padding, which comes last. The logits of a row of padding mean nothing.
    """
    text = self.llm.embed(tokens)
    embeds = jnp.where(is_visual[..., None], visual.astype(text.dtype), text)
    hidden, cache = self.llm(embeds, positions, cache)
    last = jnp.argmax(positions, axis=1)
    return self.llm.logits(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]), cache


def _segment_starts(segments: Int[Array, "B L"]) -> Int[Array, "B L"]:
  """The slot at which each slot's segment begins.

  segments   0 0 0 1 1 2 2 2
  begins     0 . . 3 . 5 . .     the slot's own number where a segment begins, else 0
  cummax     0 0 0 3 3 5 5 5     the last begin before it
  """
  slots = jnp.arange(segments.shape[1])
  begins = jnp.diff(segments, axis=1, prepend=-2) != 0
  return jax.lax.cummax(jnp.where(begins, slots, 0), axis=1)


def empty_batch(
  cfg: VideoReferConfig, *, rows: int = 1, frames: int = 2, objects: int = 1, length: int = 8
) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes and dtypes of a small batch, enough to initialise parameters."""
  pictures = TOWERS[cfg.img.kind].module.empty_batch(cfg.img, frames, cfg.num_frames, objects)
  shapes = {
    **pictures,
    "tokens": ((length,), jnp.int32),
    "visual": ((length,), jnp.int32),
    "valid": ((length,), jnp.bool_),
    "supervised": ((length,), jnp.bool_),
  }
  return {k: jax.ShapeDtypeStruct((rows, *shape), dtype) for k, (shape, dtype) in shapes.items()}


def init_params(cfg: VideoReferConfig, key: Array) -> dict[str, Any]:
  """Fresh float32 parameters (use under `jax.eval_shape` or `jax.jit` for full-size models)."""
  batch = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), empty_batch(cfg))

  def everything(model: VideoRefer, batch: Batch):
    hidden, _ = model(batch)
    return model.logits(hidden[:, :1])

  return VideoRefer(cfg).init(key, batch, method=everything)["params"]
