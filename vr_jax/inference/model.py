"""A model that answers questions about objects in videos: one by one, in a list, as a stream."""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from data_pipes.batch import fit_shape
from data_pipes.errors import InputError
from data_pipes.prompts import DESCRIBE, question_prompt
from data_pipes.tokenizer import Tokenizer
from vr_jax.inference.batching import CHUNK, WAITING, Engine, Prompt, Sizes
from vr_jax.inference.options import WEIGHTS, Options
from vr_jax.inference.placement import Placement
from vr_jax.inference.prefix import ObjectTokens, Prefix, Visual, head_slots
from vr_jax.inference.programs import Programs
from vr_jax.inference.reading import Group, Question, Reader, Refused, around_media
from vr_jax.inference.regions import Region
from vr_jax.inference.requests import Answer, Request
from vr_jax.inference.sampling import Sampling
from vr_jax.models.connector import scene_token_count
from vr_jax.models.fused import fuse
from vr_jax.models.quantize import quantize
from vr_jax.models.videorefer import VideoRefer, VideoReferConfig
from vr_jax.params import path_names


@dataclasses.dataclass
class _UnderWay:
  """A question between its prompt and its answer; `ids` are its new tokens so far."""

  question: Question
  scene: Sequence[int]
  objects: Sequence[ObjectTokens]
  ids: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class _Call:
  """One call's requests, from reading to answers.

  Attributes:
    groups: videos with their questions, as they are read; None where none is read yet.
    options: of all requests, but for those that have `settings` by their place.
    is_dropped: whether nobody waits for a request's answer any more.
    lanes: prompts that wait for a row, by the question slots of the row.
    engines: what answers each lane; InputError where such rows do not fit the memory.
    under_way: by the request's place in the list.
    refused: requests that cannot be answered, until the caller has them.
  """

  groups: Iterator[Group | Refused | None]
  options: Options
  settings: Mapping[int, Options] = dataclasses.field(default_factory=dict)
  is_dropped: Callable[[int], bool] = lambda place: False
  lanes: dict[int, collections.deque[Prompt]] = dataclasses.field(default_factory=dict)
  engines: dict[int, Engine | InputError] = dataclasses.field(default_factory=dict)
  under_way: dict[int, _UnderWay] = dataclasses.field(default_factory=dict)
  refused: list[Refused] = dataclasses.field(default_factory=list)

  def forget_dropped(self) -> None:
    for place in [place for place in self.under_way if self.is_dropped(place)]:
      del self.under_way[place]

  def others_are_full(self, slots: int) -> bool:
    """The prompts of other lanes than this hold as many prefixes as may wait."""
    prefixes = {
      id(prompt.prefix) for lane in self.lanes if lane != slots for prompt in self.lanes[lane]
    }
    return len(prefixes) >= WAITING


class Model:
  """A model that is ready to answer.

  Attributes:
    cfg, params, tokenizer: the model; its decoder is in the fused layout.
    weights: "float32", "bfloat16" or "int8", of the decoder.
    eos_ids, pad_id, sampling: how it decodes by default.
    notice: a warning that goes with every answer ("" for none).
    visual: encodes videos; `visual.counts` are the frames, objects and prefixes so far.
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
    self._engines: dict[Sizes, Engine] = {}
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
    """As `ask`, yielding the text as it comes, every few tokens; returns the Answer."""
    ids: list[int] = []
    sent = ""
    request = Request(video, question, regions)
    for _, tokens, result in self._run([request], Options(**options), every):
      if isinstance(result, InputError):
        raise result
      ids += tokens
      text = result.text if result else self.text(ids)
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

    Videos are read by threads ahead of the device, each once for all questions about it, whatever
    their order. `options` are those of `Options`. Where a list is answered in parts, a mapping
    gives the rest with their places.
    """
    for index, _, result in self._run(requests, Options(**options), None):
      if result is not None:
        yield index, result

  def choices(
    self, requests: Sequence[Request], options: Sequence[Sequence[str]], **settings: Any
  ) -> list[tuple[float, ...]]:
    """How likely each of the given answers is: for each request a number for each of its options.

    That is the log-likelihood of the option's tokens as the answer, in nats: the sum of their
    log-probabilities, without that of an end. All options of a request, and all requests about one
    video, share the prefix of the video.

    Args:
      options: of each request, at least one text.
      **settings: of `Options`; those of sampling and length have no effect.

    Raises:
      InputError: a request or an option is not usable; `choices_each` goes on with the others.
    """
    scores: dict[int, tuple[float, ...]] = {}
    for index, result in self.choices_each(requests, options, **settings):
      if isinstance(result, InputError):
        raise result
      scores[index] = result
    return [scores[i] for i in range(len(requests))]

  def choices_each(
    self,
    requests: Sequence[Request] | Mapping[int, Request],
    options: Sequence[Sequence[str]] | Mapping[int, Sequence[str]],
    **settings: Any,
  ) -> Iterator[tuple[int, tuple[float, ...] | InputError]]:
    """(place, log-likelihoods) of each request as it is done, as `answer_each` gives answers."""
    if len(requests) != len(options):
      raise InputError(f"{len(requests)} requests and {len(options)} lists of options")
    how = Options(**settings)
    places = requests if isinstance(requests, Mapping) else dict(enumerate(requests))
    call = _Call(self.reader(how).ahead(places.items()), how)
    for group in call.groups:
      if not isinstance(group, Group):
        yield group
        continue
      prefix, objects = self._see(group, group.questions)
      remaining = iter(objects)
      for question in group.questions:
        tokens = list(itertools.islice(remaining, len(question.objects)))
        prompt = self._prompt(question, prefix, tokens, call)
        try:
          yield question.index, self._likelihoods(call, prompt, options[question.index])
        except InputError as error:
          yield question.index, error

  def _likelihoods(self, call: _Call, prompt: Prompt, options: Sequence[str]) -> tuple[float, ...]:
    """The log-likelihood of each option after the prompt."""
    if not options:
      raise InputError("no options; accepted: at least one")
    ids = [np.array(self.tokenizer.encode(option), np.int32) for option in options]
    for option, tokens in zip(options, ids, strict=True):
      if not len(tokens):
        raise InputError(f"option {option!r} has no tokens; accepted: text")
    longest = len(prompt.tokens) + max(map(len, ids))
    engine = self._engine_of_lane(call, _classes(longest)[-1])
    if isinstance(engine, InputError):
      raise engine
    return tuple(engine.score([prompt.followed_by(i) for i in ids], list(map(len, ids))))

  def warm_up(self, *, question_slots: int = CHUNK, **options: Any) -> None:
    """Compiles everything that questions of up to so many tokens need, with these options."""
    settings = Options(**options)
    scene = self._scene(settings)
    for media in ("video", "image"):
      head, _ = around_media(question_prompt("", self.tokenizer, media)[1])
      self.visual.compile(scene, len(head))
      for slots in _classes(question_slots):
        self._engine(self._sizes(settings, len(head), slots))

  def object_similarity(self, request: Request) -> list[tuple[np.ndarray, np.ndarray]]:
    """How the tokens of each object came about (Fig. 7 of the paper).

    Returns for each object the cosine similarity of its F frames, float32 [F, F], and the token
    that each frame was merged into, int32 [F].
    """
    (group,) = self.reader(Options(share=False)).read([(0, request)])
    if not isinstance(group, Group):
      raise group[1]
    _, objects = self._see(group, group.questions)
    similarities = []
    for one in objects:
      unit = one.pooled / np.maximum(np.linalg.norm(one.pooled, axis=-1, keepdims=True), 1e-12)
      similarities.append((unit @ unit.T, one.segments))
    return similarities

  # --- From requests to answers ---------------------------------------------------------------

  def _run(
    self, requests: Sequence[Request] | Mapping[int, Request], options: Options, every: int | None
  ) -> Iterator[tuple[int, tuple[int, ...], Answer | InputError | None]]:
    """(place, new tokens, the result once it is there); new tokens only every so many steps.

        requests ─ Reader, in threads ─► group: a video and its questions
        group ─ _take_up: each frame encoded once ─► prefix, object tokens ─► a prompt a question
        prompts ─► lanes, by the size of their rows ─ Engine.run, one lane at a time ─► answers

    A program has one size of row, so long questions cannot join the rows of short ones. But a
    video is encoded for all its questions at once; those of the other lanes wait until this lane
    has no more prompts. Each waiting prompt holds its video's prefix on the device, therefore no
    video is taken up while the other lanes hold WAITING of them: this lane then runs dry.
    """
    places = requests if isinstance(requests, Mapping) else dict(enumerate(requests))
    call = _Call(self.reader(options).ahead(places.items()), options)
    for progress in self._answer(call, every):
      assert progress is not None  # all requests are there from the beginning
      yield progress

  def answer_live(
    self,
    groups: Iterator[Group | Refused | None],
    options: Options,
    settings: Mapping[int, Options],
    is_dropped: Callable[[int], bool],
    every: int,
  ) -> Iterator[tuple[int, tuple[int, ...], Answer | InputError | None] | None]:
    """As `_run`, of requests that come while others are answered.

    Args:
      groups: what `reader(options)` reads; None where there is nothing yet. A request's `place` is
        its number among all.
      options: of the rows: their number and sizes.
      settings: each request's options, by its place; what shapes the rows is not looked at.
      is_dropped: whether nobody waits for an answer any more.

    Yields None where there is nothing to do until `groups` has more.
    """
    return self._answer(_Call(groups, options, settings, is_dropped), every)

  def _answer(
    self, call: _Call, every: int | None
  ) -> Iterator[tuple[int, tuple[int, ...], Answer | InputError | None] | None]:
    more: bool | None = True
    while more is not False or any(call.lanes.values()):
      if not any(call.lanes.values()):
        more = self._take_up(call)
        yield from _refusals(call)
        if more is None:
          yield None
        continue
      slots = max(call.lanes, key=lambda lane: len(call.lanes[lane]))
      engine = call.engines[slots]
      assert isinstance(engine, Engine)  # a lane without one holds no prompts
      prompts = self._prompts(call, slots)
      for progress in engine.run(prompts, every=every, is_dropped=call.is_dropped):
        yield from _refusals(call)
        call.forget_dropped()
        if progress is None:
          yield None
          continue
        entry = call.under_way.get(progress.index)
        if entry is None:
          continue  # dropped meanwhile
        entry.ids += progress.tokens
        answer = None
        if progress.done:
          answer = self._finish(entry)
          del call.under_way[progress.index]
        yield progress.index, progress.tokens, answer
      yield from _refusals(call)

  def _prompts(self, call: _Call, slots: int) -> Iterator[Prompt | None]:
    """The prompts of a lane, taking up further videos as long as the other lanes have room."""
    lane = call.lanes[slots]
    while True:
      while lane:
        yield lane.popleft()
      if call.others_are_full(slots):
        return
      more = self._take_up(call)
      if more is False:
        return
      if more is None:
        if any(call.lanes[other] for other in call.lanes if other != slots):
          return  # they have waited long enough
        yield None

  def _take_up(self, call: _Call) -> bool | None:
    """Encodes the next group and puts its prompts into their lanes.

    False if there is none; None if there is none yet.
    """
    try:
      group = next(call.groups)
    except StopIteration:
      return False
    if group is None:
      return None
    if not isinstance(group, Group):
      call.refused.append(group)
      return True
    questions = []
    for question in group.questions:
      slots = self._question_slots(question)
      engine = self._engine_of_lane(call, slots)
      if isinstance(engine, InputError):
        call.refused.append((question.index, engine))
      else:
        questions.append((slots, question))
    if not questions:
      return True
    prefix, objects = self._see(group, [question for _, question in questions])
    remaining = iter(objects)
    for slots, question in questions:
      tokens = list(itertools.islice(remaining, len(question.objects)))
      call.under_way[question.index] = _UnderWay(question, group.clip.scene, tokens)
      call.lanes[slots].append(self._prompt(question, prefix, tokens, call))
    return True

  def _engine_of_lane(self, call: _Call, slots: int) -> Engine | InputError:
    if slots not in call.engines:
      head, _ = around_media(question_prompt("", self.tokenizer, "video")[1])
      try:
        sizes = self._sizes(call.options, len(head), slots)
        call.engines[slots] = self._engine(sizes)
      except InputError as error:
        call.engines[slots] = error
      call.lanes[slots] = collections.deque()
    return call.engines[slots]

  def _see(self, group: Group, questions: Sequence[Question]) -> tuple[Prefix, list[ObjectTokens]]:
    """The prefix of the group's video, and the tokens of the questions' objects, in order."""
    masks = [m for question in questions for m in question.objects]
    known = [tokens for question in questions for tokens in question.known]
    unknown = [m for m, tokens in zip(masks, known, strict=True) if tokens is None]
    clip = group.clip
    prefix, seen = self.visual.see(
      clip.frames, clip.scene, unknown, group.head, group.video, group.file, group.prefix
    )
    fresh = iter(seen)
    return prefix, [next(fresh) if tokens is None else tokens for tokens in known]

  def _prompt(
    self,
    question: Question,
    prefix: Prefix,
    objects: Sequence[ObjectTokens],
    call: _Call,
  ) -> Prompt:
    """What follows the scene: text, and each object's tokens in the place of its `<region>`."""
    _, tail = around_media(question.text)
    is_region = tail == self.tokenizer.region_id
    slots = np.ones(len(tail), np.int64)
    slots[is_region] = [len(o.tokens) for o in objects]
    source = np.repeat(np.arange(len(tail)), slots)
    is_visual = is_region[source]
    visual = np.zeros((len(source), self.cfg.llm.width), self.cfg.region.dtype)
    if objects:
      visual[is_visual] = np.concatenate([o.tokens for o in objects])
    tokens = np.where(is_visual, 0, tail[source]).astype(np.int32)
    # In a list the place tells equal requests apart; one with settings has its own seed.
    single = call.settings.get(question.index)
    options = call.options if single is None else single
    return Prompt(
      question.index,
      prefix,
      tokens,
      visual,
      is_visual,
      limit=options.max_new_tokens,
      sampling=options.sampling(self.sampling),
      seed=options.seed,
      place=question.index if single is None else 0,
    )

  def _finish(self, entry: _UnderWay) -> Answer:
    question = entry.question
    objects = []
    for name, masks, seen in zip(question.names, question.objects, entry.objects, strict=True):
      tokens: dict[int, list[int]] = {}
      for number, segment in zip(masks, seen.segments, strict=True):
        tokens.setdefault(int(segment), []).append(int(number))
      objects.append({"name": name, "tokens": [tokens[s] for s in sorted(tokens)]})
    return Answer(
      text=self.text(entry.ids),
      token_ids=tuple(entry.ids),
      scene_frames=tuple(int(n) for n in entry.scene),
      objects=tuple(objects),
      warnings=question.warnings,
    )

  # --- Sizes ----------------------------------------------------------------------------------

  def _engine(self, sizes: Sizes) -> Engine:
    if sizes not in self._engines:
      self._engines[sizes] = Engine(
        self._module,
        self.params,
        self._programs,
        self._placement,
        sizes,
        eos_ids=self.eos_ids,
        pad_id=self.pad_id,
        memory_limit=self._memory_limit,
      )
    return self._engines[sizes]

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

  def reader(self, options: Options) -> Reader:
    """Reads requests for rows of these options."""
    scene = self._scene(options)
    shape = fit_shape(
      [],
      image_size=self.cfg.img.image_size,
      grid=self.cfg.img.grid,
      tokens_per_object=self.cfg.region.tokens,
      scene_tokens=self._scene_tokens(scene),
      scene=scene,
    )
    aspect_ratio = self.cfg.image_aspect_ratio
    return Reader(
      self.tokenizer,
      shape,
      options,
      aspect_ratio=aspect_ratio,
      notice=self.notice,
      visual=self.visual,
    )

  def _question_slots(self, question: Question) -> int:
    """The slots of its row: a size that holds what the question and its objects can take."""
    _, tail = around_media(question.text)
    return _classes(len(tail) + len(question.objects) * (self.cfg.region.tokens - 1))[-1]

  def text(self, ids: Sequence[int]) -> str:
    """The text of generated tokens."""
    return self.tokenizer.decode(ids, skip_special=True).strip()


def _classes(question_slots: int) -> list[int]:
  """Sizes for the question's slots, up to the one that holds so many."""
  sizes = [2 * CHUNK]
  while sizes[-1] < question_slots:
    sizes.append(4 * sizes[-1])
  return sizes


def _refusals(call: _Call) -> Iterator[tuple[int, tuple[int, ...], InputError]]:
  while call.refused:
    index, error = call.refused.pop(0)
    yield index, (), error


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
