"""Rules for texts that models wrote: refusals, language, repetition, talk about the frame."""

import re
import unicodedata
from collections import Counter

_REFUSAL = re.compile(
  r"\b(i('| a)m sorry|i can(no|')t (assist|help|comply|provide|describe|see|view|identify)"
  r"|i('m| am) (unable|not able) to|as an ai\b|as a language model|i do not have the ability"
  r"|cannot fulfil|against my guidelines)",
  re.IGNORECASE,
)
_META = re.compile(
  r"\b(the (red |green )?(outline|contour|bounding box|mask(ed)? (region|area))"
  r"|the (provided|given) (images?|frames?|texts?|descriptions?)|based on the (frames|images|text)"
  r"|the caption (says|states|mentions)|<region>|<video>|<image>|json)",
  re.IGNORECASE,
)
# The commonest words of each language that are not words of the others.
_COMMON = {
  "en": {"the", "and", "is", "of", "with", "its", "it", "to", "at", "that", "are", "was", "from"},
  "fr": {"le", "les", "est", "et", "une", "des", "dans", "qui", "sur", "avec", "du", "il", "elle"},
  "de": {"der", "die", "das", "und", "ist", "ein", "eine", "mit", "auf", "dem", "den", "sich"},
  "es": {"el", "los", "las", "es", "una", "que", "con", "por", "del", "en", "y", "su"},
  "it": {"il", "che", "è", "una", "con", "della", "nel", "gli", "di", "si", "sul"},
  "pt": {"os", "as", "uma", "com", "não", "que", "do", "da", "em", "um", "para"},
}
# What a tokenizer or a chat template may read as its own, and what nobody reads.
_CONTROL = re.compile(r"<[|/｜]?[^\W\d][^\s<>]{0,60}>|\[/?INST\]|<</?SYS>>")
_SLOT = re.compile(r"\{(\d+)\}")
_OVERRIDES = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # of the reading direction
# Scripts that put no space between words: two letters count as a word.
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]{1,2}")
MIN_WORDS, MAX_WORDS = 3, 400


def fault(text: str, language: str = "en", least: int = MIN_WORDS, objects: int = 0) -> str | None:
  """What is wrong with a text; None if nothing is.

  Args:
    language: ISO 639-1 code; only languages with a word list here are told apart, others by script.
    least: words.
    objects: {0} to {objects - 1} stand for objects.
  """
  if bad := next(filter(_is_control, text), None):
    return f"text holds a control character: U+{ord(bad):04X}"
  words = re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?", text.lower())
  if refused(text):
    return f"text refuses: {text[:80]!r}"
  if not words:
    return "text empty"
  if language not in _COMMON:
    words = [part for word in words for part in _UNSPACED.findall(word) or [word]]
  if len(words) < least:
    return f"text too short: {len(words)} words, at least {least}"
  if len(words) > MAX_WORDS:
    return f"text too long: {len(words)} words, at most {MAX_WORDS}"
  if other := wrong_language(words, language):
    return f"text in another language: {other}"
  if match := _META.search(text):
    return f"text talks about the picture or the task: {match[0]!r}"
  if match := _CONTROL.search(text):
    return f"text holds a control token: {match[0]!r}"
  if slot := next((s for s in _SLOT.findall(text) if int(s) >= objects), None):
    return f"text holds a placeholder: {{{slot}}}"
  if len(words) >= 12:
    triples = Counter(zip(words, words[1:], words[2:], strict=False))
    (triple, count), *_ = triples.most_common(1)
    if count >= 4 and 3 * count > 0.3 * len(words):
      return f"text repeats itself: {' '.join(triple)!r} {count} times"
  return None


def _is_control(character: str) -> bool:
  if character in "\t\n\r":
    return False
  return character in _OVERRIDES or unicodedata.category(character) in ("Cc", "Cs", "Cn")


def refused(text: str) -> bool:
  """Whether a model declined to answer."""
  return bool(_REFUSAL.search(text[:300]))


def wrong_language(words: list[str], language: str) -> str | None:
  """Another language that the words are in, or "script"; None where nothing speaks for that."""
  letters = "".join(words)
  latin = sum(char.isascii() or "À" <= char <= "ɏ" for char in letters) / max(1, len(letters))
  if (language in _COMMON) != (latin > 0.7):
    return "script" if language in _COMMON else "latin script"
  if language not in _COMMON or len(words) < 4:
    return None
  counts = {code: sum(word in common for word in words) for code, common in _COMMON.items()}
  other = max((code for code in counts if code != language), key=lambda code: counts[code])
  return other if counts[other] > counts[language] and counts[other] >= 2 else None
