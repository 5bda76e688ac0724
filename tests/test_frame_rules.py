"""Frame rules against the published values."""

import json

import numpy as np
import pytest

from data_pipes.errors import InputError
from data_pipes.frame_rules import fps_frames, frame_range, grid_frames, uniform_frames


def ids(text: str) -> list[int]:
  return [int(word) for word in text.split()]


def test_published_cases(golden):
  cases = json.loads((golden / "json/frame_sample.json").read_text())
  assert len(cases["uniform"]) > 100
  for case in cases["uniform"]:
    assert uniform_frames(case["duration"], case["num_frames"]).tolist() == case["idx"], case
  for case in cases["fps"]:
    assert fps_frames(case["duration"], case["fps"]).tolist() == case["idx"], case


@pytest.mark.parametrize(
  ("frames", "count", "expected"),
  [
    (150, 16, "5 14 23 33 42 51 61 70 79 88 98 107 116 126 135 144"),
    (150, 8, "9 28 47 65 84 102 121 140"),
    (8, 16, "0 1 1 2 2 2 3 3 4 4 5 5 5 6 6 7"),
    (17, 16, "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16"),
    (9, 8, "1 2 3 4 5 6 7 8"),
    (1, 8, "0 0 0 0 0 0 0 0"),
    (32, 16, "1 3 5 7 9 11 13 15 16 18 20 22 24 26 28 30"),
  ],
)
def test_uniform(frames, count, expected):
  assert uniform_frames(frames, count).tolist() == ids(expected)


@pytest.mark.parametrize(
  ("frames", "fps", "expected"),
  [
    (150, 30, "15 45 75 105 135"),
    (150, 29.97, "14 43 72 101 130"),
    (75, 25, "12 37 62"),
    (20, 30, "10"),
  ],
)
def test_fps(frames, fps, expected):
  assert fps_frames(frames, fps).tolist() == ids(expected)


def test_grid():
  assert grid_frames(150).tolist() == ids(
    "2 7 11 16 21 25 30 35 39 44 49 53 58 63 67 72 76 81 86 90 95 100 104 109 114 118 123 128 "
    "132 137 142 146"
  )
  assert grid_frames(33).tolist() == list(range(32))
  assert grid_frames(32).tolist() == [*range(17), *range(16, 31)]
  assert len(set(grid_frames(8).tolist())) == 8


@pytest.mark.parametrize("frames", [1, 2, 3, 31, 100, 503, 10_000])
@pytest.mark.parametrize("count", [1, 7, 16, 32])
def test_rules_stay_inside_and_ordered(frames, count):
  for chosen in (uniform_frames(frames, count), grid_frames(frames, count)):
    assert len(chosen) == count
    assert chosen.min() >= 0
    assert chosen.max() < frames
    assert (np.diff(chosen) >= 0).all()


@pytest.mark.parametrize(
  ("frames", "fps", "start", "end", "expected"),
  [
    (12, 3, None, None, range(12)),
    (12, 3, 1.0, 3.0, range(2, 9)),
    (12, 3, 3.0, 1.0, range(2, 9)),
    (12, 3, 2.0, 2.0, range(5, 9)),
    (12, 3, -1.0, 1.5, range(4)),
    (40, 10, 0.5, 2.25, range(4, 22)),
    (150, 29.97, 1.0, 2.5, range(28, 74)),
    (12, 3, 2.0, None, range(5, 12)),
    (12, 3, -5.0, None, range(12)),
    (12, 3, None, 100.0, range(12)),
    (12, 3, -3.0, -2.0, range(3)),
  ],
)
def test_range(frames, fps, start, end, expected):
  assert frame_range(frames, fps, start, end) == expected


@pytest.mark.parametrize(
  ("call", "words"),
  [
    (lambda: uniform_frames(0, 8), "no frames"),
    (lambda: uniform_frames(10, 0), "at least 1"),
    (lambda: grid_frames(0), "no frames"),
    (lambda: fps_frames(10, 0.5), "0.5 frames per second"),
    (lambda: fps_frames(10, float("nan")), "frames per second"),
    (lambda: frame_range(12, 3, 60.0, 61.0), "12 frames"),
    (lambda: frame_range(12, 3, None, 0.1), "no frame lies between the beginning and 0.1 s"),
    (lambda: frame_range(12, 3, None, -4.0), "no frame"),
    (lambda: frame_range(12, None, 1.0), "list of frames"),
    (lambda: frame_range(12, 3, float("nan"), 2.0), "start time nan"),
  ],
)
def test_bad_input(call, words):
  with pytest.raises(InputError, match=words) as error:
    call()
  assert "\n" not in str(error.value)
