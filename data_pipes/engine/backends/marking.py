"""An object marked in a frame as people see it: a red outline, as in the published set-of-mark."""

import base64
import io

import numpy as np
from PIL import Image, ImageChops, ImageFilter


def outline(frame: np.ndarray, mask: np.ndarray, longest: int) -> Image.Image:
  """The frame, its longer side at most `longest` pixels, with a red line around the mask.

  Args:
    frame: uint8 [H, W, 3]. mask: bool [H, W].
  """
  image = shrunk(frame, longest)
  area = Image.fromarray(np.asarray(mask, bool).astype(np.uint8) * 255)
  area = area.resize(image.size, Image.Resampling.BILINEAR).point(lambda v: 255 * (v > 127))
  reach = max(1, image.width // 240)
  line = ImageChops.subtract(area.filter(ImageFilter.MaxFilter(2 * reach + 1)), area)
  image.paste((255, 0, 0), mask=line)
  return image


def shrunk(frame: np.ndarray, longest: int) -> Image.Image:
  image = Image.fromarray(frame)
  share = longest / max(image.size)
  if share >= 1:
    return image
  size = max(1, round(image.width * share)), max(1, round(image.height * share))
  return image.resize(size, Image.Resampling.BICUBIC)


def data_url(image: Image.Image) -> str:
  """The image as a JPEG data URL; equal images give equal text, as the call cache needs."""
  buffer = io.BytesIO()
  image.save(buffer, "JPEG", quality=88)
  return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
