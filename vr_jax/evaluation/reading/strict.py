"""The strict parser: the one option that an answer names, or none.

An answer is read like this (docs/evaluation.md has the grammar with examples):

    clean      one alphabet, no markup, no reasoning before the answer
    form       <answer>, \\boxed{} and JSON, where an answer has one, are the answer
    mentions   labels (`(B)`, `B.`, `option B`) and texts of options become single characters
    marks      patterns around a mention say: stated, rejected, or only discussed
    choice     the strongest mark decides, if one option alone has it and is rejected nowhere

The patterns are lists of words in ten languages; none knows a benchmark. In doubt nothing is read.
"""

import re
from collections.abc import Callable, Mapping, Sequence

from vr_jax.evaluation.reading.sentences import Parts
from vr_jax.evaluation.reading.text import CJK, after_reasoning, clean, forms, letter_at
from vr_jax.evaluation.reading.words import (
  AND,
  BAD,
  BE,
  BECAUSE,
  COPULAS,
  FILL,
  FILLERS,
  FINAL,
  LABEL_NOUN,
  NEGATED,
  NEGATION,
  NOT,
  NOUN,
  PICK,
  RIGHT,
  SAYS,
  SEEMS,
  SO,
  SOME,
  THAN,
  WRONG,
  any_of,
)

_ALL_BUT = re.compile(
  r"\b(?:anything|everything|everyone|all|any|every|nothing|none)(?:\s+[\w']+){0,3}?\s+but\b", re.I
)
_NO_DOUBT = re.compile(
  r"\b(?:(?:there\s+is\s+|there's\s+)?(?:no|without\s+(?:a\s+|any\s+)?)\s*doubt(?:\s+that)?"
  r"|(?:ohne|kein)\s+zweifel|sans\s+(?:aucun\s+)?doute|sin\s+duda)\b,?|(?<=最)有?可能",
  re.I,
)


# --- Mentions: a marked label (in brackets, before a dot), a bare one, an option's text.

_MARKED, _BARE, _NAMED, _TEXT = 0xE000, 0xE020, 0xE040, 0xE060
_M = "[\ue000-\ue07f]"
_LABEL = "[\ue000-\ue05f]"
_GROUP = (  # "A", "A and B", "A, C and D", "A, B" where nothing is said of B alone, "(A) (B)"
  rf"(?P<g>{_M}(?:(?:\s*,\s*{_M}){{0,12}}{AND}{_M}|(?:\s*,\s*{_M}){{1,12}}(?=\s*(?:[.!?\n]|$|are\b|were\b))"
  rf"|[^\S\n]*{_M}){{0,12}}+)"
)
# "among A, B, C and D" names what there is to choose from.
_ALL_OF_THEM = (
  rf"\b(?:among|out\s+of|from|of)\s+(?:the\s+)?(?:options?\s+|choices?\s+)?"
  rf"{_LABEL}(?:\s*,?\s*(?:and|or|,)?\s*{_LABEL}){{2,}}"
)
_END = r"(?=\s*(?:[.,;:!?)\]\n—]|\s[-–]|$))"
_SINGLE = frozenset(
  "yes no none true false not i it both neither one correct incorrect right maybe unknown "
  "ja nein oui non sí si 是 否 不 有 没有 对 错".split()
)


def _is(kind: int, character: str) -> bool:
  return kind <= ord(character) < kind + 0x20


def _letter(character: str) -> str:
  return chr(ord("A") + ord(character) % 0x20)


_BRACKETED = re.compile(r"[(\[{<]\s*([A-Za-z])\s*[)\]}>]|(?<![\w'])'([A-Z])'(?!\w)")
_BEFORE_MARK = re.compile(
  r"(?m)(^\s*(?:[-•]\s*|\d+[.)]\s*)?)([A-Za-z])\s*[).:](?![A-Za-z0-9]\.)(?=\W|$)|(?<![\w(')])([A-Z])\)"
)
_HALF = re.compile(r"\(([A-Z])(?=\s*(?:[.,\n]|$))")
_OTHER_THINGS = any_of(
  "vitamin plan player team person group section grade class type part point step figure fig table "
  "channel room gate level phase scene camera mr mrs ms dr speaker model vehicle man woman actor"
)
_VERB = (  # what follows a label and not an article
  r"(?:is|was|are|were|isn't|wasn't|aren't|would|must|should|can\s+be|can\s+only|cannot|can't|could|"
  r"may\s+be|might|does|doesn't|seems|appears|fits|matches|describes|makes|looks|selected|chosen|"
  r"because|since|as\s+(?:it|the|he|she|they)|rather\s+than|instead\s+of|over\s+[B-Z\ue000-\ue05f]|"
  r"remains|it\s+is|definitely|clearly|obviously|for\s+sure|no\s+es|n'est|non\s+è|não|nicht|ist|est|"
  r"es\s|è|é|weil|parce|porque|stimmt|richtig|wäre|sagen|und\s+nicht|A)(?![\w'])"
)
_BARE_A = re.compile(
  rf"(?<![\w'.&-])A(?=\s*(?:$|[^\w\s'\-]|\n|[{CJK}]|[-=→])|\s+{_VERB}"
  rf"|\s*(?:,\s*)?(?:and|or|nor|not|but|und|oder|et|ou|y|o|e|vs)\s+(?:option\s+|choice\s+|not\s+)?"
  rf"(?:[B-Z](?![\w'])|[\ue000-\ue05f]))"
)
_BARE_LETTER = re.compile(r"(?<![\w'.-])([B-HJ-Z])(?![\w'’]|[-&]\w|\+\+|/[A-Z]{2})")
_LOWER = re.compile(
  r"(?<![\w'.&/-])([b-hj-z])(?=\s*(?:[.,;!\n]|$)|\s+(?:because|since|is\s|isn't|and\s+[a-e]\b))"
)
_LOWER_CUED = re.compile(
  rf"(?P<cue>(?:{LABEL_NOUN}|{PICK}|{NOUN}(?:\s*{BE}|\s*[:=]))\s*(?:the\s+)?(?:option\s+|choice\s+)?)"
  rf"(?P<letter>[a-z])(?={_END}|\s+(?:is|because|since)\b)",
  re.I,
)
_ANSWER_A = re.compile(
  rf"(?P<cue>{NOUN}(?:\s*{BE}|\s*[:=])\s*)A"
  r"(?=\s+(?:and|or|but|not|because|since|as|which|rather|instead|over|due|given|und|et|y)\b)"
)
_AFTER_NOUN = re.compile(rf"{LABEL_NOUN}\s*[:=]?\s*(?P<letter>[A-HJ-Z])(?![\w'])", re.I)


def _mentions(text: str, labels: Sequence[str], texts: Sequence[str]) -> str:
  """The text with every mention as one character: marked labels, bare ones, texts of options."""
  known = set(labels) or {chr(c) for c in range(ord("A"), ord("Z") + 1)}

  def mark(first: int, letter: str) -> str:
    return f" {chr(first + ord(letter.upper()) - ord('A'))} "

  for i in sorted(range(len(texts)), key=lambda i: -len(texts[i])):
    if i < 26 and texts[i] and not re.fullmatch("[a-z]", texts[i]):
      text = _text_pattern(texts[i]).sub(mark(_TEXT, labels[i]), text)

  def bracketed(match: re.Match[str]) -> str:
    return mark(_MARKED, match[1] or match[2])

  def before_mark(match: re.Match[str]) -> str:
    if match[2] is None:
      before = match.string[: match.start()]
      if before.rfind("(") > before.rfind(")"):  # it closes a bracket
        return match[0]
      return mark(_MARKED, match[3])
    end = "\u0001" if match[0][-1] != ":" else ":"  # a boundary, as a full stop is
    return (match[1] or "") + mark(_MARKED, match[2]) + end

  def lower(match: re.Match[str]) -> str:
    return mark(_BARE, match[1]) if match[1].upper() in known else match[0]

  text = _BRACKETED.sub(bracketed, text)
  text = _HALF.sub(lambda m: mark(_MARKED, m[1]), text)
  text = _AFTER_NOUN.sub(
    lambda m: mark(_NAMED, m["letter"]) if m["letter"].isupper() else m[0], text
  )
  text = _LOWER_CUED.sub(
    lambda m: m["cue"] + mark(_BARE, m["letter"]) if m["letter"].upper() in known else m[0], text
  )
  text = _BEFORE_MARK.sub(before_mark, text)
  text = _ANSWER_A.sub(lambda m: m["cue"] + mark(_BARE, "A"), text)

  def bare(match: re.Match[str]) -> str:
    before = match.string[: match.start()].rstrip()
    if match[1] not in known and not re.search(rf"(?:{NOUN}|{BE}|:)$", before, re.I):
      return match[0]
    if re.search(rf"{_OTHER_THINGS}$", before, re.I):
      return match[0]
    return mark(_BARE, match[1])

  text = _BARE_LETTER.sub(bare, text)
  text = _BARE_A.sub(mark(_BARE, "A"), text)
  text = _LOWER.sub(lower, text)
  text = re.sub(rf"{LABEL_NOUN}\s*[:=]?\s*(?={_M})", " ", text, flags=re.I)
  text = re.sub(rf"({_M})(?:[^\S\n]+\1)+", r"\1", text)  # said again and again
  text = re.sub(rf"({_M})\s*(?:选项|選項|番|번|が(?=正))", r"\1 ", text)
  text = re.sub(rf"{_ALL_OF_THEM}", " ", text, flags=re.I)
  return re.sub(r"[^\S\n]+", " ", _without_glosses(text)).strip()


def _text_pattern(text: str) -> re.Pattern[str]:
  words = [re.escape(word) for word in text.split()]
  if words[0].lower() in ("a", "an", "the") and len(words) > 1:
    words[0] = r"(?:a|an|the|this|that|his|her|its|their)"
  body = r"\s+".join(words)
  left = r"(?<![^\W_])" if text[0].isalnum() and not re.match(f"[{CJK}]", text[0]) else ""
  right = r"(?![^\W_])" if text[-1].isalnum() and not re.match(f"[{CJK}]", text[-1]) else ""
  if text.casefold() in _SINGLE:
    cue = r"(?:^|(?<=[.,;:!?\n()\]])|(?<=is)|(?<=\s[A-Z]))\s*"
    return re.compile(rf"(?m){cue}{body}(?=\s*(?:[.,;!?\n)—–]|$))", re.I)
  if text.isdecimal():
    left, right = r"(?<![\w.])", r"(?![\w]|[.)]\s|\.\d)" if len(text) < 3 else r"(?!\w|\.\d)"
  return re.compile(f"{left}{body}{right}", re.I)


def _without_glosses(text: str) -> str:
  """An option's label with its text beside it is one mention."""

  def join(match: re.Match[str]) -> str:
    label, other = match["label"], match["text"]
    return f" {label} " if _letter(label) == _letter(other) else match[0]

  def clash(match: re.Match[str]) -> str:
    return f"{match['label']} {match['text']}"

  label, other = rf"(?P<label>{_LABEL})", "(?P<text>[\ue060-\ue07f])"
  text = re.sub(rf"{label}[\s\u0001.:,)(=–—-]*{other}\)?", join, text)
  text = re.sub(rf"{other}\s*[(,–—-]?\s*{label}\s*\)?", join, text)
  return re.sub(rf"(?m)(?:^|(?<=:))\s*{label}[\s\u0001:)-]*{other}", clash, text)


# --- Marks.

_NOTHING = r"[^\w\ue000-\ue07f]*"  # neither words nor mentions

_FILLER = any_of(f"{FILLERS} {COPULAS}")
_LIGHT = rf"(?:[^\S\n]*(?:{_FILLER}|[:=]))*+"
# What stands between a mention and its verdict: "(the chair)", ", which mentions a cup,".
_ASIDE = r"(?:\([^()\n]*\)\s*|,[^,.\n]{1,80},\s*|,?\s*(?:it|this|that|which)\s+(?=is|was))?"
_I = re.I
_STATED = (
  re.compile(
    rf"(?:(?P<bad>{BAD})\s+(?:\w+\s+)?|(?P<some>{SOME})\s+(?:\w+\s+)?)?"
    rf"{NOUN}{FILL}{_GROUP}",
    _I,
  ),
  re.compile(rf"{PICK}{FILL}{_GROUP}", _I),
  re.compile(
    r"(?<!not\s)(?<!n't\s)\b(?:best|correct|right|true|actual|closest|likeliest|most\s+\w+)"
    r"(?:\s+(?!(?:that|if|whether|not|never|wrong|incorrect|false)\b)[a-z-]+){1,8}?"
    rf"\s+(?:is|was|must\s+be|would\s+be|should\s+be){FILL}{_GROUP}{_END}",
    _I,
  ),
  re.compile(
    rf"(?:{any_of('it this that there ce c est es das esto isso questo he she they')}\s*"
    rf"{BE}|{any_of('''it's that's c'est its''')}){FILL}{_GROUP}",
    _I,
  ),
  re.compile(
    rf"{SO}(?!\s+(?:can|could|would|should|is|are|was|were|does|do)\b)[,:]?{FILL}{_GROUP}"
    rf"(?:{_END}|\s+it\s+is\b)",
    _I,
  ),
  re.compile(
    rf"{_GROUP}\s*{_ASIDE}(?:{BE}|[:=–—→-]|\s(?=the\s|[✅✓✔☑正対对だで입]))"
    rf"(?:\s*{_FILLER}){{0,8}}\s*{RIGHT}"
    rf"(?!\s*(?:side|hand|arm|leg|of\b|(?:이|가)?\s*아[니닙]|で[はも]|じゃ))",
    _I,
  ),
  re.compile(
    rf"{_GROUP}\s*(?:best\s+)?(?:fits|matches|describes|answers|(?:does|is|was)(?={_END})|stimmt|trifft\s+zu|"
    rf"passt|convient|corresponde)(?!\w)",
    _I,
  ),
  re.compile(
    rf"{_GROUP}\s*(?:比较|比較|最|更|才|都|是)*\s*(?:合适|合適|合理|贴切|貼切|恰当|恰當|准确|準確|吻合|符合|正确|正確|对(?!应)|對(?!應))"
  ),
  re.compile(
    rf"{any_of('corresponds_to matches agrees_with supports indicates consistent_with entspricht')}"
    rf"{FILL}{_GROUP}",
    _I,
  ),
  re.compile(rf"(?:=+>|[→⇒∴])\s*{_GROUP}{_END}"),
  re.compile(rf"{_GROUP}\s+(?:right|correct|true|selected|chosen)(?=\s*(?:{_M}|[.,;\n]|$))", _I),
  re.compile(rf"{_GROUP}\s+it\s+is{_END}", _I),
  re.compile(rf"(?<![还還不非而])是\s*{_GROUP}"),
  re.compile(rf"{any_of('only nur seulement solo somente только 只有')}\s+{_GROUP}", _I),
  re.compile(
    rf"(?:^|[.,;:\n])\s*{any_of('es é è ist est')}\s+(?:{any_of('la el die der le a')}\s+)?"
    rf"{_GROUP}",
    _I,
  ),
  re.compile(
    rf"{_GROUP}\s*(?:です|だ|である|と思い|を選|になり|입니다|이다|를\s*선택|을\s*선택)", _I
  ),
)
_IT_IS, _AGREES = _STATED[3], _STATED[8]
_REJECTED = (
  re.compile(rf"{NOT}(?:\s*{any_of(f'{FILLERS} {COPULAS} either')})*+\s*{_GROUP}", _I),
  re.compile(
    rf"{_GROUP}\s*{_ASIDE}(?:[:=–—→-]\s*)?"
    rf"(?:{BE}\s*|(?:can|could|would|should|must|will|has|have|had|kann|peut|puede)\s+)?"
    rf"(?:(?!{RIGHT})[\w']+\s+){{0,3}}?(?:都|均|也|是|并|显然|明显)*"
    rf"(?:{WRONG}|{NEGATED}(?![^\S\n]*(?:only\b|just\b|{_M})))",
    _I,
  ),
  re.compile(
    rf"(?<![\ue000-\ue07f]\s){BAD}[^\S\n]*(?:{NOUN}|{LABEL_NOUN})?{_LIGHT}[^\S\n]*{_GROUP}",
    _I,
  ),
  re.compile(rf"{NOT}\s*(?:\w+\s+){{0,2}}{PICK}{_LIGHT}\s*{_GROUP}", _I),
  re.compile(rf"{_GROUP}\s*[:=–—→-]\s*(?:no|nein|non|nope)(?!\w)", _I),
  re.compile(rf"(?m)^{_NOTHING}[❌✗✘✖❎]\s*{_GROUP}"),
  re.compile(rf"{THAN}\s+(?:the\s+)?(?P<g>{_LABEL})", _I),
)
_WELL = (
  r"(?:best|most|(?:[^.,;\n]{0,80}\s)?(?:correctly|accurately|exactly|perfectly|best)"
  r"\s*(?:[.\n]|$))"
)
_SHARE = r"\s*[\u0001:=(]+\s*(?:\d*\.\d+\s*%?|\d+\s*%)\)?[,;\s]*"
_NEGATED, _VERDICT = _REJECTED[:2]
# "D: the ball isn't kicked" says why D, where "D: it isn't" says no.
_SUBJECT = re.compile(
  r"\s*[:–—-]\s*(?:the|his|her|their|there|no|a|an|he|she|they)\s"
  r"(?!(?:option|answer|choice|statement|description)\b)",
  _I,
)
_PREDICATE = re.compile(rf"\s+{BE}", _I)  # without a verdict: "(D) is a stretch"
_DISCUSSED = (
  re.compile(rf"{_GROUP}\s+(?!describes\s{_WELL})(?:{SAYS}|would(?!\s+be\b))", _I),
  # Shares of all options: "A: 5 %, B: 90 %".
  re.compile(rf"(?P<g>(?:{_M}{_SHARE}){{2,26}})"),
  re.compile(rf"(?P<g>{_M}[^\S\n]*(?:-|–|to|through|~|bis)[^\S\n]*{_M})", _I),
)
_SECOND_THOUGHT = re.compile(
  r"(?im)(?:(?:^|[.!?…\n\u0001—-]\s*)(?:(?:oh|no|hmm+|but)[,.]?\s+)?"
  r"(?:wait|hold on|scratch that|correction|on second thought|"
  r"let me (?:reconsider|rethink|re-?check|re-?watch|correct)|i mean|sorry|"
  r"actually)|,\s*(?:i mean|or rather|wait|sorry))\b"
  rf"|[,.…]\s*no[,.]\s*(?={_M})"
)
# Behind an answer: what else it might be.
_RUNNER_UP = re.compile(
  r"(?i)(?<=\S)\s*\n\s*(?:alternatives?|runner[- ]up|second\s+(?:choice|best|guess)"
  r"|other\s+(?:options|candidates))\s*[:=].*"
)
_NEXT_TURN = re.compile(r"(?im)\n\s*(?:question|user|human|q)\s*\d*\s*:")


def strict_letter(text: str, options: Sequence[str] | Mapping[str, str] = ()) -> str | None:
  """The one option that `text` names, as a capital letter; None if it names none or several.

  The grammar stands in docs/evaluation.md.

  Args:
    options: texts of the options, with or without "(A)" in front, or letter -> text.
  """
  if isinstance(options, Mapping):
    options = [f"({letter}) {option}" for letter, option in options.items()]
  labels, bare = labelled(options)
  return _read(text, labels, options, [_plain(clean(option)) for option in bare])


def _read(
  text: str,
  labels: Sequence[str],
  options: Sequence[str],
  texts: Sequence[str],
  nested: int = 2,
) -> str | None:
  """The option named by a text that may hold `nested` forms in each other."""
  whole = _whole(text, labels, options, texts)
  if whole:
    return whole
  text = after_reasoning(text)
  parts = forms(text) if nested else None
  if parts is not None:
    letters = {_read(part, labels, options, texts, nested - 1) for part in dict.fromkeys(parts)}
    return letters.pop() if len(letters) == 1 else None
  text = _ALL_BUT.sub("except", _NO_DOUBT.sub(" ", _RUNNER_UP.sub("", clean(text))))
  turn = _NEXT_TURN.search(text)
  if turn and (letter := _choice(text[: turn.start()], labels, texts)):
    return letter
  return _choice(text, labels, texts)


def _whole(
  text: str, labels: Sequence[str], options: Sequence[str], texts: Sequence[str]
) -> str | None:
  """The option that the whole text is, or that it is the beginning of, cut off."""
  plain = _plain(clean(text))
  same = {la for la, o in zip(labels, options, strict=True) if plain == _plain(clean(o))}
  same |= {la for la, t in zip(labels, texts, strict=True) if plain == t}
  if len(same) == 1:
    return same.pop()
  if (match := re.fullmatch(r"[(\[]?\s*([a-z])\s*[)\]]?\s*[:,;!]?", plain)) and not same:
    return _known(match[1].upper(), labels)
  match = re.match(r"(?:\(([a-z])\)|([a-z])[.):])\s*(\w.+)$", plain)
  if match and not same:
    letter = (match[1] or match[2]).upper()
    same = {la for la, t in zip(labels, texts, strict=True) if t.startswith(match[3])}
    if letter in same:
      return letter
  return None


def _choice(text: str, labels: Sequence[str], texts: Sequence[str]) -> str | None:
  """The option that clean text names."""
  text = _mentions(text, labels, texts)
  text = _without_echo(text, labels)
  thoughts = list(_SECOND_THOUGHT.finditer(text))
  if thoughts:
    rest = text[thoughts[-1].end() :]
    letter, firm = _decide(rest)
    if letter and firm:
      return _known(letter, labels)
    if not re.search(_M, rest) and "actually" not in thoughts[-1][0].lower():
      return None
  letter, _ = _decide(text)
  return _known(letter, labels) if letter else None


def _without_echo(text: str, labels: Sequence[str]) -> str:
  """The text without a list of all options in order, as a repeated question has it."""
  if len(labels) < 2:
    return text
  each = [f"[{''.join(chr(k + ord(la) - 65) for k in (_MARKED, _BARE, _NAMED))}]" for la in labels]
  echo = re.compile(r"[\s\u0001.,;:()-]*".join(each) + "\u0001?")
  return echo.sub("\n", text)


def _decide(text: str) -> tuple[str | None, bool]:
  """The option that the marks leave, and whether it is stated in so many words."""
  marks = _marks(text)
  rejected = {_letter(text[i]) for i, m in marks.items() if "rejected" in m}
  standing = {i: m for i, m in marks.items() if not m & {"rejected", "discussed"}}
  for level in ("final", "stated", "named", "neutral", "text"):
    letters = {_letter(text[i]) for i, m in standing.items() if level in m}
    if letters and level == "neutral":
      letters |= {_letter(text[i]) for i, m in standing.items() if "mention" in m}
    if letters:
      letter = letters.pop() if len(letters) == 1 else None
      if letter in rejected and level != "text":
        letter = None
      return letter, level in ("final", "stated")
  return None, False


def _marks(text: str) -> dict[int, set[str]]:
  """What is said of every mention, by its place in the text."""
  marks: dict[int, set[str]] = {m.start(): set() for m in re.finditer(_M, text)}
  alone = len({_letter(text[i]) for i in marks}) == 1
  # "B, not A": the negation is A's alone.
  parts = Parts(_NEGATED.sub(lambda match: " " * len(match[0]), text))

  def put(match: re.Match[str], *names: str) -> None:
    for i in range(match.start("g"), match.end("g")):
      if i in marks:
        marks[i] |= set(names)

  for pattern in _REJECTED:
    for match in pattern.finditer(text):
      if not (pattern is _VERDICT and alone and _SUBJECT.match(text, match.end("g"))):
        put(match, "rejected")
  for pattern in _DISCUSSED:
    for match in pattern.finditer(text):
      put(match, "discussed")
  for pattern in _STATED:
    for match in pattern.finditer(text):
      groups = match.groupdict()
      if groups.get("bad"):
        put(match, "rejected")
      elif groups.get("some"):
        put(match, "discussed")
      else:
        final = FINAL.search(text[max(0, match.start() - 12) : match.start("g")])
        if pattern is _AGREES and parts.sentence(match.start("g")).negated:
          continue
        seeming = SEEMS.search(match[0])
        if pattern is _IT_IS and _is(_TEXT, match["g"][0]):
          continue  # as any sentence with the words of an option
        put(match, "named" if seeming else "stated", *(["final"] if final else []))
  _mark_alone(text, marks, put)
  _mark_items(text, marks)
  _mark_doubts(text, marks, parts)
  any_label = any(ord(text[i]) < _TEXT for i in marks)
  for i, names in marks.items():
    if names:
      continue
    if ord(text[i]) >= _TEXT:
      if not any_label and not parts.clause(i).negated:
        names.add("text")
    elif _is(_MARKED, text[i]) or (_is(_NAMED, text[i]) and re.match(_END, text[i + 1 :])):
      if not parts.sentence(i).negated and not _PREDICATE.match(text, i + 1):
        names.add("neutral")
    else:
      names.add("mention")
  return marks


_SURELY = (
  r"(?:definitely|certainly|surely|clearly|obviously|probably|for\s+sure"
  r"|i\s+(?:think|believe|guess))"
)
_OPENING = (
  r"(?:(?:sure|okay|ok|certainly|yes|well|hello|hi|the|la|die|el|l'|(?:most\s+)?(?:probably|likely)"
  rf"|{_SURELY}|i'd\s+say|(?:must|should|has\s+to|can\s+only)\s+be|(?:seems|looks)\s+like)"
  r"\s*[!,.:]?\s*)?"
)
_LINE = re.compile(
  rf"(?im)(?:^|[.;!?\u0001]\s+){_NOTHING}{_OPENING}{_GROUP}[\s)\]]*(?=[.;!\u0001\n]|$)"
)
_FRONT = re.compile(
  rf"(?i)^{_NOTHING}{_OPENING}{_GROUP}"
  rf"(?=\s*(?:[.,:;)\]\n—–\u0001-]|$)|\s+(?:{BECAUSE}|\(|instead|rather|over|(?:and|but)?\s*not\b)"
  rf"|\s*[^\w\s?\ue000-\ue07f]|\s+{_SURELY}\b|(?P<prose>(?!\s*(?:{BE}|{SAYS}))))"
)
_LAST = re.compile(rf"(?i)[,:]\s*{_OPENING}{_GROUP}{_NOTHING}$")


def _mark_alone(text: str, marks: dict[int, set[str]], put: Callable[..., None]) -> None:
  """Mentions that are a line or sentence of their own, or stand in front of the whole answer."""
  for match in _LINE.finditer(text):
    put(match, "stated")
  front = _FRONT.match(text)
  if front and (front["prose"] is None or _is(_MARKED, front["g"][0])):
    sentence = re.split(r"[.!?\n\u0001]", text[front.end("g") :].lstrip(" .)\u0001"), maxsplit=1)[0]
    rest = re.split(BECAUSE, sentence, maxsplit=1, flags=re.I)[0]
    start = front.end("g") + text[front.end("g") :].index(rest) if rest else len(text)
    others = [
      i for i in marks if start <= i < start + len(rest) and ord(text[i]) < _TEXT and not marks[i]
    ]
    if others:
      for i in (front.start("g"), *others):
        marks[i].add("stated")
    else:
      put(front, "stated")
  last = _LAST.search(text)
  if last:
    put(last, "stated")


_ITEM = re.compile(rf"(?m)^\s*(?:[-•]\s*|\d+[.)]\s*)?(?P<g>{_LABEL})")
_ITEM_RIGHT = re.compile(
  rf"(?:{BE}|[:=–—→(-]|^)\s*(?:the\s+|indeed\s+|clearly\s+)*{RIGHT}|[✅✓✔☑]|\bcorrect\b|\btrue\b",
  _I,
)
_ITEM_WRONG = re.compile(rf"{WRONG}|{NEGATION}", _I)


def _mark_items(text: str, marks: dict[int, set[str]]) -> None:
  """Labels that head the items of a list, each with its verdict in the words behind it."""
  items = list(_ITEM.finditer(text))
  if len(items) < 2:
    return
  ends = [*(item.start() for item in items[1:]), len(text)]
  for item, end in zip(items, ends, strict=True):
    i = item.start("g")
    block = re.split(r"\n\s*\n", text[i + 1 : end], maxsplit=1)[0].strip(" \u0001")
    if not block or marks[i] & {"rejected"}:
      continue
    if _ITEM_WRONG.search(block):
      marks[i] -= {"stated"}
      marks[i].add("rejected" if item is not items[0] else "discussed")
    elif _ITEM_RIGHT.search(block):
      marks[i].add("stated")
    elif item is not items[0]:
      marks[i] -= {"stated"}
      marks[i].add("discussed")


def _mark_doubts(text: str, marks: dict[int, set[str]], parts: Parts) -> None:
  """Mentions in a question, a condition, or a clause that only weighs them."""
  for i, names in marks.items():
    if parts.sentence(i).question or parts.thought(i).condition or parts.clause(i).hedged:
      names.add("discussed")


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
  return letter if not labels or letter in labels else None
