"""Frames at the resolution of the vision tower, equal to the published SigLIP processor.

Images are RGB uint8 [H, W, 3]. They stay uint8 until the device turns them into pixels: the
published resize works on uint8 (PIL bicubic, antialiased), and a float resize differs from it.
"""

import math
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from data_pipes.errors import Defect, InputError, reading

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
MAX_PIXELS = 1 << 27  # of an image or a video's frame; more is refused before it is decoded
PAD_FILL = 127  # int(0.5 * 255): SigLIP's mean colour
ASPECT_RATIOS = ("square", "pad")


def read_image(path: str | os.PathLike, upright: bool = False) -> np.ndarray:
  """An image file as RGB uint8 [H, W, 3].

  Orientation tags are ignored, as published; `upright` turns a photo as they say.
  """
  with open_image(path) as image:
    with reading(f"{path}: cannot be read as an image"):
      image.load()
      turned = ImageOps.exif_transpose(image) if upright else image
    return to_rgb(turned, str(path))


def open_image(path: str | os.PathLike) -> Image.Image:
  """An image with nothing decoded yet.

  Raises InputError where there is none, or one of more than MAX_PIXELS.
  """
  # Pillow's own limit is a setting of the whole process and only warns at first.
  with warnings.catch_warnings(), reading(f"{path}: cannot be read as an image"):
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    try:
      image = Image.open(path)
    except Image.DecompressionBombError as error:
      raise Defect("too-large", f"{path}: {error}") from None
    except FileNotFoundError:
      raise InputError(f"{path}: no such image") from None
    except UnidentifiedImageError:
      raise InputError(f"{path}: cannot be read as an image (unknown format)") from None
  check_pixels(path, image.height, image.width)
  return image


def frame_files(folder: Path) -> list[Path]:
  """The frames of a folder in natural order: 2.png before 10.png, as people number them.

  That is the published order (sorted by name) wherever the numbers are padded. Hidden files, such
  as the `._0001.jpg` that a Mac puts beside each copy, are none.

  Raises InputError where there are none, or two could be the same frame (a mask beside it).
  """
  with reading(f"{folder}: cannot be read as a folder of frames"):
    entries = list(folder.iterdir())
  files = [p for p in entries if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")]
  if not files:
    raise InputError(f"{folder}: the folder holds no frames ({', '.join(IMAGE_SUFFIXES)})")
  stems: dict[str, Path] = {}
  for path in sorted(files):
    stem = re.sub(r"(?i)[-_. ]?(mask|seg|segmentation|alpha|matte)s?$", "", path.stem)
    other = stems.setdefault(stem, path)
    if other is not path:
      raise InputError(
        f"{folder}: {other.name} and {path.name} could both be one frame; accepted: a folder of "
        "frames alone, masks in another"
      )
  return sorted(files, key=lambda path: (_natural(path.name), path.name))


def _natural(name: str) -> list[tuple[int, int | str]]:
  """A key by which numbers in names count as numbers."""
  parts = re.split(r"(\d+)", name)
  return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts if part]


def is_animated(path: Path) -> bool:
  """Whether a picture file holds several pictures that are shown one after the other.

  Raises InputError for the pages of a TIFF, which have no times.
  """
  with open_image(path) as image:
    count, kind = count_pictures(image, path), image.format
  if count > 1 and kind == "TIFF":
    raise InputError(
      f"{path}: found {count} pages, which have no times; accepted: a TIFF of one page, or the "
      "pages as files of a folder"
    )
  return count > 1 and kind in ("GIF", "WEBP", "PNG", "AVIF")


def count_pictures(image: Image.Image, path: str | os.PathLike) -> int:
  """How many pictures a file holds, none of them decoded. Raises InputError."""
  with reading(f"{path}: cannot be read as an image"):
    return getattr(image, "n_frames", 1)


def check_pixels(path: str | os.PathLike, height: int, width: int) -> None:
  """Refuses frames larger than MAX_PIXELS, by which a small file could fill the memory."""
  if height * width > MAX_PIXELS:
    raise Defect(
      "too-large",
      f"{path}: found {height}x{width} pixels (height x width); accepted: up to {MAX_PIXELS}",
    )


def to_rgb(image: Image.Image, name: str) -> np.ndarray:
  """A PIL image as RGB uint8 [H, W, 3]; transparency is dropped. `name` stands in messages.

  Raises InputError for more than 8 bits a channel, which Pillow would cut off at 255.
  """
  if image.mode.startswith(("I", "F")):
    raise InputError(
      f"{name}: cannot be read as an image (mode {image.mode}: more than 8 bits a channel; "
      "accepted: 8-bit images)"
    )
  with reading(f"{name}: cannot be read as an image"):
    return np.asarray(image.convert("RGB"))


def pad_square(image: np.ndarray, fill: int = PAD_FILL) -> np.ndarray:
  """Pads the shorter side to a square [S, S, 3], the image in the middle (rounded to left/top)."""
  height, width = image.shape[:2]
  side = max(height, width)
  if height == width:
    return image
  square = np.full((side, side, 3), fill, np.uint8)
  top, left = (side - height) // 2, (side - width) // 2
  square[top : top + height, left : left + width] = image
  return square


def resize_square(image: np.ndarray, size: int) -> np.ndarray:
  """uint8 [size, size, 3] by PIL's bicubic filter; the aspect ratio is not kept."""
  if image.shape[:2] == (size, size):
    return image
  return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


def to_model(image: np.ndarray, size: int, aspect_ratio: str = "square") -> np.ndarray:
  """A frame as the vision tower sees it, uint8 [size, size, 3]; aspect_ratio "square" or "pad"."""
  if aspect_ratio not in ASPECT_RATIOS:
    raise InputError(f"image_aspect_ratio {aspect_ratio!r}; accepted: {', '.join(ASPECT_RATIOS)}")
  return resize_square(pad_square(image) if aspect_ratio == "pad" else image, size)


def photo_grid(
  frames: Sequence[np.ndarray], rows: int | None = None, cols: int | None = None
) -> np.ndarray:
  """T equal-sized frames row by row in one picture [rows*H, cols*W, 3]; empty places are black.

  By default ceil(sqrt(T)) rows. An image asked for with `image_grid` is num_frames copies of
  itself in ceil(sqrt(num_frames)) rows and columns, followed by the image alone (published
  `process_image`).
  """
  count = len(frames)
  if rows is None:
    rows = math.ceil(math.sqrt(count)) if cols is None else math.ceil(count / cols)
  if cols is None:
    cols = math.ceil(count / rows)
  if rows * cols < count:
    raise InputError(f"{count} frames do not fit a grid of {rows} rows and {cols} columns")
  height, width, channels = frames[0].shape
  grid = np.zeros((rows * height, cols * width, channels), frames[0].dtype)
  for i, frame in enumerate(frames):
    top, left = i // cols * height, i % cols * width
    grid[top : top + height, left : left + width] = frame
  return grid


def normalise(image: np.ndarray) -> np.ndarray:
  """uint8 to pixels in [-1, 1], float32, rounded as the published processor rounds.

  The model does this on the device; here it is the reference.
  """
  scaled = (image * 0.00392156862745098).astype(np.float32)
  return (scaled - np.float32(0.5)) / np.float32(0.5)
