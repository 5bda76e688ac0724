"""What the device does next: one unit of admission, then one slice of decoding.

    read group ─ see: frames by chunks, the scene's prefix, object tokens ─► prompts, by client
    prompts ─ fill: question by parts, behind the prefix ─► a free row
    rows ─ decode: some steps ─► new tokens to their tickets

A chunk of frames, a prefix and a part of questions are units. While someone reads an answer as it
comes, decoding goes on between any two of them; else rows are filled first. Rows of other sizes are
lanes of their own, which take turns.
"""

import collections
import dataclasses
import itertools
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Protocol

from data_pipes.errors import InputError
from data_pipes.tokenizer import Tokenizer
from vr_jax.inference.batching import Engine, Prompt, Sizes
from vr_jax.inference.call import Call, UnderWay
from vr_jax.inference.fairness import FairQueue
from vr_jax.inference.prefix import ObjectTokens, Prefix
from vr_jax.inference.reading import Group, Question
from vr_jax.inference.requests import Answer, Timings
from vr_jax.inference.rows import Rows
from vr_jax.inference.tickets import Ticket

SLICE = 8  # the most decoding steps between two looks at what has come and who has gone
STREAMED_SLICE = 4  # while someone reads along
STREAM_SECONDS = 0.02  # that a reader waits for the next tokens, where steps are that short
STOP, LENGTH = "stop", "length"  # why an answer ended


class Answering(Protocol):
  """What a scheduler needs of a model; see `Model`."""

  tokenizer: Tokenizer
  eos_ids: tuple[int, ...]
  visual: Any

  def engine_for(self, sizes: Sizes) -> Engine: ...

  def seeing(
    self, group: Group, questions: Sequence[Question]
  ) -> Generator[None, None, tuple[Prefix, list[ObjectTokens]]]: ...

  def _lane(self, question: Question) -> Any: ...

  def _prompt(
    self, question: Question, prefix: Prefix, objects: Sequence[ObjectTokens], call: Call
  ) -> Prompt: ...

  def _objects_of(self, entry: Any) -> Any: ...


@dataclasses.dataclass(eq=False)
class Lane:
  """Rows of one size, and what waits for them."""

  rows: Rows
  ready: FairQueue[UnderWay] = dataclasses.field(default_factory=FairQueue)

  @property
  def has_room(self) -> bool:
    return self.rows.free > len(self.ready)


@dataclasses.dataclass(eq=False)
class Arrival:
  """A group that has been read; `lanes` of those of its questions that can be answered."""

  group: Group
  lanes: dict[int, Lane]
  seen: Callable[[], None]


class Scheduler:
  """The state of the device thread; `tick` is one round."""

  def __init__(
    self,
    model: Answering,
    sizes_of: Callable[[Ticket, Any], Sizes],
    tickets: Mapping[int, Ticket],
    counts: collections.Counter[str],
  ):
    """`sizes_of`: rows for a ticket in a lane, or InputError; `tickets`: by index of question."""
    self._model, self._sizes_of, self._tickets, self._counts = model, sizes_of, tickets, counts
    self._lanes: dict[Engine, Lane] = {}
    self._arrivals: collections.deque[Arrival] = collections.deque()
    self._unit: Generator[None, None, None] | None = None
    self._step_seconds = STREAM_SECONDS

  @property
  def rows_busy(self) -> int:
    return sum(lane.rows.busy for lane in self._lanes.values())

  def take(self, group: Group, seen: Callable[[], None]) -> None:
    """A group that has been read; `seen` is called when its video is known, or was given up."""
    lanes: dict[int, Lane] = {}
    for question in group.questions:
      ticket = self._tickets.get(question.index)
      if ticket is None:
        continue
      try:
        sizes = self._sizes_of(ticket, self._model._lane(question))
        engine = self._model.engine_for(sizes)
      except InputError as error:
        ticket.end(error)
        continue
      if engine not in self._lanes:
        self._lanes[engine] = Lane(Rows(engine))
      lanes[question.index] = self._lanes[engine]
    self._arrivals.append(Arrival(group, lanes, seen))

  def tick(self) -> bool:
    """One round; False if there was nothing to do."""
    self._drop()
    worked = self._admit()
    if not worked or self._is_read_along():
      worked |= self._decode()
    return worked

  def close(self) -> None:
    """Nobody waits any more: what is half done is given up."""
    if self._unit is not None:
      self._unit.close()
    for arrival in self._arrivals:
      arrival.seen()

  def _drop(self) -> None:
    """Frees rows and places of those that nobody waits for, or whose time is over."""
    for lane in self._lanes.values():
      for entry in [*lane.rows.keys, *lane.ready]:
        if entry.ticket.is_overdue and not entry.ticket.is_done:
          self._finish(entry, LENGTH, f"the deadline came after {len(entry.ids)} tokens")
      lane.rows.release(lambda entry: entry.ticket.is_done)
      lane.ready.drop(lambda entry: entry.ticket.is_done)

  def _is_read_along(self) -> bool:
    entries = itertools.chain(*(lane.rows.keys for lane in self._lanes.values()))
    return any(entry.ticket.stream for entry in entries)

  # --- Admission ------------------------------------------------------------------------------

  def _admit(self) -> bool:
    """One unit, if there is any."""
    if self._unit is None:
      self._unit = self._next_unit()
    if self._unit is None:
      return False
    try:
      next(self._unit)
    except StopIteration:
      self._unit = None
    return True

  def _next_unit(self) -> Generator[None, None, None] | None:
    arrival = next((a for a in self._arrivals if self._has_room(a)), None)
    hurried = arrival is None or self._is_read_along()
    for lane in self._lanes.values():
      count = min(lane.rows.together, lane.rows.free)
      if lane.ready and count and (hurried or len(lane.ready) >= count):
        batch = [lane.ready.pop() for _ in range(min(count, len(lane.ready)))]
        return self._fill(lane, [entry for entry in batch if entry is not None])
    if arrival is None:
      return None
    self._arrivals.remove(arrival)
    return self._see(arrival)

  def _has_room(self, arrival: Arrival) -> bool:
    lanes = arrival.lanes.values()
    return not lanes or any(lane.has_room for lane in lanes)

  def _fill(self, lane: Lane, batch: Sequence[UnderWay]) -> Generator[None, None, None]:
    prompts = [entry.prompt for entry in batch if entry.prompt is not None]
    yield from lane.rows.fill(prompts, batch)
    for entry in batch:
      entry.begin()

  def _see(self, arrival: Arrival) -> Generator[None, None, None]:
    """Encodes what is not known of a group and puts its prompts into their lanes."""
    group, model = arrival.group, self._model
    tickets = {q.index: self._tickets.get(q.index) for q in group.questions}
    questions = [
      q
      for q in group.questions
      if q.index in arrival.lanes and (t := tickets[q.index]) is not None and not t.is_done
    ]
    try:
      if not questions:
        return
      for question in questions:
        tickets[question.index].begin("encoding")  # type: ignore[union-attr]
      before = model.visual.counts["prefixes"]
      try:
        prefix, objects = yield from model.seeing(group, questions)
      except InputError as error:
        for question in questions:
          tickets[question.index].end(error)  # type: ignore[union-attr]
        return
      is_cached = model.visual.counts["prefixes"] == before
      remaining = iter(objects)
      for question in questions:
        tokens = list(itertools.islice(remaining, len(question.objects)))
        ticket = tickets[question.index]
        assert ticket is not None
        prompt = model._prompt(question, prefix, tokens, Call(ticket.options, ticket.place))
        cached = prefix.length if is_cached else 0
        length = prefix.length + len(prompt.tokens)
        entry = UnderWay(ticket, question, group.clip.scene, tokens, prompt, length, cached)
        cost = (len(prompt.tokens) + ticket.options.max_new_tokens) / ticket.weight
        arrival.lanes[question.index].ready.push(ticket.client, entry, cost)
        self._counts["prefix_hits" if is_cached else "prefix_misses"] += 1
        is_cached = True
        ticket.begin("ready")
    finally:
      arrival.seen()

  # --- Decoding -------------------------------------------------------------------------------

  def _decode(self) -> bool:
    worked = False
    for lane in self._lanes.values():
      if not lane.rows.keys:
        continue
      worked = True
      began = time.monotonic()
      more = bool(lane.ready) or bool(self._arrivals)
      news = lane.rows.decode(self._steps(lane), more)
      steps = max((len(progress.tokens) for progress in news), default=1)
      self._step_seconds = (time.monotonic() - began) / max(steps, 1)
      for progress in news:
        entry = progress.key
        if entry.ticket.is_done:
          continue
        entry.add(progress, self._model.tokenizer)
        if progress.done or entry.ended:
          stopped = entry.ended or entry.ids[-1] in self._model.eos_ids
          self._finish(entry, STOP if stopped else LENGTH)
    return worked

  def _steps(self, lane: Lane) -> int:
    streamed = [entry for entry in lane.rows.keys if entry.ticket.stream]
    if not streamed:
      return SLICE
    if (
      not all(entry.ids for entry in streamed)
      or self._unit is not None
      or lane.ready
      or self._arrivals
    ):
      return 1
    return max(1, min(STREAMED_SLICE, int(STREAM_SECONDS / max(self._step_seconds, 1e-6))))

  def _finish(self, entry: UnderWay, reason: str, *notes: str) -> None:
    usage, options, ticket = entry.usage(), entry.ticket.options, entry.ticket
    text = entry.text(self._model.tokenizer)
    if ticket.stream:
      entry.tell(text)
    self._counts["prompt_tokens"] += usage.prompt
    self._counts["cached_tokens"] += usage.cached
    self._counts["generated_tokens"] += usage.completion
    ticket.end(
      Answer(
        text=text,
        token_ids=tuple(entry.ids),
        scene_frames=tuple(int(n) for n in entry.scene),
        objects=tuple(self._model._objects_of(entry)),
        warnings=(*entry.question.warnings, *notes),
        reason=reason,
        logprobs=None if options.logprobs is None else tuple(entry.scores),
        usage=usage,
        timings=timings(ticket),
      )
    )


def timings(ticket: Ticket) -> Timings:
  """How long the stages of a request took that ends now; 0 for those that it did not come to."""
  times, now = ticket.times, time.monotonic()
  begun = times["submitted"]

  def between(first: str, last: str) -> float:
    return times[last] - times[first] if {first, last} <= set(times) else 0.0

  return Timings(
    queue=times.get("reading", now) - begun,
    media=between("reading", "read"),
    encode=between("encoding", "ready"),
    first_token=between("submitted", "first"),
    total=now - begun,
  )
