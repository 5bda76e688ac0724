"""The requests of one call on their way from videos to answers."""

import collections
import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence

from data_pipes.errors import InputError
from vr_jax.inference.batching import WAITING, Engine, Prompt
from vr_jax.inference.options import Options
from vr_jax.inference.prefix import ObjectTokens
from vr_jax.inference.reading import Group, Question, Refused


@dataclasses.dataclass
class UnderWay:
  """A question between its prompt and its answer; `ids` are its new tokens so far."""

  question: Question
  scene: Sequence[int]
  objects: Sequence[ObjectTokens]
  ids: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Call:
  """One call's requests, from reading to answers.

  Attributes:
    groups: videos with their questions, as they are read; None where none is read yet.
    options: of all requests, but for those that have `settings` by their place.
    is_dropped: whether nobody waits for a request's answer any more.
    lanes: prompts that wait for a row, by the size of the row (`Model._lane`).
    engines: what answers each lane; InputError where such rows do not fit the memory.
    under_way: by the request's place in the list.
    refused: requests that cannot be answered, until the caller has them.
  """

  groups: Iterator[Group | Refused | None]
  options: Options
  settings: Mapping[int, Options] = dataclasses.field(default_factory=dict)
  is_dropped: Callable[[int], bool] = lambda place: False
  lanes: dict[Hashable, collections.deque[Prompt]] = dataclasses.field(default_factory=dict)
  engines: dict[Hashable, Engine | InputError] = dataclasses.field(default_factory=dict)
  under_way: dict[int, UnderWay] = dataclasses.field(default_factory=dict)
  refused: list[Refused] = dataclasses.field(default_factory=list)

  def forget_dropped(self) -> None:
    for place in [place for place in self.under_way if self.is_dropped(place)]:
      del self.under_way[place]

  def others_are_full(self, lane: Hashable) -> bool:
    """The prompts of other lanes than this hold as many prefixes as may wait."""
    prefixes = {
      id(prompt.prefix) for other in self.lanes if other != lane for prompt in self.lanes[other]
    }
    return len(prefixes) >= WAITING


def refusals(call: Call) -> Iterator[tuple[int, tuple[int, ...], InputError]]:
  while call.refused:
    index, error = call.refused.pop(0)
    yield index, (), error
