"""VideoRefer-Bench: the published D (description) and Q (multiple choice) files, and predictions.

Formats and prompts: videorefer/eval/inference_videorefer_{d,q}_bench.py of the published code.
"""

from pathlib import Path
from typing import Any

from data_pipes.bench_prompts import DESCRIBE, bench_q_prompt
from data_pipes.errors import InputError
from data_pipes.records import parse_objects, read_items
from vr_jax.evaluation.items import Item, Prediction, check_ids

_KEYS = {
  "D": ("video", "caption", "frame_idx", "annotation"),
  "Q": ("video", "Question", "options", "Answer", "frame_idx", "annotation"),
}


def read_bench(path: Path | str) -> list[Item]:
  """Reads VideoRefer-Bench-D.json or -Q.json; which of the two, its keys tell.

  Items without an id take their place in the file.

  Raises:
    InputError: not JSON, no list, an item without one of the published keys, two items of one id.
  """
  items = [_parse(item, i, f"{path}: item {i}") for i, item in enumerate(read_items(path))]
  check_ids(items, str(path))
  return items


def _parse(item: Any, index: int, where: str) -> Item:
  if not isinstance(item, dict):
    raise InputError(f"{where}: found {type(item).__name__}; accepted: an object")
  kind = "Q" if "Question" in item else "D"
  missing = [key for key in _KEYS[kind] if key not in item]
  if missing:
    raise InputError(
      f"{where}: no key {missing[0]!r}; accepted: VideoRefer-Bench-{kind}, whose items have "
      f"{', '.join(_KEYS[kind])}"
    )
  try:
    frame = int(item["frame_idx"])
  except (TypeError, ValueError):
    raise InputError(
      f"{where}: key 'frame_idx': found {item['frame_idx']!r}; accepted: a frame number"
    ) from None
  choice = kind == "Q"
  return Item(
    id=item.get("id", index),
    where=where,
    video=item["video"],
    question=bench_q_prompt(item["Question"], item["options"]) if choice else DESCRIBE,
    asked=item["Question"] if choice else "",
    type=str(item.get("type") or ""),
    truth=item["Answer"] if choice else item["caption"],
    options=tuple(item["options"]) if choice else (),
    objects=parse_objects(item, where),
    frame=frame,
  )


def published_record(prediction: Prediction) -> dict[str, Any]:
  """The line that the published scripts write; they leave the id out."""
  if prediction.options:
    kept = {"Answer": prediction.truth}
  else:
    kept = {"caption": prediction.truth}
  record = {"video": prediction.video, **kept, "pred": prediction.pred}
  return record | ({"type": prediction.type} if prediction.options else {})
