"""Review of the Reviewer: Table 8, the sample for people and back; the report; the command line."""

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from data_pipes.embedded.captions import scene_caption
from data_pipes.embedded.render import render, write_video
from data_pipes.embedded.scenes import make_scene
from data_pipes.engine import command, licences, report, review, stages
from data_pipes.engine.graph import KEPT, StopRun
from data_pipes.engine.roles import Verdict
from data_pipes.engine.store import Store
from data_pipes.errors import InputError
from vr_jax import cli
from vr_jax.evaluation.scoring import reviewer

TESTS = Path(__file__).parent


class EvenJudge:
  """A judge with a mind of its own: every other object is another one."""

  def __init__(self, context):
    self.count = 0

  def compare(self, claim):
    self.count += 1
    return Verdict(self.count % 2 == 0, "as the counter says", 0.5)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("review")
  for seed in (0, 4, 7):
    write_video(folder / f"{seed}.mp4", render(make_scene(seed))[0])
  listed = [{"video": f"{s}.mp4", "caption": scene_caption(make_scene(s))} for s in (0, 4, 7)]
  (folder / "c.json").write_text(json.dumps(listed))
  c = stages.engine_config().unlock()
  c.input.videos, c.input.files = str(folder), (str(folder / "c.json"),)
  c.workers, c.shards, c.drop_static = 1, 1, False
  c.roles["segmentor"] = {"kind": "builtin", "cycle": False}
  c.roles["judge"] = {"kind": "python", "target": "test_engine_review:EvenJudge"}
  command.run(c.lock(), folder / "w")
  return folder / "w"


def test_table_8_of_the_paper():
  judged = [(True, True)] * 88 + [(True, False)] * 12 + [(False, True)] * 36 + [(False, False)] * 64
  assert reviewer.lines(reviewer.review(judged, 0.4)) == [
    "reviewer \\ people       good      bad",
    "kept                      88       12",
    "dropped                   36       64",
    "precision 0.880 (0.802 to 0.930, Wilson 95 %)",
    "good among the dropped 0.360 (0.273 to 0.458)",
    "              as sampled    at accept rate 0.400",
    "recall             0.710                   0.620",
    "specificity        0.842                   0.889",
    "accuracy           0.760                   0.736",
    "f1                 0.786                   0.727",
    "mcc                0.536                   0.514",
    "kappa              0.520                   0.486",
  ]


@pytest.mark.parametrize(
  ("judged", "rate", "message"),
  [
    ([(True, True)], 0.4, "found 1 on kept and 0 on dropped"),
    ([(True, True), (False, False)], 1.0, "accept rate 1"),
  ],
)
def test_tables_that_cannot_be_made(judged, rate, message):
  with pytest.raises(InputError, match=message):
    reviewer.review(judged, rate)


def answers(folder: Path) -> dict[str, bool]:
  """What people would say: every third is bad."""
  sample = json.loads((folder / "review" / "sample.json").read_text())
  return {item["key"]: i % 3 > 0 for i, item in enumerate(sample["items"])}


def as_page(folder: Path, good: dict[str, bool]) -> str:
  return "".join(
    json.dumps({"key": k, "verdict": "good" if v else "bad"}) + "\n" for k, v in good.items()
  )


def as_label_studio(folder: Path, good: dict[str, bool]) -> str:
  tasks = json.loads((folder / "review" / "label_studio.json").read_text())
  for task in tasks:
    word = "good" if good[task["data"]["key"]] else "bad"
    task["annotations"] = [{"result": [{"value": {"choices": [word]}, "type": "choices"}]}]
  return json.dumps(tasks)


def as_cvat(folder: Path, good: dict[str, bool]) -> str:
  root = ET.parse(folder / "review" / "cvat.xml").getroot()
  for mask in root.iter("mask"):
    values = {a.get("name"): a for a in mask.iter("attribute")}
    values["verdict"].text = "good" if good[values["key"].text] else "bad"
  return ET.tostring(root, encoding="unicode")


@pytest.mark.parametrize(
  ("suffix", "fill"), [("jsonl", as_page), ("json", as_label_studio), ("xml", as_cvat)]
)
def test_the_review_round_trip(workdir, tmp_path, suffix, fill):
  review.write_sample(workdir, 4, seed=1)
  good = answers(workdir)
  assert len(good) == 8
  (tmp_path / f"v.{suffix}").write_text(fill(workdir, good))
  judged, rate = review.read_verdicts(workdir, tmp_path / f"v.{suffix}")
  records = list(Store(workdir).records("40_review", 0))
  kept = {r.key: r.status == KEPT for r in records}
  assert rate == sum(kept.values()) / len(kept)
  assert sorted(judged) == sorted((kept[k], v) for k, v in good.items())
  assert sum(k for k, _ in judged) == 4


def test_a_run_without_embedded_agents_warns_of_nothing(workdir):
  settings = Store(workdir).settings()["config"]
  others = {role: {"kind": "openai"} for role in settings["roles"]}
  assert stages.warning(settings | {"roles": others}) == ""


def test_the_page_is_one_file_and_does_not_tell_the_decision(workdir):
  review.write_sample(workdir, 3)
  page = (workdir / "review" / "review.html").read_text()
  assert page.count("<article") == 6
  assert "data:image/jpeg;base64," in page
  assert 'src="http' not in page
  assert "as the counter says" not in page
  for task in json.loads((workdir / "review" / "label_studio.json").read_text()):
    assert set(task["data"]) >= {"key", "noun", "text", "image0"}
    assert "kept" not in task["data"]


def test_cvat_masks_decode_to_ours(workdir):
  review.write_sample(workdir, 3)
  row = {r["key"]: r for r in Store(workdir).rows("20_segment")}
  from data_pipes.engine.agents.objects import masks_of

  for image in ET.parse(workdir / "review" / "cvat.xml").getroot().iter("image"):
    mask = image.find("mask")
    key = next(a.text for a in mask.iter("attribute") if a.get("name") == "key")
    runs = list(map(int, mask.get("rle").split(", ")))
    flat = np.repeat(np.arange(len(runs)) % 2, runs)
    inner = flat.reshape(int(mask.get("height")), int(mask.get("width")))
    whole = np.zeros((int(image.get("height")), int(image.get("width"))), bool)
    top, left = int(mask.get("top")), int(mask.get("left"))
    whole[top : top + inner.shape[0], left : left + inner.shape[1]] = inner
    assert any((whole == m).all() for m in masks_of(row[key]).values())


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("v.jsonl", '{"key": "other", "verdict": "good"}', "was not drawn"),
    ("v.jsonl", '{"key": "KEY", "verdict": "maybe"}', "verdict 'maybe'; accepted: good, bad"),
    ("v.jsonl", '{"key": "KEY"}', "KeyError"),
    ("v.jsonl", "{", "JSONDecodeError"),
    ("v.xml", "<a", "ParseError"),
    ("v.json", '{"a": 1}', "accepted: verdicts"),
    (
      "v.jsonl",
      '{"key": "KEY", "verdict": "good"}\n{"key": "KEY", "verdict": "bad"}',
      "two verdicts that contradict",
    ),
  ],
)
def test_verdicts_that_cannot_be_read(workdir, tmp_path, name, content, message):
  review.write_sample(workdir, 2)
  (tmp_path / name).write_text(content.replace("KEY", next(iter(answers(workdir)))))
  with pytest.raises(InputError, match=message):
    review.read_verdicts(workdir, tmp_path / name)


def test_the_data_card_and_plots(workdir):
  path, numbers = report.write_report(workdir)
  page = path.read_text()
  card = (workdir / "out" / "card.md").read_text()
  assert numbers["files"] == {"detailed-caption": numbers["samples"] // 2,
                              "short-caption": numbers["samples"] // 2}  # fmt: skip
  assert "Do not train on them" in card
  assert "| unknown |" in card  # nobody said under which licence the videos are
  assert "NONE; name them in duplicates.benchmark" in card
  assert "reviewer" in card  # why the Reviewer dropped some
  assert "Do not train on them" in page
  for title in ("Samples of each kind", "Words of an answer", "Commonest nouns"):
    assert title in page
  assert sum(numbers["objects"].values()) == numbers["samples"]


# The command line


def vr(*words, capsys):
  code = cli.main(list(map(str, words)))
  out = capsys.readouterr()
  return code, out.out, out.err


def test_vr_engine_from_run_to_review(workdir, tmp_path, capsys):
  videos = workdir.parent
  config = f"engine_embedded:videos={videos},captions={videos}/c.json,path=short"
  run = ("engine", "run", "--config", config, "--config.workers=1", "--workdir", tmp_path / "w")
  code, out, err = vr(*run, "--limit", 2, capsys=capsys)
  assert (code, err) == (0, "")
  assert "60_assemble" in out
  assert "all 3 videos would cost about 0.00 USD" in out
  code, out, _ = vr(*run, "--json", capsys=capsys)
  assert {s["stage"]: s["kept"] for s in json.loads(out)["stages"]}["00_ingest"] == 3
  code, out, _ = vr("engine", "status", tmp_path / "w", capsys=capsys)
  assert "local: done" in out
  code, out, _ = vr("engine", "report", tmp_path / "w", capsys=capsys)
  assert Path(out.strip()).is_file()
  code, _, err = vr("engine", "review", tmp_path / "w", capsys=capsys)
  assert code == 2
  assert "no reviewed items yet" in err
  code, out, _ = vr("engine", "review", workdir, "--n", 4, capsys=capsys)
  assert code == 0
  (tmp_path / "v.jsonl").write_text(as_page(workdir, answers(workdir)))
  words = ("engine", "review", workdir, "--verdicts", tmp_path / "v.jsonl")
  code, out, _ = vr(*words, capsys=capsys)
  assert code == 0
  assert "precision" in out
  assert "accept rate" in out


def test_a_job_array_writes_the_same_bytes(workdir, tmp_path, capsys):
  videos = workdir.parent
  config = f"engine_embedded:videos={videos},captions={videos}/c.json,path=short"
  common = ("--config", config, "--config.workers=1", "--shards", "2")
  for name in ("whole", "array"):
    words = ("engine", "run", *common, "--workdir", tmp_path / name)
    code, out, _ = vr(*words, *(("--runner", "array") if name == "array" else ()), capsys=capsys)
    assert code == 0
  commands = [line.split() for line in out.splitlines() if line.startswith("vr")]
  assert len(commands) == 2 * 2 + 1
  for words in commands:
    assert vr(*words[1:], capsys=capsys)[0] == 0
  whole = {p.relative_to(tmp_path / "whole"): p.read_bytes()
           for p in (tmp_path / "whole").rglob("*.parquet")}  # fmt: skip
  assert len(whole) == 2 * 7
  for path, content in whole.items():
    assert (tmp_path / "array" / path).read_bytes() == content
  name = "out/videorefer-short-caption.json"
  assert (tmp_path / "array" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (("status", "W"), "found no run"),
    (("report", "W"), "found no run"),
    (("review", "W"), "found no run"),
    (("run", "--config", "engine_embedded", "--workdir", "W", "--runner", "slurm"),
     "accepted: local, array, ray"),
    (("run", "--config", "engine_embedded:videos=/nowhere", "--workdir", "W"), "no such folder"),
    (("run", "--config", "engine_embedded:path=all", "--workdir", "W"), "accepted: short"),
    (("run", "--config", "engine_embedded", "--workdir", "W", "--only", "x"), "PHASE:SHARD"),
    (("run", "--config", "engine_embedded", "--config.masks.min_aera=1", "--workdir", "W"),
     "did you mean"),
  ],
)  # fmt: skip
def test_one_line_for_wrong_input(tmp_path, capsys, monkeypatch, words, message):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "a.mp4").write_bytes(b"")
  code, out, err = vr("engine", *words, capsys=capsys)
  assert code == 2
  assert out == ""
  assert err.count("\n") == 1
  assert message in err
  assert not list(tmp_path.rglob("*.parquet"))


@pytest.mark.ray
def test_ray_writes_the_same_bytes(tmp_path, monkeypatch):
  """Stopped, gone on with; an actor opens each stage once for all of its shards."""
  import engine_toy
  from test_engine_runner import files, opened, run

  from data_pipes.engine.job import EngineJob
  from data_pipes.jobs import run_ray

  (tmp_path / "ray").mkdir()
  (tmp_path / "local").mkdir()
  store = Store(tmp_path / "ray" / "run", 8)
  store.write_settings({})
  ref = engine_toy.ref(tmp_path / "ray", stop_at=30)
  monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]))
  with pytest.raises(StopRun, match="the budget is spent"):
    run_ray(EngineJob(ref, store.folder))
  (tmp_path / "ray" / "go").touch()
  (tmp_path / "ray" / "opened.log").unlink()
  run_ray(EngineJob(ref, store.folder))
  assert files(store) == files(run(tmp_path / "local", shards=8))
  assert set(opened(tmp_path / "ray").values()) == {1}
  assert len({line.split()[1] for line in opened(tmp_path / "ray")}) < 8
  with pytest.raises(InputError, match="no Ray node has the 9999 CPUs that a task takes"):
    run_ray(EngineJob(ref, store.folder), cpus=9999)


def test_the_engine_needs_no_jax():
  code = (
    "import sys; from data_pipes.engine import command, review, report, stages;"
    "from data_pipes.engine.backends import builtin, chat_agents, flow_segmentor;"
    "assert 'jax' not in sys.modules and 'torch' not in sys.modules and 'cv2' not in sys.modules"
  )
  subprocess.run([sys.executable, "-c", code], check=True)


def test_licences_are_what_folders_say_or_unknown(tmp_path):
  model, videos = tmp_path / "model", tmp_path / "videos"
  model.mkdir()
  videos.mkdir()
  (model / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
  (videos / "LICENSE.txt").write_text("CC BY 4.0")
  (tmp_path / "captions.json").write_text("[]")
  config = {
    "input": {"videos": str(videos), "files": [str(tmp_path / "captions.json")]},
    "roles": {
      "annotator": {"kind": "python", "checkpoint": str(model)},
      "judge": {"kind": "openai", "model": "gpt-x"},
      "analyzer": {"kind": "builtin"},
    },
  }
  assert licences.of_run(config) == {
    str(videos): f"see {videos / 'LICENSE.txt'}",
    str(tmp_path / "captions.json"): "unknown",
    str(model): "apache-2.0",
    "gpt-x": "unknown",
  }


def test_models_stand_with_their_versions_and_prices():
  roles = {
    "judge": {"kind": "openai", "model": "gpt-x", "usd_per_million": [2.5, 10]},
    "refiner": {"kind": "openai", "model": "gpt-y"},
    "annotator": {"kind": "transformers", "model": f"lab/m@{'c' * 40}"},
    "analyzer": {"kind": "builtin"},
  }
  assert [tuple(m.values()) for m in licences.models_of_run({"roles": roles})] == [
    ("judge", "gpt-x", "unknown", "2.5 in, 10 out"),
    ("refiner", "gpt-y", "unknown", "unknown"),
    ("annotator", f"lab/m@{'c' * 40}", "c" * 40, "runs here"),
  ]
