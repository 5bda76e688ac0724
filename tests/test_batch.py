"""Rows of static shape: the splice slot by slot, what fits, the published batches end to end."""

import dataclasses
import json

import numpy as np
import pytest

from data_pipes.batch import (
  Clip,
  Needs,
  RowShape,
  build_row,
  check_fit,
  collate,
  empty_row,
  fit_shape,
  needs,
)
from data_pipes.clips import read_clip
from data_pipes.errors import InputError
from data_pipes.masks import mask_to_grid
from data_pipes.prompts import IGNORE, MEDIA_IDS, Text, question_prompt
from data_pipes.records import RecordFile
from data_pipes.samples import RowRules, Samples, record_needs
from data_pipes.tokenizer import Tokenizer

REGION = 9
VIDEO = MEDIA_IDS["<video>"]
SHAPE = RowShape(
  frames=4, scene=3, objects=2, object_frames=2, length=16, image_size=2, grid=2,
  tokens_per_object=3, scene_tokens=4,
)  # fmt: skip


def _text(ids, answers=()):
  ids = np.array(ids, np.int32)
  return Text(ids, np.where(np.isin(np.arange(len(ids)), answers), ids, IGNORE).astype(np.int32))


def _clip(objects, scene=(5, 2, 2)):
  numbers = {*scene, *(n for masks in objects for n in masks)}
  frames = {n: np.full((2, 2, 3), 10 + n, np.uint8) for n in numbers}
  return Clip(
    frames, list(scene), [{n: np.array(m, np.uint8) for n, m in o.items()} for o in objects]
  )


def test_splice_slot_by_slot():
  text = _text([1, REGION, VIDEO, 7, REGION, 8], answers=[4, 5])
  row = build_row(text, _clip([{7: [1, 0, 0, 1], 2: [0, 0, 0, 0]}]), SHAPE, REGION)
  # 1 and the <region> before the tag are text; 4 scene tokens; 7; 3 tokens of object 0; 8; padding.
  assert row["tokens"].tolist() == [1, REGION, 0, 0, 0, 0, 7, 0, 0, 0, 8, 0, 0, 0, 0, 0]
  assert row["visual"].tolist() == [-1, -1, 0, 1, 2, 3, -1, 4, 5, 6, -1, -1, -1, -1, -1, -1]
  assert row["valid"].tolist() == [True] * 11 + [False] * 5
  # A <region> inside an answer is no target.
  assert np.flatnonzero(row["supervised"]).tolist() == [10]
  # Every frame once: scene 5, 2, then 7, which has a mask only.
  assert row["frames"][:, 0, 0, 0].tolist() == [15, 12, 17, 0]
  assert row["scene"].tolist() == [0, 1, 1]
  assert row["region_frames"].tolist() == [[2, 1], [-1, -1]]
  assert row["region_masks"][0].tolist() == [[0] * 4, [0] * 4, [1, 0, 0, 1], [0] * 4]
  assert not row["region_masks"][1].any()


def test_second_object_takes_the_second_region():
  objects = [{5: [1, 1, 1, 1]}, {2: [0, 1, 0, 0]}]
  row = build_row(_text([VIDEO, REGION, REGION]), _clip(objects), SHAPE, REGION)
  assert row["visual"][:10].tolist() == list(range(10))
  assert row["region_frames"].tolist() == [[0, -1], [1, -1]]
  assert row["region_masks"][:, :2].tolist() == [[[1] * 4, [0] * 4], [[0] * 4, [0, 1, 0, 0]]]


def test_an_image_is_one_frame():
  row = build_row(_text([VIDEO, REGION]), _clip([{0: [1, 0, 0, 0]}], (0, 0, 0)), SHAPE, REGION)
  assert row["scene"].tolist() == [0, 0, 0]
  assert row["frames"][1:].max() == 0
  assert row["region_frames"][0].tolist() == [0, -1]


def test_text_alone_takes_no_visual_slot():
  row = build_row(_text([1, REGION, 3], answers=[2]), None, SHAPE, REGION)
  assert row["tokens"][:3].tolist() == [1, REGION, 3]
  assert (row["visual"] == -1).all()
  assert row["valid"].sum() == 3
  assert np.flatnonzero(row["supervised"]).tolist() == [2]
  assert (row["region_frames"] == -1).all()
  assert not row["frames"].any()


def test_types_are_those_of_the_model():
  row = build_row(_text([VIDEO]), _clip([]), SHAPE, REGION)
  types = {key: (value.dtype.name, value.shape) for key, value in row.items()}
  assert types == {
    "frames": ("uint8", (4, 2, 2, 3)),
    "scene": ("int32", (3,)),
    "region_masks": ("uint8", (2, 4, 4)),
    "region_frames": ("int32", (2, 2)),
    "tokens": ("int32", (16,)),
    "visual": ("int32", (16,)),
    "valid": ("bool", (16,)),
    "supervised": ("bool", (16,)),
  }
  batch = collate([row, empty_row(SHAPE)])
  assert {key: value.shape for key, value in batch.items()} == {
    key: (2, *shape) for key, (_, shape) in types.items()
  }
  assert not batch["valid"][1].any()
  assert not batch["supervised"][1].any()


@pytest.mark.parametrize(
  ("ids", "objects", "message"),
  [
    ([VIDEO, 1], [{5: [0] * 4}], "found 0 <region> after the media tag within 2 text ids but 1 o"),
    ([VIDEO, REGION], [], "found 1 <region> .* but 0 objects"),
    ([REGION, VIDEO], [{5: [0] * 4}], "found 0 <region> after the media tag"),
    ([1, 2], [], "found 0 media tags in the text; accepted: exactly one"),
    ([VIDEO, VIDEO], [], "found 2 media tags"),
  ],
)
def test_tags_that_do_not_match_the_clip_are_refused(ids, objects, message):
  with pytest.raises(InputError, match=f"f.json: item 2: {message}"):
    build_row(_text(ids), _clip(objects), SHAPE, REGION, "f.json: item 2")


def test_a_tag_without_media_is_refused():
  with pytest.raises(InputError, match="found 1 media tags in the text; accepted: none"):
    build_row(_text([VIDEO, 1]), None, SHAPE, REGION)


def test_cutting_a_region_away_is_refused():
  text = _text([VIDEO, 1, REGION])
  build_row(text, _clip([{5: [0] * 4}]), SHAPE, REGION)
  with pytest.raises(InputError, match="0 <region> after the media tag within 2 text ids"):
    build_row(text.cut(2), _clip([{5: [0] * 4}]), SHAPE, REGION)


@pytest.mark.parametrize(
  ("ids", "objects", "scene", "message"),
  [
    ([VIDEO] + [1] * 13, [], (0, 0, 0), r"length 17 \(accepted: up to 16\)"),
    ([VIDEO], [], (0, 1), r"scene 2 \(accepted: 3\)"),
    ([VIDEO] + [REGION] * 3, [{0: [0] * 4}] * 3, (0, 0, 0), r"objects 3 \(accepted: up to 2\)"),
    (
      [VIDEO, REGION], [{n: [0] * 4 for n in range(4)}], (9, 9, 9),
      r"frames 5 \(accepted: up to 4\), object_frames 4 \(accepted: up to 2\)",
    ),
  ],
)  # fmt: skip
def test_a_row_that_does_not_fit_says_the_numbers(ids, objects, scene, message):
  with pytest.raises(InputError, match=f"f: does not fit the row shape: found {message}"):
    build_row(_text(ids), _clip(objects, scene), SHAPE, REGION, "f")


def test_fit_shape_is_the_smallest_that_holds_all():
  rows = [
    (_text([1, 2, 3]), None),
    (_text([VIDEO, REGION, 1]), _clip([{5: [0] * 4, 9: [0] * 4}])),
    (_text([VIDEO, REGION, REGION]), _clip([{5: [0] * 4}, {2: [0] * 4}])),
  ]
  wanted = [needs(text, clip, REGION) for text, clip in rows]
  sizes = {"image_size": 2, "grid": 2, "tokens_per_object": 3, "scene_tokens": 4}
  shape = fit_shape(wanted, **sizes, length_multiple=1)
  assert shape == RowShape(
    frames=3, scene=3, objects=2, object_frames=2, length=10, image_size=2, grid=2,
    tokens_per_object=3, scene_tokens=4,
  )  # fmt: skip
  for (text, clip), need in zip(rows, wanted, strict=True):
    build_row(text, clip, shape, REGION)
    check_fit(need, shape, "row")
  for field in ("frames", "objects", "object_frames", "length"):
    smaller = dataclasses.replace(shape, **{field: getattr(shape, field) - 1})
    # Each size is taken up by one row at least.
    assert any(_refused(need, smaller, field) for need in wanted)
  rounded = fit_shape(
    wanted, **sizes, length_multiple=8, frames_multiple=4, object_frames_multiple=5
  )
  assert (rounded.length, rounded.frames, rounded.object_frames) == (16, 4, 5)


def _refused(need, shape, field):
  try:
    check_fit(need, shape, "row")
  except InputError as error:
    return f" {field} " in str(error)
  return False


def test_fit_shape_of_rows_that_can_not_share_a_batch():
  sizes = {"image_size": 2, "grid": 2, "tokens_per_object": 3, "scene_tokens": 4}
  with pytest.raises(InputError, match=r"\[2, 3\] scene frames"):
    fit_shape([Needs(2, 2, 0, 0, 1), Needs(3, 3, 0, 0, 1)], **sizes)
  assert fit_shape([Needs(0, 0, 0, 0, 3)], **sizes, scene=16).scene == 16


def test_a_short_gif_is_filled_up_with_black_frames(golden):
  """Source frames come once each; black ones are frames of the row, as published."""
  theirs = np.load(golden / "arrays/08_preprocess.npz")["gif_more/pixels_u8"]
  shape = dataclasses.replace(SHAPE, frames=16, scene=16, image_size=56)
  clip = read_clip(golden / "media/clip_gif.gif", shape)
  row = build_row(_text([VIDEO]), clip, shape, REGION)
  # 9 frames, then the black ones of both published shapes in turn.
  assert row["scene"].tolist() == [*range(9), 9, 10, 9, 10, 9, 10, 9]
  np.testing.assert_array_equal(row["frames"][row["scene"]].transpose(0, 3, 1, 2), theirs)


# The published batches (05_forward): tower 56 px, grid 4, 16 scene frames -> 8 * 2 * 2 tokens, u 4.
GRID, SCENE, SCENE_TOKENS, UNION = 4, 16, 32, 4


@pytest.fixture(scope="module")
def published(golden):
  """The rows of data/train.json by this code, beside the arrays that upstream's loader made."""
  tokenizer = Tokenizer.from_folder(golden / "tiny_videorefer_qwen2")
  file = RecordFile(golden / "data/train.json")
  rules = RowRules()
  wanted = [record_needs(r, i, tokenizer, SCENE, rules) for i, r in enumerate(file)]
  shape = fit_shape(
    wanted, image_size=56, grid=GRID, tokens_per_object=UNION, scene_tokens=SCENE_TOKENS
  )
  samples = Samples(file, tokenizer, shape, media_root=golden / "media", rules=rules)
  stages = json.loads((golden / "cases.json").read_text())["stages"]
  cases = {c["id"]: c for s in stages if s["stage"] == "05_forward" for c in s["cases"]}
  arrays = np.load(golden / "arrays/05_forward_rows.npz")
  rows = [samples[i] for i in range(len(file))]
  return file, shape, rows, cases, arrays


def test_published_shape(published):
  _, shape, *_ = published
  assert shape == RowShape(
    frames=23, scene=16, objects=4, object_frames=7, length=192, image_size=56, grid=4,
    tokens_per_object=4, scene_tokens=32,
  )  # fmt: skip


def _near_mp4(path):
  return 6 if path.endswith(".mp4") else 1 if path.endswith(".jpg") else 0


def test_published_scene_frames(published):
  file, _, rows, _, arrays = published
  compared = 0
  for i, (record, row) in enumerate(zip(file, rows, strict=True)):
    if record.media is None:
      continue
    theirs = arrays[f"b_all/images_{i}_u8"]
    theirs = theirs[None].repeat(SCENE, 0) if theirs.ndim == 3 else theirs
    ours = row["frames"][row["scene"]].transpose(0, 3, 1, 2)
    assert np.abs(ours.astype(int) - theirs).max() <= _near_mp4(record.path), record.path
    assert len(np.unique(row["scene"])) == (1 if record.media == "image" else ours.shape[0]) or (
      record.path == "clip_dir"  # 12 frames: some are shown twice, and stored once
    )
    compared += 1
  assert compared == 7


def test_published_mask_frames_and_masks(published):
  """Frame and mask of every (object, frame) pair, in the published order."""
  file, _, rows, cases, arrays = published
  frames = np.rint((arrays["b_all/frame"] * 0.5 + 0.5) * 255).astype(int)
  compared = 0
  for i, (record, row) in enumerate(zip(file, rows, strict=True)):
    masks = arrays[f"b_all/masks_{i}"]
    if not record.objects:
      assert not masks.any()  # the published dummy
      assert not row["region_masks"].any()
      assert (row["region_frames"] == -1).all()
      continue
    pair = 0
    for r, theirs in enumerate(cases["b_all"]["meta"]["ann_indices"][i]):
      ours = row["region_frames"][r]
      ours = ours[ours >= 0]
      assert len(ours) == len(theirs)
      for p, f in zip(ours, theirs, strict=True):
        pixels = row["frames"][p].transpose(2, 0, 1).astype(int)
        assert np.abs(pixels - frames[f]).max() <= _near_mp4(record.path)
        grid = mask_to_grid(masks[pair], GRID).reshape(-1)
        np.testing.assert_array_equal(row["region_masks"][r, p], grid)
        assert grid.any() == masks[pair].any()
        pair += 1
        compared += 1
    assert pair == len(masks)
  assert compared == 24


def _compacted_labels(row, tokens_kept):
  """Labels after dropping the slots of object tokens that the merge left out."""
  keep = row["valid"].copy()
  of_object = row["visual"] >= SCENE_TOKENS
  obj, k = np.divmod(row["visual"] - SCENE_TOKENS, UNION)
  for slot in np.flatnonzero(of_object):
    keep[slot] = k[slot] < tokens_kept[obj[slot]]
  return np.where(row["supervised"], row["tokens"], IGNORE)[keep]


def test_published_labels_after_expansion(published):
  """k frames give min(k, u) tokens (no ties in these clips, but for one null mask)."""
  file, _, rows, cases, arrays = published
  compared = 0
  for case in (c for name, c in cases.items() if name.startswith("b_")):
    for b, item in enumerate(case["meta"]["train_json_ids"]):
      kept = [min(len(masks), UNION) for masks in file[item].objects]
      ours = _compacted_labels(rows[item], kept)
      used = int(arrays[f"{case['id']}/out_attention_mask"][b].sum())
      assert used == case["meta"]["lengths"][b]
      np.testing.assert_array_equal(ours, arrays[f"{case['id']}/out_labels"][b, :used])
      compared += 1
  assert compared == 17


def test_the_label_total_of_the_published_batch(published):
  _, _, rows, cases, _ = published
  assert sum(row["supervised"].sum() for row in rows) == cases["b_all"]["meta"]["num_label_tokens"]


def test_questions_of_inference_become_rows(golden, published):
  """i_* cases: the same splice from a prompt; more objects than <region> is refused (B10)."""
  cases, arrays = published[3:]
  tokenizer = Tokenizer.from_folder(golden / "tiny_videorefer_qwen2")
  lengths = {"i_one_region": 39, "i_multi_frame": 42, "i_two_regions": 53, "i_video_noframe": 34}
  for name, length in lengths.items():
    instruct = cases[name]["meta"]["prompt"].partition("<video>\n")[2].partition("<|im_end|>")[0]
    _, text = question_prompt(instruct, tokenizer, "video")
    np.testing.assert_array_equal(text.ids, arrays[f"{name}/input_ids"][0])
    indices = (cases[name]["meta"]["ann_indices"] or [[]])[0]
    blank = np.zeros((2, 2, 3), np.uint8)
    objects = [{n: np.zeros(4, np.uint8) for n in of_object} for of_object in indices]
    clip = Clip(dict.fromkeys(range(10), blank), range(4), objects)
    shape = RowShape(10, 4, 2, 9, 64, 2, 2, UNION, 8)  # 4 scene frames: 2 * 2 * 2 tokens
    row = build_row(text, clip, shape, tokenizer.region_id)
    dropped = sum(max(UNION - len(of_object), 0) for of_object in objects)
    assert row["valid"].sum() - dropped == length
  blank = np.zeros((2, 2, 3), np.uint8)
  many = Clip({0: blank}, [0] * 4, [{0: np.zeros(4, np.uint8)}] * 3)
  text = Text(arrays["i_more_masks/input_ids"][0], arrays["i_more_masks/input_ids"][0])
  with pytest.raises(InputError, match=r"found 1 <region> .* but 3 objects"):
    build_row(text, many, dataclasses.replace(shape, objects=3), tokenizer.region_id)
