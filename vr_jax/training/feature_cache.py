"""`vr data features`: what a frozen tower makes of objects and frames, once for all runs."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from data_pipes.batch import RowShape, build_row, collate
from data_pipes.clips import read_clip
from data_pipes.errors import InputError
from data_pipes.feature_shards import (
  FrameFeaturesWriter,
  TowerHash,
  frame_key,
  sample_key,
  scene_numbers,
  write_features,
)
from data_pipes.images import to_model
from data_pipes.prompts import MEDIA_IDS, Text
from data_pipes.samples import RowRules
from data_pipes.shards import ShardSet, StoredClip
from data_pipes.video import read_scene
from vr_jax.models.videorefer import VideoRefer, VideoReferConfig
from vr_jax.params import Params

_REGION = -1  # stands for <region>: no text is embedded here
_SAMPLES_700K = 700_000  # of VideoRefer-700K


def tower_hash(cfg: VideoReferConfig, tower: Params, rules: RowRules) -> TowerHash:
  """Hashes of all that stands between pixels and features, and between masks and merged ones."""
  code = hashlib.blake2b(digest_size=8)
  code.update(repr((dataclasses.asdict(cfg.img), rules.aspect_ratio)).encode())
  for path, leaf in sorted(jax.tree_util.tree_leaves_with_path(tower), key=lambda p: str(p[0])):
    code.update(jax.tree_util.keystr(path).encode())
    code.update(np.ascontiguousarray(leaf, np.float32).tobytes())
  frames = code.hexdigest()
  code.update(repr((cfg.region.tokens, rules.mask_rule)).encode())
  return TowerHash(frames, code.hexdigest())


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
  tower = tower_hash(cfg, params["img"], rules).objects
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


def frame_cache_size(shards: ShardSet, cfg: VideoReferConfig) -> tuple[int, str]:
  """Most bytes that the frame features of a set take, and a line that says so beside others."""
  each, clips = cfg.img.grid**2 * cfg.img.width * 2, shards.manifest["clips"]
  most = each * cfg.num_frames * clips
  whole = each * cfg.num_frames * _SAMPLES_700K
  return most, (
    f"frame features: {each} bytes a frame; at most {most / 1e9:.3f} GB for {clips} clips of "
    f"{cfg.num_frames} frames, {whole / 1e12:.1f} TB for the 700 000 samples of VideoRefer-700K"
  )


def make_frame_cache(
  out: str | Path,
  shards: ShardSet,
  cfg: VideoReferConfig,
  params: Params,
  rules: RowRules,
  batch_size: int = 32,
) -> int:
  """Writes the features of the scene frames of `shards`, each once; returns how many are new.

  Shards of them that are there already are kept, so that a run that was killed goes on.

  Raises:
    InputError: shards that do not fit the model, a folder begun otherwise, a disk that is too full.
  """
  shards.check_model(cfg.img.image_size, cfg.image_aspect_ratio, cfg.num_frames)
  T, count = cfg.num_frames, len(shards.manifest["samples_of_shards"])
  content = json.dumps([shards.manifest["checksums"], shards.manifest["settings"]["files"]])
  index = {
    "tower": tower_hash(cfg, params["img"], rules).frames,
    "patches": cfg.img.grid**2,
    "width": cfg.img.width,
    "scene": T,
    "set": hashlib.blake2b(content.encode(), digest_size=8).hexdigest(),
    "shards": count,
  }
  module = VideoRefer(cfg)

  @jax.jit
  def features(params, frames):
    return module.apply({"params": params}, frames, method="encode_frames")[0]

  def frames_of(shard: int) -> dict[bytes, tuple[StoredClip, int]]:
    frames = {}
    for i in shards.of_shard(shard):
      record = shards[i]
      if record.media is not None:
        for number in scene_numbers(record.stored, record.media == "image", T):
          frames[frame_key(record.stored, number)] = (record.stored, number)
    return frames

  def encoded(stored: dict[bytes, tuple[StoredClip, int]]) -> Iterator[tuple[bytes, np.ndarray]]:
    keys = list(stored)
    for first in range(0, len(keys), batch_size):
      part = keys[first : first + batch_size]
      frames = np.zeros((1, batch_size, cfg.img.image_size, cfg.img.image_size, 3), np.uint8)
      for k, key in enumerate(part):
        clip, number = stored[key]
        (pixels,) = read_scene(clip, [number])
        frames[0, k] = to_model(pixels, cfg.img.image_size, rules.aspect_ratio)
      yield from zip(part, np.asarray(features(params, frames)), strict=False)

  most, line = frame_cache_size(shards, cfg)
  there = sum(path.stat().st_size for path in Path(out).glob("frames-*"))
  Path(out).mkdir(parents=True, exist_ok=True)
  if most - there > (free := shutil.disk_usage(out).free):
    raise InputError(f"{out}: {free / 1e9:.3f} GB are free; {line}")
  writer = FrameFeaturesWriter(out, index)
  return sum(writer.write(shard, encoded(frames_of(shard))) for shard in writer.left())


def _text(objects: int, media: bool) -> Text:
  ids = np.array([MEDIA_IDS["<video>"]] * media + [_REGION] * objects, np.int32)
  return Text(ids, np.full_like(ids, -100))
