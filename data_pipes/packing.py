"""Which samples share a row, so that rows of one static shape are nearly full.

Packed: several samples one behind the other in a row, as `segments`. Bucketed: a sample a row, in
up to three shapes. Both are plans made from the needs of all samples before the first batch, the
same in every process, so that the position in the data stays one integer.
"""

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from data_pipes.batch import Needs, Row, RowShape, Used, fit_shape, place
from data_pipes.content import kept
from data_pipes.errors import InputError
from data_pipes.failures import Failures
from data_pipes.files import replaced
from data_pipes.samples import RowSource, Samples

log = logging.getLogger(__name__)

MAX_SHAPES = 3  # of an epoch: each is compiled once
_WINDOW = 8192  # samples packed together
_OPEN = 1024  # rows that are offered to the next window, the emptiest
_FIELDS = tuple(field.name for field in dataclasses.fields(Needs))


@dataclasses.dataclass(frozen=True)
class Plan:
  """Rows of a packed set.

  Attributes:
    rows: the samples of each row, by their number.
    shape: of every row.
    fill: shares of the slots, frames, objects and clips of all rows that samples take.
    frames: frame slots of each row, one of `classes`, of which the last is the shape's.
  """

  rows: Sequence[np.ndarray]
  shape: RowShape
  fill: dict[str, float]
  frames: np.ndarray
  classes: tuple[int, ...]

  def shape_of(self, numbers: Sequence[int]) -> RowShape:
    """The shape of a batch of rows by their numbers, -1 for an empty one."""
    return cut_shape(self.shape, self.frames, self.classes, numbers)


def plan_rows(
  needs: Sequence[Needs],
  length: int,
  *,
  sizes: dict[str, int],
  scene: int,
  budgets: dict[str, int] | None = None,
  seed: int = 0,
  batch_size: int = 1,
  classes: tuple[int, ...] = (),
) -> Plan:
  """Packs samples into rows of `length` slots.

  A few samples with many frames do not decide how many frames all rows have: they get rows of
  their own, and batches without such rows are smaller (`frame_classes`).

  Args:
    needs: those of each sample.
    sizes: image_size, grid, tokens_per_object and scene_tokens of the rows.
    scene: T.
    budgets: frames, objects, clips and object_frames of a row where they are set. Otherwise what a
      full row has on average and some more (frames: a tenth, so that few slots stay empty for want
      of frames, and few frames are encoded for nothing), and what the largest sample needs.
    seed: of the order in which samples are packed.
    batch_size: rows of a global batch.
    classes: frame slots that rows may have, one or two; by default what suits the samples.

  Raises:
    InputError: a sample that alone does not fit a row.
  """
  budgets = {k: v for k, v in (budgets or {}).items() if v}
  take = _takes(needs, sizes)
  names = ("length", "frames", "objects", "clips")
  order = np.random.default_rng(seed).permutation(len(take))
  full_rows = take[:, 0].sum() / length
  room = [length]
  for column, slack, multiple in ((1, 1.1, 8), (2, 1.4, 4), (3, 1.4, 1)):
    usual = math.ceil(take[:, column].sum() * slack / max(full_rows, 1))
    usual = -(-max(usual, int(take[:, column].max(initial=0)), 1) // multiple) * multiple
    room.append(budgets.get(names[column], usual))
  over = (take > room).any(1)
  if over.any():
    i = int(np.flatnonzero(over)[0])
    listed = ", ".join(
      f"{n} {t} (accepted: {r})" for n, t, r in zip(names, take[i], room, strict=True) if t > r
    )
    raise InputError(f"{over.sum()} samples do not fit a packed row, such as {i}: found {listed}")
  if "frames" in budgets:
    classes = (room[1],)
  elif not classes:
    rounded = -(-take[:, 1] // 8) * 8
    usual = -(-math.ceil(take[:, 1].sum() * 1.1 / max(full_rows, 1)) // 8) * 8
    classes = frame_classes(rounded, full_rows, batch_size, max(usual, 1))
  rows: list[np.ndarray] = []
  frames: list[int] = []
  class_of = np.searchsorted(classes, take[:, 1])
  for k, size in enumerate(classes):
    more = assign(take, np.array([length, size, *room[2:]]), order[class_of[order] == k])
    rows += more
    frames += [size] * len(more)
  full = np.array(room) * max(len(rows), 1)
  full[1] = max(sum(frames), 1)
  shape = RowShape(
    frames=classes[-1],
    scene=scene,
    objects=room[2],
    object_frames=budgets.get("object_frames", max([1, *(n.object_frames for n in needs)])),
    length=length,
    clips=room[3],
    **sizes,  # type: ignore[arg-type]
  )
  fill = dict(zip(names, map(float, take.sum(0) / full), strict=True))
  return Plan(rows, shape, fill, np.array(frames, np.int32), tuple(map(int, classes)))


def frame_classes(
  frames: np.ndarray, rows: float, batch_size: int, least: int = 1
) -> tuple[int, ...]:
  """Frame slots that the rows of a batch may have: one size, or two where a few samples need many.

  A second size is a second program: it is taken where random batches then have a tenth fewer slots,
  each batch having those of its largest sample.

  Args:
    frames: that each sample needs.
    rows: that the samples make; each of the few is taken to have one of its own.
    batch_size: rows of a global batch.
    least: slots of any row.
  """
  sizes, counts = np.unique(np.maximum(frames, least), return_counts=True)
  if not len(sizes):
    return (least,)
  beyond = len(frames) - np.cumsum(counts)  # samples that need more
  fits = np.clip(1 - beyond / max(rows, 1), 0, 1) ** batch_size  # share of the batches
  slots = fits * sizes + (1 - fits) * sizes[-1]
  best = int(np.argmin(slots))
  pair = (int(sizes[best]), int(sizes[-1]))
  return pair if slots[best] < 0.9 * sizes[-1] else pair[1:]


def cut_shape(
  shape: RowShape, frames: np.ndarray, classes: Sequence[int], numbers: Sequence[int]
) -> RowShape:
  """The shape with the fewest frame slots of `classes` that hold the rows of these numbers.

  `frames` are those that each row needs; a number -1 stands for an empty row.
  """
  most = max((int(frames[n]) for n in numbers if n >= 0), default=0)
  return dataclasses.replace(shape, frames=next(size for size in classes if size >= most))


def budgets_of(shape: RowShape) -> dict[str, int]:
  """The budgets of `plan_rows` that give this shape."""
  return {k: getattr(shape, k) for k in ("frames", "objects", "object_frames", "clips")}


def _takes(needs: Sequence[Needs], sizes: dict[str, int]) -> np.ndarray:
  """int64 [samples, 4]: slots, frames, objects, clips."""
  rows = [
    (n.length(sizes["tokens_per_object"], sizes["scene_tokens"]), n.frames, n.objects, n.scene > 0)
    for n in needs
  ]
  return np.array(rows, np.int64).reshape(-1, 4)


def assign(take: np.ndarray, room: np.ndarray, order: np.ndarray) -> list[np.ndarray]:
  """Best fit in a random order, those of text alone last; rows in the order of their opening.

  Not the longest first: a clip takes so many slots that a row holds few, and the short ones, left
  to themselves, leave room that nothing fits.
  """
  rows: list[list[int]] = []
  left = np.zeros((0, 4), np.int64)  # of the open rows
  open_rows: list[int] = []
  for start in range(0, len(order), _WINDOW):
    window = order[start : start + _WINDOW]
    window = window[np.argsort(take[window, 3] == 0, kind="stable")]
    for i in window:
      fits = (left >= take[i]).all(1)
      if fits.any():
        at = int(np.argmin(np.where(fits, left[:, 0], np.iinfo(np.int64).max)))
      else:
        at = len(open_rows)
        open_rows.append(len(rows))
        rows.append([])
        left = np.concatenate([left, room[None]])
      rows[open_rows[at]].append(int(i))
      left[at] -= take[i]
      if left[at, 0] * 64 < room[0]:  # too little for anything
        left = np.delete(left, at, 0)
        del open_rows[at]
    keep = np.sort(np.argsort(-left[:, 0], kind="stable")[:_OPEN])
    left, open_rows = left[keep], [open_rows[k] for k in keep]
  return [np.array(row) for row in rows]


class PackedSamples(RowSource):
  """Random access to packed rows, as `Samples` gives single ones.

  A sample that cannot be read is left out of its row and counted; the others of the row stay.
  """

  shape: RowShape

  def __init__(
    self,
    sets: Sequence[Samples],
    plan: Plan,
    failures: Failures,
    first: int = 0,
    total: int | None = None,
  ):
    """`plan` numbers the samples of `sets` through, one set after another.

    Args:
      first: number of the first of these samples among all of the run.
      total: samples of the run; None: these are all.
    """
    self.shape = plan.shape
    self._plan, self._failures = plan, failures
    self._first, self._total = first, total
    self._sets, self._ends = sets, np.cumsum([len(s) for s in sets])

  def __len__(self) -> int:
    return len(self._plan.rows)

  def names(self, index: int) -> list[str]:
    places = (locate(self._ends, number) for number in self._plan.rows[index])
    return [name for k, sample in places for name in self._sets[k].names(sample)]

  def fill(self, row: Row, index: int) -> None:
    used = Used()
    for number in self._plan.rows[index]:
      k, sample = locate(self._ends, number)
      samples, room = self._sets[k], row["frames"][used.frames :]
      try:
        text, clip, where = samples.part(sample, room)
        used = place(row, text, clip, self.shape, samples.tokenizer.region_id, where, used)
      except InputError as error:
        room[:] = 0  # what was decoded of it
        total = int(self._ends[-1]) if self._total is None else self._total
        self._failures.add(self._first + int(number), str(error), total)


@dataclasses.dataclass(frozen=True)
class Bucket:
  """Samples (by number) that go into rows of one shape, but for frame slots: see `Plan`."""

  numbers: np.ndarray
  shape: RowShape
  frames: np.ndarray
  classes: tuple[int, ...]


class BucketSamples(RowSource):
  """Random access to the rows of one bucket."""

  shape: RowShape

  def __init__(self, sets: Sequence[Samples], bucket: Bucket):
    self.shape, self.numbers = bucket.shape, bucket.numbers
    self._bucket = bucket
    self._sets, self._ends = sets, np.cumsum([len(s) for s in sets])

  def __len__(self) -> int:
    return len(self.numbers)

  def shape_of(self, rows: Sequence[int]) -> RowShape:
    """The shape of a batch of these rows."""
    return cut_shape(self.shape, self._bucket.frames, self._bucket.classes, rows)

  def names(self, index: int) -> list[str]:
    k, sample = locate(self._ends, self.numbers[index])
    return self._sets[k].names(sample)

  def fill(self, row: Row, index: int) -> None:
    k, sample = locate(self._ends, self.numbers[index])
    text, clip, where = self._sets[k].part(sample, row["frames"])
    place(row, text, clip, self.shape, self._sets[k].tokenizer.region_id, where)


def locate(ends: np.ndarray, number: int) -> tuple[int, int]:
  """(set, number within it) of a sample numbered through all sets."""
  k = int(np.searchsorted(ends, number, side="right"))
  return k, int(number - (ends[k - 1] if k else 0))


def make_buckets(
  needs: Sequence[Needs],
  lengths: Sequence[int],
  *,
  sizes: dict[str, int],
  scene: int,
  batch_size: int = 1,
) -> list[Bucket]:
  """Sorts samples into rows of at most `lengths[0]`, `lengths[1]`, ... slots.

  Each bucket's other sizes are what its largest sample needs; a bucket without samples is left out.

  Raises:
    InputError: more than three lengths, or a sample longer than all of them.
  """
  lengths = sorted(lengths)
  if not 1 <= len(lengths) <= MAX_SHAPES or lengths[0] < 1:
    raise InputError(f"buckets={tuple(lengths)}; accepted: 1 to {MAX_SHAPES} row lengths")
  slots = _takes(needs, sizes)[:, 0]
  if slots.max(initial=0) > lengths[-1]:
    i = int(np.argmax(slots))
    raise InputError(f"sample {i} has {slots[i]} slots; accepted: a bucket that holds it")
  bucket_of = np.searchsorted(lengths, slots)
  buckets = []
  for k, length in enumerate(lengths):
    numbers = np.flatnonzero(bucket_of == k)
    if len(numbers):
      shape = fit_shape((needs[int(i)] for i in numbers), scene=scene, **sizes)
      frames = np.array([needs[int(i)].frames for i in numbers], np.int32)
      sizes_of_frames = frame_classes(frames, len(numbers), batch_size)
      shape = dataclasses.replace(shape, length=length)
      buckets.append(Bucket(numbers, shape, frames, sizes_of_frames))
  return buckets


# The needs of a large set take minutes to find; they are kept beside prepared shards.


def read_needs(path: Path) -> list[Needs] | None:
  """What `write_needs` wrote, or None."""
  try:
    table = np.load(path)
  except (OSError, ValueError, EOFError):
    return None
  return [Needs(*map(int, row)) for row in table]


def write_needs(path: Path, needs: Sequence[Needs]) -> None:
  """Keeps needs in a file, if its folder can be written."""
  table = np.array([dataclasses.astuple(n) for n in needs], np.int32).reshape(-1, len(_FIELDS))
  try:
    with replaced(path, alone=False) as part, open(part, "wb") as file:
      np.save(file, table)
  except OSError as error:
    log.info("needs of the samples are not kept: %s", error)


def kept_plan(path: Path | None, make: Callable[[], Plan]) -> Plan:
  """A plan that is kept on disk: packing 700 000 samples takes a minute."""

  def arrays() -> dict[str, np.ndarray]:
    plan = make()
    return {
      "numbers": np.concatenate([np.zeros(0, np.int64), *plan.rows]),
      "counts": np.array([len(row) for row in plan.rows], np.int64),
      "frames": plan.frames,
      "classes": np.array(plan.classes),
      "shape": np.array(json.dumps(dataclasses.asdict(plan.shape))),
      "fill": np.array(json.dumps(plan.fill)),
    }

  held = kept(path, arrays)
  return Plan(
    np.split(held["numbers"], np.cumsum(held["counts"])[:-1]) if len(held["counts"]) else [],
    RowShape(**json.loads(str(held["shape"]))),
    json.loads(str(held["fill"])),
    held["frames"],
    tuple(map(int, held["classes"])),
  )


def digest_of_rows(groups: Iterable[tuple[Iterable[Iterable[int]], object]]) -> str:
  """ "N rows digest" of which samples share the rows of each shape: (rows, sizes) for each."""
  digest, count = hashlib.sha256(), 0
  for rows, sizes in groups:
    digest.update(f"{sizes}\n".encode())
    for row in rows:
      digest.update(np.array([-1, *row], np.int64).tobytes())  # -1: a row begins
      count += 1
  return f"{count} rows {digest.hexdigest()[:16]}"


def fill_line(plan: Plan, samples: int) -> str:
  """How full the rows are, for the log."""
  s = plan.shape
  sizes = {"length": s.length, "frames": s.frames, "objects": s.objects, "clips": s.clips}
  shares = ", ".join(f"{plan.fill[k]:.1%} of {sizes[k]} {k}" for k in sizes)
  return f"{samples} samples in {len(plan.rows)} packed rows: {shares}"
