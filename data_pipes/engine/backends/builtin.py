"""The embedded agents: no network, no weights.

They state what can be measured and nothing else: words of the caption, colours, sizes, places and
motion of masks. They exist so that the whole engine runs and is tested; their texts are no training
data for a model that is to see more than that.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipes.engine.quality.colours import colour_word, dominant
from data_pipes.engine.quality.opencv import opencv
from data_pipes.engine.quality.shots import shrink
from data_pipes.engine.roles import (
  Caption,
  Claim,
  Clip,
  Context,
  Described,
  Description,
  Masks,
  Nouns,
  Question,
  Verdict,
)
from data_pipes.errors import InputError

VERSION = 2
MOVED = 0.04  # of the frame's diagonal: less is standing still

_BE = {"is", "are", "was", "were", "be", "been", "being", "am", "'s", "'re"}
_FINITE = {"VBZ", "VBP", "VBD", "MD"}
_ADJECTIVES = {"JJ", "JJR", "JJS", "VBN"}
_FOLLOWS_VERB = {"DT", "IN", "TO", "RB", "RP", "PRP", "PRP$", ".", "VBG"}
_SIZES = ("small", "large", "big", "tiny", "huge")
_UNSEEN = {"video", "scene", "camera", "view", "front", "background", "side", "middle", "top"}


class NounPhrases:
  """Analyzer by TextBlob's tagger and rules: heads of noun phrases before the first finite verb.

  Without a caption it answers "moving object", for the Segmentor to take what moves.
  """

  def __init__(self, context: Context):
    if context.language != "en":
      raise InputError(
        f"language {context.language!r}: the embedded analyzer knows English (en) only"
      )

  @staticmethod
  def identity(options: Mapping[str, Any], context: Context) -> dict[str, Any]:
    from importlib.metadata import version

    return {"backend": f"builtin nouns@{VERSION}", "textblob": version("textblob")}

  def nouns(self, clip: Clip) -> Nouns:
    if not clip.caption.strip():
      return Nouns(("moving object",))
    subjects: list[str] = []
    others: list[str] = []
    for sentence in _tagged(clip.caption):
      phrases, verb = _noun_phrases(sentence)
      for phrase, plural, at, after_preposition in phrases:
        is_subject = not plural and at < verb and not after_preposition
        (subjects if is_subject else others).append(phrase)
    names = {p.split()[-1] for p in subjects}
    # "The red ball pushes ..." names again what "a small red plain ball" introduced.
    subjects = _without_repeats(subjects)
    others = [p for p in _without_repeats(others) if p.split()[-1] not in names]
    return Nouns(tuple(subjects), tuple(others))


def _tagged(caption: str) -> list[list[tuple[str, str]]]:
  from textblob.en import parse

  text = parse(caption, tokenize=True, tags=True, chunks=False, relations=False, lemmata=False)
  sentences = []
  for line in str(text).splitlines():
    pairs = [tuple(token.rsplit("/", 3)[:2]) for token in line.split() if "/" in token]
    sentences.append(_corrected([(word, tag) for word, tag in pairs if word]))
  return sentences


def _corrected(tokens: list[tuple[str, str]]) -> list[tuple[str, str]]:
  """Verbs taken for nouns ("is fishing", "a person drives a car"); nouns and verbs that are
  adjectives ("a large cyan striped ball")."""
  out: list[tuple[str, str]] = []
  for i, (word, tag) in enumerate(tokens):
    before = out[-1] if out else ("", "")
    after = tokens[i + 1][1] if i + 1 < len(tokens) else "."
    colours = tag == "NN" and colour_word(word) and after in ("JJ", "VBN", "VBD", "NN", "VB")
    if colours or (tag in ("VBD", "VBN") and before[1] == "JJ" and after in ("NN", "VB")):
      tag = "JJ"
    elif tag == "VB" and before[1] in ("JJ", "DT"):
      tag = "NN"
    elif tag == "NN" and before[0].lower() in _BE:
      tag = "VBG"
    elif tag == "NNS" and word.endswith("s") and before[1] == "NN" and after in _FOLLOWS_VERB:
      tag = "VBZ"
    out.append((word, tag))
  return out


def _noun_phrases(tokens: list[tuple[str, str]]):
  """[(phrase, plural, place, after a preposition)], and the place of the first finite verb."""
  phrases, verb, i = [], len(tokens), 0
  preposition = False
  while i < len(tokens):
    tag = tokens[i][1]
    if tag in _FINITE and verb == len(tokens):
      verb = i
    if tag in ("IN", "TO"):
      preposition = True
    elif tag in ("CC", ",") or tag in _FINITE:
      preposition = False
    j = i
    while j < len(tokens) and tokens[j][1] in _ADJECTIVES:
      j += 1
    k = j
    while k < len(tokens) and tokens[k][1] in ("NN", "NNS"):
      k += 1
    if k > j:
      words = [w.lower() for w, _ in tokens[i:k]]
      if words[-1].isalpha() and words[-1] not in _UNSEEN:
        plural = tokens[k - 1][1] == "NNS"
        phrases.append((" ".join(words), plural, i, preposition))
      i = k
    else:
      i += 1
  return phrases, verb


def _without_repeats(phrases: list[str]) -> list[str]:
  """Phrases whose words are not all in a longer phrase with the same head that came before."""
  kept: list[str] = []
  for phrase in phrases:
    words = phrase.split()
    again = any(k.split()[-1] == words[-1] and set(words) <= set(k.split()) for k in kept)
    if not again:
      kept.append(phrase)
  return kept


class Measured:
  """Annotator of measured facts: dominant colour, size, places, motion against the camera's."""

  needs_masks = True
  computes = True

  def __init__(self, context: Context):
    pass

  @staticmethod
  def identity(options: Mapping[str, Any], context: Context) -> dict[str, Any]:
    return {"backend": f"builtin measured@{VERSION}"}

  def describe(self, clip: Clip, noun: str, masks: Masks | None) -> Description:
    if not masks:
      raise InputError("the embedded annotator measures masks: use order 'mask_first'")
    facts = measure_object(clip, masks)
    size = "small" if facts["area"] < 0.01 else "large" if facts["area"] > 0.15 else "medium-sized"
    looks = f"The {noun} looks {facts['colour']} and {size} in the frame."
    if facts["share"] < 0.5:
      looks = f"The {noun} has several colours, mostly {facts['colour']}, and is {size}."
    return Description(
      motion=_motion_words(facts),
      appearance=looks,
      static=not facts["steps"] and not facts["enters"] and not facts["leaves"],
      source="measured",
      facts=facts,
    )


def measure_object(clip: Clip, masks: Masks) -> dict[str, Any]:
  """Facts about one object over a clip.

  Returns colour and its share, area (share of the frame), first and last place, steps (directions
  in order), speed (diagonals a second), enters and leaves.
  """
  seen = [n for n in sorted(masks) if masks[n].any()]
  if not seen:
    raise InputError("the object is seen on no frame")
  frames = dict(zip(seen, clip.open().frames(seen), strict=True))
  pixels = np.concatenate([_some(frames[n][masks[n].astype(bool)]) for n in seen])
  colour, share = dominant(pixels)
  centres = np.array([np.argwhere(masks[n]).mean(0)[::-1] for n in seen])
  camera = _camera(frames, masks, seen)
  path = centres - camera  # where it would be had the camera stood still
  diagonal = float(np.hypot(clip.height, clip.width))
  steps = _steps(path, diagonal)
  seconds = (seen[-1] - seen[0]) / (clip.fps or 1.0)
  travelled = float(np.linalg.norm(np.diff(path[:: max(1, len(path) // 4)], axis=0), axis=1).sum())
  numbers = sorted(masks)
  return {
    "colour": colour,
    "share": round(share, 3),
    "area": round(float(np.mean([masks[n].mean() for n in seen])), 4),
    "start": place(centres[0], clip),
    "end": place(centres[-1], clip),
    "steps": steps,
    "speed": round(travelled / diagonal / seconds, 4) if seconds else 0.0,
    "enters": _at_edge(masks, numbers, seen[0]),
    "leaves": _at_edge(masks, numbers[::-1], seen[-1]),
  }


def _some(pixels: np.ndarray) -> np.ndarray:
  return pixels[:: max(1, len(pixels) // 2000)]


def _camera(frames: Mapping[int, np.ndarray], masks: Masks, seen: Sequence[int]) -> np.ndarray:
  """Where the background has gone since the first frame: pixels [n, 2], median flow around it."""
  cv2 = opencv()
  at, out = np.zeros(2), [np.zeros(2)]
  method = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
  small = [cv2.cvtColor(shrink(frames[n], 256), cv2.COLOR_RGB2GRAY) for n in seen]
  for i in range(1, len(seen)):
    flow = method.calc(small[i - 1], small[i], None)
    height, width = flow.shape[:2]
    mask = cv2.resize(masks[seen[i - 1]].astype(np.uint8), (width, height))
    around = flow[cv2.dilate(mask, np.ones((9, 9), np.uint8)) == 0]
    step = np.median(around, axis=0) if len(around) else np.zeros(2)
    at = at + step * frames[seen[0]].shape[1] / width
    out.append(at)
  return np.array(out)


def _steps(path: np.ndarray, diagonal: float) -> list[str]:
  """Directions over the halves of the path, "still" between or after them; [] if it never moves."""
  middle = len(path) // 2
  words = []
  for a, b in ((0, middle), (middle, len(path) - 1)):
    move = path[b] - path[a]
    if np.linalg.norm(move) < MOVED * diagonal:
      words.append("still")
    else:
      x, y = move
      words.append(
        ("right" if x > 0 else "left") if abs(x) >= abs(y) else "down" if y > 0 else "up"
      )
  if words == ["still", "still"]:
    return []
  return words[:1] if words[0] == words[1] else words


def _at_edge(masks: Masks, numbers: Sequence[int], first: int) -> bool:
  """Seen only from `first` on, and there (or soon after) at the border of the frame."""
  if first == numbers[0]:
    return False
  mask = masks[first]
  return bool(mask[[0, -1]].any() or mask[:, [0, -1]].any())


def place(centre: np.ndarray, clip: Clip) -> str:
  """The ninth of the frame in which a point lies."""
  column = ("left", "", "right")[int(np.clip(centre[0] * 3 // clip.width, 0, 2))]
  row = ("top", "", "bottom")[int(np.clip(centre[1] * 3 // clip.height, 0, 2))]
  return f"{row} {column}".strip() or "centre"


def _motion_words(facts: Mapping[str, Any]) -> str:
  steps = ["stands still" if s == "still" else f"moves {s}" for s in facts["steps"]]
  verb = ", then ".join(steps) if steps else "stays still"
  if facts["enters"]:
    verb = f"comes into the frame and {verb}"
  if facts["leaves"]:
    verb = f"{verb}, and leaves the frame"
  if not steps and not facts["enters"] and not facts["leaves"]:
    return f"It {verb} at the {facts['start']}."
  return f"It starts at the {facts['start']}, {verb}, and ends at the {facts['end']}."


class MeasuredRegion:
  """Describer: the colour and place of a region of one frame."""

  def __init__(self, context: Context):
    pass

  @staticmethod
  def identity(options: Mapping[str, Any], context: Context) -> dict[str, Any]:
    return {"backend": f"builtin region@{VERSION}"}

  def region(self, clip: Clip, masks: Masks, frame: int) -> str:
    pixels = clip.open().frames([frame])[0]
    colour, share = dominant(_some(pixels[masks[frame].astype(bool)]))
    where = place(np.argwhere(masks[frame]).mean(0)[::-1], clip)
    return f"A {colour} region ({share:.0%} of it) at the {where}."


class AttributeJudge:
  """Judge: the colours that noun and text name must be the region's. It understands no more."""

  def __init__(self, context: Context):
    pass

  @staticmethod
  def identity(options: Mapping[str, Any], context: Context) -> dict[str, Any]:
    return {"backend": f"builtin attributes@{VERSION}"}

  def compare(self, claim: Claim) -> Verdict:
    seen = colour_word(claim.region)
    share = re.search(r"\((\d+)%", claim.region)
    confidence = int(share[1]) / 100 if share else 0.5
    for text, name in ((claim.noun, "noun"), (claim.annotated, "text")):
      named = colour_word(text)
      if named and seen and named != seen:
        return Verdict(False, f"the {name} says {named}, the region is {seen}", confidence)
    return Verdict(True, "no attribute disagrees", confidence)


class Templates:
  """Refiner: fixed sentences around the measured facts."""

  def __init__(self, context: Context):
    pass

  @staticmethod
  def identity(options: Mapping[str, Any], context: Context) -> dict[str, Any]:
    return {"backend": f"builtin templates@{VERSION}"}

  def caption(self, clip: Clip, described: Described) -> Caption:
    noun = described.noun
    article = "An" if noun[:1] in "aeiou" else "A"
    return Caption(described.description.text, f"{article} {noun}.")

  def questions(self, clip: Clip, objects: Sequence[Described]) -> list[Question]:
    out = []
    for i, o in enumerate(objects):
      facts, it = o.description.facts, f"{{{i}}}"
      if not facts:
        out.append(Question(f"What is {it}?", o.description.text, "basic", (i,)))
        continue
      colour, motion = f"Mostly {facts['colour']}.", _motion_words(facts)
      out.append(Question(f"What colour is {it} mostly?", colour, "basic", (i,)))
      out.append(Question(f"How does {it} move in the video?", motion, "basic", (i,)))
      out.append(Question(f"What will {it} probably do next?", _next(facts), "future", (i,)))
    for i in range(len(objects) - 1):
      facts, other = objects[i].description.facts, objects[i + 1].description.facts
      if facts and other:
        question = f"Which is faster, {{{i}}} or {{{i + 1}}}, and why?"
        out.append(Question(question, _faster(facts, other), "reasoning", (i, i + 1)))
    return out


def _next(facts: Mapping[str, Any]) -> str:
  if facts["leaves"]:
    return "It has left the frame and will probably stay out of it."
  last = facts["steps"][-1] if facts["steps"] else "still"
  if last == "still":
    return "It stood still at the end, so it will probably stay where it is."
  return f"It was moving {last} at the end, so it will probably go on moving {last}."


def _faster(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
  a, b = first["speed"], second["speed"]
  if max(a, b) < 0.01:
    return "Neither: both stay where they are."
  if abs(a - b) < 0.2 * max(a, b):
    return "They are about equally fast: they cover a similar distance in the same time."
  word = "first" if a > b else "second"
  return f"The {word} one, because it covers more of the frame in the same time."
