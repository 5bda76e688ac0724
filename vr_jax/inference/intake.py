"""Requests on their way to the device: queued by client, then read in threads, video by video.

Requests about one video at one time span that wait together are a bundle: its frames are read once.
While a bundle of a video is read or waits to be encoded, further ones about it wait: they then find
it known (single flight).
"""

import dataclasses
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor

from data_pipes.errors import InputError
from vr_jax.inference.fairness import FairQueue
from vr_jax.inference.reading import READERS, TOGETHER, Group, Reader, subject
from vr_jax.inference.tickets import Ticket


@dataclasses.dataclass(eq=False)
class Bundle:
  """Requests about one video; `key` tells it from others, `parts` are its groups not yet seen."""

  key: Hashable
  reader: Reader
  tickets: list[tuple[int, Ticket]]
  parts: int = 0
  size: int = 0  # bytes of its frames


class Intake:
  """Bundles that wait, and the threads that read them; any thread may call."""

  def __init__(
    self,
    memory: int,
    take: Callable[[Group, Callable[[], None]], None],
    fail: Callable[[Bundle, BaseException], None],
  ):
    """`memory`: bytes of frames that may wait; `take` gets each group and what to call when it is
    seen; `fail` a bundle that a fault of ours ended."""
    self._memory, self._take, self._fail = memory, take, fail
    self._waiting: FairQueue[Bundle] = FairQueue()
    self._open: dict[Hashable, Bundle] = {}  # bundles that may grow
    self._busy: set[Hashable] = set()  # videos that are read or wait to be seen
    self._held = 0  # bytes
    self._unseen = 0  # bundles that are read or wait to be seen
    self._lock = threading.RLock()
    self._threads: ThreadPoolExecutor | None = None

  def put(self, number: int, ticket: Ticket, reader: Reader) -> None:
    """Queues a request; `go` begins to read."""
    key: Hashable = (id(reader), subject(ticket.request))
    if not ticket.options.share:
      key = (key, number)
    with self._lock:
      bundle = self._open.get(key)
      if bundle is not None and len(bundle.tickets) < TOGETHER:
        bundle.tickets.append((number, ticket))
        return
      bundle = Bundle(key, reader, [(number, ticket)])
      self._open[key] = bundle
      self._waiting.push(ticket.client, bundle, ticket.options.max_new_tokens / ticket.weight)

  def go(self) -> None:
    """Begins to read as many bundles as may be read now."""
    with self._lock:
      while self._unseen <= READERS and self._held < self._memory:
        bundle = self._waiting.pop(lambda b: b.key not in self._busy)
        if bundle is None:
          return
        if self._open.get(bundle.key) is bundle:
          del self._open[bundle.key]
        bundle.tickets = [(n, ticket) for n, ticket in bundle.tickets if not ticket.is_done]
        if not bundle.tickets:
          continue
        self._busy.add(bundle.key)
        self._unseen += 1
        if self._threads is None:
          self._threads = ThreadPoolExecutor(READERS, "vr-read")
        self._threads.submit(self._read, bundle)

  def close(self) -> None:
    with self._lock:
      threads, self._threads = self._threads, None
    if threads is not None:
      threads.shutdown()

  def _read(self, bundle: Bundle) -> None:
    bundle.parts = 1  # this
    try:
      for _, ticket in bundle.tickets:
        ticket.begin("reading")
      by_number = dict(bundle.tickets)
      results = bundle.reader.read([(n, ticket.request) for n, ticket in bundle.tickets])
      for _, ticket in bundle.tickets:
        ticket.begin("read")
      groups = []
      for result in results:
        if isinstance(result, Group):
          groups.append(result)
        else:
          by_number[result[0]].end(result[1])
      with self._lock:
        bundle.parts += len(groups)
        bundle.size = sum(f.nbytes for group in groups for f in group.clip.frames.values())
        self._held += bundle.size
      for group in groups:
        self._take(group, lambda: self._seen(bundle))
    except InputError as error:
      for _, ticket in bundle.tickets:
        ticket.end(error)
    except BaseException as error:  # ours: the callers see it, the others go on
      self._fail(bundle, error)
    self._seen(bundle)

  def _seen(self, bundle: Bundle) -> None:
    with self._lock:
      bundle.parts -= 1
      if bundle.parts:
        return
      self._busy.discard(bundle.key)
      self._held -= bundle.size
      self._unseen -= 1
    self.go()
