"""lmms-eval runs our models: `python -m lmms_eval --model vr_jax --model_args checkpoint=C ...`.

The entry point is `manifest`. lmms-eval's own tasks (mvbench, videomme, ...) ask with their prompts
and parsers; VideoRefer-Bench is not among them, so `write_tasks` makes task files for it:

    python -m vr_jax.evaluation.lmms bench-q DIR TASKS [single|multi]
    python -m lmms_eval --model vr_jax --include_path TASKS --tasks videorefer_bench_q
"""

import argparse
import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipes.errors import InputError
from data_pipes.files import json_line, write_text
from vr_jax.evaluation.benchmarks import registry
from vr_jax.evaluation.items import Prediction
from vr_jax.evaluation.scoring.choice import grade_one

TEMPLATES = Path(__file__).parent / "lmms_tasks"


def manifest() -> Any:
  """What lmms-eval registers."""
  from lmms_eval.models.registry_v2 import ModelManifest

  return ModelManifest(model_id="vr_jax", simple_class_path="vr_jax.evaluation.lmms_model.VRJax")


def write_tasks(name: str, data: Path | str, folder: Path | str, mode: str = "single") -> Path:
  """Writes the task file of a benchmark and its questions; returns the task file.

  Masks travel as text: the table reader of lmms-eval would give every item every frame number.
  """
  benchmark = registry.benchmark(name)
  task = benchmark.lmms_task
  if not task:
    raise InputError(f"{benchmark.title} has no task here; accepted: {', '.join(tasks())}")
  dataset = registry.read(benchmark, data)
  folder = Path(folder).resolve()
  documents = [
    {
      "benchmark": name,
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
  questions = folder / f"{task}.jsonl"
  write_text(questions, "".join(map(json_line, documents)))
  template = (TEMPLATES / f"{benchmark.kind.name}.yaml").read_text(encoding="utf-8")
  text = string.Template(template).substitute(
    title=benchmark.title,
    benchmark=name,
    task=task,
    questions=questions,
    new_tokens=benchmark.new_tokens,
  )
  write_text(folder / f"{task}.yaml", text)
  write_text(folder / "lmms_tasks.py", "from vr_jax.evaluation.lmms import *  # noqa: F403\n")
  return folder / f"{task}.yaml"


def tasks() -> dict[str, str]:
  """The task of each benchmark that lmms-eval does not have itself."""
  benchmarks = map(registry.benchmark, registry.names())
  return {b.name: b.lmms_task for b in benchmarks if b.lmms_task}


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
  benchmark = registry.benchmark(doc["benchmark"])
  prediction = Prediction(
    doc["id"], doc["video"], results[0], doc["truth"], doc["type"], options=tuple(doc["options"])
  )
  return {
    f"accuracy_{parser}": float(grade_one(benchmark, prediction, parser).correct)
    for parser in ("strict", "published")
  }


def process_description(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
  """The record that `vr score bench-d` judges; there is no score without a judge."""
  record = {"id": doc["id"], "video": doc["video"], "caption": doc["truth"], "pred": results[0]}
  return {"predictions": {"benchmark": doc["benchmark"], **record}}


def collect_descriptions(records: Sequence[Mapping[str, Any]], args: Any = None) -> int:
  """Writes the predictions beside lmms-eval's results; returns how many there are."""
  folder = Path(getattr(args, "output_path", None) or ".")
  by_name: dict[str, list[dict[str, Any]]] = {}
  for record in records:
    kept = {key: value for key, value in record.items() if key != "benchmark"}
    by_name.setdefault(record["benchmark"], []).append(kept)
  for name, answers in by_name.items():
    task = registry.benchmark(name).lmms_task
    write_text(folder / f"{task}.published.jsonl", "".join(map(json_line, answers)))
  return len(records)


def main() -> None:
  """Writes the task files of one benchmark, and prints where."""
  parser = argparse.ArgumentParser(prog="python -m vr_jax.evaluation.lmms")
  parser.add_argument("benchmark", choices=list(tasks()))
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
