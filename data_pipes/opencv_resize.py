"""OpenCV's cv2.resize in numpy, to the bit for uint8: what object crops are made with.

OpenCV itself is an optional part (60 MB). Its uint8 linear filter works in 11-bit fixed point and
does not smooth when shrinking, so no other library gives its bytes. Source: modules/imgproc/src/
resize.cpp of OpenCV 4.
"""

import numpy as np

_BITS = 11  # of a coefficient
_BLOCK = 1 << 22  # values of the result made at once


def resize_linear(image: np.ndarray, height: int, width: int) -> np.ndarray:
  """INTER_LINEAR: uint8 or float32 [H, W, ...] to [height, width, ...] of the same type."""
  if image.shape[:2] == (2 * height, 2 * width):
    return resize_area(image, height, width)  # as OpenCV does at exactly a half
  # The published wheels hand floats to Intel's library, which places pixels in double precision:
  # that decides whether a neighbour of weight 0 counts as seen.
  type_ = np.float32 if image.dtype == np.uint8 else np.float64
  sizes = zip(image.shape, (height, width), strict=False)
  return _two_taps(image, *(_linear_taps(*pair, type_) for pair in sizes))


def resize_area(image: np.ndarray, height: int, width: int) -> np.ndarray:
  """INTER_AREA: uint8 or float32 [H, W, ...] to [height, width, ...] of the same type.

  The mean of what a pixel covers where neither side grows; else a linear filter with flat tops.
  """
  sizes = list(zip(image.shape, (height, width), strict=False))
  scales = [_scale(*pair) for pair in sizes]
  if min(scales) < 1:
    return _two_taps(image, *(_flat_taps(*pair) for pair in sizes))
  whole = [round(scale) for scale in scales]
  if all(abs(a - b) < np.finfo(np.float64).eps for a, b in zip(scales, whole, strict=True)):
    return _mean(image, *whole)
  # OpenCV adds up columns first, in single precision and from left to right.
  rows, columns = (_area_weights(*pair) for pair in sizes)
  across = _weighted_sum(np.moveaxis(image.astype(np.float32), 1, 0), columns)
  return _stored(_weighted_sum(np.moveaxis(across, 1, 0), rows), image.dtype)


def _scale(size: int, new: int) -> float:
  return 1.0 / (new / size)  # the rounding of both divisions counts


def _linear_taps(size: int, new: int, type_: type) -> tuple[np.ndarray, np.ndarray]:
  """Per new pixel the first of two neighbours, which may lie outside, and the second's weight."""
  scale = _scale(size, new) if type_ is np.float32 else size / new
  at: np.ndarray = ((np.arange(new) + 0.5) * scale - 0.5).astype(type_)
  first = np.floor(at)
  return first.astype(np.int64), (at - first).astype(np.float32)


def _flat_taps(size: int, new: int) -> tuple[np.ndarray, np.ndarray]:
  i = np.arange(new)
  first = np.floor(i * _scale(size, new)).astype(np.int64)
  weight = ((i + 1) - (first + 1) * (new / size)).astype(np.float32)
  return first, np.where(weight <= 0, np.float32(0), weight - np.floor(weight))


def _two_taps(image, rows, columns) -> np.ndarray:
  size = image.shape[0]
  row, row_weight = rows
  column, column_weight = columns
  last = image.shape[1] - 1
  # Columns outside take the border alone; rows outside mix it with itself (another rounding).
  column_weight = np.where((column < 0) | (column >= last), np.float32(0), column_weight)
  column = np.clip(column, 0, last)
  ahead = np.minimum(column + 1, last)
  fixed = image.dtype == np.uint8
  tail = (1,) * (image.ndim - 2)
  kept, mixed = (w.reshape(-1, *tail) for w in _coefficients(column_weight, fixed))
  upper, lower = (w.reshape(-1, 1, *tail) for w in _coefficients(row_weight, fixed))

  source = image.astype(np.int32) if fixed else image
  across = source[:, column] * kept + source[:, ahead] * mixed
  if fixed:
    across >>= 4
  above, below = np.clip(row, 0, size - 1), np.clip(row + 1, 0, size - 1)
  result = np.empty((len(row), *across.shape[1:]), image.dtype)
  step = max(1, _BLOCK // max(1, across[0].size))
  for start in range(0, len(row), step):
    part = slice(start, start + step)
    first, second = across[above[part]] * upper[part], across[below[part]] * lower[part]
    result[part] = ((first >> 16) + (second >> 16) + 2) >> 2 if fixed else first + second
  return result


def _coefficients(weight: np.ndarray, fixed: bool) -> tuple[np.ndarray, np.ndarray]:
  """Weights of the first and second neighbour, 11-bit whole numbers or float32."""
  pair = (np.float32(1) - weight, weight)
  if not fixed:
    return pair
  first, second = (np.rint(w * np.float32(1 << _BITS)).astype(np.int32) for w in pair)
  return first, second


def _mean(image: np.ndarray, high: int, wide: int) -> np.ndarray:
  """Means of blocks of high x wide pixels."""
  height, width = image.shape[0] // high, image.shape[1] // wide
  blocks = image.reshape(height, high, width, wide, *image.shape[2:])
  if image.dtype != np.uint8:
    return blocks.mean((1, 3), dtype=np.float32)
  sums = blocks.sum((1, 3), dtype=np.int32)
  if (high, wide) == (2, 2):  # rounded half up here, half to even elsewhere
    return ((sums + 2) >> 2).astype(np.uint8)
  return _stored(sums.astype(np.float32) * np.float32(1 / (high * wide)), image.dtype)


def _area_weights(size: int, new: int) -> list[tuple[np.ndarray, np.ndarray]]:
  """The k-th source pixel of every new one and its float32 weight, for k = 0, 1, ...

  New pixels with fewer have weight 0 there.
  """
  scale = _scale(size, new)
  start = np.arange(new) * scale
  end = start + scale
  cell = np.minimum(scale, size - start)
  last = np.minimum(np.floor(end).astype(np.int64), size - 1)
  first = np.minimum(np.ceil(start).astype(np.int64), last)
  before, after = first - start > 1e-3, end - last > 1e-3
  full = (1.0 / cell).astype(np.float32)
  head = ((first - start) / cell).astype(np.float32)
  tail = (np.minimum(np.minimum(end - last, 1.0), cell) / cell).astype(np.float32)
  begin, stop = first - before, last + after
  taps = []
  for k in range(int((stop - begin).max())):
    at = begin + k
    weight = np.where(at < first, head, np.where(at < last, full, tail))
    weight = np.where(at < stop, weight, np.float32(0))
    taps.append((np.minimum(at, size - 1), weight))
  return taps


def _weighted_sum(values: np.ndarray, taps) -> np.ndarray:
  """Sums over the first axis of `values`, tap by tap, so in OpenCV's order."""
  total: np.ndarray | None = None
  for at, weight in taps:
    term = values[at] * weight.reshape(-1, *(1,) * (values.ndim - 1))
    total = term if total is None else total + term
  assert total is not None
  return total


def _stored(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
  return np.rint(values).astype(np.uint8) if dtype == np.uint8 else values
