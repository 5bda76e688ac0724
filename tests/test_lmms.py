"""The lmms-eval plug-in: its task files, and lmms-eval itself where it is installed."""

import json
import re
import subprocess
import sys
from importlib import metadata

import pytest

import vr_jax
from data_pipes.prompts import DESCRIBE
from vr_jax import cli
from vr_jax.evaluation.benchmarks.registry import benchmark, read
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
  items = read(benchmark("bench-q"), golden / "data" / "bench_q.json").items
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


@pytest.fixture
def run_lmms_eval(data, golden, tmp_path):
  """Runs a benchmark in lmms-eval; gives its samples in order, its output folder and its words."""

  def run(name, mode, batch_size=1):
    task, out = write_tasks(name, data, tmp_path / "tasks", mode), tmp_path / "out"
    task.write_text(re.sub(r"max_new_tokens: \d+", "max_new_tokens: 16", task.read_text()))
    arguments = f"checkpoint={golden / 'tiny_videorefer_qwen2'},scene_frames=8,mask_rule=published"
    command = [sys.executable, "-m", "lmms_eval", "--model", "vr_jax", "--model_args", arguments]
    command += ["--include_path", str(task.parent), "--tasks", task.stem, "--log_samples"]
    command += ["--output_path", str(out), "--batch_size", str(batch_size)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    said = done.stdout + done.stderr
    found = list(out.rglob(f"*samples_{task.stem}.jsonl"))
    assert len(found) == 1, said[-3000:]  # lmms-eval exits with 0 after a failure, too
    samples = [json.loads(line) for line in found[0].read_text("utf-8").split("\n") if line]
    return sorted(samples, key=lambda sample: sample["doc_id"]), out, said

  return run


@pytest.mark.lmms
@pytest.mark.parametrize("mode", ["single", "multi"])
def test_lmms_eval_gets_the_published_answers_to_bench_q(run_lmms_eval, golden, mode):
  recorded = json.loads((golden / "json" / "bench_inference.json").read_text())["Q"][mode]
  samples, out, _ = run_lmms_eval("bench-q", mode)
  assert [s["filtered_resps"] for s in samples] == [r["output_record"]["pred"] for r in recorded]
  (results,) = out.rglob("*_results.json")
  told = json.loads(results.read_text())["results"]["videorefer_bench_q"]
  for parser in ("strict", "published"):
    mean = sum(s[f"accuracy_{parser}"] for s in samples) / len(samples)
    assert told[f"accuracy_{parser},none"] == pytest.approx(mean)


@pytest.mark.lmms
@pytest.mark.parametrize("mode", ["single", "multi"])
def test_lmms_eval_writes_the_published_descriptions_of_bench_d(
  run_lmms_eval, golden, tmp_path, mode
):
  recorded = json.loads((golden / "json" / "bench_inference.json").read_text())["D"][mode]
  _, out, _ = run_lmms_eval("bench-d", mode, batch_size=2)
  written = out / "videorefer_bench_d.published.jsonl"
  said = {r["id"]: r["pred"] for r in map(json.loads, written.read_text("utf-8").splitlines())}
  assert said == {str(r["id"]): r["output_record"]["pred"] for r in recorded}
  command = ["score", "bench-d", str(written), "--judge", "rule", "--out", str(tmp_path / "scored")]
  assert cli.main(command) == 0


@pytest.mark.lmms
def test_a_task_of_lmms_eval_gives_a_path(data, golden, tmp_path):
  """As its own video tasks do: a question and the video's path, no objects."""
  from lmms_eval.api.instance import Instance

  from vr_jax.evaluation.lmms_model import VRJax

  clip, checkpoint = str(data / "clip_mp4.mp4"), golden / "tiny_videorefer_qwen2"
  model = VRJax(str(checkpoint), scene_frames="4", batch_size="2")
  model.task_dict = {"task": {"test": [clip]}}
  settings = {"max_new_tokens": 8, "until": ["\n\n"]}
  arguments = ("What happens?", settings, lambda doc: [doc], 0, "task", "test")
  request = Instance("generate_until", arguments, 0, {"task": "task", "doc_id": 0, "repeats": 1})
  (text,) = model.generate_until([request])
  assert text
  asked = vr_jax.load(checkpoint).ask(clip, "What happens?", max_new_tokens=8, scene_frames=4)
  assert text == asked.text


@pytest.mark.lmms
def test_an_item_without_media_costs_lmms_eval_no_other(run_lmms_eval, data, golden):
  recorded = json.loads((golden / "json" / "bench_inference.json").read_text())["Q"]["single"]
  items = json.loads((golden / "data" / "bench_q.json").read_text())
  items[1]["video"] = "absent.mp4"
  (data / "bench_q.json").unlink()
  (data / "bench_q.json").write_text(json.dumps(items))
  samples, _, said = run_lmms_eval("bench-q", "single")
  expected = [r["output_record"]["pred"] for r in recorded]
  expected[1] = ""
  assert [s["filtered_resps"] for s in samples] == expected
  assert samples[1]["accuracy_strict"] == 0
  assert "absent.mp4" in said
  assert "1 of 4 could not be asked" in said
