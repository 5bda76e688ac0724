"""Penn Treebank tokens of captions, as Stanford's PTBTokenizer 3.4.1 gives them in lower case.

The published caption metrics are of its tokens. This is a rewriting of its rules for the English of
captions, checked against the program itself (tests/test_ptb.py); results say which of the two they
are of. Known to differ: telephone numbers, e-mail addresses within text, some emoticons, a number
and a fraction in one (1½, 1 1/2), a number stuck to an abbreviation (9a.m.).
"""

import re
from collections.abc import Iterator, Sequence

# What the published metrics leave out afterwards; brackets stay, as the tokens are in lower case.
PUNCTUATION = frozenset(("''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"))

_BRACKETS = {
  "(": "-lrb-",
  ")": "-rrb-",
  "[": "-lsb-",
  "]": "-rsb-",
  "{": "-lcb-",
  "}": "-rcb-",
}
_CURRENCY = {"£": "#", "€": "$"}
# Words that are two tokens.
_JOINED = {
  "cannot": 3,
  "gonna": 3,
  "gotta": 3,
  "wanna": 3,
  "lemme": 3,
  "gimme": 3,
  "'tis": 2,
  "'twas": 2,
}
_ABBREVIATIONS = (
  "mr mrs ms dr drs prof gen col capt lt sgt cpl maj gov sen rep rev hon pres st ste jr sr messrs "
  "vs etc al inc ltd co corp bros dept est mt ft ave blvd rd jan feb mar apr jun jul aug sept sep "
  "oct nov dec ph.d"
).split()
_LETTER = r"[^\W\d_]"
_APOSTROPHE = "['’‘]"
_CLITIC = r"(?i:s|m|d|re|ve|ll)(?!\w)"
_NT = rf"n{_APOSTROPHE}t(?!\w)"
_CHARACTERS = rf"(?:(?!{_NT})[^\W_])+"  # of a word, as far as an n't
_TOKEN = re.compile(
  rf"""
  (?P<url> (?:https?://|www\.)[^\s"<>|()]*[^\s"<>|.!?(){{}},;:'-] )
| (?P<email> [\w.+-]+@[\w-]+(?:\.[\w-]+)+ )
| (?P<sgml> </?[a-z!?][^<>]*> )
| (?P<tag> [@\#]{_LETTER}\w* )
| (?P<emoticon> (?<!\S)[:;]-?[()D](?!\w) )
| (?P<clitic> {_APOSTROPHE}(?:s|m|d|re|ve|ll)(?!\w) | {_NT} )
| (?P<tis> '(?:tis|twas)(?!\w) )
| (?P<short> {_APOSTROPHE}(?:em|till?|cause)(?!\w)
    | {_APOSTROPHE}n{_APOSTROPHE} | {_APOSTROPHE}n(?!\w)
    | {_APOSTROPHE}\d\ds?(?![\w'’]) | [yj]{_APOSTROPHE}(?={_LETTER})
    | c(?:\+\+|\#)(?!\w) | (?:us|hk|nz|au|[ac])\$ )
| (?P<initials> (?:{_LETTER}\.)+(?:{_LETTER}(?!\w)\.?)?(?!\w) )
| (?P<abbreviation> (?:{"|".join(re.escape(a) for a in _ABBREVIATIONS)})\.(?!\w)
    | (?:ca|figs?|prop|nos?|art|bldg|pp|op)\.(?=\s?\d|[,;:]) )
| (?P<number> [-+]?\d++(?:[.,:/]\d++)++(?!-{_LETTER}) | (?:\+|(?<!\w)[-.])\d+(?![\w-])
    | (?<=\w)[.,]\d+(?:[.,]\d+)*(?!\w) )
| (?P<acronym> (?-i:[A-Z]{{1,3}}&[A-Z]{{1,3}})(?!\w) )
| (?P<word> (?:[dol]{_APOSTROPHE}(?={_LETTER}{{2}}))?
    (?:ma'am|{_CHARACTERS})
    (?:(?:[-/_]|[.!?](?={_LETTER}))(?:[dol]{_APOSTROPHE}(?={_LETTER}{{2}}))?{_CHARACTERS})* )
| (?P<dots> \.\.+ | … ) | (?P<dashes> --+ | [–—―] ) | (?P<marks> [!?]+ | \*+ | \#+ )
| (?P<quotes> '' | `` | ["“”„«»‘’] )
| (?P<other> \S )
  """,
  re.VERBOSE | re.IGNORECASE,
)
# A word in one with what a hyphen joins to it, full stops and commas included: U.K.-based, 12.5-15.
_HYPHENED = re.compile(
  r"[A-Za-z0-9][A-Za-z0-9.,]*(?:-(?:(?:[A-Za-z]\.)+(?=\W|$)(?<!-[A-Za-z]\.)|[A-Za-z0-9]+))+"
)
# Words with an apostrophe inside: C'est, Hawai'i, ne'er and single ones; not I'VE and the like.
_APOSTROPHED = re.compile(
  rf"(?:[A-HJ-XZn]{_APOSTROPHE}(?!{_CLITIC}){_LETTER}{{2,}}"
  rf"|{_LETTER}+[aeiouyAEIOUY]{_APOSTROPHE}(?!{_CLITIC})[aeiouA-Z]{_LETTER}*"
  rf"|(?i:(?:dunkin|somethin|ol){_APOSTROPHE}|cont{_APOSTROPHE}d|nor{_APOSTROPHE}easter"
  rf"|c{_APOSTROPHE}(?:mon|est)|e{_APOSTROPHE}er|s{_APOSTROPHE}mores|ev{_APOSTROPHE}ry"
  rf"|li{_APOSTROPHE}l|nat{_APOSTROPHE}l))(?!\w)"
)
_DOTTED = re.compile(rf"{_LETTER}(?:\.{_LETTER}+)+")  # J.K.Rowling, which begins as initials
_LONGER = (_HYPHENED, _APOSTROPHED, _DOTTED)
_FRACTIONS = {"½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}
_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&apos;": "'"}


def one_line(text: str) -> str:
  """The text with every kind of line end, control character and run of spaces as one space.

  The published tokenizer takes U+2028 within a caption for the end of it.
  """
  return " ".join(re.sub(r"[\s\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff]+", " ", text).split())


def tokenize(text: str) -> list[str]:
  """Tokens in lower case, punctuation among them."""
  return list(_tokens(one_line(text)))


def without_punctuation(tokens: Sequence[str]) -> list[str]:
  """The tokens that the published metrics count."""
  return [token for token in tokens if token and token not in PUNCTUATION]


def _tokens(text: str) -> Iterator[str]:
  for entity, character in _ENTITIES.items():
    text = text.replace(entity, character)
  for kind, token in _matches(text):
    if kind == "longer":
      yield re.sub("[’‘]", "'", token)
    elif kind == "word":
      yield from _word(token)
    elif kind == "dots":
      yield "..."
    elif kind == "dashes":
      yield "--"
    elif kind == "quotes":
      yield "''"
    elif kind == "tis":
      yield from (token[:2], token[2:])
    elif kind == "emoticon":
      yield token.replace("(", "-lrb-").replace(")", "-rrb-")
    elif kind == "other":
      if token <= "\uffff":  # the program drops what it does not know, such as emoji
        yield _BRACKETS.get(token, _CURRENCY.get(token, token))
    else:
      yield re.sub("[’‘]", "'", token)


def _matches(text: str) -> Iterator[tuple[str | None, str]]:
  """Kind and token in lower case, one after another; as in the program, the longest rule wins."""
  at = 0
  while match := _TOKEN.search(text, at):
    at = match.end()
    kind, start = match.lastgroup, match.start()
    if kind in ("word", "number", "initials", "abbreviation", "short"):
      for pattern in _LONGER:
        longer = pattern.match(text, start)
        if longer and longer.end() > at:
          kind, at = "longer", longer.end()
    yield kind, text[start:at].lower()


def _word(token: str) -> Iterator[str]:
  cut = _JOINED.get(token)
  if token in _FRACTIONS:
    yield _FRACTIONS[token]
  elif cut:
    yield from (token[:cut], token[cut:])
  else:
    yield token
