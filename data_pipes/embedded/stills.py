"""Crowded pictures of the world's things for the tower's pre-training.

Each is a video whose frames have nothing to do with one another: many things, placed, coloured and
sized anew in every frame. A frame teaches as much as several of a scene.

Letters: X frame, O thing, N patch, S state.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import av
import einops
import numpy as np

from data_pipes.embedded.render import render, write_video
from data_pipes.embedded.scenes import (
  COLOUR_NAMES,
  FRAMES,
  HEIGHT,
  RADII,
  SHAPES,
  TEXTURES,
  WIDTH,
  Scene,
  Thing,
)
from data_pipes.embedded.states import thing_states
from data_pipes.images import to_model
from data_pipes.masks import mask_to_grid

THINGS = 9


def crowd(seed: int, radii: Sequence[float] = tuple(RADII.values())) -> Scene:
  """THINGS things of these radii strewn over the picture, overlapping a little, anew each frame."""
  rng = np.random.default_rng((seed, 3))
  things = [
    Thing("", str(rng.choice(SHAPES)), str(rng.choice(TEXTURES)), "") for _ in range(THINGS)
  ]
  for n in range(FRAMES):
    for o, thing in enumerate(things):
      thing.radii[n] = rng.choice(radii)
      thing.colours[n] = rng.integers(len(COLOUR_NAMES))
      for _ in range(20):
        thing.centres[n] = rng.uniform((3, 3), (WIDTH - 3, HEIGHT - 3))
        gaps = [
          np.linalg.norm(thing.centres[n] - t.centres[n]) - 0.7 * (thing.radii[n] + t.radii[n])
          for t in things[:o]
        ]
        if min(gaps, default=1) > 0:
          break
  return Scene(seed, things, 0, 0, "")


def compressed(frames: np.ndarray) -> list[np.ndarray]:
  """Frames after H.264."""
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "crowd.mp4"
    write_video(path, frames)
    with av.open(str(path)) as container:
      return [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]


def picture_rows(seed: int, image_size: int, grid: int) -> dict[str, np.ndarray]:
  """The FRAMES pictures of a crowd as the model sees them, after H.264.

  Returns frames u8 [X, image_size, image_size, 3], masks bool [X, O, N] by the published grid
  rule, states f16 [X, O, S].
  """
  scene = crowd(seed)
  frames, masks = render(scene)
  decoded = compressed(frames)
  cells = mask_to_grid(einops.rearrange(masks, "o x h w -> (o x) h w"), grid, rule="published")
  return {
    "frames": np.stack([to_model(frame, image_size) for frame in decoded]),
    "masks": einops.rearrange(cells, "(o x) h w -> x o (h w)", o=THINGS).astype(bool),
    "states": einops.rearrange(thing_states(scene), "o x s -> x o s").astype(np.float16),
  }
