"""Frames with objects drawn on them, for people (`draw_objects`) and models (`outline`); rulers."""

import base64
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

# Okabe and Ito's colours, which stay apart for colour-blind readers; object i takes the i-th.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#4D4D4D")

# How `data_uri` writes a picture (options of Pillow's `save`). Pages keep thin coloured lines sharp
# (no `optimize`: Pillow fails with it on frames of noise). What a model gets must stay byte for
# byte, since the cache of calls is looked up by it.
FOR_PAGES: Mapping[str, Any] = {"format": "JPEG", "quality": 86, "subsampling": 0}
FOR_MODELS: Mapping[str, Any] = {"format": "JPEG", "quality": 88}
LOSSLESS: Mapping[str, Any] = {"format": "PNG"}


def colour_of(index: int) -> str:
  """Colour of the i-th object, "#rrggbb"; they repeat after eight."""
  return COLOURS[index % len(COLOURS)]


def draw_objects(
  frame: np.ndarray,
  masks: Mapping[int, np.ndarray],
  width: int,
  tint: float = 0.15,
  numbers: bool = True,
  names: Mapping[int, str] | None = None,
) -> Image.Image:
  """The frame at `width` pixels with its objects drawn on it.

  Args:
    frame: RGB uint8 [H, W, 3].
    masks: object index -> mask [H, W], bool or 0/1; an empty mask draws nothing.
    width: of the result; the height follows.
    tint: opacity of the object's colour inside its mask; low, so that its own colour shows.
    numbers: write each object's index on a small plate at its upper left.
    names: object index -> what stands behind the number.
  """
  height = max(1, round(frame.shape[0] * width / frame.shape[1]))
  image = Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS)
  plates = []
  for index, mask in masks.items():
    assert mask.shape == frame.shape[:2], f"mask {mask.shape} on a frame {frame.shape[:2]}"
    area = _resized(mask, image.size)
    box = area.getbbox()
    if box is None:
      continue
    image.paste(Image.new("RGB", image.size, colour_of(index)), mask=_scaled(area, tint))
    # White outside the coloured line keeps it visible on a ground of the same colour.
    reach = max(2, width // 160)
    line = _grown(area, reach)
    edge = _grown(line, 1)
    image.paste("white", mask=_scaled(ImageChops.subtract(edge, line), 0.85))
    image.paste(colour_of(index), mask=ImageChops.subtract(line, area))
    plates.append((index, box))
  if numbers:
    _write_numbers(image, plates, names or {})
  return image


def outline(frame: np.ndarray, mask: np.ndarray, longest: int) -> Image.Image:
  """The frame, its longer side at most `longest` pixels, with a red line around the mask.

  Args:
    frame: uint8 [H, W, 3]. mask: bool [H, W].
  """
  image = shrunk(frame, longest)
  area = _resized(mask, image.size)
  line = ImageChops.subtract(_grown(area, max(1, image.width // 240)), area)
  image.paste((255, 0, 0), mask=line)
  return image


def with_rulers(image: Image.Image, size: tuple[int, int], text: str) -> Image.Image:
  """A frame under a line of text, with rulers at its top and left.

  Args:
    image: the frame, at any scale.
    size: (height, width) in pixels of the source, in which the rulers count.
    text: what stands above, cut to the width.
  """
  height, width = size
  letters = min(24, max(10, image.width // 40))
  font = ImageFont.load_default(letters)
  number = math.ceil(font.getlength(str(max(height, width))))
  left, top = number + letters, round(3.2 * letters)
  ruled = Image.new("RGB", (left + image.width, top + image.height), "white")
  ruled.paste(image, (left, top))
  draw = ImageDraw.Draw(ruled)
  line = shortened(text, ruled.width - letters, font)
  draw.text((letters // 2, round(0.8 * letters)), line, fill="black", font=font, anchor="lm")
  for pixel, step in _ticks(width, image.width / width, 1.5 * number):
    x, reach = left + pixel * image.width // width, letters // 2 if pixel % step == 0 else 3
    draw.line((x, top - reach, x, top - 1), fill="black")
    if pixel % step == 0:
      anchor = "mb" if x + number / 2 < ruled.width else "rb"
      draw.text((x, top - reach - 1), str(pixel), fill="black", font=font, anchor=anchor)
  for pixel, step in _ticks(height, image.height / height, 2 * letters):
    y, reach = top + pixel * image.height // height, letters // 2 if pixel % step == 0 else 3
    draw.line((left - reach, y, left - 1, y), fill="black")
    if pixel % step == 0:
      draw.text((left - reach - 2, y), str(pixel), fill="black", font=font, anchor="rm")
  return ruled


def _ticks(pixels: int, scale: float, room: float) -> Iterator[tuple[int, int]]:
  """(pixel, step) of a ruler's ticks; every `step`-th pixel has a number, `room` pixels wide."""
  steps = (m * 10**k for k in range(1, 9) for m in (1, 2, 5))
  step = next(s for s in steps if s * scale >= room)
  yield from ((pixel, step) for pixel in range(0, pixels, step // 5))


def contact_sheet(images: Sequence[Image.Image], columns: int) -> Image.Image:
  """Pictures row by row in one, in places as large as the largest; the rest is white."""
  columns = min(columns, len(images))
  width, height = (max(sides) for sides in zip(*(image.size for image in images), strict=True))
  rows = -(-len(images) // columns)
  sheet = Image.new("RGB", (columns * width, rows * height), "white")
  for i, image in enumerate(images):
    sheet.paste(image, (i % columns * width, i // columns * height))
  return sheet


def shrunk(frame: np.ndarray, longest: int) -> Image.Image:
  """The frame, uint8 [H, W, 3], its longer side at most `longest` pixels."""
  image = Image.fromarray(frame)
  share = longest / max(image.size)
  if share >= 1:
    return image
  size = max(1, round(image.width * share)), max(1, round(image.height * share))
  return image.resize(size, Image.Resampling.BICUBIC)


def data_uri(image: Image.Image | np.ndarray, encoding: Mapping[str, Any] = FOR_PAGES) -> str:
  """The image as a `data:` address; equal images give equal text."""
  image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
  buffer = io.BytesIO()
  image.save(buffer, **encoding)
  kind = encoding["format"].lower()
  return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _resized(mask: np.ndarray, size: tuple[int, int]) -> Image.Image:
  """A mask [H, W] at `size` (width, height), 0 or 255."""
  area = Image.fromarray(np.asarray(mask, bool).astype(np.uint8) * 255)
  enlarged = max(0.0, size[0] / area.width - 1)
  area = area.resize(size, Image.Resampling.BILINEAR)
  # Blurred by as much as one pixel of a coarse mask, whose outline would be a staircase.
  area = area.filter(ImageFilter.GaussianBlur(0.6 * enlarged))
  return area.point(lambda value: 255 * (value > 127))


def _scaled(mask: Image.Image, share: float) -> Image.Image:
  return mask.point(lambda value: round(value * share))


def _grown(mask: Image.Image, pixels: int) -> Image.Image:
  """A mask of 0 and 255 grown to all sides: as Pillow's MaxFilter, but 70 times as fast."""
  while pixels > 0:
    step = min(pixels, 8)  # of wider boxes a lone pixel would round to 0
    mask = mask.filter(ImageFilter.BoxBlur(step)).point(lambda value: 255 * (value > 0))
    pixels -= step
  return mask


def shortened(text: str, width: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
  """The text, or its beginning and "…", at most `width` pixels wide."""
  if font.getlength(text) <= width:
    return text
  while text and font.getlength(f"{text}…") > width:
    text = text[:-1].rstrip()
  return f"{text}…"


def _write_numbers(
  image: Image.Image, plates: list[tuple[int, tuple[int, int, int, int]]], names: Mapping[int, str]
) -> None:
  draw = ImageDraw.Draw(image)
  size = max(10, image.width // (30 if names else 18))
  font = ImageFont.load_default(size)
  for index, (left, top, *_) in plates:
    height = round(1.35 * size)
    text = shortened(f"{index} {names.get(index, '')}".rstrip(), image.width / 3, font)
    width = max(height, round(font.getlength(text)) + size // 2)
    x = min(max(0, left - round(0.8 * height)), image.width - width - 1)
    y = min(max(0, top - round(0.8 * height)), image.height - height - 1)
    draw.rounded_rectangle(
      (x, y, x + width, y + height), radius=height // 4, fill=colour_of(index), outline="white"
    )
    ink = ink_on(colour_of(index))
    draw.text((x + width / 2, y + height / 2), text, fill=ink, font=font, anchor="mm")


def ink_on(colour: str) -> str:
  """The colour of text on a plate of "#rrggbb", "black" or "white"."""
  return "black" if luminance(colour) > 0.35 else "white"


def luminance(colour: str) -> float:
  """Relative luminance of "#rrggbb", 0 to 1: dark text is readable above about 0.2."""
  channels = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
  linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
  return float(linear @ [0.2126, 0.7152, 0.0722])
