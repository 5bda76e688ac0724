"""A model that answers questions about objects in videos: one by one, in a list, as a stream."""

import dataclasses
import itertools
import logging
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from data_pipes.batch import fit_shape
from data_pipes.errors import InputError
from data_pipes.prompts import DESCRIBE, question_prompt
from data_pipes.tokenizer import Tokenizer
from vr_jax.inference.batching import CHUNK, Engine, Prompt, Sizes, classes
from vr_jax.inference.call import Call, UnderWay
from vr_jax.inference.opening import open_weights
from vr_jax.inference.options import Options
from vr_jax.inference.placement import Placement
from vr_jax.inference.prefix import ObjectTokens, Prefix, Visual, head_slots
from vr_jax.inference.programs import Programs
from vr_jax.inference.reading import Group, Question, Reader, around_media
from vr_jax.inference.regions import Region
from vr_jax.inference.requests import Answer, Request, conversation
from vr_jax.inference.sampling import Sampling
from vr_jax.inference.service import Service
from vr_jax.inference.tickets import Text, Ticket
from vr_jax.models.connector import scene_token_count
from vr_jax.models.videorefer import VideoRefer, VideoReferConfig
from vr_jax.params import Parameters, Tree

logger = logging.getLogger("vr_jax")


class Model:
  """A model that is ready to answer.

  Attributes:
    cfg, params, tokenizer: the model; its decoder is in the fused layout.
    weights: "float32", "bfloat16" or "int8", of the decoder.
    eos_ids, pad_id, sampling: how it decodes by default.
    notice: a warning that goes with every answer ("" for none).
    visual: encodes videos; `visual.counts` are the frames, objects and prefixes so far.
    service: what answers `ask` and its like, whoever calls; see service.py.
    device: a lock for those that run programs.
  """

  def __init__(
    self,
    cfg: VideoReferConfig,
    params: Mapping[str, Any] | Parameters,
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
      params: a tree, or parameters that are read one by one as they are placed.
      weights: "float32" or "bfloat16" compute in that dtype; "int8" keeps the dtype and holds the
        decoder's matmul weights in 8 bits. None: as `cfg` says.
      mesh: with the axes `data` and `tensor`, either or both; see placement.py.
      memory_limit: bytes a device may be asked for, by default what it has.
    """
    settings = dict(generation or {})
    self.tokenizer, self.notice, self._memory_limit = tokenizer, notice, memory_limit
    self._placement = Placement(mesh)
    self._placement.check(cfg.llm)
    if isinstance(params, Mapping):
      params = Tree(params)
    self.cfg, self.params = open_weights(cfg, params, weights, self._placement, memory_limit)
    self.weights = weights or self.cfg.llm.dtype
    self.eos_ids = tuple(settings.get("eos_ids") or ())
    if not self.eos_ids and tokenizer.eos_id is not None:
      self.eos_ids = (tokenizer.eos_id,)
    pad = settings.get("pad_id")
    self.pad_id = int(tokenizer.pad_id or 0) if pad is None else int(pad)
    self.sampling = Sampling(repetition_penalty=settings.get("repetition_penalty") or 1.0)
    self._module = VideoRefer(self.cfg)
    self._programs = Programs(mesh)
    self._engines: dict[Sizes, Engine] = {}
    self.visual = Visual(self._module, self.params, self._programs, self._placement)
    self._head_slots = 0  # the least that a prefix has for the text before the media
    self._is_declared = False  # sizes were, so that others come as a surprise
    self.device = threading.RLock()
    self.service = Service(self, strict=False, queue=None, per_client=None)

  def ask(
    self,
    video: Any,
    question: str | Sequence[Mapping[str, Any]],
    regions: Sequence[Region] = (),
    *,
    on_text: Callable[[str], Any] | None = None,
    **options: Any,
  ) -> Answer:
    """Answers one question.

    Args:
      video: path of a video, GIF, image or folder of frames, or a list or array of RGB frames.
      question: holds one `<region>` for each object; the i-th takes the i-th object. Or messages,
        {"role", "content", "regions"}, of user and assistant by turns (`requests.conversation`).
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
    question: str | Sequence[Mapping[str, Any]],
    regions: Sequence[Region] = (),
    *,
    every: int = 1,
    **options: Any,
  ) -> Generator[str, None, Answer]:
    """As `ask`, yielding the text as it comes, at least `every` tokens at once.

    Returns the Answer.
    """
    if isinstance(question, str):
      request = Request(video, question, regions)
    else:
      request = Request(video, **conversation(question, regions))
    ticket = self.service.submit(request, Options(**options), stream=True)
    piece, tokens = "", 0
    try:
      for event in ticket:
        if isinstance(event, Text):
          piece, tokens = piece + event.delta, tokens + len(event.token_ids)
          if tokens >= every:
            yield piece
            piece, tokens = "", 0
      if piece:
        yield piece
    finally:
      ticket.cancel()  # no effect on one that has ended
    return ticket.result()

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
    places = requests if isinstance(requests, Mapping) else dict(enumerate(requests))
    ended: queue.SimpleQueue[Ticket] = queue.SimpleQueue()
    tickets = self.service.submit_all(places, Options(**options), ended.put)
    try:
      for _ in tickets:
        ticket = ended.get()
        try:
          yield ticket.place, ticket.result()
        except InputError as error:
          yield ticket.place, error
    finally:
      for ticket in tickets:
        ticket.cancel()

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
    for group in self.reader(how).ahead(places.items()):
      if not isinstance(group, Group):
        yield group
        continue
      try:
        with self.device:
          prefix, objects = self._see(group, group.questions)
      except InputError as error:
        yield from ((question.index, error) for question in group.questions)
        continue
      remaining = iter(objects)
      for question in group.questions:
        tokens = list(itertools.islice(remaining, len(question.objects)))
        prompt = self._prompt(question, prefix, tokens, Call(how))
        try:
          yield question.index, self._likelihoods(how, question, prompt, options[question.index])
        except InputError as error:
          yield question.index, error

  def _likelihoods(
    self, how: Options, question: Question, prompt: Prompt, options: Sequence[str]
  ) -> tuple[float, ...]:
    """The log-likelihood of each option after the prompt."""
    if not options:
      raise InputError("no options; accepted: at least one")
    ids = [np.array(self.tokenizer.encode(option), np.int32) for option in options]
    for option, tokens in zip(options, ids, strict=True):
      if not len(tokens):
        raise InputError(f"option {option!r} has no tokens; accepted: text")
    lane = self._lane(question, max(map(len, ids)))
    with self.device:
      engine = self.engine_for(self.sizes_of_lane(how, lane))
      return tuple(engine.score([prompt.followed_by(i) for i in ids], list(map(len, ids))))

  def warm_up(self, *, question_slots: int = CHUNK, **options: Any) -> None:
    """Compiles everything that questions of up to so many tokens need, with these options."""
    for slots in classes(question_slots):
      self.declare(Options(**options), question_slots=slots)

  def declare(
    self,
    options: Options,
    *,
    question_slots: int,
    system_slots: int = 0,
    fewer: tuple[int, ...] = (),
  ) -> None:
    """Compiles what questions need that take rows of these options.

    Args:
      question_slots: a size of `batching.classes`.
      system_slots: tokens that the text before the media may have.
      fewer: of Sizes.
    """
    scene = self._scene(options)
    with self.device:
      self._is_declared = False
      self._head_slots = max(self._head_slots, head_slots(system_slots))
      for media in ("video", "image"):
        head, _ = around_media(question_prompt("", self.tokenizer, media)[1])
        slots = self.prefix_head(len(head))
        self.visual.compile(scene, slots)
        self.visual.nothing(self.prefix_head(0) + self._scene_tokens(scene))
        sizes = self.sizes_of_lane(options, (slots, question_slots))
        self.engine_for(dataclasses.replace(sizes, fewer=fewer))
      self._is_declared = True

  def object_similarity(self, request: Request) -> list[tuple[np.ndarray, np.ndarray]]:
    """How the tokens of each object came about (Fig. 7 of the paper).

    Returns for each object the cosine similarity of its F frames, float32 [F, F], and the token
    that each frame was merged into, int32 [F].
    """
    (group,) = self.reader(Options(share=False)).read([(0, request)])
    if not isinstance(group, Group):
      raise group[1]
    with self.device:
      _, objects = self._see(group, group.questions)
    similarities = []
    for one in objects:
      unit = one.pooled / np.maximum(np.linalg.norm(one.pooled, axis=-1, keepdims=True), 1e-12)
      similarities.append((unit @ unit.T, one.segments))
    return similarities

  # --- From requests to answers ---------------------------------------------------------------

  def _see(self, group: Group, questions: Sequence[Question]) -> tuple[Prefix, list[ObjectTokens]]:
    """The prefix of the group's video, and the tokens of the questions' objects, in order."""
    seeing = self.seeing(group, questions)
    while True:
      try:
        next(seeing)
      except StopIteration as end:
        return end.value

  def seeing(
    self, group: Group, questions: Sequence[Question]
  ) -> Generator[None, None, tuple[Prefix, list[ObjectTokens]]]:
    """As `_see`, with a pause after each unit of work."""
    if group.empty:
      slots = self.prefix_head(0) + self._scene_tokens(group.empty)
      return self.visual.nothing(slots), []
    masks = [m for question in questions for m in question.objects]
    known = [tokens for question in questions for tokens in question.known]
    unknown = [m for m, tokens in zip(masks, known, strict=True) if tokens is None]
    clip, slots = group.clip, self.prefix_head(len(group.head))
    prefix, seen = yield from self.visual.seeing(
      clip.frames, clip.scene, unknown, group.head, slots, group.video, group.file, group.prefix
    )
    fresh = iter(seen)
    return prefix, [next(fresh) if tokens is None else tokens for tokens in known]

  def _prompt(
    self,
    question: Question,
    prefix: Prefix,
    objects: Sequence[ObjectTokens],
    call: Call,
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
    return Prompt(
      question.index, prefix, tokens, visual, is_visual, **self._choosing(question, call)
    )

  def _choosing(self, question: Question, call: Call) -> dict[str, Any]:
    """How the answer's tokens are chosen, as fields of a Prompt."""
    return {
      "limit": call.options.max_new_tokens,
      "sampling": call.options.sampling(self.sampling),
      "seed": call.options.seed,
      "place": call.place,
    }

  def _objects_of(self, entry: UnderWay) -> Iterator[dict[str, Any]]:
    """Name of each object, and the frames that each of its tokens stands for."""
    question = entry.question
    for name, masks, seen in zip(question.names, question.objects, entry.objects, strict=True):
      tokens: dict[int, list[int]] = {}
      for number, segment in zip(masks, seen.segments, strict=True):
        tokens.setdefault(int(segment), []).append(int(number))
      yield {"name": name, "tokens": [tokens[s] for s in sorted(tokens)]}

  # --- Sizes ----------------------------------------------------------------------------------

  def engine_for(self, sizes: Sizes) -> Engine:
    """The smallest engine that holds these sizes; compiled if there is none."""
    with self.device:
      fitting = [engine for other, engine in self._engines.items() if other.holds(sizes)]
      if fitting:
        return min(fitting, key=lambda engine: engine.sizes.slots)
      if self._is_declared:
        logger.warning(f"compiling rows beyond those that were declared, once: {sizes}")
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

  def sizes_of_lane(self, options: Options, lane: Any) -> Sizes:
    """Rows for prompts of a lane."""
    head, question = lane
    return self._row_sizes(options, head + self._scene_tokens(self._scene(options)), question)

  def _row_sizes(self, options: Options, prefix: int, question: int) -> Sizes:
    return Sizes(
      rows=self._placement.whole_rows(options.batch_size),
      prefix=prefix,
      question=question,
      new_tokens=options.row_tokens,
    )

  def prefix_head(self, count: int) -> int:
    """Slots that a prefix has for so many tokens before the media."""
    return max(head_slots(count), self._head_slots)

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
      prefix_head=self.prefix_head,
    )

  def _lane(self, question: Question, more: int = 0) -> Any:
    """What prompts that share rows have in common: slots before the media, and of the question.

    The question's hold what it, its objects and `more` tokens take.
    """
    head, tail = around_media(question.text)
    longest = len(tail) + len(question.objects) * (self.cfg.region.tokens - 1)
    return self.prefix_head(len(head)), classes(longest + more)[-1]

  def text(self, ids: Sequence[int]) -> str:
    """The text of generated tokens."""
    return self.tokenizer.decode(ids, skip_special=True).strip()
