"""A request under way in a service: what its caller holds."""

import asyncio
import contextlib
import dataclasses
import threading
import time
from collections.abc import AsyncIterator, Callable, Hashable, Iterator

from data_pipes.errors import InputError
from vr_jax.inference.options import Options
from vr_jax.inference.requests import Answer, Request


class Busy(InputError):
  """As many requests wait as the service takes."""


class Closed(InputError):
  """The service takes no more requests."""


class Cancelled(InputError):
  """Nobody waits for this answer any more."""


@dataclasses.dataclass(frozen=True)
class Started:
  """The model has begun to answer."""


@dataclasses.dataclass(frozen=True)
class Text:
  """More of the answer: whole characters, and the tokens that are new since the last event."""

  delta: str
  token_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Done:
  """The whole answer, with reason, usage and timings."""

  answer: Answer


@dataclasses.dataclass(frozen=True)
class Failed:
  """Why there is no answer: an InputError for what was asked, anything else is a fault of ours."""

  error: BaseException


Event = Started | Text | Done | Failed


class Ticket:
  """An answer under way: iterate for its events, in a thread or a coroutine, or ask for `result`.

  Events are Started, any number of Text (only with `stream`), and at the end Done or Failed. There
  is one reader of the events.

  Attributes:
    request, options, client, weight, stream: as submitted.
    place: what tells equal requests of one list apart where answers are sampled.
    deadline: on time.monotonic's clock, after which the answer ends with what is there.
    cancelled: nobody waits any more.
    times: when a stage began, on that clock, by its name.
  """

  def __init__(
    self,
    request: Request,
    options: Options,
    *,
    client: Hashable = None,
    deadline: float | None = None,
    stream: bool = False,
    place: int = 0,
    weight: float = 1,
  ):
    self.request, self.options, self.client = request, options, client
    self.stream, self.place, self.deadline, self.weight = stream, place, deadline, weight
    self.cancelled = False
    self.times = {"submitted": time.monotonic()}
    self._at_end: list[Callable[[Ticket], None]] = []
    self._changed = threading.Condition()
    self._events: list[Event] = []
    self._read = 0
    self._outcome: Answer | BaseException | None = None
    self._wake: Callable[[], None] | None = None  # of the coroutine that waits

  @property
  def is_done(self) -> bool:
    return self._outcome is not None

  @property
  def reason(self) -> str:
    """Why it ended: that of its answer, or refused, cancelled, failed; "" before."""
    for kind, name in ((Answer, ""), (Cancelled, "cancelled"), (InputError, "refused")):
      if isinstance(self._outcome, kind):
        return name or self._outcome.reason
    return "" if self._outcome is None else "failed"

  @property
  def is_overdue(self) -> bool:
    return self.deadline is not None and time.monotonic() >= self.deadline

  def __iter__(self) -> Iterator[Event]:
    while not self._is_read:
      with self._changed:
        self._changed.wait_for(lambda: self._read < len(self._events))
      yield self._next()

  async def __aiter__(self) -> AsyncIterator[Event]:
    loop, arrived = asyncio.get_running_loop(), asyncio.Event()

    def wake() -> None:
      with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
        loop.call_soon_threadsafe(arrived.set)

    self._wake = wake
    while not self._is_read:
      arrived.clear()
      if self._read < len(self._events):
        yield self._next()
      else:
        await arrived.wait()

  @property
  def _is_read(self) -> bool:
    return self._read > 0 and isinstance(self._events[self._read - 1], Done | Failed)

  def _next(self) -> Event:
    self._read += 1
    return self._events[self._read - 1]

  def result(self, timeout: float | None = None) -> Answer:
    """The answer.

    Raises:
      InputError: the request cannot be answered, or was cancelled. TimeoutError: not yet there.
    """
    with self._changed:
      if not self._changed.wait_for(lambda: self.is_done, timeout):
        raise TimeoutError(f"no answer within {timeout:g} s")
    if isinstance(self._outcome, Answer):
      return self._outcome
    assert self._outcome is not None
    raise self._outcome

  def cancel(self) -> None:
    """Nobody waits any more; its row is free after the decoding steps under way, at most eight."""
    self.cancelled = True
    self.end(Cancelled("the request was cancelled"))

  # --- For the service ------------------------------------------------------------------------

  def begin(self, stage: str) -> None:
    """Notes when a stage began, once."""
    self.times.setdefault(stage, time.monotonic())

  def add(self, event: Started | Text) -> None:
    with self._changed:
      if not self.is_done:
        self._put(event)

  def end(self, outcome: Answer | BaseException) -> None:
    """The end of the ticket; what comes after the first has no effect."""
    with self._changed:
      if self.is_done:
        return
      self._outcome = outcome
      self._put(Done(outcome) if isinstance(outcome, Answer) else Failed(outcome))
      at_end = list(self._at_end)
    for call in at_end:
      call(self)

  def at_end(self, call: Callable[["Ticket"], None]) -> None:
    """`call` gets the ticket when it ends, in the thread that ends it."""
    with self._changed:
      if not self.is_done:
        self._at_end.append(call)
        return
    call(self)

  def _put(self, event: Event) -> None:
    self._events.append(event)
    self._changed.notify_all()
    if self._wake is not None:
      self._wake()
