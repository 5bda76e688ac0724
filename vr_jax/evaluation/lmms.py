"""lmms-eval runs our models: `python -m lmms_eval --model vr_jax --model_args checkpoint=C ...`.

The entry point is `manifest`. lmms-eval's own tasks (mvbench, videomme, ...) ask with their prompts
and parsers; VideoRefer-Bench is not among them, so `write_tasks` makes task files for it:

    python -m vr_jax.evaluation.lmms bench-q DIR TASKS [single|multi]
    python -m lmms_eval --model vr_jax --include_path TASKS --tasks videorefer_bench_q
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipes.errors import InputError
from vr_jax.evaluation.benchmarks import registry
from vr_jax.evaluation.items import Prediction
from vr_jax.evaluation.results import write
from vr_jax.evaluation.scoring.choice import grade_one

TASKS = {"bench-q": "videorefer_bench_q", "bench-d": "videorefer_bench_d"}
TEMPLATES = Path(__file__).parent / "lmms_tasks"


def manifest() -> Any:
  """What lmms-eval registers."""
  from lmms_eval.models.registry_v2 import ModelManifest

  return ModelManifest(model_id="vr_jax", simple_class_path="vr_jax.evaluation.lmms_model.VRJax")


def write_tasks(name: str, data: Path | str, folder: Path | str, mode: str = "single") -> Path:
  """Writes the task file of a benchmark and its questions; returns the task file.

  Masks travel as text: the table reader of lmms-eval would give every item every frame number.
  """
  of = registry.benchmark(name)
  dataset = registry.read(of, data)
  folder, task = Path(folder).resolve(), TASKS[name]
  documents = [
    {
      "id": str(item.id),
      "video": str((dataset.media / item.video).resolve()),
      "question": item.question,
      "type": item.type,
      "truth": item.truth,
      "options": list(item.options),
      "masks": json.dumps([{str(n): m for n, m in by.items()} for by in item.masks(mode)]),
    }
    for item in dataset.items
  ]
  lines = (json.dumps(document, ensure_ascii=False) for document in documents)
  questions = folder / f"{task}.jsonl"
  write(questions, "".join(f"{line}\n" for line in lines))
  template = (TEMPLATES / f"{task}.yaml").read_text(encoding="utf-8")
  write(folder / f"{task}.yaml", template.replace("QUESTIONS", str(questions)))
  write(folder / "lmms_tasks.py", "from vr_jax.evaluation.lmms import *  # noqa: F403\n")
  return folder / f"{task}.yaml"


# --- What the task files name.


def doc_to_visual(doc: Mapping[str, Any]) -> list[dict[str, Any]]:
  """One object with the video's path and the masks; `lmms_model` takes it."""
  masks = [{int(n): m for n, m in by.items()} for by in json.loads(doc["masks"])]
  return [{"video": doc["video"], "annotation": masks}]


def doc_to_text(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
  """The published prompt, byte for byte."""
  return doc["question"]


def process_choice(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
  """Right or wrong by both parsers."""
  of = registry.benchmark("bench-q")
  prediction = Prediction(
    doc["id"], doc["video"], results[0], doc["truth"], doc["type"], options=tuple(doc["options"])
  )
  return {
    f"accuracy_{parser}": float(grade_one(of, prediction, parser).correct)
    for parser in ("strict", "published")
  }


def process_description(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
  """The record that `vr score bench-d` judges; there is no score without a judge."""
  record = {"id": doc["id"], "video": doc["video"], "caption": doc["truth"], "pred": results[0]}
  return {"predictions": record}


def collect_descriptions(records: Sequence[Mapping[str, Any]], args: Any = None) -> int:
  """Writes the predictions beside lmms-eval's results; returns how many there are."""
  folder = Path(getattr(args, "output_path", None) or ".")
  lines = (json.dumps(record, ensure_ascii=False) for record in records)
  write(folder / "videorefer_bench_d.published.jsonl", "".join(f"{line}\n" for line in lines))
  return len(records)


def main() -> None:
  """Writes the task files of one benchmark, and prints where."""
  parser = argparse.ArgumentParser(prog="python -m vr_jax.evaluation.lmms")
  parser.add_argument("benchmark", choices=list(TASKS))
  parser.add_argument("data", metavar="DIR")
  parser.add_argument("tasks", metavar="TASKS")
  parser.add_argument("mode", nargs="?", choices=["single", "multi"], default="single")
  args = parser.parse_args()
  try:
    print(write_tasks(args.benchmark, args.data, args.tasks, args.mode))
  except InputError as error:
    parser.error(str(error))


if __name__ == "__main__":
  main()
