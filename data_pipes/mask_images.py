"""Masks that people bring as pictures and arrays: which pixels are the object, if that is clear.

A picture may be black and white, grey with soft edges, a palette or grey values that number several
objects (DAVIS, YouTube-VOS, the output of SAM 2), or hold the object in its transparency. What can
mean two things is refused in one line; nothing is taken as "whatever is not zero".
"""

import os
from typing import NamedTuple

import numpy as np
from PIL import Image

from data_pipes.errors import InputError, reading
from data_pipes.images import open_image

VOID = 255  # DAVIS and YouTube-VOS: borders that belong to no object
MANY = 64  # more values than this number no objects
_LOSSY = ("JPEG", "MPO", "WEBP")
_NOISE = 24  # by which JPEG moves black and white


class MaskPicture(NamedTuple):
  """A mask uint8 [H, W] of 0 and 1, and what a user should know of how it was read ("" nothing)."""

  mask: np.ndarray
  note: str = ""


def mask_of_array(values: np.ndarray) -> np.ndarray:
  """A mask given as an array [H, W], as uint8 of 0 and 1.

  Raises InputError for anything but bool, 0/1 and 0/255: logits, probabilities, ±1, NaN, ids.
  """
  with reading("a mask array is [H, W]"):
    values = np.asarray(values)
  if values.ndim != 2:
    raise InputError(f"a mask array is [H, W]; found {list(values.shape)}")
  if values.dtype == bool:
    return values.astype(np.uint8)
  accepted = "bool, 0/1 or 0/255"
  if values.dtype.kind not in "iuf":
    raise InputError(f"a mask array of {values.dtype}; accepted: {accepted}")
  if not np.isfinite(values).all():
    raise InputError(f"a mask array with values that are no numbers (NaN); accepted: {accepted}")
  levels = np.unique(values)
  if np.isin(levels, (0, 1)).all() or np.isin(levels, (0, 255)).all():
    return (values != 0).astype(np.uint8)
  if np.issubdtype(values.dtype, np.integer) and levels[0] >= 0 and len(levels) <= MANY:
    ids = _listed(levels[levels > 0])
    raise InputError(
      f"a mask array with the values {ids}, which may number objects; accepted: "
      f"{accepted}, as of `array == {levels[-1]}`"
    )
  low, high = levels[0], levels[-1]
  probable = low >= 0 and high <= 1
  cut = "probabilities: `array > 0.5`" if probable else "logits: `array > 0`"
  raise InputError(
    f"a mask array with values from {low:.6g} to {high:.6g}; accepted: {accepted}, such as of {cut}"
  )


def read_mask_picture(path: str | os.PathLike, object_id: int | None = None) -> MaskPicture:
  """The mask in a picture file.

  Args:
    object_id: the object of a picture that numbers several, by palette index or grey value.

  Raises InputError where the file cannot be read, or its values can mean several things.
  """
  with open_image(path) as image:
    with reading(f"{path}: cannot be read as an image"):
      image.load()
    try:
      return _mask_of(image, object_id)
    except InputError as error:
      raise InputError(f"{path}: {error}") from None


def _mask_of(image: Image.Image, object_id: int | None) -> MaskPicture:
  if image.mode in ("P", "PA") and (
    object_id is not None or not _is_grey(_converted(image, "RGB"))
  ):
    return _by_id(np.asarray(image.getchannel(0)), object_id, "palette indices")
  if image.mode in ("1", "L") or image.mode.startswith(("I", "F")):
    return _grey(np.asarray(image), image.format, object_id)
  colours, alpha = _converted(image, "RGB"), None
  if "A" in image.getbands() or "transparency" in image.info:
    alpha = np.asarray(_converted(image, "RGBA").getchannel("A"))
    alpha = None if alpha.min() == alpha.max() else alpha
  grey = _is_grey(colours, _NOISE if image.format in _LOSSY else 0)
  values = np.asarray(colours.convert("L")) if grey else None
  if alpha is not None:
    if values is None or values.min() == values.max():  # a cut-out, or one colour under it
      return _grey(alpha, image.format, object_id)
    mask = _grey(values, image.format, object_id)
    if not np.array_equal(mask.mask, _grey(alpha, image.format, None).mask):
      raise InputError(
        "its colours and its transparency mark different pixels; accepted: the object in one of "
        "them, the other the same everywhere"
      )
    return mask
  if values is not None:
    return _grey(values, image.format, object_id)
  pixels = np.asarray(colours)
  kinds = np.unique(pixels.reshape(-1, 3), axis=0)
  if len(kinds) == 2 and not kinds[0].any():  # one colour on black
    return MaskPicture(np.asarray(pixels.any(-1), np.uint8))
  names = ", ".join("#{:02x}{:02x}{:02x}".format(*kind) for kind in kinds[:6])
  more = f" and {len(kinds) - 6} more" if len(kinds) > 6 else ""
  raise InputError(
    f"found the colours {names}{more}; accepted: black and white, one colour on black, or a "
    "palette of which one object is chosen (mask.png#2)"
  )


def _converted(image: Image.Image, mode: str) -> Image.Image:
  with reading(f"mode {image.mode} cannot be read as a mask"):
    return image.convert(mode)


def _is_grey(colours: Image.Image, noise: int = 0) -> bool:
  """Whether no pixel's channels differ by more than `noise`."""
  pixels = np.asarray(colours)
  return int((pixels.max(-1) - pixels.min(-1)).max(initial=0)) <= noise


def _grey(values: np.ndarray, form: str | None, object_id: int | None) -> MaskPicture:
  """A mask of grey values: black and white, soft edges, or ids."""
  if values.dtype == bool:
    values = values.astype(np.uint8)
  levels = np.unique(values)
  if object_id is not None:
    return _by_id(values, object_id, "grey values")
  if any(np.isin(levels, (0, full)).all() for full in (1, VOID, 65535)):
    return MaskPicture((values != 0).astype(np.uint8))
  low, high = levels[0], levels[-1]
  between = levels[(levels > 0) & (levels < VOID)]
  lossy = form in _LOSSY and low <= _NOISE and VOID - _NOISE <= high <= VOID
  if lossy or (low == 0 and high == VOID and not _numbers_objects(between)):
    note = f"grey values between {low} and {high} are cut at half: from 128 on is the object"
    return MaskPicture((values >= 128).astype(np.uint8), note)
  return _by_id(values, None, "grey values")


def _numbers_objects(between: np.ndarray) -> bool:
  """Whether values are 1, 2, 3 …, beside borders of VOID."""
  return len(between) > 0 and np.array_equal(between, np.arange(1, len(between) + 1))


def _by_id(values: np.ndarray, object_id: int | None, what: str) -> MaskPicture:
  levels = np.unique(values)
  ids = levels[(levels > 0) & (levels != VOID)]
  if object_id is not None:
    if object_id not in levels:
      raise InputError(f"no object {object_id}; found the {what} {_listed(ids)}")
    return MaskPicture((values == object_id).astype(np.uint8))
  if len(ids) == 1:
    return MaskPicture((values == ids[0]).astype(np.uint8))
  if not len(ids):
    return MaskPicture(np.zeros(values.shape, np.uint8))
  if len(ids) > MANY:
    raise InputError(
      f"found {len(ids)} {what} from {ids[0]} to {ids[-1]}, neither a mask nor numbers of objects; "
      "accepted: black and white"
    )
  raise InputError(
    f"found the {what} {_listed(ids)}, which number objects; choose one, as in mask.png#{ids[0]}"
  )


def _listed(ids: np.ndarray) -> str:
  text = ", ".join(str(i) for i in ids[:12])
  return f"{text} and {len(ids) - 12} more" if len(ids) > 12 else text
