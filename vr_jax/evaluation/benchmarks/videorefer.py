"""VideoRefer-Bench: the published D (description) and Q (multiple choice) files, and predictions.

Formats and prompts: videorefer/eval/inference_videorefer_{d,q}_bench.py of the published code.
"""

import collections
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipes.errors import InputError
from data_pipes.files import json_line
from data_pipes.json_items import read_items
from data_pipes.prompts import DESCRIBE, LETTER_ONLY, bench_q_prompt
from data_pipes.records import parse_bench
from data_pipes.tokenizer import REGION
from vr_jax.evaluation.benchmark import (
  Benchmark,
  Row,
  Source,
  fixed,
  in_data_folder,
  numbered,
  one_file,
  one_truth,
)
from vr_jax.evaluation.items import Item, Prediction
from vr_jax.evaluation.scoring.choice import CHOICE
from vr_jax.evaluation.scoring.descriptions import JUDGED
from vr_jax.evaluation.scoring.judge_scores import DIMENSIONS, BenchD
from vr_jax.evaluation.scoring.statistics import Summary


def _read(source: Source, kind: str) -> list[Item]:
  """The items of VideoRefer-Bench-D.json or -Q.json; without an id they take their place.

  Raises:
    InputError: not JSON, no list, an item without one of the published keys or of the other file.
  """
  (path,) = source.files
  items = [_item(item, i, f"{path}: item {i}") for i, item in enumerate(read_items(path))]
  if any(bool(item.options) != (kind == "Q") for item in items):
    raise InputError(f"{path}: its items are not those of VideoRefer-Bench-{kind}")
  return items


def _item(item: Any, index: int, where: str) -> Item:
  if not isinstance(item, dict):
    raise InputError(f"{where}: found {type(item).__name__}; accepted: an object")
  kind = "Q" if "Question" in item else "D"
  bench = parse_bench(item, where, kind)
  return Item(
    id=item.get("id", index),
    where=where,
    video=bench.video,
    bare_question=bench.question,
    type=str(item.get("type") or ""),
    truth=bench.truth,
    options=bench.options,
    objects=bench.objects,
    frame=bench.frame,
  )


def published_record(prediction: Prediction) -> dict[str, Any]:
  """The line that the published scripts write; they leave the id out."""
  if prediction.options:
    kept = {"Answer": prediction.truth}
  else:
    kept = {"caption": prediction.truth}
  record = {"video": prediction.video, **kept, "pred": prediction.pred}
  return record | ({"type": prediction.type} if prediction.options else {})


def _export(predictions: Sequence[Prediction]) -> Mapping[str, str]:
  answered = (p for p in predictions if p.pred is not None)
  return {"published.jsonl": "".join(json_line(published_record(p)) for p in answered)}


def printed_accuracies(summary: Summary) -> str:
  """What videorefer/eval/eval_videorefer_bench_q.py prints."""
  parts = [(f"  {part.name}  ", part) for part in summary.types] + [(" average ", summary.micro)]
  return "".join(
    f"#######{title}#######\nall num:  {part.n}\nright num:  {part.correct}\n"
    f"accuracy:  {part.value}\n"
    for title, part in parts
  )


def printed_means(means: BenchD) -> str:
  """What 2.extract_re.py and 3.analyze_score.py of videorefer/eval/videorefer_bench_d print."""
  text = f"####error num:  {means.failed}\n" if means.failed else ""
  text += "".join(f"{d.name} :  {d.mean}\n{d.n}\n" for d in means.dimensions if d.mean is not None)
  return text + (f"all....\n{means.average}\n" if means.average is not None else "")


# Tables 1 and 2 of the VideoRefer Suite (arXiv 2501.00599). Accuracies per type follow from counts
# of right answers that reproduce the printed cells and averages.
TYPE_SIZES = {
  "Basic Questions": 236,
  "Sequential Questions": 255,
  "Relationship Questions": 253,
  "Reasoning Questions": 142,
  "Future Predictions": 114,
}


def _is_bench_q(items: Sequence[Mapping[str, Any]]) -> bool:
  types = collections.Counter(item["type"] for item in items)
  filmed = all(re.match(r"(?i)davis|mevis", item["video"]) for item in items)
  return numbered(items, sum(TYPE_SIZES.values())) and types == TYPE_SIZES and filmed


def _is_bench_d(items: Sequence[Mapping[str, Any]]) -> bool:
  embedded = any(item["video"].startswith("videos/") for item in items)  # our own set's names
  return numbered(items, 400) and not embedded


def _accuracies(system: str, *right: int) -> Row:
  values = {name: r / n for (name, n), r in zip(TYPE_SIZES.items(), right, strict=True)}
  return Row(system, {**values, "All": sum(right) / sum(TYPE_SIZES.values())})


def _points(system: str, *values: float) -> Row:
  return Row(system, dict(zip((*DIMENSIONS, "Average"), values, strict=True)))


# How the successors are asked; Q takes the question as it is, its `<region>` brings its brackets.
_DESCRIBE = f"Please describe in detail the marked object {REGION} in the video."
DESCRIBE_BY_KIND = {
  "cells": f"{_DESCRIBE}\n<video>",
  "placed_cells": _DESCRIBE,
  "cells_in_context": f"There is one object in the video: {REGION}.\n"
  "Please describe in detail the marked object in the video.",
}


def bare_q_prompt(question: str, options: Sequence[str]) -> str:
  """VideoRefer-Bench-Q as the successors are asked it."""
  return f"{question} {' '.join(options)}. {LETTER_ONLY}."


BENCH_D = Benchmark(
  name="bench-d",
  title="VideoRefer-Bench-D",
  kind=JUDGED,
  files=one_file("VideoRefer-Bench-D.json", "bench_d.json"),
  root=in_data_folder,
  read=functools.partial(_read, kind="D"),
  prompt=fixed(DESCRIBE),
  prompts={kind: fixed(text) for kind, text in DESCRIBE_BY_KIND.items()},
  export=_export,
  new_tokens=512,
  regions=True,
  # The later edition writes the truth as "Answer".
  published=one_truth("video", "caption", "pred", truth="caption", Answer="caption"),
  printed=printed_means,
  paper=(
    _points("VideoRefer-7B, single-frame", 4.41, 3.27, 3.03, 2.97, 3.42),
    _points("VideoRefer-7B, multi-frame", 4.44, 3.27, 3.10, 3.04, 3.46),
    Row("GPT-4o, single-frame", {"Average": 2.95}),
    Row("GPT-4o, multi-frame", {"Average": 3.25}),
  ),
  is_published=_is_bench_d,
  lmms_task="videorefer_bench_d",
)
BENCH_Q = Benchmark(
  name="bench-q",
  title="VideoRefer-Bench-Q",
  kind=CHOICE,
  files=one_file("VideoRefer-Bench-Q.json", "bench_q.json"),
  root=in_data_folder,
  read=functools.partial(_read, kind="Q"),
  prompt=bench_q_prompt,
  prompts=dict.fromkeys(DESCRIBE_BY_KIND, bare_q_prompt),
  export=_export,
  new_tokens=64,
  regions=True,
  published=one_truth("video", "Answer", "pred", "type", truth="Answer"),
  printed=printed_accuracies,
  paper=(
    _accuracies("VideoRefer-7B, single-frame", 178, 175, 150, 127, 89),
    _accuracies("GPT-4o, single-frame", 147, 190, 167, 125, 84),
  ),
  is_published=_is_bench_q,
  lmms_task="videorefer_bench_q",
)
