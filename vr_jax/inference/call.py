"""A request between its prompt and its answer."""

import dataclasses
from collections.abc import Sequence

from data_pipes.tokenizer import Tokenizer
from vr_jax.inference.batching import Prompt
from vr_jax.inference.options import Options
from vr_jax.inference.prefix import ObjectTokens
from vr_jax.inference.reading import Question
from vr_jax.inference.requests import TokenScore, Usage
from vr_jax.inference.rows import Progress
from vr_jax.inference.tickets import Started, Text, Ticket


@dataclasses.dataclass(frozen=True)
class Call:
  """What the tokens of an answer are a function of, beside the prompt.

  `place`: what tells equal requests of one list apart.
  """

  options: Options
  place: int = 0


@dataclasses.dataclass(eq=False)
class UnderWay:
  """A question that waits for a row or has one; `ids` are its new tokens so far.

  Attributes:
    cached: slots of the prompt that were computed for an earlier request.
    ended: a stop text came; `cut` is where the text ends then.
  """

  ticket: Ticket
  question: Question
  scene: Sequence[int]
  objects: Sequence[ObjectTokens]
  prompt: Prompt | None
  prompt_tokens: int
  cached: int
  ids: list[int] = dataclasses.field(default_factory=list)
  scores: list[TokenScore] = dataclasses.field(default_factory=list)
  ended: bool = False
  cut: int | None = None
  _sent: str = ""
  _told: int = 0  # tokens that events have told of

  def add(self, progress: Progress, tokenizer: Tokenizer) -> None:
    """Takes new tokens, up to a stop text, and tells the ticket."""
    if not self.ids and progress.tokens:
      self.ticket.begin("first")
    stops = self.ticket.options.stop
    alternatives = self.ticket.options.logprobs or 0
    for i, token in enumerate(progress.tokens):
      self.ids.append(token)
      if progress.scores:
        score = progress.scores[i]
        self.scores.append(dataclasses.replace(score, top=score.top[:alternatives]))
      if stops:
        text = _decoded(tokenizer, self.ids)
        places = [at for at in map(text.find, stops) if at >= 0]
        if places:
          self.ended, self.cut = True, min(places)
          break
    if self.ticket.stream and not (progress.done or self.ended):
      self.tell(self._safe(tokenizer))

  def tell(self, text: str) -> None:
    """Tells the ticket of the text so far, if it has grown."""
    if text.startswith(self._sent) and len(text) > len(self._sent):
      self.ticket.add(Text(text[len(self._sent) :], tuple(self.ids[self._told :])))
      self._sent, self._told = text, len(self.ids)

  def begin(self) -> None:
    """It has a row; the prompt, and with it the prefix on the device, is no longer needed."""
    self.prompt = None
    self.ticket.begin("started")
    self.ticket.add(Started())

  def text(self, tokenizer: Tokenizer) -> str:
    return _decoded(tokenizer, self.ids)[: self.cut].strip()

  def usage(self) -> Usage:
    return Usage(self.prompt_tokens, self.cached, len(self.ids))

  def _safe(self, tokenizer: Tokenizer) -> str:
    """The text without what may still change: half a character, or the beginning of a stop."""
    text = _decoded(tokenizer, self.ids).rstrip("\ufffd")
    held = 0
    for stop in self.ticket.options.stop:
      ends = (n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n]))
      held = max(held, next(ends, 0))
    return text[: len(text) - held].strip()


def _decoded(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
  return tokenizer.decode(ids, skip_special=True)
