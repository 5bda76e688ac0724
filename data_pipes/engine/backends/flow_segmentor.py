"""The embedded Segmentor: a colour or a motion of its own, GrabCut, and optical flow.

It needs no weights and knows no nouns. A phrase with a colour word ("red ball") takes the region of
that colour that stands out most; any other noun takes what moves against the background. Good
enough to run and test the whole engine on the embedded set; on real videos expect spill, lost limbs
and wrong objects: never train on its masks.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipes.engine.quality.colours import NAMES, colour_word, name_pixels
from data_pipes.engine.quality.masks import iou
from data_pipes.engine.quality.opencv import opencv
from data_pipes.engine.quality.shots import shrink
from data_pipes.engine.roles import Clip, Context, Track

VERSION = 1
_CACHE_BYTES = 256 << 20


class FlowSegmentor:
  """Seeded GrabCut on one frame, its mask carried along by DIS optical flow both ways in time.

  Args:
    width: pixels at which frames are worked on.
    most: objects of one noun.
    cycle: track out and back, and score how much of the mask is found again (twice the work).
  """

  computes = True

  def __init__(self, context: Context, width: int = 480, most: int = 1, cycle: bool = True):
    self.width, self.most, self.cycle = width, most, cycle

  @staticmethod
  def identity(options: Mapping[str, Any], context: Context) -> dict[str, Any]:
    cv2 = opencv()
    return {"backend": f"builtin flow@{VERSION}", "opencv": cv2.__version__, "options": options}

  def tracks(self, clip: Clip, noun: str, frames: Sequence[int]) -> list[Track]:
    small = clip.open().frames(range(clip.frames), lambda frame: shrink(frame, self.width))
    colour = colour_word(noun)
    carrier = _Carrier(small, colour)
    start, boxes = _propose(small, colour)
    out = []
    for box, score in boxes[: self.most]:
      seed = _grabcut(small[start], box, colour)
      if not seed.any():
        continue
      masks = carrier.carry(start, seed)
      scores = {"cycle_iou": round(carrier.cycle(masks, start), 4)} if self.cycle else {}
      scale = clip.width / small[0].shape[1]
      x1, y1, x2, y2 = (round(float(v) * scale, 1) for v in box)
      full = {n: _resize(masks[n], clip.height, clip.width) for n in frames}
      out.append(
        Track(full, {"frame": start, "box": [x1, y1, x2, y2], "score": round(score, 4)}, scores)
      )
    return out


class _Carrier:
  """Carries masks from frame to frame; remembers flow and colours while they fit into memory."""

  def __init__(self, frames: list[np.ndarray], colour: str | None):
    self.frames, self.colour = frames, colour
    height, width = frames[0].shape[:2]
    fits = len(frames) * height * width * 9 <= _CACHE_BYTES
    self._flow = functools.cache(self._find_flow) if fits else self._find_flow
    self._match = functools.cache(self._find_match) if fits else self._find_match

  def _find_flow(self, a: int, b: int) -> np.ndarray:
    return _flow(self.frames[a], self.frames[b]).astype(np.float16)

  def _find_match(self, n: int) -> np.ndarray:
    assert self.colour is not None
    return _of_colour(self.frames[n], self.colour)

  def carry(self, start: int, seed: np.ndarray) -> dict[int, np.ndarray]:
    """The mask on every frame, from `start` forwards and backwards."""
    masks = {start: seed}
    for step in (1, -1):
      n = start
      while 0 <= n + step < len(self.frames):
        masks[n + step] = self.next_mask(n, n + step, masks[n])
        n += step
    return masks

  def cycle(self, masks: Mapping[int, np.ndarray], start: int) -> float:
    """Tracks back from each end of the span on which it is seen; the worse IoU at the start."""
    worst = 1.0
    for step in (1, -1):
      end = start
      while end + step in masks and masks[end + step].any():
        end += step
      mask = masks[end]
      for n in range(end, start, -step):
        mask = self.next_mask(n, n - step, mask)
      worst = min(worst, iou(mask, masks[start]))
    return worst

  def next_mask(self, a: int, b: int, mask: np.ndarray) -> np.ndarray:
    """The mask of frame `a` carried to frame `b`."""
    cv2 = opencv()
    if not mask.any():
      return mask
    back = self._flow(b, a).astype(np.float32)
    height, width = mask.shape
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    moved = cv2.remap(
      mask.astype(np.float32), x + back[..., 0], y + back[..., 1], cv2.INTER_LINEAR, borderValue=0
    )
    carried = moved > 0.5
    if not self.colour:
      return carried
    # A plain thing on a plain ground gives flow little to hold on to: its colour does.
    near = cv2.dilate(carried.astype(np.uint8), np.ones((3, 3), np.uint8), iterations=3)
    return (self._match(b) & near).astype(bool)


def _propose(small: list[np.ndarray], colour: str | None):
  """The frame to start from and its (box, score), best first."""
  tried = sorted({int(len(small) * share) for share in (0.5, 0.25, 0.75, 0.1, 0.9)})
  found: list[tuple[float, int, int, list]] = []
  for n in tried:
    if colour:
      boxes = _colour_boxes(small[n], colour)
    else:
      boxes = _motion_boxes(small[n], small[min(n + 1, len(small) - 1)])
    if boxes:
      found.append((boxes[0][1], -abs(n - len(small) // 2), n, boxes))
  if not found:
    return 0, []
  _, _, start, boxes = max(found, key=lambda f: f[:2])
  return start, boxes


def _colour_boxes(frame: np.ndarray, colour: str) -> list[tuple[tuple, float]]:
  """Regions of a colour as (x1, y1, x2, y2) with a score, the largest compact one first."""
  cv2 = opencv()
  match = _of_colour(frame, colour)
  count, _, stats, _ = cv2.connectedComponentsWithStats(match)
  height, width = match.shape
  boxes = []
  for x, y, w, h, area in stats[1:count].tolist():
    share = area / (height * width)
    if share < 0.0015 or share > 0.5:
      continue
    touches = x == 0 or y == 0 or x + w == width or y + h == height
    score = float(np.sqrt(share) * area / (w * h) * (0.5 if touches else 1.0))
    boxes.append(((x, y, x + w, y + h), score))
  return sorted(boxes, key=lambda b: -b[1])


def _of_colour(frame: np.ndarray, colour: str) -> np.ndarray:
  """Where the frame has a colour, dark marks on it filled: uint8 [H, W]."""
  cv2 = opencv()
  match = (name_pixels(frame) == NAMES.index(colour)).astype(np.uint8)
  size = max(3, round(frame.shape[1] / 42) | 1)
  kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))
  return cv2.morphologyEx(match, cv2.MORPH_CLOSE, kernel)


def _motion_boxes(frame: np.ndarray, after: np.ndarray) -> list[tuple[tuple, float]]:
  """Regions that move against the camera's motion (RANSAC homography), strongest first."""
  cv2 = opencv()
  flow = _flow(frame, after)
  height, width = flow.shape[:2]
  grid = np.stack(np.meshgrid(np.arange(0, width, 8), np.arange(0, height, 8)), -1).reshape(-1, 2)
  moved = grid + flow[grid[:, 1], grid[:, 0]]
  cv2.setRNGSeed(0)
  homography, _ = cv2.findHomography(
    grid.astype(np.float32), moved.astype(np.float32), cv2.RANSAC, 1.0
  )
  if homography is None:
    return []
  points = np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1).astype(np.float32)
  camera = cv2.perspectiveTransform(points.reshape(-1, 1, 2), homography).reshape(height, width, 2)
  residual = np.linalg.norm(points + flow - camera, axis=-1)
  residual = cv2.GaussianBlur(residual, (0, 0), width / 96)
  strong = (residual > max(0.35, 0.35 * float(residual.max()))).astype(np.uint8)
  count, labels, stats, _ = cv2.connectedComponentsWithStats(strong)
  boxes = []
  for i in range(1, count):
    x, y, w, h, area = stats[i].tolist()
    share = area / (height * width)
    if 0.004 < share < 0.6:
      boxes.append(((x, y, x + w, y + h), float(share * residual[labels == i].mean())))
  return sorted(boxes, key=lambda b: -b[1])


def _grabcut(frame: np.ndarray, box: tuple, colour: str | None) -> np.ndarray:
  """GrabCut in a box, seeded with the ellipse in its middle (or the pixels of its colour)."""
  cv2 = opencv()
  height, width = frame.shape[:2]
  x1, y1, x2, y2 = (round(v) for v in box)
  if colour:
    inside = np.zeros((height, width), np.uint8)
    inside[y1:y2, x1:x2] = _of_colour(frame, colour)[y1:y2, x1:x2]
    return inside.astype(bool)
  labels = np.full((height, width), cv2.GC_BGD, np.uint8)
  labels[y1:y2, x1:x2] = cv2.GC_PR_FGD
  centre, axes = ((x1 + x2) // 2, (y1 + y2) // 2), (max(1, (x2 - x1) // 4), max(1, (y2 - y1) // 4))
  cv2.ellipse(labels, centre, axes, 0, 0, 360, cv2.GC_FGD, cv2.FILLED)
  models = np.zeros((1, 65)), np.zeros((1, 65))
  cv2.setRNGSeed(0)
  bgr = np.ascontiguousarray(frame[..., ::-1])
  try:
    cv2.grabCut(bgr, labels, None, *models, 3, cv2.GC_INIT_WITH_MASK)
  except cv2.error:  # the box covers the frame: nothing to tell apart
    return np.zeros((height, width), bool)
  return (labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)


def _flow(frame: np.ndarray, other: np.ndarray) -> np.ndarray:
  """Dense optical flow [H, W, 2] in pixels from `frame` to `other` (DIS, medium preset)."""
  cv2 = opencv()
  method = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
  grey = [cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) for f in (frame, other)]
  return method.calc(*grey, None)


def _resize(mask: np.ndarray, height: int, width: int) -> np.ndarray:
  cv2 = opencv()
  if mask.shape == (height, width):
    return mask
  soft = cv2.resize(mask.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
  return soft > 0.5
