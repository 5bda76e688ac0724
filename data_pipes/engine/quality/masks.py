"""Numbers about the masks of one object over time, and the rules that they must meet."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from data_pipes.engine.quality.opencv import opencv

LIMITS: dict[str, float] = {
  "min_area": 0.0008,  # share of the frame, mean of the visible frames
  "max_area": 0.85,
  "min_visible": 0.2,  # share of the frames on which it is seen
  "min_frames": 2,  # frames on which it is seen
  "max_flicker": 0.35,  # share of frame pairs between which it appears, vanishes or jumps in area
  "min_coherence": 0.5,  # of temporal_coherence
  "min_appearance": 0.35,  # of appearance: below, another object was taken
  "max_components": 6.0,  # mean number of separate parts
  "min_cycle_iou": 0.0,  # where the segmentor tracks out and back; 0.8 suits SAM 2
  "min_box_score": 0.0,
  "max_overlap": 0.8,  # mean IoU with another object of the clip
}


def measure(masks: Mapping[int, np.ndarray], frames: Mapping[int, np.ndarray]) -> dict[str, float]:
  """Describes the masks {frame: bool [H, W]} of one object on RGB frames of the same size.

  Returns:
    area_ratio, visible_ratio, n_components (means over visible frames), hole_ratio, border_touch
    (share of visible frames at the border), flicker, temporal_coherence (1 where the centre moves
    by less than the object's size between frames), appearance (least likeness of its colours
    between neighbouring visible frames, 0 to 1).
  """
  numbers = sorted(masks)
  seen = [n for n in numbers if masks[n].any()]
  areas = np.array([masks[n].mean() for n in numbers])
  out = {"visible_ratio": len(seen) / max(1, len(numbers)), "visible_frames": float(len(seen))}
  if not seen:
    return {**out, "area_ratio": 0.0}
  parts = [_parts(masks[n]) for n in seen]
  out["area_ratio"] = float(areas[areas > 0].mean())
  out["n_components"] = float(np.mean([p[0] for p in parts]))
  out["hole_ratio"] = float(np.mean([p[1] for p in parts]))
  edge = [masks[n][[0, -1]].any() or masks[n][:, [0, -1]].any() for n in seen]
  out["border_touch"] = float(np.mean(edge))
  out["flicker"] = _flicker(areas, [bool(masks[n].any()) for n in numbers])
  steps = [_coherent(masks[a], masks[b]) for a, b in pairwise(seen)]
  out["temporal_coherence"] = float(np.mean(steps)) if steps else 1.0
  looks = [_colours(frames[n], masks[n]) for n in seen]
  like = [np.minimum(a, b).sum() for a, b in pairwise(looks)]
  out["appearance"] = float(min(like)) if like else 1.0
  return {name: round(value, 4) for name, value in out.items()}


def _parts(mask: np.ndarray) -> tuple[int, float]:
  """Number of separate parts, and holes as a share of the area."""
  cv2 = opencv()
  stats = cv2.connectedComponentsWithStats(mask.astype(np.uint8))[2]
  least = 0.01 * mask.sum()
  parts = int((stats[1:, cv2.CC_STAT_AREA] >= least).sum())
  outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
  filled = np.zeros(mask.shape, np.uint8)
  cv2.drawContours(filled, outlines, -1, 1, cv2.FILLED)
  return parts, float(filled.sum() / mask.sum() - 1)


def _flicker(areas: np.ndarray, seen: list[bool]) -> float:
  """Share of neighbouring frames with a jump: appearing again, vanishing, or an area changed 2.5x.

  Coming in once and leaving once is no flicker.
  """
  if len(areas) < 2:
    return 0.0
  toggles = sum(a != b for a, b in pairwise(seen))
  once = int(not seen[0]) + int(not seen[-1])
  jumps = sum(max(a, b) > 2.5 * min(a, b) for a, b in pairwise(areas) if min(a, b) > 0)
  return (max(0, toggles - once) + jumps) / (len(areas) - 1)


def _coherent(a: np.ndarray, b: np.ndarray) -> float:
  centres = [np.argwhere(m).mean(0) for m in (a, b)]
  size = np.sqrt(max(a.sum(), b.sum()))
  return float(np.linalg.norm(centres[0] - centres[1]) < 1.5 * size)


def _colours(frame: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """Histogram of the colours under the mask, 6 levels a channel, blurred by its own bins."""
  pixels = frame[mask.astype(bool)].astype(np.float64) / 255 * 5
  low = np.floor(pixels).astype(int).clip(0, 4)
  part = pixels - low
  histogram = np.zeros((6, 6, 6))
  for corner in np.ndindex(2, 2, 2):
    weight = np.prod([part[:, c] if k else 1 - part[:, c] for c, k in enumerate(corner)], axis=0)
    np.add.at(histogram, tuple(low[:, c] + corner[c] for c in range(3)), weight)
  return histogram / max(1, len(pixels))


def fault(quality: Mapping[str, Any], limits: Mapping[str, float]) -> str | None:
  """The first rule that the masks break, with the number and the limit; None if they are fine."""
  rules = (
    ("visible_frames", "min_frames", "seen too rarely"),
    ("visible_ratio", "min_visible", "seen too rarely"),
    ("area_ratio", "min_area", "too small"),
    ("area_ratio", "max_area", "too large"),
    ("flicker", "max_flicker", "flickers"),
    ("temporal_coherence", "min_coherence", "jumps"),
    ("appearance", "min_appearance", "changes its looks, probably another object"),
    ("n_components", "max_components", "in pieces"),
    ("cycle_iou", "min_cycle_iou", "not found again when tracked back"),
    ("box_score", "min_box_score", "low detection score"),
    ("overlap", "max_overlap", "same pixels as another object"),
  )
  for name, limit, words in rules:
    value = quality.get(name)
    if value is None:
      continue
    least = limit.startswith("min")
    good = value >= limits[limit] if least else value <= limits[limit]  # NaN is neither
    if not good:
      return f"mask {words}: {name} {value:g}, limit {limits[limit]:g}"
  return None


def iou(a: np.ndarray, b: np.ndarray) -> float:
  """Intersection over union; 1 for two empty masks."""
  union = np.logical_or(a, b).sum()
  return float(np.logical_and(a, b).sum() / union) if union else 1.0
