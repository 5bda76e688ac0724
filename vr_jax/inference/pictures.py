"""Models whose tower takes pictures of any size: VideoRefer's successors.

    pictures ─ pack ─ encode, a program for each of four row sizes ─► features
    ids up to the last scene token ─ prefill (compressor, splice) ─► prefix KV, kept by content
    crops ─ object tokens ─► the question behind the prefix ─ the engine of all models

Letters: N patch of a tower row, n patch of all rows of a call, V scene token, R crop, K token of a
crop, E decoder width, L prefix slot.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data_pipes.batch import Clip
from data_pipes.errors import InputError
from data_pipes.navit_frames import MAX_FRAMES
from data_pipes.navit_rows import (
  Crop,
  Ids,
  Packed,
  Picture,
  Sample,
  Shape,
  object_arrays,
  pack,
  scene_arrays,
  text_arrays,
  tokens_of,
)
from data_pipes.navit_samples import NavitRules
from data_pipes.object_crops import CROP_RULES
from data_pipes.patch_packing import BLOCK
from vr_jax.inference.batching import CHUNK, Plan, Prompt, Sizes, classes, device_memory
from vr_jax.inference.call import Call
from vr_jax.inference.generate import bucket
from vr_jax.inference.model import Model
from vr_jax.inference.options import Options
from vr_jax.inference.picture_reading import (
  KnownScenes,
  PictureQuestion,
  PictureReader,
  picture_question,
)
from vr_jax.inference.placement import Placement
from vr_jax.inference.prefix import KEPT, ObjectTokens, Prefix, is_full
from vr_jax.inference.programs import Programs, bytes_of
from vr_jax.inference.reading import Group, Question
from vr_jax.inference.regions import Region
from vr_jax.inference.requests import Request
from vr_jax.models.decoder import KVCache
from vr_jax.models.navit import NavitConfig
from vr_jax.models.videorefer import VideoRefer


def row_sizes(cfg: NavitConfig) -> tuple[int, ...]:
  """Sizes of tower rows, in patches: the largest holds a video of one frame."""
  shares = (cfg.max_tokens / 8, cfg.max_tokens / 2, cfg.max_tokens, cfg.max_tokens * cfg.merge**2)
  return tuple(sorted({-(-int(share) // BLOCK) * BLOCK for share in shares}))


@dataclasses.dataclass(frozen=True, eq=False)
class PicturePrefix(Prefix):
  """A prefix; `later`: where objects come before the scene, its tokens [V, E] (NaN: dropped)."""

  later: np.ndarray | None = None


class PictureVisual:
  """Encodes pictures, crops and prefixes; `counts` says how many of each."""

  def __init__(
    self,
    module: VideoRefer,
    params: Any,
    programs: Programs,
    placement: Placement,
    memory_limit: int | None = None,
  ):
    """`memory_limit` bytes a device may be asked for, by default what it has."""
    self._module, self._params, self._programs = module, params, programs
    self._placement = placement
    self._limit = device_memory() if memory_limit is None else memory_limit
    self._sizes = row_sizes(module.cfg.img)
    self._kept: collections.OrderedDict[bytes, PicturePrefix] = collections.OrderedDict()
    self.scenes = KnownScenes(KEPT)  # what was read of files
    self.memory: int | None = None  # bytes of the prefixes that are kept; None: KEPT of them
    self.counts: collections.Counter[str] = collections.Counter()

  @property
  def kept_bytes(self) -> int:
    """Of the prefixes that are kept."""
    return sum(bytes_of(prefix.cache) for prefix in list(self._kept.values()))

  def see(
    self, sample: Sample, split: int, slots: int, ids: Ids, share: bool
  ) -> tuple[PicturePrefix, list[np.ndarray]]:
    """The prefix of the first `split` ids, and the tokens [k, E] of each crop behind it.

    Args:
      slots: of the prefix, at least `split`.
      share: keep the prefix for later calls.
    """
    scene = sample.scene if (sample.ids[:split] == ids.image).any() else ()
    head = Sample(sample.ids[:split], sample.labels[:split], scene, video=sample.video)
    key = _content(head)
    prefix = self._kept.get(key) if share else None
    if prefix is None:
      prefix = self._prefill(head, slots, ids)
    if share:
      self._kept[key] = prefix
      self._kept.move_to_end(key)
      while is_full(self._kept, self.memory):
        self._kept.popitem(last=False)
    if sample.scene and not scene:
      prefix = dataclasses.replace(prefix, later=self._scene(sample))
    return prefix, self._objects(sample.objects, ids.tokens_per_object)

  def forget(self) -> None:
    """Drops what is kept, and begins to count anew."""
    self._kept.clear()
    self.scenes.forget()
    self.counts.clear()

  def compile(self) -> None:
    """Compiles the tower for all sizes of rows that fit the memory."""
    for size in self._sizes:
      with contextlib.suppress(InputError):  # the request that needs such a row is refused
        self._encoder(size)

  def _prefill(self, head: Sample, slots: int, ids: Ids) -> PicturePrefix:
    packed, features = self._encode(head.pictures())
    V = sum(p.tokens for p in head.scene)
    shape = self._shape(packed, scene=bucket(V) if V else 0, length=slots)
    batch = {
      **self._pixels(packed),
      **scene_arrays([head], packed.start, shape),
      **object_arrays([], packed.start, shape),
      **text_arrays([head], shape, ids),
    }
    del batch["segments"]  # one sample a row
    cache = self._run("prefill_pictures", features, batch, slots)
    self.counts["prefixes"] += 1
    return PicturePrefix(cache, int(cache.positions.max()) + 1)

  def _scene(self, sample: Sample) -> np.ndarray:
    """All scene tokens [V, E]; NaN where the compressor drops them."""
    packed, features = self._encode(sample.scene)
    V = sum(p.tokens for p in sample.scene)
    shape = self._shape(packed, scene=bucket(V))
    batch = {**self._pixels(packed), **scene_arrays([sample], packed.start, shape)}
    tokens, kept = (np.asarray(x[0]) for x in self._run("picture_scene", features, batch))
    return np.where(kept[:V, None], tokens[:V].astype(np.float32), np.nan)

  def _objects(self, crops: Sequence[Crop], k: int) -> list[np.ndarray]:
    if not crops:
      return []
    packed, features = self._encode([p for crop in crops for p in crop.pictures()])
    context = max((len(p.patches) for c in crops for p in c.pictures()[1:]), default=0)
    shape = self._shape(
      packed,
      objects=bucket(len(crops), 4),
      cells=bucket(max(crop.cells for crop in crops)),
      context=bucket(context) if context else 0,
    )
    batch = object_arrays(crops, packed.start, shape)
    tokens = np.asarray(self._run("crop_objects", features, batch)[0][0])
    self.counts["objects"] += len(crops)
    return [tokens[i, : tokens_of(crop, k)] for i, crop in enumerate(crops)]

  def _encode(self, pictures: Sequence[Picture]) -> tuple[Packed, tuple[jax.Array, ...]]:
    """The pictures in rows, and the features of each row."""
    cfg = self._module.cfg.img
    packed = pack(pictures, self._sizes, 3 * cfg.patch_size**2)
    features = [
      self._encoder(len(row.patches))(self._params, *(x[None] for x in row)) for row in packed.rows
    ]
    self.counts["pictures"] += len(packed.start)
    self.counts["patches"] += sum(len(row.patches) for row in packed.rows)
    return packed, tuple(features)

  def _shape(self, packed: Packed, **sizes: int) -> Shape:
    cfg = self._module.cfg
    empty = dict.fromkeys(("scene", "objects", "cells", "context", "length"), 0) | {"cells": 1}
    return Shape(
      tower_rows=1,
      patches=sum(len(row.patches) for row in packed.rows),
      merge=cfg.img.merge,
      tokens_per_object=cfg.region.tokens,
      **{**empty, **sizes},
    )

  def _pixels(self, packed: Packed) -> dict[str, np.ndarray]:
    """What the compressor compares."""
    bytes_ = 3 * self._module.cfg.img.patch_size**2
    rows = [row.patches for row in packed.rows] or [np.zeros((0, bytes_), np.uint8)]
    return {"patches": np.concatenate(rows)[None]}

  def _run(self, method: str, features: tuple, batch: Mapping[str, np.ndarray], slots: int = 0):
    llm, cfg = self._module.cfg.llm, self._module.cfg.img
    batch = {name: np.asarray(x)[None] for name, x in batch.items()}
    empty = jnp.zeros((1, 0, cfg.width), cfg.dtype)

    def run(params, features, batch):
      joined = jnp.concatenate(features, axis=1) if features else empty
      more = (KVCache.empty(llm, 1, slots),) if slots else ()
      return self._module.apply({"params": params}, joined, batch, *more, method=method)

    sizes = tuple(f.shape[1] for f in features)
    shapes = tuple(sorted((name, x.shape) for name, x in batch.items()))
    out = self._placement.prefix(llm) if slots else self._placement.whole
    made = f"a prefix of {slots} slots" if slots else "what is made"
    what = f"{made} of {sum(sizes)} patches"
    program = self._fitting(what, (method, sizes, shapes, slots), run, features, batch, out=out)
    return program(self._params, features, batch)

  def _encoder(self, size: int) -> Callable:
    """The tower for a row of so many patches."""

    def run(params, *row):
      return self._module.apply({"params": params}, *row, method="encode_pictures")

    array, values = self._placement.array, 3 * self._module.cfg.img.patch_size**2
    row = array((1, size, values), "uint8"), array((1, size), "int32"), array((1, size, 2), "int32")
    what, name = f"a tower row of {size} patches", ("encode_pictures", size)
    return self._fitting(what, name, run, *row, out=self._placement.whole)

  def _fitting(
    self, what: str, name: Hashable, function: Callable, *arguments: Any, out: Any
  ) -> Callable:
    """The compiled program. Raises InputError, with the numbers, where the memory is too small."""
    accepted = "accepted: fewer scene_frames, a part of the video (seconds) or fewer objects"
    try:
      program = self._programs(name, function, self._params, *arguments, out=out)
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      raise InputError(f"{what} does not fit the memory, says the compiler; {accepted}") from error
    analysis = program.memory_analysis()
    if analysis is None:  # a backend that does not tell
      return program
    plan = Plan(
      weights=bytes_of(self._params),
      rows=bytes_of(arguments) + analysis.output_size_in_bytes,
      prefixes=sum(bytes_of(prefix.cache) for prefix in self._kept.values()),
      scratch=analysis.temp_size_in_bytes,
      limit=self._limit,
    )
    if plan.total > plan.limit:
      raise InputError(f"{what} does not fit the memory: {plan}; {accepted}")
    return program


def _content(head: Sample) -> bytes:
  """A hash of ids and pictures: what tells a prefix from all others."""
  content = hashlib.blake2b(np.ascontiguousarray(head.ids, np.int32), digest_size=16)
  for picture in head.scene:
    content.update(picture.digest)
  return content.digest()


class PictureModel(Model):
  """A model of VideoRefer-VideoLLaMA3, PixelRefer or PixelRefer-Lite that is ready to answer.

  Questions about the same pictures share their prefix; `visual.counts` are the pictures, patches,
  crops and prefixes so far. Of the options, `scene_frames` takes so many frames in equal steps
  (default: one each second, at most 768), and `mask_rule` published lets objects vanish.
  """

  visual: Any

  def __init__(self, *args: Any, **kwargs: Any):
    super().__init__(*args, **kwargs)
    self.visual = PictureVisual(
      self._module, self.params, self._programs, self._placement, self._memory_limit
    )
    image, region = (self.tokenizer.id_of(token) for token in ("<image>", "<REGION>"))
    if image is None or region is None:
      raise InputError("the tokenizer has no <image> or no <REGION>: no tokenizer of this model")
    self.ids = Ids(image, region, self.cfg.region.tokens)

  def answer_samples(self, samples: Sequence[Sample], **options: Any) -> list[tuple[int, ...]]:
    """The generated ids of samples that have been read."""
    groups = [functools.partial(_group, sample) for sample in samples]
    tickets = self.service.submit_read(groups, Options(**options))
    return [ticket.result().token_ids for ticket in tickets]

  def warm_up(
    self, *, question_slots: int = CHUNK, media: Sequence[Any] = (), **options: Any
  ) -> None:
    """Compiles the tower, and all that questions of up to so many tokens about such media need.

    What comes behind the tower has the sizes of the pictures.

    Args:
      media: videos or images of the sizes that will be asked about, as `ask` takes them. One object
        is marked on each, in its middle.

    Raises:
      InputError: an option, or media that cannot be read or do not fit the memory.
    """
    settings = Options(**options)
    with self.device:
      self.visual.compile()
    middle = Region(box=("30%", "30%", "70%", "70%"), frame=0)
    requests = enumerate(Request(one, "What is <region>?", [middle]) for one in media)
    for group in self.reader(settings).ahead(requests):
      if not isinstance(group, Group):
        raise group[1]
      (question,) = group.questions
      with self.device:
        self._see(group, [question])
        prefix, least = self._lane(question)
        for slots in classes(max(question_slots, least)):
          self.engine_for(self.sizes_of_lane(settings, (prefix, slots)))

  def declare(self, options: Options, **sizes: Any) -> None:
    """Compiles the tower; what comes behind it has the sizes of the pictures."""
    with self.device:
      self.visual.compile()

  def object_similarity(self, request: Any) -> Any:
    raise InputError("the objects of this model are crops, which are not merged over frames")

  def rules(self, options: Options) -> NavitRules:
    """How requests are read."""
    frames = options.scene_frames
    return NavitRules(
      crop=CROP_RULES[self.cfg.region.kind],
      tokens=self.cfg.region.tokens,
      max_length=self.cfg.img.max_tokens,
      fps=1.0 if frames is None else None,
      max_frames=MAX_FRAMES if frames is None else frames,
      frame_rule="filter",
      max_ids=None,
      published=options.mask_rule == "published",
    )

  def reader(self, options: Options) -> PictureReader:
    scenes = self.visual.scenes
    return PictureReader(self.tokenizer, self.rules(options), options, self.notice, scenes)

  def _split(self, sample: Sample) -> int:
    """Where the prefix ends: behind the scene, or before an object that comes earlier."""
    is_image, is_region = sample.ids == self.ids.image, sample.ids == self.ids.region
    first = int(np.argmax(is_region)) if is_region.any() else len(sample.ids) - 1
    last = int(np.flatnonzero(is_image)[-1]) + 1 if is_image.any() else first
    return last if last <= first else min(first, int(np.argmax(is_image)))

  def _lane(self, question: Question, more: int = 0) -> tuple[int, int]:
    """Slots of the prefix, and of what follows it."""
    sample = _sample(question)
    split = self._split(sample)
    return bucket(split), classes(len(sample.ids) - split + more)[-1]

  def sizes_of_lane(self, options: Options, lane: tuple[int, int]) -> Sizes:
    return self._row_sizes(options, *lane)

  def seeing(
    self, group: Group, questions: Sequence[Question]
  ) -> Generator[None, None, tuple[Prefix, list[ObjectTokens]]]:
    yield  # the whole is one unit
    (question,) = questions
    sample = _sample(question)
    split = self._split(sample)
    slots, _ = self._lane(question)
    share = group.video is not None
    prefix, crops = self.visual.see(sample, split, slots, self.ids, share)
    none = np.zeros((0, 0), np.float32)
    return prefix, [ObjectTokens(tokens, none, np.zeros(1, np.int32)) for tokens in crops]

  def _prompt(
    self,
    question: Question,
    prefix: Prefix,
    objects: Sequence[ObjectTokens],
    call: Call,
  ) -> Prompt:
    """What follows the prefix: text, object tokens, and scene tokens that come behind objects."""
    sample = _sample(question)
    tail = sample.ids[self._split(sample) :]
    is_image, is_region = tail == self.ids.image, tail == self.ids.region
    later = getattr(prefix, "later", None)
    is_visual = is_region if later is None else is_region | is_image
    visual = np.zeros((len(tail), self.cfg.llm.width), np.float32)
    if objects:
      visual[is_region] = np.concatenate([o.tokens for o in objects]).astype(np.float32)
    if later is not None:
      visual[is_image] = later
    kept = ~np.isnan(visual[:, 0])  # the compressor dropped the others
    tokens = np.where(is_visual, 0, tail).astype(np.int32)
    visual = visual.astype(self.cfg.region.dtype)
    arrays = tokens[kept], visual[kept], is_visual[kept]
    return Prompt(question.index, prefix, *arrays, **self._choosing(question, call))

  def _objects_of(self, entry: Any) -> Iterator[dict[str, Any]]:
    question, tokens = entry.question, {}
    for name, frames, seen in zip(question.names, question.objects, entry.objects, strict=True):
      tokens.setdefault(name, []).extend([list(frames)] * len(seen.tokens))
    yield from ({"name": name, "tokens": of_name} for name, of_name in tokens.items())


def _group(sample: Sample, index: int) -> Group:
  """A sample as a group of one question."""
  return Group(Clip({}, (), ()), None, sample.ids, [picture_question(index, sample)])


def _sample(question: Question) -> Sample:
  assert isinstance(question, PictureQuestion)  # this model's reader makes no others
  return question.sample
