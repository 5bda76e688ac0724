"""A decoder that crashes or never ends costs one item, with its reason, in every command."""

import json

import numpy as np
import pytest
from bad_decoder import with_bad_decoder
from test_data_check import item, mask, write, write_clip
from test_prepare import SHAPE

from data_pipes import isolation
from data_pipes.clips import read_clip
from data_pipes.failures import Failures
from data_pipes.jobs import run_local
from data_pipes.loader import make_dataset, prefetched
from data_pipes.prepare import Prepare, Settings
from data_pipes.records import RecordFile
from data_pipes.samples import Samples
from data_pipes.tokenizer import Tokenizer
from vr_jax import cli

CRASH = "the decoder crashed: its process died of SIGABRT"
HANG = "the decoder hung: no result within 1 s"


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """Two good videos and two that a decoder ends with, an item of each."""
  with_bad_decoder(tmp_path / "site", monkeypatch)
  names = ("abort.mp4", "a.mp4", "endless.mp4", "b.mp4")
  clip = write_clip(tmp_path / "media" / "a.mp4") if (tmp_path / "media").mkdir() is None else None
  for name in names:
    (tmp_path / "media" / name).write_bytes(clip.read_bytes())
  annotation = [{"3": {"segmentation": mask()}}]
  write(tmp_path / "f.json", [item(id=n, video=n, annotation=annotation) for n in names])
  yield tmp_path
  isolation._workers.close()


def test_data_check(folder, capsys):
  words = ["--media", folder / "media", "--decode", "--item-seconds", 1, "--json"]
  code = cli.main(list(map(str, ["data", "check", folder / "f.json", *words, "--jobs", 1])))
  summary = json.loads(capsys.readouterr().out)
  assert code == 2
  assert (summary["items"], summary["good"]) == (4, 2)
  found = summary["defects"]["media-unreadable"]
  assert found["ids"] == ["abort.mp4", "endless.mp4"]
  assert found["reason"] == f"{folder}/media/abort.mp4: {CRASH}"


def test_data_prepare_also_when_started_again(folder):
  settings = Settings((str(folder / "f.json"),), str(folder / "media"), shards=1, size=56)
  for _ in range(2):
    job = Prepare.start(folder / "out", settings, item_seconds=1)
    run_local(job)
  manifest = json.loads((folder / "out" / "manifest.json").read_text())
  assert (manifest["samples"], manifest["rejects"]) == (2, {"media-damaged": 2})
  lines = [json.loads(line) for line in (folder / "out" / "rejects.jsonl").read_text().splitlines()]
  media = folder / "media"
  assert {line["id"]: line["reason"] for line in lines} == {
    "abort.mp4": f"{media}/abort.mp4: {CRASH}",
    "endless.mp4": f"{media}/endless.mp4: {HANG}",
  }
  assert (
    job.command("index", 0) == f"vr data prepare --out {folder}/out --item-seconds 1 --task index 0"
  )


def test_the_loader(folder, golden):
  tokenizer = Tokenizer.from_folder(golden / "tiny_videorefer_qwen2")
  records, media = RecordFile(folder / "f.json"), folder / "media"
  samples = Samples(records, tokenizer, SHAPE, media_root=media, item_seconds=1)
  failures = Failures(max_share=0.5)
  options = {"batch_size": 4, "seed": 0, "shuffle": False, "drop_remainder": True}
  (batch,) = prefetched(make_dataset([samples], failures=failures, **options), threads=1)
  assert [bool(valid.any()) for valid in batch["valid"]] == [False, True, False, True]
  assert failures.messages == [
    f"{records[0].where}: {media}/abort.mp4: {CRASH}",
    f"{records[2].where}: {media}/endless.mp4: {HANG}",
  ]
  # What a worker sends lies where it would have been decoded to.
  direct = read_clip(media / "a.mp4", SHAPE, records[1].objects)
  for slot, number in enumerate(direct.numbers()):
    np.testing.assert_array_equal(batch["frames"][1][slot], direct.frames[number])


@pytest.mark.parametrize("seconds", ["0", "-1", "nan"])
def test_a_limit_that_is_none(folder, capsys, seconds):
  words = [str(folder / "f.json"), "--item-seconds", seconds]
  assert cli.main(["data", "check", *words]) == 2
  assert "item_seconds=" in capsys.readouterr().err
  assert cli.main(["data", "prepare", *words, "--out", str(folder / "out")]) == 2
