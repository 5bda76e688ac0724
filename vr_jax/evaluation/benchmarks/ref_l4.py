"""Ref-L4 as a captioning benchmark: a box in an image, a short description of what it holds.

    DIR/ref-l4-val.json: lines or a list of {file_name, height, width, bbox: [x, y, w, h], caption}
    DIR/images/...

Only images of Objects365 are asked about, as published. Format and prompt: PixelRefer's
evaluation/pixelrefer/infer_refl4.py. The published numbers are of answers and references that
GPT-4o had first shortened to a phrase; here both are scored as they are.
"""

from typing import Any

from data_pipes.errors import InputError
from data_pipes.tokenizer import REGION
from vr_jax.evaluation.benchmark import (
  SUCCESSORS,
  Benchmark,
  Row,
  Source,
  fixed,
  in_images,
  one_file,
  one_truth,
)
from vr_jax.evaluation.benchmarks.hc_stvg import export
from vr_jax.evaluation.items import Item
from vr_jax.evaluation.scoring.captions import CAPTION
from vr_jax.evaluation.scoring.judge import read_records

PROMPT = f"Please describe {REGION} in brief."
_KEYS = ("file_name", "bbox", "caption")


def read(source: Source) -> list[Item]:
  """The items in the file's order; without an id they take their place in the file."""
  (path,) = source.files
  records = enumerate(read_records(path))
  items = [(i, record) for i, record in records if "objects365" in str(record.get("file_name"))]
  return [_item(record, i, f"{path}: item {i}") for i, record in items]


def _item(record: dict[str, Any], index: int, where: str) -> Item:
  missing = [key for key in _KEYS if key not in record]
  if missing:
    raise InputError(f"{where}: no key {missing[0]!r}; accepted: {', '.join(_KEYS)}")
  try:
    x, y, width, height = (int(value) for value in record["bbox"])  # cut off, as published
  except (TypeError, ValueError):
    raise InputError(
      f"{where}: bbox {record['bbox']!r}; accepted: x, y, width and height in pixels"
    ) from None
  return Item(
    id=record.get("id", index),
    where=where,
    video=record["file_name"],
    truth=record["caption"],
    objects=({0: {"box": [x, y, x + width, y + height]}},),
  )


REF_L4 = Benchmark(
  name="ref-l4",
  title="Ref-L4",
  kind=CAPTION,
  split="val",
  files=one_file("ref-l4-val.json"),
  root=in_images,
  read=read,
  prompt=fixed(PROMPT),
  export=export,
  new_tokens=128,
  regions=True,
  published=one_truth("video", "Answer", "pred", truth="Answer", image="video"),
  paper=(
    Row("PixelRefer-7B, shortened", {"CIDEr": 0.982}, SUCCESSORS),
    Row("PixelRefer-Lite-7B, shortened", {"CIDEr": 0.894}, SUCCESSORS),
  ),
  is_published=lambda items: False,  # the published answers and references were shortened
)
