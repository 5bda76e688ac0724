"""Requests as read for models whose tower takes pictures of any size; without jax."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipes.batch import Clip
from data_pipes.clips import choose_mask_frames
from data_pipes.errors import InputError
from data_pipes.navit_frames import annotated_frames, scene_frames
from data_pipes.navit_rows import Crop, Sample
from data_pipes.navit_samples import NavitRules, question_sample
from data_pipes.prompts import Text
from data_pipes.tokenizer import Tokenizer
from data_pipes.video import Video, open_video
from vr_jax.inference.options import Options
from vr_jax.inference.reading import Group, Question, Reader, Refused
from vr_jax.inference.regions import objects_of
from vr_jax.inference.requests import Request


@dataclasses.dataclass(frozen=True)
class PictureQuestion(Question):
  """A request as read.

  Its `objects` are the crops, in the order of their tokens: each {frame number: mask's cells}, and
  `names` says whose they are. `sample` holds ids, pictures and crops.
  """

  sample: Sample = dataclasses.field(default_factory=lambda: Sample(np.zeros(0), np.zeros(0)))


class PictureReader(Reader):
  """Reads the requests of one call; each is a group of its own."""

  def __init__(self, tokenizer: Tokenizer, rules: NavitRules, options: Options, notice: str = ""):
    self._tokenizer, self._rules, self._options, self._notice = tokenizer, rules, options, notice

  def read(self, requests: Sequence[tuple[int, Request]]) -> list[Group | Refused]:
    """Reads requests about one video; a bad one is refused alone."""
    results: list[Group | Refused] = []
    for i, request in requests:
      try:
        results.append(self._read(i, request))
      except InputError as error:
        results.append((i, error))
    return results

  def _read(self, index: int, request: Request) -> Group:
    source = open_video(request.video, fps=request.fps, upright=True)
    if source.kind == "image" and request.seconds is not None:
      raise InputError(f"{source.name}: an image has no times; accepted: no seconds")
    marked = objects_of(request.regions, source)
    objects = [m.masks for m in marked] + list(request.annotation)
    names = [m.name for m in marked]
    names += [f"object {n}" for n in range(len(names), len(objects))]
    question = (request.preface() if request.preface else "") + request.question
    start, end = request.seconds or (None, None)
    _, sample = question_sample(source, question, self._tokenizer, self._rules, objects, start, end)
    if request.starts:
      sample = dataclasses.replace(sample, objects=started(sample.objects, request.starts))
    frames = self._frames_of_crops(source, objects)
    clip = Clip({}, self._scene(source, objects, start, end), ())
    made = picture_question(
      index,
      sample,
      [names[i] for i, _ in frames],
      [number for _, number in frames],
      (self._notice,) if self._notice else (),
    )
    # What is shared is told by its content, see `pictures.PictureVisual`.
    shared = b"" if self._options.share else None
    return Group(clip, shared, np.zeros(0, np.int32), [made])

  def _scene(
    self, source: Video, objects: Sequence[Mapping[int, Any]], start: Any, end: Any
  ) -> list[int]:
    if source.kind == "image":
      return [0]
    if self._rules.crop.lite:
      return annotated_frames(source, [list(o) for o in objects]).ids
    rules = self._rules
    return scene_frames(source, rules.fps, rules.max_frames, start, end, rules.frame_rule).ids

  def _frames_of_crops(
    self, source: Video, objects: Sequence[Mapping[int, Any]]
  ) -> list[tuple[int, int]]:
    """(object, frame) of each crop, as `question_sample` chooses them."""
    lite = self._rules.crop.lite
    if not lite:
      objects = choose_mask_frames(objects, single=True)
    several = lite and source.kind != "image"
    return [
      (i, number)
      for i, by_frame in enumerate(objects)
      for number, mask in by_frame.items()
      if not (several and len(by_frame) > 1 and _is_empty(mask))
    ]


def _is_empty(mask: Any) -> bool:
  return mask is None or (isinstance(mask, np.ndarray) and not mask.any())


def started(crops: Sequence[Crop], starts: Sequence[Sequence[int]]) -> list[Crop]:
  """The crops with the cells that k-means starts from; an empty one leaves the default."""
  if len(starts) != len(crops):
    raise InputError(f"{len(starts)} starts for {len(crops)} crops; accepted: one for each")
  for crop, start in zip(crops, starts, strict=True):
    if any(not 0 <= cell < crop.cells for cell in start):
      raise InputError(f"starts {list(start)}; accepted: cells from 0 to {crop.cells - 1}")
  return [
    dataclasses.replace(crop, start=list(start) or None)
    for crop, start in zip(crops, starts, strict=True)
  ]


def picture_question(
  index: int,
  sample: Sample,
  names: Sequence[str] = (),
  frames: Sequence[int] = (),
  warnings: tuple[str, ...] = (),
) -> PictureQuestion:
  """A sample as a question; names and frames of its crops are told in the answer."""
  names = tuple(names) or tuple(f"object {i}" for i in range(len(sample.objects)))
  frames = frames or [0] * len(sample.objects)
  objects = [{number: crop.mask} for number, crop in zip(frames, sample.objects, strict=True)]
  return PictureQuestion(
    index, Text(sample.ids, sample.labels), names, objects, warnings, sample=sample
  )
