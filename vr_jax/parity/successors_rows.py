"""Golden stages 07 to 09 of the successors: forward pass and loss, gradients, greedy generation."""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import numpy as np

from data_pipes.errors import InputError
from data_pipes.navit_rows import Crop, Picture, Row, Sample, tokens_of
from data_pipes.prompts import IGNORE
from vr_jax.interop.navit import to_published
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
