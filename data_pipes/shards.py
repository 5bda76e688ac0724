"""Prepared shards: samples and frames in ArrayRecord files, read at random without decoding video.

OUT/samples-00000-of-00016.array_record   a record a sample: JSON {file, item, clip, record}
OUT/frames-00000-of-00016.array_record    a record a frame: the JPEG or PNG bytes
OUT/manifest.json                         counts, checksums, settings, rejects by class
OUT/rejects.jsonl, notices.jsonl          every reject and every notice of a sample, with reasons

`record` is the item as the annotation file has it. `clip` says how its frames lie: `frames` are
their presented numbers, `pts` and `time_base` when they appear, `first` the record of the first
one, `size` [height, width] of the source, `rule` how they were chosen and resized, `source` the
hash of the media file.
"""

import bisect
import dataclasses
import io
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipes.errors import InputError
from data_pipes.records import Container, Record, parse_item
from data_pipes.video import Video

MANIFEST = "manifest.json"
# One record a chunk, so that any is read alone; frames do not compress further.
FRAME_OPTIONS = "group_size:1,uncompressed"
SAMPLE_OPTIONS = "group_size:1,zstd:3"


def shard_name(kind: str, shard: int, shards: int) -> str:
  return f"{kind}-{shard:05d}-of-{shards:05d}.array_record"


class ShardSet(Container):
  """The samples of a prepared folder; `shards[i]` is a record whose `stored` has its frames.

  Attributes:
    manifest: as `vr data prepare` wrote it.
    size, aspect_ratio: of the stored frames; size 0 where they have the source's.
  """

  def __init__(self, folder: str | Path):
    """Raises InputError for a folder that is not prepared to the end."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    self.path = Path(folder)
    file = self.path / MANIFEST
    if not file.is_file():
      raise InputError(
        f"{self.path}: found no {MANIFEST}; accepted: a folder that vr data prepare has finished"
      )
    self.manifest: dict[str, Any] = json.loads(file.read_text())
    settings = self.manifest["settings"]
    self.size, self.aspect_ratio = settings["size"], settings["aspect_ratio"]
    self.scene = tuple(settings["scene"])
    self.files: list[str] = settings["files"]
    counts = self.manifest["samples_of_shards"]
    self._ends = list(itertools.accumulate(counts))
    n = len(counts)
    paths = {
      k: [str(self.path / shard_name(k, i, n)) for i in range(n)] for k in ("samples", "frames")
    }
    for path in itertools.chain(*paths.values()):
      if not Path(path).is_file():
        raise InputError(f"{path}: no such file, though {MANIFEST} names it")
    self._samples = ArrayRecordDataSource(paths["samples"])
    self._frames = [ArrayRecordDataSource([path]) for path in paths["frames"]]
    if len(self._samples) != len(self):
      raise InputError(
        f"{self.path}: found {len(self._samples)} samples; {MANIFEST} counts {len(self)}"
      )

  @classmethod
  def reads(cls, path: Path) -> bool:
    return path.is_dir()

  def __len__(self) -> int:
    return self._ends[-1] if self._ends else 0

  def where(self, index: int) -> str:
    return f"{self.path}: sample {index}"

  def item(self, index: int) -> Any:
    return self.sample(index)["record"]

  def __getitem__(self, index: int) -> Record:  # type: ignore[override]
    sample = self.sample(index)
    record = parse_item(sample["record"], self.where(index))
    if sample["clip"] is None:
      return record
    frames = self._frames[bisect.bisect_right(self._ends, index)]
    return dataclasses.replace(record, stored=StoredClip(sample["clip"], frames, self.path))

  def sample(self, index: int) -> dict[str, Any]:
    """The parsed JSON of a sample: file, item, clip, record."""
    if not 0 <= index < len(self):
      raise IndexError(index)
    try:
      return json.loads(self._samples[index])
    except RuntimeError as error:  # a checksum of ArrayRecord's
      raise InputError(f"{self.where(index)} is damaged ({_reason(error)})") from error

  def of_shard(self, shard: int) -> range:
    """The samples that lie in shard number `shard`."""
    return range(self._ends[shard - 1] if shard else 0, self._ends[shard])

  def source(self, index: int) -> tuple[str, int]:
    """The annotation file and the number of the item in it."""
    sample = self.sample(index)
    return self.files[sample["file"]], sample["item"]

  def check_model(self, image_size: int, aspect_ratio: str, scene: int) -> None:
    """Raises InputError if these frames are not those a model needs."""
    if self.size and self.size < image_size:
      fault, accepted = f"frames of {self.size} pixels", f"--size {image_size}, more, or 0"
    elif self.size and self.aspect_ratio != aspect_ratio:
      fault, accepted = f"aspect ratio {self.aspect_ratio!r}", f"--aspect-ratio {aspect_ratio}"
    elif scene not in self.scene:
      fault, accepted = f"scenes of {self.scene} frames", f"--scene-frames {scene}"
    else:
      return
    raise InputError(f"{self.path}: found {fault}; accepted: shards prepared with {accepted}")


def _reason(error: RuntimeError) -> str:
  return str(error).splitlines()[0].partition(" (computed")[0]


class StoredClip(Video):
  """A clip's stored frames under their presented numbers, as if the source were open."""

  def __init__(self, clip: Mapping[str, Any], frames, folder: Path):
    self.name = f"{folder}: {clip['path']}"
    self.kind, self.fps = clip["kind"], clip.get("fps")
    self.size = tuple(clip["size"])
    self.claimed, self.rotation = clip.get("claimed"), clip.get("rotation", 0)
    self.source, self.rule = clip["source"], clip["rule"]
    self.aspect_ratio = self.rule["aspect_ratio"]
    self._count = clip.get("count", 1)
    self._rows = {number: clip["first"] + k for k, number in enumerate(clip["frames"])}
    self._frames = frames

  def __len__(self) -> int:
    return self._count

  def stored(self) -> list[int]:
    """The presented numbers of the frames that are here."""
    return list(self._rows)

  def encoded(self) -> list[bytes]:
    """The stored frames as they are, JPEG or PNG, in the order of `stored`."""
    return list(self._frames.__getitems__(list(self._rows.values())))

  def _read(self, numbers: list[int]) -> Iterator[np.ndarray]:
    missing = [n for n in numbers if n not in self._rows]
    if missing:
      raise InputError(f"{self.name}: frame {missing[0]} is not stored; prepare the shards with it")
    try:
      stored = self._frames.__getitems__([self._rows[n] for n in numbers])
    except RuntimeError as error:  # a checksum of ArrayRecord's
      raise InputError(f"{self.name}: a stored frame is damaged ({_reason(error)})") from error
    for data in stored:
      try:
        with Image.open(io.BytesIO(data)) as image:
          yield np.asarray(image.convert("RGB"))
      except (OSError, SyntaxError) as error:
        raise InputError(f"{self.name}: a stored frame is damaged ({error})") from error
