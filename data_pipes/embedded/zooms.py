"""Crowded pictures of any size, and their things cut out, for the pre-training of vr-mini-navit.

As `stills`, for a tower that reads whole pictures and crops of objects side by side.

Letters: N patch, S state.
"""

from typing import NamedTuple

import einops
import numpy as np

from data_pipes.embedded.render import render
from data_pipes.embedded.scenes import FRAMES
from data_pipes.embedded.states import thing_states
from data_pipes.embedded.stills import compressed, crowd
from data_pipes.masks import area_cells
from data_pipes.navit_images import to_patches
from data_pipes.navit_rows import Crop, Picture
from data_pipes.object_crops import PIXELREFER, crop_objects, crop_patches

RADII = tuple(np.geomspace(2.5, 14, 12))  # from 5 pixels across up, and all between
SCALES = (1, 1, 1, 1, 2, 3)  # pixels a unit of length, drawn evenly
CROPS = 4  # of a picture
STRIDE = 2  # of scene tokens, as in a video
SEEN = 12  # pixels of a thing that are worth a crop


class Zoom(NamedTuple):
  """A picture with what its patches show, and some of its things as crops.

  states: float16 [N, S], in the patches' order, of the thing that a patch shows. owners: uint8 [N],
  how many things a patch shows. crop_states: float16 [crops, S].
  """

  picture: Picture
  states: np.ndarray
  owners: np.ndarray
  crops: list[Crop]
  crop_states: np.ndarray


def zooms(seed: int, count: int, tokens: int, max_length: int) -> list[Zoom]:
  """`count` pictures of a crowd, for a model of `tokens` an object and `max_length` a call."""
  rng = np.random.default_rng((seed, 6))
  scale = int(rng.choice(SCALES))
  scene = crowd(seed, RADII)
  states = thing_states(scene).astype(np.float16)
  drawn, masks = render(scene, scale)
  frames = compressed(drawn)
  made = []
  for n in np.sort(rng.permutation(FRAMES)[:count]):
    picture = to_patches(frames[n], max_length, STRIDE, pictures=4)
    rows, columns = picture.positions().T
    cells = area_cells(masks[:, n].astype(np.uint8), *picture.grid)[:, rows, columns]
    cells = cells * states[:, n].any(-1, keepdims=True)
    things = [o for o in rng.permutation(len(masks)) if masks[o, n].sum() >= SEEN][:CROPS]
    crops = crop_objects(
      [frames[n]], [masks[o, n] for o in things], [0] * len(things), PIXELREFER, tokens
    )
    made.append(
      Zoom(
        picture,
        einops.einsum(cells, states[:, n], "o p, o s -> p s"),
        cells.sum(0).astype(np.uint8),
        crop_patches(crops, PIXELREFER, max_length, pictures=int(rng.integers(1, 3))),
        states[things, n],
      )
    )
  return made
