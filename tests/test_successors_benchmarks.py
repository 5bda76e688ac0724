"""The benchmarks that came with VideoRefer's successors, and how each generation is asked."""

import json

import numpy as np
import pytest
from PIL import Image

from data_pipes.errors import InputError
from data_pipes.masks import segmentation_to_mask
from vr_jax.evaluation.benchmarks.registry import benchmark, read
from vr_jax.evaluation.items import Prediction
from vr_jax.evaluation.score import score
from vr_jax.evaluation.scoring import dlc
from vr_jax.evaluation.scoring.dlc import choice_of, is_plural, questions_of, with_article
from vr_jax.evaluation.settings import JudgeSettings

KINDS = ("token_merge", "cells", "placed_cells", "cells_in_context")


def asked(name, kind, question="", options=()):
  bench = benchmark(name)
  return bench.prompts.get(kind, bench.prompt)(question, options)


def test_each_generation_is_asked_in_its_own_words():
  assert [asked("hc-stvg", kind)[-13:] for kind in KINDS] == [
    "one sentense.", "one sentense.", "in the video.", "one sentense.",
  ]  # fmt: skip
  assert asked("bench-d", "cells").endswith("in the video.\n<video>")
  assert asked("bench-d", "cells_in_context").startswith("There is one object in the video: <reg")
  questions = {asked("bench-q", kind, "Is <region> red?", ["(A) Yes"]) for kind in KINDS[1:]}
  assert questions == {
    "Is <region> red? (A) Yes. Answer with the option's letter from the given choices directly."
  }
  assert asked("bench-q", "token_merge", "Is <region> red?", ["(A) Yes"]).startswith(
    "Is [<region>]"
  )
  for name in ("bench-d", "hc-stvg", "ref-l4", "dlc-bench"):
    assert all(asked(name, kind).count("<region>") == 1 for kind in KINDS)


def test_ref_l4_asks_about_boxes_in_images_of_objects365(tmp_path):
  lines = [
    {"file_name": "objects365/a.jpg", "bbox": [-3, 10.9, 20, 10], "caption": "a cup", "id": "x"},
    {"file_name": "coco/b.jpg", "bbox": [0, 0, 5, 5], "caption": "left out"},
    {"file_name": "objects365/c.jpg", "bbox": [1, 2, 3, 4], "caption": "a dog"},
  ]
  (tmp_path / "images").mkdir()
  (tmp_path / "ref-l4-val.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
  data = read(benchmark("ref-l4"), tmp_path)
  assert data.media == tmp_path / "images"
  assert [(i.id, i.video, i.truth) for i in data.items] == [
    ("x", "objects365/a.jpg", "a cup"), (2, "objects365/c.jpg", "a dog"),
  ]  # fmt: skip
  assert data.items[0].objects == ({0: {"box": [-3, 10, 17, 20]}},)
  mask = segmentation_to_mask(data.items[0].objects[0][0], 30, 40)
  assert (mask[10:20, :17] == 1).all()
  assert mask.sum() == 170


def test_bad_ref_l4_files_are_refused(tmp_path):
  path = tmp_path / "ref-l4-val.json"
  path.write_text(json.dumps([{"file_name": "objects365/a.jpg", "bbox": [1, 2], "caption": "c"}]))
  with pytest.raises(InputError, match=r"item 0: bbox \[1, 2\]; accepted: x, y, width"):
    read(benchmark("ref-l4"), tmp_path)


QUESTIONS = [
  {
    "question": "Its colour?",
    "choices": [["Red", 1], ["Blue", -1], ["Not said", 0]],
    "type": "positive",
  },
  {"question": "Is there a lid?", "choices": [["A lid", -1], ["No lid", 1]], "type": "negative"},
]


def dlc_folder(folder):
  box = {"size": [8, 8], "counts": [0, 20, 44]}
  coco = {
    "images": [{"id": 7, "file_name": "a.png"}, {"id": 5, "file_name": "b.png"}],
    "annotations": [
      {"id": 1, "image_id": 5, "segmentation": box},
      {"id": 2, "image_id": 7, "segmentation": box},
      {"id": 3, "image_id": 7, "segmentation": box},
    ],
  }
  (folder / "annotations.json").write_text(json.dumps(coco))
  (folder / "qa.json").write_text(json.dumps({"1": QUESTIONS, "2": QUESTIONS}))
  (folder / "class_names.json").write_text(json.dumps({"1": "umbrella", "2": "Cups"}))
  for name in ("a.png", "b.png"):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / name)
  return folder


def test_dlc_bench_is_read_from_its_three_files(tmp_path):
  data = read(benchmark("dlc-bench"), dlc_folder(tmp_path))
  assert [(i.id, i.video) for i in data.items] == [("2", "a.png"), ("1", "b.png")]
  known, colour, _ = questions_of(data.items[0].truth)
  assert known.text.startswith("Is it likely that the objects in the description are Cups or obj")
  assert colour.prompt("Round.").endswith("Its colour?\nA. Red\nB. Blue\nC. Not said\n")
  (tmp_path / "qa.json").write_text(json.dumps({"1": [{"question": "?"}]}))
  with pytest.raises(InputError, match=r"annotation 1: qa.json: KeyError"):
    read(benchmark("dlc-bench"), tmp_path)


@pytest.mark.parametrize(
  ("reply", "index"),
  [
    ("Red", 0), ("b. blue", 1), (" C ", 2), ("It is blue.", 1), ("C. it does not say", 2),
    ("Not red but blue", 1), ("sai", 2), ("", None), ("e", 1), ("Green", None), ("D. x", None),
  ],
)  # fmt: skip
def test_choices_are_read_as_published(reply, index):
  assert choice_of(reply, ["Red", "Blue", "Not said"]) == index


def test_names_of_things():
  assert [with_article(name) for name in ("cup", "Umbrella")] == ["a cup", "an Umbrella"]
  plural = ("Cups", "wine glasses", "bus", "glass", "cactus", "")
  assert [is_plural(name) for name in plural] == [True, True, False, False, False, False]


def test_descriptions_are_scored_by_the_choices_of_the_judge(tmp_path):
  truth = json.dumps({"class": "cup", "questions": QUESTIONS})
  bench = benchmark("dlc-bench")
  predictions = [Prediction(str(i), "a.png", "A red cup.", truth) for i in range(3)]
  replies = {"0/0": "Yes", "0/1": "Red", "0/2": "A lid", "1/0": "No", "1/1": "Red", "1/2": "A lid"}
  log = tmp_path / "replies.jsonl"
  log.write_text("".join(json.dumps({"id": k, "reply": v}) + "\n" for k, v in replies.items()))
  settings = dlc.ScoreSettings(
    "strict", tmp_path, tmp_path, JudgeSettings(spec=f"replay:{log}"), None, lambda text: None
  )
  result = bench.kind.score(bench, predictions, {}, settings)
  # Of the second no question counts for more than 0, as it is taken for another thing.
  assert [item["parsed"] for item in result.items] == [
    {"positive": 1.0, "negative": -1.0}, {"positive": 0.0, "negative": -1.0}, None,
  ]  # fmt: skip
  assert result.items[2]["problem"] == "judge: no recorded reply"
  values = {m.slice: m.value for m in result.metrics}
  assert values == {"Positive": 0.5, "Negative": -1.0, "Average": -0.25}
  assert result.counts["judge_failed"] == 1


def test_the_rule_judge_cannot_answer_questions(tmp_path):
  truth = json.dumps({"class": "cup", "questions": QUESTIONS})
  settings = dlc.ScoreSettings(
    "strict", tmp_path, tmp_path, JudgeSettings(spec="rule"), None, lambda text: None
  )
  bench = benchmark("dlc-bench")
  predictions = [Prediction("0", "a.png", "A cup.", truth)]
  with pytest.raises(InputError, match="--judge rule scores descriptions"):
    bench.kind.score(bench, predictions, {}, settings)


def test_a_file_of_descriptions_alone_cannot_be_scored(tmp_path):
  path = tmp_path / "p.json"
  path.write_text("[{}]")
  with pytest.raises(InputError, match="DLC-Bench files hold no truths"):
    score("dlc-bench", path)
