"""HC-STVG as a captioning benchmark: one object, one mask, one sentence, one reference.

    DIR/<any>.json: [{video, frame_idx, mask: RLE, caption}, ...]
    DIR/videos/... (or the videos beside the file)

Format and prompt: the later edition of the published code; of the paper's no script exists.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipes.errors import InputError
from data_pipes.json_items import read_items
from data_pipes.records import parse_objects
from data_pipes.tokenizer import REGION
from vr_jax.evaluation.benchmark import (
  SUCCESSORS,
  Benchmark,
  Row,
  Source,
  fixed,
  in_videos,
  one_file,
  one_truth,
)
from vr_jax.evaluation.items import Item, Prediction
from vr_jax.evaluation.scoring.captions import CAPTION

PROMPT = (
  f"Please describe the important aspects of the marked object {REGION} in the video. "
  "Output in one sentense."
)
# Of the successors, spelling as published.
PROMPTS = {
  "cells": PROMPT,
  "placed_cells": f"Please describe the object {REGION} in brief in the video.",
  "cells_in_context": f"There is one object in the video: {REGION}.\nPlease give a description of "
  "the highlighted object in the video. Using only one sentense.",
}


def read(source: Source) -> list[Item]:
  """The items; without an id they take their place in the file."""
  (path,) = source.files
  return [_item(item, i, f"{path}: item {i}") for i, item in enumerate(read_items(path))]


def _item(item: Any, index: int, where: str) -> Item:
  missing = [key for key in ("video", "frame_idx", "mask", "caption") if key not in item]
  if missing:
    raise InputError(f"{where}: no key {missing[0]!r}; accepted: video, frame_idx, mask, caption")
  frame = int(item["frame_idx"])
  return Item(
    id=item.get("id", index),
    where=where,
    video=item["video"],
    truth=item["caption"],
    objects=parse_objects({"masks": [{str(frame): item["mask"]}]}, where),
    frame=frame,
  )


def published_lines(predictions: Sequence[Prediction]) -> str:
  """JSONL {video, Answer, pred}."""
  return "".join(
    json.dumps({"video": p.video, "Answer": p.truth, "pred": p.pred}, ensure_ascii=False) + "\n"
    for p in predictions
    if p.pred is not None
  )


def coco_files(predictions: Sequence[Prediction]) -> tuple[str, str]:
  """References and predictions as COCO caption files: image i is the i-th answered item."""
  answered = [p for p in predictions if p.pred is not None]
  references = {
    "images": [{"id": i} for i in range(len(answered))],
    "annotations": [{"id": i, "image_id": i, "caption": p.truth} for i, p in enumerate(answered)],
  }
  captions = [{"image_id": i, "caption": p.pred} for i, p in enumerate(answered)]
  return json.dumps(references, ensure_ascii=False), json.dumps(captions, ensure_ascii=False)


def export(predictions: Sequence[Prediction]) -> Mapping[str, str]:
  """The published lines, and both COCO files."""
  references, captions = coco_files(predictions)
  return {
    "published.jsonl": published_lines(predictions),
    "coco_references.json": references,
    "coco_predictions.json": captions,
  }


HC_STVG = Benchmark(
  name="hc-stvg",
  title="HC-STVG",
  kind=CAPTION,
  split="",
  files=one_file("*.json"),
  root=in_videos,
  read=read,
  prompt=fixed(PROMPT),
  prompts={kind: fixed(text) for kind, text in PROMPTS.items()},
  export=export,
  new_tokens=128,
  regions=True,
  published=one_truth("video", "Answer", "pred", truth="Answer"),
  paper=(
    Row("VideoRefer-7B", {"CIDEr": 0.686}),
    Row("Artemis", {"CIDEr": 0.532}),
    Row("VideoRefer-VideoLLaMA3-7B", {"CIDEr": 0.969}, SUCCESSORS),
    Row("PixelRefer-7B", {"METEOR": 0.211, "CIDEr": 0.974}, SUCCESSORS),
    Row("PixelRefer-Lite-7B", {"METEOR": 0.219, "CIDEr": 0.927}, SUCCESSORS),
  ),
  is_published=lambda items: False,  # the paper does not say of which split its rows are
  prompt_template="published, later edition",
)
