"""Reads the chosen option out of a model's answer.

Two parsers: *strict* (ours) takes a letter only where the answer clearly names one option, else the
text of exactly one option, else nothing; *published* does what the published scripts do, letter by
letter, so that their numbers can be compared. An answer nothing can be read from counts as wrong
and says why.
"""

import re
from collections.abc import Sequence
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


def grade(
  prediction: str, answer: str, options: Sequence[str] = (), parser: str = "strict"
) -> Graded:
  """Grades one multiple-choice answer.

  Args:
    prediction: the model's text.
    answer: the right option, "(A) ...", its letter, or (strict) its text.
    options: all options, with or without "(A)" in front; the published parser ignores them.
    parser: one of PARSERS.
  """
  if parser not in PARSERS:
    raise InputError(f"parser={parser!r}; accepted: {', '.join(PARSERS)}")
  if parser == "published":
    wanted, read = published_truth(answer), published_letter(prediction)
    # Where nothing is read, upstream stops with an IndexError.
    correct = bool(read) and read.lower() == wanted.lower()
    return Graded(read or None, wanted, correct, None if read else "empty")
  truth = strict_letter(answer, options)
  if truth is None:
    known = "; ".join(options) or "a letter such as (A)"
    raise InputError(f"Answer: found {answer!r}; accepted: one of the options ({known})")
  letter = strict_letter(prediction, options)
  problem = None if letter else "unparsed" if prediction.strip() else "empty"
  return Graded(letter, truth, letter == truth, problem)


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


def strict_letter(text: str, options: Sequence[str] = ()) -> str | None:
  """The one option that `text` names, as a capital letter; None if it names none or several.

  In this order: the whole text is one option; it is a letter, bracketed or not; "the answer is B",
  then "option B"; a label in front, or in brackets anywhere, if no other label is there; the words
  of exactly one option.
  """
  labels, bare = labelled(options)
  texts = [_plain(t) for t in bare]
  said = " ".join(re.sub(r"[*_`\"“”]+", "", text).split())
  plain = _plain(said)
  whole = {label for label, o in zip(labels, options, strict=False) if plain == _plain(o)}
  whole |= {label for label, t in zip(labels, texts, strict=True) if plain == t}
  if len(whole) == 1:
    return whole.pop()
  alone = _ALONE.fullmatch(said)
  if alone:
    return _known(alone[1], labels)
  for cue in _CUES:
    found = {next(filter(None, match.groups())).upper() for match in cue.finditer(said)}
    if found:
      return _known(found.pop(), labels) if len(found) == 1 else None
  marked = {letter.upper() for letter in _BRACKETED.findall(said)}
  front = _IN_FRONT.match(said)
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
    labels.append(match[1] or match[2] if match else chr(ord("A") + i))
    texts.append(option[match.end() :] if match else option)
  return labels, texts


def _plain(text: str) -> str:
  return " ".join(text.casefold().split()).rstrip(". ")


def _known(letter: str, labels: Sequence[str]) -> str | None:
  letter = letter.upper()
  return letter if not labels or letter in labels else None


# --- General video QA, as published: an option's index; where nothing is found, the third option's.

_FALLBACK = 2
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def mvbench_index(prediction: str, options: Sequence[str]) -> int:
  """MVBench: the first capital within the options' letters wherever it stands ("A man ..." is A).

  "A," with its comma counts as not found, as in videorefer/eval/inference_video_mcqa_mvbench.py.
  """
  text = _without_answer(prediction)
  last = chr(ord("A") + len(options) - 1)
  match = re.search(rf"[\(, ]*[A-{last}][\), ]*", text)
  if match:
    letter = match[0].strip().strip("()")
    return ord(letter) - ord("A") if len(letter) == 1 else _FALLBACK
  return next((i for i, o in enumerate(options) if o.lower() in text.lower()), _FALLBACK)


def perception_index(prediction: str, options: Sequence[str]) -> int:
  """Perception-Test (three options): the first of A, B, C anywhere, else an option's exact text."""
  text = _without_answer(prediction)
  match = re.search(r"[A-C]", text)
  if match:
    return ord(match[0]) - ord("A")
  lowered = [o.lower() for o in options]
  return lowered.index(text.lower()) if text.lower() in lowered else _FALLBACK


def videomme_index(prediction: str, choices: Sequence[str]) -> int:
  """VideoMME: the first of A-D anywhere, else an option's text or its number as a word.

  `choices` carry letters, "A. Two.". Unlike upstream, whose pattern cuts off the last character of
  an option whatever it is (B20 in the model specification), only a closing dot is cut.
  """
  text = _without_answer(prediction)
  match = re.search(r"[A-D]", text)
  if match:
    return ord(match[0]) - ord("A")
  for i, choice in enumerate(choices):
    option = re.sub(r"^\s*[A-D]\. ?", "", choice).removesuffix(".").lower()
    spelt = _WORDS[int(option)] if re.fullmatch("[0-9]", option) else option
    if option in text.lower() or spelt in text.lower():
      return i
  return _FALLBACK


# The published list lacks two commas, so these are the strings it really removes.
_VIDEOMME_PREFIXES = (
  "The best answer is",
  "The correct answer is",
  "The answer is",
  "The answer",
  "The best option isThe correct option is",
  "Best answer:Best option:",
)


def videomme_letter(response: str) -> str:
  """What VideoMME's scorer reads from a stored response: the first of A-D after known openings.

  "" counts as not answered there (it leaves the denominator).
  """
  text = response.strip()
  for prefix in _VIDEOMME_PREFIXES:
    text = text.replace(prefix, "")
  match = re.search(r"[ABCD]", text)
  return match[0] if match else ""


def _without_answer(text: str) -> str:
  return text.replace("answer", "").replace("Answer", "")
