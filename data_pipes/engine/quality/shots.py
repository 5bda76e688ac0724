"""Shot cuts, still clips, and perceptual hashes of frames.

Trackers must never cross a cut, so the cut detector is set to find too many rather than too few.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from PIL import Image

from data_pipes.video import Video

WIDTH = 256  # of the frames that are looked at, pixels


@dataclass(frozen=True)
class Shot:
  """Frames [start, end) of a video and their mean absolute change, in grey levels of 255."""

  start: int
  end: int
  motion: float


def find_shots(video: Video, adaptive_threshold: float = 3.0, min_content: float = 15.0):
  """Cuts by PySceneDetect's AdaptiveDetector, which compares a frame's change with its neighbours'.

  Returns the shots, in order and without gaps.
  """
  from scenedetect import FrameTimecode
  from scenedetect.detectors import AdaptiveDetector

  detector = AdaptiveDetector(
    adaptive_threshold=adaptive_threshold, min_content_val=min_content, min_scene_len=1
  )
  cuts, change, last = [], [0.0], None
  fps = video.fps or 25.0
  for number, frame in enumerate(small_frames(video)):
    scenes = detector.process_frame(FrameTimecode(number, fps=fps), frame[..., ::-1].copy())
    cuts += [cut.frame_num for cut in scenes]
    grey = frame.mean(-1, dtype=np.float32)
    if last is not None:
      change.append(float(np.abs(grey - last).mean()))
    last = grey
  edges = [0, *sorted(set(cuts) - {0}), len(video)]
  return [
    Shot(a, b, float(np.mean(change[a + 1 : b])) if b - a > 1 else 0.0) for a, b in pairwise(edges)
  ]


def small_frames(video: Video, width: int = WIDTH, block: int = 512) -> Iterable[np.ndarray]:
  """All frames at `width` pixels, uint8 [h, width, 3], a block of them in memory."""
  for first in range(0, len(video), block):
    numbers = range(first, min(first + block, len(video)))
    yield from video.frames(numbers, lambda frame: shrink(frame, width))


def shrink(frame: np.ndarray, width: int) -> np.ndarray:
  """The frame at most `width` pixels wide, by area averages."""
  height = max(1, round(frame.shape[0] * width / frame.shape[1]))
  if frame.shape[1] <= width:
    return frame
  return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BOX))


def split_long(shots: Sequence[Shot], longest: int) -> list[Shot]:
  """Shots longer than `longest` frames in equal parts."""
  out = []
  for shot in shots:
    parts = -(-(shot.end - shot.start) // longest)
    edges = np.linspace(shot.start, shot.end, parts + 1).round().astype(int).tolist()
    out += [Shot(a, b, shot.motion) for a, b in pairwise(edges)]
  return out


_COSINES = np.cos(np.pi / 32 * (np.arange(32) + 0.5) * np.arange(8)[:, None])


def perceptual_hash(frame: np.ndarray) -> int:
  """64 bits: which low DCT frequencies of the grey 32x32 frame lie above their median.

  Equal or nearly so (Hamming distance) after re-encoding, scaling and brightening; the mirrored
  frame has another hash.
  """
  grey = Image.fromarray(frame).convert("L").resize((32, 32), Image.Resampling.BOX)
  low = _COSINES @ np.asarray(grey, np.float64) @ _COSINES.T
  bits = (low > np.median(low.reshape(-1)[1:])).reshape(-1)
  return int(sum(1 << i for i in np.flatnonzero(bits)))
