"""Golden stages 07 to 09 of the successors: forward pass and loss, gradients, greedy generation."""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import numpy as np

from data_pipes.errors import InputError
from data_pipes.navit_images import STRIDES, to_patches
from data_pipes.navit_prompts import (
  image_text,
  object_text,
  question_text,
  timed_object_text,
  video_text,
)
from data_pipes.navit_rows import Crop, Picture, Row, Sample, tokens_of
from data_pipes.object_crops import crop_objects, crop_patches
from data_pipes.prompts import IGNORE
from vr_jax.inference import generate
from vr_jax.inference.options import Options
from vr_jax.inference.picture_reading import started
from vr_jax.inference.pictures import PictureModel
from vr_jax.inference.sampling import penalize
from vr_jax.interop.navit import to_published
from vr_jax.loading import load
from vr_jax.models.decoder import KVCache
from vr_jax.models.videorefer import VideoRefer
from vr_jax.parity.golden import FAIL, Case, CaseResult, Golden, Produced, compare, compare_cases
from vr_jax.parity.successors import Checkpoint, checkpoint
from vr_jax.parity.training import Differences
from vr_jax.training.loss import model_loss

# --- 07_forward -------------------------------------------------------------------------------


def forward(golden: Golden) -> Iterator[CaseResult]:
  """Embeddings after the splice, positions, logits, negative log-likelihoods and loss of a row."""
  return compare_cases(golden.cases("07_forward"), functools.partial(_forward, golden))


@functools.partial(jax.jit, static_argnums=0)
def _run(model: VideoRefer, params, rows):
  hidden, spliced = model.apply({"params": params}, rows)
  sums = model_loss(model)(params, rows)
  return model.apply({"params": params}, hidden, method="logits"), spliced, sums.sum / sums.weight


def samples_of(case: Case, loaded: Checkpoint) -> list[Sample]:
  """The samples of a flattened row: positions start again where a new one begins."""
  ids, labels = case["input_ids"], case["labels"]
  starts = np.flatnonzero(case["position_ids"] == 0)
  crops = iter(_crops(case))
  samples = []
  for i, start in enumerate(starts):
    slots = slice(start, starts[i + 1] if i + 1 < len(starts) else len(ids))
    video = case.meta["modal"][i] == "video"
    scene = []
    if f"image_{i}_u8" in case:
      grids = case[f"image_{i}_grid"]
      merge = loaded.cfg.img.merge if video else 1
      scene = [
        Picture(patches, (int(h), int(w)), merge)
        for patches, (_, h, w) in zip(case[f"image_{i}_u8"], grids, strict=True)
      ]
    objects: list[Crop] = []
    count = int((ids[slots] == loaded.ids.region).sum())
    while sum(tokens_of(crop, loaded.cfg.region.tokens) for crop in objects) < count:
      objects.append(next(crops))
    samples.append(Sample(ids[slots], labels[slots], scene, objects, video))
  return samples


def _crops(case: Case) -> list[Crop]:
  """The objects of all samples of a case, in their order."""

  def picture(name: str, i: int) -> Picture | None:
    if f"{name}_{i}_u8" not in case:
      return None
    _, h, w = case[f"{name}_grid"][i]
    return Picture(case[f"{name}_{i}_u8"], (int(h), int(w)))

  crops: list[Crop] = []
  while (crop := picture("crop", len(crops))) is not None:
    i = len(crops)
    crops.append(
      Crop(
        picture=crop,
        mask=case[f"mask_{i}"],
        box=case["boxes"][i] if "boxes" in case else None,
        local=picture("local", i),
        whole=picture("raw", i),
        start=case.get(f"init_{i}"),
      )
    )
  return crops


def _row(golden: Golden, case: Case) -> tuple[Checkpoint, Row]:
  loaded = checkpoint(golden, case.meta.get("checkpoint"))
  return loaded, loaded.rows([samples_of(case, loaded)], case.id)


def _forward(golden: Golden, case: Case) -> dict[str, np.ndarray]:
  loaded, row = _row(golden, case)
  out = jax.device_get(_run(loaded.model, loaded.params, row))
  logits, spliced, loss = out[0][0], out[1], out[2]
  n = int(spliced.valid.sum())
  logits, tokens, supervised = logits[:n], spliced.tokens[0, :n], spliced.supervised[0, :n]
  log_p = np.asarray(jax.nn.log_softmax(logits[:-1]))
  nll = -np.take_along_axis(log_p, tokens[1:, None], axis=1)[:, 0]
  return {
    "inputs_embeds": spliced.embeds[0, :n],
    "out_labels": np.where(supervised, tokens, IGNORE),
    "out_position_ids": spliced.positions[0, :n],
    "logits_at": logits[case["pos_at"]],
    "argmax": logits.argmax(-1),
    "nll": np.where(supervised[1:], nll, 0).astype(np.float32),
    "loss": np.float32(loss),
  }


# --- 08_gradients -----------------------------------------------------------------------------

NORM_SHARE = 1e-3  # of a gradient's norm: the limit that the folder's README gives
UNUSED = "mask_embedding."  # a layer of PixelRefer-Lite that no code uses


def gradients(golden: Golden) -> Iterator[CaseResult]:
  """The gradient of every parameter by its norm, some of them element by element."""
  rows = {case.id: case for case in golden.cases("07_forward")}
  for case in golden.cases("08_gradients"):
    try:
      loaded, row = _row(golden, rows[case.meta["forward_case"]])
      grads = jax.device_get(_gradients(loaded.model, loaded.params, row))
    except InputError as error:
      yield CaseResult(case.stage, case.id, FAIL, note=str(error))
    else:
      yield _compare_gradients(case, to_published(loaded.cfg, grads))


@functools.partial(jax.jit, static_argnums=0)
def _gradients(model: VideoRefer, params, row):
  def loss(params):
    sums = model_loss(model)(params, row)
    return sums.sum / sums.weight

  return jax.grad(loss)(params)


def _compare_gradients(case: Case, grads: dict[str, np.ndarray]) -> CaseResult:
  names = [name.removeprefix("grad/") for name in case.expected()]
  result = compare(case, Produced({f"grad/{n}": grads[n] for n in names if n in grads}))
  differences, meta = Differences(), case.meta
  norms = {name: float(np.linalg.norm(g.astype(np.float64))) for name, g in grads.items()}
  without = [name for name in meta["without_grad"] if UNUSED not in name]
  differences.equal("parameters", sorted(norms), sorted([*meta["norms"], *without]))
  floor = 1e-6 * meta["global_norm"]
  for name, norm in {**meta["norms"], **dict.fromkeys(without, 0.0)}.items():
    if name in norms:
      differences.near("norm", name, norms[name], norm, NORM_SHARE * norm + floor)
  for name, is_part in (("global_norm", lambda n: ".vision_encoder." not in n),
                        ("vision_norm", lambda n: ".vision_encoder." in n)):  # fmt: skip
    total = float(np.sqrt(sum(norm**2 for n, norm in norms.items() if is_part(n))))
    differences.near("norm", name, total, meta[name], NORM_SHARE * meta[name])
  if not differences.problems:
    return result
  note = "; ".join(filter(None, [result.note, *differences.problems[:4]]))
  return dataclasses.replace(result, status=FAIL, note=note)


# --- 09_generate ------------------------------------------------------------------------------


def generation(golden: Golden) -> Iterator[CaseResult]:
  """Greedy answers end to end, from frames and masks to ids, by the engine that users run."""
  cases = golden.cases("09_generate")
  return compare_cases(cases, functools.partial(_generate, golden))


@functools.cache
def _answering(golden: Golden, name: str) -> PictureModel:
  model = load(golden.path(name))
  assert isinstance(model, PictureModel)
  return model


def asked_sample(golden: Golden, case: Case) -> Sample:
  """The question of a case with its pictures and crops, as requests are read."""
  model = _answering(golden, case.meta["checkpoint"])
  rules, video = model.rules(Options(mask_rule="published")), case.meta["modal"] == "video"

  def stored(name: str) -> np.ndarray:
    return case[name] if name in case else case.stored(case.meta[f"{name}_key"])

  frames = stored("frames_u8")
  masked = stored("mask_frames_u8") if video else frames
  merge = STRIDES[case.meta["modal"]]
  lite = rules.crop.lite
  scene = [] if lite else [
    to_patches(frame, rules.max_length, merge, len(frames)) for frame in frames
  ]  # fmt: skip
  crops = crop_objects(
    masked, case["masks"], case.meta["mask_ids"], rules.crop, rules.tokens, rules.published
  )
  tokens, times = [crop.tokens for crop in crops], case.meta["timestamps"]
  if lite and video:
    objects, each = [], iter(tokens)
    for ids in case.meta["mask_ids_raw"]:
      counts = [next(each) for _ in ids]
      objects.append(timed_object_text(counts, [times[i] for i in ids]))
  else:
    objects = [object_text(n) for n in tokens]
  counts = [picture.tokens for picture in scene]
  pictures = [video_text(counts, times)] if video and scene else [image_text(n) for n in counts]
  _, text = question_text(
    case.meta["instruct"], model.tokenizer, case.meta["modal"], pictures, objects
  )
  made = crop_patches(crops, rules.crop, rules.max_length)
  starts = [list(case[f"kmeans_{j}_init"]) for j in range(99) if f"kmeans_{j}_init" in case]
  for j in range(len(starts)):
    case[f"kmeans_{j}_n"]
  ran = iter(starts)  # k-means ran for the objects of more cells than tokens
  begun = [next(ran) if crop.cells > rules.tokens else [] for crop in made]
  return Sample(text.ids, text.labels, scene, started(made, begun, rules.tokens), video)


def _generate(golden: Golden, case: Case) -> Produced:
  model = _answering(golden, case.meta["checkpoint"])
  sample = asked_sample(golden, case)
  (ids,) = model.answer_samples([sample], max_new_tokens=case.meta["max_new_tokens"])
  answer = model.tokenizer.decode(ids, skip_special=True).strip()
  if answer != case.meta["answer"]:
    raise InputError(f"{case.id}: answer {answer!r} instead of {case.meta['answer']!r}")

  # The scores behind each choice: prompt and answer once more, as one row without the engine.
  loaded = checkpoint(golden, case.meta["checkpoint"])
  row = loaded.rows([[sample]], case.id)
  cache = KVCache.empty(loaded.cfg.llm, 1, row["tokens"].shape[1] + len(ids))
  first, cache = generate.prefill(loaded.model, loaded.params, row, cache)
  positions = cache.positions.max() + 1 + np.arange(len(ids))
  rest, _ = generate.extend(loaded.model, loaded.params, np.array([ids]), positions[None], cache)
  logits = np.concatenate([first[:, None], rest[:, :-1]], axis=1)[0]
  seen = jax.nn.one_hot(np.array(ids), logits.shape[-1], dtype=np.int32)
  seen = (np.cumsum(seen, axis=0) - seen) > 0
  best = jax.lax.top_k(penalize(logits, seen, model.sampling.repetition_penalty), 2)[0]
  # A margin is the difference of two scores, each as near as the logits are.
  limit = 2 * case.allowed("first_logits").get("atol", 0.0) * model.sampling.repetition_penalty
  return Produced(
    {
      "input_ids": sample.ids,
      "generated_ids": np.array(ids, np.int32),
      "first_logits": logits[0],
      "margins": np.asarray(best[:, 0] - best[:, 1]),
    },
    atol={"margins": limit},
  )
