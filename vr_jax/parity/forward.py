"""Golden stages 05 and 07 and the benchmark scripts: forward pass, loss, greedy generation."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from data_pipes import batch as batches
from data_pipes.batch import Clip, Row
from data_pipes.errors import InputError
from data_pipes.masks import mask_to_grid, segmentation_to_mask
from data_pipes.prompts import IGNORE, MEDIA_IDS, Text, question_prompt
from data_pipes.tokenizer import Tokenizer
from vr_jax.evaluation.benchmarks import registry
from vr_jax.evaluation.benchmarks.videorefer import published_record
from vr_jax.evaluation.items import Item, Prediction
from vr_jax.inference import generate
from vr_jax.inference.model import Model
from vr_jax.inference.requests import Answer
from vr_jax.inference.sampling import Sampling, penalize
from vr_jax.interop import videorefer
from vr_jax.loading import load
from vr_jax.models.connector import scene_token_count
from vr_jax.models.decoder import KVCache
from vr_jax.models.videorefer import VideoRefer
from vr_jax.parity.golden import (
  Case,
  CaseResult,
  Golden,
  Produced,
  Refused,
  compare_cases,
  exact,
)
from vr_jax.training.loss import model_loss


class Published:
  """The checkpoint of a golden folder, ready to run, and how its cases become rows."""

  def __init__(self, golden: Golden):
    loaded = videorefer.load(golden.checkpoint)
    self.cfg, self.params = loaded.config, jax.tree.map(jnp.asarray, loaded.params)
    self.model = VideoRefer(self.cfg)
    self.tokenizer = Tokenizer.from_folder(golden.checkpoint)

  @functools.cached_property
  def forward(self):
    """(params, rows) -> (logits of every slot, spliced rows)."""

    def run(params, rows):
      hidden, spliced = self.model.apply({"params": params}, rows)
      return self.model.apply({"params": params}, hidden, method="logits"), spliced

    return jax.jit(run)

  def rows(self, texts: list[Text], clips: list[Clip | None], cases: str) -> Row:
    """A batch of the given dialogues, in the smallest shape that holds them."""
    pairs = list(zip(texts, clips, strict=True))
    scene = max((len(c.scene) for c in clips if c), default=self.cfg.num_frames)
    needs = [batches.needs(t, c, self.tokenizer.region_id, cases) for t, c in pairs]
    shape = batches.fit_shape(
      needs,
      image_size=self.cfg.img.image_size,
      grid=self.cfg.img.grid,
      tokens_per_object=self.cfg.region.tokens,
      scene_tokens=scene_token_count(self.cfg.connector, scene, self.cfg.img.grid),
      scene=scene,
      length_multiple=64,  # cases share compiled programs
      frames_multiple=8,
      object_frames_multiple=8,
    )
    return batches.collate(
      [batches.build_row(t, c, shape, self.tokenizer.region_id, cases) for t, c in pairs]
    )

  def clip(
    self,
    scene: np.ndarray | None,
    frames: np.ndarray | None = None,
    masks: np.ndarray | None = None,
    ann_indices: list[list[int]] | None = None,
  ) -> Clip | None:
    """Golden arrays of one sample as a clip.

    scene u8 [T,3,S,S] ([3,S,S] or T=1: an image), frames u8 [F,3,S,S], masks [n,H,W] (object-major)
    and per object the positions of its frames.
    """
    if scene is None:
      return None
    image = scene.ndim == 3 or len(scene) == 1
    scene = rearrange(scene[None] if scene.ndim == 3 else scene, "t c h w -> t h w c")
    numbers = [0] * self.cfg.num_frames if image else list(range(len(scene)))
    frames_by_number = dict(enumerate(scene))
    objects: list[dict[int, np.ndarray]] = []
    entry = 0
    for positions in ann_indices or []:
      objects.append({})
      for position in positions:
        number = len(scene) + entry  # each (object, frame) pair has a frame of its own
        frames_by_number[number] = rearrange(frames[position], "c h w -> h w c")
        cells = mask_to_grid(
          masks[entry], self.cfg.img.grid, self.cfg.image_aspect_ratio, "published"
        )
        objects[-1][number] = cells.reshape(-1)
        entry += 1
    return Clip(frames_by_number, numbers, objects)


def to_u8(pixels: np.ndarray) -> np.ndarray:
  """Normalised pixels back to the uint8 they came from (zero images come to 128)."""
  return np.round((pixels * 0.5 + 0.5) * 255).astype(np.uint8)


def _u8(case: Case, name: str) -> np.ndarray | None:
  """An image array that is stored as `<name>_u8`, or as floats where a zero image is in it."""
  if f"{name}_u8" in case:
    return case[f"{name}_u8"]
  return to_u8(case[name]) if name in case else None


# --- 05_forward -------------------------------------------------------------------------------


def forward(golden: Golden) -> Iterator[CaseResult]:
  """Embeddings after the splice, logits, negative log-likelihoods and loss."""
  published = Published(golden)
  return compare_cases(golden.cases("05_forward"), functools.partial(_forward, published))


def training_rows(published: Published, case: Case) -> Row:
  """The batch of a `b_*` case: as many samples as `input_ids` has rows."""
  texts, clips = [], []
  frames = _u8(case, "frame")
  mask = case["attention_mask"].astype(bool)
  for i, ids in enumerate(case["input_ids"]):
    text = Text(ids[mask[i]], case["labels"][i][mask[i]])
    clip = None
    scene, masks = _u8(case, f"images_{i}"), case[f"masks_{i}"]
    tags = np.flatnonzero(np.isin(text.ids, list(MEDIA_IDS.values())))
    if len(tags):
      # The published dummy object of a sample without annotation is never spliced.
      spliced = (text.ids[tags[-1] :] == published.tokenizer.region_id).any()
      objects = case.meta["ann_indices"][i] if spliced else None
      clip = published.clip(scene, frames, masks, objects)
    texts.append(text)
    clips.append(clip)
  return published.rows(texts, clips, case.id)


def inference_row(published: Published, case: Case, video: str = "video") -> Row:
  """The batch of one prompt."""
  ids = case["input_ids"][0]
  objects = case.meta["ann_indices"][0] if case.meta.get("ann_indices") else []
  tags = np.flatnonzero(np.isin(ids, list(MEDIA_IDS.values())))
  early = int((ids[: tags[-1]] == published.tokenizer.region_id).sum()) if len(tags) else 0
  clip = published.clip(
    _u8(case, video),
    _u8(case, "frame"),
    case["masks"].reshape(-1, *case["masks"].shape[-2:]) if "masks" in case else None,
    # A <region> before the media tag takes no object, here as there; there, one is left over.
    objects[: len(objects) - early],
  )
  return published.rows([Text(ids, np.full_like(ids, IGNORE))], [clip], case.id)


def _forward(published: Published, case: Case) -> Produced:
  if "input_ids" not in case:
    logits = _embeds_logits(published, case["inputs_embeds"])
    return Produced(logits_views(logits, np.ones(logits.shape[:2], bool)))
  training = "labels" in case
  try:
    rows = training_rows(published, case) if training else inference_row(published, case)
  except InputError as error:
    raise Refused(f"B10: {error}") from error
  logits, spliced = jax.device_get(published.forward(published.params, rows))
  length = _length(case, spliced.valid)
  if spliced.valid[:, length:].any():
    raise InputError(f"{case.id}: more than {length} slots after the splice")
  valid = spliced.valid[:, :length]
  logits = np.where(valid[:, :, None], logits[:, :length], 0)
  arrays: dict[str, Any] = {
    "inputs_embeds": spliced.embeds[:, :length],
    **logits_views(logits, valid),
    "out_attention_mask": valid.astype(np.uint8),
  }
  for name in ("inputs_embeds", "logits_argmax"):
    if name in case:  # what the published code leaves in padding means nothing
      padding = ~valid.reshape(*valid.shape, *(1,) * (arrays[name].ndim - 2))
      arrays[name] = np.where(padding, case.reference(name), arrays[name])
  if training:
    supervised, tokens = spliced.supervised[:, :length], spliced.tokens[:, :length]
    log_p = np.asarray(jax.nn.log_softmax(logits[:, :-1]))
    nll = -np.take_along_axis(log_p, tokens[:, 1:, None], axis=2)[:, :, 0]
    sums = jax.jit(model_loss(published.model))(published.params, rows)
    arrays["out_labels"] = np.where(supervised, tokens, IGNORE).astype(np.int32)
    arrays["nll"] = np.where(supervised[:, 1:], nll, 0).astype(np.float32)
    arrays["loss"] = np.float32(sums.sum / sums.weight)
  tolerances = {"inputs_embeds": "inputs_embeds_atol", "loss": "loss_abs"}
  return Produced(
    arrays,
    atol={name: case.tolerance[key] for name, key in tolerances.items() if key in case.tolerance},
  )


def logits_views(logits: np.ndarray, valid: np.ndarray) -> dict[str, np.ndarray]:
  """Whole logits [B, L, V] and what a set may hold in their place; slots of a row fill [B, L]."""
  last = np.maximum(valid.sum(1) - 1, 0)
  return {
    "logits": logits,
    "logits_every8": logits[:, :, ::8],
    "logits_argmax": logits.argmax(-1).astype(np.int32),
    "logits_last": np.take_along_axis(logits, last[:, None, None], axis=1)[:, 0],
  }


def _length(case: Case, valid: np.ndarray) -> int:
  """Slots of the golden sequence, after expansion; of ours where no array of the case tells."""
  names = ("logits", "logits_every8", "logits_argmax", "inputs_embeds", "out_attention_mask")
  lengths = (case.reference(n).shape[1] for n in names if n in case)
  return next(lengths, int(valid.sum(1).max()))


def _embeds_logits(published: Published, embeds: np.ndarray) -> np.ndarray:
  positions = jnp.broadcast_to(jnp.arange(embeds.shape[1], dtype=jnp.int32), embeds.shape[:2])

  def run(model: VideoRefer, embeds):
    hidden, _ = model.llm(embeds, positions)
    return model.logits(hidden)

  return np.asarray(published.model.apply({"params": published.params}, embeds, method=run))


# --- 07_generate ------------------------------------------------------------------------------


def generation(golden: Golden) -> Iterator[CaseResult]:
  """Greedy tokens, exactly, and the logits of the first and the last step."""
  published = Published(golden)
  return compare_cases(golden.cases("07_generate"), functools.partial(_generate, published))


def _generate(published: Published, case: Case) -> Produced:
  row = inference_row(published, case, "pixels")
  options, eos = case.meta["generate_kwargs"], case.meta["eos_token_id"]
  penalty = case.meta["repetition_penalty"]
  model, params = published.model, published.params
  slots = row["tokens"].shape[1] + options["max_new_tokens"]

  def prefilled():
    return generate.prefill(model, params, row, KVCache.empty(published.cfg.llm, 1, slots))

  tokens, lengths = generate.generate(
    model,
    params,
    *prefilled(),
    max_new_tokens=options["max_new_tokens"],
    eos_ids=[eos] if isinstance(eos, int) else eos,
    sampling=Sampling(repetition_penalty=penalty),
  )
  tokens = tokens[:, : lengths[0]]

  # The scores behind each choice: the same tokens once more, in one call.
  first, cache = prefilled()
  positions = cache.positions.max() + 1 + jnp.arange(tokens.shape[1])
  rest, _ = generate.extend(model, params, tokens, positions[None], cache)
  logits = jnp.concatenate([first[:, None], rest[:, :-1]], axis=1)[0]
  seen = jax.nn.one_hot(tokens[0], logits.shape[-1], dtype=jnp.int32)
  seen = (jnp.cumsum(seen, axis=0) - seen) > 0
  best = jax.lax.top_k(penalize(logits, seen, penalty), 2)[0]
  arrays = {
    "generated_ids": tokens[0],
    "first_logits": logits[0],
    "last_logits": logits[-1],
    "margins": best[:, 0] - best[:, 1],
  }
  floats = ("first_logits", "last_logits", "margins")
  return Produced(arrays, atol=dict.fromkeys(floats, case.tolerance["logits_atol"]))


# --- bench_inference --------------------------------------------------------------------------


def bench_inference(golden: Golden) -> Iterator[CaseResult]:
  """VideoRefer-Bench D and Q end to end, from the published files and media to the answers."""
  recorded = golden.other_json("bench_inference")
  model = load(golden.checkpoint)
  for kind in ("D", "Q"):
    path = golden.path(golden.index["other_json"][f"bench_{kind.lower()}"])
    items = list(registry.read(registry.benchmark(f"bench-{kind.lower()}"), path).items)
    for mode, published in recorded[kind].items():
      new_tokens = max(len(record["generated_ids"]) for record in published)
      scene = published[0]["video_shape"][0]
      requests = [item.request(golden.path("media"), mode, scene) for item in items]
      answers = model.ask_many(requests, max_new_tokens=new_tokens, scene_frames=scene)
      pairs = _bench_pairs(model, mode, items, answers, published)
      name = f"{kind}_{mode}"
      yield exact("bench_inference", name, pairs)


def _bench_pairs(
  model: Model, mode: str, items: list[Item], answers: list[Answer], published: list[dict]
) -> Iterator[tuple[Any, Any, Any]]:
  """(what, ours, published) of every item of one benchmark and mode."""
  for item, answer, record in zip(items, answers, published, strict=True):
    prompt, text = question_prompt(item.question, model.tokenizer, "video")
    masks = item.masks(mode)
    size = record["masks_shape"][-2:]
    segmentations = [mask for frames in masks for mask in frames.values()]
    areas = [int(segmentation_to_mask(m, *size).sum()) for m in segmentations]
    tokens = [len(o["tokens"]) for o in answer.objects]
    pairs = {
      "question": item.question,
      "prompt": prompt,
      "input_ids": text.ids.tolist(),
      "objects_frames": [list(frames) for frames in masks],
      "masks_area": areas,
      "region_token_nums": tokens,
      "generated_ids": list(answer.token_ids),
      "output_record": published_record(Prediction.for_item(item, answer.text)),
    }
    for key, ours in pairs.items():
      yield (item.id, key), ours, record[key]
