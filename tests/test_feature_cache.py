"""Cached object features: the same objects, the same loss, no mask frames; stale ones refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from test_packing import ONE, SIZES
from test_prepare import prepare

from data_pipes.batch import collate
from data_pipes.errors import InputError
from data_pipes.feature_shards import FeatureShards
from data_pipes.packing import PackedSamples, plan_rows
from data_pipes.samples import RowRules, Samples, record_needs
from data_pipes.shards import ShardSet
from data_pipes.tokenizer import Tokenizer
from vr_jax.interop import videorefer as published
from vr_jax.models.videorefer import VideoRefer
from vr_jax.training.feature_cache import make_cache, tower_hash
from vr_jax.training.loss import model_loss

RULES = RowRules()
CACHED = RowRules(cached=True)


@pytest.fixture(scope="module")
def model(golden):
  return published.load(golden / "tiny_videorefer_qwen2")


@pytest.fixture(scope="module")
def folder(golden, model, tmp_path_factory):
  """s: prepared shards; c: their cache."""
  folder = tmp_path_factory.mktemp("features")
  shards = prepare(folder / "s", [golden / "data/train.json"], golden / "media")
  assert make_cache(folder / "c", shards, model.config, model.params, RULES) == len(shards)
  return folder


def test_rows_of_a_cache_give_the_same_loss_without_mask_frames(folder, golden, model):
  shards, cache = ShardSet(folder / "s"), FeatureShards(folder / "c")
  cache.check(tower_hash(model.config, model.params["img"], RULES), len(shards))
  tokenizer = Tokenizer.from_folder(golden / "tiny_videorefer_qwen2")
  direct = Samples(shards, tokenizer, ONE, rules=RULES)
  shape = dataclasses.replace(ONE, frames=16, feature_width=cache.width)
  cached = Samples(shards, tokenizer, shape, rules=CACHED, features=cache)
  rows = [cached[i] for i in range(len(shards))]
  assert "region_masks" not in rows[0]
  assert max(row["frames"].any((1, 2, 3)).sum() for row in rows) <= 16
  needs = [record_needs(shards[i], i, tokenizer, 16, CACHED) for i in range(len(shards))]
  plan = plan_rows(needs, 640, sizes=SIZES, scene=16)
  plan = dataclasses.replace(plan, shape=dataclasses.replace(plan.shape, feature_width=cache.width))
  packed = PackedSamples([cached], plan, None)

  loss = jax.jit(model_loss(VideoRefer(model.config)))
  wanted = loss(model.params, collate([direct[i] for i in range(len(shards))]))
  for found in (rows, [packed[i] for i in range(len(packed))]):
    sums = loss(model.params, collate(found))
    assert int(sums.weight) == int(wanted.weight) > 0
    np.testing.assert_allclose(sums.sum, wanted.sum, rtol=2e-3)  # bfloat16 features


def test_stale_caches_are_refused(folder, golden, model, tmp_path):
  shards, cache = ShardSet(folder / "s"), FeatureShards(folder / "c")
  tower = model.params["img"]
  right = tower_hash(model.config, tower, RULES)
  cache.check(right, len(shards))
  other = jax.tree.map(np.array, tower)
  other["pos_embedding"][0, 0, 0] += 1e-3
  two = dataclasses.replace(model.config.region, tokens=2)
  changed = [
    tower_hash(model.config, other, RULES),
    tower_hash(model.config, tower, RowRules(mask_rule="published")),
    tower_hash(dataclasses.replace(model.config, region=two), tower, RULES),
  ]  # fmt: skip
  for code in changed:
    with pytest.raises(InputError, match=r"is stale: made with tower .*, this run has .*; make it"):
      cache.check(code, len(shards))
  with pytest.raises(InputError, match=r"is stale: found 8 samples, the set has 9"):
    cache.check(right, 9)
  # Another mask mode, and other masks under the same names.
  tokenizer = Tokenizer.from_folder(golden / "tiny_videorefer_qwen2")
  shape = dataclasses.replace(ONE, feature_width=cache.width)
  several = next(i for i in range(len(shards)) if any(len(o) > 1 for o in shards[i].objects))
  single = RowRules(masks="single", cached=True)
  with pytest.raises(InputError, match=rf"is stale: sample {several} has other media or masks"):
    Samples(shards, tokenizer, shape, rules=single, features=cache)[several]
  items = json.loads((golden / "data/train.json").read_text())
  for item in items:
    for by_frame in item.get("annotation") or ():
      for frame in list(by_frame)[:1]:
        by_frame[frame] = {"segmentation": None}
  (tmp_path / "f.json").write_text(json.dumps(items))
  moved = prepare(tmp_path / "s", [tmp_path / "f.json"], golden / "media")
  stale = Samples(moved, tokenizer, shape, rules=CACHED, features=cache)
  changed = [i for i in range(len(moved)) if moved[i].objects]
  assert changed
  for i in changed:
    with pytest.raises(InputError, match=rf"is stale: sample {i} has other media or masks"):
      stale[i]
  with pytest.raises(InputError, match=r"found no features\.json"):
    FeatureShards(tmp_path)
