"""HC-STVG, MVBench, VideoMME and Perception-Test: look-alikes of the published files and media."""

import itertools
import json
import shutil

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

import vr_jax
from data_pipes.errors import InputError
from data_pipes.masks import encode_mask
from data_pipes.video import open_video, sample_scene
from vr_jax.evaluation.benchmarks import mvbench, perception, videomme
from vr_jax.evaluation.benchmarks.registry import benchmark, read
from vr_jax.evaluation.benchmarks.videomme import read_srt, subtitle_text
from vr_jax.evaluation.items import Prediction
from vr_jax.evaluation.run import Settings, evaluate
from vr_jax.evaluation.score import read_source
from vr_jax.evaluation.scoring.choice import score as score_choice

SRT = """1
00:00:00,000 --> 00:00:01,000
Hello there,
<i>friend</i>

2
00:00:00,900 --> 00:00:01,600
7 days

3
00:00:01,600 --> 00:00:03,000

"""


@pytest.fixture
def clip(golden):
  return golden / "media" / "clip_mp4.mp4"


@pytest.fixture
def mv(tmp_path, clip):
  """All twenty tasks, one item each; the video of one is a folder of frames."""
  folder = tmp_path / "mvbench"
  (folder / "json").mkdir(parents=True)
  for task, place in mvbench.TASKS.items():
    item = {
      "video": "a.mp4",
      "question": f"What, in {task}?",
      "candidates": ["He runs", "He sits", "He runs"],
      "answer": "He runs",
      "start": 0.2,
      "end": 0.7,
    }
    media = folder / "video" / place
    media.mkdir(parents=True, exist_ok=True)
    if task == "Episodic Reasoning":
      item["video"] = "castle_s01"
      (media / "castle_s01").mkdir()
      for f in range(1, 10):
        Image.new("RGB", (16, 12), (20 * f, 0, 0)).save(media / "castle_s01" / f"{f:05}.jpg")
    elif not (media / "a.mp4").exists():
      (media / "a.mp4").symlink_to(clip)
    (folder / "json" / mvbench.task_file(task)).write_text(json.dumps([item]))
  return folder


def test_mvbench(mv, clip):
  data = read(benchmark("mvbench"), mv)
  assert len(data.items) == 20
  by_task = {item.type: item for item in data.items}
  assert mvbench.task_file("Fine-grained Action") == "fine_grained_action.json"
  item = by_task["Action Sequence"]
  assert item.id == "Action Sequence/0"
  assert item.truth == "(C) He runs"  # of equal candidates the last, as published
  assert item.question.startswith(
    "Question: What, in Action Sequence?\nOptions:\n(A) He runs\n(B) He sits\n(C) He runs\nAnswer"
  )
  # Only five tasks take the bounds.
  request = item.request(data.media, "multi", 4)
  assert request.video.resolve() == clip.resolve()
  assert request.seconds == (0.2, 0.7)
  assert by_task["Action Antonym"].request(data.media, "multi", 4).seconds is None
  assert sum(item.seconds is not None for item in data.items) == 5
  # A folder of frames has 3 frames a second: 0.2 to 0.7 s is its first two.
  request = by_task["Episodic Reasoning"].request(data.media, "multi", 4)
  frames = sample_scene(open_video(request.video), 4, *request.seconds)
  assert len(frames) == 4
  assert {int(f[0, 0, 0]) for f in frames} <= {20, 40}


def test_mvbench_needs_all_tasks(mv, tmp_path):
  (mv / "json" / "action_count.json").unlink()
  with pytest.raises(InputError, match=r"1 of 20 task files are absent, the first action_count"):
    read(benchmark("mvbench"), mv)
  item = {"video": "a.mp4", "question": "?", "candidates": ["x"], "answer": "y"}
  (mv / "json" / "action_count.json").write_text(json.dumps([item]))
  with pytest.raises(InputError, match="answer 'y' is none of the candidates"):
    read(benchmark("mvbench"), mv)


def videomme_rows():
  return [
    {
      "video_id": f"{v:03}",
      "videoID": f"yt{v}",
      "url": f"https://www.youtube.com/watch?v=yt{v}",
      "duration": ("short", "long")[v],
      "domain": "Knowledge",
      "sub_category": "Geography",
      "question_id": f"{v:03}-{q}",
      "task_type": "Counting Problem",
      "question": "How many?",
      "options": ["A. 1.", "B. 2.", "C. 3.", "D. 4."],
      "answer": "B",
    }
    for v in range(2)
    for q in range(1, 4)
  ]


@pytest.fixture
def mme(tmp_path, clip):
  folder = tmp_path / "videomme"
  for name in ("videomme", "videos", "subtitles"):
    (folder / name).mkdir(parents=True)
  table = pyarrow.Table.from_pylist(videomme_rows())
  pyarrow.parquet.write_table(table, folder / "videomme" / "test-00000-of-00001.parquet")
  (folder / "videos" / "yt0.mp4").symlink_to(clip)
  shutil.copytree(clip.parent / "clip_dir", folder / "videos" / "yt1.mkv")
  (folder / "subtitles" / "yt0.srt").write_text(SRT)
  return folder


def test_videomme_with_and_without_subtitles(mme, clip):
  plain = read(benchmark("videomme"), mme)
  assert [i.id for i in plain.items] == [r["question_id"] for r in videomme_rows()]
  assert plain.items[3].video == "yt1.mkv"
  assert plain.items[0].slices["duration"] == "short"
  said = plain.items[0].request(plain.media, "multi", 8).question
  assert said.startswith("Select the best answer")
  assert said.endswith("The best answer is: ")
  with_text = read(benchmark("videomme"), mme, subtitles=True)
  request = with_text.items[0].request(with_text.media, "multi", 8)
  assert request.question == said
  spoken = request.preface() + request.question
  video = open_video(clip)
  assert video.fps == 10
  # The older rule: of n frames into 8, each in the middle of its part; times are frame / fps.
  edges = np.round((len(video) - 1) / 8 * np.arange(9)).astype(int)
  times = [(a + b) // 2 * 100 for a, b in itertools.pairwise(edges)]
  lines = [
    "Hello there, friend" if 0 < t < 1000 else "7 days" if 900 < t < 1600 else "" for t in times
  ]
  text = "\n".join(line for line in lines if line)
  assert text.count("Hello") > 1  # not de-duplicated
  assert spoken == f"This video's subtitles are listed below:\n{text}\n{said}"
  silent = with_text.items[3].request(with_text.media, "multi", 8)
  assert silent.preface() == "This video's subtitles are listed below:\n\n"
  (mme / "videomme" / "test-00000-of-00001.parquet").unlink()
  (mme / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in videomme_rows()))
  assert [i.question for i in read(benchmark("videomme"), mme).items] == [
    i.question for i in plain.items
  ]


def test_srt(tmp_path):
  path = tmp_path / "x.srt"
  path.write_text("\ufeff" + SRT.replace("\n", "\r\n"), encoding="utf-8")
  assert read_srt(path) == [
    (0, 1000, "Hello there, friend"),
    (900, 1600, "7 days"),
    (1600, 3000, ""),
  ]
  entries = [(0, 10, "a"), (5, 20, "b"), (30, 40, " ")]
  assert subtitle_text(entries, [0, 5, 10, 15, 20, 35]) == "a\nb\nb"  # strictly around


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-8-sig"])
def test_subtitles_without_numbers_or_hours(tmp_path, encoding):
  path = tmp_path / "s.srt"
  text = "00:01,000 --> 00:02,000\nIt costs\n30\n\n1:00:02.5 --> 1:00:03.5\nx\n"
  path.write_bytes(text.encode(encoding))
  assert read_srt(path) == [(1000, 2000, "It costs 30"), (3602500, 3603500, "x")]
  path.write_text("1\n00:00:01,000 --> 00:00:02,000\n42\n\n2\n00:00:03,000 --> 00:00:04,000\n7\n")
  assert [entry[2] for entry in read_srt(path)] == ["42", "7"]


def test_perception_test(tmp_path):
  questions = {
    "video_7": {
      "metadata": {"video_id": "video_7", "split": "valid"},
      "mc_question": [
        {
          "id": 3,
          "question": "Where?",
          "options": ["up", "down", "left"],
          "answer_id": 1,
          "area": "physics",
          "reasoning": "descriptive",
          "tag": ["motion", "place"],
        }
      ],
    }
  }
  path = tmp_path / "mc_question_valid.json"
  path.write_text(json.dumps(questions))
  (tmp_path / "videos").mkdir()
  data = read(benchmark("perception-test"), tmp_path, split="valid")
  (item,) = data.items
  assert data.media == tmp_path / "videos"
  assert (item.id, item.video, item.type) == ("video_7/3", "video_7.mp4", "physics")
  assert (item.truth, item.slices["tag"]) == ("(B) down", "motion, place")
  sent = json.loads(perception.submission([Prediction.for_item(item, "Down")]))
  assert sent == {"video_7": [{"id": 3, "answer_id": 1, "answer": "down"}]}
  del questions["video_7"]["mc_question"][0]["answer_id"]
  path.write_text(json.dumps(questions))
  (hidden,) = read(benchmark("perception-test"), tmp_path, split="test").items
  assert hidden.truth is None
  path.write_text("[]")
  with pytest.raises(InputError, match="found list"):
    read(benchmark("perception-test"), tmp_path, split="test")


def test_hc_stvg(tmp_path):
  mask = np.zeros((12, 16), np.uint8)
  mask[3:6, 4:9] = 1
  item = {"video": "a.mp4", "frame_idx": 5, "mask": encode_mask(mask), "caption": "A man walks."}
  (tmp_path / "val.json").write_text(json.dumps([item, item]))
  data = read(benchmark("hc-stvg"), tmp_path, split="v2-val")
  assert [i.id for i in data.items] == [0, 1]
  assert data.split == "v2-val"
  assert data.items[0].masks("single") == [{5: item["mask"]}]
  assert data.items[0].question.count("<region>") == 1
  predictions = [
    Prediction.for_item(i, text) for i, text in zip(data.items, ("x", None), strict=True)
  ]
  files = benchmark("hc-stvg").export(predictions)
  assert json.loads(files["published.jsonl"]) == {
    "video": "a.mp4",
    "Answer": "A man walks.",
    "pred": "x",
  }
  references = json.loads(files["coco_references.json"])
  assert references["annotations"] == [{"id": 0, "image_id": 0, "caption": "A man walks."}]
  assert json.loads(files["coco_predictions.json"]) == [{"image_id": 0, "caption": "x"}]


def test_published_files_read_back_to_the_same_scores(mv, mme, tmp_path):
  said = ["(A)", "Because", "nothing", "He sits", "", None]
  for name, folder in (("mvbench", mv), ("videomme", mme)):
    items = read(benchmark(name), folder).items
    predictions = [
      Prediction.for_item(
        i, said[k % 6], error=None if said[k % 6] is not None else "missing media: x"
      )
      for k, i in enumerate(items)
    ]
    (text,) = benchmark(name).export(predictions).values()
    path = tmp_path / f"{name}.json"
    path.write_text(text)
    ours = score_choice(benchmark(name), predictions, {}, "published")
    _, back = read_source(benchmark(name), path)
    theirs = score_choice(benchmark(name), back, {}, "published")
    if name == "mvbench":
      assert [i["parsed"] for i in ours.items if i["error"] is None] == [
        i["parsed"] for i in theirs.items
      ]
      assert theirs.metric("accuracy") == ours.metric("accuracy")
    else:  # upstream leaves out a whole video of which something is missing
      assert theirs.counts["answered"] == 3


def test_videomme_file_of_the_published_scorer(mme):
  items = read(benchmark("videomme"), mme).items
  content = json.loads(videomme.published_json([Prediction.for_item(i, "B.") for i in items]))
  assert [v["missing"] for v in content] == [False, False]
  assert content[1]["duration"] == "long"
  assert {q["response"] for v in content for q in v["questions"]} == {"B"}


@pytest.mark.slow
def test_a_run_of_mvbench(mv, golden, tmp_path):
  """Every kind of media through the tiny published checkpoint."""
  model = vr_jax.load(golden / "tiny_videorefer_qwen2")
  settings = Settings(max_new_tokens=4, batch_size=4)
  run = evaluate(model, "mvbench", mv, tmp_path / "out", settings)
  assert run["counts"]["answered"] == 20
  assert run["inference"]["mode"] is None
  assert len((tmp_path / "out" / "published.jsonl").read_text().splitlines()) == 20
