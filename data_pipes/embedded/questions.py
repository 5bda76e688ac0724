"""Multiple-choice questions of VideoRefer-Bench's five types about a simulated scene.

A wrong option is something true of another thing of the scene wherever there is one. Over a set,
every wording is the right answer in a quarter of the questions that offer it, and every letter in
a quarter of all, so that neither the text alone nor the letter tells the answer.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data_pipes.embedded.captions import ALL_PLACES, PASSIVE, motion, place, relation, step_words
from data_pipes.embedded.scenes import (
  COLOUR_NAMES,
  DIRECTIONS,
  FRAMES,
  HEIGHT,
  OPPOSITE,
  RADII,
  RELATIONS,
  SHAPES,
  SIDE,
  TEXTURES,
  WIDTH,
  Scene,
  Thing,
)

BASIC, SEQUENTIAL, RELATIONSHIP, REASONING, FUTURE = TYPES = (
  "Basic Questions",
  "Sequential Questions",
  "Relationship Questions",
  "Reasoning Questions",
  "Future Predictions",
)
LETTERS = "ABCD"
NAMES = tuple(f"the {colour} {shape}" for colour in COLOUR_NAMES for shape in SHAPES)


@dataclass(frozen=True)
class Question:
  """One question before its wrong options are chosen.

  Attributes:
    kind: the published type name.
    text: with {0} and {1} where the things of `things` are mentioned.
    answer: the right wording. near: wrong ones that this scene suggests. pool: all others.
  """

  kind: str
  template: str
  text: str
  things: tuple[int, ...]
  answer: str
  near: tuple[str, ...]
  pool: tuple[str, ...]


@dataclass(frozen=True)
class Choice:
  """A question with its four options, in order of the letters."""

  question: Question
  contents: tuple[str, ...]

  @property
  def letter(self) -> str:
    return LETTERS[self.contents.index(self.question.answer)]

  @property
  def options(self) -> list[str]:
    return [f"({letter}) {text}" for letter, text in zip(LETTERS, self.contents, strict=True)]


def motions() -> tuple[str, ...]:
  turns = [(a, b) for a in DIRECTIONS for b in (*DIRECTIONS, "still") if a != b]
  waits = [("still", a) for a in DIRECTIONS]
  edges = [(f"{edge} {a}",) for edge in ("in", "out") for a in DIRECTIONS]
  return tuple(motion(s) for s in [("still",), *((a,) for a in DIRECTIONS), *turns, *waits, *edges])


MOTIONS = motions()


def others(scene: Scene, index: int) -> list[Thing]:
  return [thing for i, thing in enumerate(scene.things) if i != index]


def moves_inside(thing: Thing) -> bool:
  return thing.steps[0] in (*DIRECTIONS, "still")


def basic(scene: Scene, i: int) -> Iterator[tuple]:
  thing, rest = scene.things[i], others(scene, i)
  steady = not (thing.change or "").startswith("turns")
  if steady:
    yield "colour", "What colour is {0}?", thing.colour, [o.colour for o in rest], COLOUR_NAMES
    looks = [f"{c} {s}" for c in COLOUR_NAMES for s in SHAPES]
    other = rest[i % len(rest)]
    mixed = [f"{thing.colour} {other.shape}", f"{other.colour} {thing.shape}", other.name]
    yield "looks", "Which words describe {0}?", thing.name, mixed, looks
  yield "shape", "What shape is {0}?", thing.shape, [o.shape for o in rest], SHAPES
  if thing.change not in ("grows", "shrinks"):
    marks = [f"{size} and {texture}" for size in RADII for texture in TEXTURES]
    near = [f"{o.size} and {o.texture}" for o in rest]
    yield (
      "marks",
      "How large is {0} and how is it marked?",
      f"{thing.size} and {thing.texture}",
      near,
      marks,
    )


def sequential(scene: Scene, i: int) -> Iterator[tuple]:
  thing, rest = scene.things[i], others(scene, i)
  text = "What does {0} do in the video?"
  if len(thing.steps) == 2 and (scene.seed + i) % 2:
    # The order alone tells: the same steps the other way round, and another such pair.
    pairs = [o.steps for o in rest if len(o.steps) == 2 and {*o.steps} != {*thing.steps}]
    pairs += [(thing.steps[0], s) for s in (*DIRECTIONS, "still") if s not in thing.steps]
    pair = pairs[scene.seed // 2 % len(pairs)]
    near = [motion(s) for s in (thing.steps[::-1], pair, pair[::-1])]
    yield "motion", text, motion(thing.steps), near, near
  else:
    yield "motion", text, motion(thing.steps), [motion(o.steps) for o in rest], MOTIONS
  if moves_inside(thing):
    start, end = (place(thing.centres[n], 3) for n in (0, -1))
    ends = [place(o.centres[-1]) for o in rest]
    if start and end and start != end:
      yield "start", "Where is {0} at the start of the video?", start, [end, *ends], ALL_PLACES
      yield "end", "Where is {0} at the end of the video?", end, [start, *ends], ALL_PLACES
  if len(thing.steps) == 2:
    before, after = thing.steps
    if before != "still":
      pool = [step_words(s) for s in (*DIRECTIONS, "still") if s != before]
      yield "after", f"What does {{0}} do after it moves {before}?", step_words(after), [], pool
    if after != "still":
      pool = [f"it moves {s}" for s in DIRECTIONS if s != after] + ["it stays still"]
      answer = "it stays still" if before == "still" else f"it moves {before}"
      yield "before", f"What does {{0}} do before it moves {after}?", answer, [], pool
  if moves_inside(thing):
    changes = ["it grows", "it shrinks", *(f"it turns {c}" for c in COLOUR_NAMES)]
    turned = [f"it {o.change}" for o in rest if o.change]
    pool = ["it stays the same", *changes]
    pool = [p for p in pool if p != f"it turns {thing.colour}"]
    answer = f"it {thing.change}" if thing.change else "it stays the same"
    yield "change", "How does {0} change during the video?", answer, turned, pool


def relative(first: np.ndarray, second: np.ndarray) -> str | None:
  """Where `first` lies as seen from `second`; None on the diagonals."""
  x, y = first - second
  if max(abs(x), abs(y)) < 12 or not 0.55 < abs(np.arctan2(abs(x), abs(y)) / (np.pi / 4) - 1) <= 1:
    return None
  if abs(x) > abs(y):
    return "to the right of it" if x > 0 else "to the left of it"
  return "below it" if y > 0 else "above it"


def relationship(scene: Scene, i: int, j: int) -> Iterator[tuple]:
  first, second = scene.things[i], scene.things[j]
  sides = ("to the right of it", "to the left of it", "below it", "above it")
  if moves_inside(first) and moves_inside(second):
    for n, when in ((0, "start"), (-1, "end")):
      side = relative(first.centres[n], second.centres[n])
      if side:
        text = f"At the {when} of the video, where is {{0}} as seen from {{1}}?"
        yield f"side at the {when}", text, side, [], sides
  deeds = (*RELATIONS, *PASSIVE.values(), "keeps clear of it")
  deed = relation(scene, i, j) or "keeps clear of it"
  yield "deed", "What does {0} do with {1}?", deed, [], deeds
  shared = [
    k for k in ("colour", "shape", "size", "texture") if getattr(first, k) == getattr(second, k)
  ]
  if len(shared) == 1 and not first.change and not second.change:
    names = {"colour": "their colour", "shape": "their shape", "size": "their size"}
    names["texture"] = "their marking"
    yield (
      "common",
      "What do {0} and {1} have in common?",
      names[shared[0]],
      [],
      list(names.values()),
    )


def reasoning(scene: Scene, i: int) -> Iterator[tuple]:
  thing = scene.things[i]
  names = [f"the {o.name}" for o in others(scene, i)]
  acting, targeted = i == scene.actor, i == scene.target
  partner = scene.things[scene.target if acting else scene.actor]
  if len(thing.steps) == 2 and thing.steps[0] == OPPOSITE.get(thing.steps[1]):
    walls = [f"it hits the {side} wall" for side in SIDE.values()]
    answer = (
      f"it hits the {thing.turned_by} wall" if thing.turned_by else f"it hits the {partner.name}"
    )
    near = [f"it hits {name}" for name in names]
    yield (
      "turn",
      "Why does {0} turn back?",
      answer,
      near,
      [*walls, *(f"it hits {n}" for n in NAMES)],
    )
  elif len(thing.steps) == 2 and thing.steps[1] == "still":
    alone = "it stops by itself"
    answer = f"it meets the {partner.name}" if acting else alone
    near = [f"it meets {name}" for name in names]
    yield "stop", "Why does {0} stop?", answer, near, [alone, *(f"it meets {n}" for n in NAMES)]
  elif len(thing.steps) == 2 and thing.steps[0] == "still":
    alone = "it starts by itself"
    pushed = targeted and scene.relation == "pushes it"
    answer = f"{partner.name} pushes it" if pushed else alone
    answer = f"the {answer}" if pushed else answer
    near = [f"{name} pushes it" for name in names]
    yield (
      "go",
      "Why does {0} start to move?",
      answer,
      near,
      [alone, *(f"{n} pushes it" for n in NAMES)],
    )
  hidden = (acting and scene.relation == "passes behind it") or (
    targeted and scene.relation == "passes in front of it"
  )
  if hidden:
    answer, near = f"the {partner.name} covers it", [f"{name} covers it" for name in names]
    yield (
      "hidden",
      "Why is {0} partly out of sight for a while?",
      answer,
      near,
      [f"{n} covers it" for n in NAMES],
    )
  if not moves_inside(thing):
    edges = [f"it {motion((f'{edge} {way}',))}" for edge in ("in", "out") for way in DIRECTIONS]
    text = "Why is {0} not in the picture all the time?"
    yield "edge", text, f"it {motion(thing.steps)}", [], edges


def without(scene: Scene, i: int, j: int) -> Iterator[tuple]:
  """What would have been without the other thing of the pair."""
  thing = scene.things[i]
  acts = ("pushes it", "bounces off it", "moves up to it and stops")
  if scene.relation not in acts or {i, j} != {scene.actor, scene.target}:
    return
  if i == scene.target and scene.relation != "pushes it":
    return
  pool = ["stayed where it was", *(f"kept moving {d}" for d in DIRECTIONS)]
  answer = pool[0] if i == scene.target else f"kept moving {thing.steps[0]}"
  near = [f"kept moving {OPPOSITE[thing.steps[0]]}"] if i == scene.actor else []
  yield "without", "Without {1}, what would {0} have done?", answer, near, pool


def outlook(scene: Scene, i: int) -> tuple[str, int | None, float] | None:
  """Where a thing is heading at the end: (direction or "still", what it meets, in how many frames).

  What it meets is the index of a thing, or None for the wall; None for the whole if that cannot be
  told for sure.
  """
  thing = scene.things[i]
  if thing.steps[0].startswith("out "):
    return None
  velocity = thing.velocity(FRAMES - 1)
  speed = float(np.linalg.norm(velocity))
  if speed < 0.2:
    return "still", None, np.inf
  way = thing.steps[-1].split()[-1]
  ahead = velocity / speed
  axis = int(way in ("up", "down"))
  size = (WIDTH, HEIGHT)[axis]
  edge = size - thing.centres[-1, axis] if ahead[axis] > 0 else thing.centres[-1, axis]
  soonest, met = (edge - thing.radii[-1]) / speed, None
  for j, other in enumerate(scene.things):
    if j == i or other.steps[0].startswith("out "):
      continue
    offset = other.centres[-1] - thing.centres[-1]
    forward, aside = float(offset @ ahead), float(abs(offset @ ahead[::-1]))
    contact = thing.radii[-1] + other.radii[-1]
    if forward <= 0 or aside > 1.2 * contact:
      continue
    if aside > 0.7 * contact or np.linalg.norm(other.velocity(FRAMES - 1)) > 0.2:
      return None
    frames = (forward - contact) / speed
    if frames < soonest:
      soonest, met = frames, j
  return way, met, soonest


def future(scene: Scene, i: int) -> Iterator[tuple]:
  thing, view = scene.things[i], outlook(scene, i)
  if view is None:
    return
  way, met, frames = view
  keep = [f"it keeps moving {d}" for d in DIRECTIONS]
  walls = [f"it reaches the {side} wall" for side in SIDE.values()]
  names = [f"the {o.name}" for o in others(scene, i)]
  hits = [f"it runs into {name}" for name in names]
  answer = None
  if way == "still":
    answer = "it stays where it is"
  elif frames >= 22:
    answer = f"it keeps moving {way}"
  elif frames <= 10:
    answer = (
      f"it reaches the {SIDE[way]} wall"
      if met is None
      else f"it runs into the {scene.things[met].name}"
    )
  if answer:
    text = "What will {0} most likely do within the next second?"
    yield "next", text, answer, hits[:1], ["it stays where it is", *keep, *walls, *hits]
  if way != "still" and frames >= 12:
    there = place(thing.centres[-1] + 10 * thing.velocity(FRAMES - 1), 3)
    now = place(thing.centres[-1])
    if there:
      near = [now, place(thing.centres[0])] if there != now else [place(thing.centres[0])]
      text = "Where will {0} be one second after the end of the video?"
      yield "place", text, there, [p for p in near if p != there], ALL_PLACES
  if met is not None:
    text = "If it goes on like this, what will {0} run into?"
    yield "meets", text, f"the {scene.things[met].name}", names, NAMES


PER_THING: dict[str, tuple[Callable, ...]] = {
  BASIC: (basic,),
  SEQUENTIAL: (sequential,),
  REASONING: (reasoning,),
  FUTURE: (future,),
}
PER_PAIR: dict[str, tuple[Callable, ...]] = {RELATIONSHIP: (relationship,), REASONING: (without,)}


def candidates(scene: Scene) -> list[Question]:
  """Every question that has a clear answer in a scene."""
  questions = []

  def add(kind, things, made):
    for template, text, answer, near, pool in made:
      near = tuple(dict.fromkeys(n for n in near if n and n != answer))
      rest = tuple(p for p in pool if p != answer and p not in near)
      questions.append(Question(kind, template, text, things, answer, near, rest))

  count = range(len(scene.things))
  for kind, makers in PER_THING.items():
    for i in count:
      for make in makers:
        add(kind, (i,), make(scene, i))
  for kind, makers in PER_PAIR.items():
    for i in count:
      for j in count:
        if i != j:
          for make in makers:
            add(kind, (i, j), make(scene, i, j))
  return questions


class Balance:
  """Chooses questions, wrong options and letters so that a set gives nothing away.

  Counts, for each text of a question, how often a wording was the answer and how often a wrong
  option, and prefers what is behind. A wording that is the answer of more than a quarter of the
  questions of a text is passed over: wrong options could not make up for it.
  """

  def __init__(self, seed: int):
    self._rng = np.random.default_rng(seed)
    self._templates: Counter = Counter()
    self._texts: Counter = Counter()
    self._answers: Counter = Counter()
    self._wrong: Counter = Counter()
    self._letters: Counter = Counter()

  def pick(self, questions: Sequence[Question], kind: str) -> Question | None:
    """The question of a type whose template, then answer, was used least; None if there is none."""

    def behind(q: Question) -> tuple:
      answered = self._answers[q.text, q.answer]
      return self._templates[kind, q.template], answered, self._rng.random()

    def fair(q: Question) -> bool:
      return 4 * self._answers[q.text, q.answer] <= self._texts[q.text] + 4

    return min((q for q in questions if q.kind == kind and fair(q)), key=behind, default=None)

  def choose(self, question: Question) -> Choice:
    """Adds three wrong options and settles the order."""
    q = question

    def lead(content: str) -> float:
      key = (q.text, content)
      owed = 3 * self._answers[key] - self._wrong[key]
      return owed + 3.0 * (content in q.near) + 2.0 * self._rng.random()

    wrong = sorted([*q.near, *q.pool], key=lead, reverse=True)[:3]
    self._templates[q.kind, q.template] += 1
    self._texts[q.text] += 1
    self._answers[q.text, q.answer] += 1
    self._wrong.update((q.text, content) for content in wrong)
    letter = min(range(4), key=lambda k: (self._letters[q.kind, k], self._rng.random()))
    self._letters[q.kind, letter] += 1
    contents = [wrong[k] for k in self._rng.permutation(3)]
    contents.insert(letter, q.answer)
    return Choice(q, tuple(contents))
