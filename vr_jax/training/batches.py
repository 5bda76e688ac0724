"""Host rows: kept where they are asked for again, and brought to the mesh."""

from collections.abc import Callable, Iterator

import jax
from jax.sharding import NamedSharding

from vr_jax.arrays import Array
from vr_jax.training.task import Rows

HELD = 1 << 30  # bytes of rows that are kept; what is more is read each time


class Kept:
  """Batches that are read when first asked for, and kept if they are few enough."""

  def __init__(self, read: Callable[[], Iterator[Rows]]):
    self._read = read
    self._held: list[Rows] | None = None

  def __iter__(self) -> Iterator[Rows]:
    if self._held is not None:
      yield from self._held
      return
    held: list[Rows] = []
    room = HELD
    for batch in self._read():
      room -= sum(array.nbytes for array in batch.values())
      held = [*held, batch] if room >= 0 else []
      yield batch
    if room >= 0:
      self._held = held


def on_mesh(rows: Rows, sharding: NamedSharding) -> dict[str, Array]:
  """This process's rows [B / processes, ...] as arrays [B, ...] on the mesh."""
  return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in rows.items()}
