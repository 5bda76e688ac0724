"""Reads the chosen option out of a model's answer.

Two parsers: *strict* (ours) takes a letter only where the answer clearly names one option, else the
text of exactly one option, else nothing; *published* does what the published scripts do, letter by
letter, so that their numbers can be compared. An answer nothing can be read from counts as wrong
and says why.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from data_pipes.errors import InputError

PARSERS = ("strict", "published")


@dataclass(frozen=True)
class Graded:
  """One answer against the truth.

  Attributes:
    letter: what was read from the answer; None if nothing could be read. With the published parser
      it may be any character.
    truth: the right option's letter.
    problem: None, "empty" (no answer) or "unparsed"; either counts as wrong.
  """

  letter: str | None
  truth: str
  correct: bool
  problem: str | None = None


def published_letter(prediction: str) -> str:
  """Bench-Q's extraction: `(A)`, else `A)`, else the first character that is no dot, else "".

  Source: videorefer/eval/eval_videorefer_bench_q.py.
  """
  match = re.search(r"\(([A-Z])\)", prediction) or re.search(r"([A-Z])\)", prediction)
  return match[1] if match else prediction.replace(".", "")[:1]


def published_truth(answer: str) -> str:
  """The letter of "(A) ..."; an answer without one stands for itself."""
  match = re.search(r"\(([A-Z])\)", answer)
  return match[1] if match else answer


def grade(
  prediction: str,
  answer: str,
  options: Sequence[str] = (),
  parser: str = "strict",
  published: Callable[[str, Sequence[str]], str] = lambda text, options: published_letter(text),
) -> Graded:
  """Grades one multiple-choice answer.

  Args:
    prediction: the model's text.
    answer: the right option, "(A) ...", its letter, or (strict) its text.
    options: all options, with or without "(A)" in front.
    parser: one of PARSERS.
    published: reads the letter as the benchmark's published script does; without options Bench-Q's
      way stands for all.
  """
  if parser not in PARSERS:
    raise InputError(f"parser={parser!r}; accepted: {', '.join(PARSERS)}")
  if parser == "published":
    expected = published_truth(answer)
    letter = published(prediction, options) if options else published_letter(prediction)
    # Where nothing is read, upstream stops with an IndexError.
    correct = bool(letter) and letter.lower() == expected.lower()
    return Graded(letter or None, expected, correct, None if letter else "empty")
  truth = strict_letter(answer, options)
  if truth is None:
    known = "; ".join(options) or "a letter such as (A)"
    raise InputError(f"Answer: found {answer!r}; accepted: one of the options ({known})")
  choice = strict_letter(prediction, options)
  problem = None if choice else "unparsed" if prediction.strip() else "empty"
  return Graded(choice, truth, choice == truth, problem)


# A letter that is marked as a label: (A) [A] A) A. A: or alone.
_BRACKETED = re.compile(r"[(\[]\s*([A-Za-z])\s*[)\]]")
_ALONE = re.compile(r"[(\[]?\s*([A-Za-z])\s*[)\]]?\s*[.:,;!]?")
_IN_FRONT = re.compile(r"(?:[(\[]\s*([A-Za-z])\s*[)\]]|([A-Za-z])\s*[).:])(?=\W|$)")
# After such a word a capital letter is a label unless a word goes on; "a" and "I" may be English.
_AFTER_CUE = r"\s*(?:is|would be|:|=)?\s*:?\s*(?:{nouns}\s*)?(?:[(\[]\s*([A-Za-z])\s*[)\]]|{bare})"
_BARE = r"([B-HJ-Z])(?![\w'’])|([A-Z])(?=\s*(?:[.,:;!)]|$))"
_CUES = tuple(
  re.compile(rf"\b(?i:{cue})" + _AFTER_CUE.format(nouns="(?i:option|choice|letter)", bare=_BARE))
  for cue in ("answer", "option|choice|choose|select|pick")
)


def strict_letter(text: str, options: Sequence[str] | Mapping[str, str] = ()) -> str | None:
  """The one option that `text` names, as a capital letter; None if it names none or several.

  In this order: the whole text is one option; it is a letter, bracketed or not; "the answer is B",
  then "option B"; a label in front, or in brackets anywhere, if no other label is there; the words
  of exactly one option.

  Args:
    options: texts of the options, with or without "(A)" in front, or letter -> text.
  """
  if isinstance(options, Mapping):
    options = [f"({letter}) {option}" for letter, option in options.items()]
  labels, bare = labelled(options)
  texts = [_plain(t) for t in bare]
  line = " ".join(re.sub(r"[*_`\"“”]+", "", text).split())
  plain = _plain(line)
  whole = {label for label, o in zip(labels, options, strict=True) if plain == _plain(o)}
  whole |= {label for label, t in zip(labels, texts, strict=True) if plain == t}
  if len(whole) == 1:
    return whole.pop()
  alone = _ALONE.fullmatch(line)
  if alone:
    return _known(alone[1], labels)
  for cue in _CUES:
    cued = {next(filter(None, match.groups())).upper() for match in cue.finditer(line)}
    if cued:
      return _known(cued.pop(), labels) if len(cued) == 1 else None
  marked = {letter.upper() for letter in _BRACKETED.findall(line)}
  front = _IN_FRONT.match(line)
  if front:
    marked.add((front[1] or front[2]).upper())
  if marked:
    return _known(marked.pop(), labels) if len(marked) == 1 else None
  held = [t for t in texts if t and re.search(rf"(?<!\w){re.escape(t)}(?!\w)", plain)]
  longest = [t for t in held if not any(t != other and t in other for other in held)]
  return labels[texts.index(longest[0])] if len(longest) == 1 else None


def labelled(options: Sequence[str]) -> tuple[list[str], list[str]]:
  """Letters of the options and their texts without them; bare ones are lettered in order."""
  labels, texts = [], []
  for i, option in enumerate(options):
    match = re.match(r"\s*(?:\(([A-Z])\)|([A-Z])[.)])\s*", option)
    labels.append(match[1] or match[2] if match else letter_at(i))
    texts.append(option[match.end() :] if match else option)
  return labels, texts


def _plain(text: str) -> str:
  return " ".join(text.casefold().split()).rstrip(". ")


def _known(letter: str, labels: Sequence[str]) -> str | None:
  letter = letter.upper()
  return letter if not labels or letter in labels else None


# --- General video QA, as published: the letter of an option's place.

FALLBACK = 2  # the place of the option that is taken where nothing is understood


def letter_at(index: int) -> str:
  return chr(ord("A") + index)


def without_answer(text: str) -> str:
  """The text without the word "answer", whose A the published scripts would take for a letter."""
  return text.replace("answer", "").replace("Answer", "")
