"""Rows of the engine's stages: what Parquet holds, one dataclass a stage.

Frames count in the clip's own video file, as presented (`index_space` "presented"). Masks are
{frame number: COCO run lengths, or None where the object is not seen}.
"""

from dataclasses import dataclass
from typing import Any

Masks = dict[str, Any]


@dataclass(frozen=True)
class VideoRow:
  """00_ingest: one readable video of the source. key: hash of its bytes."""

  key: str
  name: str  # as the source names it: its path below input.videos
  caption: str
  frames: int
  fps: float | None
  height: int
  width: int
  given: Any  # objects that came with it: [{"masks": Masks, "text": str}], or []


@dataclass(frozen=True)
class ClipRow:
  """05_shots: one shot, a video file of its own. key: video:start-end."""

  key: str
  video_id: str
  source: str  # name of the source video
  video: str  # path in published samples, relative to W/media
  caption: str
  start: int  # frames of the source video, end excluded
  end: int
  frames: int
  fps: float | None
  height: int
  width: int
  motion: float  # mean absolute change between looked-at frames, grey levels of 255
  hashes: Any  # perceptual hashes of frames at 1/4, 1/2 and 3/4, hex
  mirrored: Any  # of the same frames, mirrored
  given: Any


@dataclass(frozen=True)
class NounRow:
  """10_analyze: one subject of a clip. key: clip/noun."""

  key: str
  clip_id: str
  noun: str


@dataclass(frozen=True)
class ObjectRow:
  """20_segment: one object with its masks. key: noun_id/k."""

  key: str
  clip_id: str
  noun_id: str
  noun: str
  height: int
  width: int
  index_space: str
  masks: Masks
  prompt: Any  # {"frame", "box", "score"} that the masks grew from; {} for given masks
  quality: Any  # quality.masks.measure
  text: str  # that came with given masks, "" otherwise


@dataclass(frozen=True)
class GateRow:
  """25_masks, 35_texts: an object or noun that passed."""

  key: str
  clip_id: str
  noun_id: str
  noun: str


@dataclass(frozen=True)
class TextRow:
  """30_annotate: what is said of an object. `source`: "model" or "measured"."""

  key: str
  clip_id: str
  noun_id: str
  noun: str
  motion: str
  appearance: str
  static: bool
  source: str
  facts: Any  # measured values, {} from a model


@dataclass(frozen=True)
class VerdictRow:
  """40_review: the decision with its evidence, both texts."""

  key: str
  clip_id: str
  noun_id: str
  noun: str
  same_object: bool
  reason: str
  confidence: float
  annotator_text: str
  region_text: str
  frame: int


@dataclass(frozen=True)
class CaptionRow:
  """50_refine of the detailed path."""

  key: str
  clip_id: str
  noun_id: str
  detailed: str
  short: str


@dataclass(frozen=True)
class DialogueRow:
  """50_refine of the QA path. key: clip_id."""

  key: str
  clip_id: str
  objects: Any  # object keys in the order that `questions` count in
  questions: Any  # [{"question", "answer", "type", "objects"}]


@dataclass(frozen=True)
class SampleRow:
  """60_assemble: an item of the published JSON. `file`: which of the three."""

  key: str
  file: str
  item: Any
  provenance: Any
