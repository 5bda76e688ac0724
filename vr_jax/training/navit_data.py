"""Training rows of the models whose tower reads pictures of any size."""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from data_pipes.errors import InputError
from data_pipes.failures import Failures
from data_pipes.loader import make_dataset
from data_pipes.navit_packing import NavitPlan, NavitRows, NavitSamples, plan_navit_rows
from data_pipes.navit_prompts import IMAGE_TOKEN, REGION_TOKEN, special_id
from data_pipes.navit_rows import Ids
from data_pipes.navit_samples import NavitRules
from data_pipes.object_crops import CROP_RULES
from data_pipes.packing import digest_of_rows
from data_pipes.records import Container
from data_pipes.tokenizer import Tokenizer
from vr_jax.models.costs import decoder_flops, picture_flops
from vr_jax.models.videorefer import VideoReferConfig
from vr_jax.training.task import Rows

log = logging.getLogger(__name__)


def navit_rules(config: ConfigDict, cfg: VideoReferConfig) -> NavitRules:
  """How records become samples, by the model and the config."""
  return NavitRules(
    crop=CROP_RULES[cfg.region.kind],
    tokens=cfg.region.tokens,
    max_length=cfg.img.max_tokens,
    max_frames=cfg.num_frames,
    max_ids=cfg.max_text_ids,
    published=config.input.mask_rule == "published",
  )


def navit_ids(cfg: VideoReferConfig, tokenizer: Tokenizer) -> Ids:
  """Ids of the visual tokens. Raises InputError: the model has no row for one of them."""
  ids = Ids(
    special_id(tokenizer, IMAGE_TOKEN), special_id(tokenizer, REGION_TOKEN), cfg.region.tokens
  )
  if max(ids.image, ids.region) >= cfg.llm.vocab_size:
    raise InputError(
      f"the tokenizer's {REGION_TOKEN} is id {ids.region}, the model's vocabulary "
      f"{cfg.llm.vocab_size}"
    )
  return ids


def navit_dataset(
  config: ConfigDict,
  cfg: VideoReferConfig,
  records: Sequence[Container],
  tokenizer: Tokenizer,
  failures: Failures,
) -> tuple[int, Callable[..., Any], str]:
  """Packed rows of `input.pack` slots: how many an epoch has, the dataset, by how it is run, and a
  digest of which samples share rows.

  As published, a row's samples see themselves alone. Where the sets have weights, which are shares
  of rows, each set has rows of its own.

  Raises InputError: rows that are not packed, weights, or samples that do not fit.
  """
  given = config.input
  if not given.pack or given.buckets or given.row_length or given.features or given.weights:
    raise InputError(
      "config.input: pictures of any size come in packed rows of one mix; accepted: pack=SLOTS, "
      "and no buckets, row_length, features or weights"
    )
  rules, ids = navit_rules(config, cfg), navit_ids(cfg, tokenizer)
  sets = [NavitSamples(r, tokenizer, rules, given.media) for r in records]
  plan = plan_navit_rows(
    sets,
    given.pack,
    merge=cfg.img.merge,
    tokens_per_object=cfg.region.tokens,
    failures=failures,
    seed=config.seed,
  )
  log.info(plan_line(plan))
  rows = NavitRows(sets, plan, ids, failures)
  options = {"drop_remainder": False, "epoch_seeds": given.epoch_seeds}
  made = functools.partial(make_dataset, [rows], **options)
  sizes = (plan.shape.length, plan.shape.patches, plan.shape.tower_rows)
  return len(rows), made, digest_of_rows([(plan.rows, sizes)])


def plan_line(plan: NavitPlan) -> str:
  """How full the rows are, for the log."""
  shape, samples = plan.shape, sum(map(len, plan.rows))
  return (
    f"{samples} samples in {len(plan.rows)} packed rows: {plan.fill['length']:.1%} of "
    f"{shape.length} slots, {plan.fill['patches']:.1%} of {shape.tower_rows} x {shape.patches} "
    "patches"
  )


def navit_work_of(rows: Rows, cfg: VideoReferConfig, trained: Sequence[str]) -> tuple[int, int]:
  """Text and visual slots of host rows [B, ...], and the FLOPs that a step needs for them."""
  flops = 0
  for b in range(len(rows["tokens"])):
    pictures = np.bincount(rows["patch_segments"][b][rows["patch_segments"][b] >= 0])
    tower = sum(picture_flops(cfg.img, int(n)) for n in pictures)
    lifted = int((rows["scene_frame"][b] >= 0).sum() + (rows["visual"][b] >= 0).sum())
    mlp = 2 * lifted * (cfg.img.width + cfg.connector.width) * cfg.connector.width
    text = 0
    for number in range(int(rows["segments"][b].max(initial=-1)) + 1):
      slots = rows["segments"][b] == number
      text += decoder_flops(cfg.llm, int(slots.sum()), int(rows["supervised"][b][slots].sum()))
    frozen = {"connector", "region"}.isdisjoint(trained)
    flops += tower * (3 if "img" in trained else 1) + mlp * (1 if frozen else 3)
    flops += text * (3 if "llm" in trained else 2)
  return int(rows["valid"].sum()), flops
