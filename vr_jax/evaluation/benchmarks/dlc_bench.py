"""DLC-Bench: a detailed description of an object in an image, judged by questions about it.

    DIR/annotations.json: COCO (images, annotations); DIR/qa.json, DIR/class_names.json: of each
    annotation's id its questions [{question, choices: [[text, score], ...], type}] and its name
    DIR/images/...

Source: nvidia/DLC-Bench; prompt: PixelRefer's evaluation/pixelrefer/infer_dam.py.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipes.errors import InputError
from data_pipes.tokenizer import REGION
from vr_jax.evaluation.benchmark import SUCCESSORS, Benchmark, Row, Source, fixed, in_images
from vr_jax.evaluation.items import Item, Prediction
from vr_jax.evaluation.scoring.dlc import QUESTIONED, questions_of

PROMPT = (
  f"Please describe the region {REGION} in the image in detail. Do not describe anything else."
)
FILES = ("annotations.json", "qa.json", "class_names.json")


def files(data: Path) -> list[Path]:
  """The three files of a folder, or those beside its annotation file."""
  folder = data if data.is_dir() else data.parent
  paths = [folder / name for name in FILES]
  for path in paths:
    if not path.is_file():
      raise InputError(f"--data {data}: no {path.name}; accepted: a folder with {', '.join(FILES)}")
  return paths


def read(source: Source) -> list[Item]:
  """The annotations that have questions, image by image; an id is that of the annotation."""
  coco, questions, names = (_object(path) for path in source.files)
  path = source.files[0]
  for key in ("images", "annotations"):
    if not isinstance(coco.get(key), list):
      raise InputError(f"{path}: no list {key!r}; accepted: COCO annotations")
  images = {image["id"]: image for image in coco["images"]}
  order = {number: i for i, number in enumerate(images)}
  by_image = sorted(coco["annotations"], key=lambda entry: order.get(entry["image_id"], -1))
  return [
    _item(entry, images, questions, names, f"{path}: annotation {entry['id']}")
    for entry in by_image
    if str(entry["id"]) in questions
  ]


def _object(path: Path) -> dict[str, Any]:
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except (UnicodeDecodeError, json.JSONDecodeError) as error:
    raise InputError(f"{path}: found {error}; accepted: a JSON object") from None
  if not isinstance(content, dict):
    raise InputError(f"{path}: found {type(content).__name__}; accepted: a JSON object")
  return content


def _item(
  entry: Mapping[str, Any],
  images: Mapping[Any, Mapping[str, Any]],
  questions: Mapping[str, Any],
  names: Mapping[str, str],
  where: str,
) -> Item:
  number = str(entry["id"])
  if entry["image_id"] not in images:
    raise InputError(f"{where}: no image {entry['image_id']}; accepted: one of 'images'")
  if number not in names:
    raise InputError(f"{where}: no name in {FILES[2]}; accepted: one for each annotation")
  truth = json.dumps({"class": names[number], "questions": questions[number]}, ensure_ascii=False)
  try:
    questions_of(truth)
  except (KeyError, TypeError, ValueError) as error:
    raise InputError(
      f"{where}: {FILES[1]}: {error!r}; accepted: question, choices with scores, type"
    ) from None
  return Item(
    id=number,
    where=where,
    video=images[entry["image_id"]]["file_name"],
    truth=truth,
    objects=({0: entry["segmentation"]},),
  )


def export(predictions: Sequence[Prediction]) -> Mapping[str, str]:
  """The file that the published scorer reads: {annotation id: description}."""
  answers = {str(p.id): p.pred for p in predictions if p.pred is not None}
  return {"published_pred.json": json.dumps(answers, ensure_ascii=False, indent=1)}


DLC_BENCH = Benchmark(
  name="dlc-bench",
  title="DLC-Bench",
  kind=QUESTIONED,
  files=files,
  root=in_images,
  read=read,
  prompt=fixed(PROMPT),
  export=export,
  new_tokens=512,
  regions=True,
  paper=(
    Row("PixelRefer-2B", {"Positive": 0.468, "Negative": 0.854, "Average": 0.661}, SUCCESSORS),
    Row("PixelRefer-7B", {"Positive": 0.496, "Negative": 0.870, "Average": 0.683}, SUCCESSORS),
    Row("PixelRefer-Lite-7B", {"Positive": 0.482, "Negative": 0.724, "Average": 0.603}, SUCCESSORS),
  ),
  is_published=lambda items: len(items) == 100,
)
