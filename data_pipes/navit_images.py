"""Pictures of any size as rows of 14x14 patches: the image processor of VideoLLaMA 3's tower.

Of VideoRefer-VideoLLaMA3, PixelRefer and PixelRefer-Lite. `stride` is how far features are merged
later: 1 for images and object crops, 2 for frames of a video; patches come in blocks of
stride x stride. Source: damovl_encoder/image_processing.py of the published code.
"""

import math

import numpy as np
from einops import rearrange
from PIL import Image

from data_pipes.errors import InputError
from data_pipes.navit_rows import Picture

PATCH = 14
MIN_PIXELS = 56 * 56
MAX_LENGTH = 2369  # mm_max_length where config.json has none: 9477 // spatial_merge_size ** 2
MAX_ASPECT = 200
STRIDES = {"image": 1, "video": 2}


def blank(*shape: int) -> np.ndarray:
  """A picture or patches without pixels: uint8 zeros of this shape that take no memory."""
  return np.broadcast_to(np.uint8(0), shape)


def is_blank(image: np.ndarray) -> bool:
  """Whether `blank` made it."""
  return not any(image.strides)


def to_patches(image: np.ndarray, max_length: int, stride: int = 1, pictures: int = 1) -> Picture:
  """A picture, RGB uint8 [H, W, 3], resized to fit its share of `max_length` tokens.

  Each patch is a row of uint8 [h * w, 588], in it (channel, y, x). Of a blank picture, whose sizes
  alone count, blank patches.

  Args:
    max_length: `mm_max_length`, tokens of all pictures of a call together.
    stride: 1 or 2; a token is stride x stride patches.
    pictures: how many pictures share the tokens.

  Raises InputError: no size suits, see `smart_resize`.
  """
  factor = PATCH * stride
  height, width = image.shape[:2]
  height, width = smart_resize(height, width, factor, max_length * factor**2 // pictures)
  grid = height // PATCH, width // PATCH
  if is_blank(image):
    return Picture(blank(grid[0] * grid[1], 3 * PATCH**2), grid, stride)
  # Pillow gives the image itself back where the size is the same.
  resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
  patches = rearrange(
    np.asarray(resized),
    "(block_row row y) (block_column column x) c -> (block_row block_column row column) (c y x)",
    row=stride,
    column=stride,
    y=PATCH,
    x=PATCH,
  )
  return Picture(patches, grid, stride)


def smart_resize(
  height: int, width: int, factor: int, max_pixels: int, min_pixels: int = MIN_PIXELS
) -> tuple[int, int]:
  """(height, width), multiples of `factor`, near the aspect, between the two areas in pixels.

  Raises InputError: a picture without pixels, one longer than 200 times its other side, or one of
  which `max_pixels` leaves less than `factor` on a side (published: an error further down).
  """
  size = f"a picture of {height}x{width} (height x width)"
  if min(height, width) < 1:
    raise InputError(f"{size} has no pixels")
  if min(height, width) < factor:
    scale = factor / min(height, width)
    # Rounded half to even, here and below, as Python does.
    height, width = round(scale * height), round(scale * width)
  elif max(height, width) / min(height, width) > MAX_ASPECT:
    raise InputError(f"{size} is too long; accepted: up to {MAX_ASPECT} times its shorter side")
  rows, columns = round(height / factor), round(width / factor)
  if rows * columns * factor**2 > max_pixels:
    # The order of divisions is the published one: it decides about exact multiples.
    beta = math.sqrt((height * width) / max_pixels)
    rows, columns = math.floor(height / beta / factor), math.floor(width / beta / factor)
  elif rows * columns * factor**2 < min_pixels:
    beta = math.sqrt(min_pixels / (height * width))
    rows, columns = math.ceil(height * beta / factor), math.ceil(width * beta / factor)
  if min(rows, columns) < 1:
    raise InputError(
      f"{size} is too long for {max_pixels // factor**2} tokens; accepted: a shorter one, fewer "
      "pictures at once, or a larger mm_max_length"
    )
  return rows * factor, columns * factor
