"""Rows of static shape for towers that read pictures of any size: pictures packed into budgets.

Letters: X tower row, N patch of a tower row, M patch of a scene token (merge * merge), V scene
token, R object, C cell of an object, K token kept per object, G patch of a context picture, L
sequence slot.

    pictures ─ pack ─► X rows of N patches, none split ┐
    objects ─ cells_of ─► patches, weights, places      ├─► arrays of one row, `build_row`
    ids with <image> and <REGION> expanded ─► slots     ┘
"""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data_pipes.errors import InputError
from data_pipes.patch_packing import pack_pictures
from data_pipes.prompts import IGNORE

Row = dict[str, np.ndarray]
"""The arrays of one row, or of a batch with a leading axis B: those that `models/navit.py` and
`models/crops.py` describe, and for every sequence slot, as in `data_pipes.batch`,

tokens int32 [L]: text ids; 0 in visual slots and padding.
visual int32 [L]: -1, or the row of the visual table: scene token v, then V + r*K + k.
valid bool [L]: text or visual slot. supervised bool [L]: the slot's own token is a target.
segments int32 [L]: the number of the sample in the row, -1 in padding.
"""


@dataclass(frozen=True, eq=False)
class Picture:
  """A picture as the processor gives it.

  patches: uint8 [h*w, 588] in blocks of merge x merge; grid: (h, w) in patches; merge: 1 or more.
  """

  patches: np.ndarray
  grid: tuple[int, int]
  merge: int = 1

  def __post_init__(self):
    h, w = self.grid
    if h % self.merge or w % self.merge or len(self.patches) != h * w:
      raise InputError(
        f"a picture of {len(self.patches)} patches with grid {h}x{w}, merge {self.merge}; "
        "accepted: whole blocks that fill the grid"
      )

  @property
  def tokens(self) -> int:
    """Scene tokens that it gives."""
    return len(self.patches) // self.merge**2

  @functools.cached_property
  def digest(self) -> bytes:
    """A hash of all that it is."""
    content = hashlib.blake2b(b"%d %d %d:" % (*self.grid, self.merge), digest_size=16)
    content.update(np.ascontiguousarray(self.patches).data)
    return content.digest()

  def positions(self) -> np.ndarray:
    """(row, column) of each patch, int32 [h*w, 2], in the order of the patches."""
    (h, w), s = self.grid, self.merge
    at = np.moveaxis(np.indices((h, w)), 0, -1).reshape(h // s, s, w // s, s, 2)
    return at.transpose(0, 2, 1, 3, 4).reshape(h * w, 2).astype(np.int32)


@dataclass(frozen=True, eq=False)
class Crop:
  """An object as its crop shows it.

  picture: the crop (merge 1). mask: [gh, gw], over 0 where the object is. box: (top, left, bottom,
  right, height, width) of the crop in its picture; None where no position is told. local, whole:
  the surroundings and the whole picture (PixelRefer-Lite). start: cells that k-means begins with.
  """

  picture: Picture
  mask: np.ndarray
  box: Sequence[int] | None = None
  local: Picture | None = None
  whole: Picture | None = None
  start: Sequence[int] | None = None

  def pictures(self) -> list[Picture]:
    return [p for p in (self.picture, self.local, self.whole) if p is not None]

  @property
  def cells(self) -> int:
    """How many cells its mask keeps."""
    return int((self.mask > 0).sum())


@dataclass(frozen=True, eq=False)
class Sample:
  """One dialogue: ids with every `<image>` and `<REGION>` written out, labels, pictures, objects.

  `video`: the pictures are frames of one size, which the compressor compares.
  """

  ids: np.ndarray
  labels: np.ndarray
  scene: Sequence[Picture] = ()
  objects: Sequence[Crop] = ()
  video: bool = False

  def pictures(self) -> list[Picture]:
    return [*self.scene, *(p for crop in self.objects for p in crop.pictures())]


class Ids(NamedTuple):
  """Ids of `<image>` and `<REGION>`, and K."""

  image: int
  region: int
  tokens_per_object: int


@dataclass(frozen=True)
class Shape:
  """The static sizes of a row; hashable, so that a jitted step can take it as static.

  `merge` is that of the tower (M = merge * merge); pictures may be merged by it or not at all.
  """

  tower_rows: int  # X
  patches: int  # N
  scene: int  # V
  objects: int  # R
  cells: int  # C
  context: int  # G
  length: int  # L
  merge: int
  tokens_per_object: int  # K
  patch_bytes: int = 588

  def empty(self, count: int) -> Row:
    """A batch of `count` rows with nothing in them."""
    row = build_row([], self, Ids(0, 0, self.tokens_per_object))
    return {key: np.repeat(array[None], count, axis=0) for key, array in row.items()}


class TowerRow(NamedTuple):
  """Pictures in one row of N patches: uint8 [N, 588], int32 [N], int32 [N, 2]."""

  patches: np.ndarray
  segments: np.ndarray
  positions: np.ndarray


class Packed(NamedTuple):
  """Pictures in rows; `start`: by id(picture), its first patch among those of all rows."""

  rows: list[TowerRow]
  start: Mapping[int, int]


def _tower_row(patches: int, patch_bytes: int) -> TowerRow:
  """A row without a picture."""
  return TowerRow(
    np.zeros((patches, patch_bytes), np.uint8),
    np.full(patches, -1, np.int32),
    np.zeros((patches, 2), np.int32),
  )


def pack(pictures: Sequence[Picture], sizes: Sequence[int], patch_bytes: int = 588) -> Packed:
  """Pictures in rows of these sizes (`patch_packing`); one that is named twice is stored once.

  Raises InputError where a picture is larger than the largest row.
  """
  pictures = list({id(p): p for p in pictures}.values())
  rows, start, before = [], {}, 0
  for chosen in pack_pictures([len(p.patches) for p in pictures], sizes):
    row, at = _tower_row(chosen.size, patch_bytes), 0
    for number in chosen.pictures:
      picture = pictures[number]
      start[id(picture)] = before + at
      where = slice(at, at := at + len(picture.patches))
      row.patches[where] = picture.patches
      row.segments[where] = number
      row.positions[where] = picture.positions()
    rows.append(row)
    before += chosen.size
  return Packed(rows, start)


class Cells(NamedTuple):
  """Cells of a mask in raster order: the four patches each is made of, weights, place."""

  patches: np.ndarray  # int32 [n, 4], numbers in the crop
  weights: np.ndarray  # float32 [n, 4]
  places: np.ndarray  # float32 [n, 2]


def cells_of(crop: Crop) -> Cells:
  """The cells that a mask keeps.

  Where the mask's grid is another than that of the features, these are interpolated to it
  (bilinear, corners not aligned). The place of a patch is told as published: the box is (top, left,
  bottom, right) and is read as (x0, y0, x1, y1).
  """
  (h, w), grid = crop.picture.grid, crop.mask.shape
  i, j = np.nonzero(crop.mask > 0)
  low_i, high_i, share_i = _between(i, h, grid[0])
  low_j, high_j, share_j = _between(j, w, grid[1])
  corners = [(low_i, low_j), (low_i, high_j), (high_i, low_j), (high_i, high_j)]
  shares = [
    (1 - share_i) * (1 - share_j), (1 - share_i) * share_j, share_i * (1 - share_j),
    share_i * share_j,
  ]  # fmt: skip
  patches = np.stack([a * w + b for a, b in corners], axis=-1).astype(np.int32)
  weights = np.stack(shares, axis=-1).astype(np.float32)
  places = np.zeros((len(i), 2), np.float32)
  if crop.box is not None:
    x0, y0, x1, y1, height, width = (float(v) for v in crop.box)
    x = [(b / w * (x1 - x0) + x0) / (width - 1) for _, b in corners]
    y = [(a / h * (y1 - y0) + y0) / (height - 1) for a, _ in corners]
    places = np.stack([(np.stack(v, axis=-1) * weights).sum(-1) for v in (x, y)], axis=-1)
  return Cells(patches, weights, places.astype(np.float32))


def _between(at: np.ndarray, old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """For places on a grid of `new` cells, the two neighbours among `old` ones and the share."""
  centre = np.maximum((at + 0.5) * (old / new) - 0.5, 0)
  low = np.minimum(np.floor(centre).astype(np.int64), old - 1)
  return low, np.minimum(low + 1, old - 1), np.where(low == old - 1, 0, centre - low)


def even_start(cells: int, k: int) -> np.ndarray:
  """The cells that k-means starts from: evenly spaced; the first ones where there are at most k."""
  return np.arange(k) if cells <= k else (2 * np.arange(k) + 1) * cells // (2 * k)


def needed_shape(
  samples: Sequence[Sequence[Sample]], *, merge: int, tokens_per_object: int, patches: int = 0
) -> Shape:
  """The smallest shape that holds each of the rows (lists of samples).

  `patches`: size of the tower's rows, by default the largest picture.
  """
  pictures = [list({id(p): p for s in row for p in s.pictures()}.values()) for row in samples]
  sizes = [[len(p.patches) for p in row] for row in pictures]
  patches = patches or max((n for row in sizes for n in row), default=merge**2)
  objects = [[o for s in row for o in s.objects] for row in samples]
  crops = [o for row in objects for o in row]
  context = [len(p.patches) for o in crops for p in (o.local, o.whole) if p is not None]
  flat = [p for row in pictures for p in row]
  return Shape(
    tower_rows=max((len(pack_pictures(row, (patches,))) for row in sizes), default=0) or 1,
    patches=patches,
    scene=max((sum(p.tokens for s in row for p in s.scene) for row in samples), default=0),
    objects=max(map(len, objects), default=0),
    cells=max((o.cells for o in crops), default=0) or 1,
    context=max(context, default=0),
    length=max((sum(len(s.ids) for s in row) for row in samples), default=0),
    merge=merge,
    tokens_per_object=tokens_per_object,
    patch_bytes=flat[0].patches.shape[-1] if flat else 588,
  )


def build_row(samples: Sequence[Sample], shape: Shape, ids: Ids, where: str = "question") -> Row:
  """Lays samples out in one row, each a segment of its own.

  Raises:
    InputError: `<image>` or `<REGION>` are not as many as there are tokens, or it does not fit.
  """
  pictures = [p for sample in samples for p in sample.pictures()]
  packed = pack(pictures, (shape.patches,), shape.patch_bytes)
  spare = shape.tower_rows - len(packed.rows)
  if spare < 0:
    raise InputError(
      f"{where}: {sum(len(p.patches) for p in pictures)} patches need {len(packed.rows)} rows of "
      f"{shape.patches}; accepted: {shape.tower_rows}"
    )
  rows = packed.rows + [_tower_row(shape.patches, shape.patch_bytes)] * spare
  return {
    **dict(zip(TOWER_ROW, map(np.stack, zip(*rows, strict=True)), strict=True)),
    **scene_arrays(samples, packed.start, shape),
    **object_arrays([o for s in samples for o in s.objects], packed.start, shape),
    **text_arrays(samples, shape, ids, where),
  }


TOWER_ROW = ("patches", "patch_segments", "patch_positions")  # a TowerRow's arrays in a Row


def text_arrays(
  samples: Sequence[Sample], shape: Shape, ids: Ids, where: str = "question"
) -> dict[str, np.ndarray]:
  """The sequence slots of a row."""
  length = sum(len(s.ids) for s in samples)
  if length > shape.length:
    raise InputError(f"{where}: {length} slots; accepted: {shape.length}")
  row = {
    "tokens": np.zeros(shape.length, np.int32),
    "visual": np.full(shape.length, -1, np.int32),
    "valid": np.arange(shape.length) < length,
    "supervised": np.zeros(shape.length, bool),
    "segments": np.full(shape.length, -1, np.int32),
  }
  at = scene = objects = 0
  for number, sample in enumerate(samples):
    slots = slice(at, at + len(sample.ids))
    visual = visual_rows(sample, ids, shape.scene, scene, objects, where)
    row["tokens"][slots] = np.where(visual < 0, sample.ids, 0)
    row["visual"][slots] = visual
    row["supervised"][slots] = sample.labels != IGNORE
    row["segments"][slots] = number
    at = slots.stop
    scene += sum(p.tokens for p in sample.scene)
    objects += len(sample.objects)
  return row


def visual_rows(
  sample: Sample, ids: Ids, table: int, scene: int = 0, objects: int = 0, where: str = "question"
) -> np.ndarray:
  """The row of the visual table that each id takes, -1 for text; `table` scene rows come first.

  `scene` and `objects` count those of earlier samples of the row.
  """
  visual = np.full(len(sample.ids), -1, np.int32)
  is_image, is_region = sample.ids == ids.image, sample.ids == ids.region
  count = sum(p.tokens for p in sample.scene)
  if is_image.sum() != count:
    raise InputError(f"{where}: {is_image.sum()} <image> ids for {count} tokens of its pictures")
  visual[is_image] = scene + np.arange(count)
  K = ids.tokens_per_object
  rows = [
    table + (objects + r) * K + np.arange(tokens_of(crop, K))
    for r, crop in enumerate(sample.objects)
  ]
  count = sum(map(len, rows))
  if is_region.sum() != count:
    raise InputError(f"{where}: {is_region.sum()} <REGION> ids for {count} tokens of its objects")
  if rows:
    visual[is_region] = np.concatenate(rows)
  return visual


def tokens_of(crop: Crop, k: int) -> int:
  """Tokens of an object: as many as cells, at most k; with context pictures always k."""
  return k if crop.whole is not None else min(crop.cells, k)


def scene_arrays(
  samples: Sequence[Sample], start: Mapping[int, int], shape: Shape
) -> dict[str, np.ndarray]:
  """Patches, frame and token before of every scene token; `start` as in `Packed`."""
  M = shape.merge**2
  scene = np.zeros((shape.scene, M), np.int32)
  frames = np.full(shape.scene, -1, np.int32)
  before = np.full(shape.scene, -1, np.int32)
  at = number = 0
  for sample in samples:
    for i, picture in enumerate(sample.scene):
      slots = np.arange(at, at + picture.tokens)
      if slots[-1:] >= shape.scene:
        raise InputError(f"scene tokens do not fit; accepted: {shape.scene}")
      inside = (slots - at)[:, None] * picture.merge**2 + np.arange(M) % picture.merge**2
      scene[slots] = start[id(picture)] + inside
      frames[slots] = number
      if sample.video and i:
        if picture.grid != sample.scene[i - 1].grid:
          raise InputError("frames of a video have different sizes; accepted: one size")
        before[slots] = slots - picture.tokens
      at, number = at + picture.tokens, number + 1
  return {"scene": scene, "scene_frame": frames, "scene_before": before}


def object_arrays(
  crops: Sequence[Crop], start: Mapping[int, int], shape: Shape
) -> dict[str, np.ndarray]:
  """Cells, places and context of every object; `start` as in `Packed`."""
  R, C, K, G = shape.objects, shape.cells, shape.tokens_per_object, shape.context
  if len(crops) > R or any(crop.cells > C for crop in crops):
    most = max((crop.cells for crop in crops), default=0)
    raise InputError(f"{len(crops)} objects of up to {most} cells; accepted: {R} of {C}")
  out = {
    "cells": np.zeros((R, C, 4), np.int32),
    "cell_weights": np.zeros((R, C, 4), np.float32),
    "cell_places": np.zeros((R, C, 2), np.float32),
    "cell_counts": np.full(R, -1, np.int32),
    "cell_starts": np.zeros((R, K), np.int32),
    "local": np.full((R, G), -1, np.int32),
    "whole": np.full((R, G), -1, np.int32),
  }
  for r, crop in enumerate(crops):
    cells, n = cells_of(crop), crop.cells
    out["cells"][r, :n] = start[id(crop.picture)] + cells.patches
    out["cell_weights"][r, :n] = cells.weights
    out["cell_places"][r, :n] = cells.places
    out["cell_counts"][r] = n
    begin = even_start(n, K) if crop.start is None or n <= K else np.asarray(crop.start)
    out["cell_starts"][r] = np.minimum(begin, C - 1)
    for name, picture in (("local", crop.local), ("whole", crop.whole)):
      if picture is not None:
        size = len(picture.patches)
        out[name][r, :size] = start[id(picture)] + np.arange(size)
  return out
