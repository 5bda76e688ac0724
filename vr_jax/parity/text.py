"""Golden stage 08 and the JSON cases: media, frame rules, prompts, answer and score parsing."""

import functools
import hashlib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange, reduce
from PIL import Image

from data_pipes.errors import InputError
from data_pipes.frame_rules import fps_frames, frame_range, uniform_frames
from data_pipes.images import normalise, pad_square, photo_grid, read_image, to_model
from data_pipes.masks import segmentation_to_mask
from data_pipes.prompts import (
  IGNORE,
  MEDIA_IDS,
  Text,
  Turn,
  dialogue_text,
  plain_text,
  tag_to_head,
  tokenize,
)
from data_pipes.tokenizer import Tokenizer
from data_pipes.video import open_video, read_scene, scene_ids
from vr_jax.evaluation import answers
from vr_jax.evaluation.scoring import judge_scores
from vr_jax.evaluation.scoring.statistics import Answered, summarize
from vr_jax.parity.golden import (
  FAIL,
  PASS,
  Case,
  CaseResult,
  Golden,
  Produced,
  Refused,
  Skipped,
  compare_cases,
  exact,
)

_DEFAULT_FRAMES = 8  # the published process_video's num_frames, where a case does not give it (B1)


# --- JSON files: exact, one result for each group of entries -------------------------------------


def frame_sample(golden: Golden) -> Iterator[CaseResult]:
  """Frame numbers of the uniform and the fps rule."""
  recorded = golden.other_json("frame_sample")
  yield exact(
    "frame_sample",
    "uniform",
    (
      ((c["duration"], c["num_frames"]), _uniform(c["duration"], c["num_frames"]), c["idx"])
      for c in recorded["uniform"]
    ),
  )
  yield exact(
    "frame_sample",
    "fps",
    (
      ((c["duration"], c["fps"]), fps_frames(c["duration"], c["fps"]).tolist(), c["idx"])
      for c in recorded["fps"]
    ),
  )


def _uniform(frames: int, count: int) -> list[int]:
  return uniform_frames(frames, count).tolist()


def prompts(golden: Golden) -> Iterator[CaseResult]:
  """Tokenizer, media tags, chat template, and training dialogues with their label masks."""
  recorded = golden.other_json("prompts")
  tokenizer = Tokenizer.from_folder(golden.checkpoint)
  result = functools.partial(exact, "prompts")

  special = recorded["special"]
  yield result("special", _special(tokenizer, special))
  texts = recorded["tokenizer"]
  yield result("encode", ((c["text"], tokenizer.encode(c["text"]), c["slow"]) for c in texts))
  decode = tokenizer.decode
  yield result("decode", ((c["text"], decode(c["slow"]), c["decode"]) for c in texts))
  skipped = ((c["text"], decode(c["slow"], True), c["decode_skip_special"]) for c in texts)
  yield result("decode_skip_special", skipped)
  drawn = recorded["decode_random_ids"]
  yield result(
    "decode_random_ids",
    (
      (
        c["ids"],
        [decode(c["ids"]), decode(c["ids"], True), decode(c["ids"], True).strip()],
        [c["text"], c["skip_special"], c["strip"]],
      )
      for c in drawn
    ),
  )
  tagged = recorded["tokenizer_multimodal_token"]
  yield result(
    "media_tags",
    ((c["text"], tokenize(c["text"], tokenizer, c["modal_token"]), c["ids"]) for c in tagged),
  )
  rendered = recorded["chat_template"]
  yield result(
    "chat_template",
    (
      (c["messages"], tokenizer.render(c["messages"], c["add_generation_prompt"]), c["text"])
      for c in rendered
    ),
  )
  for i, case in enumerate(recorded["train_preprocess"]):
    yield _dialogue(f"train_preprocess_{i}", case, tokenizer)


def _special(tokenizer: Tokenizer, special: Mapping[str, Any]) -> Iterator[tuple[Any, Any, Any]]:
  for name in ("eos", "pad", "bos"):
    expected = special.get(name)
    yield name, getattr(tokenizer, f"{name}_id"), expected and expected[1]
    if expected:
      yield expected[0], tokenizer.id_of(expected[0]), expected[1]
  yield "<region>", tokenizer.region_id, special["region"]
  for name in ("video", "image", "audio"):
    yield name, MEDIA_IDS[f"<{name}>"], special[name]
  yield "length", len(tokenizer), special["len_tokenizer"]


def _dialogue(name: str, case: Mapping[str, Any], tokenizer: Tokenizer) -> CaseResult:
  tag = case["modal_token"]
  turns = [Turn(t["from"], t["value"]) for t in case["conversations"]]
  if "error" in case:
    try:
      dialogue_text(turns, tokenizer, tag)
    except InputError as error:
      return CaseResult("prompts", name, PASS, note=f"refused, as upstream: {error}")
    return CaseResult("prompts", name, FAIL, note=f"accepted; upstream raises {case['error']}")

  def pairs() -> Iterator[tuple[Any, Any, Any]]:
    headed = [{"from": t.role, "value": t.text} for t in tag_to_head(turns, tag)]
    yield "after_preprocess_multimodal", headed, case["after_preprocess_multimodal"]
    text = dialogue_text(turns, tokenizer, tag)
    yield from _text_pairs("", text, case)
    targets = text.labels[text.labels != IGNORE]
    yield "supervised_text", tokenizer.decode(targets), case["supervised_text"]
    if "plain" in case:
      yield from _text_pairs("plain ", plain_text(turns, tokenizer, tag), case["plain"])

  return exact("prompts", name, pairs())


def _text_pairs(name: str, text: Text, case: Mapping) -> Iterator[tuple[Any, Any, Any]]:
  yield f"{name}ids", text.ids.tolist(), case["input_ids"]
  yield f"{name}labels", text.labels.tolist(), case["labels"]


def bench_q_scoring(golden: Golden) -> Iterator[CaseResult]:
  """Letters read from answers, and the accuracies of the whole list."""
  recorded = golden.other_json("bench_q_scoring")
  items = recorded["items"]
  graded = [answers.grade(i["pred"], i["Answer"], parser="published") for i in items]
  yield exact(
    "bench_q_scoring",
    "items",
    (
      (i["pred"], (g.letter, g.truth, g.correct), (i["extracted"], i["gt"], i["correct"]))
      for g, i in zip(graded, items, strict=True)
    ),
  )
  summary = summarize(
    [Answered(i["type"], i["video"], g.correct, 1) for g, i in zip(graded, items, strict=True)]
  )
  ours = [(t.name, t.n, t.correct, t.value) for t in summary.types]
  micro = summary.micro
  ours.append(("average", micro.n, micro.correct, micro.value))
  printed = re.findall(
    r"#######\s+(.*?)\s+#######\nall num:\s+(\d+)\nright num:\s+(\d+)\naccuracy:\s+(\S+)",
    recorded["stdout"],
  )
  expected = [(name, int(n), int(right), float(share)) for name, n, right, share in printed]
  yield exact("bench_q_scoring", "whole", [("accuracies", ours, expected)])
  single = [c for c in recorded.get("crashes", ()) if c["pred"] is not None]
  yield exact(
    "bench_q_scoring",
    "crashes",
    (
      (
        c["pred"],
        answers.grade(c["pred"], "(A)", parser="published").problem,
        "empty" if c["error"] else None,
      )
      for c in single
    ),
    note="an answer that stops the published script counts as wrong here (B16)",
  )


def bench_d_scoring(golden: Golden) -> Iterator[CaseResult]:
  """Scores read from judge replies, and the means of whole lists."""
  recorded = golden.other_json("bench_d_scoring")
  yield exact("bench_d_scoring", "items", _score_items(recorded["items"]))
  for part in ("whole", "first6"):
    if part in recorded:
      yield exact("bench_d_scoring", part, _score_list(recorded["input"], recorded[part]))


def _scores(item: Mapping[str, Any]) -> judge_scores.Scores:
  reply = item.get("gpt")
  return judge_scores.published_scores(None if reply == "<<missing key>>" else reply)


def _score_items(items: list[Mapping[str, Any]]) -> Iterator[tuple[Any, Any, Any]]:
  for item in items:
    scores = _scores(item)
    ours = scores.error is not None, dict(scores.values)
    yield item["gpt"], ours, (item["dropped"], item["scores"] or {})
    average = judge_scores.mean_scores([] if scores.error else [scores]).average
    yield item["gpt"], average is None, item["analyze_error"] is not None


def _score_list(
  inputs: list[Mapping[str, Any]], part: Mapping[str, Any]
) -> Iterator[tuple[Any, Any, Any]]:
  """The list as the published scripts leave it, their count of errors, and what they print."""
  dropped = int((re.findall(r"error num:\s+(\d+)", part["extract_stdout"]) or ["0"])[0])
  inputs = inputs[: len(part["parsed"]) + dropped]
  scores = [_scores(item) for item in inputs]
  result = judge_scores.mean_scores(scores)
  yield "dropped", result.failed, dropped
  kept = [{**i, **s.values} for i, s in zip(inputs, scores, strict=True) if s.error is None]
  yield "parsed", kept, part["parsed"]
  lines = "".join(f"{d.name} :  {d.mean}\n{d.n}\n" for d in result.dimensions if d.mean is not None)
  if result.average is not None:
    lines += f"all....\n{result.average}\n"
  yield "stdout", lines, part["analyze_stdout"] or ""
  yield "average exists", result.average is not None, part["analyze_error"] is None


# --- 08_preprocess -------------------------------------------------------------------------------


def preprocess(golden: Golden) -> Iterator[CaseResult]:
  """Media to what the vision tower sees; segmentations to masks."""
  stage = next(s for s in golden.index["stages"] if s["stage"] == "08_preprocess")
  described = {case["id"]: case.get("desc", "") for case in stage["cases"]}

  def run(case: Case) -> Produced:
    meta, description = case.meta, described[case.id]
    if "segmentation" in meta:
      return _segmentation(case)
    if "args" in meta:
      return _process_video(golden, case, description)
    if "image_grid" in meta:
      return _process_image(golden, case)
    if "grid" in case:
      return Produced({"grid": photo_grid(list(_clip(golden, description)))})
    if "out" in case:
      return Produced({"out": pad_square(case["image"])})
    return _at_model(case, [case["image"]])

  return compare_cases(golden.cases("08_preprocess"), run)


def _segmentation(case: Case) -> Produced:
  meta = case.meta
  try:
    mask = segmentation_to_mask(meta["segmentation"], meta["h"], meta["w"])
  except InputError as error:
    if "error" not in meta:
      raise
    return Produced({}, note=f"refused, as upstream: {error}")
  if "error" in meta:
    raise Refused(f"B24: run lengths carry their size; upstream raises {meta['error']}")
  return Produced({"mask": mask})


def _process_video(golden: Golden, case: Case, description: str) -> Produced:
  meta, args = case.meta, case.meta["args"]
  source = _media(golden, meta) if meta["file"] else _listed(golden, description)
  video = open_video(source)
  start, end = args.get("s"), args.get("e")
  ids = scene_ids(video, args.get("num_frames", _DEFAULT_FRAMES), start, end, published=True)
  marked = args.get("frame_idx")
  scene = read_scene(video, ids)
  objects = video.frames(marked) if marked is not None else []
  if "error" in meta:
    raise Refused(f"B22: lists and arrays take mask frames; upstream raises {meta['error']}")
  _same("size", video.size, (meta["height"], meta["width"]))
  if "duration_in_range" in meta:
    candidates = frame_range(len(video), video.fps, start, end)
    _same("frames in the range", len(candidates), meta["duration_in_range"])
    if args.get("num_frames", _DEFAULT_FRAMES) is None:
      positions = fps_frames(len(candidates), video.fps or 0.0)
    else:
      positions = uniform_frames(len(candidates), args.get("num_frames", _DEFAULT_FRAMES))
    _same("sampled frames", positions.tolist(), meta["sampled_within_range"])
  if meta.get("decoded_frame_ids"):
    _same("frames", ids, meta["decoded_frame_ids"][: len(ids)])
  return _at_model(case, scene, objects)


def _process_image(golden: Golden, case: Case) -> Produced:
  meta = case.meta
  image = whole = read_image(_media(golden, meta))
  images = [image]
  if meta["image_grid"]:  # copies of the image as a grid, then the image alone
    side = math.ceil(math.sqrt(meta["num_frames"]))
    whole = photo_grid([image] * meta["num_frames"], side, side)
    images = [whole, image]
  _same("size", whole.shape[:2], (meta["height"], meta["width"]))
  return _at_model(case, images)


def _at_model(
  case: Case, images: Sequence[np.ndarray], marked: Sequence[np.ndarray] = ()
) -> Produced:
  """Whichever of the stage's pixel arrays the case has, from RGB frames [H, W, 3]."""
  size, aspect_ratio = case.meta["size"], case.meta.get("aspect_ratio", "square")
  levels = case.tolerance.get("u8_abs", 0)
  arrays, atol = {}, {}
  for prefix, frames in (("", images), ("frame_", marked)):
    if not frames:
      continue
    u8 = np.stack([to_model(frame, size, aspect_ratio) for frame in frames])
    pixels = normalise(u8)
    name = f"{prefix}u8" if prefix else "pixels_u8"
    arrays[name], atol[name] = rearrange(u8, "t h w c -> t c h w"), levels
    if name in case and "pixel_mean_abs" in case.tolerance:
      gap = abs(pixels.mean() - normalise(case.reference(name)).mean())
      _same("mean pixel within tolerance", bool(gap <= case.tolerance["pixel_mean_abs"]), True)
    if f"{prefix}patch_means" in case:
      n = case.reference(f"{prefix}patch_means").shape[1]
      side = size // n
      whole = pixels[:, : n * side, : n * side]
      arrays[f"{prefix}patch_means"] = reduce(
        whole, "t (i y) (j x) c -> t i j c", "mean", y=side, x=side
      )
    if not prefix:
      arrays["pixel_values"] = rearrange(pixels, "t h w c -> t c h w")
      wide = pixels.astype(np.float64)
      arrays["channel_mean"] = wide.mean((1, 2))
      arrays["channel_std"] = wide.std((1, 2), ddof=1)
  return Produced(arrays, atol)


def _same(what: str, ours: Any, published: Any) -> None:
  if ours != published:
    raise InputError(f"{what}: {ours} instead of {published}")


def _media(golden: Golden, meta: Mapping[str, Any]) -> Path:
  """A case's file: in the golden folder, or the file with its sum in the folder VR_MEDIA_DIR."""
  path = golden.folder / meta["file"]
  if path.exists():
    return path
  folder = os.environ.get("VR_MEDIA_DIR")
  file = _by_sha256(folder).get(meta.get("sha256", "")) if folder else None
  if file is None:
    raise Skipped("not run (file not in the folder)")
  return file


@functools.cache
def _by_sha256(folder: str) -> dict[str, Path]:
  files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
  return {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in files}


def _clip(golden: Golden, description: str) -> np.ndarray:
  """The folder's clip in memory, cut to its "first N" frames where the description says so."""
  named = re.search(r"arrays/\w+\.npz", description)
  stored = np.load(golden.path(named[0] if named else "arrays/ndarray_clip.npz"))
  first = re.search(r"first (\d+)", description)
  return stored[stored.files[0]][: int(first[1]) if first else None]


def _listed(golden: Golden, description: str) -> Any:
  """A source in memory, which only the case's description tells: paths, PIL images or arrays."""
  paths = re.search(r"image paths (\w+)/([\d,]+)", description)
  if paths:
    folder = golden.path(f"media/{paths[1]}")
    return [next(folder.glob(f"{stem}.*")) for stem in paths[2].split(",")]
  clip = _clip(golden, description)
  if "PIL" in description:
    return [Image.fromarray(frame) for frame in clip]
  return list(clip) if "list" in description else clip
