"""The data position is one integer; global batches do not depend on the number of processes."""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data_pipes.batch import RowShape, place
from data_pipes.clips import choose_mask_frames
from data_pipes.errors import InputError
from data_pipes.failures import Failures
from data_pipes.loader import make_dataset, prefetched
from data_pipes.prompts import IGNORE, Text
from data_pipes.records import RecordFile, parse_record
from data_pipes.samples import RowRules, RowSource, Samples, record_needs
from data_pipes.tokenizer import Tokenizer

SHAPE = RowShape(
  frames=1, scene=1, objects=1, object_frames=1, length=4, image_size=2, grid=1,
  tokens_per_object=1, scene_tokens=1,
)  # fmt: skip


class Numbered(RowSource):
  """Stands for Samples: row i holds the number `first + i`; those in `broken` cannot be read."""

  shape = SHAPE

  def __init__(self, count, first=0, broken=()):
    self.count, self.first, self.broken = count, first, broken

  def __len__(self):
    return self.count

  def fill(self, row, index):
    ids = np.array([self.first + index], np.int32)
    row["frames"][:] = 1
    place(row, Text(ids, ids), None, SHAPE, region_id=-1)
    if index in self.broken:
      raise InputError(f"item {index}: found nothing")

  def names(self, index):
    return [f"item {index}"]


def _numbers(batch):
  """The sample of each row; None for an empty row."""
  return [
    int(t[0]) if v.any() else None for t, v in zip(batch["tokens"], batch["valid"], strict=True)
  ]


def _all(dataset, start=0):
  return [_numbers(batch) for batch in prefetched(dataset, start)]


def _rows(dataset):
  return [row for batch in _all(dataset) for row in batch]


OPTIONS = {"batch_size": 4, "seed": 3, "drop_remainder": False}


def test_epochs_of_neighbouring_seeds_are_not_each_other():
  def epochs(seed, rule):
    options = {**OPTIONS, "seed": seed, "epoch_seeds": rule}
    rows = _rows(make_dataset([Numbered(40)], epochs=2, **options))
    return rows[:40], rows[40:]

  first, second = (epochs(seed, "consecutive") for seed in (42, 43))
  assert first[1] == second[0]  # what a run that began by this rule goes on with
  orders = [order for seed in (42, 43, 44) for order in epochs(seed, "spread")]
  assert len({tuple(order) for order in orders}) == 6


def test_every_sample_once_an_epoch_in_another_order():
  epochs = _rows(make_dataset([Numbered(10)], epochs=2, **OPTIONS))
  assert len(epochs) == 20
  assert sorted(epochs[:10]) == sorted(epochs[10:]) == list(range(10))
  assert epochs[:10] != epochs[10:]
  assert epochs[:10] != list(range(10))
  assert epochs == _rows(make_dataset([Numbered(10)], epochs=2, **OPTIONS))
  other = make_dataset([Numbered(10)], epochs=2, **{**OPTIONS, "seed": 4})
  assert epochs != _rows(other)


class Large(Numbered):
  """Batches of a megabyte a row."""

  shape = dataclasses.replace(SHAPE, image_size=592)


def test_what_is_read_ahead_is_counted_in_bytes():
  """Of large batches one is made while another is used; the order is the same."""
  begun = []
  dataset = make_dataset([Large(24)], batch_size=2, seed=0, drop_remainder=False)
  counted = dataset.map(lambda batch: begun.append(1) or batch)
  size = sum(a.nbytes for a in dataset[0].values())
  for room, ahead in ((1, 2), (2 * size + 9, 3), (1 << 30, 5)):
    begun.clear()
    batches = prefetched(counted, threads=2, buffer_bytes=room)
    assert _numbers(next(batches)) == _numbers(dataset[0])
    deadline = time.monotonic() + 20
    while len(begun) < ahead and time.monotonic() < deadline:
      time.sleep(0.01)
    time.sleep(0.05)
    assert len(begun) == ahead
    assert [_numbers(b) for b in batches] == [_numbers(dataset[i]) for i in range(1, 12)]


def test_files_in_their_own_order():
  batches = _all(make_dataset([Numbered(3), Numbered(3, 100)], shuffle=False, **OPTIONS))
  assert batches == [[0, 1, 2, 100], [101, 102, None, None]]


def test_the_remainder_is_dropped_or_filled_with_empty_rows():
  filled = _all(make_dataset([Numbered(10)], **OPTIONS))
  dropped = _all(make_dataset([Numbered(10)], **{**OPTIONS, "drop_remainder": True}))
  assert filled[:2] == dropped
  assert filled[2][2:] == [None, None]
  assert sorted([*filled[0], *filled[1], *filled[2][:2]]) == list(range(10))


@pytest.mark.parametrize("weights", [None, [3, 1]])
@pytest.mark.parametrize("drop", [True, False])
def test_global_batches_do_not_depend_on_the_number_of_processes(weights, drop):
  def run(count):
    parts = [
      _all(
        make_dataset(
          [Numbered(13), Numbered(9, 100)], epochs=2, batch_size=4, seed=3, drop_remainder=drop,
          weights=weights, process_index=p, process_count=count,
        )
      )
      for p in range(count)
    ]  # fmt: skip
    # Rows of process p are the global rows p, p + count, ...
    return [
      [row for rows in zip(*step, strict=True) for row in rows] for step in zip(*parts, strict=True)
    ]

  assert run(1) == run(2) == run(4)


def test_any_position_continues_the_run():
  dataset = make_dataset([Numbered(10)], epochs=3, **OPTIONS)
  straight = _all(dataset)
  assert len(straight) == len(dataset) == 8
  for position in range(len(straight) + 1):
    assert _all(dataset, position) == straight[position:]


def test_position_survives_a_change_of_process_count():
  def run(count, start):
    options = {**OPTIONS, "epochs": 2, "process_count": count}
    parts = [make_dataset([Numbered(12)], process_index=p, **options) for p in range(count)]
    steps = zip(*(_all(part, start) for part in parts), strict=True)
    return [[row for rows in zip(*step, strict=True) for row in rows] for step in steps]

  assert run(2, 0)[:2] + run(4, 2) == run(1, 0)


def test_endless_epochs():
  dataset = make_dataset([Numbered(3)], epochs=None, **OPTIONS)
  batches = prefetched(dataset, 3 * 10**6)
  seen = [row for _ in range(3) for row in _numbers(next(batches))]
  assert sorted(seen) == [0] * 4 + [1] * 4 + [2] * 4


def test_weights_are_shares():
  dataset = make_dataset([Numbered(30), Numbered(100, 100)], weights=[3, 1], **OPTIONS)
  rows = [n for n in _rows(dataset) if n is not None]
  assert len(rows) == 40  # ends with the set that runs out first
  assert sum(n < 100 for n in rows) == 30
  assert len(set(rows)) == 40


def test_unreadable_samples_are_counted_and_never_swapped(caplog):
  told = []
  failures = Failures(max_share=0.2, report=told.append)
  samples = [Numbered(5), Numbered(5, 100, broken=(1, 3))]
  dataset = make_dataset(samples, epochs=2, failures=failures, **OPTIONS)
  rows = _rows(dataset)
  # Both epochs hold the other 8 samples once, and an empty row in place of each broken one.
  assert rows.count(None) == 4
  assert sorted(n for n in rows if n is not None) == sorted([0, 1, 2, 3, 4, 100, 102, 104] * 2)
  assert len(failures) == 2
  assert sorted(failures.messages) == ["item 1: found nothing", "item 3: found nothing"]
  assert sorted(told) == sorted(failures.messages)
  assert all(any(line in r.getMessage() for r in caplog.records) for line in told)


def test_too_many_unreadable_samples_end_the_run():
  samples = [Numbered(10, broken=(1, 3))]
  dataset = make_dataset(samples, failures=Failures(max_share=0.1), **OPTIONS)
  with pytest.raises(InputError, match=r"2 of 10 samples could not be read.*0\.1; the last: item"):
    _all(dataset)
  with pytest.raises(InputError, match=r"\d of 10 samples could not be read") as caught:
    _all(make_dataset(samples, **OPTIONS))
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"process_count": 3}, r"batch_size=4 is not divisible by the number of processes \(3\)"),
    ({"samples": []}, "found 0 sets of no samples"),
    ({"samples": [Numbered(3), Numbered(0)]}, "2 sets of 3, 0 samples"),
    (
      {"samples": [Numbered(3)], "drop_remainder": True},
      "batch_size=4 is more than the samples of the run",
    ),
  ],
)
def test_runs_that_can_not_be_are_refused(changes, message):
  options = {"samples": [Numbered(8)], **OPTIONS, **changes}
  with pytest.raises(InputError, match=message):
    make_dataset(options.pop("samples"), **options)


OBJECTS = [{4: None, 2: "a", 9: "b"}, dict.fromkeys(range(40), "m"), {1: None}]


def test_single_mode_takes_one_frame_where_the_object_is_seen():
  assert choose_mask_frames(OBJECTS, single=True) == [{2: "a"}, {0: "m"}, {1: None}]
  last = choose_mask_frames(OBJECTS, single=True, draw=lambda count: count - 1)
  assert last == [{9: "b"}, {39: "m"}, {1: None}]


def test_multi_mode_takes_all_frames_up_to_a_limit():
  chosen = choose_mask_frames(OBJECTS, single=False)
  assert chosen[0] == OBJECTS[0]
  assert list(chosen[1]) == [int(i * 40 / 32) for i in range(32)]


def _record(objects):
  regions = " and ".join(["<region>"] * len(objects))
  item = {
    "video": "v.mp4",
    "conversations": [
      {"from": "human", "value": f"<video>\n{regions}?"},
      {"from": "gpt", "value": "Yes."},
    ],
    "masks": objects,
  }
  return parse_record(item, "f: item 0")


def test_half_mode_is_half_of_the_rows_and_always_the_same():
  record = _record([{str(n): None for n in range(5)}])
  rules = RowRules(masks="half", seed=1)
  counts = [len(rules.objects(record, i)[0]) for i in range(400)]
  assert set(counts) == {1, 5}
  assert 160 < counts.count(1) < 240
  assert counts == [len(rules.objects(record, i)[0]) for i in range(400)]
  assert counts != [len(RowRules(masks="half", seed=2).objects(record, i)[0]) for i in range(400)]


def test_random_single_frames_differ_between_rows_and_objects():
  record = _record([{str(n): None for n in range(30)}] * 2)
  rules = RowRules(masks="single", single_frame="random")
  drawn = [[next(iter(o)) for o in rules.objects(record, i)] for i in range(50)]
  assert drawn == [[next(iter(o)) for o in rules.objects(record, i)] for i in range(50)]
  assert len({first for first, _ in drawn}) > 15
  assert sum(first == second for first, second in drawn) < 10


def test_rules_are_checked():
  with pytest.raises(InputError, match="masks='double'; accepted: single, multi, half"):
    RowRules(masks="double")
  with pytest.raises(InputError, match="single_frame='last'; accepted: first, random"):
    RowRules(single_frame="last")


@pytest.fixture(scope="module")
def tokenizer(golden):
  return Tokenizer.from_folder(golden / "tiny_videorefer_qwen2")


REAL = RowShape(
  frames=23, scene=16, objects=4, object_frames=7, length=192, image_size=56, grid=4,
  tokens_per_object=4, scene_tokens=32,
)  # fmt: skip


def test_published_json_is_trained_on_directly(golden, tokenizer):
  file = RecordFile(golden / "data/train.json")
  samples = Samples(file, tokenizer, REAL, media_root=golden / "media")
  dataset = make_dataset([samples], batch_size=4, seed=0, drop_remainder=True)
  batches = list(prefetched(dataset))
  assert [batch["frames"].shape for batch in batches] == [(4, 23, 56, 56, 3)] * 2
  assert sum(batch["supervised"].sum() for batch in batches) == 156
  # The bound that needs no media is one: no record takes more.
  for i, record in enumerate(file):
    need = record_needs(record, i, tokenizer, 16, samples.rules)
    assert need.frames <= REAL.frames
    slots = need.length(REAL.tokens_per_object, REAL.scene_tokens)
    assert samples[i]["valid"].sum() == slots


def test_plain_text_of_stage_one(golden, tokenizer):
  file = RecordFile(golden / "data/train.json")
  rules = RowRules(templated=False)
  row = Samples(file, tokenizer, REAL, media_root=golden / "media", rules=rules)[3]
  published = json.loads((golden / "json/prompts.json").read_text())["train_preprocess"][3]["plain"]
  kept = row["visual"] < 0
  kept &= row["valid"]
  ids = [i for i in published["input_ids"] if i >= 0]
  assert row["tokens"][kept].tolist() == ids
  assert row["supervised"].sum() == sum(label != IGNORE for label in published["labels"])


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"video": "none.mp4"}, "none.mp4"),
    ({"annotation": [{"12": {"segmentation": None}}]}, "found frame 12; accepted: 0 to 11, the fr"),
    (
      {"annotation": [{"3": {"segmentation": {"size": [2, 2], "counts": [4]}}}]},
      "object 0, frame 3: found a mask of 2x2; accepted: the size of the frame, 48x64",
    ),
    ({"annotation": []}, "found 1 <region> after <video> but 0 annotated objects"),
  ],
)
def test_defects_of_media_name_file_and_item(golden, tokenizer, tmp_path, change, message):
  items = json.loads((golden / "data/train.json").read_text())[:2]
  items[0].update(change)
  (tmp_path / "d.json").write_text(json.dumps(items))
  file = RecordFile(tmp_path / "d.json")
  samples = Samples(file, tokenizer, REAL, media_root=golden / "media")
  failures = Failures(max_share=0.5)
  options = {"batch_size": 2, "seed": 0, "drop_remainder": True, "shuffle": False}
  (batch,) = prefetched(make_dataset([samples], failures=failures, **options))
  assert batch["valid"].any(1).tolist() == [False, True]
  assert batch["supervised"].any(1).tolist() == [False, True]
  assert message in failures.messages[0]
  assert failures.messages[0].startswith(f"{tmp_path / 'd.json'}: item 0 (id 0): ")
  assert "\n" not in failures.messages[0]


def test_decoding_needs_no_jax():
  """Grain itself imports jax where it is installed; what a decoding worker needs does not."""
  code = "import sys, data_pipes.samples; assert 'jax' not in sys.modules, 'jax'"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr


def test_threads_need_no_parsed_flags():
  code = (
    f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}]; import test_loader as t; "
    "print(t._rows(t.make_dataset([t.Numbered(8)], **t.OPTIONS)))"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert sorted(json.loads(done.stdout)) == list(range(8))
