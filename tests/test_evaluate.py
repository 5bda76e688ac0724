"""`vr eval` on the tiny published checkpoint: predictions, shards, resuming, defects."""

import dataclasses
import itertools
import json
import shutil
from collections import Counter

import numpy as np
import pytest

import vr_jax
from data_pipes.embedded.make_set import make_set
from data_pipes.errors import InputError
from vr_jax import cli
from vr_jax.evaluation.benchmarks.registry import benchmark, read
from vr_jax.evaluation.items import Item
from vr_jax.evaluation.results import read_predictions
from vr_jax.evaluation.run import Settings, _read_parts, evaluate, limited, shard_of, share
from vr_jax.evaluation.score import score
from vr_jax.evaluation.scoring.comparison import compare

TOKENS = 16  # as recorded


@pytest.fixture(scope="module")
def model(golden):
  return vr_jax.load(golden / "tiny_videorefer_qwen2")


@pytest.fixture
def data(golden, tmp_path):
  """The golden Bench files in a folder with their media."""
  folder = tmp_path / "data"
  folder.mkdir()
  for kind in ("d", "q"):
    shutil.copy(golden / "data" / f"bench_{kind}.json", folder)
  for name in ("clip_dir", "clip_mp4.mp4"):
    (folder / name).symlink_to(golden / "media" / name)
  return folder


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
  """vr-mini, and 36 questions on 12 clips."""
  return vr_jax.load(), make_set(tmp_path_factory.mktemp("set"), 1, 12, 36, 1)


def run(model, golden, name, data, out, mode="single", **options):
  settings = Settings(mode, max_new_tokens=TOKENS, published=True, batch_size=1)
  checkpoint = golden / "tiny_videorefer_qwen2"
  return evaluate(model, name, data, out, settings, checkpoint=checkpoint, **options)


def lines(path):
  return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def items_of(data, name="bench_q"):
  return json.loads((data / f"{name}.json").read_text())


def write_items(data, items, name="bench_q"):
  (data / f"{name}.json").write_text(json.dumps(items))


@pytest.mark.parametrize(
  ("name", "mode"),
  [
    ("bench-q", "single"),
    pytest.param("bench-q", "multi", marks=pytest.mark.slow),  # answers as in test_parity
    pytest.param("bench-d", "single", marks=pytest.mark.slow),
  ],
)
def test_published_files_equal_those_of_the_published_scripts(
  name, mode, model, golden, data, tmp_path
):
  recorded = json.loads((golden / "json" / "bench_inference.json").read_text())
  kind, out = name[-1].upper(), tmp_path / name
  told = run(model, golden, name, data, out, mode)
  assert lines(out / "published.jsonl") == [r["output_record"] for r in recorded[kind][mode]]
  held, predictions = read_predictions(out)
  assert held == told
  assert [p.id for p in predictions] == [r["id"] for r in recorded[kind][mode]]
  counts = {"total": 4, "answered": 4, "missing_media": 0, "unusable": 0, "empty": 0}
  assert told["counts"] == counts
  assert told["inference"]["frames"] == 8
  assert len(predictions[0].scene_frames) == 8
  assert len(told["model"]["checkpoint_sha256"]) == 64


def test_shards_and_a_kill_give_the_same_file(model, golden, data, tmp_path):
  whole, apart = tmp_path / "whole", tmp_path / "apart"
  run(model, golden, "bench-q", data, whole)
  first = run(model, golden, "bench-q", data, apart, shard=(1, 3))
  assert first["counts"]["answered"] == 2
  with pytest.raises(InputError, match="only parts are done"):
    read_predictions(apart)
  run(model, golden, "bench-q", data, apart, shard=(0, 3))
  part = apart / "parts" / "0-of-3.jsonl"
  torn = part.read_text()[:-40]  # killed within its second line
  part.write_text(torn)
  (apart / "parts" / "1-of-2.jsonl").write_text('{"id": 0, "pre')  # another process is writing
  messages = []
  run(
    model, golden, "bench-q", data, apart, progress=messages.append
  )  # by another number of shards
  assert messages[0].endswith("4 items, 3 done, 1 to ask here")
  for name in ("predictions.jsonl", "published.jsonl"):
    assert (apart / name).read_bytes() == (whole / name).read_bytes()
  # No process writes over the file of another.
  assert part.read_text() == torn
  assert (apart / "parts" / "1-of-2.jsonl").read_text() == '{"id": 0, "pre'
  run(model, golden, "bench-q", data, apart, progress=messages.append)
  assert messages[-1].endswith("4 done, 0 to ask here")


def test_a_torn_line_is_taken_out_before_the_next_is_written(model, golden, data, tmp_path):
  out = tmp_path / "out"
  run(model, golden, "bench-q", data, out)
  part = out / "parts" / "0-of-1.jsonl"
  whole = part.read_text()
  before = (out / "predictions.jsonl").read_bytes()
  part.write_text(whole[:-40])
  run(model, golden, "bench-q", data, out)
  assert len(lines(part)) == 4
  assert part.read_text() == whole
  assert (out / "predictions.jsonl").read_bytes() == before


def test_options_by_their_likelihood_are_never_mixed_with_what_is_written(
  model, golden, data, tmp_path
):
  settings = Settings("single", scene_frames=4, by="likelihood")
  out = tmp_path / "by"
  told = evaluate(model, "bench-q", data, out, settings)
  assert told["inference"]["by"] == "likelihood"
  assert told["inference"]["decoding"] is None
  for p in read_predictions(out)[1]:
    assert len(p.likelihoods) == len(p.options)
    assert max(p.likelihoods) < 0
    assert p.pred == f"({'ABCDE'[p.likelihoods.index(max(p.likelihoods))]})"
  result, _ = score("bench-q", out)
  assert result.counts["unparsed"] == 0
  assert "by likelihood" in result.label
  written = dataclasses.replace(settings, by="generation", max_new_tokens=2)
  with pytest.raises(InputError, match=r"inference (by|decoding)="):
    evaluate(model, "bench-q", data, out, written)
  run = {**result.run, "inference": {**result.run["inference"], "by": None}}
  with pytest.raises(InputError, match="chosen by likelihood against options chosen by generation"):
    compare(result, dataclasses.replace(result, run=run))
  with pytest.raises(InputError, match="has no options to choose from"):
    evaluate(model, "bench-d", data, tmp_path / "d", settings)


def test_a_limit_is_drawn_evenly_over_the_types():
  items = [Item(i, "", "v", type=t) for i, t in enumerate("aaaaaabbbbcdd")]
  assert [item.id for item in limited(items, 8)] == [0, 1, 2, 6, 7, 10, 11, 12]
  assert [item.id for item in limited(items, 3)] == [0, 6, 10]
  assert limited(items, 99) == limited(items, None) == items
  with pytest.raises(InputError, match="--limit 0"):
    limited(items, 0)


def test_the_part_of_another_shard_is_read_and_left_alone(tmp_path):
  """Another process may be writing behind the line that is not whole yet."""
  part = tmp_path / "parts" / "1-of-2.jsonl"
  part.parent.mkdir()
  part.write_bytes(b'{"id": 1, "video": "v", "pred": "A"}\n{"id": 2, "vid')
  content = part.read_bytes()
  assert list(_read_parts(tmp_path)) == [1]
  assert part.read_bytes() == content


def test_a_shard_is_whole_videos():
  """No video is in two; a shard gets one only while it has the fewest questions."""
  rng = np.random.default_rng(0)
  items = [Item(i, "", f"{v}.mp4", "") for i, v in enumerate(rng.integers(0, 30, 400))]
  for n in (1, 3, 7, 40):
    shards = [share(items, k, n) for k in range(n)]
    assert sorted(item.id for shard in shards for item in shard) == list(range(400))
    videos = [{item.video for item in shard} for shard in shards]
    assert sum(map(len, videos)) == len(set.union(*videos))
    sizes = [len(shard) for shard in shards]
    assert max(sizes) - min(sizes) <= max(Counter(item.video for item in items).values())


def test_a_run_that_was_divided_by_items_goes_on(model, golden, data, tmp_path):
  """Before shards were whole videos, shard k had every n-th item from the k-th on."""
  whole, old = tmp_path / "whole", tmp_path / "old"
  run(model, golden, "bench-q", data, whole)
  shutil.copytree(whole / "parts", old / "parts")
  done = lines(old / "parts" / "0-of-1.jsonl")
  (old / "parts" / "0-of-1.jsonl").unlink()
  part = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in done if line["id"] % 2)
  (old / "parts" / "1-of-2.jsonl").write_text(part, encoding="utf-8")
  messages = []
  for k in (0, 1):
    run(model, golden, "bench-q", data, old, shard=(k, 2), progress=messages.append)
  assert messages[0].endswith("4 items, 2 done, 1 to ask here")
  assert (old / "predictions.jsonl").read_bytes() == (whole / "predictions.jsonl").read_bytes()


@pytest.mark.parametrize("order", [pytest.param("sorted", marks=pytest.mark.slow), "shuffled"])
def test_each_frame_is_encoded_once_whatever_the_order_of_the_file(order, embedded, tmp_path):
  """vr-mini on twelve clips, more than prefixes are kept; no two neighbours on one clip."""
  model, data = embedded
  items = items_of(data)
  by_clip = sorted(items, key=lambda item: item["video"])
  shuffled = [item for k in range(3) for item in by_clip[k::3]]
  assert all(a["video"] != b["video"] for a, b in itertools.pairwise(shuffled))
  folder = tmp_path / "data"
  folder.mkdir()
  (folder / "videos").symlink_to(data / "videos")
  write_items(folder, by_clip if order == "sorted" else shuffled)
  model.visual.forget()
  evaluate(model, "bench-q", folder, tmp_path / "out", Settings(max_new_tokens=2, scene_frames=4))
  _, predictions = read_predictions(tmp_path / "out")
  frames = {(p.video, f) for p in predictions for f in p.scene_frames}
  frames |= {
    (item["video"], int(f)) for item in items for marked in item["annotation"] for f in marked
  }
  assert model.visual.counts["frames"] == len(frames)
  alone = {
    item.id: model.ask_many([item.request(folder, "multi", 4)], max_new_tokens=2, scene_frames=4)
    for item in read(benchmark("bench-q"), folder / "bench_q.json").items[:3]
  }
  assert {p.id: p.pred for p in predictions[:3]} == {i: a.text for i, (a,) in alone.items()}


def test_what_cannot_be_asked_is_counted_and_asked_again_later(model, golden, data, tmp_path):
  items = items_of(data)
  items[0]["video"] = "absent.mp4"
  items[1]["frame_idx"] = "77"  # not annotated
  items[2]["video"] = "broken.mp4"
  items.append({**items[3], "id": 9, "video": "../data/clip_mp4.mp4"})
  (data / "broken.mp4").write_bytes(b"no video")
  write_items(data, items)
  out, said = tmp_path / "out", []
  told = run(model, golden, "bench-q", data, out, progress=said.append)
  assert told["counts"] == {
    "total": 5,
    "answered": 1,
    "missing_media": 1,
    "unusable": 3,
    "empty": 0,
  }
  by_id = {p.id: p for p in read_predictions(out)[1]}
  assert "absent.mp4" in by_id[items[0]["id"]].error
  assert "no annotation on frame_idx 77" in by_id[items[1]["id"]].error
  assert "broken.mp4" in by_id[items[2]["id"]].error
  assert len([line for line in said if "unusable" in line or "missing" in line]) == 4
  assert "leads out of the media folder" in by_id[9].error
  assert len(lines(out / "published.jsonl")) == 1
  (data / "absent.mp4").symlink_to(golden / "media" / "clip_dir")
  told = run(model, golden, "bench-q", data, out)
  assert told["counts"]["answered"] == 2


def test_a_folder_keeps_to_its_settings(model, golden, data, tmp_path):
  out = tmp_path / "out"
  run(model, golden, "bench-q", data, out, shard=(0, 4))
  before = sorted(p.read_bytes() for p in out.rglob("*") if p.is_file())
  with pytest.raises(InputError, match="mode='single', not 'multi'"):
    run(model, golden, "bench-q", data, out, "multi")
  items = items_of(data)
  items[0]["Answer"] = "(B) A hat"
  write_items(data, items)
  with pytest.raises(InputError, match="data_sha256"):
    run(model, golden, "bench-q", data, out)
  assert before == sorted(p.read_bytes() for p in out.rglob("*") if p.is_file())
  other = tmp_path / "other"
  other.mkdir()
  (other / "notes.txt").write_text("mine")
  with pytest.raises(InputError, match="holds other files"):
    run(model, golden, "bench-q", data, other)


def test_bad_files_and_options(model, golden, data, tmp_path):
  def fails(match, name="bench-q", where=None, **options):
    with pytest.raises(InputError, match=match):
      run(model, golden, name, where or data, tmp_path / "out", **options)

  fails("no such file or folder", where=tmp_path / "absent")
  fails("not those of VideoRefer-Bench-D", "bench-d", data / "bench_q.json")
  fails("accepted: bench-d, bench-q", "bench-x")
  fails("--shard 4/4", shard=(4, 4))
  fails("--split NAME", "hc-stvg")
  items = items_of(data)
  write_items(data, [*items, items[1]])
  fails("items 1 and 4 both have id 1")
  write_items(data, [])
  fails("no items")
  for item in items:
    item["video"] = "absent.mp4"
  write_items(data, items)
  fails("none of 4 items could be asked")
  with pytest.raises(InputError, match="scene_frames=1"):
    evaluate(model, "bench-q", data, tmp_path / "out", Settings(scene_frames=1))


def test_processes_started_together_take_turns():
  assert shard_of({}) == (0, 1)
  assert shard_of({"VR_PROCESS": "2", "VR_PROCESSES": "4"}) == (2, 4)
  assert shard_of({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "3"}) == (1, 3)
  assert shard_of({"TPU_WORKER_ID": "3", "TPU_WORKER_HOSTNAMES": "a,b,c,d"}) == (3, 4)
  with pytest.raises(InputError, match="accepted: K/N"):
    shard_of({"VR_PROCESS": "x", "VR_PROCESSES": "4"})


def test_the_mask_rule_is_a_choice_that_results_state(model, golden, data, tmp_path):
  told = run(model, golden, "bench-q", data, tmp_path / "a", limit=1)
  assert told["inference"]["mask_rule"] == "published"
  assert told["inference"]["weights"] == "float32"
  settings = Settings("single", max_new_tokens=TOKENS, scene_frames=8)
  with pytest.raises(InputError, match="mask_rule='published', not 'keep'"):
    evaluate(
      model, "bench-q", data, tmp_path / "a", settings, limit=1,
      checkpoint=golden / "tiny_videorefer_qwen2",
    )  # fmt: skip


def test_the_command(model, golden, data, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr("vr_jax.loading.load", lambda path, **_: model)  # compiled already
  command = ["eval", "bench-q", "--checkpoint", str(golden / "tiny_videorefer_qwen2")]
  command += ["--data", str(data), "--out", str(tmp_path / "out"), "--mode", "single"]
  command += ["--max-new-tokens", str(TOKENS), "--limit", "2", "--published", "--batch-size", "1"]
  assert cli.main([*command, "--json"]) == 0
  printed = capsys.readouterr()
  assert json.loads(printed.out)["task"]["n"] == 2
  assert "2 of 2" in printed.err
  assert cli.main([*command, "--shard", "one"]) == 2
  assert cli.main(["score", "bench-d", str(tmp_path / "out")]) == 2
  assert "is a run of bench-q" in capsys.readouterr().err
  assert cli.main(["score", "bench-q", str(tmp_path / "out")]) == 0
  assert "2 of 4 (--limit)" in capsys.readouterr().out
