"""A benchmark put to the parameters that train, as `vr eval` would put it to their checkpoint.

    items ─ Reader ─► rows of one shape ─ prefill ─┬─ decode ───────────────► texts ─┐
                                                   └─ extend by each label ─► sums ──┴─► score

The step's parameters are used where they lie, in the layout for training: no second copy of them,
no prefix shared between questions, one program. `vr eval` holds the weights in a layout of its own
and is the faster one for a whole benchmark; the answers are the same.

Letters: B row, L slot, O option, K slot of a label.
"""

import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from data_pipes.batch import Clip, Needs, fit_shape, place
from data_pipes.errors import InputError
from data_pipes.prompts import question_prompt
from vr_jax.checkpoint import make_tokenizer
from vr_jax.evaluation.benchmarks import registry
from vr_jax.evaluation.items import Item, Prediction
from vr_jax.evaluation.reading.strict import labelled
from vr_jax.evaluation.run import limited
from vr_jax.evaluation.scoring.settings import ScoreSettings
from vr_jax.evaluation.settings import CaptionSettings, JudgeSettings
from vr_jax.inference import generate
from vr_jax.inference.options import Options
from vr_jax.inference.reading import Group, Question, Reader
from vr_jax.inference.sampling import Sampling
from vr_jax.models.decoder import KVCache
from vr_jax.models.videorefer import VideoRefer, VideoReferConfig
from vr_jax.params import Params, merge
from vr_jax.sharding import batch_sharding
from vr_jax.training.batches import Kept, on_mesh
from vr_jax.training.step import TrainState
from vr_jax.training.task import Rows, Task
from vr_jax.training.videorefer_task import row_sizes

log = logging.getLogger(__name__)
UNREADABLE = "unusable: it could not be read"


class Questions:
  """One benchmark of `config.evals`: its metrics with `_low`, `_high`, `_n`, and `n`, the items."""

  def __init__(self, config: ConfigDict, task: Task, mesh: Mesh, rows: int, options: ConfigDict):
    """Reads the questions. Raises InputError: they cannot be put to this model."""
    self._cfg, self._tokenizer = _model_of(task)
    self._bench = registry.benchmark(options.benchmark)
    self._mode, self._rows = options.get("mode") or "multi", rows
    self._parser = options.get("parser") or "strict"
    self._by_likelihood = options.get("by") == "likelihood"
    kind = self._bench.kind
    if not kind.graded and kind.name != "caption":
      raise InputError(f"{self._bench.title} needs a judge; accepted: vr eval, then vr score")
    if self._by_likelihood and not kind.graded:
      raise InputError(f"by='likelihood': {self._bench.title} has no options to choose from")
    data = registry.read(
      self._bench,
      options.data,
      options.get("media"),
      options.get("split") or "",
      region=self._cfg.region.kind,
    )
    self._items, self._media = limited(data.items, options.get("limit")), data.media
    self._shape = fit_shape(
      map(self._needs, self._items), scene=self._cfg.num_frames, **row_sizes(self._cfg)
    )
    self._reader = Reader(
      self._tokenizer,
      self._shape,
      Options(mask_rule=config.input.mask_rule),
      aspect_ratio=self._cfg.image_aspect_ratio,
    )
    self._batches = Kept(self._read)
    self._sharding = batch_sharding(mesh, config.sharding_rules)
    model = VideoRefer(self._cfg, rules=config.sharding_rules)
    if self._by_likelihood:
      program = _likelihoods(model)
    else:
      settings = dict(task.generation)
      eos = tuple(settings.get("eos_ids") or ()) or (self._tokenizer.eos_id,)
      pad = settings.get("pad_id")
      program = _answers(
        model,
        options.get("new_tokens") or self._bench.new_tokens,
        tuple(int(i) for i in eos if i is not None),
        int(self._tokenizer.pad_id or 0) if pad is None else int(pad),
        Sampling(repetition_penalty=settings.get("repetition_penalty") or 1.0),
      )
    self._program = jax.jit(program, out_shardings=NamedSharding(mesh, P()))

  def __call__(self, state: TrainState) -> dict[str, float]:
    predictions: dict[int, Prediction] = {}
    outputs = [
      self._program(state.params_train, state.params_frozen, on_mesh(rows, self._sharding))
      for rows in self._batches
    ]
    for number, readable, *answers in (row for o in outputs for row in zip(*o, strict=True)):
      if number >= 0:
        item = self._items[number]
        predictions[int(number)] = (
          self._prediction(item, *answers)
          if readable
          else Prediction.for_item(item, None, error=UNREADABLE)
        )
    return self._scores([predictions[i] for i in range(len(self._items))])

  def _prediction(self, item: Item, *answer: np.ndarray) -> Prediction:
    if self._by_likelihood:
      labels = _labels(item)
      scores = tuple(answer[0][: len(labels)].tolist())
      return Prediction.for_item(item, labels[scores.index(max(scores))], likelihoods=scores)
    tokens, length = answer
    text = self._tokenizer.decode(tokens[: int(length)].tolist(), skip_special=True)
    return Prediction.for_item(item, text.strip())

  def _scores(self, predictions: list[Prediction]) -> dict[str, float]:
    """The metrics of all items under their names, those of a type under `<name>/<type>`."""
    if all(p.error for p in predictions):
      raise InputError(f"none of {len(predictions)} items of {self._bench.title} could be read")
    settings = ScoreSettings(
      self._parser,
      Path(),
      Path(),
      JudgeSettings(),
      CaptionSettings(meteor=False),
      lambda text: None,
    )
    result = self._bench.kind.score(self._bench, predictions, {}, settings)
    values: dict[str, float] = {"n": len(predictions)}
    for metric in result.metrics:
      name = metric.name if metric.slice == "All" else f"{metric.name}/{metric.slice}"
      if metric.value is None or name in values:  # the first interval of several stands
        continue
      values |= {name: metric.value, f"{name}_n": metric.n}
      if metric.ci_low is not None and metric.ci_high is not None:
        values |= {f"{name}_low": metric.ci_low, f"{name}_high": metric.ci_high}
    return values

  # --- From items to rows ---------------------------------------------------------------------

  def _needs(self, item: Item) -> Needs:
    """What an item takes of a row, without opening its media: at least that."""
    _, text = question_prompt(item.question, self._tokenizer, "video")
    regions = int((text.ids == self._tokenizer.region_id).sum())
    try:
      objects = item.masks(self._mode)
    except InputError:
      objects = []  # refused when it is read
    return Needs(
      frames=self._cfg.num_frames + len({number for masks in objects for number in masks}),
      scene=self._cfg.num_frames,
      objects=len(objects),
      object_frames=max(map(len, objects), default=0),
      text_ids=len(text.ids) - 1 - regions,
    )

  def _read(self) -> Iterator[Rows]:
    """This process's rows of all batches; `number` says which item a row is, -1 for none."""
    P = jax.process_count()
    mine = list(range(jax.process_index(), len(self._items), P))
    filled = self._filled(mine)
    for _ in range(-(-len(self._items) // self._rows)):
      batch = self._empty()
      for b, write in zip(range(len(batch["number"])), filled, strict=False):
        write(batch, b)
      yield batch

  def _filled(self, numbers: list[int]) -> Iterator[Callable[[Rows, int], None]]:
    """What writes each of these items into row b of a batch, as they are read."""
    requests = {}
    for number in numbers:
      try:
        requests[number] = self._items[number].request(
          self._media, self._mode, self._cfg.num_frames
        )
      except InputError as error:
        yield self._refusal(number, error)
    for group in self._reader.ahead(requests.items()):
      if not isinstance(group, Group):
        yield self._refusal(*group)
        continue
      for question in group.questions:
        clip = Clip(group.clip.frames, group.clip.scene, question.objects)
        yield functools.partial(self._fill, question, clip)

  def _fill(self, question: Question, clip: Clip, batch: Rows, b: int) -> None:
    row = {name: array[b] for name, array in batch.items()}  # views
    try:
      place(row, question.text, clip, self._shape, self._tokenizer.region_id)
    except InputError as error:
      self._refusal(question.index, error)(batch, b)
      return
    batch["number"][b], batch["readable"][b] = question.index, True
    if self._by_likelihood:
      for o, label in enumerate(_labels(self._items[question.index])):
        ids = self._tokenizer.encode(label)
        row["options"][o, : len(ids)] = ids

  def _refusal(self, number: int, error: InputError) -> Callable[[Rows, int], None]:
    log.warning("%s: %s", self._items[number].where, error)

    def write(batch: Rows, b: int) -> None:
      batch["number"][b] = number

    return write

  def _empty(self) -> Rows:
    B = self._rows // jax.process_count()
    rows = self._shape.empty(B)
    rows |= {"number": np.full(B, -1, np.int32), "readable": np.zeros(B, bool)}
    if self._by_likelihood:
      options = [_labels(item) for item in self._items]
      longest = max(len(self._tokenizer.encode(label)) for one in options for label in one)
      rows["options"] = np.full((B, max(map(len, options)), longest), -1, np.int32)
    return rows


def _model_of(task: Task) -> tuple[VideoReferConfig, Any]:
  """The model and the tokenizer of a task that answers questions about videos."""
  if "img" not in task.model or not task.tokenizer_files:
    raise InputError("the task's model answers no questions; accepted: files")
  cfg = VideoReferConfig.from_dict(dict(task.model))
  if cfg.img.kind != "siglip":
    raise InputError(
      "models of pictures of any size are asked by vr eval; accepted in a run: files"
    )
  return cfg, make_tokenizer(task.tokenizer_files)


def _labels(item: Item) -> list[str]:
  return [f"({letter})" for letter in labelled(item.options)[0]]


def _prefilled(model: VideoRefer, params: Params, rows: Any, more: int) -> Any:
  """Logits after each row, and its cache with room for `more` slots."""
  B, L = rows["tokens"].shape
  cache = KVCache.empty(model.cfg.llm, B, L + more)
  return model.apply({"params": params}, rows, cache, method="prefill")


def _answers(
  model: VideoRefer, new_tokens: int, eos_ids: tuple[int, ...], pad_id: int, sampling: Sampling
) -> Callable[..., Any]:
  """(number [B], readable [B], tokens [B,M], lengths [B]) of rows, answered greedily."""

  def answers(params_train, params_frozen, rows):
    params = merge(params_train, params_frozen)
    B = len(rows["tokens"])
    logits, cache = _prefilled(model, params, rows, new_tokens)
    # A row without an item asks for one token, so that the others do not wait for it.
    limits = jnp.where(rows["readable"], new_tokens, 1).astype(jnp.int32)
    keys = jax.random.split(jax.random.key(0), B)
    columns = generate.bucket(new_tokens, smallest=16)
    state = generate.first(logits, cache, limits, keys, sampling.rows(B), columns, eos_ids, pad_id)
    state = generate.decode(model, params, state, new_tokens, False, eos_ids, pad_id)
    return rows["number"], rows["readable"], state.tokens, state.lengths

  return answers


def _likelihoods(model: VideoRefer) -> Callable[..., Any]:
  """(number [B], readable [B], log-likelihood of each option as the answer, nats [B,O])."""

  def likelihoods(params_train, params_frozen, rows):
    params, options = merge(params_train, params_frozen), rows["options"]
    K = options.shape[-1]
    logits, cache = _prefilled(model, params, rows, K)
    start = cache.positions.max(axis=1, keepdims=True) + 1

    def one(label):  # i32 [B,K]
      positions = jnp.where(label >= 0, start + jnp.arange(K), -1)
      after, _ = model.apply(
        {"params": params}, jnp.maximum(label, 0), positions, cache, method="extend"
      )
      before = jnp.concatenate([logits[:, None], after[:, :-1]], axis=1)
      nats = jax.nn.log_softmax(before.astype(jnp.float32))
      each = jnp.take_along_axis(nats, jnp.maximum(label, 0)[..., None], axis=-1)[..., 0]
      return jnp.where(label >= 0, each, 0).sum(axis=1)

    scores = jax.lax.map(one, options.swapaxes(0, 1)).swapaxes(0, 1)
    return rows["number"], rows["readable"], scores

  return likelihoods
