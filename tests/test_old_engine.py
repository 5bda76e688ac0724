"""Engine runs that an earlier version made are read, and gone on with.

tests/old/engine holds three runs on the same two clips, made by commit 06b30db with

    vr engine run --config engine_embedded:videos=V,captions=C --workdir W --shards 1 \\
      --config.workers=1

finished: to its end. killed: by SIGKILL, with three items in the journal of 20_segment. asked: the
texts from an endpoint that went down after eight answers, with all four openai roles of
test_engine_chat.config. Their paths are below /proc/self/cwd, so that they may lie anywhere.
"""

import contextlib
import json
import os
import shutil
import sqlite3
from pathlib import Path

import pytest
from chat_server import ChatServer, sensible
from test_engine_chat import config

from data_pipes.engine import command, stages
from data_pipes.engine.calls import ANSWERED
from data_pipes.engine.graph import QUARANTINED
from data_pipes.engine.store import Store
from vr_jax import cli

OLD = Path(__file__).parent / "old" / "engine"
HERE = Path("/proc/self/cwd")
MADE_WITH = {"scenedetect": "0.7.2", "av": "18.1.0"}  # they stand in a stage's fingerprint
CONFIG = f"engine_embedded:videos={HERE}/videos,captions={HERE}/captions.json"
RUN = ("run", "--config", CONFIG, "--shards", "1", "--config.workers=1", "--workdir", f"{HERE}/w")
pytestmark = pytest.mark.skipif(not HERE.exists(), reason="the runs name paths below /proc")


@pytest.fixture
def run(request, tmp_path, monkeypatch) -> Path:
  """A copy of one of the runs, as the current folder."""
  shutil.copytree(OLD / request.param, tmp_path, dirs_exist_ok=True)
  shutil.copytree(OLD / "videos", tmp_path / "videos")
  shutil.copy(OLD / "captions.json", tmp_path)
  links = tmp_path / "w" / "media" / "videos"
  links.mkdir(parents=True)
  for video in (tmp_path / "videos").iterdir():
    os.utime(video, ns=(10**18, 10**18))  # its time is part of what it is
    (links / video.name).symlink_to(video)
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(stages, "version", MADE_WITH.__getitem__)
  return tmp_path


def vr(capsys, *words: str) -> str:
  assert cli.main(["engine", *words]) == 0
  return capsys.readouterr().out


def contents(folder: Path) -> dict[str, bytes]:
  """Every file but the progress, which holds times."""
  paths = [p for p in folder.rglob("*") if p.is_file() and "progress" not in p.parts]
  return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


@pytest.mark.parametrize("run", ["finished", "killed", "asked"], indirect=True)
def test_status_is_what_it_was(run, capsys):
  assert vr(capsys, "status", f"{HERE}/w") == (run / "status.txt").read_text()


@pytest.mark.parametrize("run", ["finished"], indirect=True)
def test_the_report_is_what_it_was(run, capsys):
  card = (run / "w/out/card.md").read_text()
  report = json.loads(vr(capsys, "report", f"{HERE}/w", "--json"))
  # What has come since: why not to train on such data, whose licences hold, models and prices.
  assert "Do not train on them" in report.pop("warning")
  assert set(report.pop("licences").values()) == {"unknown"}
  assert report.pop("models") == []
  assert report == json.loads((run / "report.json").read_text())
  written = (run / "w/out/card.md").read_text().splitlines()
  changed = [line for line in card.splitlines() if line not in written]
  assert [line.startswith("- Rights:") for line in changed] == [True]


@pytest.mark.parametrize("run", ["finished"], indirect=True)
def test_a_finished_run_is_left_as_it_is(run, capsys):
  before = contents(run / "w")
  vr(capsys, *RUN)
  assert contents(run / "w") == before


@pytest.mark.parametrize("run", ["killed"], indirect=True)
def test_a_killed_run_goes_on_from_its_journal(run, capsys):
  """What is computed anew may differ with the version of OpenCV; what was done may not."""
  journal = run / "w/20_segment/00000-of-00001.part"
  done = [json.loads(line) for line in journal.read_bytes().splitlines()]
  assert len(done) == 3
  vr(capsys, *RUN)
  assert not journal.exists()
  store, finished = Store(run / "w"), Store(OLD / "finished" / "w")
  rows = {record.key: record.row for record in store.records("20_segment", 0)}
  for head in done:
    for record in head["records"]:
      assert rows[record["key"]] == record["row"]
  progress = json.loads((run / "w/progress/local.json").read_text())["stages"]
  assert {name: c["reused"] for name, c in progress.items() if c["reused"]} == {
    "00_ingest": 2, "05_shots": 2, "06_unique": 2, "10_analyze": 2, "20_segment": 3,
  }  # fmt: skip
  for stage in progress:
    ends = [
      [(record.key, record.status, record.reason) for record in whose.records(stage, 0)]
      for whose in (store, finished)
    ]
    assert ends[0] == ends[1]


@pytest.mark.parametrize("run", ["asked"], indirect=True)
def test_answers_that_were_paid_for_are_not_asked_for_again(run):
  ledger = run / "w/calls/local.sqlite"
  with contextlib.closing(sqlite3.connect(ledger)) as db:
    answered = db.execute("select count(*) from calls where status = ?", (ANSWERED,)).fetchone()
  assert answered == (8,)
  with ChatServer(sensible) as server:
    changed = config(HERE / "videos", server.url).unlock()
    changed.input.files = (f"{HERE}/captions.json",)
    summary = command.run(changed.lock(), HERE / "w", retry_quarantined=True)
    names = [body["response_format"]["json_schema"]["name"] for body in server.bodies]
  assert "nouns" not in names  # both were answered
  assert names.count("motion") + names.count("appearance") == 12 - 6  # six objects, two texts each
  assert sum(stage[QUARANTINED] for stage in summary["stages"]) == 0
  assert {e["stage"]: e["kept"] for e in summary["stages"]}["60_assemble"] > 0
