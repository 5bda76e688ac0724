"""Asking a model about objects in a video: `load`, then `Model.ask`, `ask_many`, `describe`."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data_pipes import batch as batches
from data_pipes.batch import Clip, Needs, Row, RowShape
from data_pipes.bench_prompts import DESCRIBE
from data_pipes.clips import read_clip
from data_pipes.errors import InputError
from data_pipes.prompts import Text, question_prompt
from data_pipes.tokenizer import REGION, Tokenizer
from data_pipes.video import open_video
from vr_jax.inference import generate
from vr_jax.inference.regions import Region, objects_of, warnings_of
from vr_jax.inference.sampling import Sampling
from vr_jax.models.connector import scene_token_count
from vr_jax.models.decoder import KVCache
from vr_jax.models.videorefer import VideoRefer, VideoReferConfig

ASSETS = Path(__file__).parent.parent / "assets"  # packaged models, one folder each


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
class _Prepared:
  """A request, read: what its row is built from."""

  text: Text
  clip: Clip
  names: tuple[str, ...]
  warnings: tuple[str, ...]


class Model:
  """A model that is ready to answer.

  Attributes:
    cfg, params, tokenizer: the model.
    eos_ids, pad_id, sampling: how it decodes unless asked otherwise.
    notice: a warning that goes with every answer ("" for none).
  """

  def __init__(
    self,
    cfg: VideoReferConfig,
    params: Mapping[str, Any],
    tokenizer: Tokenizer,
    generation: Mapping[str, Any] | None = None,
    notice: str = "",
  ):
    """`generation` may hold eos_ids, pad_id and repetition_penalty, as checkpoints do."""
    settings = dict(generation or {})
    self.cfg, self.tokenizer, self.notice = cfg, tokenizer, notice
    self.params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    self.eos_ids = tuple(settings.get("eos_ids") or ())
    if not self.eos_ids and tokenizer.eos_id is not None:
      self.eos_ids = (tokenizer.eos_id,)
    pad = settings.get("pad_id")
    self.pad_id = int(tokenizer.pad_id or 0) if pad is None else int(pad)
    self.sampling = Sampling(repetition_penalty=settings.get("repetition_penalty") or 1.0)
    self._module = VideoRefer(cfg)
    self._segments = jax.jit(
      lambda params, rows: self._module.apply({"params": params}, rows, method="object_similarity")[
        1
      ]
    )

  def ask(
    self, video: Any, question: str, regions: Sequence[Region] = (), **options: Any
  ) -> Answer:
    """Answers one question.

    Args:
      video: path of a video, GIF, image or folder of frames, or a list or array of RGB frames.
      question: holds one `<region>` for each object; the i-th takes the i-th object.
      regions: what marks the objects; regions with one name are one object on several frames.
      **options: of `ask_many`.

    Raises:
      InputError: the video, a region or the question is not usable; one line says why.
    """
    return self.ask_many([Request(video, question, regions)], **options)[0]

  def describe(self, video: Any, regions: Sequence[Region], **options: Any) -> Answer:
    """Describes one object in detail, with the prompt of VideoRefer-Bench-D."""
    return self.ask(video, DESCRIBE, regions, **options)

  def ask_many(
    self,
    requests: Sequence[Request],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    scene_frames: int | None = None,
    batch_size: int = 8,
  ) -> list[Answer]:
    """Answers many questions, `batch_size` at a time.

    Greedy answers (temperature 0) are those that `ask` would give each alone; sampled ones are a
    function of `seed` and the request's place in the list. `scene_frames` is the number of scene
    frames, by default that of the training.
    """
    if max_new_tokens < 1:
      raise InputError(f"max_new_tokens={max_new_tokens}; accepted: 1 or more")
    try:
      sampling = dataclasses.replace(
        self.sampling, temperature=temperature, top_k=top_k, top_p=top_p
      )
    except ValueError as error:
      raise InputError(str(error)) from None
    scene = self.cfg.num_frames if scene_frames is None else scene_frames
    if self._scene_tokens(scene) < 1:
      raise InputError(f"scene_frames={scene} gives no scene token; accepted: 2 or more")
    keys = jax.random.split(jax.random.key(seed), max(len(requests), 1))
    answers: list[Answer] = []
    for first in range(0, len(requests), batch_size):
      chunk = [self._prepare(request, scene) for request in requests[first : first + batch_size]]
      rows = self._rows(chunk, scene)
      tokens, lengths = self._generate(
        rows, max_new_tokens, sampling, keys[first : first + len(chunk)]
      )
      segments = np.asarray(self._segments(self.params, rows))
      for i, prepared in enumerate(chunk):
        ids = tuple(int(t) for t in tokens[i, : lengths[i]])
        answers.append(self._finish(prepared, ids, segments[i]))
    return answers

  def object_similarity(self, request: Request) -> list[tuple[np.ndarray, np.ndarray]]:
    """How the tokens of each object came about (Fig. 7 of the paper).

    Returns for each object the cosine similarity of its F frames, float32 [F, F], and the token
    that each frame was merged into, int32 [F].
    """
    scene = self.cfg.num_frames
    prepared = self._prepare(request, scene)
    found = self._module.apply(
      {"params": self.params}, self._rows([prepared], scene), method="object_similarity"
    )
    matrices, segments = (np.asarray(x[0]) for x in found)
    counts = [len(masks) for masks in prepared.clip.objects]
    return [(m[:n, :n], s[:n]) for n, m, s in zip(counts, matrices, segments, strict=False)]

  def _scene_tokens(self, scene: int) -> int:
    return scene_token_count(self.cfg.connector, scene, self.cfg.img.grid)

  def _shape(self, needs: Sequence[Needs], scene: int) -> RowShape:
    """A shape that holds the rows, rounded up so that few programs are compiled."""
    shape = batches.fit_shape(
      needs,
      image_size=self.cfg.img.image_size,
      grid=self.cfg.img.grid,
      tokens_per_object=self.cfg.region.tokens,
      scene_tokens=self._scene_tokens(scene),
      scene=scene,
      frames_multiple=8,
      object_frames_multiple=8,
    )
    return dataclasses.replace(shape, length=generate.bucket(shape.length))

  def _prepare(self, request: Request, scene: int) -> _Prepared:
    video = open_video(request.video)
    marked = objects_of(request.regions, video)
    objects = [m.masks for m in marked] + list(request.annotation)
    names = [m.name for m in marked]
    names += [f"object {i}" for i in range(len(names), len(objects))]
    found = request.question.count(REGION)
    if found != len(objects):
      raise InputError(
        f"question {request.question!r}: found {found} {REGION} but {len(objects)} objects; "
        f"accepted: one {REGION} for each object"
      )
    image = video.kind == "image"
    _, text = question_prompt(request.question, self.tokenizer, "image" if image else "video")
    clip = read_clip(
      request.video,
      self._shape([], scene),
      objects,
      image=image,
      aspect_ratio=self.cfg.image_aspect_ratio,
    )
    warnings = warnings_of(marked, self.cfg.img.grid, self.cfg.image_aspect_ratio)
    return _Prepared(text, clip, tuple(names), tuple(filter(None, [self.notice, *warnings])))

  def _rows(self, chunk: Sequence[_Prepared], scene: int) -> Row:
    region_id = self.tokenizer.region_id
    shape = self._shape([batches.needs(p.text, p.clip, region_id) for p in chunk], scene)
    return batches.collate([batches.build_row(p.text, p.clip, shape, region_id) for p in chunk])

  def _generate(
    self, rows: Row, max_new_tokens: int, sampling: Sampling, keys: jax.Array
  ) -> tuple[np.ndarray, np.ndarray]:
    B, L = rows["tokens"].shape
    cache = KVCache.empty(self.cfg.llm, B, generate.bucket(L + max_new_tokens))
    logits, cache = generate.prefill(self._module, self.params, rows, cache)
    return generate.generate(
      self._module,
      self.params,
      logits,
      cache,
      max_new_tokens=max_new_tokens,
      eos_ids=self.eos_ids,
      pad_id=self.pad_id,
      sampling=sampling,
      keys=keys,
    )

  def _finish(self, prepared: _Prepared, ids: tuple[int, ...], segments: np.ndarray) -> Answer:
    objects = []
    for name, masks, of_frame in zip(prepared.names, prepared.clip.objects, segments, strict=False):
      tokens: dict[int, list[int]] = {}
      for number, segment in zip(masks, of_frame, strict=False):
        tokens.setdefault(int(segment), []).append(int(number))
      objects.append({"name": name, "tokens": [tokens[s] for s in sorted(tokens)]})
    return Answer(
      text=self.tokenizer.decode(ids, skip_special=True).strip(),
      token_ids=ids,
      scene_frames=tuple(int(n) for n in prepared.clip.scene),
      objects=tuple(objects),
      warnings=prepared.warnings,
    )


def load(source: str | Path | None = None) -> Model:
  """Loads a model.

  Args:
    source: a work directory of `vr train` or one of its checkpoints, a folder of the published
      VideoRefer, or the name of a packaged model. None is the packaged `vr-mini`.

  Raises:
    InputError: nothing there that is a model.
  """
  from vr_jax.interop import videorefer
  from vr_jax.training import checkpoint

  name = "vr-mini" if source is None else str(source)
  path = Path(name)
  packaged = ASSETS / name
  notice = ""
  if not path.exists() and packaged.is_dir():
    path = packaged
    notice = (
      f"{name} is a demonstration model, trained on small synthetic videos of moving shapes; "
      "its answers about other videos mean nothing"
    )
  if videorefer.is_published(path):
    published = videorefer.load(path)
    return Model(
      published.config,
      published.params,
      Tokenizer.from_folder(path),
      dataclasses.asdict(published.generation),
    )
  if not path.exists():
    known = ", ".join(sorted(p.name for p in ASSETS.glob("*") if p.is_dir()))
    raise InputError(
      f"checkpoint {name!r}: no such folder; accepted: a work directory or checkpoint of vr train, "
      f"a folder of the published VideoRefer, or a packaged model ({known})"
    )
  read = checkpoint.load_for_inference(path)
  cfg = VideoReferConfig.from_dict(read.model)
  tokenizer = checkpoint.make_tokenizer(read.tokenizer_files)
  return Model(cfg, read.params, tokenizer, read.generation, notice)
