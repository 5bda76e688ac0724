"""Pixels of a scene: frames, the visible part of every thing, and the H.264 file.

Letters: O thing, N frame, H W pixel rows and columns.
"""

from fractions import Fraction
from pathlib import Path

import av
import einops
import numpy as np

from data_pipes.embedded.scenes import (
  COLOUR_NAMES,
  COLOURS,
  FPS,
  FRAMES,
  HEIGHT,
  WIDTH,
  Scene,
)

OVERSAMPLE = 3
STAR_POINTS = 5


def coverage(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
  """Whether points (u, v), in units of the radius, belong to a shape."""
  distance = np.hypot(u, v)
  if shape == "ball":
    return distance <= 0.95
  if shape == "ring":
    return (distance <= 1.0) & (distance >= 0.5)
  if shape == "square":
    return np.maximum(np.abs(u), np.abs(v)) <= 0.82
  if shape == "triangle":
    return (v <= 0.8) & (v >= 2 * np.abs(u) - 0.95)
  if shape == "cross":
    low, high = np.minimum(np.abs(u), np.abs(v)), np.maximum(np.abs(u), np.abs(v))
    return (low <= 0.3) & (high <= 0.95)
  assert shape == "star", shape
  wave = np.abs(((np.arctan2(u, -v) / (2 * np.pi) * STAR_POINTS) % 1) * 2 - 1)
  return distance <= 0.42 + 0.62 * wave**1.3


def paint(texture: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
  """Marking strength (0 none, 1 full) at pixel offsets (u, v) from the centre."""
  if texture == "striped":
    return ((u + v) / 3.6 % 2 < 1).astype(np.float32)
  if texture == "dotted":
    return (np.hypot((u + 2.5) % 5 - 2.5, (v + 2.5) % 5 - 2.5) < 1.5).astype(np.float32)
  return np.zeros_like(u, np.float32)


def background(rng: np.random.Generator, scale: int = 1) -> np.ndarray:
  """A dull backdrop float32 [H, W, 3]: a shaded tint, sometimes checked or grainy."""
  tint = rng.uniform(50, 190) + rng.uniform(-18, 18, 3)
  slope = rng.uniform(-30, 30, 2)
  y, x = np.mgrid[0 : HEIGHT * scale, 0 : WIDTH * scale].astype(np.float32) / scale
  shade = slope[0] * (x / WIDTH - 0.5) + slope[1] * (y / HEIGHT - 0.5)
  kind = rng.integers(0, 3)
  if kind == 1:
    side = rng.uniform(10, 24)
    shade = shade + 7.0 * ((x // side + y // side) % 2)
  elif kind == 2:
    shade = shade + rng.normal(0, 5.0, x.shape)
  return (tint + shade[..., None]).astype(np.float32)


def _pixels(samples: np.ndarray) -> np.ndarray:
  """The means of OVERSAMPLE x OVERSAMPLE samples of a pixel, [N, H, W]."""
  k = OVERSAMPLE
  return einops.reduce(samples, "n (h hk) (w wk) -> n h w", "mean", hk=k, wk=k)


def render(scene: Scene, scale: int = 1, marking: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
  """Frames uint8 [N, H, W, 3] and visible masks bool [O, N, H, W] of a scene.

  Args:
    scale: pixels a unit of length of the scene; H and W are HEIGHT and WIDTH times that.
    marking: by how much stripes and dots are larger than usual, for things that are.
  """
  rng = np.random.default_rng((scene.seed, 1))
  backdrop = background(rng, scale)
  height, width, _ = backdrop.shape
  frames = np.repeat(backdrop[None], FRAMES, 0)
  masks = np.zeros((len(scene.things), FRAMES, height, width), bool)
  for o, thing in enumerate(scene.things):
    radii, centres = thing.radii * scale, thing.centres * scale
    reach = int(np.ceil(radii.max())) + 2
    size = 2 * reach * OVERSAMPLE
    corner = np.floor(centres).astype(int) - reach  # N 2: the stamp's top left pixel
    grid = (np.arange(size) + 0.5) / OVERSAMPLE
    u = grid[None, None, :] + (corner[:, 0] - centres[:, 0])[:, None, None]
    v = grid[None, :, None] + (corner[:, 1] - centres[:, 1])[:, None, None]
    u, v = np.broadcast_arrays(u, v)
    radii = radii[:, None, None]
    inside = coverage(thing.shape, u / radii, v / radii).astype(np.float32)
    marks = paint(thing.texture, u / (scale * marking), v / (scale * marking)) * inside
    inside, marks = _pixels(inside), _pixels(marks)
    palette = np.array([COLOURS[c] for c in COLOUR_NAMES], np.float32)[thing.colours]
    for n in range(FRAMES):
      left, top = corner[n]
      x0, x1 = max(left, 0), min(left + 2 * reach, width)
      y0, y1 = max(top, 0), min(top + 2 * reach, height)
      if x0 >= x1 or y0 >= y1:
        continue
      part = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
      alpha, mark = inside[n][part][..., None], marks[n][part][..., None]
      dark = palette[n] * 0.28
      place = frames[n, y0:y1, x0:x1]
      frames[n, y0:y1, x0:x1] = place * (1 - alpha) + palette[n] * (alpha - mark) + dark * mark
      seen = inside[n][part] >= 0.5
      masks[:o, n, y0:y1, x0:x1] &= ~seen
      masks[o, n, y0:y1, x0:x1] = seen
  noise = rng.normal(0, 2.0, frames.shape[1:]).astype(np.float32)
  return np.clip(frames + noise, 0, 255).astype(np.uint8), masks


def write_video(path: Path, frames: np.ndarray) -> None:
  """Writes frames uint8 [N, H, W, 3] as H.264 (yuv420p, a key frame each second)."""
  with av.open(str(path), "w") as container:
    stream = container.add_stream("libx264", rate=Fraction(FPS))
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt = "yuv420p"
    stream.options = {"crf": "17", "preset": "veryfast", "g": str(FPS), "threads": "1"}
    for frame in frames:
      container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
    container.mux(stream.encode())
