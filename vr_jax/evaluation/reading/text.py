"""The text of an answer in one alphabet, without markup and reasoning; the forms of answers."""

import json
import re
import unicodedata
from collections.abc import Iterator

from vr_jax.evaluation.reading.words import REASONING

_FIRST_PICTURES = (0x1F170, 0x1F150, 0x1F1E6)  # A in squares and circles; the others follow
_LETTER_PICTURES = {first + i: chr(ord("A") + i) for first in _FIRST_PICTURES for i in range(26)}
CJK = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_BRACKETS = str.maketrans("【「『〔〈《】」』〕〉》’‘ʼ", "[[[[[[]]]]]]'''") | {ord("。"): ". "}
_MARKUP = (
  (r"<\|[^|<>]*\|>|</?s>|<eos>|<bos>|<(?:end|start)_of_turn>|\[/?INST\]", " "),
  (r"\b[Nn]/[Aa]\b", " "),
  (r"~~.*?~~", " "),  # struck out
  (r"\\(?:text|textbf|mathrm|mathbf|mathit|boldsymbol)\s*\{([^{}]*)\}", r"\1"),
  (r"\\[()\[\],;!]|\$|[*_`#\"“”„«»]+", ""),
  (r"(?m)^\s*>+\s?", ""),
  (r"</?(?:b|i|u|p|em|strong|span|div|br|mark|code|li|ul|ol|h[1-6])\s*/?>", " "),
  (rf"(?<=[{CJK}])(?=[A-Za-z0-9])|(?<=[A-Za-z0-9])(?=[{CJK}])", " "),
  (r"[^\S\n]+", " "),
)


def clean(text: str) -> str:
  """The text in one alphabet and without markup; line ends stay."""
  text = unicodedata.normalize("NFKC", text.translate(_LETTER_PICTURES)).translate(_BRACKETS)
  text = re.sub(r"\r\n?|[\u2028\u2029]", "\n", text)
  text = re.sub(r"[\u200b-\u200f\u2060\ufeff\ufe0f\ue000-\uf8ff\x00-\x08]", "", text)
  for pattern, other in _MARKUP:
    text = re.sub(pattern, other, text)
  return text.strip()


def after_reasoning(text: str) -> str:
  """The answer without the reasoning that a model shows before it; "" where that never ends."""
  text = re.sub(r"◁(/?)think▷|\[(/?)THINK\]", lambda m: f"<{m[1] or m[2] or ''}think>", text)
  text = text.rsplit("<|message|>", 1)[-1]
  text = re.sub(rf"(?is)<({REASONING})>.*?</\1>", " ", text)
  text = re.sub(rf"(?is)^.*</(?:{REASONING})>", " ", text)
  return re.sub(rf"(?is)<(?:{REASONING})>.*$", " ", text)


# --- Answers in a form.

_TAG = re.compile(
  r"<\s*((?:final[_ -]?)?(?:answer|ans|choice|option|response|final|solution|result))\s*>"
  r"(.*?)(?:<\s*/\s*\1\s*>|$)",
  re.I | re.S,
)
_CLOSED = re.compile(r"^(.*?)<\s*/\s*(?:final[_ -]?)?(?:answer|choice|option)\s*>", re.I | re.S)
_BOX = re.compile(r"\\f?boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}|\\boxed\s+([A-Za-z])\b")
_JSON_KEYS = re.compile(
  r"(?:(?:the|my|final|correct|best|predicted|selected|chosen|model)_?)*(?:answer|choice|option"
  r"|letter|selection|selected|prediction|response|result|pick|label|output|answer_?(?:letter|choice"
  r"|option|key|label))|答案|答え|正解|réponse|antwort|respuesta|resposta|risposta|정답",
  re.I,
)


def forms(text: str) -> list[str] | None:
  """What stands in the answer's own form; None where it has no form."""
  parts = [match[2] for match in _TAG.finditer(text)]
  parts = parts or [match[1] for match in _CLOSED.finditer(text)]
  parts = parts or [match[1] or match[2] or "" for match in _BOX.finditer(text)]
  return parts or _json_answers(text)


def _json_answers(text: str) -> list[str] | None:
  """The answers of the JSON objects in a text, or of a list of one; None where there are none."""
  answers: list[str] = []
  decoder, at, other = json.JSONDecoder(), 0, text
  if re.fullmatch(r"\s*\[\s*\"[^\"]*\"\s*\]\s*", text):
    return json.loads(text)
  while (at := text.find("{", at)) >= 0:
    try:
      first = at
      record, at = decoder.raw_decode(text, first)
      answers += _values(record)
      other = other.replace(text[first:at], "")
    except (ValueError, RecursionError):
      at += 1
  nothing_else = len(other) < len(text) and not re.search(r"\w", other.replace("json", ""))
  return answers or ([] if nothing_else else None)


def _values(record: object) -> Iterator[str]:
  if not isinstance(record, dict):
    return
  for key, value in record.items():
    if _JSON_KEYS.fullmatch(re.sub(r"[\s-]+", "_", str(key).strip())):
      inner = value[0] if isinstance(value, list) and len(value) == 1 else value
      if isinstance(inner, dict):
        yield from _values(inner)
      else:
        yield inner if isinstance(inner, str) else ""


def letter_at(index: int) -> str:
  """The label of the option at a place in a list."""
  return chr(ord("A") + index)
