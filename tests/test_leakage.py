"""Copies of benchmark videos are dropped, and what is no copy is kept."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from data_pipes.engine.quality import duplicates

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def leakage():
  sys.path.insert(0, str(ROOT / "benchmarks"))
  try:
    import leakage
  finally:
    sys.path.pop(0)
  return leakage


def test_pictures_are_alike_whatever_their_brightness_and_not_by_light_and_dark_alone():
  rng = np.random.default_rng(0)
  picture = rng.integers(40, 200, (16, 16, 3)).astype(np.uint8)
  assert duplicates.are_alike(picture, (picture * 0.6 + 40).astype(np.uint8))
  assert not duplicates.are_alike(picture, picture[:, ::-1])
  assert not duplicates.are_alike(picture, 255 - picture)
  black = np.zeros_like(picture)
  assert duplicates.are_alike(black, black)


def test_scenes_with_near_hashes_are_no_copies(leakage):
  """These two drop each other by their hashes alone."""
  pair = [{"kind": "scene", "seed": 1_000_005}, {"kind": "scene", "seed": 1_000_033}]
  assert leakage.drops(pair, []) == {}
  assert leakage.drops(pair[:1] * 2, []) == {
    "scene 1000005": "near-duplicate: like scene 1000005 (distance 0)"
  }


@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_unlike_clips_are_kept(leakage, count):
  listed = json.loads(leakage.LIST.read_text())
  assert len(listed["clips"]) == 200
  clips = listed["clips"][:count]
  others = listed["benchmark"][: max(20, count // 2)]
  assert len(leakage.drops(clips, others)) <= 0.01 * count


def test_cuts_of_a_benchmarks_video_are_dropped(leakage, tmp_path):
  """Pictures as natural as noise gets, that move; a cut of each kind of copy."""
  folder = tmp_path / "benchmark"
  folder.mkdir()
  video = leakage.open_video(leakage.field(7, frames=60, size=96))
  leakage.copy_cut(folder / "held_out.mp4", video, 0, 60, "re-encoded")
  counts = leakage.recall(folder, cuts=4)
  assert counts == {(change, True): 1 for change in leakage.CHANGES}
