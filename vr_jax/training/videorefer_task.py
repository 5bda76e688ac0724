"""Training VideoRefer on annotation files in the published format."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict

from data_pipes.batch import RowShape, fit_shape
from data_pipes.errors import InputError
from data_pipes.loader import Failures, make_dataset, prefetched
from data_pipes.records import Record, RecordFile
from data_pipes.samples import RowRules, Samples, record_needs
from data_pipes.shards import ShardSet
from data_pipes.tokenizer import Tokenizer
from vr_jax.models.connector import scene_token_count
from vr_jax.models.videorefer import VideoRefer, VideoReferConfig, init_params
from vr_jax.training.checkpoint import make_tokenizer
from vr_jax.training.loss import model_loss
from vr_jax.training.start import generation, model_config, starting_params, tokenizer_files
from vr_jax.training.task import Rows, Task


def videorefer_task(config: ConfigDict) -> Task:
  """The task of `config.task = "videorefer"`.

  Raises:
    InputError: no files, files or weights that do not fit, an unknown variant or field.
  """
  cfg = model_config(config)
  files = tokenizer_files(config)
  tokenizer = make_tokenizer(files)
  if max(len(tokenizer) - 1, tokenizer.region_id) >= cfg.llm.vocab_size:
    raise InputError(
      f"the tokenizer has {len(tokenizer)} ids, the model's vocabulary {cfg.llm.vocab_size}"
    )
  if not config.input.files:
    raise InputError("config.input.files is empty; give at least one annotation file")
  records = [read_set(path, config, cfg) for path in config.input.files]
  rules = RowRules(
    templated=config.input.templated,
    max_text_ids=cfg.max_text_ids,
    aspect_ratio=cfg.image_aspect_ratio,
    mask_rule=config.input.mask_rule,
    masks=config.input.masks,
    single_frame=config.input.single_frame,
    max_mask_frames=config.input.max_mask_frames,
    seed=config.seed,
  )
  shape = row_shape(config, cfg, records, tokenizer, rules)
  samples = [
    Samples(r, tokenizer, shape, media_root=config.input.media, rules=rules) for r in records
  ]
  failures = Failures(config.input.max_unreadable)
  size = sum(len(r) for r in records)

  def batches(position: int, total_steps: int) -> Iterator[Rows]:
    # Whole epochs end with them: empty rows fill the last batch, not samples of one epoch more.
    epochs = config.total_epochs or total_steps * config.input.batch_size / size
    dataset = make_dataset(
      samples,
      batch_size=config.input.batch_size,
      seed=config.seed,
      drop_remainder=False,
      shuffle=config.input.shuffle,
      epochs=None if config.input.weights else math.ceil(epochs),
      weights=config.input.weights or None,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      failures=failures,
    )
    return prefetched(dataset[:total_steps], position, threads=config.input.threads)

  return Task(
    init=lambda key: init_params(cfg, key),
    loss=model_loss(VideoRefer(cfg), config.loss_budget, config.loss_chunk),
    data_size=size,
    batches=batches,
    model=cfg.to_dict(),
    start=lambda shapes: starting_params(config, shapes),
    tokenizer_files=files,
    generation=generation(config, tokenizer),
    counts=lambda: {"unreadable": len(failures)},
  )


def read_set(path: str, config: ConfigDict, cfg: VideoReferConfig) -> RecordFile | ShardSet:
  """One of `input.files`: an annotation file, or a folder that `vr data prepare` has filled."""
  if not Path(path).is_dir():
    return RecordFile(path)
  shards = ShardSet(path)
  shards.check_model(cfg.img.image_size, cfg.image_aspect_ratio, cfg.num_frames)
  return shards


def row_shape(
  config: ConfigDict,
  cfg: VideoReferConfig,
  records: Sequence[Sequence[Record] | RecordFile],
  tokenizer: Tokenizer,
  rules: RowRules,
) -> RowShape:
  """The static shape of a row: `input.row_*` where set, else what the largest record needs.

  Where one of them is 0, every record's text is read once (not its media).
  """
  fixed = {
    name: config.input[f"row_{name}"]
    for name in ("frames", "objects", "object_frames", "length")
    if config.input[f"row_{name}"]
  }
  sizes = {
    "image_size": cfg.img.image_size,
    "grid": cfg.img.grid,
    "tokens_per_object": cfg.region.tokens,
    "scene_tokens": scene_token_count(cfg.connector, cfg.num_frames, cfg.img.grid),
  }
  if len(fixed) == 4:
    return RowShape(scene=cfg.num_frames, **fixed, **sizes)
  needs = (
    record_needs(file[i], i, tokenizer, cfg.num_frames, rules)
    for file in records
    for i in range(len(file))
  )
  return dataclasses.replace(fit_shape(needs, scene=cfg.num_frames, **sizes), **fixed)
