"""The simulated world: coloured things that move, meet, hide one another and change.

A scene is drawn from a seed. One pair of things acts out a relation (one pushes the other, follows
it, passes behind it, ...); one or two more things move on their own. Everything that captions and
questions state is read off the tracks or off the script, never off pixels.

Letters: O thing, N frame. Pixels: x to the right, y down, in the video's own pixels.
"""

from dataclasses import dataclass, field

import numpy as np

WIDTH, HEIGHT, FRAMES, FPS = 128, 96, 40, 10

COLOURS = {
  "red": (225, 40, 40),
  "green": (40, 175, 60),
  "blue": (45, 85, 230),
  "yellow": (245, 220, 50),
  "purple": (150, 55, 195),
  "orange": (245, 140, 25),
  "pink": (250, 140, 190),
  "cyan": (50, 210, 220),
}
SHAPES = ("ball", "square", "triangle", "ring", "cross", "star")
TEXTURES = ("plain", "striped", "dotted")
RADII = {"small": 7.5, "large": 12.0}
COLOUR_NAMES = tuple(COLOURS)

STEPS = {
  "left": np.array([-1.0, 0.0]),
  "right": np.array([1.0, 0.0]),
  "up": np.array([0.0, -1.0]),
  "down": np.array([0.0, 1.0]),
}
DIRECTIONS = tuple(STEPS)
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
SIDE = {"left": "left", "right": "right", "up": "top", "down": "bottom"}

# What the first thing of the acting pair does to the second.
RELATIONS = (
  "pushes it",
  "bounces off it",
  "follows it",
  "passes behind it",
  "passes in front of it",
  "moves up to it and stops",
  "moves away from it",
)


@dataclass
class Thing:
  """One thing: what it looks like, what it does (`steps`), and its track.

  `steps`: one or two of left, right, up, down, still; or `in <direction>` (comes in moving that
  way) and `out <direction>` (goes out moving that way), alone.
  """

  colour: str
  shape: str
  texture: str
  size: str
  steps: tuple[str, ...] = ("still",)
  change: str | None = None  # "grows", "shrinks" or "turns <colour>"
  turned_by: str | None = None  # a side of the picture, for a bounce off the wall
  centres: np.ndarray = field(default_factory=lambda: np.zeros((FRAMES, 2), np.float32))
  radii: np.ndarray = field(default_factory=lambda: np.zeros(FRAMES, np.float32))
  colours: np.ndarray = field(default_factory=lambda: np.zeros(FRAMES, np.int32))

  @property
  def name(self) -> str:
    return f"{self.colour} {self.shape}"

  @property
  def full_name(self) -> str:
    return f"{self.size} {self.colour} {self.texture} {self.shape}"

  def velocity(self, frame: int) -> np.ndarray:
    """Pixels per frame, over the two frames before `frame`."""
    return (self.centres[frame] - self.centres[frame - 2]) / 2


@dataclass
class Scene:
  """Things in the order of depth: a later one covers an earlier one."""

  seed: int
  things: list[Thing]
  actor: int  # things[actor] does `relation` to things[target]
  target: int
  relation: str


def track(start: np.ndarray, steps: tuple[str, ...], speed: float, switch: int) -> np.ndarray:
  """Centres float32 [N, 2] of a thing that takes `steps`, changing over at frame `switch`."""
  velocity = np.zeros((FRAMES - 1, 2))
  names = [s.split()[-1] for s in steps]
  for i in range(FRAMES - 1):
    name = names[0] if len(names) == 1 or i < switch else names[1]
    if name != "still":
      velocity[i] = STEPS[name] * speed
  return (start + np.concatenate([np.zeros((1, 2)), velocity.cumsum(0)])).astype(np.float32)


def make_scene(seed: int) -> Scene:
  """The scene of a seed. Drawn again until everything fits, so any seed gives one."""
  rng = np.random.default_rng(seed)
  relation = str(rng.choice(RELATIONS))
  while True:
    things = draw_looks(rng, int(rng.integers(3, 5)))
    if not stage_pair(rng, things[0], things[1], relation):
      continue
    if not all(stage_alone(rng, things, i) for i in range(2, len(things))):
      continue
    for thing in things:
      add_change(rng, thing, things)
    break
  # Depth: the actor stands behind or in front as its relation says; the rest falls anywhere.
  order = list(rng.permutation(len(things)))
  back, front = sorted((order.index(0), order.index(1)))
  actor_front = relation == "passes in front of it" or (
    relation != "passes behind it" and rng.random() < 0.5
  )
  order[front], order[back] = (0, 1) if actor_front else (1, 0)
  return Scene(seed, [things[i] for i in order], order.index(0), order.index(1), relation)


def draw_looks(rng: np.random.Generator, count: int) -> list[Thing]:
  things: list[Thing] = []
  while len(things) < count:
    thing = Thing(
      colour=str(rng.choice(COLOUR_NAMES)),
      shape=str(rng.choice(SHAPES)),
      texture=str(rng.choice(TEXTURES)),
      size=str(rng.choice(list(RADII))),
    )
    if thing.name not in {other.name for other in things}:
      thing.radii[:] = RADII[thing.size]
      thing.colours[:] = COLOUR_NAMES.index(thing.colour)
      things.append(thing)
  return things


def stage_pair(rng: np.random.Generator, actor: Thing, target: Thing, relation: str) -> bool:
  """Lays out the acting pair; False if it does not fit into the picture."""
  way = str(rng.choice(DIRECTIONS))
  ahead = STEPS[way]
  aside = ahead[::-1]
  speed = rng.uniform(1.1, 2.3)
  switch = int(rng.integers(14, 26))
  contact = RADII[actor.size] + RADII[target.size] - 0.5
  place = np.array([rng.uniform(8, WIDTH - 8), rng.uniform(8, HEIGHT - 8)])
  wobble = aside * rng.uniform(-3, 3)
  target.steps = ("still",)
  if relation == "follows it":
    turns = [d for d in DIRECTIONS if d not in (way, OPPOSITE[way])]
    target.steps = (way,) if rng.random() < 0.4 else (way, str(rng.choice(turns)))
    actor.steps = target.steps
    lag = int(np.ceil((contact + rng.uniform(3, 8)) / speed))
    if switch + lag > FRAMES - 6:
      return False
    target.centres = track(place, target.steps, speed, switch)
    start = place - ahead * speed * lag
    actor.centres = track(start, actor.steps, speed, switch + lag)
    return inside(actor) and inside(target)
  if relation == "moves away from it":
    actor.steps = (way,) if rng.random() < 0.5 else ("still", way)
    start = place + ahead * (contact + 2) + wobble
    actor.centres = track(start, actor.steps, speed, switch)
  elif relation in ("passes behind it", "passes in front of it"):
    actor.steps = (way,)
    speed = max(speed, (2 * contact + 8) / FRAMES)
    middle = rng.uniform(0.4, 0.6) * FRAMES
    actor.centres = track(place - ahead * speed * middle + wobble, actor.steps, speed, 0)
    gaps = np.linalg.norm(actor.centres[[0, -1]] - place, axis=-1)
    if gaps.min() < contact + 2:
      return False
  else:
    gap = 3.0 if relation == "moves up to it and stops" else 0.0
    start = place - ahead * (contact + gap + speed * switch) + wobble
    actor.steps = (way, OPPOSITE[way]) if relation == "bounces off it" else (way, "still")
    actor.centres = track(start, actor.steps, speed, switch)
    if relation == "pushes it":
      target.steps = ("still", way)
  target.centres = track(place, target.steps, speed, switch)
  return inside(actor) and inside(target)


def stage_alone(rng: np.random.Generator, things: list[Thing], index: int) -> bool:
  """Lays out a thing that keeps clear of those before it; False if no place was found."""
  thing, radius = things[index], RADII[things[index].size]
  for _ in range(40):
    thing.turned_by = None
    way = str(rng.choice(DIRECTIONS))
    kind = str(
      rng.choice(
        ["still", "one", "two", "bounce", "stop", "start", "in", "out"],
        p=[0.02, 0.14, 0.4, 0.12, 0.08, 0.08, 0.08, 0.08],
      )
    )
    turns = [d for d in DIRECTIONS if d not in (way, OPPOSITE[way])]
    speed, switch = rng.uniform(1.1, 2.3), int(rng.integers(14, 26))
    start = np.array([rng.uniform(0, WIDTH), rng.uniform(0, HEIGHT)])
    axis = int(way in ("up", "down"))
    span = (WIDTH, HEIGHT)[axis]
    forward = STEPS[way][axis] > 0
    if kind == "still":
      thing.steps = ("still",)
    elif kind == "one":
      thing.steps = (way,)
    elif kind == "two":
      thing.steps = (way, str(rng.choice(turns)))
    elif kind == "stop":
      thing.steps = (way, "still")
    elif kind == "start":
      thing.steps = ("still", way)
    elif kind == "bounce":  # the wall is where the thing turns
      thing.steps = (way, OPPOSITE[way])
      thing.turned_by = SIDE[way]
      start[axis] = (span - radius if forward else radius) - STEPS[way][axis] * speed * switch
    elif kind == "in":
      thing.steps = (f"in {way}",)
      speed = rng.uniform(1.5, 2.3)
      outside = radius + 1 + speed * rng.uniform(2, 12)
      start[axis] = -outside if forward else span + outside
    else:
      thing.steps = (f"out {way}",)
      speed = rng.uniform(1.5, 2.3)
      gone = (radius + 1) + speed * rng.uniform(2, 12) - speed * (FRAMES - 1)
      start[axis] = span + gone if forward else -gone
    thing.centres = track(start, thing.steps, speed, switch)
    if inside(thing) and all(clear(thing, other) for other in things[:index]):
      return True
  return False


def inside(thing: Thing) -> bool:
  """Whether a thing stays in the picture where its script says so (half a pixel of slack)."""
  low = thing.centres - thing.radii[:, None] + 0.5
  high = thing.centres + thing.radii[:, None] - 0.5 - np.array([WIDTH, HEIGHT])
  within = ((low >= 0) & (high <= 0)).all(-1)
  if thing.steps[0].startswith("in "):
    return bool(within[-8:].all())
  if thing.steps[0].startswith("out "):
    return bool(within[:8].all())
  return bool(within.all())


def clear(thing: Thing, other: Thing) -> bool:
  gaps = np.linalg.norm(thing.centres - other.centres, axis=-1)
  return bool((gaps > RADII[thing.size] + RADII[other.size] + 2).all())


def add_change(rng: np.random.Generator, thing: Thing, things: list[Thing]) -> None:
  """Some of the things change: they grow, shrink, or turn another colour."""
  if thing.steps[0].split()[0] in ("in", "out") or rng.random() < 0.4:
    return
  at = int(rng.integers(14, 26))
  if things.index(thing) > 1 and rng.random() < 0.8:  # the pair's radii fix where they touch
    other = "large" if thing.size == "small" else "small"
    ramp = np.clip((np.arange(FRAMES) - at) / 6, 0, 1)
    radii = (RADII[thing.size] * (1 - ramp) + RADII[other] * ramp).astype(np.float32)
    old, thing.radii = thing.radii, radii
    crowded = any(
      (np.linalg.norm(thing.centres - o.centres, axis=-1) < radii + o.radii + 1).any()
      for o in things
      if o is not thing
    )
    if crowded or not inside(thing):
      thing.radii = old
    else:
      thing.change = "grows" if other == "large" else "shrinks"
    return
  if rng.random() < 0.5:
    return
  colour = str(rng.choice([c for c in COLOUR_NAMES if c != thing.colour]))
  if any(colour == o.colour and thing.shape == o.shape for o in things if o is not thing):
    return
  thing.change = f"turns {colour}"
  thing.colours[at:] = COLOUR_NAMES.index(colour)
