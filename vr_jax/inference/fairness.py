"""Deficit round robin: a queue in which no client waits for another's backlog.

Each client has a queue of its own, first in, first out. The clients take turns; at its turn one may
spend its weight times QUANTUM, and what it does not spend it keeps while it has something waiting.
Source: Shreedhar and Varghese, SIGCOMM 1995, section 3.
"""

import collections
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
QUANTUM = 64  # tokens


class FairQueue(Generic[T]):
  """What waits, by client; for one thread."""

  def __init__(self) -> None:
    self._items: collections.OrderedDict[Hashable, collections.deque[tuple[T, float]]]
    self._items = collections.OrderedDict()  # the client whose turn it is first
    self._credit: dict[Hashable, float] = {}

  def push(self, client: Hashable, item: T, cost: float = QUANTUM) -> None:
    """`cost`: in tokens, over the client's weight."""
    self._items.setdefault(client, collections.deque()).append((item, cost))
    self._credit.setdefault(client, 0)

  def pop(self, accepts: Callable[[T], bool] = lambda item: True) -> T | None:
    """The next item that is accepted, or None.

    A client none of whose items is accepted is passed over without loss of its turn; of one
    client's items the first that is accepted goes.
    """
    ready = [client for client in self._items if self._first(client, accepts) is not None]
    if not ready:
      return None
    while True:
      for client in ready:
        at = self._first(client, accepts)
        assert at is not None
        item, cost = self._items[client][at]
        if self._credit[client] >= cost:
          self._take(client, at, cost)
          return item
        # Its turn is over: the next begins with more, behind the others.
        self._credit[client] += QUANTUM
        self._items.move_to_end(client)

  def drop(self, is_gone: Callable[[T], bool]) -> None:
    """Takes out what nobody waits for."""
    for client in list(self._items):
      kept = [entry for entry in self._items[client] if not is_gone(entry[0])]
      self._items[client] = collections.deque(kept)
      self._forget_if_empty(client)

  def __len__(self) -> int:
    return sum(map(len, self._items.values()))

  def __iter__(self) -> Iterator[T]:
    for entries in self._items.values():
      yield from (item for item, _ in entries)

  def _first(self, client: Hashable, accepts: Callable[[T], bool]) -> int | None:
    return next((i for i, (item, _) in enumerate(self._items[client]) if accepts(item)), None)

  def _take(self, client: Hashable, at: int, cost: float) -> None:
    del self._items[client][at]
    self._credit[client] -= cost
    self._forget_if_empty(client)

  def _forget_if_empty(self, client: Hashable) -> None:
    if not self._items[client]:
      del self._items[client], self._credit[client]
