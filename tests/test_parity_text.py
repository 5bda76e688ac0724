"""The golden cases of media, prompts and parsing pass, and each group can fail."""

import json
import shutil

import numpy as np
import pytest

from vr_jax.parity import text
from vr_jax.parity.golden import FAIL, PASS, REFUSED, SKIPPED, STAGES, Golden

JSON_STAGES = ("frame_sample", "prompts", "bench_q_scoring", "bench_d_scoring")


def run(golden, stage):
  function = STAGES[stage].split(":")[1]
  return {r.case: r for r in getattr(text, function)(Golden(golden))}


@pytest.mark.parametrize("stage", JSON_STAGES)
def test_json_cases_pass(golden, stage):
  results = run(golden, stage)
  assert len(results) >= 2
  assert {r.status for r in results.values()} == {PASS}, list(map(str, results.values()))
  assert all(r.note for r in results.values())


def test_media_cases_pass(golden, monkeypatch):
  monkeypatch.delenv("VR_MEDIA_DIR", raising=False)
  results = run(golden, "08_preprocess")
  wanted = {c.id for c in Golden(golden).cases("08_preprocess")}
  assert set(results) == wanted
  assert not [str(r) for r in results.values() if r.status == FAIL]
  refused = {name for name, r in results.items() if r.status == REFUSED}
  assert refused == {"ndarray", "ndarray_list", "annToMask_rle_uncompressed_None"}
  skipped = {name for name, r in results.items() if r.status == SKIPPED}
  assert skipped == {name for name in wanted if name.startswith("real_")}
  assert results["img_png_384"].max_error < 1e-5


@pytest.fixture
def copied(golden, tmp_path):
  folder = tmp_path / "golden"
  for name in ("json", "media", "tiny_videorefer_qwen2"):
    shutil.copytree(golden / name, folder / name, ignore=shutil.ignore_patterns("*.safetensors"))
  (folder / "arrays").mkdir()
  for name in ("08_preprocess.npz", "ndarray_clip.npz"):
    shutil.copy(golden / "arrays" / name, folder / "arrays")
  shutil.copy(golden / "cases.json", folder)
  return folder


def _change(recorded, *path, value):
  *start, last = path
  for key in start:
    recorded = recorded[key]
  recorded[last] = value


@pytest.mark.parametrize(
  ("stage", "path", "value", "groups"),
  [
    ("frame_sample", ("uniform", 3, "idx"), [0, 1], "uniform"),
    ("frame_sample", ("fps", 0, "idx"), [12], "fps"),
    ("prompts", ("special", "len_tokenizer"), 7, "special"),
    ("prompts", ("tokenizer", 1, "slow"), [5], "encode decode decode_skip_special"),
    ("prompts", ("tokenizer", 1, "decode"), "x", "decode"),
    ("prompts", ("tokenizer", 1, "decode_skip_special"), "x", "decode_skip_special"),
    ("prompts", ("decode_random_ids", 0, "strip"), "x", "decode_random_ids"),
    ("prompts", ("tokenizer_multimodal_token", 0, "ids"), [1], "media_tags"),
    ("prompts", ("chat_template", 0, "text"), "x", "chat_template"),
    ("prompts", ("train_preprocess", 0, "labels"), [1], "train_preprocess_0"),
    ("prompts", ("train_preprocess", 0, "supervised_text"), "x", "train_preprocess_0"),
    ("prompts", ("train_preprocess", 0, "plain", "labels"), [1], "train_preprocess_0"),
    ("prompts", ("train_preprocess", 0, "error"), "AssertionError", "train_preprocess_0"),
    ("bench_q_scoring", ("items", 2, "extracted"), "C", "items"),
    ("bench_q_scoring", ("stdout",), "", "whole"),
    ("bench_q_scoring", ("crashes", 0, "error"), None, "crashes"),
    ("bench_d_scoring", ("items", 0, "dropped"), True, "items"),
    ("bench_d_scoring", ("items", 3, "analyze_error"), None, "items"),
    ("bench_d_scoring", ("whole", "parsed", 0, "Subject Correspondence"), 1.0, "whole"),
    ("bench_d_scoring", ("first6", "analyze_stdout"), "", "first6"),
  ],
)
def test_a_changed_record_fails_its_group_alone(copied, stage, path, value, groups):
  file = copied / "json" / f"{stage}.json"
  recorded = json.loads(file.read_text())
  _change(recorded, *path, value=value)
  file.write_text(json.dumps(recorded))
  results = run(copied, stage)
  failed = {name: r for name, r in results.items() if r.status == FAIL}
  assert list(failed) == groups.split()
  assert all(r.note for r in failed.values())


def keep_cases(folder, names, path=None, value=None):
  """Cuts stage 08 down to some cases, and changes one entry of one of them."""
  index = json.loads((folder / "cases.json").read_text())
  stage = next(s for s in index["stages"] if s["stage"] == "08_preprocess")
  cases = {c["id"]: c for c in stage["cases"] if c["id"] in names}
  if path:
    _change(cases, *path, value=value)
  stage["cases"] = list(cases.values())
  (folder / "cases.json").write_text(json.dumps(index))
  return cases


def test_media_are_found_elsewhere_by_their_sum(copied, tmp_path, monkeypatch):
  (tmp_path / "media").mkdir()
  (copied / "media" / "clip_mp4.mp4").rename(tmp_path / "media" / "renamed.mp4")
  (tmp_path / "media" / "other.mp4").write_bytes(b"other")
  keep_cases(copied, ("mp4_8", "mp4_40"))
  monkeypatch.delenv("VR_MEDIA_DIR", raising=False)
  absent = run(copied, "08_preprocess").values()
  assert {(r.status, r.note) for r in absent} == {(SKIPPED, "not run (file not in the folder)")}
  monkeypatch.setenv("VR_MEDIA_DIR", str(tmp_path / "media"))
  assert {r.status for r in run(copied, "08_preprocess").values()} == {PASS}


def test_real_clips(copied, media_dir):
  names = ("real_dog_8_56", "real_dog_16_384", "real_dog_pad_384", "real_1_fps_56")
  assert len(keep_cases(copied, names)) == 4
  assert {r.status for r in run(copied, "08_preprocess").values()} == {PASS}


@pytest.mark.parametrize(
  ("case", "path", "value", "message"),
  [
    ("dir_n16", ("meta", "sampled_within_range", 0), 1, "sampled frames"),
    ("mp4_8", ("meta", "decoded_frame_ids", 0), 1, "frames"),
    ("dir_s_e", ("meta", "duration_in_range"), 9, "frames in the range"),
    ("gif", ("meta", "height"), 9, "size"),
    ("img_png_square", ("meta", "width"), 9, "size"),
    ("img_png_square", ("meta", "aspect_ratio"), "pad", "mean pixel within tolerance"),
    ("dir_pad", ("meta", "aspect_ratio"), "square", "differs by"),
    ("dir_default", ("meta", "args", "frame_idx"), [0, 3, 11], "frame_u8 differs"),
    ("annToMask_polygons_23", ("meta", "segmentation", 0, 0), 4.0, "mask differs"),
  ],
)
def test_a_changed_media_case_fails_alone(copied, case, path, value, message, monkeypatch):
  monkeypatch.delenv("VR_MEDIA_DIR", raising=False)
  kept = keep_cases(copied, (case, "square_4x10", "path_list"), (case, *path), value)
  assert len(kept) == 3
  results = run(copied, "08_preprocess")
  assert [name for name, r in results.items() if r.status == FAIL] == [case]
  assert message in results[case].note


def test_changed_pixels_fail(copied, monkeypatch):
  monkeypatch.delenv("VR_MEDIA_DIR", raising=False)
  file = copied / "arrays" / "08_preprocess.npz"
  arrays = dict(np.load(file))
  arrays["gif/pixels_u8"] = arrays["gif/pixels_u8"].copy()
  arrays["gif/pixels_u8"][0, 0, 0, 0] += 1
  arrays["resize_2x3/pixel_values"] = arrays["resize_2x3/pixel_values"] + 1e-5
  np.savez(file, **arrays)
  failed = {name for name, r in run(copied, "08_preprocess").items() if r.status == FAIL}
  assert failed == {"gif", "resize_2x3"}
