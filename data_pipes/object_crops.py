"""Objects cut out of their picture and scaled, as the successors of VideoRefer look at them.

Small objects grow by a whole number until they fill about K patches, large ones shrink. Three
generations differ in the edges, the filters and what they make of an empty mask. Published names:
`resize_image_mask` of videorefer_videollama3, pixelrefer and pixelreferlite (mm_utils.py).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data_pipes.errors import InputError
from data_pipes.images import MAX_PIXELS
from data_pipes.masks import area_cells
from data_pipes.navit_images import PATCH, blank, is_blank, to_patches
from data_pipes.navit_rows import Crop, Picture
from data_pipes.opencv_resize import resize_area, resize_linear

MARGIN = 2 * PATCH  # pixels around the object
VL3_TOKENS = 10  # K of VideoRefer-VideoLLaMA3, which its config.json does not hold
WHOLE_SIDE, LOCAL_SIDE = 336, 224  # Lite's two pictures beside a crop


@dataclass(frozen=True)
class CropRule:
  """What differs between the generations.

  Attributes:
    largest: patches to which a larger object is shrunk.
    empty: what an empty mask is, as published: the "whole" picture, a "black" patch, or None, an
      error.
    lite: the crop keeps its far row and column, shrinks by areas, has a mask of fractions, and
      two more pictures beside it. Always K tokens an object.
    placed: the encoder is told where the crop lies in its picture.
  """

  largest: int
  empty: str | None = None
  lite: bool = False
  placed: bool = True


VL3 = CropRule(largest=100, empty="whole", placed=False)
PIXELREFER = CropRule(largest=100)
LITE = CropRule(largest=50, empty="black", lite=True)
CROP_RULES = {"cells": VL3, "placed_cells": PIXELREFER, "cells_in_context": LITE}
"""By the kind of region encoder, as the model's config names it."""


class ObjectCrop(NamedTuple):
  """One object on one picture, before the image processor.

  Attributes:
    image: uint8 [h, w, 3], h and w multiples of 14 pixels.
    mask: on the crop's patches, [h / 14, w / 14]: uint8 0 or 1; of Lite float32 in [0, 1], and
      every cell above 0 counts.
    box: (top, left, bottom, right), pixels of the picture, the far ends included; (0, 0, 0, 0)
      for Lite's black patch.
    size: (height, width) of the picture.
    tokens: object tokens that it gets in the prompt.
    whole, local: of Lite, the whole picture uint8 [336, 336, 3] and the crop uint8 [224, 224, 3].
  """

  image: np.ndarray
  mask: np.ndarray
  box: tuple[int, int, int, int]
  size: tuple[int, int]
  tokens: int
  whole: np.ndarray | None = None
  local: np.ndarray | None = None


def crop_objects(
  images: Sequence[np.ndarray],
  masks: Sequence[np.ndarray],
  image_ids: Sequence[int],
  rule: CropRule,
  tokens: int,
  published: bool = False,
  true_local: bool = False,
) -> list[ObjectCrop]:
  """Each mask cut out of its picture.

  Args:
    images: RGB uint8 [H, W, 3], of any sizes; blank ones give blank crops.
    masks: [H, W] of the size of its picture, any number type; all but 0 is the object.
    image_ids: the picture of each mask.
    tokens: K, the most that an object gets (`mask_num`; 10 for VideoRefer-VideoLLaMA3).
    published: an object whose cells all vanish gets no tokens, and an empty mask is what
      `rule.empty` says. Otherwise the object gets the cells that it covers most, and an empty mask
      is refused.
    true_local: of Lite, each object gets its own local picture; as published it gets that of the
      first mask on the same picture.

  Raises InputError: a mask of another size than its picture or without pixels, a crop that is
  empty or would be larger than MAX_PIXELS.
  """
  crops: list[ObjectCrop] = []
  cached: dict[int, tuple[np.ndarray, np.ndarray]] = {}
  for i, (mask, at) in enumerate(zip(masks, image_ids, strict=True)):
    image = images[at]
    if mask.shape != image.shape[:2]:
      raise InputError(
        f"mask {i} is {_by(mask.shape)}, its picture {_by(image.shape)} (height x width); they "
        "must be equal"
      )
    crop, local = _cut(image, place_object(mask, rule, tokens, published, f"mask {i}"), rule)
    if rule.lite:
      if at not in cached or true_local:
        whole = cached[at][0] if at in cached else _shrunk(image, WHOLE_SIDE)
        cached[at] = whole, _shrunk(local, LOCAL_SIDE)
      crop = crop._replace(whole=cached[at][0], local=cached[at][1])
    crops.append(crop)
  return crops


def crop_patches(
  crops: Sequence[ObjectCrop], rule: CropRule, max_length: int, pictures: int | None = None
) -> list[Crop]:
  """Crops as the tower and the region encoder read them, patches of stride 1.

  A crop's grid may be another than its mask's: the image processor resizes a crop again that has
  fewer than 16 patches or more than its share.

  Args:
    max_length: `mm_max_length`.
    pictures: how many share it: as published all crops when answering (None), 1 in PixelRefer's
      training, the number of frames in Lite's. Lite's other pictures always share it among
      themselves.
  """
  share = len(crops) if pictures is None else pictures

  def beside(picture: np.ndarray | None) -> Picture | None:
    return None if picture is None else to_patches(picture, max_length, pictures=len(crops))

  # Objects on the same picture share these, so that the tower reads them once.
  made = {id(p): beside(p) for c in crops for p in (c.whole, c.local)}
  return [
    Crop(
      to_patches(crop.image, max_length, pictures=share),
      crop.mask,
      (*crop.box, *crop.size) if rule.placed else None,
      local=made[id(crop.local)],
      whole=made[id(crop.whole)],
    )
    for crop in crops
  ]


class Placed(NamedTuple):
  """Where the crop of an object lies, and what becomes of it: all that needs no pixel.

  part: rows and columns of the picture. scaled: height and width after scaling. black: the crop is
  a black patch, whatever lies there. The others as in ObjectCrop.
  """

  part: tuple[slice, slice]
  scaled: tuple[int, int]
  mask: np.ndarray
  box: tuple[int, int, int, int]
  tokens: int
  black: bool = False


def place_object(
  mask: np.ndarray, rule: CropRule, tokens: int, published: bool = False, name: str = "the mask"
) -> Placed:
  """The crop of a mask; arguments and errors as of `crop_objects`."""
  mask = (mask != 0).astype(np.uint8)
  height, width = mask.shape
  area = int(mask.sum(dtype=np.int64))
  if not area:
    if not published or rule.empty is None:
      raise InputError(f"{name} is empty; accepted: masks with at least one pixel")
    if rule.empty == "black":
      whole = slice(0, height), slice(0, width)
      black = np.zeros((1, 1), np.float32)
      return Placed(whole, (PATCH, PATCH), black, (0, 0, 0, 0), tokens, black=True)
    mask, area = np.ones_like(mask), mask.size

  rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
  top, left = (max(0, int(at[0]) - MARGIN) for at in (rows, columns))
  bottom = min(height - 1, int(rows[-1]) + MARGIN)
  right = min(width - 1, int(columns[-1]) + MARGIN)
  # As published, the crop ends before its last row and column; Lite's alone holds them.
  part = slice(top, bottom + rule.lite), slice(left, right + rule.lite)
  cut = mask[part]
  if not cut.size:
    raise InputError(
      f"{name}: a picture of {_by(mask.shape)} leaves no crop; accepted: 2x2 and more"
    )

  scaled = crop_size(cut.shape, area, rule, tokens)
  if scaled[0] * scaled[1] > MAX_PIXELS:
    raise InputError(
      f"{name}: its {area} pixels lie in {_by(cut.shape)} pixels, which would be enlarged to "
      f"{_by(scaled)}; accepted: up to {MAX_PIXELS} pixels, so a mask without stray pixels"
    )
  grid = scaled[0] // PATCH, scaled[1] // PATCH
  cells = resize_linear(cut.astype(np.float32), *grid) if rule.lite else resize_cells(cut, *grid)
  if not published and not (cells > 0).any():
    # The far row and column count here, as they may be all of the object.
    cells = area_cells(mask[top : bottom + 1, left : right + 1], *grid).astype(cells.dtype)
  count = tokens if rule.lite else min(tokens, int(cells.sum()))
  return Placed(part, scaled, cells, (top, left, bottom, right), count)


def _cut(image: np.ndarray, placed: Placed, rule: CropRule) -> tuple[ObjectCrop, np.ndarray]:
  """The scaled crop, and the crop before scaling."""
  part = image[placed.part]
  if is_blank(image):
    scaled, part = blank(*placed.scaled, 3), blank(*part.shape)
    return ObjectCrop(scaled, placed.mask, placed.box, image.shape[:2], placed.tokens), part
  shrinks = placed.scaled[0] < part.shape[0] and placed.scaled[1] < part.shape[1]
  if placed.black:
    scaled = np.zeros((*placed.scaled, 3), np.uint8)
  else:
    scaled = (resize_area if rule.lite and shrinks else resize_linear)(part, *placed.scaled)
  crop = ObjectCrop(scaled, placed.mask, placed.box, image.shape[:2], placed.tokens)
  return crop, part


def crop_size(part: Sequence[int], area: int, rule: CropRule, tokens: int) -> tuple[int, int]:
  """Height and width to which a part of a picture is scaled, whose object has `area` pixels."""
  scale = _scale(area, rule, tokens)
  height, width = (math.ceil(side * scale / PATCH) * PATCH for side in part)
  return height, width


def _scale(area: int, rule: CropRule, tokens: int) -> float:
  """By how much sides grow: a whole number, or below 1 for objects above `rule.largest` patches."""
  # The earlier generations divide in single precision, which decides where a root is whole.
  number = float if rule.lite else np.float32
  pixels = number(area)
  scale = math.ceil(math.sqrt(number(PATCH**2 * tokens) / pixels))
  patches = pixels / number(PATCH**2)
  if scale == 1 and patches > rule.largest:
    return 1 / math.sqrt(patches / number(rule.largest))
  return scale


def resize_cells(mask: np.ndarray, rows: int, columns: int) -> np.ndarray:
  """A mask uint8 0/1 [H, W] to uint8 0/1 [rows, columns], as torch resizes uint8 bilinearly.

  It goes one axis at a time, across first, and rounds half up after each: other cells than those
  where the two-dimensional value reaches a half.
  """
  across = _halves(mask.T, columns).T
  return _halves(across, rows)


def _halves(mask: np.ndarray, new: int) -> np.ndarray:
  """The first axis resized to `new`; whole numbers, so that an exact half is one."""
  size = mask.shape[0]
  # The centre of cell i is `place / (2 * new)` pixels from the middle of the first pixel.
  place = np.maximum((2 * np.arange(new) + 1) * size - new, 0)
  first, rest = np.divmod(place, 2 * new)
  second = np.minimum(first + 1, size - 1)
  weight = rest[:, None]
  value = mask[first].astype(np.int64) * (2 * new - weight) + mask[second] * weight
  return (value >= new).astype(np.uint8)


def _shrunk(image: np.ndarray, side: int) -> np.ndarray:
  return blank(side, side, 3) if is_blank(image) else resize_area(image, side, side)


def _by(size: Sequence[int]) -> str:
  return f"{size[0]}x{size[1]}"
