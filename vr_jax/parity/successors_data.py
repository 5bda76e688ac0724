"""Golden cases of the successors' data side: object crops, patches, frames, prompts, sizes.

Stages 04 and 10 and the JSON tables of a set of family "videollama3 successors".
"""

import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from data_pipes.errors import InputError
from data_pipes.navit_images import Patches
from data_pipes.object_crops import CROP_RULES, crop_objects, crop_patches
from vr_jax.parity.golden import (
  FAIL,
  PASS,
  Case,
  CaseResult,
  Golden,
  Produced,
  compare_cases,
)

_FLOAT = 1e-5  # of float arrays for which the folder states no tolerance


def max_length(golden: Golden, generation: str) -> int:
  """`mm_max_length` of a generation's checkpoint."""
  config = golden.path(golden.index["checkpoints"][generation]) / "config.json"
  return json.loads(config.read_text(encoding="utf-8"))["mm_max_length"]


# --- 04: object crops ----------------------------------------------------------------------------


def region_prep(golden: Golden) -> Iterator[CaseResult]:
  """Crops, masks on the patch grid, boxes and what the image processor makes of them."""
  cases = {case.id: case for case in golden.cases("04_region_prep")}
  run = functools.partial(_crops, golden, cases)
  for case in cases.values():
    yield from _raising(case, run) if "raises" in case.meta else compare_cases([case], run)


def _crops(golden: Golden, cases: dict[str, Case], case: Case) -> Produced:
  meta = case.meta
  inputs = cases[meta["inputs_from"]] if "inputs_from" in meta else case
  ids = meta["mask_ids"]
  images = [inputs[f"image_{i}"] for i in range(max(ids) + 1)]
  rule = CROP_RULES[meta["generation"]]
  crops = crop_objects(images, inputs["masks"], ids, rule, meta["K"], published=True)
  patches = crop_patches(crops, max_length(golden, meta["generation"]))
  arrays: dict[str, Any] = {
    "nums": [c.tokens for c in crops],
    "boxes": [c.box for c in crops],
    "crop_hw": [c.image.shape[:2] for c in crops],
    "crop_sum": [_byte_sum(c.image) for c in crops],
    "grid": [p.crop.grid for p in patches],
  }
  for i, (crop, made) in enumerate(zip(crops, patches, strict=True)):
    arrays[f"mask_{i}"] = crop.mask
    arrays[f"crop_{i}"] = crop.image
    step = 61 if crop.image.size >= 270_000 else 7
    arrays[f"crop_{i}_sample"] = crop.image[::step, ::step]
    arrays[f"patches_{i}_u8"] = made.crop.pixels
    arrays[f"patch_sum_{i}"] = _patch_sum(made.crop)
  if rule.lite:
    arrays |= _beside("raw", [c.whole for c in crops], [p.whole for p in patches])
    arrays |= _beside("local", [c.local for c in crops], [p.local for p in patches])
  loose = {f"mask_{i}": _FLOAT for i in range(len(crops))} if rule.lite else {}
  return Produced({name: np.asarray(a) for name, a in arrays.items()}, loose)


def _beside(name: str, pictures: list, patches: list) -> dict[str, Any]:
  """Lite's pictures beside the crops; each is recorded whole or as a sample."""
  arrays: dict[str, Any] = {
    f"{name}_grid": [p.grid for p in patches],
    f"{name}_sum": [_byte_sum(picture) for picture in pictures],
  }
  for i, picture in enumerate(pictures):
    arrays |= {f"{name}_{i}": picture, f"{name}_{i}_sample": picture[::16, ::16]}
  return arrays


def _byte_sum(image: np.ndarray) -> int:
  return int(image.sum(dtype=np.int64)) % 2**31


def _patch_sum(patches: Patches) -> np.ndarray:
  """Sums of the bytes of each patch by channel, int32 [patches, 3]."""
  return patches.pixels.reshape(-1, 3, 196).sum(-1, dtype=np.int32)


def _raising(case: Case, run: Callable[[Case], Any]) -> Iterator[CaseResult]:
  """A case that raises in the published code; ours refuses it in words."""
  try:
    run(case)
  except InputError as error:
    yield CaseResult(case.stage, case.id, PASS, note=f"refused: {error}")
  else:
    yield CaseResult(case.stage, case.id, FAIL, note="published: an error; ours: none")
