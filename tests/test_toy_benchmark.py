"""A benchmark is one file and one line of the table: this file is one, and the test its line."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipes.files import json_line
from data_pipes.masks import encode_mask
from vr_jax import cli
from vr_jax.evaluation import lmms
from vr_jax.evaluation.benchmark import (
  Benchmark,
  Row,
  Source,
  in_data_folder,
  one_file,
  one_truth,
)
from vr_jax.evaluation.benchmarks import registry
from vr_jax.evaluation.items import Item
from vr_jax.evaluation.scoring.choice import CHOICE


def read_toy(source: Source) -> list[Item]:
  """[{clip, ask, choices, right, frame, mask}, ...]."""
  (path,) = source.files
  return [
    Item(
      id=f"toy/{i}",
      where=f"{path}: item {i}",
      video=entry["clip"],
      bare_question=entry["ask"],
      type="Colour",
      truth=entry["right"],
      options=tuple(entry["choices"]),
      objects=({entry["frame"]: entry["mask"]},),
      frame=entry["frame"],
    )
    for i, entry in enumerate(json.loads(path.read_text()))
  ]


TOY = Benchmark(
  name="toy",
  title="Toy-Bench",
  kind=CHOICE,
  files=one_file("toy.json"),
  root=in_data_folder,
  read=read_toy,
  prompt=lambda question, options: f"{question} Choose: {' '.join(options)}",
  export=lambda predictions: {
    "toy.jsonl": "".join(json_line({"pred": p.pred}) for p in predictions)
  },
  new_tokens=2,
  regions=True,
  published=one_truth("video", "Answer", "pred", truth="Answer"),
  parse=lambda text, options: text[-1:].upper(),  # the last letter, whatever it is
  printed=lambda summary: f"TOY {summary.micro.correct} of {summary.micro.n}",
  paper=(Row("VideoRefer-7B, multi-frame", {"Colour": 0.25, "All": 0.25}, "toy paper"),),
  lmms_task="toy_task",
)
CHOICES = ["(A) red", "(B) blue"]


@pytest.fixture
def toy(tmp_path, monkeypatch) -> Path:
  """The folder of three questions on one clip, and the line of the table."""
  monkeypatch.setitem(registry.BENCHMARKS, "toy", "test_toy_benchmark:TOY")
  folder = tmp_path / "toy"
  (folder / "clip").mkdir(parents=True)
  for frame in range(2):
    Image.new("RGB", (64, 48), (200, 40 * frame, 30)).save(folder / "clip" / f"{frame}.png")
  mask = np.zeros((48, 64), np.uint8)
  mask[10:30, 20:40] = 1
  item = {
    "clip": "clip",
    "ask": "What colour has <object0><region>?",
    "choices": CHOICES,
    "right": "(A) red",
    "frame": 1,
    "mask": encode_mask(mask),
  }
  (folder / "toy.json").write_text(json.dumps([item] * 3))
  return folder


def predictions(folder: Path) -> Path:
  """Answers in the published shape: strictly right, wrong and unreadable."""
  path = folder / "answers.jsonl"
  answers = ("(A)", "B", "none of a")
  record = {"video": "clip", "Answer": "(A) red", "type": "Colour"}
  path.write_text("".join(json_line({**record, "pred": answer}) for answer in answers))
  return path


def test_the_table_names_its_benchmarks():
  for name in registry.names():
    assert registry.benchmark(name).name == name


def test_a_benchmark_is_read_with_its_prompt(toy):
  dataset = registry.read(registry.benchmark("toy"), toy)
  assert [item.id for item in dataset.items] == ["toy/0", "toy/1", "toy/2"]
  assert dataset.items[0].question == (
    "What colour has <object0><region>? Choose: (A) red (B) blue"
  )
  assert (dataset.media, dataset.files, dataset.split) == (toy, [toy / "toy.json"], "test")


def test_a_benchmark_is_scored_and_reported_beside_its_paper(toy, tmp_path, capsys):
  path = predictions(tmp_path)
  assert cli.main(["score", "toy", str(path)]) == 0
  text = capsys.readouterr().out
  assert "Toy-Bench: strict parser" in text
  assert "33.3 %" in text
  assert cli.main(["score", "toy", str(path), "--parser", "published"]) == 0
  assert "TOY 1 of 3" in capsys.readouterr().out
  results = str(tmp_path / "answers" / "strict")
  command = ["report", results, "--data", str(toy), "--out", str(tmp_path / "report")]
  assert cli.main(command) == 0
  table = (tmp_path / "report" / "report.md").read_text()
  assert "# Toy-Bench" in table
  assert "| VideoRefer-7B, multi-frame (from the toy paper) | 25.0 | 25.0 |" in table
  assert "In percent" in table
  page = (tmp_path / "report" / "report.html").read_text()
  assert "toy paper" in table
  assert "Accuracy by type" in page


def test_a_model_answers_a_benchmark(toy, tmp_path, capsys):
  out = tmp_path / "run"
  command = ["eval", "toy", "--data", str(toy), "--out", str(out), "--limit", "2"]
  assert cli.main([*command, "--scene-frames", "2"]) == 0
  assert "'answered': 2" in capsys.readouterr().out
  assert len((out / "toy.jsonl").read_text().splitlines()) == 2
  run = json.loads((out / "run.json").read_text())
  assert (run["task"]["title"], run["inference"]["max_new_tokens"]) == ("Toy-Bench", 2)
  assert cli.main(["score", "toy", str(out)]) == 0
  assert (out / "strict" / "result.json").is_file()


def test_a_benchmark_is_a_task_of_lmms_eval(toy, tmp_path):
  task = lmms.write_tasks("toy", toy, tmp_path / "tasks")
  assert task.name == "toy_task.yaml"
  assert "max_new_tokens: 2\n" in task.read_text()
  doc = json.loads((tmp_path / "tasks" / "toy_task.jsonl").read_text().splitlines()[0])
  assert lmms.doc_to_text(doc).startswith("What colour")
  # Published, the last letter counts: the d of "red" is no option.
  assert lmms.process_choice({**doc, "truth": "(A) red"}, ["it is red"]) == {
    "accuracy_strict": 1.0,
    "accuracy_published": 0.0,
  }
