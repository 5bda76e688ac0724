"""Cached features: what the frozen tower makes of each object and, as an option, of each frame.

CACHE/features.array_record   a record a sample: its key, then [R, U, D] bfloat16 and kept [R, U]
CACHE/features.json           the tower's hash, U, D, the number of samples
CACHE/frames-00000-of-00016.array_record   a record a scene frame: its key, then [N, D] bfloat16
CACHE/frames-00000-of-00016.npy            the keys of those records, in order
CACHE/frames.json                          the tower's hash, N, D, T, the set, the number of shards

A sample's key is a hash of the source's content and of the masks that it takes, so a changed video,
annotation or mask mode is found; a frame's is one of the source's content, the frame's number and
how it was resized and stored. The tower's hash covers its weights and everything before it. For the
published model an object takes at most 4 x 1152 x 2 = 9216 bytes, a frame 729 x 1152 x 2 = 1.68 MB.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from data_pipes.batch import Clip
from data_pipes.errors import InputError
from data_pipes.files import replaced
from data_pipes.records import Record
from data_pipes.shards import FRAME_OPTIONS, StoredClip, shard_name
from data_pipes.video import scene_ids

_RECORDS, _INDEX = "features.array_record", "features.json"
_FRAME_INDEX = "frames.json"
_KEY = 16  # bytes


class TowerHash(NamedTuple):
  """Hashes of all that decides a frame's features, and an object's."""

  frames: str
  objects: str


def sample_key(record: Record, objects: Sequence[Mapping[int, Any]]) -> bytes:
  """What the features of a sample's objects depend on besides the tower.

  Raises InputError for a record that is not of prepared shards, whose media have no hash.
  """
  source = getattr(record.stored, "source", None)
  if source is None and objects:
    raise InputError(f"{record.where}: cached features need prepared shards (vr data prepare)")
  masks = [sorted(by_frame.items()) for by_frame in objects]
  order = [list(by_frame) for by_frame in objects]
  text = json.dumps([source, order, masks, record.size])
  return hashlib.blake2b(text.encode(), digest_size=_KEY).digest()


def frame_key(clip: StoredClip, number: int) -> bytes:
  """What the features of a frame depend on besides the tower."""
  rule = {k: v for k, v in clip.rule.items() if not k.startswith("scene")}
  text = json.dumps([clip.source, int(number), sorted(rule.items())])
  return hashlib.blake2b(text.encode(), digest_size=_KEY).digest()


def scene_numbers(clip: StoredClip, image: bool, scene: int) -> list[int]:
  """The frame numbers of a clip's `scene` scene frames; an image is its frame 0 that many times."""
  return [0] * scene if image else scene_ids(clip, scene)


class FeatureShards:
  """The cache of one set of samples, in their order.

  Attributes:
    frames: the features of the scene frames, None where they are not cached.
  """

  def __init__(self, folder: str | Path):
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    self.path = Path(folder)
    if not (self.path / _INDEX).is_file():
      raise InputError(f"{folder}: found no {_INDEX}; accepted: what vr data features has written")
    index = json.loads((self.path / _INDEX).read_text())
    self.tower: str = index["tower"]
    self.tokens: int = index["tokens"]
    self.width: int = index["width"]
    self._count: int = index["samples"]
    self._records = ArrayRecordDataSource([str(self.path / _RECORDS)])
    self.frames = FrameFeatures(self.path) if (self.path / _FRAME_INDEX).is_file() else None

  def __len__(self) -> int:
    return self._count

  def check(self, tower: TowerHash, samples: int) -> None:
    """Raises InputError if this is the cache of another tower or of another set."""
    pairs = [(self.tower, tower.objects)]
    if self.frames is not None:
      pairs.append((self.frames.tower, tower.frames))
    for cached, current in pairs:
      if cached != current:
        raise InputError(
          f"{self.path} is stale: made with tower {cached}, this run has {current}; make it again"
        )
    if len(self) != samples:
      raise InputError(f"{self.path} is stale: found {len(self)} samples, the set has {samples}")

  def get(self, index: int, key: bytes) -> tuple[np.ndarray, np.ndarray]:
    """(tokens bfloat16 [R, U, D], kept bool [R, U]) of a sample. Raises InputError if stale."""
    data = self._records[index]
    if data[:_KEY] != key:
      raise InputError(
        f"{self.path} is stale: sample {index} has other media or masks, or another mask mode; "
        "make it again"
      )
    size = self.tokens * (2 * self.width + 1)
    count, rest = divmod(len(data) - _KEY, size)
    assert rest == 0, (len(data), size)
    split = _KEY + count * self.tokens * self.width * 2
    tokens = np.frombuffer(data[_KEY:split], ml_dtypes.bfloat16)
    kept = np.frombuffer(data[split:], np.uint8).astype(bool)
    return tokens.reshape(count, self.tokens, self.width), kept.reshape(count, self.tokens)


def write_features(
  folder: str | Path,
  tower: str,
  tokens: int,
  width: int,
  samples: Iterable[tuple[bytes, np.ndarray, np.ndarray]],
) -> int:
  """Writes a cache of (key, tokens [R, U, D], kept [R, U]) in order; returns how many."""
  from array_record.python.array_record_module import ArrayRecordWriter

  folder = Path(folder)
  count = 0
  with replaced(folder / _RECORDS) as part:
    writer = ArrayRecordWriter(str(part), "group_size:1,uncompressed")
    for key, values, kept in samples:
      writer.write(
        key + values.astype(ml_dtypes.bfloat16).tobytes() + kept.astype(np.uint8).tobytes()
      )
      count += 1
    writer.close()
  with replaced(folder / _INDEX) as part:
    index = {"tower": tower, "tokens": tokens, "width": width, "samples": count}
    part.write_text(json.dumps(index) + "\n")
  return count


class FrameFeatures:
  """The features of the scene frames of a set of clips, found by what the frames are."""

  def __init__(self, folder: Path):
    """Raises InputError for a cache that was not made to the end."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    self.path = folder
    index = json.loads((folder / _FRAME_INDEX).read_text())
    self.tower: str = index["tower"]
    self._shape = (index["patches"], index["width"])
    n = index["shards"]
    paths = [folder / shard_name("frames", k, n) for k in range(n)]
    missing = [p for p in paths if not _keys_path(p).is_file()]
    if missing:
      raise InputError(
        f"{folder}: {len(missing)} of {n} shards of frame features are not there, such as "
        f"{missing[0].name}; run vr data features again to make the rest"
      )
    keys = np.concatenate([np.load(_keys_path(p)) for p in paths])
    codes = _codes(keys)
    self._order = np.argsort(codes, kind="stable")
    self._codes = codes[self._order]
    self._records = ArrayRecordDataSource([str(p) for p in paths])

  def clip(self, clip: StoredClip, image: bool, scene: int) -> Clip:
    """The clip's scene frames, bfloat16 [N, D] each. Raises InputError if one is not here."""
    numbers = scene_numbers(clip, image, scene)
    unique = list(dict.fromkeys(numbers))
    keys = [frame_key(clip, number) for number in unique]
    codes = _codes(np.frombuffer(b"".join(keys), np.uint8).reshape(-1, _KEY))
    at = np.searchsorted(self._codes, codes).clip(max=max(len(self._codes) - 1, 0))
    none = [b""] * len(unique)
    stored = self._records.__getitems__(self._order[at].tolist()) if len(self._codes) else none
    frames = {}
    for number, key, data in zip(unique, keys, stored, strict=True):
      if data[:_KEY] != key:
        raise InputError(
          f"{self.path} is stale: frame {number} of {clip.name} is another or stored in another "
          "way; make it again"
        )
      values = np.frombuffer(data, ml_dtypes.bfloat16, offset=_KEY)
      frames[number] = values.reshape(self._shape)
    return Clip(frames, numbers, [])


class FrameFeaturesWriter:
  """Makes the shards of frame features of a folder, those that are not there yet."""

  def __init__(self, folder: str | Path, index: Mapping[str, Any]):
    """`index`: tower, patches, width, scene, set and shards. Raises InputError for another's."""
    self._folder, self._shards = Path(folder), index["shards"]
    path = self._folder / _FRAME_INDEX
    if path.is_file():
      before = json.loads(path.read_text())
      if changed := [k for k in index if before.get(k) != index[k]]:
        listed = "; ".join(f"{k} was {before.get(k)}, is {index[k]}" for k in changed)
        raise InputError(f"{path} was begun with other settings: {listed}; use another folder")
      return
    with replaced(path) as part:
      part.write_text(json.dumps(dict(index)) + "\n")

  def left(self) -> list[int]:
    """The shards that are still to be made."""
    return [k for k in range(self._shards) if not _keys_path(self._path(k)).is_file()]

  def write(self, shard: int, frames: Iterable[tuple[bytes, np.ndarray]]) -> int:
    """Writes a shard of (key, features [N, D]); returns how many."""
    from array_record.python.array_record_module import ArrayRecordWriter

    keys = []
    with replaced(self._path(shard)) as part:
      writer = ArrayRecordWriter(str(part), FRAME_OPTIONS)
      for key, values in frames:
        writer.write(key + values.astype(ml_dtypes.bfloat16).tobytes())
        keys.append(key)
      writer.close()
    with replaced(_keys_path(self._path(shard))) as part, open(part, "wb") as file:
      np.save(file, np.frombuffer(b"".join(keys), np.uint8).reshape(-1, _KEY))
    return len(keys)

  def _path(self, shard: int) -> Path:
    return self._folder / shard_name("frames", shard, self._shards)


def _keys_path(path: Path) -> Path:
  return path.with_suffix(".npy")


def _codes(keys: np.ndarray) -> np.ndarray:
  """The first half of keys uint8 [n, 16] as uint64 [n]; the record itself has the whole key."""
  return np.ascontiguousarray(keys[:, :8]).view(np.uint64)[:, 0]
