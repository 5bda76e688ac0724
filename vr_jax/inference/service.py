"""A model that many callers ask at once: one device thread, rows of sizes that are declared once.

    submit ─► threads read the video ─► queue ─► device thread: Model.answer_live ─► Ticket

Whatever is asked, no program is compiled after the start. A greedy answer is that of `Model.ask`,
token for token, at any load; a sampled one is a function of the request and its seed alone.
"""

import dataclasses
import itertools
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

from data_pipes.errors import InputError
from vr_jax.inference.model import Model
from vr_jax.inference.options import Options
from vr_jax.inference.reading import READERS, Group, Refused
from vr_jax.inference.requests import Answer, Request

EVERY = 4  # decoding steps between two looks at what has come and who has gone
SHAPED = ("scene_frames", "batch_size", "share", "mask_rule")  # options that rows are made for
IDLE_SECONDS = 0.5  # without work the device thread looks so often whether it shall end


class Busy(InputError):
  """As many requests wait as the service takes."""


class Closed(InputError):
  """The service takes no more requests."""


class Ticket:
  """An answer under way: iterate for its text as it comes, or ask for the `result`."""

  def __init__(self, request: Request, options: Options):
    self.request, self.options = request, options
    self.cancelled = False
    self._events: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    self._done = threading.Event()
    self._outcome: Answer | BaseException | None = None
    self._ids: list[int] = []
    self._sent = ""

  def __iter__(self) -> Iterator[str]:
    """The text, piece by piece; raises what `result` raises."""
    while (piece := self._events.get()) is not None:
      yield piece
    self.result()

  def result(self, timeout: float | None = None) -> Answer:
    """The answer.

    Raises:
      InputError: the request cannot be answered, or was cancelled. TimeoutError: not yet there.
    """
    if not self._done.wait(timeout):
      raise TimeoutError(f"no answer within {timeout:g} s")
    if isinstance(self._outcome, Answer):
      return self._outcome
    assert self._outcome is not None
    raise self._outcome

  def cancel(self) -> None:
    """Nobody waits any more: its row is free after at most EVERY steps."""
    self.cancelled = True
    self._end(InputError("the request was cancelled"))

  def _add(self, model: Model, ids: tuple[int, ...]) -> None:
    self._ids += ids
    text = model.text(self._ids)
    if not text.endswith("\ufffd"):  # half a character waits
      self._send(text)

  def _send(self, text: str) -> None:
    if len(text) > len(self._sent):
      self._events.put(text[len(self._sent) :])
      self._sent = text

  def _end(self, outcome: Answer | BaseException) -> None:
    if self._done.is_set():
      return
    self._outcome = outcome
    if isinstance(outcome, Answer):
      self._send(outcome.text)
    self._done.set()
    self._events.put(None)


class Service:
  """Answers requests of many threads on one model; to be closed, or used with `with`."""

  def __init__(
    self, model: Model, *, question_slots: int = 128, waiting: int = 256, **options: Any
  ):
    """Compiles what the declared sizes need.

    Args:
      question_slots: tokens of the longest question that is ready from the start; a longer one
        compiles rows of its own.
      waiting: the most requests that may wait or be answered.
      options: of `Options`; batch_size rows, answers of up to max_new_tokens, and what a request
        that says nothing has.

    Raises:
      InputError: an option, or rows that do not fit the memory.
    """
    self.model, self.options, self._most = model, Options(**options), waiting
    self._reader = model.reader(self.options)
    self._groups: queue.SimpleQueue[list[Group | Refused]] = queue.SimpleQueue()
    self._tickets: dict[int, Ticket] = {}
    self._settings: dict[int, Options] = {}
    self._numbers = itertools.count()
    self._lock = threading.Lock()
    self._closed = False
    self._arrived = threading.Event()
    model.warm_up(question_slots=question_slots, **dataclasses.asdict(self.options))
    self._readers = ThreadPoolExecutor(READERS, "vr-read")
    self._thread = threading.Thread(target=self._run, name="vr-device", daemon=True)
    self._thread.start()

  def submit(self, request: Request, **options: Any) -> Ticket:
    """Puts a request into the queue.

    `options` are those of `Options` that do not shape the rows: the most new tokens, up to what was
    declared, and how tokens are drawn.

    Raises:
      InputError: an option that is not accepted; Busy, Closed.
    """
    if shaped := [name for name in options if name in SHAPED]:
      raise InputError(f"{shaped[0]} is set when the service starts, not by a request")
    settings = dataclasses.replace(self.options, **options)
    if settings.max_new_tokens > self.options.max_new_tokens:
      raise InputError(
        f"max_new_tokens={settings.max_new_tokens}; accepted: up to "
        f"{self.options.max_new_tokens}, which the service was started with"
      )
    ticket = Ticket(request, settings)
    with self._lock:
      if self._closed:
        raise Closed("the service is closed")
      if len(self._tickets) >= self._most:
        raise Busy(f"{self._most} requests wait already; ask again later")
      number = next(self._numbers)
      self._tickets[number], self._settings[number] = ticket, settings
    self._readers.submit(self._read, number)
    return ticket

  def close(self) -> None:
    """Takes no more requests, and returns when those that it has are answered."""
    with self._lock:
      self._closed = True
    self._thread.join()
    self._readers.shutdown()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def _read(self, number: int) -> None:
    ticket = self._tickets.get(number)
    if ticket is None or ticket.cancelled:
      return
    try:
      self._groups.put(self._reader.read([(number, ticket.request)]))
    except BaseException as error:  # ours: the caller sees it, the others go on
      ticket._end(error)
      self._forget(number)
    self._arrived.set()

  def _arrivals(self) -> Iterator[Group | Refused | None]:
    """What is read, in order; None where nothing is. Ends when the service is closed and done."""
    while True:
      try:
        yield from self._groups.get_nowait()
      except queue.Empty:
        with self._lock:
          if self._closed and not self._tickets:
            return
        yield None

  def _run(self) -> None:
    arrivals = self._arrivals()
    try:
      for progress in self.model.answer_live(
        arrivals, self.options, self._settings, self._is_dropped, EVERY
      ):
        if progress is None:
          self._wait()
          continue
        number, ids, result = progress
        ticket = self._tickets.get(number)
        if ticket is None or ticket.cancelled:
          continue
        if result is None:
          ticket._add(self.model, ids)
        else:
          ticket._end(result)
          self._forget(number)
    except BaseException as error:  # ours: nothing can be answered any more
      with self._lock:
        self._closed = True
        tickets, self._tickets = list(self._tickets.values()), {}
      for ticket in tickets:
        ticket._end(error)
      raise

  def _wait(self) -> None:
    """Until something is read, or for a moment."""
    for number in [number for number, ticket in self._tickets.items() if ticket.cancelled]:
      self._forget(number)
    self._arrived.wait(IDLE_SECONDS)
    self._arrived.clear()

  def _is_dropped(self, number: int) -> bool:
    ticket = self._tickets.get(number)
    return ticket is None or ticket.cancelled

  def _forget(self, number: int) -> None:
    with self._lock:
      self._tickets.pop(number, None)
      self._settings.pop(number, None)
