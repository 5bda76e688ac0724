"""HC-STVG as a captioning benchmark: one object, one mask, one sentence, one reference.

    DIR/<any>.json: [{video, frame_idx, mask: RLE, caption}, ...]
    DIR/videos/... (or the videos beside the file)

Format and prompt: the later edition of the published code; of the paper's no script exists.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipes.errors import InputError
from data_pipes.records import parse_objects, read_items
from data_pipes.tokenizer import REGION
from vr_jax.evaluation.items import Item, Prediction

PROMPT = (
  f"Please describe the important aspects of the marked object {REGION} in the video. "
  "Output in one sentense."
)


def read(path: Path) -> list[Item]:
  """The items; without an id they take their place in the file."""
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
    question=PROMPT,
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
  said = [{"image_id": i, "caption": p.pred} for i, p in enumerate(answered)]
  return json.dumps(references, ensure_ascii=False), json.dumps(said, ensure_ascii=False)
