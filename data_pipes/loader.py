"""Records to batches: random access to the last moment, so that one integer is the whole position.

The order of samples is a function of the seed alone: mix, shuffle, take every process_count-th,
then batch. Nothing filters after the shuffle, no worker process has a state of its own, and the
global batches are the same for any number of processes.
"""

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import grain
import numpy as np

from data_pipes.batch import Row, rows_of
from data_pipes.errors import InputError
from data_pipes.failures import Failures, TooManyFailures
from data_pipes.samples import RowSource, StaticShape

if TYPE_CHECKING:
  from data_pipes.packing import BucketSamples

BUFFERED = 4  # batches held ready or being made, at most
BUFFER_BYTES = 4 << 30  # that they take, unless one batch alone takes more
_ENDLESS = 1 << 32  # epochs


def make_dataset(
  samples: Sequence[RowSource],
  *,
  batch_size: int,
  seed: int,
  drop_remainder: bool,
  epoch_seeds: str = "spread",
  shuffle: bool = True,
  epochs: int | None = 1,
  weights: Sequence[float] | None = None,
  process_index: int = 0,
  process_count: int = 1,
  failures: Failures | None = None,
  names: bool = False,
  shape_of: Callable[[Sequence[int]], StaticShape] | None = None,
) -> grain.MapDataset:
  """The batches of one process: element k is its part of global batch k.

  A sample that cannot be read becomes a row with no valid slot and nothing supervised, and is
  counted in `failures`; it is never swapped for another.

  Args:
    samples: the sets of a stage, all of one RowShape. Without `weights` they are joined and
      shuffled as one, so that every sample comes exactly once an epoch.
    batch_size: rows of the global batch; a process holds batch_size / process_count of them,
      global rows process_index, process_index + process_count, ...
    seed: of the order; each epoch has its own.
    epoch_seeds: see `first_seed`.
    drop_remainder: leave out the samples after the last full batch of the whole run; otherwise
      empty rows fill that batch up.
    epochs: passes over the samples; None goes on for ever.
    weights: shares in which to draw from the sets; ends when one of them has given its epochs.
    failures: where unreadable samples are counted; by default the first one raises.
    names: give a list of the samples' names in place of each batch; no media is read.
    shape_of: the shape of a global batch by the numbers of its samples (-1: an empty row), one of a
      few that hold them; by default that of the sets.
  """
  if batch_size % process_count:
    raise InputError(
      f"batch_size={batch_size} is not divisible by the number of processes ({process_count})"
    )
  shape = _shape_of(samples)
  ends = [0, *itertools.accumulate(map(len, samples))]
  failures = Failures() if failures is None else failures

  start = functools.partial(first_seed, seed, epoch_seeds)
  order = _order(ends, start, shuffle, epochs, weights)
  if not drop_remainder and epochs is not None and len(order) % batch_size:
    missing = batch_size - len(order) % batch_size
    order = grain.MapDataset.concatenate([order, grain.MapDataset.source([-1] * missing)])

  def located(number: int) -> tuple[int, int]:
    source = next(i for i in range(len(samples)) if number < ends[i + 1])
    return source, number - ends[source]

  def name(numbers: Sequence[int]) -> list[str]:
    places = (located(number) for number in numbers if number >= 0)
    return [name for source, index in places for name in samples[source].names(index)]

  def load(numbers: Sequence[int]) -> Row | list[str]:
    local = numbers[process_index::process_count]
    if names:
      return name(local)
    size = shape if shape_of is None else shape_of(numbers)  # the same in every process
    batch = size.empty(len(local))
    for number, row in zip(local, rows_of(batch), strict=True):
      if number >= 0:
        source, index = located(number)
        _fill(samples[source], row, size, index, failures, number, ends[-1])
    return batch

  order = order[: len(order) // batch_size * batch_size]  # or processes would differ in length
  if not len(order):
    raise InputError(
      f"batch_size={batch_size} is more than the samples of the run ({ends[-1]} an epoch); "
      "accepted: at most that, or drop_remainder=False, which fills up with empty rows"
    )
  # One element a batch: Grain's part of a row is to look up its number.
  return order.batch(batch_size, drop_remainder=True, batch_fn=list).map(load)


def _shape_of(samples: Sequence[RowSource]) -> StaticShape:
  """The one shape of all sets. Raises InputError: several, or an empty set."""
  shapes = {s.shape for s in samples}
  if len(shapes) != 1 or not all(len(s) for s in samples):
    lengths = ", ".join(str(len(s)) for s in samples)
    raise InputError(
      f"found {len(samples)} sets of {lengths or 'no'} samples and {len(shapes)} row shapes; "
      "accepted: sets that are not empty, of one row shape"
    )
  return shapes.pop()


EPOCH_SEEDS = ("spread", "consecutive")


def first_seed(seed: int, epoch_seeds: str, salt: int) -> int:
  """What Grain shuffles the first epoch of a set by; it adds 1 for each further epoch.

  "consecutive", of runs that began before there was another rule, is the seed itself: epoch 1 of
  seed 42 is epoch 0 of seed 43. "spread" draws where each seed begins, from 2^32 places.

  Args:
    salt: tells sets from each other.
  """
  if epoch_seeds == "consecutive":
    return (seed + salt) % 2**32
  return int(np.random.SeedSequence((seed, salt)).generate_state(1)[0])


def _order(
  ends: Sequence[int],
  start: Callable[[int], int],
  shuffle: bool,
  epochs: int | None,
  weights: Sequence[float] | None,
) -> grain.MapDataset:
  """Numbers of samples in the order in which they come; set i has `ends[i]` to `ends[i + 1]`."""

  def ordered(first: int, last: int, salt: int) -> grain.MapDataset:
    numbers = grain.MapDataset.range(first, last)
    numbers = numbers.shuffle(start(salt)) if shuffle else numbers
    return numbers.repeat(epochs)

  if weights is None:
    return ordered(0, ends[-1], 0)
  # Salts far apart: a later epoch of one set must not repeat the order of another.
  pairs = enumerate(itertools.pairwise(ends))
  return grain.MapDataset.mix([ordered(*pair, i << 16) for i, pair in pairs], weights)


def _fill(
  source: RowSource,
  row: Row,
  shape: StaticShape,
  index: int,
  failures: Failures,
  number: int,
  total: int,
) -> None:
  """Row `index` of a source; left empty, and counted as sample `number`, where it fails."""
  try:
    source.fill(row, index)
  except TooManyFailures:
    raise
  except InputError as error:
    (empty,) = rows_of(shape.empty(1))
    for key, array in empty.items():
      row[key][...] = array
    failures.add(number, str(error), total)


def make_bucketed_dataset(
  buckets: "Sequence[BucketSamples]",
  *,
  batch_size: int,
  seed: int,
  shuffle: bool = True,
  epochs: int | None = 1,
  process_index: int = 0,
  process_count: int = 1,
  failures: Failures | None = None,
  names: bool = False,
) -> grain.MapDataset:
  """As `make_dataset`, for rows of a few shapes: each global batch is of one bucket.

  The batches of an epoch come in one shuffled order over all buckets; empty rows fill the last
  batch of each. `batches_of(buckets, batch_size)` of them are an epoch.
  """
  if batch_size % process_count:
    raise InputError(
      f"batch_size={batch_size} is not divisible by the number of processes ({process_count})"
    )
  failures = Failures() if failures is None else failures
  per_epoch, total = batches_of(buckets, batch_size), sum(map(len, buckets))

  @functools.lru_cache(2)
  def order(epoch: int) -> list[tuple[int, np.ndarray]]:
    rng = np.random.default_rng((seed, epoch))
    batches = []
    for b, bucket in enumerate(buckets):
      rows = rng.permutation(len(bucket)) if shuffle else np.arange(len(bucket))
      batches += [(b, rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
    mixed = rng.permutation(len(batches)) if shuffle else range(len(batches))
    return [batches[i] for i in mixed]

  def load(position: int) -> Row | list[str]:
    epoch, at = divmod(position, per_epoch)
    b, numbers = order(epoch)[at]
    local, bucket = numbers[process_index::process_count], buckets[b]
    if names:
      return [name for index in local for name in bucket.names(index)]
    shape = bucket.shape_of(list(numbers))
    batch = shape.empty(batch_size // process_count)
    for index, row in zip(local, rows_of(batch), strict=False):  # the last ones may stay empty
      _fill(bucket, row, shape, index, failures, int(bucket.numbers[index]), total)
    return batch

  return grain.MapDataset.range(per_epoch * (_ENDLESS if epochs is None else epochs)).map(load)


def batches_of(buckets: "Sequence[BucketSamples]", batch_size: int) -> int:
  """Global batches of an epoch over buckets."""
  return sum(-(-len(bucket) // batch_size) for bucket in buckets)


def prefetched(
  dataset: grain.MapDataset,
  start: int = 0,
  *,
  threads: int = 2,
  buffered: int = BUFFERED,
  buffer_bytes: int = BUFFER_BYTES,
) -> Iterator[Row]:
  """Batches from position `start` on, read ahead by threads.

  Args:
    dataset: of `make_dataset`.
    start: number of global batches already used; the whole state of the data.
    threads: batches decoded at a time; PyAV and PIL release the GIL.
    buffered: batches ready or being made, at least `threads`.
    buffer_bytes: of memory that these take: fewer are read ahead where batches are large, but one
      always is. A batch that is being made counts as much as the largest that is ready.
  """
  ahead: deque[Future[Row]] = deque()
  position, usual = start, 0  # of usual bytes is a batch that is being made

  def fill() -> None:
    """Begins batches as long as there is room."""
    nonlocal position, usual
    while position < len(dataset) and len(ahead) < max(buffered, threads):
      sizes = [_bytes_of(f.result()) for f in ahead if f.done() and not f.exception()]
      usual = max(sizes, default=usual)
      room = buffer_bytes - sum(sizes) - usual * (len(ahead) - len(sizes))
      if ahead and (not usual or room < usual):
        return
      ahead.append(pool.submit(dataset.__getitem__, position))
      position += 1

  pool = ThreadPoolExecutor(max(threads, 1), thread_name_prefix="vr-batch")
  try:
    fill()
    while ahead:
      batch = ahead.popleft().result()
      usual = usual or _bytes_of(batch)
      fill()
      yield batch
      del batch  # or it would be held while the next is waited for
      fill()
  except InputError as error:
    raise InputError(str(error).splitlines()[0]) from None  # without Grain's note on tracebacks
  finally:
    pool.shutdown(wait=False, cancel_futures=True)


def _bytes_of(batch: Row | list[str]) -> int:
  return 1 + sum(array.nbytes for array in batch.values()) if isinstance(batch, dict) else 1
