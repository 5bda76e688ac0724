"""Training samples and questions as VideoRefer's successors read them: text, patches, crops.

media ─ navit_frames ─► frames, times ─ navit_images ─► patches ┐
masks ─ object_crops ─► crops, tokens an object ─► patches      ├─► Sample
text ── navit_prompts ─► ids with every visual token written out ┘
"""

import os
from collections.abc import Mapping, Sequence
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


class SeenScene(NamedTuple):
  """The scene of a video or an image, as all questions about it take it.

  ids: frames of the source. pictures: their patches; none for PixelRefer-Lite. texts: what each
  media tag of a question becomes.
  """

  ids: list[int]
  pictures: list[Picture]
  texts: list[str]


Frames = Mapping[int, np.ndarray]  # RGB uint8 [H, W, 3] of the source's size, by number
Objects = Sequence[Mapping[int, Any]]  # per object {frame number: mask or segmentation}


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
    seen = SeenScene([], [], [])
    crops: list[Crop] = []
    object_texts: list[str] = []
    if record.media is not None:
      video, given = _opened(record, media_root)
      objects = chosen_objects(record.objects, video, rules)
      scene = _scene(video, record.media, rules) if given is None else given
      marked = annotated_frames(video, objects).ids
      seen, frames = _read(video, record.media, rules, scene, marked, pixels)
      crops, object_texts = _see_objects(
        video, record.media, objects, rules, frames, record.size, training=True
      )
    text = dialogue_text(record.turns, tokenizer, record.media, seen.texts, object_texts)
  except (InputError, OSError) as error:
    raise InputError(f"{record.where}: {error}") from error
  text = text.cut(rules.max_ids)
  return Sample(text.ids, text.labels, seen.pictures, crops, video=record.media == "video")


def question_sample(
  source: Any,
  question: str,
  tokenizer: Tokenizer,
  rules: NavitRules,
  objects: Objects = (),
  start: float | None = None,
  end: float | None = None,
  seen: tuple[SeenScene, Frames] | None = None,
  **dialogue: Any,
) -> tuple[str, Sample]:
  """A question about a video or an image: the text after the template, and the sample.

  Args:
    source: what `open_video` takes, or None for a question about nothing. An image file is an
      image; so are tokens then merged (stride 1), whatever the caller says (published: a setting).
    question: with `<region>` once for each object.
    objects: see `clips.read_clip`. All families but Lite look at one frame of an object, the first
      where it is seen.
    start, end: seconds between which scene frames are taken.
    seen: the scene and the frames of the objects, where `see_scene` has read them.
    **dialogue: earlier, system and literal, of `question_text`.

  Raises InputError.
  """
  if source is None:
    prompt, text = question_text(question, tokenizer, None, [], [], **dialogue)
    return prompt, Sample(text.ids, text.labels)
  video = open_video(source)
  objects = chosen_objects(objects, video, rules)
  scene, frames = seen or see_scene(video, rules, annotated_frames(video, objects).ids, start, end)
  media = media_of(video)
  crops, texts = _see_objects(video, media, objects, rules, frames)
  prompt, text = question_text(question, tokenizer, media, scene.texts, texts, **dialogue)
  return prompt, Sample(text.ids, text.labels, scene.pictures, crops, video=media == "video")


def see_scene(
  video: Video,
  rules: NavitRules,
  marked: Sequence[int] = (),
  start: float | None = None,
  end: float | None = None,
) -> tuple[SeenScene, Frames]:
  """The scene between two times, and the frames `marked` as they are; each is decoded once."""
  media = media_of(video)
  return _read(video, media, rules, _scene(video, media, rules, start, end), marked)


def media_of(video: Video) -> str:
  """What a question calls it: image or video."""
  return "image" if video.kind == "image" else "video"


def chosen_objects(objects: Objects, video: Video, rules: NavitRules) -> Objects:
  """The objects with the frames that the model looks at.

  Raises InputError: a frame that the video lacks; no object for PixelRefer-Lite.
  """
  if rules.crop.lite and not objects:
    raise InputError("PixelRefer-Lite sees marked objects alone; accepted: at least one <region>")
  if not rules.crop.lite:
    objects = choose_mask_frames(objects, single=True)
  _check_numbers(objects, video)
  return objects


def _scene(
  video: Video,
  media: str,
  rules: NavitRules,
  start: float | None = None,
  end: float | None = None,
) -> Scene:
  if rules.crop.lite:
    return Scene([], [])
  if media == "image":
    return Scene([0], [0.0])
  return scene_frames(video, rules.fps, rules.max_frames, start, end, rules.frame_rule)


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


def _read(
  video: Video,
  media: str,
  rules: NavitRules,
  scene: Scene,
  marked: Sequence[int],
  pixels: bool = True,
) -> tuple[SeenScene, Frames]:
  """Patches of the scene's frames and the marked frames in one pass, which holds no others."""
  ids = [] if rules.crop.lite else scene.ids
  numbers, stride = sorted({*ids, *marked}), STRIDES[media]
  in_scene, in_full, coming = set(ids), set(marked), iter(numbers)  # frames come in this order
  pictures: dict[int, Picture] = {}
  frames: dict[int, np.ndarray] = {}

  def take(frame: np.ndarray) -> np.ndarray:
    number = next(coming)
    if number in in_scene:
      pictures[number] = to_patches(frame, rules.max_length, stride, len(ids))
    if number in in_full:
      frames[number] = frame
    return frame[:0].copy()  # of no pixels, so that the decoded frame goes

  if pixels:
    video.frames(numbers, take)
  else:
    for _ in numbers:
      take(blank(*video.size, 3))
  patches = [pictures[number] for number in ids]
  counts = [picture.tokens for picture in patches]
  texts = [image_text(n) for n in counts] if media == "image" else []
  if media == "video" and patches:
    texts = [video_text(counts, scene.times)]
  return SeenScene(ids, patches, texts), frames


def _see_objects(
  video: Video,
  media: str,
  objects: Objects,
  rules: NavitRules,
  frames: Frames,
  size: tuple[int, int] | None = None,
  training: bool = False,
) -> tuple[list[Crop], list[str]]:
  """The crops of all objects, and what stands for each object in the text.

  Args:
    frames: those of the objects.
    size: (height, width) that polygons refer to; by default the frame's.
  """
  lite = rules.crop.lite
  marked = annotated_frames(video, objects)
  places = {number: i for i, number in enumerate(marked.ids)}
  masked = [frames[number] for number in marked.ids]
  masks: list[np.ndarray] = []
  at_frames: list[int] = []
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
      at_frames.append(at)
    if by_frame and first == len(masks):
      raise InputError(f"object {i}: found no mask in {len(by_frame)} frames; accepted: one")
    each.append((first, len(masks)))
  crops = crop_objects(
    masked, masks, at_frames, rules.crop, rules.tokens, rules.published, rules.true_local
  )
  for first, last in each:
    tokens = [crop.tokens for crop in crops[first:last]]
    if lite and media == "video":
      texts.append(timed_object_text(tokens, [marked.times[at] for at in at_frames[first:last]]))
    else:
      texts.append(object_text(sum(tokens)))
  # In training each crop may fill the whole budget, but for Lite, where the frames share it.
  share = (len(masked) if lite else 1) if training else None
  return crop_patches(crops, rules.crop, rules.max_length, share), texts


def _check_numbers(objects: Objects, video: Video) -> None:
  for i, by_frame in enumerate(objects):
    for number in by_frame:
      if not 0 <= number < len(video):
        raise InputError(
          f"object {i}: found frame {number}; accepted: 0 to {len(video) - 1}, the frames of "
          f"{video.name}"
        )
