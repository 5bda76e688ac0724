"""Training samples of VideoRefer's successors in packed rows of one static shape.

The published trainer puts the samples of a device batch one behind the other in one row; here a
plan made beforehand says which share a row, so that rows are nearly full and one program runs all.
"""

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipes.errors import InputError
from data_pipes.failures import Failures
from data_pipes.navit_rows import Ids, Row, Sample, Shape, build_row
from data_pipes.navit_samples import NavitRules, training_sample
from data_pipes.packing import assign, locate
from data_pipes.patch_packing import BLOCK, pack_pictures
from data_pipes.records import Record
from data_pipes.samples import RowSource
from data_pipes.tokenizer import Tokenizer


class NavitSamples:
  """Random access to the samples of one set of records."""

  def __init__(
    self,
    records: Sequence[Record],
    tokenizer: Tokenizer,
    rules: NavitRules,
    media_root: str | os.PathLike = "",
  ):
    self.records, self.tokenizer, self.rules = records, tokenizer, rules
    self.media_root = Path(media_root)

  def __len__(self) -> int:
    return len(self.records)

  def sample(self, index: int, pixels: bool = True) -> Sample:
    """Raises InputError, which names the record."""
    return training_sample(self.records[index], self.tokenizer, self.rules, self.media_root, pixels)


class NavitNeeds(NamedTuple):
  """What a sample takes of a Shape: slots, scene tokens, objects, cells of its largest object,
  patches of its largest context picture, and patches of each picture that the tower reads."""

  length: int
  scene: int
  objects: int
  cells: int
  context: int
  pictures: tuple[int, ...]


def navit_needs(sample: Sample) -> NavitNeeds:
  """What a sample takes; blank pictures are enough."""
  beside = [p for crop in sample.objects for p in (crop.local, crop.whole) if p is not None]
  once = {id(p): len(p.patches) for p in sample.pictures()}
  return NavitNeeds(
    len(sample.ids),
    sum(p.tokens for p in sample.scene),
    len(sample.objects),
    max((crop.cells for crop in sample.objects), default=0),
    max((len(p.patches) for p in beside), default=0),
    tuple(once.values()),
  )


@dataclasses.dataclass(frozen=True)
class NavitPlan:
  """Rows of a packed set: the samples of each by their number, and the shape of all.

  `fill`: shares of the slots and of the tower's patches of all rows that samples take.
  """

  rows: Sequence[np.ndarray]
  shape: Shape
  fill: dict[str, float]


def plan_navit_rows(
  sets: Sequence[NavitSamples],
  length: int,
  *,
  merge: int,
  tokens_per_object: int,
  failures: Failures,
  seed: int = 0,
) -> NavitPlan:
  """Packs the samples of all sets into rows of `length` slots.

  No frame is decoded. A sample whose media cannot be opened is left out and counted.

  Raises InputError: a sample that alone does not fit a row, or none that can be read.
  """
  numbers: list[int] = []
  needs: list[NavitNeeds] = []
  ends = np.cumsum([len(s) for s in sets])
  for number in range(int(ends[-1])):
    k, index = locate(ends, number)
    try:
      needs.append(navit_needs(sets[k].sample(index, pixels=False)))
    except InputError as error:
      failures.add(number, str(error), int(ends[-1]))
      continue
    numbers.append(number)
    if needs[-1].length > length:
      where = sets[k].records[index].where
      raise InputError(f"{where}: {needs[-1].length} slots; accepted: rows of {length}")
  if not needs:
    raise InputError("no training sample could be read; at least one is needed")
  rows = _shared(needs, length, seed)
  shape = _shape_of(needs, rows, length, merge, tokens_per_object)
  fill = {
    "length": sum(n.length for n in needs) / (length * len(rows)),
    "patches": sum(sum(n.pictures) for n in needs) / (shape.tower_rows * shape.patches * len(rows)),
  }
  return NavitPlan([np.array(numbers)[row] for row in rows], shape, fill)


def _shared(needs: Sequence[NavitNeeds], length: int, seed: int) -> list[np.ndarray]:
  """Which samples share a row."""
  take = np.array([(n.length, sum(n.pictures), n.objects, n.scene) for n in needs], np.int64)
  # Patches and objects of a full row on average, and more, so that slots seldom stay empty for
  # want of them; and what the largest sample needs.
  full_rows = max(take[:, 0].sum() / length, 1)
  room = [length]
  for column, slack in ((1, 1.1), (2, 1.4), (3, 1.4)):
    usual = math.ceil(take[:, column].sum() * slack / full_rows)
    room.append(max(usual, int(take[:, column].max()), 1))
  return assign(take, np.array(room), np.random.default_rng(seed).permutation(len(take)))


def _shape_of(
  needs: Sequence[NavitNeeds],
  rows: Sequence[np.ndarray],
  length: int,
  merge: int,
  tokens_per_object: int,
) -> Shape:
  """The least shape that holds every row; a row of the tower holds the largest picture."""
  patches = max((n for need in needs for n in need.pictures), default=1)
  patches = -(-patches // BLOCK) * BLOCK
  joined = [[needs[i] for i in row] for row in rows]
  return Shape(
    tower_rows=max(
      1,
      *(
        len(pack_pictures([n for need in row for n in need.pictures], (patches,))) for row in joined
      ),
    ),
    patches=patches,
    scene=max(sum(need.scene for need in row) for row in joined),
    objects=max(sum(need.objects for need in row) for row in joined),
    cells=max(1, max(need.cells for need in needs)),
    context=max(need.context for need in needs),
    length=length,
    merge=merge,
    tokens_per_object=tokens_per_object,
  )


class NavitRows(RowSource):
  """Random access to packed rows.

  A sample that cannot be read is left out of its row and counted; the others of the row stay.
  """

  shape: Shape

  def __init__(self, sets: Sequence[NavitSamples], plan: NavitPlan, ids: Ids, failures: Failures):
    self.shape = plan.shape
    self._sets, self._plan, self._ids, self._failures = sets, plan, ids, failures
    self._ends = np.cumsum([len(s) for s in sets])

  def __len__(self) -> int:
    return len(self._plan.rows)

  def names(self, index: int) -> list[str]:
    places = (locate(self._ends, number) for number in self._plan.rows[index])
    return [self._sets[k].records[sample].where for k, sample in places]

  def fill(self, row: Row, index: int) -> None:
    samples = []
    for number in self._plan.rows[index]:
      k, sample = locate(self._ends, number)
      try:
        samples.append(self._sets[k].sample(sample))
      except InputError as error:
        self._failures.add(int(number), str(error), int(self._ends[-1]))
    for name, array in build_row(samples, self.shape, self._ids, f"row {index}").items():
      row[name][...] = array
