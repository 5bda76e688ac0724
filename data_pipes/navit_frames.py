"""Which frames VideoRefer's successors look at, and the times that they are told.

Two published loaders choose other frames and other times of the same clip, and one model meets
both: PixelRefer was trained on the "ids" rule and evaluated on the "filter" rule. Source:
`load_video_from_ids`, `load_video` and `load_video_from_specific_ids` of mm_utils.py.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from data_pipes.errors import InputError
from data_pipes.frame_rules import frame_range
from data_pipes.video import FOLDER_FPS, Video

MAX_FRAMES = 768  # of a scene when answering
TRAINING_FRAMES = 180
FRAME_RULES = ("filter", "ids")


class Scene(NamedTuple):
  """Frames of a scene.

  Attributes:
    ids: presented frames by number, for `Video.frames`; a number may come twice.
    times: seconds that the prompt names, one a frame. Those of the filter rule are numpy numbers:
      they round otherwise than Python's (0.35 to 0.4, not 0.3), as published.
  """

  ids: list[int]
  times: Sequence[float]


def scene_frames(
  video: Video,
  fps: float | None = 1.0,
  max_frames: int = MAX_FRAMES,
  start: float | None = None,
  end: float | None = None,
  rule: str = "filter",
) -> Scene:
  """The frames of a scene between `start` and `end` seconds.

  Args:
    fps: frames a second; None for `max_frames` in equal steps.
    rule: "filter", FFmpeg's fps filter with round=down, for files that FFmpeg decodes; "ids", every
      n-th frame. Folders, GIFs, frames in memory, ranges under a second and clips shorter than a
      step are read by the ids rule, as published (but for the clips, which fail there).

  Raises InputError: a setting that is no number above 0, or a range without frames.
  """
  if rule not in FRAME_RULES:
    raise InputError(f"frame rule {rule!r}; accepted: {', '.join(FRAME_RULES)}")
  if fps is not None and not (math.isfinite(fps) and fps > 0):
    raise InputError(f"{fps} frames a second; accepted: a number above 0, or none")
  if max_frames < 1:
    raise InputError(f"at most {max_frames} frames; accepted: 1 or more")
  short = start is not None and end is not None and end - start < 1
  if rule == "filter" and video.kind == "video" and video.pts([0]) is not None and not short:
    scene = _filtered(video, fps, max_frames, start, end)
    if scene.ids:
      return scene
  if video.kind == "image":
    return Scene([0], [0.0])
  rate = video.fps or FOLDER_FPS  # frames in memory count as those of a folder do
  candidates = frame_range(len(video), rate, start, end)
  ids = [candidates[i] for i in step_frames(len(candidates), rate, fps, max_frames)]
  return Scene(ids, [i / rate for i in ids])


def annotated_frames(video: Video, objects: Iterable[Iterable[int]]) -> Scene:
  """PixelRefer-Lite: every frame on which an object is annotated, once, in order of time."""
  ids = sorted(set(itertools.chain.from_iterable(objects)))
  return Scene(ids, [i / (video.fps or FOLDER_FPS) for i in ids])


def step_frames(frames: int, video_fps: float, fps: float | None, max_frames: int) -> list[int]:
  """The ids rule: positions among `frames` candidates.

  The middle frame of every step of whole frames, while the clip is shorter than `max_frames`
  *seconds* (published); else, and where a step is less than a frame, `max_frames` in equal steps,
  rounded down, or all frames where there are no more.
  """
  if frames < 1:
    raise InputError("the video has no frames")
  if fps is not None and frames / video_fps < max_frames:
    step = int(min(video_fps // fps, frames))
    if step:
      return list(range(step // 2, frames, step))
  return _spread(frames, max_frames)


def _spread(frames: int, count: int) -> list[int]:
  if frames <= count:
    return list(range(frames))
  return np.linspace(0, frames - 1, count, dtype=int).tolist()


def _filtered(
  video: Video, fps: float | None, max_frames: int, start: float | None, end: float | None
) -> Scene:
  """The filter rule; no frames where the clip ends within its first step.

  The filter gives step n the last frame that begins before n + 1 steps, and nothing to a step that
  the clip does not fill. The time told is the beginning of the step.
  """
  stamps = video.pts(range(len(video)))
  seconds = video.times
  assert stamps is not None
  assert seconds is not None
  unit = stamps[1]
  shown = np.asarray(stamps[0], np.int64)
  step = max(1, round(1 / (Fraction(video.fps or FOLDER_FPS) * unit)))
  over = np.append(shown, shown[-1] + step)  # when each frame and the clip are over, in ticks
  first = float(shown[0] * unit)  # as the container states it
  zero = round(shown[0] - seconds[0] / float(unit))  # where players begin to count
  length = float((over[-1] - zero) * unit)

  begin = first if start is None else max(first, start)
  if start is not None:
    length -= begin - start
  if end is not None:
    length = min(length, end - begin)
  low, high = 0, len(shown)
  if start is not None or end is not None:
    # FFmpeg seeks from where players begin to count.
    zero += round(Fraction(round(begin * 10**6), 10**6) / unit)
    low, high = np.searchsorted(shown - zero, [0, round(length / float(unit))])
    if low >= high:
      raise InputError(f"{video.name}: no frame lies between {begin:g} s and {begin + length:g} s")
  if fps is None:
    numbers = np.arange(low, high)
    times = np.linspace(begin, begin + length, len(numbers))
  else:
    rate = Fraction(fps).limit_denominator(1001000)  # as FFmpeg reads it
    scale = unit * rate
    # The number of the step in which each frame begins, and in which the part ends.
    steps = (over[low : high + 1] - zero) * scale.numerator // scale.denominator
    numbers = np.searchsorted(steps[:-1], np.arange(max(0, steps[-1])), side="right") - 1 + low
    numbers = np.maximum(numbers, low)  # before a picture that comes late, the picture itself
    times = begin + np.arange(len(numbers)) / fps
  kept = _spread(len(numbers), max_frames) if len(numbers) else []
  return Scene(numbers[kept].tolist(), [times[i] for i in kept])
