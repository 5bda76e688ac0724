"""Packed rows: exact, full, within their budgets; buckets: few shapes, every sample once."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from rounding import assert_same_up_to_rounding, gradient_roundings, loss_roundings, share

from data_pipes.batch import Needs, RowShape, Used, collate, empty_row, place
from data_pipes.errors import InputError
from data_pipes.failures import Failures
from data_pipes.loader import batches_of, make_bucketed_dataset, make_dataset, prefetched
from data_pipes.packing import (
  BucketSamples,
  PackedSamples,
  frame_classes,
  kept_plan,
  make_buckets,
  plan_rows,
  read_needs,
  write_needs,
)
from data_pipes.records import RecordFile
from data_pipes.samples import Samples, record_needs
from data_pipes.tokenizer import Tokenizer
from vr_jax.interop import videorefer as published
from vr_jax.models.videorefer import VideoRefer
from vr_jax.training.loss import model_loss

SIZES = {"image_size": 56, "grid": 4, "tokens_per_object": 4, "scene_tokens": 32}
ONE = RowShape(frames=24, scene=16, objects=4, object_frames=8, length=256, **SIZES)
TALK = [{"from": "human", "value": "Hello there"}, {"from": "gpt", "value": "Good day to you."}]


@pytest.fixture(scope="module")
def tokenizer(golden):
  return Tokenizer.from_folder(golden / "tiny_videorefer_qwen2")


@pytest.fixture(scope="module")
def samples(golden, tokenizer, tmp_path_factory):
  """The golden records (videos, images, objects or none) and two of text alone."""
  items = json.loads((golden / "data/train.json").read_text())
  items += [{"id": f"text{i}", "conversations": TALK * (i + 1)} for i in range(2)]
  file = tmp_path_factory.mktemp("packing") / "f.json"
  file.write_text(json.dumps(items))
  return Samples(RecordFile(file), tokenizer, ONE, media_root=golden / "media")


def needs_of(samples):
  return [
    record_needs(samples.records[i], i, samples.tokenizer, 16, samples.rules)
    for i in range(len(samples))
  ]


def mixed_needs(count, seed=0):
  """Videos with and without objects, images, texts."""
  rng = np.random.default_rng(seed)
  kinds = rng.choice(4, count, p=[0.5, 0.2, 0.2, 0.1])
  needs = []
  for kind in kinds:
    objects = int(rng.integers(1, 4)) if kind == 0 else 0
    frames = {0: 16 + int(rng.integers(0, 20)), 1: 16, 2: 1, 3: 0}[int(kind)]
    text = int(rng.integers(20, 300))
    needs.append(Needs(frames, 16 * (kind != 3), objects, int(objects > 0) * 8, text))
  return needs


def build_packed(parts, shape, region_id):
  row, used = empty_row(shape), Used()
  for text, clip, where in parts:
    used = place(row, text, clip, shape, region_id, where, used)
  return row


def test_a_plan_holds_every_sample_once_within_the_budgets():
  needs = mixed_needs(3000)
  plan = plan_rows(needs, 1024, sizes=SIZES, scene=16, seed=3)
  assert sorted(np.concatenate(plan.rows)) == list(range(3000))
  for row in plan.rows:
    of_row = [needs[i] for i in row]
    assert sum(n.length(4, 32) for n in of_row) <= 1024
    assert sum(n.frames for n in of_row) <= plan.shape.frames
    assert sum(n.objects for n in of_row) <= plan.shape.objects
    assert sum(n.scene > 0 for n in of_row) <= plan.shape.clips
  assert plan.fill["length"] > 0.95
  assert plan.fill["frames"] > 0.85
  again = plan_rows(needs, 1024, sizes=SIZES, scene=16, seed=3)
  assert [r.tolist() for r in again.rows] == [r.tolist() for r in plan.rows]
  other = plan_rows(needs, 1024, sizes=SIZES, scene=16, seed=4)
  assert [r.tolist() for r in other.rows] != [r.tolist() for r in plan.rows]


def test_budgets_that_are_set_are_kept():
  needs = mixed_needs(500)
  budgets = {"frames": 64, "objects": 0, "clips": 3, "object_frames": 8}
  plan = plan_rows(needs, 1024, sizes=SIZES, scene=16, budgets=budgets)
  assert (plan.shape.frames, plan.shape.clips, plan.shape.object_frames) == (64, 3, 8)
  with pytest.raises(InputError, match=r"samples do not fit a packed row, such as \d+: found fram"):
    plan_rows(needs, 1024, sizes=SIZES, scene=16, budgets={"frames": 20})
  with pytest.raises(InputError, match=r"found length \d+ \(accepted: 100\)"):
    plan_rows(needs, 100, sizes=SIZES, scene=16)


def test_one_sample_is_laid_out_as_in_a_row_of_its_own(samples):
  shape = dataclasses.replace(ONE, clips=1)
  for i in range(len(samples)):
    part = samples.part(i)
    alone = samples[i]
    packed = build_packed([part], shape, samples.tokenizer.region_id)
    assert (packed.pop("segments") >= 0).tolist() == alone["valid"].tolist()
    np.testing.assert_array_equal(packed.pop("scene")[0], alone.pop("scene"))
    for key in alone:
      np.testing.assert_array_equal(packed[key], alone[key], err_msg=key)


def test_text_takes_no_frames(samples):
  shape = dataclasses.replace(ONE, frames=1, clips=1, length=512)
  texts = [samples.part(8), samples.part(9)]
  row = build_packed(texts, shape, samples.tokenizer.region_id)
  assert row["valid"].sum() == sum(len(text.ids) for text, _, _ in texts)
  assert not row["frames"].any()
  needs = needs_of(samples)
  assert [n.frames for n in needs[8:]] == [0, 0]
  with pytest.raises(InputError, match=r"does not fit the row shape: found .*length \d+ \(accept"):
    build_packed(texts * 20, shape, samples.tokenizer.region_id)


@pytest.fixture(scope="module")
def loss(golden):
  """(loss sum and weight as a function of parameters and rows, parameters, config), small."""
  model = published.load(golden / "tiny_videorefer_qwen2")
  of_model = model_loss(VideoRefer(model.config))

  def sums(params, rows):
    found = of_model(params, rows)
    return found.sum, found.weight

  return sums, model.params, model.config


@pytest.fixture(scope="module")
def packed_and_single(samples):
  """The same samples packed, at least three in a row, and one a row."""
  plan = plan_rows(needs_of(samples), 640, sizes=SIZES, scene=16)
  assert max(len(row) for row in plan.rows) >= 3
  packed = PackedSamples([samples], plan, Failures())
  return [collate([rows[i] for i in range(len(rows))]) for rows in (packed, samples)]


def test_the_loss_of_a_packed_row_is_the_sum_of_its_parts(loss, packed_and_single):
  """Parts: videos, images, several objects, text alone."""
  sums, params, cfg = loss
  (total, weight), (parts, count) = (jax.jit(sums)(params, rows) for rows in packed_and_single)
  assert int(weight) == int(count) > 0
  assert_same_up_to_rounding(total, parts, loss_roundings(cfg, ONE.length))


@pytest.mark.slow
def test_the_gradients_of_packed_rows_are_those_of_their_parts(loss, packed_and_single):
  sums, params, cfg = loss
  grad = jax.jit(jax.grad(lambda p, rows: sums(p, rows)[0]))
  packed, single = (grad(params, rows) for rows in packed_and_single)
  whole = max(float(np.abs(b).max()) for b in jax.tree.leaves(single))
  of_single = jax.tree_util.tree_leaves_with_path(single)
  for (path, b), a in zip(of_single, jax.tree.leaves(packed), strict=True):
    # float32 sums in another order
    atol = share(gradient_roundings(cfg, ONE.length)) * float(np.abs(b).max()) + 1e-7
    if jax.tree_util.keystr(path, simple=True, separator="/").endswith("key/bias"):
      atol = 1e-7 * whole  # softmax does not see it: no gradient but the rounding of the others'
    np.testing.assert_allclose(a, b, atol=atol, rtol=0)


def test_a_sample_that_cannot_be_read_leaves_the_others(samples, golden, tmp_path):
  items = json.loads((golden / "data/train.json").read_text())[:3]
  items[1]["video"] = "none.mp4"
  (tmp_path / "f.json").write_text(json.dumps(items))
  broken = Samples(
    RecordFile(tmp_path / "f.json"), samples.tokenizer, ONE, media_root=golden / "media"
  )
  plan = plan_rows(needs_of(broken), 2048, sizes=SIZES, scene=16)
  assert len(plan.rows) == 1
  failures = Failures(max_share=0.5)
  row = PackedSamples([broken], plan, failures)[0]
  order = [i for i in plan.rows[0] if i != 1]
  lengths = [int(samples[i]["valid"].sum()) for i in order]
  assert np.bincount(row["segments"][row["valid"]]).tolist() == lengths
  assert len(failures) == 1
  assert "none.mp4" in failures.messages[0]
  # The same place in another set of the run is another sample.
  _ = PackedSamples([broken], plan, failures, len(items), 2 * len(items))[0]
  assert failures.known() == {1, 1 + len(items)}


def rows_of(dataset, start=0):
  """(row length, tokens of every row, or None where it is empty) of each batch."""

  def tokens(batch):
    pairs = zip(batch["tokens"], batch["valid"], strict=True)
    return [t.tolist() if valid.any() else None for t, valid in pairs]

  return [(b["tokens"].shape[1], tokens(b)) for b in prefetched(dataset, start)]


@pytest.fixture(scope="module")
def buckets(samples):
  needs = needs_of(samples)
  found = make_buckets(needs, (64, 128, 256), sizes=SIZES, scene=16)
  return [BucketSamples([samples], bucket) for bucket in found]


def test_buckets_have_few_shapes_and_every_sample_once(samples, buckets):
  assert 2 <= len(buckets) <= 3
  dataset = make_bucketed_dataset(buckets, batch_size=4, seed=1, epochs=2)
  batches = rows_of(dataset)
  assert len(batches) == 2 * batches_of(buckets, 4)
  assert {length for length, _ in batches} == {b.shape.length for b in buckets}
  half = len(batches) // 2
  wanted = sorted(samples[i]["tokens"][:64].tolist() for i in range(len(samples)))
  for epoch in (batches[:half], batches[half:]):
    seen = [row[:64] for _, rows in epoch for row in rows if row is not None]
    assert sorted(seen) == wanted
  assert batches[:half] != batches[half:]
  for position in (1, half, len(batches) - 1):
    assert rows_of(dataset, position) == batches[position:]


def test_bucketed_batches_do_not_depend_on_the_number_of_processes(buckets):
  def run(count):
    parts = [
      rows_of(
        make_bucketed_dataset(
          buckets, batch_size=8, seed=1, epochs=2, process_index=p, process_count=count
        )
      )
      for p in range(count)
    ]
    return [
      (step[0][0], [row for rows in zip(*(rows for _, rows in step), strict=True) for row in rows])
      for step in zip(*parts, strict=True)
    ]

  assert run(1) == run(2) == run(4) == run(8)


def test_buckets_that_can_not_be_are_refused(buckets):
  needs = mixed_needs(20)
  with pytest.raises(InputError, match="accepted: 1 to 3 row lengths"):
    make_buckets(needs, (1, 2, 3, 4), sizes=SIZES, scene=16)
  with pytest.raises(InputError, match=r"has \d+ slots; accepted: a bucket that holds it"):
    make_buckets(needs, (40,), sizes=SIZES, scene=16)
  with pytest.raises(InputError, match="batch_size=4 is not divisible"):
    make_bucketed_dataset(buckets, batch_size=4, seed=0, process_count=3)


def test_packed_rows_go_through_the_loader_as_single_ones_do(samples):
  plan = plan_rows(needs_of(samples), 384, sizes=SIZES, scene=16)
  packed = PackedSamples([samples], plan, Failures())

  def run(count, start=0):
    parts = [
      make_dataset(
        [packed], batch_size=4, seed=2, drop_remainder=False, epochs=2,
        process_index=p, process_count=count,
      )
      for p in range(count)
    ]  # fmt: skip
    steps = zip(*(prefetched(part, start) for part in parts), strict=True)
    return [np.stack([b["tokens"] for b in step], 1).reshape(4, -1).tolist() for step in steps]

  assert run(1) == run(2) == run(4)
  assert run(2, 1) == run(1)[1:]


def test_one_sample_with_many_frames_does_not_decide_the_shape_of_all_rows(tmp_path):
  needs = mixed_needs(400)
  plain = plan_rows(needs, 1024, sizes=SIZES, scene=16, batch_size=4)
  assert plain.classes == (plain.shape.frames,)
  needs[7] = dataclasses.replace(needs[7], frames=500)
  plan = plan_rows(needs, 1024, sizes=SIZES, scene=16, batch_size=4)
  assert plan.classes[1:] == (504,)
  assert plan.classes[0] < plain.shape.frames + 16
  assert sorted(np.concatenate(plan.rows)) == list(range(400))
  for row, room in zip(plan.rows, plan.frames, strict=True):
    assert sum(needs[i].frames for i in row) <= room
  (large,) = np.flatnonzero(plan.frames == 504)
  assert plan.shape_of([0, 1, -1]).frames == plan.classes[0]
  assert plan.shape_of([0, int(large)]).frames == 504
  kept = [kept_plan(tmp_path / "plan.npz", lambda: plan) for _ in range(2)][1]
  assert kept.shape == plan.shape
  assert (kept.classes, kept.fill) == (plan.classes, plan.fill)
  assert [r.tolist() for r in kept.rows] == [r.tolist() for r in plan.rows]
  assert kept_plan(tmp_path / "plan.npz", lambda: 1 / 0).frames.tolist() == plan.frames.tolist()


@pytest.mark.parametrize(
  ("frames", "batch", "classes"),
  [
    ([17] * 999 + [400], 8, (17, 400)),
    ([17] * 500 + [48] * 500, 8, (48,)),  # nearly every batch holds one of the larger
    ([17] * 9 + [400], 64, (400,)),
    ([0, 0, 0], 2, (1,)),
    ([], 2, (1,)),
  ],
)
def test_frames_of_batches_come_in_two_sizes_where_few_need_many(frames, batch, classes):
  assert frame_classes(np.array(frames, int), len(frames), batch) == classes


def test_needs_are_kept_in_a_file(tmp_path):
  needs = mixed_needs(10)
  path = tmp_path / "needs-1.npy"
  assert read_needs(path) is None
  write_needs(path, needs)
  assert read_needs(path) == needs
  assert [p.name for p in tmp_path.iterdir()] == [path.name]
  path.write_bytes(b"cut")
  assert read_needs(path) is None
  write_needs(tmp_path / "none" / "x.npy", needs)  # a folder that cannot be written: no harm
