"""Rows of static shape: text ids, decoded frames and masks laid out as the model reads them.

Letters: P frames of the row, T scene frames, R objects, F frames of an object, N patches, S image
size in pixels, L sequence slots, U tokens kept per object, V scene tokens.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipes.errors import InputError
from data_pipes.prompts import IGNORE, MEDIA_IDS, Text
from data_pipes.tokenizer import REGION

Row = dict[str, np.ndarray]
"""The arrays of one row, or of a batch with a leading axis B:

frames uint8 [P, S, S, 3]: every frame once, scene frames first; unused slots are zero.
scene int32 [T]: the frame of each scene frame.
region_masks uint8 [R, P, N]: 1 where object r touches the patch at frame p.
region_frames int32 [R, F]: frames of object r in merge order, -1 for none.
tokens int32 [L]: text ids; 0 in visual slots and padding.
visual int32 [L]: -1, or the row of the visual table: scene token v, then V + r*U + k.
valid bool [L]: text or visual slot. supervised bool [L]: the slot's own token is a target.

A packed row holds several samples one behind the other: scene is int32 [C, T], a clip each (unused
ones are frame 0), the visual table begins with C * V scene tokens, and there is
segments int32 [L]: the number of the sample in the row, -1 in padding.

Where object features are cached, object_tokens bfloat16 [R, U, D] and object_kept bool [R, U] stand
for region_masks and region_frames; where frame features are, frames is bfloat16 [P, N, D].
"""


@dataclass(frozen=True)
class RowShape:
  """The static sizes of a row; hashable, so that a jitted step can take it as static."""

  frames: int  # P
  scene: int  # T
  objects: int  # R
  object_frames: int  # F
  length: int  # L
  image_size: int  # S, pixels
  grid: int  # patches a side; N = grid * grid
  tokens_per_object: int  # U
  scene_tokens: int  # V
  clips: int = 0  # C, of packed rows; 0: a row is one sample
  feature_width: int = 0  # D, of cached object features; 0: objects come as masks
  frame_features: bool = False  # frames come as cached features too, not as pixels

  def empty(self, count: int) -> Row:
    """`empty_rows` of this shape."""
    return empty_rows(self, count)


@dataclass(frozen=True)
class Clip:
  """A video or an image as decoded for one row. Frame numbers count in the source.

  Attributes:
    frames: {frame number: uint8 [S, S, 3]}, at least those named below; or features [N, D].
    scene: the T scene frames in order; an image is T times its frame 0.
    objects: per object {frame number: uint8 [N] mask on the tower's grid}, in merge order. A frame
      with an empty mask counts as a frame of the object.
    vanished: (object, frame number) where the object is too small to be in any cell by the
      published rule; the default rule keeps the cells it covers most.
    features: (tokens [objects, U, D], kept [objects, U]) where they are cached; objects then have
      no masks here.
    placed: the frames lie in their slots of the row already, in the order of `numbers`.
  """

  frames: Mapping[int, np.ndarray]
  scene: Sequence[int]
  objects: Sequence[Mapping[int, np.ndarray]]
  vanished: Sequence[tuple[int, int]] = ()
  features: tuple[np.ndarray, np.ndarray] | None = None
  placed: bool = False

  def numbers(self) -> list[int]:
    """The frame numbers the row stores, each once: scene frames, then those of masks alone."""
    return list(dict.fromkeys([*self.scene, *(f for masks in self.objects for f in masks)]))


def build_row(
  text: Text, clip: Clip | None, shape: RowShape, region_id: int, where: str = "question"
) -> Row:
  """Lays one dialogue out in `shape`.

  The media tag becomes V slots and each `<region>` after it U slots of the next object; one before
  the tag keeps its own embedding, as published (videorefer_arch.py:177-320).

  Args:
    text: ids before expansion, already cut to the wanted number of them.
    clip: the media, None for a row of text alone.
    region_id: the id of `<region>`.
    where: file and item, for messages.

  Raises:
    InputError: the tags do not match the clip (also after cutting), or the row does not fit.
  """
  row = empty_row(shape)
  place(row, text, clip, shape, region_id, where)
  return row


@dataclass(frozen=True)
class Used:
  """How much of a row its samples take so far."""

  samples: int = 0
  clips: int = 0
  frames: int = 0
  objects: int = 0
  length: int = 0


def place(
  row: Row,
  text: Text,
  clip: Clip | None,
  shape: RowShape,
  region_id: int,
  where: str = "question",
  at: Used = Used(),
) -> Used:
  """Lays one dialogue out behind what the row holds; returns what it holds then.

  As `build_row` does it; in a packed row each is a segment of its own, so that the loss of the row
  is the sum of theirs. Raises InputError before anything is written.
  """
  n = shape.grid * shape.grid
  is_tag = np.isin(text.ids, list(MEDIA_IDS.values()))
  is_region = _spliced_regions(text, clip, region_id, where)
  slots = np.ones(len(text.ids), np.int64)
  slots[is_tag] = shape.scene_tokens
  slots[is_region] = shape.tokens_per_object
  need = needs(text, clip, region_id, where)
  check_fit(need, shape, where, at)

  source = np.repeat(np.arange(len(slots)), slots)  # the text id behind each slot
  within = np.arange(len(source)) - (np.cumsum(slots) - slots)[source]
  first = np.full(len(slots), -1)
  first[is_tag] = at.clips * shape.scene_tokens
  objects = at.objects + np.arange(is_region.sum())
  first[is_region] = max(shape.clips, 1) * shape.scene_tokens + objects * shape.tokens_per_object
  visual = np.where(first[source] >= 0, first[source] + within, -1)
  used = slice(at.length, at.length + len(source))
  row["visual"][used] = visual
  row["tokens"][used] = np.where(visual < 0, text.ids[source], 0)
  row["valid"][used] = True
  row["supervised"][used] = (visual < 0) & (text.labels[source] != IGNORE)
  if shape.clips:
    row["segments"][used] = at.samples
  after = Used(
    samples=at.samples + 1,
    clips=at.clips + (clip is not None),
    frames=at.frames + need.frames,
    objects=at.objects + need.objects,
    length=used.stop,
  )
  if clip is None:
    return after

  slot = {number: p for p, number in enumerate(clip.numbers(), at.frames)}
  if not clip.placed:
    for number, p in slot.items():
      row["frames"][p] = clip.frames[number]
  scene = row["scene"][at.clips] if shape.clips else row["scene"]
  scene[:] = [slot[number] for number in clip.scene]
  if shape.feature_width:
    assert clip.features is not None, where
    places = slice(at.objects, after.objects)
    row["object_tokens"][places], row["object_kept"][places] = clip.features
    return after
  for r, masks in enumerate(clip.objects, at.objects):
    row["region_frames"][r, : len(masks)] = [slot[number] for number in masks]
    for number, mask in masks.items():
      row["region_masks"][r, slot[number]] = np.asarray(mask).reshape(n)
  return after


def empty_row(shape: RowShape) -> Row:
  """A row with nothing in it: no valid slot, nothing supervised."""
  return rows_of(empty_rows(shape, 1))[0]


def empty_rows(shape: RowShape, count: int) -> Row:
  """A batch of `count` empty rows, axis B first; `rows_of` gives each to be filled in place."""
  B = count
  packed = {"segments": np.full((B, shape.length), -1, np.int32)} if shape.clips else {}
  pixels: tuple[tuple[int, ...], Any] = ((shape.image_size, shape.image_size, 3), np.uint8)
  if shape.feature_width:
    import ml_dtypes  # here, as environments with PyTorch alone lack it

    if shape.frame_features:
      pixels = ((shape.grid**2, shape.feature_width), ml_dtypes.bfloat16)
    kept = (B, shape.objects, shape.tokens_per_object)
    objects = {
      "object_tokens": np.zeros((*kept, shape.feature_width), ml_dtypes.bfloat16),
      "object_kept": np.zeros(kept, bool),
    }
  else:
    objects = {
      "region_masks": np.zeros((B, shape.objects, shape.frames, shape.grid**2), np.uint8),
      "region_frames": np.full((B, shape.objects, shape.object_frames), -1, np.int32),
    }
  clips = (B, shape.clips) if shape.clips else (B,)
  return {
    "frames": np.zeros((B, shape.frames, *pixels[0]), pixels[1]),
    "scene": np.zeros((*clips, shape.scene), np.int32),
    **objects,
    "tokens": np.zeros((B, shape.length), np.int32),
    "visual": np.full((B, shape.length), -1, np.int32),
    "valid": np.zeros((B, shape.length), bool),
    "supervised": np.zeros((B, shape.length), bool),
    **packed,
  }


def rows_of(batch: Row) -> list[Row]:
  """The rows of a batch as views of it."""
  return [{key: array[b] for key, array in batch.items()} for b in range(len(batch["tokens"]))]


def collate(rows: Sequence[Row]) -> Row:
  """Stacks rows of one shape into a batch, axis B first."""
  return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


@dataclass(frozen=True)
class Needs:
  """What one row takes of a RowShape. `text_ids` counts the slots that are not visual."""

  frames: int
  scene: int  # 0 without media
  objects: int
  object_frames: int
  text_ids: int

  def length(self, tokens_per_object: int, scene_tokens: int) -> int:
    """Sequence slots of the row."""
    return self.text_ids + self.objects * tokens_per_object + scene_tokens * (self.scene > 0)


def needs(text: Text, clip: Clip | None, region_id: int, where: str = "question") -> Needs:
  """The exact needs of a row."""
  spliced = int(_spliced_regions(text, clip, region_id, where).sum())
  if clip is None:
    return Needs(0, 0, 0, 0, len(text.ids))
  return Needs(
    frames=len(clip.numbers()),
    scene=len(clip.scene),
    objects=len(clip.objects),
    object_frames=max((len(masks) for masks in clip.objects), default=0),
    text_ids=len(text.ids) - 1 - spliced,
  )


def check_fit(need: Needs, shape: RowShape, where: str, used: Used | None = None) -> None:
  """Raises InputError with the numbers if a sample does not fit behind what the row holds."""
  used = used or Used()
  length = need.length(shape.tokens_per_object, shape.scene_tokens)
  rows = [
    ("frames", used.frames + need.frames, shape.frames),
    ("objects", used.objects + need.objects, shape.objects),
    ("object_frames", need.object_frames, shape.object_frames),
    ("length", used.length + length, shape.length),
  ]
  if shape.clips:
    rows.append(("clips", used.clips + (need.scene > 0), shape.clips))
  over = [f"{name} {have} (accepted: up to {most})" for name, have, most in rows if have > most]
  if need.scene not in (0, shape.scene):
    over.append(f"scene {need.scene} (accepted: {shape.scene})")
  if over:
    raise InputError(f"{where}: does not fit the row shape: found {', '.join(over)}")


def fit_shape(
  needs: Iterable[Needs],
  *,
  image_size: int,
  grid: int,
  tokens_per_object: int,
  scene_tokens: int,
  scene: int = 1,
  length_multiple: int = 64,
  frames_multiple: int = 1,
  object_frames_multiple: int = 1,
) -> RowShape:
  """The smallest RowShape that holds every row of a set; each size is at least 1.

  Args:
    needs: those of each row (exact, or upper bounds).
    scene: T where no row has media.
    length_multiple, frames_multiple, object_frames_multiple: L, P and F are rounded up to these.
  """
  needs = list(needs)

  def largest(values: Iterable[int], multiple: int = 1) -> int:
    most = max([1, *values])
    return -(-most // multiple) * multiple

  scenes = {need.scene for need in needs if need.scene}
  if len(scenes) > 1:
    raise InputError(f"rows have {sorted(scenes)} scene frames; accepted: one number in a batch")
  return RowShape(
    frames=largest((need.frames for need in needs), frames_multiple),
    scene=scenes.pop() if scenes else scene,
    objects=largest(need.objects for need in needs),
    object_frames=largest((need.object_frames for need in needs), object_frames_multiple),
    length=largest(
      (need.length(tokens_per_object, scene_tokens) for need in needs), length_multiple
    ),
    image_size=image_size,
    grid=grid,
    tokens_per_object=tokens_per_object,
    scene_tokens=scene_tokens,
  )


def _spliced_regions(text: Text, clip: Clip | None, region_id: int, where: str) -> np.ndarray:
  """bool [n]: the `<region>` ids that objects replace; checks tags against the clip."""
  tags = np.flatnonzero(np.isin(text.ids, list(MEDIA_IDS.values())))
  if len(tags) != (clip is not None):
    accepted = "exactly one, at the place of the media" if clip else "none, as there is no media"
    raise InputError(f"{where}: found {len(tags)} media tags in the text; accepted: {accepted}")
  if clip is None:
    return np.zeros(len(text.ids), bool)
  spliced = (text.ids == region_id) & (np.arange(len(text.ids)) > tags[0])
  if spliced.sum() != len(clip.objects):
    raise InputError(
      f"{where}: found {spliced.sum()} {REGION} after the media tag within {len(text.ids)} text "
      f"ids but {len(clip.objects)} objects; accepted: equal numbers, the i-th tag takes the i-th "
      "object"
    )
  return spliced
