"""vr data prepare: shards equal to their sources, whole after a kill, rejects with reasons."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_data_check import (  # noqa: F401 (media)
  CASES,
  SOUND,
  item,
  mask,
  media,
  write,
  write_clip,
)

from data_pipes import check
from data_pipes.batch import RowShape
from data_pipes.check import Checks
from data_pipes.errors import InputError
from data_pipes.failures import Failures
from data_pipes.jobs import Journal, array_commands, run_local
from data_pipes.loader import make_dataset, prefetched
from data_pipes.prepare import Prepare, Settings
from data_pipes.records import RecordFile
from data_pipes.samples import RowRules, Samples
from data_pipes.shards import ShardSet
from data_pipes.tokenizer import Tokenizer
from vr_jax.cli import main

SHAPE = RowShape(
  frames=48, scene=16, objects=4, object_frames=32, length=256, image_size=56, grid=4,
  tokens_per_object=4, scene_tokens=32,
)  # fmt: skip


def prepare(out, files, folder, workers=1, **options) -> ShardSet:
  settings = Settings(tuple(map(str, files)), str(folder), **{"shards": 3, "size": 56, **options})
  run_local(Prepare.start(out, settings), workers)
  return ShardSet(out)


def contents(folder: Path) -> dict[str, bytes]:
  return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def tokenizer(golden):
  return Tokenizer.from_folder(golden / "tiny_videorefer_qwen2")


@pytest.mark.parametrize(("size", "exact"), [(56, True), (0, True), (56, False)])
def test_rows_from_shards_are_those_of_the_files(golden, tokenizer, tmp_path, size, exact):
  """Videos, frame folders, GIFs, images and text; every mask mode. PNG: bit for bit."""
  file = golden / "data/train.json"
  shards = prepare(
    tmp_path / "s", [file], golden / "media", size=size, format="png" if exact else "jpeg"
  )
  records = RecordFile(file)
  assert sorted(shards.source(i) for i in range(len(shards))) == [
    (str(file), i) for i in range(len(records))
  ]
  for masks in ("multi", "single"):
    rules = RowRules(masks=masks)
    ours = Samples(shards, tokenizer, SHAPE, rules=rules)
    theirs = Samples(records, tokenizer, SHAPE, media_root=golden / "media", rules=rules)
    for i in range(len(shards)):
      row, wanted = ours[i], theirs[shards.source(i)[1]]
      for key in row:
        if key == "frames" and not exact:
          assert np.abs(row[key].astype(int) - wanted[key]).mean() < 2
        else:
          np.testing.assert_array_equal(row[key], wanted[key], err_msg=key)


def test_what_is_stored_beside_the_frames(golden, tmp_path):
  shards = prepare(tmp_path / "s", [golden / "data/train.json"], golden / "media", quality=90)
  clips = [shards.sample(i)["clip"] for i in range(len(shards))]
  video = next(c for c in clips if c and c["kind"] == "video")
  assert video["index_space"] == "presented"
  assert video["rule"]["scene"] == [16]
  assert video["rule"]["quality"] == 90
  assert len(video["source"]) == 32
  assert len(video["pts"]) == len(video["frames"])
  assert sorted(set(video["frames"])) == video["frames"]
  manifest = shards.manifest
  assert manifest["samples"] == manifest["items"] == sum(manifest["samples_of_shards"]) == 8
  # Clips that samples share are decoded and stored once.
  assert manifest["clips"] == len({c["path"] for c in clips if c})
  assert manifest["frames"] == sum(
    len(c["frames"]) for c in {c["path"]: c for c in clips if c}.values()
  )
  assert len(manifest["checksums"]) == 6


@pytest.fixture(scope="module")
def many(tmp_path_factory):
  """Clips enough for a run that can be killed in the middle, with a few bad items among them."""
  folder = tmp_path_factory.mktemp("many")
  items = []
  for i in range(30):
    write_clip(folder / f"{i}.mp4", count=20 + i % 3)
    annotation = [{"3": {"segmentation": mask()}}]
    items += [item(id=2 * i + k, video=f"{i}.mp4", annotation=annotation) for k in range(2)]
  items[7]["video"] = "none.mp4"
  items[9]["annotation"] = [{"90": {"segmentation": mask()}}]
  items[11]["conversations"] = []
  write(folder / "f.json", items)
  return folder


@pytest.fixture(scope="module")
def whole(many, tmp_path_factory):
  out = tmp_path_factory.mktemp("whole") / "s"
  prepare(out, [many / "f.json"], many)
  return contents(out)


def command(many, out, *more):
  code = "import sys; from vr_jax.cli import main; sys.exit(main(sys.argv[1:]))"
  words = ["data", "prepare", str(many / "f.json"), "--media", str(many), "--out", str(out)]
  words += ["--shards", "3", "--size", "56", *more]
  root = str(Path(__file__).parent.parent)
  env = os.environ | {"PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}
  return {"args": [sys.executable, "-c", code, *words], "env": env, "stderr": subprocess.PIPE}


@pytest.mark.multiprocess
@pytest.mark.parametrize("jobs", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_a_killed_run_ends_with_the_same_bytes(many, whole, tmp_path, jobs):
  out = tmp_path / "s"
  process = subprocess.Popen(**command(many, out, "--jobs", jobs), start_new_session=True)
  deadline = time.monotonic() + 60
  while not any(p.stat().st_size > 8_000 for p in out.glob("journals/*")):
    assert time.monotonic() < deadline
    assert process.poll() is None, process.stderr.read()
    time.sleep(0.002)
  os.killpg(process.pid, signal.SIGKILL)
  process.communicate()
  assert not (out / "manifest.json").exists()
  (left,) = [p for p in out.glob("journals/*") if p.stat().st_size > 8_000][:1]
  with open(left, "ab") as file:
    file.write(b"torn")  # as a kill in the middle of a write leaves it
  done = subprocess.run(**command(many, out, "--jobs", jobs), check=False)
  assert done.returncode == 0, done.stderr
  assert contents(out) == whole


def test_parts_that_an_earlier_version_left_are_in_nobodys_way(many, whole, tmp_path):
  out = tmp_path / "s"
  settings = Settings((str(many / "f.json"),), str(many), shards=3, size=56)
  job = Prepare.start(out, settings)
  for name in ("index/00000.jsonl", "frames-00001-of-00003.array_record", "rejects.jsonl"):
    (out / name).parent.mkdir(exist_ok=True)
    (out / f"{name}.part").write_bytes(b"torn")
  run_local(job)
  assert contents(out) == whole


def test_an_array_of_commands_gives_the_same_bytes(many, whole, tmp_path, capsys):
  out = tmp_path / "s"
  words = command(many, out, "--runner", "array")["args"][3:]
  assert main(words) == 0
  lines = capsys.readouterr().out.splitlines()
  assert [line for line in lines if line.startswith("#")] == [
    "# stage 1 of 3, index: 1 tasks in any order",
    "# stage 2 of 3, shards: 3 tasks in any order; when all of index have ended",
    "# stage 3 of 3, manifest: 1 tasks in any order; when all of shards have ended",
  ]
  commands = [line.split() for line in lines if not line.startswith("#")]
  assert [c[0] for c in commands] == ["vr"] * 5
  assert main(commands[4][1:]) == 2  # too early
  assert "index 0 has to be done first" in capsys.readouterr().err
  for at in (0, 3, 1, 2, 4, 4):
    assert main(commands[at][1:]) == 0
  assert contents(out) == whole


@pytest.mark.ray
def test_ray_writes_the_same_bytes(many, whole, tmp_path, monkeypatch, capsys):
  """By the command: begun in this process, one shard of it, gone on with by Ray; then bad input."""
  import ray

  monkeypatch.chdir(tmp_path)
  words = ["data", "prepare", str(many / "f.json"), "--media", str(many)]
  words += ["--shards", "3", "--size", "56", "--out", "s"]
  assert main([*words, "--runner", "array"]) == 0
  assert main(["data", "prepare", "--out", "s", "--task", "index", "0"]) == 0
  assert main(["data", "prepare", "--out", "s", "--task", "shards", "1"]) == 0
  capsys.readouterr()
  assert main([*words, "--runner", "ray"]) == 0
  told = capsys.readouterr()
  assert [line for line in told.err.splitlines() if " of " in line][:3] == [
    "index: 1 of 1",
    "shards: 1 of 3",
    "shards: 2 of 3",
  ]
  assert contents(tmp_path / "s") == whole
  assert not ray.is_initialized()

  (tmp_path / "f.json").write_text((many / "f.json").read_text()[:-30])
  words[2], words[-1] = "f.json", "t"
  assert main([*words, "--runner", "ray"]) == 2
  (line,) = (s for s in capsys.readouterr().err.splitlines() if s.startswith("vr data: "))
  assert line.startswith("vr data: f.json: ")
  assert "the file ends inside" in line
  assert not ray.is_initialized()


def test_rejects_are_counted_by_reason(many, whole, tmp_path):
  manifest = json.loads(whole["manifest.json"])
  assert manifest["rejects"] == {"conversations": 1, "frame-range": 1, "media-absent": 1}
  assert manifest["rejected"] == 3
  assert manifest["samples"] == 57
  lines = [json.loads(line) for line in whole["rejects.jsonl"].splitlines()]
  assert {(r["item"], r["class"]) for r in lines} == {
    (7, "media-absent"),
    (9, "frame-range"),
    (11, "conversations"),
  }
  assert next(r for r in lines if r["item"] == 9)["reason"] == (
    "object 0: found frame 90; accepted: 0 to 20"
  )


def test_prepare_rejects_what_check_finds(tmp_path, media):  # noqa: F811
  """Each class of bad input ends as a counted reject with the same reason; nothing crashes."""
  items = [dict(one, id=i) if isinstance(one, dict) else one for i, (_, one, _) in enumerate(CASES)]
  file = write(tmp_path / "f.json", items)
  shards = prepare(tmp_path / "s", [file], media, shards=2)
  checks = Checks(media, decode=True)
  expected = {}
  for done in check.check_file(file, checks):
    bad = [f for f in done.findings if f.is_defect or f.kind == "frame-list"]
    if bad:
      expected[done.index] = (bad[0].kind, bad[0].reason)
  lines = map(json.loads, (tmp_path / "s/rejects.jsonl").read_text().splitlines())
  found = {line["item"]: (line["class"], line["reason"]) for line in lines}
  assert found == expected
  assert len(shards) == len(items) - len(found)
  # Notices are kept, or rejected where asked.
  strict = prepare(
    tmp_path / "t", [file], media, shards=2, reject=("alpha", "rotated", "variable-rate")
  )
  assert strict.manifest["rejects"] == shards.manifest["rejects"] | {
    "alpha": 2, "rotated": 1, "variable-rate": 1,
  }  # fmt: skip
  # What is used although it was noticed is counted, with the item and the reason.
  lines = map(json.loads, (tmp_path / "s/notices.jsonl").read_text().splitlines())
  noticed = {(line["item"], line["class"]): line["reason"] for line in lines}
  assert noticed == {
    (i, kind): reason for i, (kind, _, reason) in enumerate(CASES) if kind in check.NOTICES
    and kind not in ("vanishing", "frame-list")
  }  # fmt: skip
  assert sum(shards.manifest["notices"].values()) == len(noticed)
  assert strict.manifest["notices"] == {
    k: n for k, n in shards.manifest["notices"].items() if k not in strict.manifest["rejects"]
  }


def test_a_corrupt_video_in_the_middle_of_a_shard(tmp_path, media):  # noqa: F811
  items = [
    item(id=i, video=name, annotation=..., conversations=SOUND[6]["conversations"])
    for i, name in enumerate(("a.mp4", "broken.mp4", "odd.mp4"))
  ]
  file = write(tmp_path / "f.json", items)
  shards = prepare(tmp_path / "s", [file], media, shards=1)
  (line,) = map(json.loads, (tmp_path / "s/rejects.jsonl").read_text().splitlines())
  assert line == {
    "file": 0, "item": 1, "id": 1, "media": "broken.mp4", "class": "media-damaged",
    "reason": f"{media}/broken.mp4: frame 21 is damaged",
  }  # fmt: skip
  assert [shards.source(i)[1] for i in range(len(shards))] == [0, 2]
  clips = [shards[i].stored for i in range(2)]
  assert [len(clip.frames(clip.stored())) for clip in clips] == [16, 16]


def test_a_shard_damaged_later_is_an_unreadable_sample(tmp_path, media, tokenizer):  # noqa: F811
  file = write(tmp_path / "f.json", [item(id=1), item(id=2, video="uneven.mp4")])
  prepare(tmp_path / "s", [file], media, shards=1)
  path = next((tmp_path / "s").glob("frames-*"))
  data = bytearray(path.read_bytes())
  at = data.index(b"JFIF") + 600
  data[at : at + 40] = bytes(40)
  path.write_bytes(data)
  shape = dataclasses.replace(SHAPE, frames=24)
  samples = Samples(ShardSet(tmp_path / "s"), tokenizer, shape)
  failures = Failures(max_share=0.5)
  (batch,) = prefetched(
    make_dataset([samples], batch_size=2, seed=0, drop_remainder=True, failures=failures)
  )
  assert sorted(batch["valid"].any(1).tolist()) == [False, True]
  assert sorted(batch["frames"].any((1, 2, 3, 4)).tolist()) == [False, True]
  (message,) = failures.messages
  assert message.startswith(f"{tmp_path}/s: sample 0 (id 1): {tmp_path}/s: a.mp4: a stored frame")


def test_a_broken_off_annotation_file_is_refused(tmp_path, media):  # noqa: F811
  file = tmp_path / "f.json"
  file.write_text(json.dumps([item(id=1), item(id=2)])[:-30])
  with pytest.raises(InputError, match=r"f\.json: .*the file ends inside an item"):
    prepare(tmp_path / "s", [file], media)


def test_wrong_use_is_said(golden, tmp_path, media):  # noqa: F811
  file = write(tmp_path / "f.json", [item()])
  out = tmp_path / "s"
  shards = prepare(out, [file], media)
  with pytest.raises(InputError, match=r"begun with other settings: size was 56, is 64"):
    prepare(out, [file], media, size=64)
  with pytest.raises(InputError, match="is not empty and holds no settings"):
    prepare(tmp_path, [file], media)
  with pytest.raises(InputError, match="no such file; begin with"):
    Prepare.resume(tmp_path / "none")
  with pytest.raises(InputError, match=r"found no manifest\.json"):
    ShardSet(tmp_path)
  with pytest.raises(InputError, match=r"frames of 56 pixels; accepted: .* --size 384, more, or 0"):
    shards.check_model(384, "square", 16)
  with pytest.raises(InputError, match=r"aspect ratio 'square'.*--aspect-ratio pad"):
    shards.check_model(56, "pad", 16)
  with pytest.raises(InputError, match=r"scenes of \(16,\) frames.*--scene-frames 8"):
    shards.check_model(56, "square", 8)
  with pytest.raises(InputError, match="frame 2 is not stored"):
    shards[0].stored.frames([2])
  with pytest.raises(InputError, match="format='gif'; accepted: jpeg, png"):
    prepare(tmp_path / "t", [file], media, format="gif")
  with pytest.raises(InputError, match=r"task frames 0; accepted: index 0\.\.0, shards 0\.\.2"):
    Prepare.resume(out).run("frames", 0)
  next(out.glob("frames-00001*")).unlink()
  with pytest.raises(InputError, match=r"frames-00001-of-00003\.array_record: no such file"):
    ShardSet(out)


def test_a_journal_keeps_whole_rows_only(tmp_path):
  path = tmp_path / "j"
  with Journal(path) as journal:
    journal.add("a", b"1" * 100)
    journal.add("b", b"")
    with pytest.raises(InputError, match="another process is at this task"):
      Journal(path)
  size = path.stat().st_size
  with Journal(path) as journal:
    journal.add("c", b"2" * 100)
  data = path.read_bytes()
  for cut in (size + 1, size + 15, size + 17, len(data) - 1):
    path.write_bytes(data[:cut])
    with Journal(path) as journal:
      assert len(journal) == 2
      assert "c" not in journal
      assert journal["a"] == b"1" * 100
      assert journal["b"] == b""
      journal.add("c", b"3")
      assert journal["c"] == b"3"
  path.write_bytes(data[:-1] + b"x")  # damaged
  with Journal(path) as journal:
    assert "c" not in journal


def test_commands_survive_spaces_in_paths(tmp_path, media):  # noqa: F811
  file = write(tmp_path / "f.json", [item()])
  job = Prepare.start(tmp_path / "a b", Settings((str(file),), str(media), shards=1))
  assert list(array_commands(job))[1].startswith(f"vr data prepare --out '{tmp_path}/a b' --task")


def started(tmp_path, media, count=2):  # noqa: F811
  """A job of two videos that was stopped when the first clip of its only shard was done."""
  for i in range(count):
    (tmp_path / f"{i}.mp4").write_bytes((media / "a.mp4").read_bytes())
  write(tmp_path / "f.json", [item(id=i, video=f"{i}.mp4") for i in range(count)])
  job = Prepare.start(tmp_path / "s", Settings((f"{tmp_path}/f.json",), str(tmp_path), 1, size=56))
  job.run("index", 0)
  with Journal(job.out / "journals" / "00000") as journal:
    key, entries = next(iter(job._entries(0).items()))
    journal.add(key, job._clip(entries))
  return job


CHANGES = {
  "longer": lambda text: text.replace("[", "[ ", 1),
  "as long": lambda text: text.replace(" good ", " fine "),
  "shorter": lambda text: text[:40],
  "gone": lambda text: None,
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_annotation_file_that_changed_meanwhile_is_one_line(tmp_path, media, capsys, change):  # noqa: F811
  job = started(tmp_path, media)
  text = (tmp_path / "f.json").read_text().replace("What", "A good question: what")
  (tmp_path / "f.json").unlink()
  if (changed := CHANGES[change](text)) is not None:
    (tmp_path / "f.json").write_text(changed)
  for words in ([], ["--task", "shards", "0"]):
    assert main(["data", "prepare", "--out", str(job.out), *words]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"{tmp_path}/f.json" in err
  assert not (job.out / "manifest.json").exists()


@pytest.mark.parametrize("committed", [False, True])
@pytest.mark.parametrize("change", ["touched", "replaced", "gone"])
def test_media_that_changed_meanwhile_is_one_line(tmp_path, media, capsys, change, committed):  # noqa: F811
  job = started(tmp_path, media)
  if committed:
    job.run("shards", 0)
  (done, *_) = job._entries(0)
  file = tmp_path / done.split()[1]
  if change == "gone":
    file.unlink()
  else:
    file.write_bytes(file.read_bytes() + b"more" * (change == "replaced"))
  code = main(["data", "prepare", "--out", str(job.out), "--jobs", "1"])
  err = capsys.readouterr().err
  if change == "touched":
    assert code == 0
    assert not list((job.out / "journals").iterdir())
  else:
    assert code == 2
    assert (
      f"vr data: {file}: was changed since it was prepared in {job.out}" in err.splitlines()[-1]
    )


def test_media_that_came_meanwhile_is_noticed_too(tmp_path, media, capsys):  # noqa: F811
  write(tmp_path / "f.json", [item(video="0.mp4")])
  job = Prepare.start(tmp_path / "s", Settings((f"{tmp_path}/f.json",), str(tmp_path), 1, size=56))
  job.run("index", 0)
  job.run("shards", 0)
  (tmp_path / "0.mp4").write_bytes((media / "a.mp4").read_bytes())
  assert main(["data", "prepare", "--out", str(job.out)]) == 2
  assert "0.mp4: was changed" in capsys.readouterr().err


FULL = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
from vr_jax.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("limit", [100, 2000, 30_000])
def test_a_full_disk_is_one_line(tmp_path, media, limit):  # noqa: F811
  """A limit of file sizes fails writes as a full disk does: of the lock, an index, a shard."""
  (tmp_path / "a.mp4").write_bytes((media / "a.mp4").read_bytes())
  write(tmp_path / "f.json", [item(id=i, video="a.mp4") for i in range(40)])
  words = ["data", "prepare", tmp_path / "f.json", "--media", tmp_path, "--out", tmp_path / "s"]
  words = [sys.executable, "-c", FULL, str(limit), *map(str, words), "--jobs", "1"]
  full = subprocess.run(words, capture_output=True, text=True)
  last = full.stderr.splitlines()[-1]
  assert full.returncode == 2
  assert "File too large" in last
  assert limit == 100 or "nothing that was done is lost: make room and run again" in last
  assert "Traceback" not in full.stderr
  words[3] = "-1"
  assert subprocess.run(words, capture_output=True, text=True).returncode == 0
