"""Requests as read for models whose tower takes pictures of any size; without jax."""

import collections
import dataclasses
import functools
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np

from data_pipes.batch import Clip
from data_pipes.clips import whole_mask
from data_pipes.errors import InputError, shown
from data_pipes.navit_frames import annotated_frames
from data_pipes.navit_rows import Crop, Sample
from data_pipes.navit_samples import (
  Frames,
  NavitRules,
  Objects,
  SeenScene,
  chosen_objects,
  question_sample,
  see_scene,
)
from data_pipes.prompts import Text, Turn
from data_pipes.tokenizer import Tokenizer
from data_pipes.video import Video, open_video
from vr_jax.inference.options import Options
from vr_jax.inference.reading import Group, Question, Reader, Refused, file_identity
from vr_jax.inference.requests import Request
from vr_jax.inference.turns import questions_of


@dataclasses.dataclass(frozen=True)
class PictureQuestion(Question):
  """A request as read.

  Its `objects` are the crops, in the order of their tokens: each {frame number: mask's cells}, and
  `names` says whose they are. `sample` holds ids, pictures and crops.
  """

  sample: Sample = dataclasses.field(default_factory=lambda: Sample(np.zeros(0), np.zeros(0)))


class _Marked(NamedTuple):
  """The questions of a request, the objects of all of them with their names, and notes on these."""

  texts: list[str]
  names: list[str]
  objects: Objects
  notes: list[str]


class KnownScenes:
  """Scenes of files that were read before, by the file and what decides its frames."""

  def __init__(self, most: int):
    self._most = most
    self._kept: collections.OrderedDict[Hashable, SeenScene] = collections.OrderedDict()
    self._locks: dict[Hashable, threading.Lock] = {}

  def get(
    self, key: Hashable, read: Callable[[], tuple[SeenScene, Frames]]
  ) -> tuple[SeenScene, Frames | None]:
    """What `read` gives, or without frames the scene that is known.

    Threads may ask at once: the first reads, the others wait for it.
    """
    frames = None
    with self._locks.setdefault(key, threading.Lock()):
      scene = self._kept.get(key)
      if scene is None:
        scene, frames = read()
      self._kept[key] = scene
      self._kept.move_to_end(key)
    while len(self._kept) > self._most:
      oldest, _ = self._kept.popitem(last=False)
      self._locks.pop(oldest, None)
    return scene, frames

  def forget(self) -> None:
    self._kept.clear()


class PictureReader(Reader):
  """Reads the requests of one call; each is a group of its own."""

  def __init__(
    self,
    tokenizer: Tokenizer,
    rules: NavitRules,
    options: Options,
    notice: str = "",
    scenes: KnownScenes | None = None,
  ):
    """`scenes` knows what was seen of files before."""
    self._tokenizer, self._rules, self._options, self._notice = tokenizer, rules, options, notice
    self._scenes = scenes

  def read(self, requests: Sequence[tuple[int, Request]]) -> list[Group | Refused]:
    """Reads requests about one video at one time span; a bad one is refused alone.

    Each frame is decoded once, for all of them. If that fails, as on a damaged frame of one object,
    each is read by itself to learn which one it is.
    """
    first = requests[0][1]
    try:
      source = None
      if first.video is not None:
        source = open_video(first.video, fps=first.fps, upright=True)
      if source is not None and source.kind == "image" and first.seconds is not None:
        raise InputError(f"{source.name}: an image has no times; accepted: no seconds")
    except InputError as error:
      return [(i, error) for i, _ in requests]
    results: list[Group | Refused] = []
    marked: list[tuple[int, Request, _Marked]] = []
    for i, request in requests:
      try:
        marked.append((i, request, self._marked(request, source)))
      except InputError as error:
        results.append((i, error))
    if not marked:
      return results
    try:
      seen = self._see(first, source, {n for *_, m in marked for o in m.objects for n in o})
    except InputError as error:
      if len(requests) == 1:
        return [(requests[0][0], error)]
      return [result for one in requests for result in self.read([one])]
    for i, request, objects in marked:
      try:
        results.append(self._group(i, request, source, objects, seen))
      except InputError as error:
        results.append((i, error))
    return results

  def _marked(self, request: Request, source: Video | None) -> _Marked:
    """The objects of a request on the frames that the model looks at, and their names."""
    texts, marked = questions_of(request, source, None)
    names = [m.name for m in marked]
    objects: Objects = [m.masks for m in marked] + list(request.annotation)
    names += [f"object {n}" for n in range(len(names), len(objects))]
    if source is not None:
      objects = chosen_objects(objects, source, self._rules)
    return _Marked(texts, names, objects, [note for m in marked for note in m.notes])

  def _see(
    self, first: Request, source: Video | None, marked: set[int]
  ) -> tuple[SeenScene, Frames]:
    """The scene and the marked frames; of a known scene nothing is decoded."""
    if source is None:
      return SeenScene([], [], []), {}
    rules, numbers = self._rules, sorted(marked)
    start, end = first.seconds or (None, None)

    def read() -> tuple[SeenScene, Frames]:
      see = functools.partial(see_scene, source, rules, numbers, start, end)
      return self._decoded(first, see)

    file = file_identity(first.video) if self._options.share else None
    if file is None or self._scenes is None or rules.crop.lite:
      return read()
    key = (file, first.seconds, first.fps, rules.fps, rules.max_frames, rules.frame_rule)
    scene, frames = self._scenes.get(key, read)
    if frames is None:
      decoded = self._decoded(first, functools.partial(source.frames, numbers)) if numbers else []
      frames = dict(zip(numbers, decoded, strict=True))
    return scene, frames

  def _group(
    self,
    index: int,
    request: Request,
    source: Video | None,
    marked: _Marked,
    seen: tuple[SeenScene, Frames],
  ) -> Group:
    names, objects = marked.names, marked.objects
    *before, question = marked.texts
    answers = [turn.answer for turn in request.turns]
    earlier = [
      turn
      for text, answer in zip(before, answers, strict=True)
      for turn in (Turn("human", text), Turn("gpt", answer))
    ]
    _, sample = question_sample(
      source,
      question,
      self._tokenizer,
      self._rules,
      objects,
      seen=seen,
      earlier=earlier,
      system=request.system,
      literal=self._options.literal,
    )
    if request.starts:
      sample = dataclasses.replace(
        sample, objects=started(sample.objects, request.starts, self._rules.tokens)
      )
    frames = [] if source is None else self._frames_of_crops(source, objects)
    scene = seen[0].ids
    if source is not None and self._rules.crop.lite:
      scene = [0] if source.kind == "image" else annotated_frames(source, objects).ids
    lost = [
      f"{names[i]}: its mask on frame {number} leaves no cell of the crop, so that the model is "
      "told of no object; accepted: mask_rule keep, or a larger mask"
      for (i, number), crop in zip(frames, sample.objects, strict=True)
      if not crop.cells and crop.whole is None
    ]
    made = picture_question(
      index,
      sample,
      [names[i] for i, _ in frames],
      [number for _, number in frames],
      [line for line in (self._notice, *marked.notes, *lost) if line],
    )
    # What is shared is told by its content, see `pictures.PictureVisual`.
    shared = b"" if self._options.share else None
    return Group(Clip({}, scene, ()), shared, np.zeros(0, np.int32), [made])

  def _frames_of_crops(self, source: Video, objects: Objects) -> list[tuple[int, int]]:
    """(object, frame) of each crop, as `question_sample` cuts them."""
    several = self._rules.crop.lite and source.kind != "image"
    return [
      (i, number)
      for i, by_frame in enumerate(objects)
      for number, mask in by_frame.items()
      if not (several and len(by_frame) > 1 and not whole_mask(mask, source.size, None, "").any())
    ]


def started(crops: Sequence[Crop], starts: Sequence[Sequence[int]], tokens: int) -> list[Crop]:
  """The crops with the cells that k-means starts from, `tokens` of each; [] leaves the default.

  Raises InputError: not as many as crops or tokens, a cell that a crop lacks, one twice, cells for
  a crop whose cells are not joined.
  """
  if len(starts) != len(crops):
    raise InputError(f"{len(starts)} starts for {len(crops)} crops; accepted: one for each")
  for i, (crop, start) in enumerate(zip(crops, starts, strict=True)):
    if not len(start):
      continue
    if crop.cells <= tokens:
      raise InputError(f"starts of crop {i}: its {crop.cells} cells are not joined; accepted: []")
    inside = [cell for cell in set(start) if 0 <= cell < crop.cells]
    if len(start) != tokens or len(inside) < tokens:
      raise InputError(
        f"starts of crop {i}: {shown(list(start))}; accepted: {tokens} different cells from 0 to "
        f"{crop.cells - 1}"
      )
  return [
    dataclasses.replace(crop, start=[int(cell) for cell in start] or None)
    for crop, start in zip(crops, starts, strict=True)
  ]


def picture_question(
  index: int,
  sample: Sample,
  names: Sequence[str] = (),
  frames: Sequence[int] = (),
  warnings: Sequence[str] = (),
) -> PictureQuestion:
  """A sample as a question; names and frames of its crops are told in the answer."""
  names = tuple(names) or tuple(f"object {i}" for i in range(len(sample.objects)))
  frames = frames or [0] * len(sample.objects)
  objects = [{number: crop.mask} for number, crop in zip(frames, sample.objects, strict=True)]
  return PictureQuestion(
    index, Text(sample.ids, sample.labels), names, objects, tuple(warnings), sample=sample
  )
