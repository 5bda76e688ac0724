"""The lmms-eval plug-in: its task files, and lmms-eval itself where it is installed."""

import json
import subprocess
import sys
from importlib import metadata

import pytest

from data_pipes.bench_prompts import DESCRIBE
from vr_jax.evaluation.bench import read_bench
from vr_jax.evaluation.lmms import (
  collect_descriptions,
  doc_to_text,
  doc_to_visual,
  process_choice,
  process_description,
  write_tasks,
)


@pytest.fixture
def data(golden, tmp_path):
  folder = tmp_path / "data"
  folder.mkdir()
  for kind in ("d", "q"):
    (folder / f"bench_{kind}.json").symlink_to(golden / "data" / f"bench_{kind}.json")
  for name in ("clip_dir", "clip_mp4.mp4"):
    (folder / name).symlink_to(golden / "media" / name)
  return folder


def documents(folder, task):
  return [json.loads(line) for line in (folder / f"{task}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("mode", ["single", "multi"])
def test_task_files_hold_the_questions_and_masks(data, golden, tmp_path, mode):
  path = write_tasks("bench-q", data, tmp_path / "tasks", mode)
  assert str(tmp_path / "tasks" / "videorefer_bench_q.jsonl") in path.read_text()
  assert "QUESTIONS" not in path.read_text()
  items = read_bench(golden / "data" / "bench_q.json")
  for doc, item in zip(documents(path.parent, "videorefer_bench_q"), items, strict=True):
    (visual,) = doc_to_visual(doc)
    assert visual["annotation"] == item.masks(mode)
    assert visual["video"].endswith(item.video)
    assert doc_to_text(doc) == item.question


def test_answers_to_metrics(data, tmp_path):
  write_tasks("bench-q", data, tmp_path / "tasks")
  doc = documents(tmp_path / "tasks", "videorefer_bench_q")[0]
  assert process_choice(doc, ["(A)"]) == {"accuracy_strict": 1.0, "accuracy_published": 1.0}
  assert process_choice(doc, ["A helmet"]) == {"accuracy_strict": 1.0, "accuracy_published": 1.0}
  assert process_choice(doc, ["Answer: A"])["accuracy_published"] == 1.0  # the A of "Answer"
  assert process_choice(doc, ["A man"]) == {"accuracy_strict": 0.0, "accuracy_published": 1.0}
  write_tasks("bench-d", data, tmp_path / "tasks")
  doc = documents(tmp_path / "tasks", "videorefer_bench_d")[1]
  assert doc_to_text(doc) == DESCRIBE
  record = process_description(doc, ["a dog"])["predictions"]
  args = type("Args", (), {"output_path": str(tmp_path)})
  assert collect_descriptions([record], args) == 1
  (written,) = documents(tmp_path, "videorefer_bench_d.published")
  assert written == {"id": "1", "video": doc["video"], "caption": doc["truth"], "pred": "a dog"}


def test_the_plug_in_is_announced():
  (found,) = metadata.entry_points(group="lmms_eval.models", name="vr_jax")
  assert found.value == "vr_jax.evaluation.lmms:manifest"


@pytest.mark.lmms
def test_lmms_eval_runs_the_model(data, golden, tmp_path):
  recorded = json.loads((golden / "json" / "bench_inference.json").read_text())["Q"]["single"]
  task = write_tasks("bench-q", data, tmp_path / "tasks")
  task.write_text(task.read_text().replace("max_new_tokens: 64", "max_new_tokens: 16"))
  arguments = f"checkpoint={golden / 'tiny_videorefer_qwen2'},scene_frames=8,batch_size=1"
  command = [sys.executable, "-m", "lmms_eval", "--model", "vr_jax", "--model_args", arguments]
  command += ["--include_path", str(task.parent), "--tasks", "videorefer_bench_q"]
  command += ["--output_path", str(tmp_path / "out"), "--log_samples", "--batch_size", "1"]
  done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
  assert done.returncode == 0, done.stderr[-2000:]
  (samples,) = (tmp_path / "out").rglob("*samples_videorefer_bench_q.jsonl")
  said = {}
  for line in samples.read_text(encoding="utf-8").split("\n"):
    if line:
      record = json.loads(line)
      said[record["doc_id"]] = record["filtered_resps"][0]
  assert [said[i] for i in range(4)] == [r["output_record"]["pred"] for r in recorded]
