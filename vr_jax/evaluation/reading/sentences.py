"""The sentences and clauses of an answer, and what is said in them."""

import bisect
import functools
import re

from vr_jax.evaluation.reading.words import FIRM_IF, HEDGE, IF, NEGATION, any_of

_CLAUSE = re.compile(
  r"[.;!?\n,:()—]|\s[-–]\s|\band\b(?=\s+(?:not|never|isn't|doesn't)\b)|"
  + any_of(
    "but however so because since although though while whereas therefore hence aber weil sondern "
    "mais pero sino porque mas ma но а 但 但是 所以 因为 因为 因此"
  ),
  re.I,
)
_SENTENCE = re.compile(r"[.;!?\n\u0001]")
# What a condition holds for: "if it were dark, A, but it is not, so B".
_THOUGHT = re.compile(rf"{_SENTENCE.pattern}|,\s*(?:but|however|yet)\b", re.I)


class Part:
  """A sentence or clause, and what is said in it; a text may hold thousands of mentions."""

  def __init__(self, text: str, after: str):
    self._text, self._after = text, after

  @functools.cached_property
  def negated(self) -> bool:
    return bool(re.search(NEGATION, self._text, re.I))

  @functools.cached_property
  def hedged(self) -> bool:
    return bool(re.search(HEDGE, self._text, re.I))

  @functools.cached_property
  def question(self) -> bool:
    return self._after == "?"

  @functools.cached_property
  def condition(self) -> bool:
    return bool(re.search(IF, self._text, re.I)) and not FIRM_IF.search(self._text)


class Parts:
  """The sentences and clauses of a text, by the place of a mention in them."""

  def __init__(self, text: str):
    self._sentences, self._thoughts, self._clauses = (
      self._cut(text, boundary) for boundary in (_SENTENCE, _THOUGHT, _CLAUSE)
    )

  @staticmethod
  def _cut(text: str, boundary: re.Pattern[str]) -> tuple[list[int], list[Part]]:
    ends, parts, start = [], [], 0
    for match in boundary.finditer(text):
      ends.append(match.start())
      parts.append(Part(text[start : match.start()], match[0]))
      start = match.end()
    return ends, [*parts, Part(text[start:], "")]

  def sentence(self, i: int) -> Part:
    return self._part(self._sentences, i)

  def thought(self, i: int) -> Part:
    return self._part(self._thoughts, i)

  def clause(self, i: int) -> Part:
    return self._part(self._clauses, i)

  @staticmethod
  def _part(cut: tuple[list[int], list[Part]], i: int) -> Part:
    ends, parts = cut
    return parts[bisect.bisect(ends, i)]
