"""Object masks: COCO run lengths and polygons, boxes and points; and masks on the patch grid.

A mask is uint8 [height, width], 0 or 1, in pixels of the source video. COCO's run lengths go down
the columns and begin with the run of zeros; its compressed form writes the difference to the run
before last, 5 bits a character. Source of both, and of the polygon rule: the COCO API (maskApi.c).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipes.errors import InputError, reading, shown
from data_pipes.images import MAX_PIXELS

GRID_RULES = ("keep", "published", "area")
_POLYGON_SCALE = 5  # COCO draws polygon edges on a grid five times finer than the pixels
_POLYGON_LIMIT = 1e6  # pixels; a coordinate beyond is a defect
_CROSSINGS = 1 << 18  # of polygon edges and pixel columns that are worked out at once


# Run lengths


def string_to_counts(text: str | bytes) -> np.ndarray:
  """Compressed COCO run lengths as int64 counts."""
  data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else bytes(text)
  codes = np.frombuffer(data, np.uint8).astype(np.int64) - 48
  if not codes.size or codes.min() < 0 or codes.max() > 63:
    raise InputError(f"mask counts {shown(text)} are no compressed COCO run lengths")
  last = (codes & 0x20) == 0  # the last character of each number
  if not last[-1]:
    raise InputError(f"mask counts {shown(text)} break off in the middle of a number")
  starts = np.flatnonzero(np.concatenate(([True], last[:-1])))
  lengths = np.diff(np.append(starts, codes.size))
  if lengths.max() > 10:
    raise InputError(f"mask counts {shown(text)} hold a number too large for a mask")
  shifts = 5 * (np.arange(codes.size) - np.repeat(starts, lengths))
  counts = np.add.reduceat((codes & 0x1F) << shifts, starts)
  negative = (codes[last] & 0x10) != 0
  counts[negative] -= 1 << (5 * lengths[negative])
  # From the fourth on, a number is the difference to the one before last.
  counts[1::2] = np.cumsum(counts[1::2])
  counts[2::2] = np.cumsum(counts[2::2])
  return counts


def counts_to_string(counts: Sequence[int] | np.ndarray) -> str:
  """Run lengths as COCO's compressed string, the same characters that the COCO API writes."""
  counts = np.asarray(counts, np.int64)
  rest = counts.copy()
  rest[3:] -= counts[1:-2]
  columns = []  # column k: the k-th character of each number, 0 where it has ended
  more = np.ones(rest.shape, bool)
  while more.any():
    low = rest & 0x1F
    rest >>= 5
    again = np.where(low & 0x10, rest != -1, rest != 0)
    columns.append(np.where(more, low + 48 + 0x20 * again, 0))
    more &= again
  characters = np.stack(columns, -1) if columns else np.zeros(0, np.int64)
  return characters[characters > 0].astype(np.uint8).tobytes().decode("ascii")


def counts_to_mask(counts: Sequence[int] | np.ndarray, height: int, width: int) -> np.ndarray:
  """Run lengths as a mask, uint8 [height, width] (column-major in memory)."""
  lengths = _whole_numbers(counts)
  check_counts(lengths, height, width)
  values = (np.arange(lengths.size) % 2).astype(np.uint8)
  return np.repeat(values, lengths).reshape(width, height).T


def _whole_numbers(counts: Sequence[int] | np.ndarray) -> np.ndarray:
  with reading("mask counts are not a list of whole numbers"):
    lengths = np.asarray(counts)
  if lengths.ndim != 1 or (lengths.size and not np.issubdtype(lengths.dtype, np.integer)):
    raise InputError("mask counts are not a list of whole numbers")
  return lengths.astype(np.int64)


def check_counts(lengths: np.ndarray, height: int, width: int) -> None:
  """Raises InputError where run lengths are no mask of that size."""
  if lengths.size and lengths.min() < 0:
    raise InputError(f"mask counts hold a negative run length {lengths.min()}")
  if lengths.size and (longest := int(lengths.max())) > height * width:  # the sum may overflow
    raise InputError(
      f"mask counts cover {longest} pixels in a row; its size {height}x{width} has {height * width}"
    )
  if (total := int(lengths.sum())) != height * width:
    raise InputError(
      f"mask counts cover {total} pixels; its size {height}x{width} has {height * width}"
    )


def mask_to_counts(mask: np.ndarray) -> np.ndarray:
  """Run lengths of a mask [height, width], int64; anything but 0 is set."""
  flat = (np.asarray(mask) != 0).T.ravel()
  changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
  ends = np.concatenate((changes, [flat.size]))
  counts = np.diff(ends, prepend=0)
  return np.concatenate(([0], counts)) if flat.size and flat[0] else counts


def encode_mask(mask: np.ndarray) -> dict:
  """A mask as the published JSON holds it: {"size": [height, width], "counts": compressed}."""
  height, width = mask.shape
  return {"size": [height, width], "counts": counts_to_string(mask_to_counts(mask))}


def check_segmentation(
  segmentation: Any, frame: tuple[int, int] | None = None
) -> tuple[tuple[int, int] | None, int | None]:
  """Whether a published "segmentation" can be drawn, without drawing it.

  `frame` is the (height, width) in which a box must lie, where it is known.

  Returns ((height, width) that it states, pixels that it covers): both for run lengths, (None,
  None) for polygons and boxes, (None, 0) for none.

  Raises:
    InputError: what `segmentation_to_mask` would raise.
  """
  if segmentation is None:
    return None, 0
  if isinstance(segmentation, dict) and "box" in segmentation:
    if frame is None:
      _corners_of_box(segmentation["box"], 1, 1)
    else:
      _sides_of_box(segmentation["box"], *frame)
    return None, None
  if not isinstance(segmentation, dict):
    for polygon in segmentation:
      _corners(polygon)
    return None, None if segmentation else 0
  height, width = _size(segmentation)
  counts: Any = segmentation.get("counts")
  lengths = string_to_counts(counts) if isinstance(counts, str) else _whole_numbers(counts)
  check_counts(lengths, height, width)
  return (height, width), int(lengths[1::2].sum())


# Annotations


def segmentation_to_mask(
  segmentation: dict | list | None, height: int | None = None, width: int | None = None
) -> np.ndarray:
  """A published "segmentation" as a mask; height and width are those of the video.

  Run lengths (compressed or a list of counts) carry their own size, which is taken; polygons
  [[x, y, x, y, ...], ...] are united on the size of the video, where {"box": [x1, y1, x2, y2]} is
  drawn too. None, the object being absent, is an empty mask of that size.
  """
  box = segmentation.get("box") if isinstance(segmentation, dict) else None
  if isinstance(segmentation, dict) and box is None:
    size = _size(segmentation)
    counts = segmentation.get("counts")
    if isinstance(counts, str | bytes):
      counts = string_to_counts(counts)
    elif not isinstance(counts, list):
      raise InputError(f"mask counts are {shown(counts)}; a string or a list is needed")
    return counts_to_mask(counts, *size)
  if box is None and segmentation is not None and not isinstance(segmentation, list):
    raise InputError(
      f"segmentation is {shown(segmentation)}; accepted: run lengths, polygons, null"
    )
  if height is None or width is None:
    raise InputError("a segmentation without run lengths needs the height and width of the video")
  if box is not None:
    return mask_from_box(box, height, width)
  mask = np.zeros((height, width), np.uint8)
  for polygon in segmentation or ():
    mask |= polygon_to_mask(_corners(polygon), height, width)
  return mask


def annotation_to_mask(annotation: dict | None, height: int, width: int) -> np.ndarray:
  """One frame's entry of an annotation, {"segmentation": ...}, as a mask uint8 [height, width].

  Raises InputError where the mask does not have the size of the video.
  """
  if annotation is not None and (
    not isinstance(annotation, dict) or "segmentation" not in annotation
  ):
    raise InputError(f"annotation is {shown(annotation)}; a 'segmentation' key is needed")
  segmentation = None if annotation is None else annotation["segmentation"]
  return check_size(segmentation_to_mask(segmentation, height, width), height, width)


def check_size(mask: np.ndarray, height: int, width: int) -> np.ndarray:
  """The mask itself if it has the size of the video; otherwise InputError."""
  if mask.shape != (height, width):
    raise InputError(
      f"the mask is {mask.shape[0]}x{mask.shape[1]} (height x width), "
      f"the video {height}x{width}; they must be equal"
    )
  return mask


def _size(segmentation: dict) -> tuple[int, int]:
  size = segmentation.get("size")
  if isinstance(size, list | tuple) and len(size) == 2:
    height, width = size
    if isinstance(height, int) and isinstance(width, int) and min(height, width) > 0:
      if height * width > MAX_PIXELS:
        raise InputError(f"mask size is {height}x{width}; accepted: up to {MAX_PIXELS} pixels")
      return height, width
  raise InputError(f"mask size is {shown(size)}; [height, width] is needed")


def _corners(polygon: list) -> np.ndarray:
  """One polygon of a segmentation, float64 [K, 2]."""
  needed = f"polygon {shown(polygon)}; a list x, y, x, y, ... of three points or more is needed"
  with reading(needed):
    values = np.asarray(polygon, np.float64)
  if values.ndim != 1 or values.size < 6 or values.size % 2:
    raise InputError(needed)
  if not np.abs(values).max() <= _POLYGON_LIMIT:
    raise InputError(f"polygon {shown(polygon)} has a coordinate that no video has")
  return values.reshape(-1, 2)


def polygon_to_mask(points: np.ndarray, height: int, width: int) -> np.ndarray:
  """A polygon [K, 2] of x, y in pixels as a mask, by the COCO API's rule (rleFrPoly).

  Its edges are drawn on a five times finer grid; where they cross the middle of a pixel column,
  the mask changes from there on down, so overlapping parts cancel. Other rasterisers differ.

  Only those crossings are worked out, and only inside the frame: what leaves it takes no time.
  """
  fine = np.trunc(_POLYGON_SCALE * np.asarray(points, np.float64) + 0.5).astype(np.int64)
  start, end = fine, np.roll(fine, -1, axis=0)
  edges = np.arange(len(fine))
  step = np.abs(end - start)
  along = np.where(step[:, 0] >= step[:, 1], 0, 1)  # the axis on which every cell has a point
  # COCO draws from the lower end, whichever comes first: it decides how the other axis is rounded.
  flipped = (start[edges, along] > end[edges, along])[:, None]
  low, high = np.where(flipped, end, start), np.where(flipped, start, end)
  slope = (high - low)[edges, 1 - along] / np.maximum(step[edges, along], 1)

  # Edge k crosses the middles of pixel columns first[k] to last[k]: from fine column 5x + 2 to the
  # next one.
  left, right = np.minimum(start[:, 0], end[:, 0]), np.maximum(start[:, 0], end[:, 0])
  first = np.maximum(-((_POLYGON_SCALE // 2 - left) // _POLYGON_SCALE), 0)
  last = np.minimum((right - 1 - _POLYGON_SCALE // 2) // _POLYGON_SCALE, width - 1)
  count = np.maximum(last - first + 1, 0)
  ends = np.cumsum(count)
  flips = np.zeros(height * width + 1, bool)  # the last one is below the last row: none
  for begin in range(0, int(ends[-1]), _CROSSINGS):
    place = np.arange(begin, min(begin + _CROSSINGS, int(ends[-1])))
    edge = np.searchsorted(ends, place, side="right")
    x = first[edge] + place - (ends - count)[edge]
    row = _crossing(low[edge], slope[edge], along[edge], _POLYGON_SCALE * x + _POLYGON_SCALE // 2)
    y = np.ceil(np.clip((row + 0.5) / _POLYGON_SCALE - 0.5, 0, height)).astype(np.int64)
    toggles, times = np.unique(x * height + y, return_counts=True)
    flips[toggles[times % 2 == 1]] ^= True
  toggles = np.flatnonzero(flips[:-1])
  return counts_to_mask(np.diff(toggles, prepend=0, append=height * width), height, width)


def _crossing(
  low: np.ndarray, slope: np.ndarray, along: np.ndarray, column: np.ndarray
) -> np.ndarray:
  """The upper fine row of the two points between which an edge leaves a fine column, int64 [E].

  Args:
    low: the edge's lower end, [E, 2]; of its points at t = 0, 1, … one coordinate is low + t, the
      other low + slope * t, rounded.
    along: the axis of the first.
    column: where it goes on to, or comes from, column + 1; at least 0.
  """

  def across(t: np.ndarray) -> np.ndarray:
    return np.trunc(low[np.arange(len(low)), 1 - along] + slope * t + 0.5).astype(np.int64)

  t = column - low[:, 0]  # of an edge along x
  rows = np.minimum(across(t), across(t + 1))
  steep = along == 1
  if steep.any():
    low, slope, along, column = low[steep], slope[steep], along[steep], column[steep]
    rising = slope > 0
    # The first point that lies beyond the step: by the line, and rounding moves it by one at most.
    t = np.ceil((column + 0.5 - low[:, 0]) / slope).astype(np.int64) - 2
    for _ in range(4):
      t += np.where(rising, across(t) <= column, across(t) > column)
    rows[steep] = low[:, 1] + t - 1
  return rows


# What a user points at


def mask_from_box(box: Sequence[float | str], height: int, width: int) -> np.ndarray:
  """Every pixel that the box x1, y1, x2, y2 touches, uint8 [height, width]; the rest is cut off.

  Numbers are pixels, or shares of the frame such as "30%".
  """
  mask = np.zeros((height, width), np.uint8)
  mask[_sides_of_box(box, height, width)] = 1
  return mask


def _sides_of_box(box: Sequence[float | str], height: int, width: int) -> tuple[slice, slice]:
  """The rows and columns of the frame that a box touches."""
  x1, y1, x2, y2 = corners = _corners_of_box(box, height, width)
  if x2 <= 0 or y2 <= 0 or x1 >= width or y1 >= height:
    raise InputError(
      f"box {_plain(corners)} lies outside the video of {width}x{height} (width x height)"
    )
  top, left = max(int(np.floor(y1)), 0), max(int(np.floor(x1)), 0)
  return slice(top, int(np.ceil(y2))), slice(left, int(np.ceil(x2)))


def _corners_of_box(box: Sequence[float | str], height: int, width: int) -> list[float]:
  x1, y1, x2, y2 = corners = in_pixels(box, height, width, "box", "x1,y1,x2,y2")
  if not (x1 < x2 and y1 < y2):
    raise InputError(f"box {_plain(corners)} is empty; x1 < x2 and y1 < y2 are needed")
  return corners


def mask_from_point(
  point: Sequence[float | str], height: int, width: int, radius: float | None = None
) -> np.ndarray:
  """A disc around the point x, y, uint8 [height, width].

  The default radius, 1/40 of the video's diagonal, leaves at least one cell on any grid of 20x20 or
  finer (mask_to_grid; the published tower has 27x27); on a coarser grid give a larger one.
  """
  x, y = place = in_pixels(point, height, width, "point", "x,y")
  if not (0 <= x < width and 0 <= y < height):
    raise InputError(
      f"point {_plain(place)} lies outside the video of {width}x{height} (width x height)"
    )
  if radius is None:
    radius = float(np.hypot(height, width)) / 40
  rows = np.arange(height)[:, None] - y
  columns = np.arange(width)[None, :] - x
  mask = (rows**2 + columns**2 <= radius**2).astype(np.uint8)
  mask[int(y), int(x)] = 1
  return mask


def in_pixels(
  values: Sequence[float | str], height: int, width: int, what: str, form: str
) -> list[float]:
  """x, y, … in pixels, of as many numbers and shares ("30%") as `form` has, such as "x,y".

  Raises InputError for anything else, and for fractions of a pixel, which were meant as shares.
  """
  needed = f"{what} {shown(values)}; {form} in pixels is needed, or shares such as 30%"
  with reading(needed):
    entries = list(values)
    numbers = [float(v.removesuffix("%") if isinstance(v, str) else v) for v in entries]
  if len(numbers) != form.count(",") + 1 or not np.isfinite(numbers).all():
    raise InputError(needed)
  shares = [isinstance(v, str) and v.endswith("%") for v in entries]
  if not any(shares) and any(v % 1 for v in numbers) and all(0 <= v <= 1 for v in numbers):
    relative = ",".join(f"{100 * v:g}%" for v in numbers)
    raise InputError(
      f"{what} {_plain(numbers)} is smaller than a pixel; relative? write {what}:{relative}"
    )
  sides = (width, height) * len(numbers)
  return [
    v / 100 * side if share else v for v, share, side in zip(numbers, shares, sides, strict=False)
  ]


def _plain(values: Sequence[float]) -> str:
  return ",".join(f"{float(v):g}" for v in values)


# The patch grid


def mask_to_grid(
  masks: np.ndarray, grid: int, aspect_ratio: str = "square", rule: str = "keep"
) -> np.ndarray:
  """Which cells of the vision tower's patch grid belong to the object.

  Args:
    masks: [..., H, W], any number type.
    grid: cells per side.
    aspect_ratio: "pad" first pads the mask with zeros to a square, as the frames are padded.
    rule: "published": bilinear without antialias, then > 0, decided by float32 rounding as in
      PyTorch; an object that falls between the sample points vanishes. "area": the cells at least
      half covered, or else the one covered most, so only an empty mask leaves none. "keep": the
      published cells, and by area where they would be none.

  Returns uint8 [..., grid, grid]. See `vanished`. Source: videorefer/model/layer.py:77-90, 135-139.
  """
  if rule not in GRID_RULES:
    raise InputError(f"mask grid rule {rule!r}; accepted: {', '.join(GRID_RULES)}")
  if aspect_ratio == "pad":
    masks = _pad_square(masks)
  if rule == "area":
    return area_cells(masks, grid, grid)
  cells = (resize_mask(masks, grid) > 0).astype(np.uint8)
  if rule == "keep" and (gone := vanished(masks, cells)).any():
    cells[gone] = area_cells(masks[gone], grid, grid)
  return cells


def vanished(masks: np.ndarray, cells: np.ndarray) -> np.ndarray:
  """bool [...]: the object is in the mask [..., H, W] but in no cell of the grid [..., g, g].

  Such an object reaches the decoder as no information at all.
  """
  return (masks != 0).any((-2, -1)) & ~(cells != 0).any((-2, -1))


@dataclass(frozen=True)
class GridMask:
  """A mask on the tower's grid.

  Attributes:
    cells: of `mask_to_grid`, uint8 [N].
    lost: by the published rule the object is in no cell.
    small: the object is lower and narrower than a cell.
  """

  cells: np.ndarray
  lost: bool
  small: bool


def grid_mask(
  mask: np.ndarray, grid: int, aspect_ratio: str = "square", rule: str = "keep"
) -> GridMask:
  """A mask [H, W] on the grid; the arguments are those of `mask_to_grid`."""
  cells = mask_to_grid(mask, grid, aspect_ratio, "published")
  lost = bool(vanished(mask, cells))
  if rule != "published" and (lost or rule != "keep"):
    cells = mask_to_grid(mask, grid, aspect_ratio, rule)
  sides = (max(mask.shape),) * 2 if aspect_ratio == "pad" else mask.shape
  extents = (np.flatnonzero(mask.any(1 - axis)) for axis in (0, 1))
  small = all(
    len(places) and places[-1] - places[0] + 1 < side / grid
    for places, side in zip(extents, sides, strict=True)
  )
  return GridMask(cells.reshape(-1), lost, small)


def resize_mask(masks: np.ndarray, grid: int) -> np.ndarray:
  """[..., H, W] to float32 [..., grid, grid], bilinear, half-pixel centres, no antialias."""
  height, width = masks.shape[-2:]
  top, bottom, below = _bilinear(height, grid)
  left, right, beside = _bilinear(width, grid)
  below = below[:, None]
  one = np.float32(1)
  corners = [
    masks[..., rows[:, None], columns[None, :]].astype(np.float32)
    for rows in (top, bottom)
    for columns in (left, right)
  ]
  upper = corners[0] * (one - beside) + corners[1] * beside
  lower = corners[2] * (one - beside) + corners[3] * beside
  return upper * (one - below) + lower * below


def _bilinear(size: int, grid: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Per cell: the two source indices and the second one's weight, rounded as PyTorch's kernel.

  PyTorch computes scale * (i + 0.5) - 0.5 in float32 with one rounding at the end (a fused
  multiply-add; on a CPU without one PyTorch itself rounds twice and finds other cells for some
  sizes); whether the result reaches an integer decides which pixels count.
  """
  scale = np.float64(np.float32(size) / np.float32(grid))
  source = np.maximum((scale * (np.arange(grid) + 0.5) - 0.5).astype(np.float32), np.float32(0))
  first = np.minimum(source.astype(np.int64), size - 1)
  weight = np.clip(source - first.astype(np.float32), np.float32(0), np.float32(1))
  return first, np.minimum(first + 1, size - 1), weight


def _pad_square(masks: np.ndarray) -> np.ndarray:
  height, width = masks.shape[-2:]
  side = max(height, width)
  square = np.zeros((*masks.shape[:-2], side, side), masks.dtype)
  top, left = (side - height) // 2, (side - width) // 2
  square[..., top : top + height, left : left + width] = masks
  return square


def area_cells(masks: np.ndarray, rows: int, columns: int) -> np.ndarray:
  """[..., H, W] to uint8 [..., rows, columns]: the cells at least half covered, or the one most.

  Only an empty mask leaves none.
  """
  down = _cell_sums((masks != 0).swapaxes(-1, -2), rows)  # [..., W, rows]
  covered = _cell_sums(down.swapaxes(-1, -2), columns)
  covered *= rows * columns / (masks.shape[-2] * masks.shape[-1])  # share of each cell
  # At a hair below a half, so that rounding does not decide about exact halves.
  enough = np.minimum(covered.max((-2, -1), keepdims=True), 0.5 - 1e-9)
  return ((covered >= enough) & (covered > 0)).astype(np.uint8)


def _cell_sums(values: np.ndarray, grid: int) -> np.ndarray:
  """[..., size] to float64 [..., grid]: sums over equal cells; pixels on an edge count in part."""
  size = values.shape[-1]
  sums = np.zeros((*values.shape[:-1], size + 1))
  np.cumsum(values, axis=-1, out=sums[..., 1:])
  edges = np.arange(grid + 1) * size / grid
  below = np.minimum(edges.astype(int), size - 1)
  part = edges - below
  at_edges = sums[..., below] * (1 - part) + sums[..., below + 1] * part
  return np.diff(at_edges, axis=-1)
