"""Training samples and questions as VideoRefer's successors read them: text, patches, crops.

media ─ navit_frames ─► frames, times ─ navit_images ─► patches ┐
masks ─ object_crops ─► crops, tokens an object ─► patches      ├─► Sample
text ── navit_prompts ─► ids with every visual token written out ┘
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from data_pipes.clips import choose_mask_frames, media_path, whole_mask
from data_pipes.errors import InputError
from data_pipes.navit_frames import TRAINING_FRAMES, Scene, annotated_frames, scene_frames
from data_pipes.navit_images import STRIDES, blank, to_patches
from data_pipes.navit_prompts import (
  dialogue_text,
  image_text,
  object_text,
  question_text,
  timed_object_text,
  video_text,
)
from data_pipes.navit_rows import Crop, Picture, Sample
from data_pipes.object_crops import CropRule, crop_objects, crop_patches
from data_pipes.prompts import Text
from data_pipes.records import Record
from data_pipes.shards import StoredClip
from data_pipes.tokenizer import Tokenizer
from data_pipes.video import Video, open_video


@dataclass(frozen=True)
class NavitRules:
  """How a model's samples are read.

  Attributes:
    crop: its generation's way to cut objects out.
    tokens: K, most tokens an object (`mask_num`).
    max_length: `mm_max_length`, tokens of the scene.
    fps, max_frames, frame_rule: of the scene, see `navit_frames.scene_frames`.
    max_ids: ids kept of a training dialogue, visual ones included; None keeps all.
    published: empty and vanishing masks as in `object_crops.crop_objects`.
    true_local: of Lite, a local picture for each object, see there.
  """

  crop: CropRule
  tokens: int
  max_length: int
  fps: float | None = 1.0
  max_frames: int = TRAINING_FRAMES
  frame_rule: str = "ids"
  max_ids: int | None = 16384
  published: bool = False
  true_local: bool = False


class _Seen(NamedTuple):
  """What the media gives: parts of a Sample, and what stands for them in the text."""

  scene: list[Picture]
  scene_text: list[str]
  objects: list[Crop]
  object_text: list[str]


def training_sample(
  record: Record,
  tokenizer: Tokenizer,
  rules: NavitRules,
  media_root: str | os.PathLike = "",
  pixels: bool = True,
) -> Sample:
  """A record as training reads it.

  Without `pixels` its pictures are blank: their sizes, the ids and the masks are right, and no
  frame is decoded (all of a folder must have the size of its first).

  Raises InputError, which names the record.
  """
  try:
    seen = _Seen([], [], [], [])
    if record.media is not None:
      video, given = _opened(record, media_root)
      frames = video.frames if pixels else lambda ids: [blank(*video.size, 3) for _ in ids]
      seen = _see(video, record.media, record.objects, rules, given, record.size, frames)
    text = dialogue_text(
      record.turns, tokenizer, record.media, seen.scene_text, seen.object_text
    ).cut(rules.max_ids)
  except (InputError, OSError) as error:
    raise InputError(f"{record.where}: {error}") from error
  return _sample(text, seen, record.media)


def question_sample(
  source: Any,
  question: str,
  tokenizer: Tokenizer,
  rules: NavitRules,
  objects: Sequence[Mapping[int, Any]] = (),
  start: float | None = None,
  end: float | None = None,
) -> tuple[str, Sample]:
  """A question about a video or an image: the text after the template, and the sample.

  Args:
    source: what `open_video` takes, or None for a question about nothing. An image file is an
      image; so are tokens then merged (stride 1), whatever the caller says (published: a setting).
    question: with `<region>` once for each object.
    objects: per object {frame number: mask or segmentation}, see `clips.read_clip`. All families
      but Lite look at one frame of an object, the first where it is seen.
    start, end: seconds between which scene frames are taken.

  Raises InputError.
  """
  if source is None:
    prompt, text = question_text(question, tokenizer, None, [], [])
    return prompt, Sample(text.ids, text.labels)
  video = open_video(source)
  media = "image" if video.kind == "image" else "video"
  scene = None
  if media == "video" and not rules.crop.lite:
    scene = scene_frames(video, rules.fps, rules.max_frames, start, end, rules.frame_rule)
  seen = _see(video, media, objects, rules, scene)
  prompt, text = question_text(question, tokenizer, media, seen.scene_text, seen.object_text)
  return prompt, _sample(text, seen, media)


def _sample(text: Text, seen: _Seen, media: str | None) -> Sample:
  return Sample(text.ids, text.labels, seen.scene, seen.objects, video=media == "video")


def _opened(record: Record, root: str | os.PathLike) -> tuple[Video, Scene | None]:
  """The media of a record, and its scene where the record itself names the frames."""
  if isinstance(record.stored, StoredClip) and record.stored.rule["size"]:
    raise InputError(
      f"found stored squares of {record.stored.rule['size']} pixels; accepted: shards prepared "
      "with --size 0 --scene-fps FPS"
    )
  if record.frames is None:
    return open_video(record.stored or media_path(root, record.path)), None
  files = [media_path(root, file) for file in (*record.frames.files, *record.frames.masked)]
  return open_video(files), Scene(list(range(len(record.frames.files))), record.frames.times)


def _see(
  video: Video,
  media: str,
  objects: Sequence[Mapping[int, Any]],
  rules: NavitRules,
  scene: Scene | None,
  size: tuple[int, int] | None = None,
  training_frames: Callable[[list[int]], list[np.ndarray]] | None = None,
) -> _Seen:
  """What a sample takes of its media; `training_frames` reads the frames in training."""
  lite = rules.crop.lite
  if lite and not objects:
    raise InputError("PixelRefer-Lite sees marked objects alone; accepted: at least one <region>")
  if not lite:
    objects = choose_mask_frames(objects, single=True)
  _check_numbers(objects, video)
  if scene is None:
    if media == "image" or lite:
      scene = Scene([0] if media == "image" else [], [])
    else:
      scene = scene_frames(video, rules.fps, rules.max_frames, rule=rules.frame_rule)
  marked = annotated_frames(video, objects)
  pictures = (training_frames or video.frames)([*scene.ids, *marked.ids])
  masked = pictures[len(scene.ids) :]

  stride = STRIDES[media]
  patches = [] if lite else [
    to_patches(picture, rules.max_length, stride, len(scene.ids))
    for picture in pictures[: len(scene.ids)]
  ]  # fmt: skip
  counts = [picture.tokens for picture in patches]
  scene_text = [image_text(n) for n in counts] if media == "image" else []
  if media == "video" and patches:
    scene_text = [video_text(counts, scene.times)]

  places = {number: i for i, number in enumerate(marked.ids)}
  masks: list[np.ndarray] = []
  frames: list[int] = []
  texts: list[str] = []
  each: list[tuple[int, int]] = []  # the slice of crops of each object
  for i, by_frame in enumerate(objects):
    first = len(masks)
    for number, segmentation in by_frame.items():
      at = places[number]
      name = f"object {i}, frame {number}"
      mask = whole_mask(segmentation, masked[at].shape[:2], size, name)
      if lite and media == "video" and len(by_frame) > 1 and not mask.any():
        continue  # as published; an object that is seen nowhere is refused below
      masks.append(mask)
      frames.append(at)
    if by_frame and first == len(masks):
      raise InputError(f"object {i}: found no mask in {len(by_frame)} frames; accepted: one")
    each.append((first, len(masks)))
  crops = crop_objects(
    masked, masks, frames, rules.crop, rules.tokens, rules.published, rules.true_local
  )
  for first, last in each:
    tokens = [crop.tokens for crop in crops[first:last]]
    if lite and media == "video":
      texts.append(timed_object_text(tokens, [marked.times[at] for at in frames[first:last]]))
    else:
      texts.append(object_text(sum(tokens)))
  # In training each crop may fill the whole budget, but for Lite, where the frames share it.
  share = (len(masked) if lite else 1) if training_frames else None
  made = crop_patches(crops, rules.crop, rules.max_length, share)
  return _Seen(patches, scene_text, made, texts)


def _check_numbers(objects: Sequence[Mapping[int, Any]], video: Video) -> None:
  for i, by_frame in enumerate(objects):
    for number in by_frame:
      if not 0 <= number < len(video):
        raise InputError(
          f"object {i}: found frame {number}; accepted: 0 to {len(video) - 1}, the frames of "
          f"{video.name}"
        )
