"""Shards and caches made before the rooms were rebuilt: read, and gone on with to the same bytes.

`old/data/prepared.zip` was written by commit 06b30db's code, run in the folder that it unpacks to:

    items.json, media/        four items: two on one clip of four frames, an image, a medium that
                              is not there
    shards/                   `vr data prepare`, to its end; and the needs of its samples
    interrupted/              the same, killed after the first clip of the shard
    features/                 `FeatureShards` with the features of frames
    features_interrupted/     the same, killed after the first of two shards of frames
"""

import zipfile
from pathlib import Path

import numpy as np
import pytest

from data_pipes.feature_shards import (
  FeatureShards,
  FrameFeaturesWriter,
  TowerHash,
  frame_key,
  sample_key,
  scene_numbers,
)
from data_pipes.packing import plan_rows, read_needs
from data_pipes.samples import RowRules, record_needs
from data_pipes.shards import ShardSet
from data_pipes.tokenizer import Tokenizer
from vr_jax.cli import main

SCENE = 4
PREPARE = ["--media", "media", "--shards", "1", "--scene-frames", "4", "--size", "32"]


@pytest.fixture
def old(tmp_path, monkeypatch):
  """The unpacked folder, and the place where the code runs: its settings name files beside it."""
  with zipfile.ZipFile(Path(__file__).parent / "old/data/prepared.zip") as archive:
    archive.extractall(tmp_path)
  monkeypatch.chdir(tmp_path)
  return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
  files = (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("needs-"))
  return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def test_shards_are_read(old):
  shards = ShardSet("shards")
  assert [shards[i].id for i in range(len(shards))] == ["a", "b", "c"]
  clip = shards[0].stored
  assert clip.stored() == [0, 1, 2, 3]
  frames = clip.frames([3, 0])
  assert [f.shape for f in frames] == [(32, 32, 3)] * 2
  assert (frames[0] != frames[1]).any()


def test_an_interrupted_run_goes_on_to_the_bytes_of_a_whole_one(old, capsys):
  assert (old / "interrupted/journals/00000").stat().st_size > 0
  before = contents(old / "shards")
  assert main(["data", "prepare", "items.json", *PREPARE, "--out", "interrupted"]) == 0
  assert contents(old / "interrupted") == before
  assert main(["data", "prepare", "items.json", *PREPARE, "--out", "fresh"]) == 0
  assert contents(old / "fresh") == before


def test_a_run_of_other_settings_is_refused(old, capsys):
  assert main(["data", "prepare", "items.json", *PREPARE, "--size", "16", "--out", "shards"]) == 2
  assert "begun with other settings: size was 32, is 16" in capsys.readouterr().err


def test_the_needs_of_samples_are_those_of_today(old, golden):
  tokenizer, shards = Tokenizer.from_folder(golden / "tiny_videorefer_qwen2"), ShardSet("shards")
  (path,) = (old / "shards").glob("needs-*.npy")
  needs = read_needs(path)
  count = range(len(shards))
  assert needs == [record_needs(shards[i], i, tokenizer, SCENE, RowRules()) for i in count]
  sizes = {"image_size": 32, "grid": 2, "tokens_per_object": 4, "scene_tokens": 8}
  plan = plan_rows(needs, 256, sizes=sizes, scene=SCENE)
  assert sorted(np.concatenate(plan.rows)) == list(count)


def test_cached_features_are_read(old):
  shards, cache = ShardSet("shards"), FeatureShards("features")
  cache.check(TowerHash(frames="t1", objects="t0"), len(shards))
  for i in range(len(shards)):
    record = shards[i]
    tokens, kept = cache.get(i, sample_key(record, RowRules().objects(record, i)))
    assert tokens.shape == (len(record.objects), 2, 3)
    assert (tokens == i + 0.5).all()
    assert kept.all()
  clip = cache.frames.clip(shards[0].stored, False, SCENE)
  assert [clip.frames[n][0, 0] for n in clip.scene] == [0, 1, 2, 3]


def test_an_interrupted_cache_of_frames_goes_on(old):
  shards, folder = ShardSet("shards"), old / "features_interrupted"
  index = {"tower": "t1", "patches": 4, "width": 3, "scene": SCENE, "set": "s", "shards": 2}
  writer = FrameFeaturesWriter(folder, index)
  assert writer.left() == [1]
  still = next(shards[i] for i in range(len(shards)) if shards[i].media == "image").stored
  numbers = dict.fromkeys(scene_numbers(still, True, SCENE))
  writer.write(1, [(frame_key(still, n), np.full((4, 3), 10 + n, np.float32)) for n in numbers])
  whole = {k: v for k, v in contents(old / "features").items() if k.startswith("frames")}
  assert contents(folder) == whole
