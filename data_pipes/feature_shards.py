"""Cached object features: what the frozen tower and the token merge make of each object.

CACHE/features.array_record   a record a sample: its key, then [R, U, D] bfloat16 and kept [R, U]
CACHE/features.json           the tower's hash, U, D, the number of samples

A sample's key is a hash of the source's content and of the masks that it takes, so a changed video,
annotation or mask mode is found; the tower's hash covers its weights and everything before it. At
most 4 x 1152 x 2 = 9216 bytes an object for the published model.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from data_pipes.errors import InputError
from data_pipes.records import Record
from data_pipes.tasks import committed

_RECORDS, _INDEX = "features.array_record", "features.json"
_KEY = 16  # bytes


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


class FeatureShards:
  """The cache of one set of samples, in their order."""

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

  def __len__(self) -> int:
    return self._count

  def check(self, tower: str, samples: int) -> None:
    """Raises InputError if this is the cache of another tower or of another set."""
    if self.tower != tower:
      raise InputError(
        f"{self.path} is stale: made with tower {self.tower}, this run has {tower}; make it again"
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
  with committed(folder / _RECORDS) as part:
    writer = ArrayRecordWriter(str(part), "group_size:1,uncompressed")
    for key, values, kept in samples:
      writer.write(
        key + values.astype(ml_dtypes.bfloat16).tobytes() + kept.astype(np.uint8).tobytes()
      )
      count += 1
    writer.close()
  with committed(folder / _INDEX) as part:
    index = {"tower": tower, "tokens": tokens, "width": width, "samples": count}
    part.write_text(json.dumps(index) + "\n")
  return count
