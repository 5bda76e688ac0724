"""Reads the chosen option out of a model's answer.

Two parsers: *strict* (ours, reading/strict.py) takes an option only where the answer clearly names
one; *published* does what the published scripts do, letter by letter, so that their numbers can be
compared. An answer nothing can be read from counts as wrong and says why.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data_pipes.errors import InputError
from vr_jax.evaluation.reading.strict import labelled, strict_letter

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


def truth_letter(answer: str, options: Sequence[str] = ()) -> str | None:
  """The letter of the right option as a file has it: "(A) ...", its letter, or its text."""
  labels, texts = labelled(options)
  front = re.match(r"\s*\(?([A-Z])(?:[).:]|\s*$)", answer)
  if front and answer not in texts and (front[1] in labels or not labels):
    return front[1]
  return strict_letter(answer, options)


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
  truth = truth_letter(answer, options)
  if truth is None:
    known = "; ".join(options) or "a letter such as (A)"
    raise InputError(f"Answer: found {answer!r}; accepted: one of the options ({known})")
  choice = strict_letter(prediction, options)
  problem = None if choice else "unparsed" if prediction.strip() else "empty"
  return Graded(choice, truth, choice == truth, problem)


# --- General video QA, as published: the letter of an option's place.

FALLBACK = 2  # the place of the option that is taken where nothing is understood


def without_answer(text: str) -> str:
  """The text without the word "answer", whose A the published scripts would take for a letter."""
  return text.replace("answer", "").replace("Answer", "")
