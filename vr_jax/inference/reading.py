"""Requests as read on the host: frames, masks on the tower's grid and text ids; without jax.

Threads read ahead of the device, video by video. The questions about one video at one time span are
a group: each of its frames is decoded once, and none whose tokens are known of an earlier question.
"""

import collections
import dataclasses
import functools
import hashlib
import itertools
import os
import stat
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipes import isolation
from data_pipes.batch import Clip, RowShape
from data_pipes.clips import read_clip
from data_pipes.errors import InputError
from data_pipes.masks import GridMask, grid_mask
from data_pipes.prompts import MEDIA_IDS, Text, dialogue, question_prompt
from data_pipes.tokenizer import Tokenizer
from data_pipes.video import Video, open_video
from vr_jax.inference.options import Options
from vr_jax.inference.regions import warnings_of
from vr_jax.inference.requests import Request
from vr_jax.inference.turns import questions_of

if TYPE_CHECKING:  # what is known is handed on, not looked into: this file needs no jax
  from vr_jax.inference.prefix import KnownScene, ObjectTokens, Prefix, Visual

TOGETHER = 32  # the most questions of a group: the frames of all their masks are held at once
READERS = min(8, os.cpu_count() or 1)  # threads


@dataclasses.dataclass(frozen=True)
class Question:
  """A request as read; its frames are in the Clip that its group shares.

  Attributes:
    index: the request's place in the list.
    names: of the objects; `objects` are their masks uint8 [N] by frame number, in merge order.
    known: the tokens of each object where they are known.
  """

  index: int
  text: Text
  names: tuple[str, ...]
  objects: Sequence[Mapping[int, np.ndarray]]
  warnings: tuple[str, ...]
  known: Sequence["ObjectTokens | None"] = ()


@dataclasses.dataclass(frozen=True)
class Group:
  """Questions about one video at one time span.

  Attributes:
    clip: its frames are those that are not known.
    video: hash of the scene frames; None where nothing is shared.
    head: ids of the text before the media.
    file: what tells the file and its scene from others; None for frames in memory and folders.
    prefix: of the video, where it is known.
    empty: of questions about no video, the scene frames that their rows have room for; else 0.
  """

  clip: Clip
  video: bytes | None
  head: np.ndarray
  questions: Sequence[Question]
  file: Hashable = None
  prefix: "Prefix | None" = None
  empty: int = 0


Refused = tuple[int, InputError]  # a request's place in the list, and why it cannot be asked


class Reader:
  """Reads the requests of one call.

  `decode_seconds`: files are decoded in worker processes, each within so long, so that what a
  decoder does with a broken file costs its request alone; None (default): in this process.
  """

  decode_seconds: float | None = None

  def __init__(
    self,
    tokenizer: Tokenizer,
    shape: RowShape,
    options: Options,
    *,
    aspect_ratio: str = "square",
    notice: str = "",
    visual: "Visual | None" = None,
    prefix_head: Callable[[int], int] = lambda count: count,
  ):
    """`shape` gives the sizes of scene, image and grid; `notice` goes with every answer.

    `visual` knows what was seen of files before, by the slots that `prefix_head` gives the text
    before the media.
    """
    self._tokenizer, self._shape, self._options = tokenizer, shape, options
    self._visual, self._prefix_head = visual, prefix_head
    self._aspect_ratio, self._notice = aspect_ratio, notice

  def ahead(self, requests: Iterable[tuple[int, Request]]) -> Iterator[Group | Refused]:
    """Groups, read by threads, in the order of their first requests; refusals among them."""
    groups: dict[Hashable, list[tuple[int, Request]]] = collections.defaultdict(list)
    for i, request in requests:
      video = subject(request)
      groups[video if self._options.share else (video, i)].append((i, request))
    parts = (
      members[at : at + TOGETHER]
      for members in groups.values()
      for at in range(0, len(members), TOGETHER)
    )
    with ThreadPoolExecutor(READERS) as threads:
      reading = collections.deque(
        threads.submit(self.read, part) for part in itertools.islice(parts, READERS + 1)
      )
      while reading:
        results = reading.popleft().result()
        for part in itertools.islice(parts, 1):
          reading.append(threads.submit(self.read, part))
        yield from results

  def read(self, requests: Sequence[tuple[int, Request]]) -> list[Group | Refused]:
    """Reads requests about one video at one time span; a bad one is refused alone.

    Each frame is decoded once, for all of them. If that fails, as on a mask of another size, each
    is read by itself to learn which one it is.
    """
    first = requests[0][1]
    if first.video is None:
      return self._read_text(requests)
    try:
      opened = functools.partial(open_video, first.video, fps=first.fps, upright=True)
      source = self._decoded(first, opened)
      if source.kind == "image" and first.seconds is not None:
        raise InputError(f"{source.name}: an image has no times; accepted: no seconds")
    except InputError as error:
      return [(i, error) for i, _ in requests]
    prepared: list[tuple[Question, Sequence[Mapping[int, Any]]]] = []
    results: list[Group | Refused] = []
    for i, request in requests:
      try:
        prepared.append(self._prepare(i, request, source))
      except InputError as error:
        results.append((i, error))
    if not prepared:
      return results
    head, _ = around_media(prepared[0][0].text)
    file = self._file(first)
    known = (
      None if file is None else self._visual.known_scene(file, head, self._prefix_head(len(head)))
    )
    tokens = [[self._known_object(file, masks) for masks in marked] for _, marked in prepared]
    unknown = [
      masks
      for (_, marked), kept in zip(prepared, tokens, strict=True)
      for masks, seen in zip(marked, kept, strict=True)
      if seen is None
    ]
    try:
      clip = self._read_clip(first, source, unknown, known)
    except InputError as error:
      if len(requests) == 1:
        return [(requests[0][0], error)]
      return [result for one in requests for result in self.read([one])]
    cells = iter(clip.objects)
    questions = []
    for (question, marked), kept in zip(prepared, tokens, strict=True):
      objects = [
        next(cells) if seen is None else _cells(masks)
        for masks, seen in zip(marked, kept, strict=True)
      ]
      questions.append(dataclasses.replace(question, objects=objects, known=kept))
    if known is not None:
      group = Group(clip, known.video, head, questions, file, known.prefix)
    else:
      group = Group(clip, _content(clip) if self._options.share else None, head, questions, file)
    return [*results, group]

  def _read_text(self, requests: Sequence[tuple[int, Request]]) -> list[Group | Refused]:
    """Reads questions about no video."""
    results: list[Group | Refused] = []
    questions = []
    for i, request in requests:
      try:
        questions.append(self._prepare(i, request, None)[0])
      except InputError as error:
        results.append((i, error))
    group = Group(Clip({}, (), ()), None, np.zeros(0, np.int32), questions, empty=self._shape.scene)
    return [*results, group] if questions else results

  def _decoded(self, request: Request, function: Callable[[], Any]) -> Any:
    """What the function gives, called where a file may be decoded."""
    if self.decode_seconds is None or not isinstance(request.video, str | os.PathLike):
      return function()
    try:
      return isolation.call(function, seconds=self.decode_seconds)
    except isolation.Ended as error:
      raise InputError(f"{os.path.basename(request.video)}: the decoder {error}") from None

  def _file(self, request: Request) -> Hashable:
    """What tells a file and the scene taken from it; None where nothing may be known of it."""
    if self._visual is None or not self._options.share:
      return None
    file = file_identity(request.video)
    return None if file is None else (file, request.seconds, request.fps, self._shape.scene)

  def _known_object(self, file: Hashable, masks: Mapping[int, Any]) -> "ObjectTokens | None":
    if file is None or not all(isinstance(mask, GridMask) for mask in masks.values()):
      return None
    return self._visual.known_object(file, _cells(masks))

  def _prepare(
    self, index: int, request: Request, source: Video | None
  ) -> tuple[Question, list[Mapping[int, Any]]]:
    """The question without its cells, and the masks of its objects."""
    if request.starts:
      raise InputError("starts: this model joins no cells of objects; accepted: none")
    rules = self._shape.grid, self._aspect_ratio, self._options.mask_rule
    texts, marked = questions_of(request, source, lambda mask: grid_mask(mask, *rules))
    objects = [m.masks for m in marked] + list(request.annotation)
    media = None if source is None else "image" if source.kind == "image" else "video"
    messages = dialogue(texts, [turn.answer for turn in request.turns], request.system)
    text = question_prompt(messages, self._tokenizer, media, self._options.literal)[1]
    around_media(text)
    names = [m.name for m in marked]
    names += [f"object {n}" for n in range(len(names), len(objects))]
    warnings = warnings_of(marked, *rules)
    warnings = [line for line in (self._notice, *warnings) if line]
    return Question(index, text, tuple(names), (), tuple(warnings)), objects

  def _read_clip(
    self,
    request: Request,
    source: Video,
    objects: Sequence[Mapping[int, Any]],
    known: "KnownScene | None",
  ) -> Clip:
    """The frames of the objects, and those of the scene if it is not known."""
    if known is not None and not objects:
      return Clip({}, known.scene, ())
    image = source.kind == "image"
    start, end = request.seconds or (None, None)
    read = functools.partial(
      read_clip,
      source,
      self._shape if known is None else dataclasses.replace(self._shape, scene=0),
      objects,
      image=image,
      aspect_ratio=self._aspect_ratio,
      mask_rule=self._options.mask_rule,
      start=start,
      end=end,
    )
    clip = self._decoded(request, read)
    if known is not None:
      return dataclasses.replace(clip, scene=known.scene)
    scene = self._shape.scene
    if len(clip.scene) != scene:
      raise InputError(f"{source.name}: {len(clip.scene)} frames of the scene; accepted: {scene}")
    return clip


def around_media(text: Text) -> tuple[np.ndarray, np.ndarray]:
  """Ids before and after the one media tag; of a question about no video, none before."""
  tags = np.flatnonzero(np.isin(text.ids, list(MEDIA_IDS.values())))
  if not len(tags):
    return text.ids[:0], text.ids
  if len(tags) != 1:
    raise InputError(
      f"found {len(tags)} media tags in the text; accepted: exactly one, which is put before the "
      "question"
    )
  return text.ids[: tags[0]], text.ids[tags[0] + 1 :]


def _cells(masks: Mapping[int, GridMask]) -> dict[int, np.ndarray]:
  return {number: mask.cells for number, mask in masks.items()}


def file_identity(video: Any) -> Hashable:
  """What tells a file from all others and from what it was before; None of anything else."""
  if not isinstance(video, str | os.PathLike):
    return None
  try:
    status = os.stat(video)
  except OSError:
    return None
  if not stat.S_ISREG(status.st_mode):
    return None  # of a folder, each file may change
  identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
  return (os.path.realpath(video), *identity)


def subject(request: Request) -> Hashable:
  """What requests have in common that are read together: the video, and what stands before it."""
  return identity(request.video), request.seconds, request.fps, request.system


def identity(video: Any) -> Hashable:
  """What tells a video from the others of one call."""
  if isinstance(video, np.ndarray):  # views of the same memory are the same video
    memory = video.__array_interface__
    return memory["data"][0], video.shape, video.strides, video.dtype.str
  return str(video) if isinstance(video, str | os.PathLike) else id(video)


def _content(clip: Clip) -> bytes:
  """A hash of the scene frames: what tells a video from all others, whatever held it."""
  content = hashlib.blake2b(digest_size=16)
  for number in dict.fromkeys(clip.scene):
    content.update(np.ascontiguousarray(clip.frames[number]))
  return content.digest()
