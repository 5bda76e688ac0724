"""Near-duplicate clips, and clips of the benchmark's videos: by perceptual hashes, then by a look.

A hash of 64 bits tells copies from other pictures of a film, but not two dull pictures that are
light and dark in the same places. So pictures whose hashes are near are also compared as small
pictures in colour, which leaves what is a copy.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

SIDE = 16  # of the small pictures, pixels
# Correlation of two of them. Unlike scenes with near hashes have up to 0.6; copies of real clips
# (re-encoded, scaled, mirrored; up to a sixteenth of a second apart) have 0.967 and more.
LEAST_ALIKE = 0.75

# The small pictures of a clip or benchmark video by its name, in the order of its hashes; None
# where it cannot be looked at, so that its hashes decide.
Looks = Callable[[str], Sequence[np.ndarray] | None]


def distance(a: int, b: int) -> int:
  """Bits in which two hashes differ."""
  return (a ^ b).bit_count()


def small_picture(frame: np.ndarray) -> np.ndarray:
  """uint8 [SIDE, SIDE, 3] of a frame uint8 [H, W, 3]."""
  return np.asarray(Image.fromarray(frame).resize((SIDE, SIDE), Image.Resampling.BOX))


def are_alike(a: np.ndarray, b: np.ndarray) -> bool:
  """Whether two small pictures have the same colours in the same places, but for brightness and
  contrast."""
  a, b = (picture - picture.mean((0, 1), keepdims=True) for picture in (a, b))
  power = np.sqrt((a * a).sum() * (b * b).sum())
  return bool((a * b).sum() >= LEAST_ALIKE * power)


class Match(NamedTuple):
  """A clip near another: its name, their mean distance, and {place of a hash: that of its own}."""

  name: str
  distance: int
  places: Mapping[int, int]


class Index:
  """Clips by the hashes of their frames; finds those within `limit` bits.

  A hash is cut into limit + 1 parts, so that two within the limit agree on at least one.
  """

  def __init__(self, limit: int):
    edges = [64 * i // (limit + 1) for i in range(limit + 2)]
    self.limit = limit
    self._cuts = [(low, (1 << (high - low)) - 1) for low, high in pairwise(edges)]
    self._parts: list[dict[int, list[tuple[int, str, int]]]] = [{} for _ in self._cuts]

  def add(self, name: str, hashes: Sequence[int]) -> None:
    for place, value in enumerate(hashes):
      for part, bits in enumerate(self._split(value)):
        self._parts[part].setdefault(bits, []).append((value, name, place))

  def _split(self, value: int) -> list[int]:
    return [(value >> low) & ones for low, ones in self._cuts]

  def near(self, hashes: Sequence[int]) -> Iterator[Match]:
    """Clips whose frames lie within the limit, those with the most such frames first, then the
    nearest.

    More than half of the frames must; so a common title card alone makes no duplicate.
    """
    best: dict[str, dict[int, tuple[int, int]]] = {}  # name -> place -> distance, its own place
    for place, value in enumerate(hashes):
      for part, bits in enumerate(self._split(value)):
        for other, name, its_place in self._parts[part].get(bits, ()):
          apart = distance(value, other)
          if apart <= self.limit:
            of_place = best.setdefault(name, {})
            of_place[place] = min((apart, its_place), of_place.get(place, (apart, its_place)))
    close = [
      (-len(places), sum(apart for apart, _ in places.values()) / len(places), name)
      for name, places in best.items()
      if 2 * len(places) > len(hashes)
    ]
    for _, mean, name in sorted(close):
      yield Match(name, round(mean), {place: its for place, (_, its) in best[name].items()})


def survey(
  clips: Iterable[Mapping[str, Any]],
  benchmark: Mapping[str, Sequence[int]],
  limit: int,
  same: Mapping[str, str] | None = None,
  looks: Looks = lambda name: None,
) -> dict[str, str]:
  """{clip key: why it is dropped}: too like a benchmark video, or like a clip with a smaller key.

  Args:
    clips: rows with key, video_id (hash of the bytes), hashes and mirrored (hex).
    benchmark: {name: hashes} of videos that must not be trained on.
    limit: Hamming distance up to which two frames may be the same.
    same: {hash of the bytes: name} of the benchmark's videos: no shot of such a file gets in.
    looks: small pictures of clips, by key, and of benchmark videos.
  """
  held_out, seen = Index(limit), Index(limit)
  for name, hashes in benchmark.items():
    held_out.add(name, hashes)
  dropped = {}
  ordered = sorted(
    ((row["key"], row["video_id"], row["hashes"], row["mirrored"]) for row in clips),
    key=lambda c: c[0],
  )
  for key, video, straight, mirrored in ordered:
    both = [[int(h, 16) for h in hashes] for hashes in (straight, mirrored)]
    if file := (same or {}).get(video):
      dropped[key] = f"benchmark video: the file is {file}"
    elif match := _copy_of(key, both, held_out, looks):
      dropped[key] = f"benchmark video: like {match.name} (distance {match.distance})"
    elif match := _copy_of(key, both, seen, looks):
      dropped[key] = f"near-duplicate: like {match.name} (distance {match.distance})"
    else:
      seen.add(key, both[0])
  return dropped


def _copy_of(key: str, both: Sequence[Sequence[int]], index: Index, looks: Looks) -> Match | None:
  """The first clip of the index of which this one, as it is or mirrored, is a copy."""
  for hashes, step in zip(both, (1, -1), strict=True):
    for match in index.near(hashes):
      mine, its = looks(key), looks(match.name)
      if mine is None or its is None:
        return match
      pairs = [(mine[place][:, ::step], its[other]) for place, other in match.places.items()]
      if 2 * sum(are_alike(*pair) for pair in pairs) > len(hashes):
        return match
  return None


def spread(frames: int) -> list[int]:
  """The frames that stand for a clip: 1/4, 1/2 and 3/4."""
  return [int(frames * share) for share in np.array([1, 2, 3]) / 4]
