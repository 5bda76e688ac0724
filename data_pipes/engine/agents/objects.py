"""The Analyzer and the Segmentor, and the gate that masks must pass."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipes.engine.graph import Item, Outcome, Process, Rejected, digest
from data_pipes.engine.quality import masks as quality
from data_pipes.engine.roles import Ambiguous, Analyzer, Clip, Segmentor, Track
from data_pipes.engine.rows import GateRow, NounRow, ObjectRow
from data_pipes.errors import InputError
from data_pipes.frame_rules import grid_frames
from data_pipes.masks import check_size, encode_mask, segmentation_to_mask


def clip_of(row: Mapping[str, Any], settings: Mapping[str, Any]) -> Clip:
  """The clip of a ClipRow; its file lies in the run's media folder."""
  path = Path(settings["workdir"]) / "media" / row["video"]
  return Clip(str(path), row["caption"], row["frames"], row["fps"], row["height"], row["width"])


def make_analyze(analyzer: Analyzer, settings: Mapping[str, Any]) -> Process:
  """ClipRow -> a NounRow for each subject."""

  def process(item: Item) -> Outcome:
    clip = clip_of(item.row, settings)
    rows: dict[str, NounRow] = {}
    rejected = []
    for number, noun in enumerate(analyzer.nouns(clip).subjects):
      noun = unicodedata.normalize("NFC", " ".join(noun.lower().split()))
      key = f"{item.key}/{_key_of(noun)}"
      if fault := noun_fault(noun):
        rejected.append(Rejected(f"{key}#{number}", fault))
      elif len(rows) >= settings["max_objects"]:
        rejected.append(Rejected(key, f"too many subjects: at most {settings['max_objects']}"))
      elif key not in rows:
        rows[key] = NounRow(key, item.key, noun)
    if not rows and not rejected:
      return Outcome(rejected=[Rejected(item.key, "no singular subject noun")])
    return Outcome(list(rows.values()), rejected)

  return process


def _key_of(noun: str) -> str:
  """A noun as part of a key: other letters than a to z all count, with the marks on them."""
  return re.sub(r"[^a-z0-9\u0080-\U0010ffff]+", "-", noun).strip("-")


def _is_phrase(noun: str) -> bool:
  """Letters of any script, with marks and joiners on them, digits, hyphens, apostrophes."""
  kinds = [unicodedata.category(character)[0] for character in noun]
  allowed = all(k in "LMN" or c in "_' -’\u200c\u200d" for k, c in zip(kinds, noun, strict=True))
  return allowed and kinds[:1] == ["L"] and len(noun) <= 61


def noun_fault(noun: str) -> str | None:
  """Why a phrase is no noun to look for; captions are data, so a sentence in one is not."""
  if not _is_phrase(noun):
    return f"noun is not a phrase of letters: {noun[:60]!r}"
  if len(noun.split()) > 6:
    return f"noun too long: {noun[:60]!r}"
  return None


def make_segment(segmentor: Segmentor, settings: Mapping[str, Any], clips: str) -> Process:
  """NounRow (or TextRow) -> ObjectRows with masks on the 32-frame grid and their numbers."""

  def process(item: Item) -> Outcome:
    row, clip = item.row, clip_of(item.joined[clips], settings)
    numbers = sorted(set(grid_frames(clip.frames, settings["grid_frames"]).tolist()))
    try:
      tracks = segmentor.tracks(clip, row["noun"], numbers)
    except Ambiguous as error:
      return Outcome(rejected=[Rejected(item.key, str(error))])
    if not tracks:
      return Outcome(rejected=[Rejected(item.key, f"not found: no {row['noun']!r} in the clip")])
    frames = dict(zip(numbers, clip.open().frames(numbers), strict=True))
    return Outcome([
      _object_row(f"{item.key}/{k}", row, clip, track, frames) for k, track in enumerate(tracks)
    ])  # fmt: skip

  return process


def _object_row(
  key: str, row: Mapping[str, Any], clip: Clip, track: Track, frames: Mapping[int, np.ndarray]
) -> ObjectRow:
  for mask in track.masks.values():
    check_size(mask, clip.height, clip.width)
  numbers = quality.measure(track.masks, frames) | dict(track.scores)
  if "score" in track.prompt:
    numbers["box_score"] = track.prompt["score"]
  return ObjectRow(
    key=key,
    clip_id=row["clip_id"],
    noun_id=row["key"],
    noun=row["noun"],
    height=clip.height,
    width=clip.width,
    index_space="presented",
    masks={
      str(n): encode_mask(mask.astype(np.uint8)) if mask.any() else None
      for n, mask in sorted(track.masks.items())
    },
    prompt=dict(track.prompt),
    quality=numbers,
    text="",
  )


def make_given(settings: Mapping[str, Any]) -> Process:
  """ClipRow with annotated objects -> ObjectRows; in place of Analyzer and Segmentor."""

  def process(item: Item) -> Outcome:
    clip = clip_of(item.row, settings)
    rows, rejected = [], []
    seen_before: dict[str, str] = {}
    for number, given in enumerate(item.row["given"]):
      key = f"{item.key}/{number}"
      first = seen_before.setdefault(digest(given["masks"]), key)
      if first != key:
        rejected.append(Rejected(key, f"same masks: as {first}"))
        continue
      wrong = [n for n in given["masks"] if not 0 <= int(n) < clip.frames]
      if wrong:
        reason = f"frame not in the video: {wrong[0]} of {clip.frames}"
        rejected.append(Rejected(key, reason))
        continue
      try:
        masks = _decode(given["masks"], clip.height, clip.width)
      except InputError as error:
        rejected.append(Rejected(key, f"mask unusable: {error}"))
        continue
      seen = {n: m for n, m in masks.items() if m.any()}
      if not seen:
        rejected.append(Rejected(key, "mask empty on all frames"))
        continue
      rows.append(
        ObjectRow(key, item.key, key, given["text"] or "object", clip.height, clip.width,
                  "presented", given["masks"], {}, {"visible_frames": float(len(seen))},
                  given["text"])
      )  # fmt: skip
    return Outcome(rows, rejected)

  return process


def _decode(masks: Mapping[str, Any], height: int, width: int) -> dict[int, np.ndarray]:
  return {
    int(n): check_size(segmentation_to_mask(mask, height, width), height, width).astype(bool)
    for n, mask in masks.items()
  }


def masks_of(row: Mapping[str, Any]) -> dict[int, np.ndarray]:
  """The masks of an ObjectRow: {frame: bool [H, W]}."""
  return _decode(row["masks"], row["height"], row["width"])


def make_mask_gate(settings: Mapping[str, Any]) -> Process:
  """All ObjectRows of a clip -> a GateRow for each that meets the limits.

  Of two that cover the same pixels the first is kept: noun order is caption order.
  """
  limits = {**quality.LIMITS, **settings["masks"]}

  def process(item: Item) -> Outcome:
    rows, rejected = [], []
    kept: list[dict[int, np.ndarray]] = []
    for row in item.rows:
      masks = masks_of(row)
      overlap = max((_overlap(masks, other) for other in kept), default=0.0)
      reason = quality.fault({**row["quality"], "overlap": round(overlap, 3)}, limits)
      if reason:
        rejected.append(Rejected(row["key"], reason))
      else:
        kept.append(masks)
        rows.append(GateRow(row["key"], row["clip_id"], row["noun_id"], row["noun"]))
    return Outcome(rows, rejected)

  return process


def _overlap(a: Mapping[int, np.ndarray], b: Mapping[int, np.ndarray]) -> float:
  both: Sequence[int] = [n for n in a if n in b and (a[n].any() or b[n].any())]
  return float(np.mean([quality.iou(a[n], b[n]) for n in both])) if both else 0.0
