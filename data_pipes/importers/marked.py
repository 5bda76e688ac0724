"""Marked media, whatever tool marked them, and the rule by which they become items."""

import collections
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_pipes.errors import InputError
from data_pipes.masks import check_segmentation, counts_to_string
from data_pipes.prompts import MEDIA_TAGS
from data_pipes.tokenizer import REGION

TURNS = 16  # objects asked about in one item
NAMELESS = "an object"
_TAGS = (*MEDIA_TAGS.values(), "<audio>", REGION)


class Left:
  """What cannot be carried over: how often, and where first."""

  def __init__(self):
    self._kinds: dict[str, list[Any]] = {}

  def add(self, kind: str, where: str) -> None:
    self._kinds.setdefault(kind, [0, where])[0] += 1

  def counts(self) -> dict[str, dict[str, Any]]:
    """{kind: count, first}, most first."""
    kinds = sorted(self._kinds.items(), key=lambda pair: -pair[1][0])
    return {kind: {"count": count, "first": first} for kind, (count, first) in kinds}


@dataclass(frozen=True)
class Text:
  """What someone wrote about objects, by their keys; without any, about the whole medium."""

  text: str
  objects: tuple[str, ...] = ()


@dataclass
class Marked:
  """An object: keys by which texts may name it, and {frame: segmentation} where it is seen."""

  name: str
  keys: tuple[str, ...]
  masks: dict[int, Any] = field(default_factory=dict)


@dataclass
class Media:
  """A video or an image, its objects, and texts about them.

  Attributes:
    kind: "video" or "image".
    path: relative to the media folder. keys: by which captions may name it, besides its path.
    size: (height, width) in pixels, None where it is not known; polygons need it.
  """

  kind: str
  path: str
  size: tuple[int, int] | None
  objects: list[Marked]
  texts: list[Text] = field(default_factory=list)
  keys: tuple[str, ...] = ()


def items_of(media: Media, where: str, left: Left) -> Iterator[dict[str, Any]]:
  """The items of one medium, by this rule:

  - a text is an item: "Please describe <region>." of the objects that it is about, or "Please
    describe the video." where it is about none, and the text as the answer;
  - objects without a text share items, a turn each: "What is <region>?", and the name of the object
    or of its category as the answer ("an object" where it has none).
  """
  names = collections.Counter(marked.name for marked in media.objects)
  by_key = {m.name: m for m in media.objects if names[m.name] == 1 and m.masks}
  by_key |= {key: m for m in media.objects for key in m.keys if m.masks}
  described: set[int] = set()
  for text in media.texts:
    objects = [by_key[key] for key in text.objects if key in by_key]
    if not (answer := _plain(text.text)):
      left.add("empty texts", where)
    elif len(objects) < len(text.objects):
      left.add("texts about objects that have no mask", f"{where}: {answer!r}")
    else:
      described |= {id(marked) for marked in objects}
      regions = [REGION] * len(objects)
      subject = " and ".join(filter(None, (", ".join(regions[:-1]), *regions[-1:])))
      ask = f"Please describe {subject or f'the {media.kind}'}."
      yield _item(media, [(ask, answer)], objects)
  rest = [marked for marked in media.objects if id(marked) not in described]
  seen = [marked for marked in rest if marked.masks]
  for _ in range(len(rest) - len(seen)):
    left.add("objects without a mask", where)
  for first in range(0, len(seen), TURNS):
    objects = seen[first : first + TURNS]
    answers = [_plain(marked.name.replace("_", " ")) for marked in objects]
    for _ in range(answers.count("")):
      left.add(f"names, which objects lack (answered {NAMELESS!r}; give --captions)", where)
    turns = [(f"What is {REGION}?", answer or NAMELESS) for answer in answers]
    yield _item(media, turns, objects)


def _item(
  media: Media, turns: Sequence[tuple[str, str]], objects: Iterable[Marked]
) -> dict[str, Any]:
  talk: list[dict[str, str]] = []
  for ask, answer in turns:
    head = "" if talk else f"{MEDIA_TAGS[media.kind]}\n"
    talk += [{"from": "human", "value": head + ask}, {"from": "gpt", "value": answer}]
  item: dict[str, Any] = {media.kind: media.path}
  if media.size:
    item |= {"height": media.size[0], "width": media.size[1]}
  item["conversations"] = talk
  annotation = [
    {str(number): _entry(mask) for number, mask in sorted(marked.masks.items())}
    for marked in objects
  ]
  return item | ({"annotation": annotation} if annotation else {})


def _entry(mask: Any) -> dict[str, Any]:
  return mask if isinstance(mask, dict) and "box" in mask else {"segmentation": mask}


def _plain(text: str) -> str:
  """Text on one line, without what our format reads as a tag."""
  for tag in _TAGS:
    text = text.replace(tag, tag.strip("<>"))
  return " ".join(text.encode("utf-8", "replace").decode().split())


# Masks


def usable(segmentation: Any, size: tuple[int, int] | None, where: str, left: Left) -> Any:
  """A segmentation that our format can hold; None where nothing is seen or it cannot be used."""
  if segmentation is None or segmentation == []:
    return None
  try:
    if not isinstance(segmentation, dict | list):
      raise InputError("neither run lengths nor polygons")
    if isinstance(segmentation, list):
      segmentation = [p for p in segmentation if not isinstance(p, list) or len(p) >= 6]
      if not segmentation:
        raise InputError("polygons of fewer than three points")
    stated, area = check_segmentation(segmentation)
  except InputError as error:
    left.add("masks that cannot be drawn", f"{where}: {error}")
    return None
  if isinstance(segmentation, list) and size is None:
    left.add("polygons on media of unknown size", where)
    return None
  if stated and size and stated != size:
    left.add(
      "masks of another size than their frame",
      f"{where}: {stated[0]}x{stated[1]} on {size[0]}x{size[1]} (height x width)",
    )
    return None
  return None if area == 0 else segmentation


def box_segmentation(
  corners: Sequence[float],
  size: tuple[int, int] | None,
  where: str,
  left: Left,
  turn: float = 0.0,
) -> Any:
  """Every pixel that the box x1, y1, x2, y2 touches, as run lengths; None where that is none.

  Where the size is not known, the box as it is. `turn` in degrees, clockwise on the screen, about
  the middle: then a polygon.
  """
  x1, y1, x2, y2 = corners
  if turn % 360:
    middle = ((x1 + x2) / 2, (y1 + y2) / 2)
    return [turned([(x1, y1), (x2, y1), (x2, y2), (x1, y2)], middle, turn)]
  if size is None:
    return {"box": list(corners)}
  height, width = size
  left_, top = max(0, math.floor(x1)), max(0, math.floor(y1))
  right, bottom = min(width, math.ceil(x2)), min(height, math.ceil(y2))
  rows, columns = bottom - top, right - left_
  if rows <= 0 or columns <= 0:
    left.add("boxes outside the picture, or empty", f"{where}: {x1:g},{y1:g},{x2:g},{y2:g}")
    return None
  after = height - bottom + (width - right) * height
  if rows == height:
    counts = [left_ * height, rows * columns, after]
  else:
    between = [rows, height - rows] * (columns - 1)
    counts = [left_ * height + top, *between, rows, after]
  return {"size": [height, width], "counts": counts_to_string(counts if after else counts[:-1])}


def turned(
  points: Iterable[tuple[float, float]], middle: tuple[float, float], degrees: float
) -> list[float]:
  """Points turned about one, clockwise on the screen, as a polygon x, y, x, y, …"""
  cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
  out: list[float] = []
  for x, y in points:
    x, y = x - middle[0], y - middle[1]
    out += [
      round(middle[0] + x * cosine - y * sine, 2),
      round(middle[1] + x * sine + y * cosine, 2),
    ]
  return out


def ellipse(
  middle: tuple[float, float], radii: tuple[float, float], degrees: float = 0.0
) -> list[float]:
  """An ellipse as a polygon of 72 corners."""
  angles = np.linspace(0, 2 * np.pi, 72, endpoint=False)
  x, y = middle[0] + radii[0] * np.cos(angles), middle[1] + radii[1] * np.sin(angles)
  return turned(zip(x.tolist(), y.tolist(), strict=True), middle, degrees)
