"""Golden cases of the successors' data side: object crops, patches, frames, prompts, sizes.

Stages 04 and 10 and the JSON tables of a set of family "videollama3 successors".
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipes.errors import InputError
from data_pipes.navit_frames import scene_frames, step_frames
from data_pipes.navit_images import smart_resize as resized_size
from data_pipes.navit_images import to_patches
from data_pipes.navit_prompts import (
  image_text,
  render,
  special_id,
  timed_object_text,
  video_text,
)
from data_pipes.navit_rows import Picture
from data_pipes.navit_samples import NavitRules, training_sample
from data_pipes.object_crops import (
  LITE,
  PIXELREFER,
  VL3,
  VL3_TOKENS,
  crop_objects,
  crop_patches,
)
from data_pipes.records import parse_record
from data_pipes.tokenizer import Tokenizer
from data_pipes.video import open_video
from vr_jax.parity.golden import (
  FAIL,
  PASS,
  Case,
  CaseResult,
  Golden,
  Produced,
  compare_cases,
  exact,
)

_RULES = {"vl3": VL3, "pixelrefer": PIXELREFER, "lite": LITE}
_MASK_FRAMES = (0, 2)  # whose means the folder records beside each scene
_FLOAT = 1e-5  # of float arrays for which the folder states no tolerance


def max_length(golden: Golden, generation: str) -> int:
  """`mm_max_length` of a generation's checkpoint."""
  config = golden.path(golden.index["checkpoints"][generation]) / "config.json"
  return json.loads(config.read_text(encoding="utf-8"))["mm_max_length"]


# --- JSON tables ---------------------------------------------------------------------------------


def smart_resize(golden: Golden) -> Iterator[CaseResult]:
  """What the image processor makes of height and width."""
  table = golden.other_json("smart_resize")
  named = [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
  inputs = ("height", "width", "factor", "max_pixels", "min_pixels")

  def pairs() -> Iterator[tuple[Any, Any, Any]]:
    for row in named:
      given = [row[name] for name in inputs]
      yield given, resized_size(*given), (row["out_h"], row["out_w"])

  yield exact("smart_resize", "all", pairs())


def frame_sample(golden: Golden) -> Iterator[CaseResult]:
  """Frame numbers of the ids rule."""
  rows = golden.other_json("frame_sample")["rows"]
  yield exact("frame_sample", "all", ((row[:4], step_frames(*row[:4]), row[4]) for row in rows))


def prompts(golden: Golden) -> Iterator[CaseResult]:
  """Special ids, texts after the chat template and their ids, of each checkpoint's tokenizer."""
  recorded = golden.other_json("prompts")
  folders = golden.index["checkpoints"]
  tokenizers = {name: Tokenizer.from_folder(golden.path(path)) for name, path in folders.items()}
  special = recorded["special_tokens"].items()
  for name, tokenizer in tokenizers.items():
    pairs = ((token, special_id(tokenizer, token), index) for token, index in special)
    yield exact("prompts", f"{name}_special", pairs)
  for entry in recorded["prompts"]:
    tokenizer = tokenizers[entry["generation"]]
    name = f"{entry['generation']}_{entry['name']}"
    yield exact("prompts", name, _prompt(entry, tokenizer))
  yield exact("prompts", "lite_region_text", map(_timed, recorded["lite_region_text"]))


def _prompt(entry: Mapping[str, Any], tokenizer: Tokenizer) -> Iterator[tuple[Any, Any, Any]]:
  messages = [(m["role"], _content(m["content"])) for m in entry.get("messages", ())]
  text = render(messages, add_generation_prompt=True)
  yield messages, text, entry["text"]
  yield messages, tokenizer.encode(text), entry["ids"]


def _timed(entry: Mapping[str, Any]) -> tuple[Any, Any, Any]:
  ids, first = entry["mask_ids"], entry["start_id"]
  counts = entry["mask_nums"][first : first + len(ids)]
  text = timed_object_text(counts, [entry["timestamps"][i] for i in ids])
  return entry, text, entry["text"]


def _content(content: str | list[dict[str, Any]]) -> str:
  """A message's content, given as text or as published items, as text."""
  if isinstance(content, str):
    return content
  make = {
    "image": lambda item: image_text(1, item.get("time")),
    "video": lambda item: video_text([1] * item["num_frames"], item["time"]),
    "text": lambda item: item["text"],
  }
  return "".join(make[item["type"]](item) for item in content)


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
  rule = _RULES[meta["generation"]]
  crops = crop_objects(images, inputs["masks"], ids, rule, meta["K"], published=True)
  made = crop_patches(crops, rule, max_length(golden, meta["generation"]))
  arrays: dict[str, Any] = {
    "nums": [c.tokens for c in crops],
    "boxes": [c.box for c in crops],
    "crop_hw": [c.image.shape[:2] for c in crops],
    "crop_sum": [_byte_sum(c.image) for c in crops],
    "grid": _grids([m.picture for m in made]),
  }
  for i, (crop, cell) in enumerate(zip(crops, made, strict=True)):
    arrays[f"mask_{i}"] = crop.mask
    arrays[f"crop_{i}"] = crop.image
    step = 61 if crop.image.size >= 270_000 else 7
    arrays[f"crop_{i}_sample"] = crop.image[::step, ::step]
    arrays[f"patches_{i}_u8"] = cell.picture.patches
    arrays[f"patch_sum_{i}"] = _patch_sum(cell.picture)
  if rule.lite:
    arrays |= _beside("raw", [c.whole for c in crops], [m.whole for m in made])
    arrays |= _beside("local", [c.local for c in crops], [m.local for m in made])
  loose = {f"mask_{i}": _FLOAT for i in range(len(crops))} if rule.lite else {}
  return Produced({name: np.asarray(a) for name, a in arrays.items()}, loose)


def _beside(name: str, pictures: list, patches: list) -> dict[str, Any]:
  """Lite's pictures beside the crops; each is recorded whole or as a sample."""
  arrays: dict[str, Any] = {
    f"{name}_grid": _grids(patches),
    f"{name}_sum": [_byte_sum(picture) for picture in pictures],
  }
  for i, picture in enumerate(pictures):
    arrays |= {f"{name}_{i}": picture, f"{name}_{i}_sample": picture[::16, ::16]}
  return arrays


def _byte_sum(image: np.ndarray) -> int:
  return int(image.sum(dtype=np.int64)) % 2**31


def _grids(pictures: Sequence[Picture]) -> np.ndarray:
  """int32 [n, 3], (1, h, w) of each picture."""
  return np.array([(1, *p.grid) for p in pictures], np.int32).reshape(-1, 3)


def _patch_sum(picture: Picture) -> np.ndarray:
  """Sums of the bytes of each patch by channel, int32 [patches, 3]."""
  return picture.patches.reshape(-1, 3, 196).sum(-1, dtype=np.int32)


def _raising(case: Case, run: Callable[[Case], Any]) -> Iterator[CaseResult]:
  """A case that raises in the published code; ours refuses it in words."""
  try:
    run(case)
  except InputError as error:
    yield CaseResult(case.stage, case.id, PASS, note=f"refused: {error}")
  else:
    yield CaseResult(case.stage, case.id, FAIL, note="published: an error; ours: none")


# --- 10: patches and frames ----------------------------------------------------------------------


def preprocess(golden: Golden) -> Iterator[CaseResult]:
  """Pictures as patches; frames and times of both loaders."""
  cases = {case.id: case for case in golden.cases("10_preprocess")}
  run = functools.partial(_preprocess, golden, cases)
  for case in cases.values():
    yield from _raising(case, run) if "raises" in case.meta else compare_cases([case], run)


def _preprocess(golden: Golden, cases: dict[str, Case], case: Case) -> Produced:
  meta = case.meta
  if "loader" in meta:
    return _frames(golden, case)
  video = open_video(golden.path(meta["file"])) if "file" in meta else None
  if video is None:
    images = [_image(cases, case)]
  else:
    images = video.frames(
      scene_frames(video, meta["fps"], rule="ids").ids if "fps" in meta else [0]
    )
  budget = max_length(golden, "pixelrefer")
  pictures, stride = meta["num_images"], meta["image_downsampling"]
  patches = [to_patches(image, budget, stride, pictures) for image in images]
  sums = np.stack([_patch_sum(p) for p in patches])
  return Produced(
    {
      "grid": _grids(patches),
      "patches_u8": np.stack([p.patches for p in patches]),
      # Noise pictures are recorded without the axis of pictures.
      "patch_sum": sums if "file" in meta else sums[0],
    }
  )


def _image(cases: dict[str, Case], case: Case) -> np.ndarray:
  """The picture of a case, or of the first of the same size, with which it is stored once."""
  size = case.id.split("_n")[0]
  owner = next(c for c in cases.values() if c.id.split("_n")[0] == size and "image" in c)
  return owner["image"]


def _frames(golden: Golden, case: Case) -> Produced:
  meta, kwargs = case.meta, case.meta["kwargs"]
  video = open_video(golden.path(meta["file"]))
  scene = scene_frames(
    video,
    kwargs["fps"],
    kwargs["max_frames"],
    kwargs.get("start_time"),
    kwargs.get("end_time"),
    rule={"load_video": "filter", "load_video_from_ids": "ids"}[meta["loader"]],
  )
  mask_ids = meta.get("frame_ids", _MASK_FRAMES)
  frames = video.frames([*scene.ids, *mask_ids])
  means = np.array([frame.mean((0, 1)) for frame in frames], np.float32)
  arrays = {
    "timestamps": np.array(scene.times, np.float32),
    "frame_mean": means[: len(scene.ids)],
    "mask_frame_mean": means[len(scene.ids) :],
  }
  # Conversions of lossy video to RGB differ by less between builds of FFmpeg.
  levels = 0.5 if video.kind == "video" else _FLOAT
  return Produced(arrays, {"timestamps": _FLOAT} | dict.fromkeys(list(arrays)[1:], levels))


# --- Training samples ----------------------------------------------------------------------------


def training_samples(golden: Golden) -> Iterator[CaseResult]:
  """The samples of the folder's SFT files, read from disk, as stage 07 records them."""
  results = compare_cases(golden.cases("07_forward"), functools.partial(_training, golden))
  yield from (dataclasses.replace(result, stage="train_data") for result in results)


def _training(golden: Golden, case: Case) -> Produced:
  meta = case.meta
  folder = golden.path(meta["checkpoint"])
  config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
  rule = _RULES[meta["generation"]]
  rules = NavitRules(
    crop=rule,
    tokens=config.get("mask_num", VL3_TOKENS),
    max_length=config["mm_max_length"],
    max_frames=config["max_frames"],
    published=True,
  )
  items = json.loads(golden.path(meta["data"]).read_text(encoding="utf-8"))
  records = {item["name"]: parse_record(item, item["name"]) for item in items}
  tokenizer = Tokenizer.from_folder(folder)
  samples = [
    training_sample(records[name], tokenizer, rules, golden.folder) for name in meta["samples"]
  ]
  objects = [crop for sample in samples for crop in sample.objects]
  arrays: dict[str, Any] = {
    "input_ids": np.concatenate([s.ids for s in samples]),
    "labels": np.concatenate([s.labels for s in samples]),
    "position_ids": np.concatenate([np.arange(len(s.ids)) for s in samples]),
    "boxes": np.array([crop.box for crop in objects if crop.box]),
    "crop_grid": _grids([crop.picture for crop in objects]),
  }
  for i, sample in enumerate(samples):
    if sample.scene:
      arrays[f"image_{i}_u8"] = np.stack([p.patches for p in sample.scene])
      arrays[f"image_{i}_grid"] = _grids(sample.scene)
  for i, crop in enumerate(objects):
    arrays |= {f"mask_{i}": crop.mask, f"crop_{i}_u8": crop.picture.patches}
    if crop.whole and crop.local:
      arrays |= {f"raw_{i}_u8": crop.whole.patches, f"local_{i}_u8": crop.local.patches}
  if rule.lite:
    arrays["raw_grid"] = _grids([crop.whole for crop in objects if crop.whole])
    arrays["local_grid"] = _grids([crop.local for crop in objects if crop.local])
  for name in case.expected():
    if name not in arrays:
      case[name]  # what the model makes of it, compared as stage 07
  return Produced(arrays, {f"mask_{i}": _FLOAT for i in range(len(objects))})
