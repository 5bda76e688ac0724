"""Records to rows: which frames and words a row takes, and random access to the rows of a set."""

import functools
import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from data_pipes import isolation
from data_pipes.batch import Clip, Needs, Row, RowShape, place, rows_of
from data_pipes.clips import MAX_MASK_FRAMES, choose_mask_frames, media_path, read_clip
from data_pipes.errors import InputError
from data_pipes.feature_shards import FeatureShards, sample_key
from data_pipes.masks import GRID_RULES
from data_pipes.prompts import Text, dialogue_length, dialogue_text, plain_text
from data_pipes.records import Record
from data_pipes.shards import StoredClip
from data_pipes.tokenizer import Tokenizer
from data_pipes.video import scene_ids

log = logging.getLogger(__name__)

WARNINGS = 10  # about vanishing objects, for each set of samples
MASK_MODES = ("single", "multi", "half")


@dataclass(frozen=True)
class RowRules:
  """How a record becomes a row; the choices that the published recipe leaves to its scripts.

  Attributes:
    templated: chat template and targets on the answers; False is the plain text of stage 1.
    max_text_ids: text ids kept, before media and `<region>` are expanded; None keeps all.
    aspect_ratio: "square" (published VideoRefer) or "pad".
    mask_rule: how masks come onto the grid, see data_pipes.masks.mask_to_grid.
    masks: "single" frame an object, "multi" (all annotated ones), or "half": one row in two is
      single, by a hash of its index.
    single_frame: which one in single mode, "first" where the object is seen, or "random".
    max_mask_frames: most frames of an object in multi mode.
    seed: of the draws above. The same record always gets the same frames.
    cached: object features come from a cache, so that no mask frames are read.
  """

  templated: bool = True
  max_text_ids: int | None = 2048
  aspect_ratio: str = "square"
  mask_rule: str = "keep"
  masks: str = "multi"
  single_frame: str = "first"
  max_mask_frames: int = MAX_MASK_FRAMES
  seed: int = 0
  cached: bool = False

  def __post_init__(self):
    accepted_values = {
      "masks": MASK_MODES,
      "single_frame": ("first", "random"),
      "mask_rule": GRID_RULES,
    }
    for name, accepted in accepted_values.items():
      if getattr(self, name) not in accepted:
        raise InputError(f"{name}={getattr(self, name)!r}; accepted: {', '.join(accepted)}")

  def text(self, record: Record, tokenizer: Tokenizer) -> Text:
    """The dialogue's ids and labels, cut to max_text_ids."""
    render = dialogue_text if self.templated else plain_text
    return render(record.turns, tokenizer, record.tag).cut(self.max_text_ids)

  def text_length(self, record: Record, tokenizer: Tokenizer) -> int:
    """Ids of `text`, without their labels."""
    if self.templated:
      length = dialogue_length(record.turns, tokenizer, record.tag)
    else:
      length = len(plain_text(record.turns, tokenizer, record.tag).ids)
    return length if self.max_text_ids is None else min(length, self.max_text_ids)

  def objects(self, record: Record, index: int) -> list[dict]:
    """The mask frames of each object that record number `index` uses."""
    single = self.masks == "single" or (self.masks == "half" and self._draw("half", index, 0) % 2)
    counter = iter(range(len(record.objects)))
    draw = lambda count: self._draw("frame", index, next(counter)) % count  # noqa: E731
    return choose_mask_frames(
      record.objects,
      bool(single),
      self.max_mask_frames,
      draw if self.single_frame == "random" else None,
    )

  def _draw(self, *key) -> int:
    text = ":".join(map(str, (self.seed, *key)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def record_needs(
  record: Record, index: int, tokenizer: Tokenizer, scene: int, rules: RowRules
) -> Needs:
  """What a record takes of a RowShape, without opening its media.

  `frames` is an upper bound for a video that is not stored in shards: mask frames that are scene
  frames too are taken once.

  Raises InputError: an item of VideoRefer-Bench, which holds nothing to train on.
  """
  if not record.turns:
    raise InputError(
      f"{record.where}: key 'conversations': found nothing; accepted: a list of messages"
    )
  length = rules.text_length(record, tokenizer)
  if record.media is None:
    return Needs(0, 0, 0, 0, length)
  objects = rules.objects(record, index)
  if rules.cached:
    objects = [{} for _ in objects]
  numbers = {number for by_frame in objects for number in by_frame}
  if record.stored is not None and record.media != "image":
    frames = len(numbers.union(scene_ids(record.stored, scene)))
  else:
    frames = 1 if record.media == "image" else scene + len(numbers)
  return Needs(
    frames=frames,
    scene=scene,
    objects=len(objects),
    object_frames=max(map(len, objects), default=0),
    text_ids=length - 1 - len(objects),
  )


class StaticShape(Protocol):
  """The static sizes of a row, hashable."""

  def empty(self, count: int) -> Row:
    """A batch of rows without a valid slot, to be filled in place."""
    ...


class RowSource(ABC):
  """Random access to rows of one shape: `rows[i]` decodes and builds row i."""

  shape: StaticShape

  @abstractmethod
  def __len__(self) -> int: ...

  @abstractmethod
  def fill(self, row: Row, index: int) -> None:
    """Builds row `index` in `row`, an empty one of `shape`. Raises InputError, and leaves rubbish.

    So that a batch is decoded where it lies: frames are the bulk of the bytes, and each copy into
    memory that is fresh from the system costs about as much as decoding a tenth of them.
    """

  @abstractmethod
  def names(self, index: int) -> list[str]:
    """How messages name the samples of row `index`."""

  def __getitem__(self, index: int) -> Row:
    (row,) = rows_of(self.shape.empty(1))
    self.fill(row, index)
    return row


class Samples(RowSource):
  """Random access to the rows of one set of records, a sample each.

  Attributes:
    vanished: masks met so far that the published rule leaves in no cell of the grid; the first
      few are named in the log.
  """

  def __init__(
    self,
    records: Sequence[Record],
    tokenizer: Tokenizer,
    shape: RowShape,
    *,
    media_root: str | Path = "",
    rules: RowRules | None = None,
    features: FeatureShards | None = None,
    item_seconds: float = isolation.SECONDS,
  ):
    """`records` is a Container or a list; `media_root` the folder its paths start from.

    `features` are cached object features, where `rules.cached`; frames come from there too where
    `shape.frame_features`. `item_seconds`: that the decoders may take for a sample.
    """
    self.features = features
    self.records, self.tokenizer = records, tokenizer
    self.shape: RowShape = shape
    self.media_root = Path(media_root)
    self.rules = rules or RowRules()
    self.item_seconds = item_seconds
    self.vanished = 0

  def __len__(self) -> int:
    return len(self.records)

  def fill(self, row: Row, index: int) -> None:
    text, clip, where = self.part(index, row["frames"])
    place(row, text, clip, self.shape, self.tokenizer.region_id, where)

  def names(self, index: int) -> list[str]:
    return [self.records[index].where]

  def part(self, index: int, room: np.ndarray | None = None) -> tuple[Text, Clip | None, str]:
    """Sample `index` before it is laid out: its text, its decoded clip, and how messages name it.

    The frames are decoded into `room`, free slots of a row, if they fit. Raises InputError.
    """
    record = self.records[index]
    try:
      if record.frames:
        raise InputError("found a list of pictures as the video; accepted: one file or folder")
      text = self.rules.text(record, self.tokenizer)
      clip = None
      if record.media is not None:
        objects, cached = self.rules.objects(record, index), None
        if self.features is not None:
          cached = self.features.get(index, sample_key(record, objects))
          objects = [{} for _ in objects]
        image = record.media == "image"
        if self.shape.frame_features:
          assert self.features is not None
          assert self.features.frames is not None
          assert isinstance(record.stored, StoredClip)
          clip = self.features.frames.clip(record.stored, image, self.shape.scene)
          clip = replace(clip, objects=objects)
        else:
          clip = self._read(record, objects, image, room)
        clip = replace(clip, features=cached)
    except (InputError, OSError) as error:
      raise InputError(f"{record.where}: {error}") from error
    if clip and clip.vanished:
      self._warn(record.where, clip)
    return text, clip, record.where

  def _read(
    self, record: Record, objects: list[dict], image: bool, room: np.ndarray | None
  ) -> Clip:
    """The clip of a record. Media are decoded in a worker process, as they may be anybody's; what
    stands in shards was encoded by `vr data prepare`."""
    read = functools.partial(
      read_clip,
      image=image,
      aspect_ratio=self.rules.aspect_ratio,
      mask_rule=self.rules.mask_rule,
      size=record.size,
    )
    if record.stored is not None:
      return read(record.stored, self.shape, objects, room=room)
    path = media_path(self.media_root, record.path)
    slots = () if image or room is None else room
    try:
      clip = isolation.call(read, path, self.shape, objects, seconds=self.item_seconds, room=slots)
    except isolation.Ended as error:
      raise InputError(f"{path}: the decoder {error}") from None
    numbers = clip.numbers()
    placed = 0 < len(numbers) <= len(slots) and all(
      np.may_share_memory(clip.frames[number], slot)
      for number, slot in zip(numbers, slots, strict=False)
    )
    return replace(clip, placed=placed)

  def _warn(self, where: str, clip: Clip) -> None:
    self.vanished += len(clip.vanished)
    if self.vanished - len(clip.vanished) < WARNINGS:
      for i, number in clip.vanished:
        log.warning(
          "%s: object %d vanishes in frame %d under the published rule: too small for the grid "
          "(mask_rule=%s)",
          where,
          i,
          number,
          self.rules.mask_rule,
        )
