"""Which frames of a video are looked at: the published rules, to the last rounding.

Frame numbers are 0-based presented frames. The rules give positions among `frames` candidates; a
time range first narrows the video to such candidates (`frame_range`).
Source: VideoRefer, videorefer/mm_utils.py (`frame_sample`, `process_video`, `process_video_old`).
"""

import math

import numpy as np

from data_pipes.errors import InputError

MAX_FRAMES = 32  # of a scene, in the published script
GRID_FRAMES = 32  # frames that VideoRefer-700K and VideoRefer-Bench annotate


def uniform_frames(frames: int, count: int) -> np.ndarray:
  """Uniform rule: the middles of `count` equal segments of frames-1, int64 [count].

  Rounded half to even after adding 1e-6, so x.5 goes up. Short videos repeat frames.
  """
  _check_count(frames, count)
  segment = float(frames - 1) / count
  i = np.arange(count)
  return np.round((segment * i + segment * (i + 1)) / 2 + 1e-6).astype(np.int64)


def fps_frames(frames: int, fps: float) -> np.ndarray:
  """fps rule: one frame a second, from the middle of the first second on, int64 [k]."""
  _check_count(frames, 1)
  if not fps >= 1:
    raise InputError(
      f"one frame a second cannot be taken at {fps:g} frames per second; at least 1 is needed, "
      "or give a number of frames"
    )
  step = int(min(fps // 1, frames))
  return np.arange(step // 2, frames, step, dtype=np.int64)


def grid_frames(frames: int, count: int = GRID_FRAMES) -> np.ndarray:
  """Mask grid rule: the frames of the whole video that the published sets annotate, int64 [count].

  Older than the uniform rule and different from it: the ends of each segment are rounded (half to
  even) before their middle is taken, downwards. Short videos repeat frames.
  """
  _check_count(frames, count)
  segment = float(frames - 1) / count
  ends = np.round(segment * np.arange(count + 1)).astype(np.int64)
  return (ends[:-1] + ends[1:]) // 2


def frame_range(
  frames: int, fps: float | None, start: float | None = None, end: float | None = None
) -> range:
  """Candidate frames between two times in seconds, both ends included; None is open.

  With both given, negatives become 0, start > end is swapped and start == end takes one second.
  Raises InputError where no frame is left, such as a range that begins past the end.
  """
  if start is None and end is None:
    return range(frames)
  for name, time in (("start", start), ("end", end)):
    if time is not None and not math.isfinite(time):
      raise InputError(f"{name} time {time} is not a number of seconds")
  if fps is None:
    raise InputError("a list of frames or an image has no times: leave out start and end")
  low, high = start, end
  if low is not None and high is not None:
    low, high = sorted((max(low, 0.0), max(high, 0.0)))
    if low == high:
      high = low + 1
  first = 0 if low is None else max(int(low * fps) - 1, 0)
  last = frames - 1 if high is None else min(int(high * fps) - 1, frames - 1)
  if first > last:
    raise InputError(
      f"no frame lies between {'the beginning' if start is None else f'{start:g} s'} and "
      f"{'the end' if end is None else f'{end:g} s'}: the video has {frames} frames, "
      f"{frames / fps:.3g} s at {fps:g} frames per second"
    )
  return range(first, last + 1)


def _check_count(frames: int, count: int) -> None:
  if frames < 1:
    raise InputError("the video has no frames")
  if count < 1:
    raise InputError(f"number of frames {count}; at least 1 is needed")
