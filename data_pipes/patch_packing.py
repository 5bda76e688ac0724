"""Pictures of any size in tower rows of a few static sizes, so that a tower compiles a few times.

A row of b patches holds whole pictures, each a segment of its own; b is one of at most four bucket
sizes, and one compiled program runs all rows of a size. What a picture gives does not depend on the
row that it lies in.
"""

import dataclasses
import itertools
from collections.abc import Sequence

from data_pipes.errors import InputError

MAX_BUCKETS = 4
BLOCK = 128  # patches; sizes are multiples of what attention kernels work on at once


@dataclasses.dataclass(frozen=True)
class Row:
  """A row of a bucket's size and the pictures in it, by number."""

  size: int
  pictures: tuple[int, ...]


def pack_pictures(sizes: Sequence[int], buckets: Sequence[int]) -> list[Row]:
  """Lays pictures of `sizes` patches into rows, none split.

  Pictures go largest first into the first row with room (first fit decreasing), with each bucket in
  turn as the size of an open row; then every row shrinks to the smallest bucket that holds it. The
  bucket with the fewest patches in all wins, the larger one (fewer rows) at a tie.

  Raises InputError: a picture larger than the largest bucket.
  """
  if not sizes:
    return []
  buckets = sorted(buckets)
  largest = max(sizes)
  if largest > buckets[-1]:
    raise InputError(
      f"a picture of {largest} patches; accepted: up to {buckets[-1]}, the largest tower row"
    )
  order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
  best: list[Row] = []
  for room in (b for b in reversed(buckets) if b >= largest):
    rows = _first_fit(sizes, order, room, buckets)
    if not best or patches_of(rows) < patches_of(best):
      best = rows
  return best


def patches_of(rows: Sequence[Row]) -> int:
  """Patches that the tower executes for rows."""
  return sum(row.size for row in rows)


def choose_buckets(
  calls: Sequence[Sequence[int]], count: int = MAX_BUCKETS, largest: int = 0
) -> tuple[int, ...]:
  """At most `count` bucket sizes for which the given calls execute the fewest patches.

  Args:
    calls: picture sizes of each call of the tower, such as all pictures of a training row or of
      the questions that are answered together.
    largest: a picture that must fit besides, such as the largest that the settings allow.

  Sizes are searched among those at which the calls' totals and a ladder of powers of the root of
  two end, so that a set planned on one part of the data suits another.
  """
  top = _blocks(max([largest, *(size for call in calls for size in call)], default=1))
  totals = sorted(_blocks(sum(call)) for call in calls if call)
  ladder = {_blocks(int(BLOCK * 2 ** (k / 2))) for k in range(2, 18)}
  quantiles = {totals[(k * (len(totals) - 1)) // 8] for k in range(9)} if totals else set()
  candidates = sorted(size for size in ladder | quantiles if size < top)
  tops = sorted({top, *(size for size in (*quantiles, *ladder) if top < size <= 2 * top)})

  def executed(buckets: tuple[int, ...]) -> int:
    return sum(patches_of(pack_pictures(call, buckets)) for call in calls)

  # One size more at a time, then each again in turn: the best of all sets would take minutes.
  singles: list[tuple[int, ...]] = [(size,) for size in tops]
  chosen = min(singles, key=executed)
  for _ in range(count - 1):
    chosen = min(((*chosen, size) for size in candidates), key=executed, default=chosen)
  for place in range(1, len(chosen)):
    others = chosen[:place] + chosen[place + 1 :]
    chosen = min(((*others, size) for size in candidates), key=executed)
  return tuple(sorted(set(chosen)))


def grouped(sizes: Sequence[Sequence[int]], together: int) -> list[list[int]]:
  """Calls that hold the pictures of `together` neighbouring samples each."""
  groups = (sizes[i : i + together] for i in range(0, len(sizes), together))
  return [list(itertools.chain.from_iterable(group)) for group in groups]


def _first_fit(
  sizes: Sequence[int], order: Sequence[int], room: int, buckets: Sequence[int]
) -> list[Row]:
  rows: list[list[int]] = []
  left: list[int] = []
  for i in order:
    at = next((r for r, free in enumerate(left) if free >= sizes[i]), len(rows))
    if at == len(rows):
      rows.append([])
      left.append(room)
    rows[at].append(i)
    left[at] -= sizes[i]
  used = (room - free for free in left)
  return [
    Row(next(b for b in buckets if b >= n), tuple(row)) for n, row in zip(used, rows, strict=True)
  ]


def _blocks(patches: int) -> int:
  return -(-patches // BLOCK) * BLOCK
