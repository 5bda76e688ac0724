"""Asking a model about objects in a video: `load`, then `ask`, `ask_many`, `describe`, `stream`."""

import collections
import dataclasses
import functools
import hashlib
import itertools
import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from data_pipes import batch as batches
from data_pipes.batch import Clip, RowShape
from data_pipes.bench_prompts import DESCRIBE
from data_pipes.clips import read_clip
from data_pipes.errors import InputError
from data_pipes.masks import GRID_RULES
from data_pipes.prompts import MEDIA_IDS, Text, question_prompt
from data_pipes.tokenizer import REGION, Tokenizer
from data_pipes.video import open_video
from vr_jax.inference.batching import CHUNK, Engine, Prompt, Sizes
from vr_jax.inference.placement import Placement
from vr_jax.inference.prefix import ObjectTokens, Prefix, Visual, head_slots
from vr_jax.inference.programs import Programs
from vr_jax.inference.regions import Region, objects_of, warnings_of
from vr_jax.inference.sampling import Sampling
from vr_jax.models.connector import scene_token_count
from vr_jax.models.fused import fuse
from vr_jax.models.quantize import quantize
from vr_jax.models.videorefer import VideoRefer, VideoReferConfig
from vr_jax.params import path_names

WEIGHTS = ("float32", "bfloat16", "int8")
TOGETHER = 32  # questions about one video that are read and encoded together
READERS = min(8, os.cpu_count() or 1)  # threads that decode videos ahead


@dataclasses.dataclass(frozen=True)
class Request:
  """One question about one video; the first three fields are those of `Model.ask`.

  `annotation` takes the place of `regions` where the objects are annotated as in the published
  files: {frame number: COCO segmentation or None} of each object, in merge order. There an object
  may be empty.
  """

  video: Any
  question: str
  regions: Sequence[Region] = ()
  annotation: Sequence[Mapping[int, Any]] = ()


@dataclasses.dataclass(frozen=True)
class Answer:
  """What the model said, and what it rests on.

  Attributes:
    text: the answer, which `str(answer)` gives too.
    token_ids: what was generated, the end token included.
    scene_frames: frame numbers of the scene in the source video (negative: black filling).
    objects: per object its name and, for each of its tokens, the frames that the token stands for.
    warnings: one line each, such as an object too small for the model's grid.
  """

  text: str
  token_ids: tuple[int, ...]
  scene_frames: tuple[int, ...]
  objects: tuple[Mapping[str, Any], ...]
  warnings: tuple[str, ...]

  def __str__(self) -> str:
    return self.text

  def to_dict(self) -> dict[str, Any]:
    """The answer as JSON-ready values."""
    return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Options:
  """How to answer; the keywords of `ask`, `ask_many`, `answer_each`, `stream` and `warm_up`.

  Attributes:
    max_new_tokens: the most tokens of an answer.
    temperature, top_k, top_p: of `Sampling`; temperature 0 is greedy.
    seed: sampled answers are a function of it and of the request's place in the list.
    scene_frames: frames of the scene; None is as many as in training.
    batch_size: answers under way at once. Greedy answers do not depend on what else is asked, nor
      on how many requests there are; with 1 a single answer comes soonest.
    share: questions about one video share what is computed of it. Off, each is computed by itself;
      the answers are the same.
    mask_rule: how masks come onto the tower's grid, as `input.mask_rule` in training: "keep"
      (default) leaves every object at least one cell, "published" may lose small ones, "area".
  """

  max_new_tokens: int = 256
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  seed: int = 0
  scene_frames: int | None = None
  batch_size: int = 8
  share: bool = True
  mask_rule: str = "keep"

  def __post_init__(self):
    if self.mask_rule not in GRID_RULES:
      raise InputError(f"mask_rule={self.mask_rule!r}; accepted: {', '.join(GRID_RULES)}")
    for name in ("max_new_tokens", "batch_size"):
      if getattr(self, name) < 1:
        raise InputError(f"{name}={getattr(self, name)}; accepted: 1 or more")

  def sampling(self, default: Sampling) -> Sampling:
    try:
      return dataclasses.replace(
        default, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p
      )
    except ValueError as error:
      raise InputError(str(error)) from None


@dataclasses.dataclass(frozen=True)
class _Read:
  """A request as read on the host; the frames are in the Clip that its group shares."""

  index: int
  text: Text
  names: tuple[str, ...]
  objects: Sequence[Mapping[int, np.ndarray]]
  warnings: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Group:
  """Requests about one video, read; and those that could not be."""

  video: bytes | None  # the hash of its content, where it may be shared
  clip: Clip | None
  read: Sequence[_Read]
  refused: Sequence[tuple[int, InputError]]


class Model:
  """A model that is ready to answer.

  Attributes:
    cfg, params, tokenizer: the model; its decoder is in the fused layout.
    weights: "float32", "bfloat16" or "int8", of the decoder.
    eos_ids, pad_id, sampling: how it decodes unless asked otherwise.
    notice: a warning that goes with every answer ("" for none).
    visual: what is computed of videos; `visual.counts` says how much of it.
  """

  def __init__(
    self,
    cfg: VideoReferConfig,
    params: Mapping[str, Any],
    tokenizer: Tokenizer,
    generation: Mapping[str, Any] | None = None,
    notice: str = "",
    *,
    weights: str | None = None,
    mesh: Mesh | None = None,
    memory_limit: int | None = None,
  ):
    """`generation` may hold eos_ids, pad_id and repetition_penalty, as checkpoints do.

    Args:
      weights: "float32" or "bfloat16" compute in that dtype; "int8" keeps the dtype and holds the
        decoder's matmul weights in 8 bits. None: as `cfg` says.
      mesh: with the axes `data` and `tensor`, either or both; see placement.py.
      memory_limit: bytes a device may be asked for, by default what it has.
    """
    settings = dict(generation or {})
    self.tokenizer, self.notice, self._memory_limit = tokenizer, notice, memory_limit
    self._placement = Placement(mesh)
    self._placement.check(cfg.llm)
    self.cfg, self.params = _for_inference(cfg, params, weights, self._placement)
    self.weights = weights or self.cfg.llm.dtype
    self.eos_ids = tuple(settings.get("eos_ids") or ())
    if not self.eos_ids and tokenizer.eos_id is not None:
      self.eos_ids = (tokenizer.eos_id,)
    pad = settings.get("pad_id")
    self.pad_id = int(tokenizer.pad_id or 0) if pad is None else int(pad)
    self.sampling = Sampling(repetition_penalty=settings.get("repetition_penalty") or 1.0)
    self._module = VideoRefer(self.cfg)
    self._programs = Programs()
    self._engines: dict[tuple[Sizes, Sampling], Engine] = {}
    self.visual = Visual(self._module, self.params, self._programs, self._placement)

  def ask(
    self,
    video: Any,
    question: str,
    regions: Sequence[Region] = (),
    *,
    on_text: Callable[[str], Any] | None = None,
    **options: Any,
  ) -> Answer:
    """Answers one question.

    Args:
      video: path of a video, GIF, image or folder of frames, or a list or array of RGB frames.
      question: holds one `<region>` for each object; the i-th takes the i-th object.
      regions: what marks the objects; regions with one name are one object on several frames.
      on_text: is given the answer piece by piece, as it comes.
      **options: of `Options`.

    Raises:
      InputError: the video, a region or the question is not usable; one line says why.
    """
    pieces = self.stream(video, question, regions, **options)
    while True:
      try:
        piece = next(pieces)
      except StopIteration as end:
        return end.value
      if on_text is not None:
        on_text(piece)

  def stream(
    self,
    video: Any,
    question: str,
    regions: Sequence[Region] = (),
    *,
    every: int = 4,
    **options: Any,
  ) -> Iterator[str]:
    """As `ask`, yielding the text as it comes, every few tokens; the Answer is what it returns."""
    ids: list[int] = []
    sent = ""
    request = Request(video, question, regions)
    for _, tokens, result in self._run([request], Options(**options), every):
      if isinstance(result, InputError):
        raise result
      ids += tokens
      text = result.text if result else self._text(ids)
      if (result or not text.endswith("\ufffd")) and text != sent:  # half a character waits
        yield text[len(sent) :]
        sent = text
      if result:
        return result

  def describe(self, video: Any, regions: Sequence[Region], **options: Any) -> Answer:
    """Describes one object in detail, with the prompt of VideoRefer-Bench-D."""
    return self.ask(video, DESCRIBE, regions, **options)

  def ask_many(self, requests: Sequence[Request], **options: Any) -> list[Answer]:
    """Answers many questions, in their order; `options` are those of `Options`.

    Greedy answers (temperature 0) are those that `ask` would give each alone.

    Raises:
      InputError: a request is not usable; `answer_each` goes on with the others instead.
    """
    answers: dict[int, Answer] = {}
    for index, answer in self.answer_each(requests, **options):
      if isinstance(answer, InputError):
        raise answer
      answers[index] = answer
    return [answers[i] for i in range(len(requests))]

  def answer_each(
    self, requests: Sequence[Request] | Mapping[int, Request], **options: Any
  ) -> Iterator[tuple[int, Answer | InputError]]:
    """(place in the list, answer) of each request as it is done; an InputError where it cannot be.

    Videos are read by threads ahead of the device. `options` are those of `Options`. Of a list that
    is answered in parts, a mapping gives the rest with their places.
    """
    for index, _, result in self._run(requests, Options(**options), None):
      if result is not None:
        yield index, result

  def warm_up(self, *, question_slots: int = CHUNK, **options: Any) -> None:
    """Compiles everything that questions of up to so many tokens need, with these options."""
    asked = Options(**options)
    scene = self._scene(asked)
    for media in ("video", "image"):
      head, _ = _around_media(question_prompt("", self.tokenizer, media)[1])
      self.visual.compile(scene, len(head))
      for slots in _classes(question_slots):
        self._engine(self._sizes(asked, len(head), slots), asked.sampling(self.sampling))

  def object_similarity(self, request: Request) -> list[tuple[np.ndarray, np.ndarray]]:
    """How the tokens of each object came about (Fig. 7 of the paper).

    Returns for each object the cosine similarity of its F frames, float32 [F, F], and the token
    that each frame was merged into, int32 [F].
    """
    (group,) = self._read([(0, request)], Options(share=False), self.cfg.num_frames)
    for _, error in group.refused:
      raise error
    _, objects = self._see(group)
    found = []
    for one in objects:
      unit = one.pooled / np.maximum(np.linalg.norm(one.pooled, axis=-1, keepdims=True), 1e-12)
      found.append((unit @ unit.T, one.segments))
    return found

  # --- From requests to answers ---------------------------------------------------------------

  def _run(
    self, requests: Sequence[Request] | Mapping[int, Request], options: Options, every: int | None
  ) -> Iterator[tuple[int, tuple[int, ...], Answer | InputError | None]]:
    """(place, new tokens, the result once it is there); new tokens only every so many steps."""
    options.sampling(self.sampling)
    self._scene(options)
    lanes: dict[int, list[int]] = collections.defaultdict(list)  # by the slots of the question
    places = requests if isinstance(requests, Mapping) else dict(enumerate(requests))
    for i, request in places.items():
      try:
        lanes[_classes(self._question_slots(request))[-1]].append(i)
      except InputError as error:
        yield i, (), error
    for slots, members in sorted(lanes.items()):
      yield from self._run_lane([(i, places[i]) for i in members], slots, options, every)

  def _run_lane(self, asked, slots: int, options: Options, every: int | None):
    """As `_run`, of requests that fit rows of one size."""
    scene = self._scene(options)
    refused: list[tuple[int, InputError]] = []
    under_way: dict[int, tuple[_Read, Clip, list[ObjectTokens], list[int]]] = {}

    def prompts() -> Iterator[Prompt]:
      for group in self._read_ahead(asked, options, scene):
        refused.extend(group.refused)
        if not group.read:
          continue
        prefix, objects = self._see(group)
        remaining = iter(objects)
        for read in group.read:
          own = list(itertools.islice(remaining, len(read.objects)))
          under_way[read.index] = (read, group.clip, own, [])
          yield self._prompt(read, prefix, own)

    def refusals():
      while refused:
        index, error = refused.pop(0)
        yield index, (), error

    head, _ = _around_media(question_prompt("", self.tokenizer, "video")[1])
    try:
      engine = self._engine(self._sizes(options, len(head), slots), options.sampling(self.sampling))
    except InputError as error:
      refused.extend((i, error) for i, _ in asked)
      yield from refusals()
      return
    limit, seed = options.max_new_tokens, options.seed
    for progress in engine.run(prompts(), limit=limit, seed=seed, every=every):
      yield from refusals()
      index = progress.prompt.index
      under_way[index][-1].extend(progress.tokens)
      done = self._finish(*under_way.pop(index)) if progress.done else None
      yield index, progress.tokens, done
    yield from refusals()

  def _read_ahead(self, asked, options: Options, scene: int) -> Iterator[_Group]:
    """The requests in groups of one video, read by threads ahead of their use."""
    groups: dict[Hashable, list[tuple[int, Request]]] = collections.defaultdict(list)
    for i, request in asked:
      video = _identity(request.video)
      groups[video if options.share else (video, i)].append((i, request))
    parts = (
      members[at : at + TOGETHER]
      for members in groups.values()
      for at in range(0, len(members), TOGETHER)
    )
    read = functools.partial(self._read, options=options, scene=scene)
    with ThreadPoolExecutor(READERS) as threads:
      reading = collections.deque(
        threads.submit(read, part) for part in itertools.islice(parts, READERS + 1)
      )
      while reading:
        groups_of_part = reading.popleft().result()
        for part in itertools.islice(parts, 1):
          reading.append(threads.submit(read, part))
        yield from groups_of_part

  def _read(
    self, asked: Sequence[tuple[int, Request]], options: Options, scene: int
  ) -> list[_Group]:
    """Reads requests about one video, each frame once: one group, if no request spoils the others.

    Runs in a thread, without jax.
    """
    try:
      source = open_video(asked[0][1].video)
    except InputError as error:
      return [_Group(None, None, (), [(i, error) for i, _ in asked])]
    image = source.kind == "image"
    shape = self._row_shape(scene)
    prepared, refused = [], []
    for i, request in asked:
      try:
        marked = objects_of(request.regions, source)
        objects = [m.masks for m in marked] + list(request.annotation)
        text = self._text_of(request, len(objects), "image" if image else "video")
        warnings = warnings_of(
          marked, self.cfg.img.grid, self.cfg.image_aspect_ratio, options.mask_rule
        )
        names = [m.name for m in marked]
        names += [f"object {n}" for n in range(len(names), len(objects))]
        prepared.append((i, text, objects, names, filter(None, [self.notice, *warnings])))
      except InputError as error:
        refused.append((i, error))
    try:
      clip = read_clip(
        asked[0][1].video if image else source,
        shape,
        [masks for _, _, objects, _, _ in prepared for masks in objects],
        image=image,
        aspect_ratio=self.cfg.image_aspect_ratio,
        mask_rule=options.mask_rule,
      )
      if len(clip.scene) != scene:
        raise InputError(
          f"{source.name}: {len(clip.scene)} frames, which are all taken as the scene; accepted: "
          f"up to {scene}, or scene_frames={len(clip.scene)}"
        )
    except InputError as error:
      if len(asked) == 1:
        return [_Group(None, None, (), [(asked[0][0], error)])]
      return [group for one in asked for group in self._read([one], options, scene)]
    cells = iter(clip.objects)
    read = [
      _Read(i, text, tuple(names), list(itertools.islice(cells, len(objects))), tuple(warnings))
      for i, text, objects, names, warnings in prepared
    ]
    return [_Group(_content(clip) if options.share else None, clip, read, refused)]

  def _see(self, group: _Group) -> tuple[Prefix, list[ObjectTokens]]:
    head, _ = _around_media(group.read[0].text)
    objects = [masks for read in group.read for masks in read.objects]
    return self.visual.see(group.clip.frames, group.clip.scene, objects, head, group.video)

  def _prompt(self, read: _Read, prefix: Prefix, objects: Sequence[ObjectTokens]) -> Prompt:
    """What follows the scene: text, and each object's tokens in the place of its `<region>`."""
    _, tail = _around_media(read.text)
    is_region = tail == self.tokenizer.region_id
    slots = np.ones(len(tail), np.int64)
    slots[is_region] = [len(o.tokens) for o in objects]
    source = np.repeat(np.arange(len(tail)), slots)
    is_visual = is_region[source]
    visual = np.zeros((len(source), self.cfg.llm.width), self.cfg.region.dtype)
    if objects:
      visual[is_visual] = np.concatenate([o.tokens for o in objects])
    tokens = np.where(is_visual, 0, tail[source]).astype(np.int32)
    return Prompt(read.index, prefix, tokens, visual, is_visual)

  def _finish(
    self, read: _Read, clip: Clip, objects: Sequence[ObjectTokens], ids: Sequence[int]
  ) -> Answer:
    told = []
    for name, masks, seen in zip(read.names, read.objects, objects, strict=True):
      tokens: dict[int, list[int]] = {}
      for number, segment in zip(masks, seen.segments, strict=True):
        tokens.setdefault(int(segment), []).append(int(number))
      told.append({"name": name, "tokens": [tokens[s] for s in sorted(tokens)]})
    return Answer(
      text=self._text(ids),
      token_ids=tuple(ids),
      scene_frames=tuple(int(n) for n in clip.scene),
      objects=tuple(told),
      warnings=read.warnings,
    )

  # --- Sizes ----------------------------------------------------------------------------------

  def _engine(self, sizes: Sizes, sampling: Sampling) -> Engine:
    if (sizes, sampling) not in self._engines:
      self._engines[sizes, sampling] = Engine(
        self._module,
        self.params,
        self._programs,
        self._placement,
        sizes,
        eos_ids=self.eos_ids,
        pad_id=self.pad_id,
        sampling=sampling,
        memory_limit=self._memory_limit,
      )
    return self._engines[sizes, sampling]

  def _sizes(self, options: Options, head: int, question: int) -> Sizes:
    return Sizes(
      rows=self._placement.whole_rows(options.batch_size),
      prefix=head_slots(head) + self._scene_tokens(self._scene(options)),
      question=question,
      new_tokens=max(16, 1 << (options.max_new_tokens - 1).bit_length()),
    )

  def _scene(self, options: Options) -> int:
    scene = self.cfg.num_frames if options.scene_frames is None else options.scene_frames
    if self._scene_tokens(scene) < 1:
      raise InputError(f"scene_frames={scene} gives no scene token; accepted: 2 or more")
    return scene

  def _scene_tokens(self, scene: int) -> int:
    return scene_token_count(self.cfg.connector, scene, self.cfg.img.grid)

  def _row_shape(self, scene: int) -> RowShape:
    return batches.fit_shape(
      [],
      image_size=self.cfg.img.image_size,
      grid=self.cfg.img.grid,
      tokens_per_object=self.cfg.region.tokens,
      scene_tokens=self._scene_tokens(scene),
      scene=scene,
    )

  def _question_slots(self, request: Request) -> int:
    """The most slots that the question and its objects can take."""
    regions = request.question.count(REGION)
    _, tail = _around_media(question_prompt(request.question, self.tokenizer, "video")[1])
    return len(tail) + regions * (self.cfg.region.tokens - 1)

  def _text_of(self, request: Request, objects: int, media: str) -> Text:
    found = request.question.count(REGION)
    if found != objects:
      raise InputError(
        f"question {request.question!r}: found {found} {REGION} but {objects} objects; "
        f"accepted: one {REGION} for each object"
      )
    return question_prompt(request.question, self.tokenizer, media)[1]

  def _text(self, ids: Sequence[int]) -> str:
    return self.tokenizer.decode(ids, skip_special=True).strip()


def _classes(question_slots: int) -> list[int]:
  """Sizes for the question's slots, up to the one that holds so many."""
  sizes = [2 * CHUNK]
  while sizes[-1] < question_slots:
    sizes.append(4 * sizes[-1])
  return sizes


def _around_media(text: Text) -> tuple[np.ndarray, np.ndarray]:
  """Ids before and after the one media tag."""
  tags = np.flatnonzero(np.isin(text.ids, list(MEDIA_IDS.values())))
  if len(tags) != 1:
    raise InputError(
      f"found {len(tags)} media tags in the text; accepted: exactly one, which is put before the "
      "question"
    )
  return text.ids[: tags[0]], text.ids[tags[0] + 1 :]


def _identity(video: Any) -> Hashable:
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


def _for_inference(
  cfg: VideoReferConfig, params: Mapping[str, Any], weights: str | None, placement: Placement
) -> tuple[VideoReferConfig, Any]:
  """Config and parameters as they are run: fused, in the dtype of the matmuls, on their devices."""
  if weights is not None and weights not in WEIGHTS:
    raise InputError(f"weights={weights!r}; accepted: {', '.join(WEIGHTS)}")
  parts = {name: getattr(cfg, name) for name in ("img", "connector", "region", "llm")}
  if weights in ("float32", "bfloat16"):
    parts = {name: dataclasses.replace(part, dtype=weights) for name, part in parts.items()}
  params = jax.device_get(params)
  parts["llm"], llm = fuse(parts["llm"], params["llm"], placement.size("tensor"))
  if weights == "int8":
    llm = quantize(llm)

  def cast(path: str, x):
    """Kernels of matmuls in their dtype; what else there is computes in float32."""
    matmul = path.endswith("/kernel") and not path.endswith("conv2/kernel")
    return np.asarray(x, jnp.dtype(parts[path.split("/")[0]].dtype if matmul else "float32"))

  others = {name: tree for name, tree in params.items() if name != "llm"}
  ready = jax.tree.map(cast, path_names(others), others)
  return dataclasses.replace(cfg, **parts), placement.put(ready | {"llm": llm})
