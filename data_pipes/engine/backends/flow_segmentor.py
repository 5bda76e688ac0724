"""The embedded Segmentor: a colour or a motion of its own, GrabCut, and optical flow.

It needs no weights and knows no nouns. A phrase with a colour word ("red ball") takes the region of
that colour that stands out most; any other noun, and a colour that the ground has too, takes what
moves against the background. Good
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

VERSION = 2
_CACHE_BYTES = 256 << 20
_LARGEST = 0.5  # share of the frame

Proposal = tuple[float, tuple[int, int, int, int], np.ndarray]  # score, box xyxy, its pixels


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
    start, colour, proposals = _propose(small, colour_word(noun))
    carrier = _Carrier(small, colour)
    out: list[Track] = []
    for score, box, pixels in proposals:
      if len(out) == self.most:
        break
      seed = pixels if colour else _grabcut(small[start], box, pixels)
      if not seed.any() or _is_ground(seed):
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


def _propose(small: list[np.ndarray], colour: str | None) -> tuple[int, str | None, list[Proposal]]:
  """The frame to start from, the colour to go by (None: motion), and proposals, best first."""
  tried = sorted({int(len(small) * share) for share in (0.5, 0.25, 0.75, 0.1, 0.9)})
  candidates = {n: _of_colours(small[n], colour) for n in tried} if colour else {}
  if not colour or any(regions is None for regions in candidates.values()):
    colour, candidates = None, {n: _moving(small, n) for n in tried}
  ranked = [(p[0][0], -abs(n - len(small) // 2), n) for n, p in candidates.items() if p]
  if not ranked:
    return 0, colour, []
  start = max(ranked)[2]
  return start, colour, candidates[start] or []


def _of_colours(frame: np.ndarray, colour: str) -> list[Proposal] | None:
  """Regions of a colour, the largest compact one first; None if the ground has that colour too."""
  cv2 = opencv()
  count, labels, stats, _ = cv2.connectedComponentsWithStats(_of_colour(frame, colour))
  height, width = labels.shape
  out = []
  for i in range(1, count):
    x, y, w, h, area = stats[i].tolist()
    share = area / (height * width)
    if share < 0.0015:
      continue
    pixels = labels == i
    if _is_ground(pixels):
      return None
    touches = x == 0 or y == 0 or x + w == width or y + h == height
    score = float(np.sqrt(share) * area / (w * h) * (0.5 if touches else 1.0))
    out.append((score, (x, y, x + w, y + h), pixels))
  return sorted(out, key=lambda p: -p[0])


def _is_ground(mask: np.ndarray) -> bool:
  """Whether a region is no thing: it has most of the frame, or reaches three sides of it."""
  sides = sum(bool(edge.any()) for edge in (mask[0], mask[-1], mask[:, 0], mask[:, -1]))
  return sides >= 3 or float(mask.mean()) > _LARGEST


def _of_colour(frame: np.ndarray, colour: str) -> np.ndarray:
  """Where the frame has a colour, dark marks on it filled: uint8 [H, W]."""
  cv2 = opencv()
  match = (name_pixels(frame) == NAMES.index(colour)).astype(np.uint8)
  size = max(3, round(frame.shape[1] / 42) | 1)
  kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))
  return cv2.morphologyEx(match, cv2.MORPH_CLOSE, kernel)


def _moving(frames: list[np.ndarray], n: int) -> list[Proposal]:
  """Regions that move against the camera's motion, strongest first."""
  cv2 = opencv()
  others = [m for m in (n - 2, n + 2) if 0 <= m < len(frames)]
  if not others:
    return []
  # What one side uncovers and the other does not is no motion.
  residual = np.min([_residual(frames[n], frames[m]) for m in others], axis=0)
  strong = (residual > max(0.7, 0.35 * float(residual.max()))).astype(np.uint8)
  count, labels, stats, _ = cv2.connectedComponentsWithStats(strong)
  out = []
  for i in range(1, count):
    x, y, w, h, area = stats[i].tolist()
    share = area / strong.size
    if 0.004 < share < _LARGEST:
      pixels = labels == i
      out.append((float(share * residual[pixels].mean()), (x, y, x + w, y + h), pixels))
  return sorted(out, key=lambda p: -p[0])


def _residual(frame: np.ndarray, other: np.ndarray) -> np.ndarray:
  """Flow that no motion of the camera (RANSAC homography) explains: pixels, float32 [H, W]."""
  cv2 = opencv()
  flow = _flow(frame, other)
  height, width = flow.shape[:2]
  grid = np.stack(np.meshgrid(np.arange(0, width, 8), np.arange(0, height, 8)), -1).reshape(-1, 2)
  moved = grid + flow[grid[:, 1], grid[:, 0]]
  cv2.setRNGSeed(0)
  homography, _ = cv2.findHomography(
    grid.astype(np.float32), moved.astype(np.float32), cv2.RANSAC, 1.0
  )
  if homography is None:
    return np.zeros((height, width), np.float32)
  points = np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1).astype(np.float32)
  camera = cv2.perspectiveTransform(points.reshape(-1, 1, 2), homography).reshape(height, width, 2)
  residual = np.linalg.norm(points + flow - camera, axis=-1)
  return cv2.GaussianBlur(residual, (0, 0), width / 96)


def _grabcut(frame: np.ndarray, box: tuple[int, int, int, int], moving: np.ndarray) -> np.ndarray:
  """GrabCut around a box; what moves is probably the thing, and its inner part surely."""
  cv2 = opencv()
  height, width = frame.shape[:2]
  x1, y1, x2, y2 = box
  dx, dy = (x2 - x1) // 6, (y2 - y1) // 6
  labels = np.full((height, width), cv2.GC_BGD, np.uint8)
  labels[max(0, y1 - dy) : y2 + dy, max(0, x1 - dx) : x2 + dx] = cv2.GC_PR_BGD
  labels[moving] = cv2.GC_PR_FGD
  size = max(3, min(x2 - x1, y2 - y1) // 4 | 1)
  inner = cv2.erode(moving.astype(np.uint8), np.ones((size, size), np.uint8), borderValue=0).astype(
    bool
  )
  labels[inner if inner.any() else moving] = cv2.GC_FGD
  models = np.zeros((1, 65)), np.zeros((1, 65))
  cv2.setRNGSeed(0)
  bgr = np.ascontiguousarray(frame[..., ::-1])
  try:
    cv2.grabCut(bgr, labels, None, *models, 3, cv2.GC_INIT_WITH_MASK)
  except cv2.error:  # the box covers the frame: nothing to tell apart
    return np.zeros((height, width), bool)
  foreground = ((labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)).astype(np.uint8)
  count, parts, stats, _ = cv2.connectedComponentsWithStats(foreground)
  if count < 2:
    return np.zeros((height, width), bool)
  return parts == 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())


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
