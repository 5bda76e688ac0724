"""`vr data features`: object features of a frozen tower, made once for all epochs and runs."""

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from data_pipes.batch import RowShape, build_row, collate
from data_pipes.clips import read_clip
from data_pipes.errors import InputError
from data_pipes.feature_shards import sample_key, write_features
from data_pipes.prompts import MEDIA_IDS, Text
from data_pipes.samples import RowRules
from data_pipes.shards import ShardSet
from vr_jax.models.videorefer import VideoRefer, VideoReferConfig
from vr_jax.training.schedule import Params

_REGION = -1  # stands for <region>: no text is embedded here


def tower_hash(cfg: VideoReferConfig, tower: Params, rules: RowRules) -> str:
  """A hash of all that stands between a clip's masks and an object's merged features."""
  code = hashlib.blake2b(digest_size=8)
  parts = (dataclasses.asdict(cfg.img), cfg.region.tokens, rules.mask_rule, rules.aspect_ratio)
  code.update(repr(parts).encode())
  for path, leaf in sorted(jax.tree_util.tree_leaves_with_path(tower), key=lambda p: str(p[0])):
    code.update(jax.tree_util.keystr(path).encode())
    code.update(np.ascontiguousarray(leaf, np.float32).tobytes())
  return code.hexdigest()


def make_cache(
  out: str | Path,
  shards: ShardSet,
  cfg: VideoReferConfig,
  params: Params,
  rules: RowRules,
  batch_size: int = 8,
) -> int:
  """Writes the object features of every sample of `shards`; returns how many."""
  if not len(shards):
    raise InputError(f"{shards.path}: found no samples; accepted: at least one")
  shards.check_model(cfg.img.image_size, cfg.image_aspect_ratio, cfg.num_frames)
  tower = tower_hash(cfg, params["img"], rules)
  module = VideoRefer(cfg)

  @jax.jit
  def features(params, rows):
    return module.apply({"params": params}, rows, method="region_tokens")

  chosen = [rules.objects(shards[i], i) for i in range(len(shards))]
  shape = RowShape(
    frames=max(1, *(len({n for o in objects for n in o}) for objects in chosen), 1),
    scene=0,
    objects=max(1, *map(len, chosen), 1),
    object_frames=max(1, *(len(o) for objects in chosen for o in objects), 1),
    length=1 + max(1, *map(len, chosen), 1),
    image_size=cfg.img.image_size,
    grid=cfg.img.grid,
    tokens_per_object=1,
    scene_tokens=0,
  )

  def row(index: int):
    record = shards[index]
    count = len(chosen[index])
    if not count:
      return build_row(_text(0, False), None, shape, _REGION)
    clip = read_clip(
      record.stored,
      shape,
      chosen[index],
      image=record.media == "image",
      aspect_ratio=rules.aspect_ratio,
      mask_rule=rules.mask_rule,
      size=record.size,
    )
    return build_row(_text(count, True), clip, shape, _REGION)

  def samples() -> Iterator[tuple[bytes, np.ndarray, np.ndarray]]:
    for first in range(0, len(shards), batch_size):
      numbers = [min(first + k, len(shards) - 1) for k in range(batch_size)]  # one static shape
      tokens, kept = map(np.asarray, features(params, collate([row(i) for i in numbers])))
      for k, i in enumerate(range(first, min(first + batch_size, len(shards)))):
        count = len(chosen[i])
        yield sample_key(shards[i], chosen[i]), tokens[k, :count], kept[k, :count]

  return write_features(out, tower, cfg.region.tokens, cfg.img.width, samples())


def _text(objects: int, media: bool) -> Text:
  ids = np.array([MEDIA_IDS["<video>"]] * media + [_REGION] * objects, np.int32)
  return Text(ids, np.full_like(ids, -100))
