"""Prefixes of videos and tokens of objects, each computed once for all questions.

Letters: C frame of a call, S pixel, N patch, D tower width, T scene frame, V scene token, O object
of a call, F frame of an object, U token of an object, K text slot, E decoder width.

The text before the media and the scene tokens are the causal prefix that all questions about a
video have in common: their keys and values are computed once. Object tokens come behind it, so
only the features under an object's masks are needed. Every call has a fixed shape, so that the
result for one frame or object does not depend on what else was computed with it.
"""

import collections
import dataclasses
import hashlib
import threading
from collections.abc import Generator, Hashable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from vr_jax.inference.placement import FRAME_AXES, Placement
from vr_jax.inference.programs import Programs, bytes_of
from vr_jax.models.decoder import KVCache
from vr_jax.models.videorefer import VideoRefer

FRAMES = 4  # C
OBJECTS = 8  # O
OBJECT_FRAMES = 32  # smallest F; larger ones are four times as large each
KEPT = 8  # prefixes that are kept for the next questions
KEPT_OBJECTS = 256  # objects, half a megabyte each where the decoder is 3584 wide


@dataclasses.dataclass(frozen=True)
class ObjectTokens:
  """Tokens [k,E] of an object, k <= U; its frames pooled [F,D], and the token of each, i32 [F]."""

  tokens: np.ndarray
  pooled: np.ndarray
  segments: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Prefix:
  """Keys and values of one video's prefix: a cache of one row, `length` of its slots in use."""

  cache: KVCache
  length: int


@dataclasses.dataclass(frozen=True, eq=False)
class KnownScene:
  """The scene of a file that was seen before: the hash of its frames, their numbers, its prefix."""

  video: bytes
  scene: Sequence[int]
  prefix: Prefix


class Visual:
  """Encodes frames, objects and prefixes; `counts` says how many of each.

  What was seen of a file is kept by the file, so that a further question about it decodes nothing
  that is known. Threads that read requests ask `known_scene` and `known_object`.
  """

  def __init__(self, module: VideoRefer, params: Any, programs: Programs, placement: Placement):
    self._module, self._params, self._programs = module, params, programs
    self._placement = placement
    self._frames = placement.whole_rows(FRAMES, FRAME_AXES)
    self._kept: collections.OrderedDict[tuple[Hashable, ...], Prefix] = collections.OrderedDict()
    # By the file: the hash and the numbers of its scene frames; and tokens by file and masks.
    self._scenes: dict[Hashable, tuple[bytes, Sequence[int]]] = {}
    self._objects: collections.OrderedDict[Hashable, ObjectTokens] = collections.OrderedDict()
    self._lock = threading.Lock()
    self.memory: int | None = None  # bytes of the prefixes that are kept; None: KEPT of them
    self.counts: collections.Counter[str] = collections.Counter()

  def seeing(
    self,
    frames: Mapping[int, np.ndarray],
    scene: Sequence[int],
    objects: Sequence[Mapping[int, np.ndarray]],
    head: np.ndarray,
    slots: int,
    video: bytes | None = None,
    file: Hashable = None,
    prefix: Prefix | None = None,
  ) -> Generator[None, None, tuple[Prefix, list[ObjectTokens]]]:
    """The prefix of a video and the tokens of objects in it; each frame is encoded once.

    There is a pause after each chunk of frames and after the prefix.

    Args:
      frames: uint8 [S,S,3] by frame number; with `prefix`, those of the objects alone.
      scene: the T frame numbers of the scene; none: a prefix of no video.
      objects: per object its mask uint8 [N] by frame number, in merge order.
      head: ids of the text before the media.
      slots: of the prefix for the head.
      video: hash of the scene frames, by which the prefix is kept for later calls.
      file: what tells the file and its scene from all others, by which they are known later.
      prefix: of the video, where it is known.
    """
    key = (video, tuple(scene), tuple(head), slots)
    if prefix is None and video is not None:
      prefix = self._kept.get(key)
    numbers = dict.fromkeys(() if prefix is not None else scene)
    numbers |= dict.fromkeys(number for masks in objects for number in masks)
    keep = 0 if prefix else len(set(scene))
    chunks, pooled = yield from self._encode(frames, list(numbers), objects, keep)
    if prefix is None:
      place = {number: i for i, number in enumerate(numbers)}
      prefix = self._prefill(head, slots, chunks, [place[number] for number in scene])
      yield
    tokens = self._merge(objects, pooled)
    if video is not None:
      self._keep(key, prefix, file, zip(objects, tokens, strict=True))
    return prefix, tokens

  def nothing(self, slots: int) -> Prefix:
    """The prefix of no video, in so many slots."""
    llm = self._module.cfg.llm

    def empty():
      return KVCache.empty(llm, 1, slots).replace(fresh=False)

    cache = self._programs(("nothing", slots), empty, out=self._placement.prefix(llm))()
    return Prefix(cache, 0)

  @property
  def kept_bytes(self) -> int:
    """Of the prefixes that are kept."""
    with self._lock:
      return sum(bytes_of(prefix.cache) for prefix in self._kept.values())

  def known_scene(self, file: Hashable, head: np.ndarray, slots: int) -> KnownScene | None:
    """The scene of a file, if its prefix behind the text `head` in so many slots is kept."""
    with self._lock:
      if file not in self._scenes:
        return None
      video, scene = self._scenes[file]
      prefix = self._kept.get((video, tuple(scene), tuple(head), slots))
    return None if prefix is None else KnownScene(video, scene, prefix)

  def known_object(self, file: Hashable, masks: Mapping[int, np.ndarray]) -> ObjectTokens | None:
    """The tokens of an object of a file by its masks uint8 [N], if they are kept."""
    with self._lock:
      return self._objects.get((file, _masks_hash(masks)))

  def _keep(self, key, prefix, file, objects) -> None:
    with self._lock:
      self._kept[key] = prefix
      self._kept.move_to_end(key)
      while is_full(self._kept, self.memory):
        self._kept.popitem(last=False)
      if file is None:
        return
      self._scenes[file] = key[:2]
      kept_videos = {key[0] for key in self._kept}
      self._scenes = {f: known for f, known in self._scenes.items() if known[0] in kept_videos}
      for masks, tokens in objects:
        self._objects[file, _masks_hash(masks)] = tokens
      while len(self._objects) > KEPT_OBJECTS:
        self._objects.popitem(last=False)

  def forget(self) -> None:
    """Drops what is kept, and begins to count anew."""
    with self._lock:
      self._kept.clear()
      self._scenes.clear()
      self._objects.clear()
    self.counts.clear()

  def compile(self, scene: int, slots: int) -> None:
    """Compiles what a video with `scene` scene frames and so many slots before it needs."""
    self._programs_of_objects(OBJECT_FRAMES)
    self._program_of_prefix(scene, slots)

  def _encode(self, frames, numbers, objects, keep):
    """Features of the first `keep` frames, by chunks of C, and {(object, frame): pooled [D]}."""
    encode, pool, _ = self._programs_of_objects(OBJECT_FRAMES)
    region = {"region": self._params["region"]}
    N, C = self._module.cfg.img.grid**2, self._frames
    size = self._module.cfg.img.image_size
    marks: dict[int, list[tuple[int, np.ndarray]]] = collections.defaultdict(list)
    for i, masks in enumerate(objects):
      for number, mask in masks.items():
        marks[number].append((i, mask))
    chunks, pooled_chunks = [], []
    for first in range(0, len(numbers), C):
      part = numbers[first : first + C]
      pixels = np.zeros((C, size, size, 3), np.uint8)
      for place, number in enumerate(part):
        pixels[place] = frames[number]
      features = encode(self._params, pixels)
      self.counts["frames"] += len(part)
      if first < keep:
        chunks.append(features)
      for turn in range(0, max(len(marks[number]) for number in part), OBJECTS):
        masks = np.zeros((C, OBJECTS, N), np.uint8)
        names = {}
        for place, number in enumerate(part):
          for j, (i, mask) in enumerate(marks[number][turn : turn + OBJECTS]):
            masks[place, j], names[i, number] = mask, (place, j)
        pooled_chunks.append((names, pool(region, features, masks)))
      yield
    pooled = {}
    for names, values in pooled_chunks:  # last, so that the device need not wait for the host
      fetched = np.asarray(values)
      pooled |= {name: fetched[at] for name, at in names.items()}
    return chunks, pooled

  def _prefill(self, head: np.ndarray, slots: int, chunks: list, places: list[int]) -> Prefix:
    run = self._program_of_prefix(len(places), slots)
    chunks += chunks[:1] * (-(-len(places) // self._frames) - len(chunks))
    padded = np.zeros((1, slots), np.int32)
    padded[0, : len(head)] = head
    valid = np.arange(slots)[None] < len(head)
    cache = run(self._params, tuple(chunks), np.asarray(places, np.int32), padded, valid)
    self.counts["prefixes"] += 1
    return Prefix(cache, len(head) + cache.positions.shape[1] - slots)

  def _merge(self, objects, pooled) -> list[ObjectTokens]:
    done: list[ObjectTokens] = []
    for first in range(0, len(objects), OBJECTS):
      part = objects[first : first + OBJECTS]
      F = OBJECT_FRAMES
      while any(len(masks) > F for masks in part):
        F *= 4
      merge = self._programs_of_objects(F)[2]
      x = np.zeros((OBJECTS, F, self._module.cfg.img.width), np.float32)
      valid = np.zeros((OBJECTS, F), bool)
      for i, masks in enumerate(part):
        for j, number in enumerate(masks):
          x[i, j], valid[i, j] = pooled[first + i, number], True
      tokens, kept, segments = map(np.asarray, merge(self._params, x, valid))
      self.counts["objects"] += len(part)
      for i, masks in enumerate(part):
        n = len(masks)
        done.append(ObjectTokens(tokens[i][kept[i]], x[i, :n], segments[i, :n]))
    return done

  # --- Programs -------------------------------------------------------------------------------

  def _programs_of_objects(self, object_frames: int):
    cfg, array, C = self._module.cfg, self._placement.array, self._frames
    N, D, S = cfg.img.grid**2, cfg.img.width, cfg.img.image_size
    features = array((C, N, D), cfg.img.dtype, FRAME_AXES)

    def encode(params, pixels):
      return self._apply(params, pixels[None], method="encode_frames")[0]

    def pool(params, features, masks):
      return self._apply(params, features, masks, method="pool_objects")

    def merge(params, pooled, valid):
      return self._apply(params, pooled, valid, method="object_tokens")

    pixels = array((C, S, S, 3), "uint8", FRAME_AXES)
    masks = array((C, OBJECTS, N), "uint8", FRAME_AXES)
    pooled = array((OBJECTS, object_frames, D), "float32")
    valid = array((OBJECTS, object_frames), bool)
    programs, params, out = self._programs, self._params, self._placement.whole
    return (
      programs("encode", encode, params, pixels, out=features.sharding),
      programs("pool", pool, {"region": params["region"]}, features, masks, out=out),
      programs(("merge", object_frames), merge, params, pooled, valid, out=out),
    )

  def _program_of_prefix(self, scene: int, slots: int):
    llm, array = self._module.cfg.llm, self._placement.array

    def prefill(params, chunks, places, head, valid):
      tokens = self._scene_tokens(params, chunks, places)
      cache = KVCache.empty(llm, 1, slots + tokens.shape[1])
      return self._apply(params, head, valid, tokens, cache, method="prefill_scene")

    arguments = (
      self._params,
      *self._scene_arguments(scene),
      array((1, slots), "int32"),
      array((1, slots), bool),
    )
    out = self._placement.prefix(llm)
    return self._programs(("prefill", scene, slots), prefill, *arguments, out=out)

  def _scene_tokens(self, params, chunks, places):
    features = jnp.concatenate(chunks)[places]
    return self._apply(params, features[None], method="scene_tokens")

  def _scene_arguments(self, scene: int):
    cfg, C = self._module.cfg.img, self._frames
    chunk = self._placement.array((C, cfg.grid**2, cfg.width), cfg.dtype, FRAME_AXES)
    return (chunk,) * -(-scene // C), self._placement.array((scene,), "int32")

  def _apply(self, params, *args, method):
    return self._module.apply({"params": params}, *args, method=method)


def is_full(kept: Mapping[Any, Prefix], memory: int | None) -> bool:
  """Whether the prefix that was longest not asked for has to go; the last one stays."""
  if memory is None:
    return len(kept) > KEPT
  return sum(bytes_of(prefix.cache) for prefix in kept.values()) > memory and len(kept) > 1


def _masks_hash(masks: Mapping[int, np.ndarray]) -> bytes:
  content = hashlib.blake2b(digest_size=16)
  for number, cells in masks.items():
    content.update(b"%d:" % number + np.ascontiguousarray(cells).tobytes())
  return content.digest()


def head_slots(count: int) -> int:
  """Slots of the text before the media: its length, rounded up so that few programs are needed."""
  return -(-max(count, 1) // 16) * 16
