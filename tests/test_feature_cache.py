"""Cached features of objects and frames: the same loss, no tower; stale ones are refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from test_packing import ONE, SIZES
from test_prepare import prepare
from test_processes import distance

from data_pipes.batch import collate
from data_pipes.errors import InputError
from data_pipes.feature_shards import FeatureShards
from data_pipes.packing import PackedSamples, plan_rows
from data_pipes.samples import RowRules, Samples, record_needs
from data_pipes.shards import ShardSet
from data_pipes.tokenizer import Tokenizer
from data_pipes.video import scene_ids
from vr_jax.checkpoint import export, load_params, make_meta, read_tokenizer_files
from vr_jax.cli import main
from vr_jax.configs import base_config
from vr_jax.interop import videorefer as published
from vr_jax.models.videorefer import VideoRefer
from vr_jax.training.feature_cache import make_cache, make_frame_cache, tower_hash
from vr_jax.training.loop import train
from vr_jax.training.loss import model_loss
from vr_jax.training.metrics import read_metrics
from vr_jax.training.videorefer_task import feature_caches

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


@pytest.fixture(scope="module")
def direct(folder, golden, model):
  """(the jitted loss, what it gives for the samples without a cache)."""
  shards = ShardSet(folder / "s")
  tokenizer = Tokenizer.from_folder(golden / "tiny_videorefer_qwen2")
  samples = Samples(shards, tokenizer, ONE, rules=RULES)
  loss = jax.jit(model_loss(VideoRefer(model.config)))
  return loss, loss(model.params, collate([samples[i] for i in range(len(shards))]))


@pytest.mark.slow
def test_rows_of_a_cache_give_the_same_loss_without_mask_frames(folder, golden, model, direct):
  shards, cache = ShardSet(folder / "s"), FeatureShards(folder / "c")
  cache.check(tower_hash(model.config, model.params["img"], RULES), len(shards))
  tokenizer = Tokenizer.from_folder(golden / "tiny_videorefer_qwen2")
  shape = dataclasses.replace(ONE, frames=16, feature_width=cache.width)
  cached = Samples(shards, tokenizer, shape, rules=CACHED, features=cache)
  rows = [cached[i] for i in range(len(shards))]
  assert "region_masks" not in rows[0]
  assert max(row["frames"].any((1, 2, 3)).sum() for row in rows) <= 16
  needs = [record_needs(shards[i], i, tokenizer, 16, CACHED) for i in range(len(shards))]
  plan = plan_rows(needs, 640, sizes=SIZES, scene=16)
  plan = dataclasses.replace(plan, shape=dataclasses.replace(plan.shape, feature_width=cache.width))
  packed = PackedSamples([cached], plan, None)

  loss, wanted = direct
  for found in (rows, [packed[i] for i in range(len(packed))]):
    sums = loss(model.params, collate(found))
    assert int(sums.weight) == int(wanted.weight) > 0
    np.testing.assert_allclose(sums.sum, wanted.sum, rtol=2e-3)  # bfloat16 features


def test_cached_frames_give_the_same_loss_without_the_tower(
  folder, golden, model, direct, tmp_path, capsys
):
  """By the command, stopped and gone on with."""
  tiny = golden / "tiny_videorefer_qwen2"
  meta = make_meta(model.config.to_dict(), read_tokenizer_files(tiny))
  export(tmp_path / "m", model.params, meta)
  out = tmp_path / "c"
  command = ["data", "features", str(folder / "s"), "--checkpoint", str(tmp_path / "m")]
  command += ["--out", str(out), "--frames"]
  assert main(command) == 0
  shards = ShardSet(folder / "s")
  clips, each = shards.manifest["clips"], 16 * model.config.img.width * 2
  size, made, objects = capsys.readouterr().out.splitlines()
  assert size == (
    f"frame features: {each} bytes a frame; at most {clips * 16 * each / 1e9:.3f} GB for {clips} "
    f"clips of 16 frames, {each * 16 * 700_000 / 1e12:.1f} TB for the 700 000 samples of "
    "VideoRefer-700K"
  )
  unique = {
    (record.path, n)
    for record in shards
    if record.media
    for n in ([0] if record.media == "image" else scene_ids(record.stored, 16))
  }
  assert made == f"{out}: features of {len(unique)} new scene frames"
  assert objects == f"{out}: object features of {len(shards)} samples"

  before = {path.name: path.read_bytes() for path in out.iterdir()}
  (out / "frames-00001-of-00003.npy").unlink()
  with pytest.raises(InputError, match=r"1 of 3 shards of frame features are not there, such as"):
    FeatureShards(out)
  assert main(command) == 0
  assert before == {path.name: path.read_bytes() for path in out.iterdir()}

  cache = FeatureShards(out)
  cache.check(tower_hash(model.config, model.params["img"], RULES), len(shards))
  tokenizer = Tokenizer.from_folder(tiny)
  extra = {"feature_width": cache.width, "frame_features": True}
  shape = dataclasses.replace(ONE, frames=16, **extra)
  cached = Samples(shards, tokenizer, shape, rules=CACHED, features=cache)
  needs = [record_needs(shards[i], i, tokenizer, 16, CACHED) for i in range(len(shards))]
  plan = plan_rows(needs, 640, sizes=SIZES, scene=16)
  plan = dataclasses.replace(plan, shape=dataclasses.replace(plan.shape, **extra))
  packed = PackedSamples([cached], plan, None)
  loss, wanted = direct
  no_tower = {part: params for part, params in model.params.items() if part != "img"}
  sums = loss(no_tower, collate([packed[i] for i in range(len(packed))]))
  assert int(sums.weight) == int(wanted.weight) > 0
  np.testing.assert_allclose(sums.sum, wanted.sum, rtol=2e-3)  # bfloat16 features

  # The same set stored in another way has other pixels, and another tower other features.
  other = prepare(tmp_path / "s", [golden / "data/train.json"], golden / "media", format="png")
  stale = Samples(other, tokenizer, shape, rules=CACHED, features=cache)
  with pytest.raises(InputError, match=r"is stale: frame 0 of .* is another or stored in another"):
    stale[0]
  moved = jax.tree.map(np.array, model.params)
  moved["img"]["pos_embedding"][0, 0, 0] += 1e-3
  with pytest.raises(InputError, match=r"was begun with other settings: tower was .*; use another"):
    make_frame_cache(out, shards, model.config, moved, RULES)
  config = base_config()
  config.schedule = (("img/.*", None), (".*", {}))
  config.input.features = (str(out), str(folder / "c"))
  with pytest.raises(InputError, match=r"1 of 2 caches hold frame features, such as .*; acc"):
    feature_caches(config, [shards, shards])
  with pytest.raises(InputError, match="names 2 caches for 1 sets; accepted: one for each of"):
    feature_caches(config, [shards])
  config.schedule = ((".*", {}),)
  with pytest.raises(InputError, match=r"features needs a frozen tower: \('img/\.\*', None\)"):
    feature_caches(config, [shards, shards])


@pytest.mark.slow
@pytest.mark.parametrize("frames", [False, True])
def test_training_from_the_cache_ends_as_training_without(folder, golden, model, tmp_path, frames):
  """By the commands: vr data features, then vr train with and without input.features."""
  tiny = golden / "tiny_videorefer_qwen2"
  meta = make_meta(model.config.to_dict(), read_tokenizer_files(tiny))
  export(tmp_path / "m", model.params, meta)
  shards, cache = str(folder / "s"), str(tmp_path / "c")
  command = ["data", "features", shards, "--checkpoint", str(tmp_path / "m"), "--out", cache]
  assert main([*command, "--frames"] if frames else command) == 0
  runs = []
  for name, features in (("without", ()), ("with", (cache,))):
    config = base_config()
    config.model_init = (("", str(tmp_path / "m")),)
    config.input.files, config.input.features = (shards,), features
    config.input.batch_size, config.total_steps, config.log_steps = 8, 4, 1
    config.lr = 1e-3
    config.schedule = (("img/.*", None), (".*", {"decay": "constant"}))
    assert train(config, tmp_path / name).finished
    losses = [m["loss"] for m in read_metrics(tmp_path / name)]
    runs.append((losses, load_params(tmp_path / name)))
  (wanted, ours), (found, theirs) = runs
  assert len(wanted) == 4
  assert wanted[-1] < wanted[0] - 0.1
  np.testing.assert_allclose(found, wanted, rtol=2e-3)  # features are kept in bfloat16
  trained = ("connector", "region", "llm")
  start, ours, theirs = ({k: tree[k] for k in trained} for tree in (model.params, ours, theirs))
  assert distance(ours, theirs) < 0.05 * distance(ours, start)


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
  assert changed[0].frames != right.frames
  assert changed[1].frames == changed[2].frames == right.frames
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
