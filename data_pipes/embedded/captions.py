"""What is said about a scene: names, places, motions, relations, and captions made of them."""

import numpy as np

from data_pipes.embedded.scenes import HEIGHT, OPPOSITE, SIDE, WIDTH, Scene, Thing

PLACES = (
  ("top left", "top", "top right"),
  ("left", "centre", "right"),
  ("bottom left", "bottom", "bottom right"),
)
ALL_PLACES = tuple(place for row in PLACES for place in row)

# What the target of a relation does, seen from its side.
PASSIVE = {
  "pushes it": "is pushed by it",
  "bounces off it": "is bumped by it",
  "follows it": "is followed by it",
  "passes behind it": "hides it for a while",
  "passes in front of it": "is covered by it for a while",
  "moves up to it and stops": "is approached by it",
  "moves away from it": "is left by it",
}


def place(centre: np.ndarray, margin: float = 0.0) -> str | None:
  """The ninth of the picture a point lies in; None within `margin` pixels of a dividing line."""
  for value, size in zip(centre, (WIDTH, HEIGHT), strict=True):
    if margin and min(abs(value - size / 3), abs(value - 2 * size / 3)) < margin:
      return None
  column, row = np.clip(centre * 3 // np.array([WIDTH, HEIGHT]), 0, 2).astype(int)
  return PLACES[row][column]


def step_words(step: str) -> str:
  """One step as a verb: `moves left`, `stops`, ..."""
  return "stops" if step == "still" else f"moves {step}"


def motion(steps: tuple[str, ...]) -> str:
  """What a thing does over the whole video."""
  first, *rest = steps
  if first.startswith("in "):
    return f"comes in from the {SIDE[OPPOSITE[first[3:]]]}"
  if first.startswith("out "):
    return f"goes out at the {SIDE[first[4:]]}"
  if first == "still":
    return f"stays still, then moves {rest[0]}" if rest else "stays still"
  if not rest:
    return f"moves {first}"
  return f"moves {first}, then {'stops' if rest[0] == 'still' else rest[0]}"


def relation(scene: Scene, first: int, second: int) -> str | None:
  """What thing `first` does to thing `second`, with "it" for the latter; None for nothing."""
  if (first, second) == (scene.actor, scene.target):
    return scene.relation
  if (first, second) == (scene.target, scene.actor):
    return PASSIVE[scene.relation]
  return None


def short_caption(thing: Thing) -> str:
  return f"A {thing.full_name}."


def detailed_caption(scene: Scene, index: int) -> str:
  """Looks, start, motion, end, change and relation of one thing."""
  thing = scene.things[index]
  start, end = (place(thing.centres[n]) for n in (0, -1))
  words = motion(thing.steps)
  if thing.steps[0].startswith("in "):
    path = f"It {words} and ends at the {end}."
  elif thing.steps[0].startswith("out "):
    path = f"It starts at the {start} and {words}."
  elif thing.steps == ("still",):
    path = f"It {words} at the {start}."
  else:
    path = f"It starts at the {start}, {words}, and ends at the {end}."
  sentences = [short_caption(thing), path]
  if thing.change:
    sentences.append(f"It {thing.change}.")
  for other in (scene.actor, scene.target):
    if relative := relation(scene, index, other):
      sentences.append(f"It {relative.replace(' it', ' the ' + scene.things[other].name, 1)}.")
  return " ".join(sentences)


def scene_caption(scene: Scene) -> str:
  """All things, from left to right at the start, and what the acting pair does."""
  order = sorted(range(len(scene.things)), key=lambda i: scene.things[i].centres[0, 0])
  names = [f"a {scene.things[i].full_name}" for i in order]
  actor, target = scene.things[scene.actor], scene.things[scene.target]
  words = scene.relation.replace(" it", f" the {target.name}", 1)
  return f"{', '.join(names[:-1])} and {names[-1]}. The {actor.name} {words}."
