"""Near-duplicate clips, and clips of the benchmark's videos, by perceptual hashes."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np


def distance(a: int, b: int) -> int:
  """Bits in which two hashes differ."""
  return (a ^ b).bit_count()


class Index:
  """Clips by the hashes of their frames; finds those within `limit` bits.

  A hash is cut into limit + 1 parts, so that two within the limit agree on at least one.
  """

  def __init__(self, limit: int):
    edges = [64 * i // (limit + 1) for i in range(limit + 2)]
    self.limit = limit
    self._cuts = [(low, (1 << (high - low)) - 1) for low, high in pairwise(edges)]
    self._parts: list[dict[int, list[tuple[int, str]]]] = [{} for _ in self._cuts]

  def add(self, name: str, hashes: Sequence[int]) -> None:
    for value in hashes:
      for part, bits in enumerate(self._split(value)):
        self._parts[part].setdefault(bits, []).append((value, name))

  def _split(self, value: int) -> list[int]:
    return [(value >> low) & ones for low, ones in self._cuts]

  def near(self, hashes: Sequence[int]) -> tuple[str, int] | None:
    """The clip whose frames at most places lie within the limit, and their mean distance.

    More than half of the frames must; so a common title card alone makes no duplicate.
    """
    best: dict[str, dict[int, int]] = {}
    for place, value in enumerate(hashes):
      for part, bits in enumerate(self._split(value)):
        for other, name in self._parts[part].get(bits, ()):
          apart = distance(value, other)
          if apart <= self.limit:
            of_place = best.setdefault(name, {})
            of_place[place] = min(apart, of_place.get(place, apart))
    close = [
      (-len(distances), sum(distances.values()) / len(distances), name)
      for name, distances in best.items()
      if 2 * len(distances) > len(hashes)
    ]
    if not close:
      return None
    _, mean, name = min(close)
    return name, round(mean)


def survey(
  clips: Iterable[Mapping[str, Any]],
  benchmark: Mapping[str, Sequence[int]],
  limit: int,
  same: Mapping[str, str] | None = None,
) -> dict[str, str]:
  """{clip key: why it is dropped}: too like a benchmark video, or like a clip with a smaller key.

  Args:
    clips: rows with key, video_id (hash of the bytes), hashes and mirrored (hex).
    benchmark: {name: hashes} of videos that must not be trained on.
    limit: Hamming distance up to which two frames count as the same.
    same: {hash of the bytes: name} of the benchmark's videos: no shot of such a file gets in.
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
    elif match := held_out.near(both[0]) or held_out.near(both[1]):
      dropped[key] = f"benchmark video: like {match[0]} (distance {match[1]})"
    elif match := seen.near(both[0]) or seen.near(both[1]):
      dropped[key] = f"near-duplicate: like {match[0]} (distance {match[1]})"
    else:
      seen.add(key, both[0])
  return dropped


def spread(frames: int) -> list[int]:
  """The frames that stand for a clip: 1/4, 1/2 and 3/4."""
  return [int(frames * share) for share in np.array([1, 2, 3]) / 4]
