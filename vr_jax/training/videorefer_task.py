"""Training VideoRefer on annotation files in the published format."""

import dataclasses
import functools
import itertools
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from ml_collections import ConfigDict

from data_pipes.batch import Needs, Row, RowShape, fit_shape
from data_pipes.buckets import here
from data_pipes.containers import open_records
from data_pipes.content import digest_of, digest_of_data, kept_path
from data_pipes.errors import InputError
from data_pipes.failures import Failures
from data_pipes.feature_shards import FeatureShards
from data_pipes.loader import batches_of, make_bucketed_dataset, make_dataset, prefetched
from data_pipes.packing import (
  BucketSamples,
  PackedSamples,
  Plan,
  budgets_of,
  cut_shape,
  digest_of_rows,
  fill_line,
  frame_classes,
  kept_plan,
  make_buckets,
  plan_rows,
  read_needs,
  write_needs,
)
from data_pipes.records import Container
from data_pipes.samples import RowRules, Samples, record_needs
from data_pipes.shards import ShardSet
from data_pipes.tokenizer import Tokenizer
from vr_jax.assets import VR_MINI
from vr_jax.checkpoint import make_tokenizer
from vr_jax.models.connector import scene_token_count
from vr_jax.models.costs import training_flops
from vr_jax.models.lora import is_factor
from vr_jax.models.variants import get_variant
from vr_jax.models.videorefer import PARTS, VideoRefer, VideoReferConfig, init_params
from vr_jax.params import Params, path_names
from vr_jax.training.feature_cache import tower_hash
from vr_jax.training.loss import LossSums, model_loss
from vr_jax.training.navit_data import navit_dataset, navit_work_of
from vr_jax.training.schedule import split_by_table
from vr_jax.training.start import generation, model_config, starting_params, tokenizer_files
from vr_jax.training.step import Cuts
from vr_jax.training.task import PLAN, Rows, Task

log = logging.getLogger(__name__)


def videorefer_task(config: ConfigDict) -> Task:
  """The task of `config.task = "videorefer"`.

  Raises:
    InputError: no files, files or weights that do not fit, an unknown variant or field.
  """
  config = _copied(config)
  cfg = model_config(config)
  files = tokenizer_files(config)
  tokenizer = make_tokenizer(files)
  any_size = cfg.img.kind == "navit"
  if not any_size and max(len(tokenizer) - 1, tokenizer.region_id) >= cfg.llm.vocab_size:
    raise InputError(
      f"the tokenizer has {len(tokenizer)} ids, the model's vocabulary {cfg.llm.vocab_size}"
    )
  if not config.input.files:
    raise InputError("config.input.files is empty; give at least one annotation file")
  records = [read_set(path, cfg) for path in config.input.files]
  rules = row_rules(config, cfg)
  failures = Failures(config.input.max_unreadable)
  caches = feature_caches(config, records)
  if any_size:
    made = navit_dataset(config, cfg, records, tokenizer, failures)
  else:
    made = _dataset(_Sets(config, cfg, records, tokenizer, rules, files, caches), failures)
  size, make, plan = made

  def dataset(total_steps: int, **options: Any) -> grain.MapDataset:
    # Whole epochs end with them: empty rows fill the last batch, not samples of one epoch more.
    epochs = config.total_epochs or total_steps * config.input.batch_size / size
    return make(
      batch_size=config.input.batch_size,
      seed=config.seed,
      shuffle=config.input.shuffle,
      epochs=None if config.input.weights else math.ceil(epochs),
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      failures=failures,
      **options,
    )[:total_steps]

  def batches(position: int, total_steps: int) -> Iterator[Rows]:
    rows = dataset(total_steps)
    if not any_size and config.input.accum_steps != 1 and config.accum_mean == "tokens":
      rows = rows.map(in_order_of_frames)  # the sum over a batch knows no order
    return prefetched(rows, position, threads=config.input.threads)

  def start(shapes: Params) -> Params:
    params = starting_params(config, shapes)
    if caches:
      tower = tower_hash(cfg, params.get("img", {}), rules)
      for cache, set_ in zip(caches, records, strict=True):
        cache.check(tower, len(set_))
    return params

  return Task(
    init=lambda key: init_params(cfg, key),
    loss=videorefer_loss(config, cfg),
    data_size=size,
    batches=batches,
    names=lambda position, total_steps: dataset(total_steps, names=True)[position],
    model=cfg.to_dict(),
    start=start,
    tokenizer_files=files,
    generation=generation(config, tokenizer),
    data={
      f"input.{name}[{i}]": digest_of_data(path)
      for name in ("files", "features")
      for i, path in enumerate(config.input[name])
    }
    | ({PLAN: plan} if plan else {}),
    failures=failures,
    counts=lambda: {"unreadable": len(failures)},
    work=functools.partial(
      navit_work_of if any_size else work_of, cfg=cfg, trained=trained_parts(config, cfg)
    ),
    kinds=None
    if any_size
    else functools.partial(kinds_of, scene_tokens=row_sizes(cfg)["scene_tokens"]),
    cuts=FRAME_CUTS if config.input.accum_steps != 1 and not any_size else None,
  )


def _copied(config: ConfigDict) -> ConfigDict:
  """The config with copies of what its files and caches have in buckets."""
  names = ("files", "features")
  copies = {name: tuple(str(here(path)) for path in config.input[name]) for name in names}
  if all(copies[name] == tuple(config.input[name]) for name in names):
    return config
  config = config.copy_and_resolve_references().unlock()
  config.input.update(copies)
  return config.lock()


def videorefer_loss(config: ConfigDict, cfg: VideoReferConfig) -> Callable[..., LossSums]:
  """The loss of the config as a function of (parameters, rows of a micro-batch)."""
  model = VideoRefer(cfg, rules=config.sharding_rules, trained=trained_parts(config, cfg))
  return model_loss(model, config.loss_budget, config.loss_chunk)


def trained_parts(config: ConfigDict, cfg: VideoReferConfig) -> tuple[str, ...]:
  """The parts of the model of which the schedule trains something.

  "adapters" stands in the place of "llm" where nothing else of the decoder trains.
  """
  shapes = jax.eval_shape(lambda key: init_params(cfg, key), jax.random.key(0))
  trained, _ = split_by_table(shapes, config.schedule)
  adapters = all(is_factor(path) for path in jax.tree.leaves(path_names(trained.get("llm", {}))))
  names = {"llm": "adapters"} if adapters else {}
  return tuple(names.get(part, part) for part in PARTS if part in trained)


def work_of(rows: Rows, cfg: VideoReferConfig, trained: Sequence[str]) -> tuple[int, int]:
  """Text and visual slots of host rows [B, ...], and the FLOPs that a step needs for them."""
  flops = 0
  for b, frames in enumerate(1 + _last_frame(rows)):
    segments = rows["segments"][b] if "segments" in rows else np.where(rows["valid"][b], 0, -1)
    clips = iter(rows["scene"][b].reshape(-1, cfg.num_frames))  # of the samples that have one
    for number in np.unique(segments[segments >= 0]):
      slots = segments == number
      scene_frames = 0
      if (rows["visual"][b][slots] >= 0).any():
        scene_frames = 1 if np.ptp(next(clips)) == 0 else cfg.num_frames
      encoded, frames = (int(frames), 0) if scene_frames else (0, frames)  # once a row
      encoded *= rows["frames"].ndim > 4  # cached features need no tower
      supervised = int(rows["supervised"][b][slots].sum())
      flops += training_flops(cfg, trained, encoded, int(slots.sum()), supervised, scene_frames)
  return int(rows["valid"].sum()), flops


def kinds_of(rows: Any, scene_tokens: int) -> dict[str, jax.Array]:
  """Slots of rows [B, L] by what stands in them."""
  first_object = scene_tokens * (rows["scene"].shape[1] if rows["scene"].ndim > 2 else 1)
  visual = rows["visual"]
  return {
    "text": (rows["valid"] & (visual < 0)).sum(),
    "scene": ((visual >= 0) & (visual < first_object)).sum(),
    "object": (visual >= first_object).sum(),
    "empty": (~rows["valid"]).sum(),
  }


def _frame_sizes(rows: Rows) -> tuple[int, ...]:
  """Frame slots of an image, of a video with single masks, and of any row; packed rows are full."""
  P, T = rows["frames"].shape[1], rows["scene"].shape[-1]
  return (P,) if rows["scene"].ndim > 2 else tuple(sorted({1, min(T + 1, P), P}))


def _last_frame(rows: Rows) -> Any:
  """The highest frame number of each row [B]; cached objects have none."""
  scene = rows["scene"]
  last = scene.reshape(len(scene), -1).max(-1)
  if "region_frames" in rows:
    last = last.clip(min=rows["region_frames"].max((-2, -1)))
  return last


def _frames_needed(rows: Rows) -> jax.Array:
  return 1 + _last_frame(rows).max()


def _cut_frames(rows: Rows, size: int) -> Rows:
  cut = {**rows, "frames": rows["frames"][:, :size]}
  if "region_masks" in rows:
    cut["region_masks"] = rows["region_masks"][:, :, :size]
  return cut


# The tower encodes every frame slot of a row, and an image in a row for videos leaves most empty.
FRAME_CUTS = Cuts(_frame_sizes, _frames_needed, _cut_frames)


def in_order_of_frames(rows: Row) -> Row:
  """The rows of a batch by how many frames they hold, so that micro-batches can be cut."""
  order = np.argsort(_last_frame(rows), kind="stable")
  return {name: array[order] for name, array in rows.items()}


SIZES = ("frames", "objects", "object_frames", "length")  # of a row, that `input.row_*` may set
# Rows of an epoch; the dataset, by how it is run; digest of which samples share rows.
Made = tuple[int, Callable[..., Any], str]


@dataclasses.dataclass(frozen=True)
class _Sets:
  """The sets of a run, read but not yet made rows."""

  config: ConfigDict
  cfg: VideoReferConfig
  records: Sequence[Container]
  tokenizer: Tokenizer
  rules: RowRules
  files: Mapping[str, bytes]  # of the tokenizer
  caches: Sequence[FeatureShards]  # one for each set, or none

  def samples(self, shape: RowShape) -> list[Samples]:
    """Each set's samples, laid out in rows of this shape."""
    options = {"media_root": self.config.input.media, "rules": self.rules}
    caches: Sequence[FeatureShards | None] = self.caches or [None] * len(self.records)
    pairs = zip(self.records, caches, strict=True)
    return [Samples(r, self.tokenizer, shape, features=c, **options) for r, c in pairs]

  def needs(self) -> list[list[Needs]]:
    """What each record of each set takes of a row."""
    return [all_needs(r, self.cfg, self.tokenizer, self.rules, self.files) for r in self.records]

  def finished(self, shape: RowShape) -> RowShape:
    """The shape with what cached features change in it."""
    width = {"feature_width": self.cfg.img.width} if self.rules.cached else {}
    frames = any(cache.frames for cache in self.caches)
    return dataclasses.replace(shape, **width, frame_features=frames)


def _dataset(sets: _Sets, failures: Failures) -> Made:
  """Rows in the one way that the config names: packed, in buckets by length, or one a sample.

  Raises:
    InputError: more than one way, or weights for buckets.
  """
  given = sets.config.input
  if bool(given.pack) + bool(given.buckets) + bool(given.row_length) > 1:
    raise InputError(
      "config.input: pack, buckets and row_length each say how long rows are; accepted: one of them"
    )
  if given.pack:
    return _packed(sets, failures)
  if given.buckets:
    return _bucketed(sets)
  return _one_a_sample(sets)


def _one_a_sample(sets: _Sets) -> Made:
  """A row is one sample; all rows have the shape of the largest."""
  given = sets.config.input
  fixed = {k: v for k in SIZES if (v := given[f"row_{k}"])}
  sizes, shape_of = row_sizes(sets.cfg), None
  if len(fixed) == len(SIZES):
    shape = RowShape(scene=sets.cfg.num_frames, **fixed, **sizes)
  else:
    needs = list(itertools.chain(*sets.needs()))
    shape = dataclasses.replace(fit_shape(needs, scene=sets.cfg.num_frames, **sizes), **fixed)
  shape = sets.finished(shape)
  if "frames" not in fixed:
    frames = np.array([n.frames for n in needs], np.int32)
    classes = frame_classes(frames, len(frames), given.batch_size)
    shape_of = functools.partial(cut_shape, shape, frames, classes)
  samples, weights = sets.samples(shape), given.weights or None
  options = {"drop_remainder": False, "epoch_seeds": given.epoch_seeds}
  made = functools.partial(make_dataset, samples, weights=weights, shape_of=shape_of, **options)
  return sum(map(len, sets.records)), made, ""


def _bucketed(sets: _Sets) -> Made:
  """A row is one sample, in the bucket of the least length that holds it; a batch is of one bucket.

  An epoch has as many rows as its batches hold, the empty ones at the end of each bucket included.
  """
  config = sets.config
  if config.input.weights:
    raise InputError("config.input: weights do not go with buckets; accepted: pack, or neither")
  sizes, scene = row_sizes(sets.cfg), sets.cfg.num_frames
  samples = sets.samples(fit_shape([], scene=scene, **sizes))  # a bucket lays rows out
  needs = list(itertools.chain(*sets.needs()))
  buckets = [
    BucketSamples(samples, dataclasses.replace(bucket, shape=sets.finished(bucket.shape)))
    for bucket in make_buckets(
      needs,
      config.input.buckets,
      sizes=sizes,
      scene=scene,
      batch_size=config.input.batch_size,
    )
  ]
  rows = batches_of(buckets, config.input.batch_size) * config.input.batch_size
  plan = digest_of_rows(([b.numbers], b.shape.length) for b in buckets)
  return rows, functools.partial(make_bucketed_dataset, buckets), plan


def _packed(sets: _Sets, failures: Failures) -> Made:
  """A row holds several samples, as a plan made beforehand says.

  Samples of all sets share rows; where the sets have weights, which are shares of rows, each set
  has rows of its own. All rows have one shape.
  """
  config = sets.config
  sizes, scene = row_sizes(sets.cfg), sets.cfg.num_frames
  samples = sets.samples(fit_shape([], scene=scene, **sizes))  # the plan lays rows out
  needs, weights = sets.needs(), config.input.weights or None
  groups = [(list(itertools.chain(*needs)), samples)]
  if weights:
    groups = [(n, [s]) for n, s in zip(needs, samples, strict=True)]

  def planned(budgets: dict[str, int], classes: tuple[int, ...] = ()) -> list[Plan]:
    options = {
      "sizes": sizes,
      "scene": scene,
      "budgets": budgets,
      "seed": config.seed,
      "batch_size": config.input.batch_size,
      "classes": classes,
    }
    plans = []
    for needs, _ in groups:
      key = digest_of("plan 1", list(map(dataclasses.astuple, needs)), config.input.pack, options)
      make = functools.partial(plan_rows, needs, config.input.pack, **options)
      plans.append(kept_plan(kept_path(f"plan-{key}.npz"), make))
    return plans

  names = ("frames", "objects", "object_frames", "clips")
  plans = planned({name: config.input[f"row_{name}"] for name in names})
  if len(plans) > 1:  # again, with budgets that suit all groups
    each = [budgets_of(plan.shape) for plan in plans]
    budgets = {name: max(b[name] for b in each) for name in names if name != "frames"}
    # The usual frames of the set that needs most, and those of its largest rows.
    ends = {max(plan.classes[k] for plan in plans) for k in (0, -1)}
    plans = planned(budgets, tuple(sorted(ends)))
  plans = [dataclasses.replace(plan, shape=sets.finished(plan.shape)) for plan in plans]
  for plan, (needs, _) in zip(plans, groups, strict=True):
    log.info(fill_line(plan, len(needs)))
  counts = [len(needs) for needs, _ in groups]
  firsts = [0, *itertools.accumulate(counts)]
  rows = [
    PackedSamples(s, p, failures, first, sum(counts))
    for (_, s), p, first in zip(groups, plans, firsts, strict=False)
  ]
  plan_digest = digest_of_rows((p.rows, (config.input.pack, budgets_of(p.shape))) for p in plans)
  frames = np.concatenate([plan.frames for plan in plans])
  shape_of = functools.partial(cut_shape, plans[0].shape, frames, plans[0].classes)
  options = {"drop_remainder": False, "epoch_seeds": config.input.epoch_seeds}
  made = functools.partial(make_dataset, rows, weights=weights, shape_of=shape_of, **options)
  return sum(map(len, rows)), made, plan_digest


def feature_caches(config: ConfigDict, records: Sequence[Container]) -> list[FeatureShards]:
  """The caches of `input.features`, one for each set; [] where there are none.

  Raises InputError: not one for each set, sets that are no shards, or a tower that trains.
  """
  paths = config.input.features
  if not paths:
    return []
  if len(paths) != len(records) or not all(isinstance(r, ShardSet) for r in records):
    raise InputError(
      f"config.input.features names {len(paths)} caches for {len(records)} sets; accepted: one for "
      "each of config.input.files, all of them folders of vr data prepare"
    )
  trained = next((o for pattern, o in config.schedule if re.fullmatch(pattern, "img/x")), None)
  if trained is not None:
    raise InputError("config.input.features needs a frozen tower: ('img/.*', None) in schedule")
  caches = [FeatureShards(path) for path in paths]
  with_frames = [cache.path for cache in caches if cache.frames is not None]
  if with_frames and len(with_frames) < len(caches):
    raise InputError(
      f"config.input.features: {len(with_frames)} of {len(caches)} caches hold frame features, "
      f"such as {with_frames[0]}; accepted: all of them, or none"
    )
  return caches


def all_needs(
  records: Container,
  cfg: VideoReferConfig,
  tokenizer: Tokenizer,
  rules: RowRules,
  files: Mapping[str, bytes],
) -> list[Needs]:
  """What each record of a set takes of a row.

  It is kept, beside shards or else among the user's kept files, by the content of the set: of
  700 000 records it takes minutes.
  """
  rest = (sorted(files.items()), rules, cfg.num_frames)
  if isinstance(records, ShardSet):
    kept: Path | None = records.path / f"needs-{digest_of(records.manifest, *rest)}.npy"
  else:
    content = digest_of("needs 1", digest_of_data(records.path), *rest)
    kept = kept_path(f"needs-{content}.npy")
  if kept is not None:
    needs = read_needs(kept)
    if needs is not None and len(needs) == len(records):
      return needs
  needs = [
    record_needs(records[i], i, tokenizer, cfg.num_frames, rules) for i in range(len(records))
  ]
  if kept is not None:
    write_needs(kept, needs)
  return needs


def read_set(path: str, cfg: VideoReferConfig) -> Container:
  """One of `input.files`, whatever container it is, checked to suit the model."""
  records = open_records(path)
  if cfg.img.kind == "navit":
    return records  # crops and scenes of any size; what shards lack is named sample by sample
  records.check_model(cfg.img.image_size, cfg.image_aspect_ratio, cfg.num_frames)
  return records


def row_rules(config: ConfigDict, cfg: VideoReferConfig) -> RowRules:
  """How records become rows, by the config."""
  return RowRules(
    templated=config.input.templated,
    max_text_ids=cfg.max_text_ids,
    aspect_ratio=cfg.image_aspect_ratio,
    mask_rule=config.input.mask_rule,
    masks=config.input.masks,
    single_frame=config.input.single_frame,
    max_mask_frames=config.input.max_mask_frames,
    seed=config.seed,
    cached=bool(config.input.features),
  )


def bench_inputs(
  file: str, model: str, tokenizer: str | None, masks: str
) -> tuple[Container, Tokenizer, dict[str, int], RowRules]:
  """What `vr data bench` times: a file or folder read as a named model needs it."""
  cfg = get_variant(model)
  records = read_set(file, cfg)
  rules = RowRules(aspect_ratio=cfg.image_aspect_ratio, masks=masks, max_text_ids=cfg.max_text_ids)
  return records, Tokenizer.from_folder(tokenizer or VR_MINI), row_sizes(cfg), rules


def row_sizes(cfg: VideoReferConfig) -> dict[str, int]:
  """The sizes of a row that the model decides."""
  return {
    "image_size": cfg.img.image_size,
    "grid": cfg.img.grid,
    "tokens_per_object": cfg.region.tokens,
    "scene_tokens": scene_token_count(cfg.connector, cfg.num_frames, cfg.img.grid),
  }
