"""What can be known of a thing from one frame, as numbers: targets of the tower's pre-training.

Letters: O thing, N frame, S state. A state holds the thing's own looks and place, and the looks
and direction of its nearest neighbour, which fade with distance.
"""

import numpy as np

from data_pipes.embedded.scenes import (
  COLOUR_NAMES,
  FRAMES,
  HEIGHT,
  RADII,
  SHAPES,
  TEXTURES,
  WIDTH,
  Scene,
)

COLUMNS, ROWS = 8, 6

# name -> (number of values, "class" (one-hot) or "value")
FIELDS = {
  "colour": (len(COLOUR_NAMES), "class"),
  "shape": (len(SHAPES), "class"),
  "texture": (len(TEXTURES), "class"),
  "radius": (1, "value"),
  "column": (COLUMNS, "value"),
  "row": (ROWS, "value"),
  "near": (1, "value"),
  "near_colour": (len(COLOUR_NAMES), "value"),
  "near_shape": (len(SHAPES), "value"),
  "near_offset": (2, "value"),
}
WIDTHS = [size for size, _ in FIELDS.values()]
SLICES = {
  name: slice(end - size, end)
  for (name, (size, _)), end in zip(FIELDS.items(), np.cumsum(WIDTHS).tolist(), strict=True)
}
STATE = sum(WIDTHS)


def hats(x: np.ndarray, count: int) -> np.ndarray:
  """Linear interpolation weights of x in [0, 1] over `count` equal cells: [..., count]."""
  at = np.clip(x, 0, 1)[..., None] * count - 0.5
  return np.clip(1 - np.abs(np.clip(at, 0, count - 1) - np.arange(count)), 0, 1)


def in_picture(scene: Scene) -> np.ndarray:
  """Whether enough of each thing is in the picture to be seen: bool [O, N]."""
  centres = np.stack([t.centres for t in scene.things])
  reach = 0.4 * np.stack([t.radii for t in scene.things])[..., None]
  return np.all((centres > -reach) & (centres < np.array([WIDTH, HEIGHT]) + reach), -1)


def thing_states(scene: Scene) -> np.ndarray:
  """States float32 [O, N, S]; all zero where the thing is out of the picture."""
  things, O = scene.things, len(scene.things)
  centres = np.stack([t.centres for t in things])  # O N 2
  radii = np.stack([t.radii for t in things])
  colours = np.eye(len(COLOUR_NAMES))[np.stack([t.colours for t in things])]
  shapes = np.eye(len(SHAPES))[[SHAPES.index(t.shape) for t in things]]
  textures = np.eye(len(TEXTURES))[[TEXTURES.index(t.texture) for t in things]]
  present = in_picture(scene)

  offset = centres[None] - centres[:, None]  # O O N 2, from the first to the second
  distance = np.linalg.norm(offset, axis=-1)
  gap = distance - radii[None] - radii[:, None]
  gap = np.where(np.eye(O, dtype=bool)[:, :, None] | ~present[None], np.inf, gap)
  nearest = gap.argmin(1)  # O N
  n = np.arange(FRAMES)[None]
  near = np.exp(-np.clip(np.take_along_axis(gap, nearest[:, None], 1)[:, 0], 0, None) / 12)
  offset = np.take_along_axis(offset, nearest[:, None, :, None], 1)[:, 0]
  offset = offset / np.maximum(np.linalg.norm(offset, axis=-1, keepdims=True), 1)

  out = np.zeros((O, FRAMES, STATE), np.float32)
  put = {
    "colour": colours,
    "shape": np.repeat(shapes[:, None], FRAMES, 1),
    "texture": np.repeat(textures[:, None], FRAMES, 1),
    "radius": ((radii - RADII["small"]) / (RADII["large"] - RADII["small"]))[..., None],
    "column": hats(centres[..., 0] / WIDTH, COLUMNS),
    "row": hats(centres[..., 1] / HEIGHT, ROWS),
    "near": near[..., None],
    "near_colour": near[..., None] * colours[nearest, n],
    "near_shape": near[..., None] * shapes[nearest],
    "near_offset": near[..., None] * offset,
  }
  for name, value in put.items():
    out[..., SLICES[name]] = value
  return out * present[..., None]
