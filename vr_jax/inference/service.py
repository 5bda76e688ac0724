"""A model that many callers ask at once: one device thread, rows of sizes that are declared once.

    submit ─► Intake: queues by client, threads that read ─► device thread: Scheduler ─► Ticket

    with Service(model, rows=8, new_tokens=512) as service:
      ticket = service.submit(Request("a.mp4", "What happens?"), stream=True)
      for event in ticket: ...            # Started, Text, …, Done or Failed; also `async for`
      answer = ticket.result()            # text, reason, usage, timings

Whatever is asked, no program is compiled after the start. A greedy answer is the same token for
token at any load; a sampled one is a function of the request and its seed alone. `Model.ask` and
its like are users of a service that declares nothing (`strict=False`): it makes rows as they are
needed, and its thread ends with its work.
"""

import atexit
import collections
import dataclasses
import functools
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Protocol, Self

from data_pipes.errors import InputError
from vr_jax.compiling import compilations
from vr_jax.inference.batching import Sizes, classes
from vr_jax.inference.intake import Bundle, Intake
from vr_jax.inference.options import Options
from vr_jax.inference.reading import Group, Reader
from vr_jax.inference.requests import Answer, Request
from vr_jax.inference.scheduling import LENGTH, Answering, Scheduler, timings
from vr_jax.inference.tickets import Busy, Closed, Ticket

ROW_CLASSES = (1, 4)  # rows that few answers are computed on
NEW_TOKENS = 512
MEDIA_MEMORY = 2 << 30  # bytes
DECODE_SECONDS = 60.0
IDLE_SECONDS = 0.5  # without work the device thread looks so often whether it shall end
OVERDUE_SECONDS = 0.05  # the same where requests have deadlines


class Servable(Answering, Protocol):
  """What a service needs of a model; see `Model`."""

  device: Any

  def reader(self, options: Options) -> Reader: ...

  def declare(
    self, options: Options, *, question_slots: int, system_slots: int, fewer: tuple[int, ...]
  ) -> None: ...

  def sizes_of_lane(self, options: Options, lane: Any) -> Sizes: ...


@dataclasses.dataclass(frozen=True)
class Limits:
  """What a service was declared for.

  Attributes:
    rows: answers under way at once.
    question_slots: tokens of a question with its objects and earlier turns.
    new_tokens: the most tokens of an answer.
    scene_frames: those that are accepted; None stands for as many as in training.
    queue, per_client: requests that may wait for a row, of all clients and of one; None: any
      number.
  """

  rows: int
  question_slots: int
  new_tokens: int
  scene_frames: tuple[int | None, ...]
  queue: int | None
  per_client: int | None


class Service:
  """Answers requests of many threads on one model; to be closed, or used with `with`."""

  def __init__(
    self,
    model: Servable,
    *,
    rows: int | None = None,
    question_slots: int = 512,
    system_slots: int = 64,
    new_tokens: int = NEW_TOKENS,
    scene_frames: int | Sequence[int | None] | None = None,
    queue: int | None = 256,
    per_client: int | None = 16,
    media_memory: int = MEDIA_MEMORY,
    prefix_memory: int | None = None,
    decode_seconds: float | None = DECODE_SECONDS,
    row_classes: Sequence[int] = ROW_CLASSES,
    strict: bool = True,
    **options: Any,
  ):
    """Compiles what the declared sizes need.

    Args:
      rows: answers under way at once; by default what the device's memory holds, up to 32 (CPU: 4).
      question_slots, new_tokens, scene_frames, queue, per_client: see Limits.
      system_slots: tokens before the media, such as a request's own system text.
      prefix_memory: bytes of prefixes that are kept for further questions; None: eight prefixes.
      decode_seconds: that the decoder of a file may take, in a worker process; None: in this one.
      row_classes: numbers of rows that few answers are computed on.
      media_memory: bytes of frames that may wait to be encoded.
      strict: refuse what is beyond the declared sizes; else it compiles rows of its own, once.
      options: of `Options`, for requests that say nothing else.

    Raises:
      InputError: an option, or rows that do not fit the memory.
    """
    scenes = scene_frames if isinstance(scene_frames, list | tuple) else (scene_frames,)
    defaults = {"max_new_tokens": min(new_tokens, Options().max_new_tokens), **options}
    self.options = Options(scene_frames=scenes[0], **defaults)
    self.model, self._strict, self._classes = model, strict, tuple(row_classes)
    question_slots = classes(question_slots)[-1]
    self._decode_seconds = decode_seconds if strict else None
    if prefix_memory is not None:
      model.visual.memory = prefix_memory
    self._slots = question_slots, system_slots
    self._readers: dict[Any, Reader] = {}
    self._tickets: dict[int, Ticket] = {}
    self._numbers = itertools.count()
    self._lock = threading.Lock()
    self._idle = threading.Condition(self._lock)  # told when a ticket ends
    self._closed = False
    self._are_timed = False  # requests have had deadlines
    self._arrived = threading.Event()
    self._groups: collections.deque[tuple[Group, Callable[[], None]]] = collections.deque()
    self._new_intake = lambda: Intake(media_memory, self._take, self._fail)
    self._intake = self._new_intake()
    self._thread: threading.Thread | None = None
    self._scheduler: Scheduler | None = None
    self.counts: collections.Counter[str] = collections.Counter()
    if strict:
      rows = self._declare(rows, scenes, new_tokens)
    self.limits = Limits(rows or 0, question_slots, new_tokens, tuple(scenes), queue, per_client)
    self._compiled = compilations()
    _services.add(self)

  @property
  def ready(self) -> bool:
    """Requests are taken; False when it is drained or closed."""
    return not self._closed

  def submit(
    self,
    request: Request,
    options: Options | None = None,
    *,
    client: Hashable = None,
    weight: float = 1,
    deadline: float | None = None,
    stream: bool = False,
    **changes: Any,
  ) -> Ticket:
    """Puts a request into the queue.

    Args:
      options: by default the service's, with `changes`, which are fields of Options.
      client: whose request it is: clients take turns, and of one no more than `per_client` wait.
      weight: of the client's turns.
      deadline: seconds from now, after which the answer ends with what is there.
      stream: the ticket gives the text as it comes.

    Raises:
      InputError: an option that is not accepted; Busy, Closed.
    """
    options = dataclasses.replace(self.options if options is None else options, **changes)
    until = None if deadline is None else time.monotonic() + deadline
    ticket = Ticket(
      request,
      self._checked(options),
      client=client,
      weight=weight,
      deadline=until,
      stream=stream,
    )
    self._are_timed |= deadline is not None
    self._put([ticket])
    return ticket

  def submit_all(
    self,
    requests: Mapping[int, Request],
    options: Options,
    on_end: Callable[[Ticket], None],
  ) -> list[Ticket]:
    """Puts requests into the queue together, so that those about one video are read once.

    `on_end` is called with each ticket as it ends, in the thread that ends it.
    """
    options = self._checked(options)
    tickets = [Ticket(request, options, place=place) for place, request in requests.items()]
    for ticket in tickets:
      ticket.at_end(on_end)
    self._put(tickets)
    return tickets

  def submit_read(self, groups: Sequence[Callable[[int], Group]], options: Options) -> list[Ticket]:
    """As `submit_all`, of questions that have been read: each function makes a group of one, whose
    index it is given."""
    tickets = [Ticket(Request(None, ""), options, place=i) for i in range(len(groups))]
    for (number, _), group in zip(self._register(tickets), groups, strict=True):
      self._take(group(number), lambda: None)
    return tickets

  def drain(self, seconds: float | None = None) -> bool:
    """Takes no more requests; returns whether those that it has ended within the time."""
    self._closed = True
    with self._idle:
      return self._idle.wait_for(lambda: not self._tickets, seconds)

  def close(self, seconds: float | None = None) -> None:
    """Takes no more requests, and ends when those that it has are answered, or after the time."""
    if not self.drain(seconds):
      for ticket in self._under_way():
        ticket.end(Closed("the service is closed"))
    self._arrived.set()
    if (thread := self._thread) is not None:
      thread.join()
    self._intake.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def metrics(self) -> dict[str, int]:
    """Counts since the start, and what there is now (rows_busy, running, waiting, bytes)."""
    tickets = self._under_way()
    waiting = sum("started" not in ticket.times for ticket in tickets)
    scheduler, visual = self._scheduler, self.model.visual
    return {
      **self.counts,
      "rows": self.limits.rows,
      "rows_busy": 0 if scheduler is None else scheduler.rows_busy,
      "running": len(tickets) - waiting,
      "waiting": waiting,
      "frames_encoded": visual.counts["frames"],
      "prefixes_encoded": visual.counts["prefixes"],
      "prefix_cache_bytes": visual.kept_bytes,
      "compilations": compilations() - self._compiled,
    }

  # --- Requests -------------------------------------------------------------------------------

  def _declare(self, rows: int | None, scenes: Iterable[int | None], new_tokens: int) -> int:
    """Compiles rows for every scene; how many there are."""
    question_slots, system_slots = self._slots
    choices = (32, 16, 8, 4, 2, 1) if rows is None and not _on_cpu() else (rows or 4,)
    for count in choices:
      fewer = tuple(n for n in self._classes if n < count)
      try:
        for scene in scenes:
          options = dataclasses.replace(
            self.options, batch_size=count, max_new_tokens=new_tokens, scene_frames=scene
          )
          self.model.declare(
            options, question_slots=question_slots, system_slots=system_slots, fewer=fewer
          )
        break
      except InputError:
        if count == choices[-1]:
          raise
    self._fewer = fewer
    return count

  def _checked(self, options: Options) -> Options:
    """The options as rows of this service answer them; InputError beyond the declared sizes."""
    if not self._strict:
      return options
    limits = self.limits
    if options.max_new_tokens > limits.new_tokens:
      raise InputError(
        f"max_new_tokens={options.max_new_tokens}; accepted: up to {limits.new_tokens}, "
        "which the service was started with"
      )
    if options.scene_frames not in limits.scene_frames:
      accepted = ", ".join("none" if n is None else str(n) for n in limits.scene_frames)
      raise InputError(
        f"scene_frames={options.scene_frames}; accepted: {accepted}, which the service was "
        "started with"
      )
    return options

  def _put(self, tickets: Sequence[Ticket]) -> None:
    readers = [self._reader(ticket.options) for ticket in tickets]
    for (number, ticket), reader in zip(self._register(tickets), readers, strict=True):
      self._intake.put(number, ticket, reader)
    self._intake.go()

  def _register(self, tickets: Sequence[Ticket]) -> list[tuple[int, Ticket]]:
    """Numbers for tickets, by which the device thread knows them; that thread then runs."""
    with self._lock:
      if self._closed:
        raise Closed("the service is closed")
      self._refuse_too_many(tickets[0].client if tickets else None, len(tickets))
      numbered = [(next(self._numbers), ticket) for ticket in tickets]
      self._tickets.update(numbered)
      if self._thread is None and tickets:
        self._thread = threading.Thread(target=self._run, name="vr-device", daemon=True)
        self._thread.start()
    for number, ticket in numbered:
      ticket.at_end(functools.partial(self._forget, number))
    return numbered

  def _refuse_too_many(self, client: Hashable, count: int) -> None:
    limits = self.limits
    if limits.queue is None:
      return
    waiting = [ticket for ticket in self._tickets.values() if "started" not in ticket.times]
    if len(waiting) + count > limits.queue:
      raise Busy(f"{len(waiting)} requests wait already; ask again later")
    theirs = sum(ticket.client == client for ticket in waiting)
    if client is not None and limits.per_client is not None and theirs + count > limits.per_client:
      raise Busy(f"{theirs} requests of this client wait already; ask again later")

  def _reader(self, options: Options) -> Reader:
    key = options.scene_frames, options.mask_rule, options.share, options.literal
    if key not in self._readers:
      self._readers[key] = self.model.reader(options)
      self._readers[key].decode_seconds = self._decode_seconds
    return self._readers[key]

  def _sizes(self, ticket: Ticket, lane: Any) -> Sizes:
    """Rows that answer a ticket."""
    options = ticket.options
    if not self._strict:
      return self.model.sizes_of_lane(options, lane)
    limits = self.limits
    options = dataclasses.replace(options, batch_size=limits.rows, max_new_tokens=limits.new_tokens)
    sizes = self.model.sizes_of_lane(options, lane)
    if sizes.question > limits.question_slots:
      raise InputError(
        f"the question with its objects takes up to {sizes.question} tokens; accepted: "
        f"{limits.question_slots}, which the service was started with"
      )
    return dataclasses.replace(sizes, question=limits.question_slots, fewer=self._fewer)

  def _under_way(self) -> list[Ticket]:
    with self._lock:
      return list(self._tickets.values())

  def _forget(self, number: int, ticket: Ticket) -> None:
    with self._idle:
      self._tickets.pop(number, None)
      self.counts[f"ended_{ticket.reason}"] += 1
      self._idle.notify_all()
    self._arrived.set()

  # --- Threads --------------------------------------------------------------------------------

  def _take(self, group: Group, seen: Callable[[], None]) -> None:
    self._groups.append((group, seen))
    self._arrived.set()

  def _fail(self, bundle: Bundle, error: BaseException) -> None:
    for _, ticket in bundle.tickets:
      ticket.end(error)

  def _run(self) -> None:
    self._scheduler = scheduler = Scheduler(self.model, self._sizes, self._tickets, self.counts)
    try:
      while self._goes_on():
        with self.model.device:
          while self._groups:
            scheduler.take(*self._groups.popleft())
          worked = scheduler.tick()
        if self._are_timed:
          self._end_overdue()
        if not worked:
          self._arrived.wait(OVERDUE_SECONDS if self._are_timed else IDLE_SECONDS)
          self._arrived.clear()
      scheduler.close()
    except BaseException as error:  # ours: nothing of this can be answered any more
      with self._lock:
        self._closed |= self._strict
        self._thread = None
        tickets = list(self._tickets.values())
        self._intake = self._new_intake()  # what the old one holds is never seen
        self._groups.clear()
      for ticket in tickets:
        ticket.end(error)
      if self._strict:
        raise

  def _goes_on(self) -> bool:
    """False where the thread shall end; it is then no longer this service's."""
    with self._lock:
      if self._tickets or (self._strict and not self._closed):
        return True
      self._thread = self._scheduler = None
      return False

  def _end_overdue(self) -> None:
    """Ends those whose time is over before they had a row."""
    for ticket in self._under_way():
      if ticket.is_overdue and not ticket.is_done and "ready" not in ticket.times:
        warning = "the deadline came before the answer began"
        ticket.end(Answer("", (), (), (), (warning,), reason=LENGTH, timings=timings(ticket)))


def _on_cpu() -> bool:
  import jax

  return jax.default_backend() == "cpu"


# A thread on the device when Python ends would crash it.
_services: weakref.WeakSet[Service] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
  for service in list(_services):
    service.close(0)
