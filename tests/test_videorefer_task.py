"""VideoRefer trained from annotation files: the whole way from JSON and videos to a checkpoint."""

import json
import logging
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest

from data_pipes.errors import InputError
from data_pipes.failures import Failures, TooManyFailures
from vr_jax.checkpoint import export, load_for_inference, make_meta, read_tokenizer_files
from vr_jax.configs import base_config, to_json
from vr_jax.interop import videorefer as published
from vr_jax.models.costs import training_flops
from vr_jax.models.videorefer import VideoReferConfig
from vr_jax.training import videorefer_task as videorefer_task_module
from vr_jax.training.metrics import read_metrics
from vr_jax.training.task import PLAN
from vr_jax.training.videorefer_task import videorefer_task, work_of

RUN = """
import sys
from pathlib import Path
from vr_jax.configs import from_json
from vr_jax.training.loop import train
train(from_json(Path(sys.argv[1]).read_text()), sys.argv[2])
"""


@pytest.fixture(scope="module")
def model(golden, tmp_path_factory):
  """The tiny published model as a checkpoint of ours."""
  folder = golden / "tiny_videorefer_qwen2"
  loaded = published.load(folder)
  path = tmp_path_factory.mktemp("model") / "checkpoint"
  export(path, loaded.params, make_meta(loaded.config.to_dict(), read_tokenizer_files(folder)))
  return path


@pytest.fixture
def config_of(golden, model, tmp_path):
  """Makes a config on some of the golden records, by number; more records may be added."""
  records = json.loads((golden / "data" / "train.json").read_text())

  def make(numbers, more=(), **fields):
    file = tmp_path / "data.json"
    file.write_text(json.dumps([*(records[i] for i in numbers), *more]))
    config = base_config()
    config.model_init = (("", str(model)),)
    config.input.files = (str(file),)
    config.input.media = str(golden / "media")
    config.input.batch_size = 8
    config.total_epochs = 1.0
    config.log_steps = 1
    config.schedule = (("(img|llm)/.*", None), (".*", {"decay": "constant"}))
    config.update(fields)
    return config

  return make


@pytest.mark.slow  # test_parity_training repeats published runs
@pytest.mark.multiprocess
def test_the_first_loss_is_the_published_one_and_the_checkpoint_answers_for_itself(
  config_of, golden, model, tmp_path
):
  # Two records fill a batch of eight together with empty rows. On one device, which compiles in
  # a tenth of the time of eight.
  file = tmp_path / "config.json"
  file.write_text(to_json(config_of([0, 1])))
  run = subprocess.run(
    [sys.executable, "-c", RUN, str(file), str(tmp_path / "run")],
    env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    check=False,
  )
  assert run.returncode == 0, run.stderr
  (line,) = read_metrics(tmp_path / "run")
  cases = json.loads((golden / "cases.json").read_text())
  stage = next(s for s in cases["stages"] if s["stage"] == "06_gradients")
  pair = next(c for c in stage["cases"] if c["id"] == "b_pair")
  np.testing.assert_allclose(line["loss"], pair["meta"]["loss"], atol=2e-5)
  assert line["unreadable"] == 0
  assert line["tokens_per_second"] > 0
  assert "mfu" not in line  # of a CPU the peak is not known

  before, after = load_for_inference(model), load_for_inference(tmp_path / "run")
  assert VideoReferConfig.from_dict(after.model) == VideoReferConfig.from_dict(before.model)
  assert after.tokenizer_files == before.tokenizer_files
  assert after.config["input"]["batch_size"] == 8
  for part in ("img", "llm", "connector", "region"):
    same = jax.tree.map(
      lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()),
      before.params[part],
      after.params[part],
    )
    assert all(jax.tree.leaves(same)) == (part in ("img", "llm")), part


def test_the_work_of_rows_is_that_of_their_samples(config_of):
  """An image, a video and text alone, each in a row of its own, and all in one packed row."""
  config = config_of([0, 1])
  task = videorefer_task(config)
  rows = next(task.batches(0, 1))
  cfg = VideoReferConfig.from_dict(task.model)
  tokens, flops = work_of(rows, cfg, ("connector", "region"))
  assert tokens == rows["valid"].sum()
  want = 0
  for b in range(len(rows["valid"])):
    if slots := int(rows["valid"][b].sum()):
      frames = 1 + max(rows["scene"][b].max(), rows["region_frames"][b].max())
      scene = 1 if rows["scene"][b].max() == 0 else cfg.num_frames
      supervised = int(rows["supervised"][b].sum())
      sizes = (int(frames), slots, supervised, scene)
      want += training_flops(cfg, ("connector", "region"), *sizes)
  assert flops == want > 0

  packed = videorefer_task(config_of([0, 1], input={"pack": 256}))
  rows = next(packed.batches(0, 1))
  assert set(np.unique(rows["segments"])) == {-1, 0, 1}
  assert work_of(rows, cfg, ("connector", "region")) == (tokens, flops)


LOST = {
  "id": "lost",
  "video": "not_there.mp4",
  "conversations": [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "No."}],
}


def test_an_unreadable_sample_is_counted_and_named(config_of, caplog):
  config = config_of([0, 1], [LOST])
  config.input.max_unreadable = 0.5
  task = videorefer_task(config)
  with caplog.at_level(logging.WARNING):
    (rows,) = task.batches(0, 1)
  assert rows["tokens"].shape[0] == 8
  assert (rows["valid"].any(axis=1)).sum() == 2
  assert task.counts() == {"unreadable": 1}
  assert "data.json: item 2" in caplog.text
  assert "not_there.mp4" in caplog.text


def test_too_many_unreadable_samples_end_the_run(config_of):
  task = videorefer_task(config_of([0, 1], [LOST]))
  with pytest.raises(InputError, match=r"1 of 3 samples could not be read.*not_there.mp4"):
    list(task.batches(0, 1))


def test_a_task_knows_its_files_by_their_content(config_of):
  config = config_of([0, 1, 2])
  (file,) = map(Path, config.input.files)
  before = videorefer_task(config).data
  file.write_text(json.dumps(json.loads(file.read_text())[:2]))
  after = videorefer_task(config).data
  assert [*before] == [*after] == ["input.files[0]"]
  assert before != after


def test_failures_of_other_processes_and_of_before_count(caplog):
  failures = Failures(max_share=0.5)
  failures.add_known([3, 4])
  failures.add(3, "again", 4)
  assert len(failures) == 2
  with pytest.raises(TooManyFailures, match="3 of 4 samples"):
    failures.add(5, "one more", 4)


def test_whole_epochs_end_with_them_and_empty_rows_fill_up(config_of):
  config = config_of(range(3), total_epochs=2.0)
  config.input.batch_size = 4
  batches = list(videorefer_task(config).batches(0, 2))
  assert [int(b["valid"].any(axis=1).sum()) for b in batches] == [4, 2]


def test_shares_are_drawn_for_as_long_as_the_run_goes(config_of):
  config = config_of(range(3))
  config.total_epochs = None
  config.total_steps = 5
  config.input.batch_size = 4
  config.input.files = config.input.files * 2
  config.input.weights = (0.9, 0.1)
  batches = list(videorefer_task(config).batches(0, 5))
  assert [int(b["valid"].any(axis=1).sum()) for b in batches] == [4] * 5


def test_batches_go_on_from_any_position(config_of):
  config = config_of(range(8), total_epochs=3.0)
  config.input.batch_size = 4
  task = videorefer_task(config)
  all_of_them = list(task.batches(0, 6))
  rest = list(task.batches(4, 6))
  assert len(all_of_them) == 6
  for a, b in zip(all_of_them[4:], rest, strict=True):
    jax.tree.map(np.testing.assert_array_equal, a, b)
  epochs = [np.concatenate([b["tokens"] for b in all_of_them[i : i + 2]]) for i in (0, 2, 4)]
  assert (np.sort(epochs[0], axis=0) == np.sort(epochs[1], axis=0)).all()
  assert (epochs[0] != epochs[1]).any()


def test_which_samples_share_rows_is_part_of_the_data(config_of, monkeypatch):
  config = config_of(range(6), input={"pack": 512})
  plan = videorefer_task(config).data[PLAN]
  assert plan == videorefer_task(config).data[PLAN]
  needs = videorefer_task_module.all_needs
  monkeypatch.setattr(videorefer_task_module, "all_needs", lambda *args: needs(*args)[::-1])
  other = videorefer_task(config).data  # as by another version, or needs of a cache that is wrong
  assert other.pop(PLAN) != plan
  assert other == videorefer_task(config_of(range(6))).data


@pytest.mark.parametrize("layout", [{}, {"pack": 512}, {"buckets": (256, 512)}])
def test_the_samples_of_a_batch_have_names(config_of, layout):
  """Each batch's names are of the records whose answers it holds."""
  config = config_of(range(6), total_epochs=2.0, input=layout)
  config.input.batch_size = 2
  task = videorefer_task(config)
  steps = 2 * task.data_size // 2
  held = Counter()
  for position, batch in enumerate(task.batches(0, steps)):
    names = task.names(position, steps)
    samples = sum(
      len(set(row[row >= 0])) if "segments" in batch else int(valid.any())
      for row, valid in zip(batch.get("segments", batch["valid"]), batch["valid"], strict=True)
    )
    assert len(names) == samples
    held.update(names)
  file = config.input.files[0]
  assert held == {f"{file}: item {i} (id {i})": 2 for i in range(6)}


def test_the_row_shape_fits_the_largest_record_or_is_given(config_of):
  rows = next(videorefer_task(config_of([0])).batches(0, 1))
  assert rows["region_frames"].shape[1:] == (1, 1)
  config = config_of([0])
  config.input.update(row_frames=24, row_objects=3, row_object_frames=5, row_length=200)
  rows = next(videorefer_task(config).batches(0, 1))
  assert rows["frames"].shape[1] == 24
  assert rows["region_frames"].shape[1:] == (3, 5)
  assert rows["tokens"].shape[1] == 200


@pytest.mark.parametrize("layout", [{}, {"pack": 512}, {"buckets": (256, 512)}])
def test_what_a_set_needs_is_computed_once_wherever_it_lies(
  config_of, layout, monkeypatch, tmp_path
):
  config = config_of([0, 1, 2], input=layout)
  config.input.batch_size = 1
  batches = list(videorefer_task(config).batches(0, 2))
  monkeypatch.setattr(videorefer_task_module, "record_needs", lambda *args: 1 / 0)
  monkeypatch.setattr(videorefer_task_module, "plan_rows", lambda *args, **options: 1 / 0)
  moved = tmp_path / "moved.json"
  Path(config.input.files[0]).rename(moved)
  config.input.files = (str(moved),)
  for batch, again in zip(batches, videorefer_task(config).batches(0, 2), strict=True):
    np.testing.assert_array_equal(batch["tokens"], again["tokens"])
  moved.write_text(moved.read_text() + "\n")
  with pytest.raises(ZeroDivisionError):
    videorefer_task(config)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"input": {"files": ()}}, "config.input.files is empty"),
    ({"input": {"files": ("nowhere.json",)}}, "nowhere.json"),
    ({"input": {"masks": "some"}}, "masks='some'; accepted: single, multi, half"),
    ({"model": (("llm.vocab_size", 900),)}, "the tokenizer has 1004 ids, .*vocabulary 900"),
  ],
)
def test_what_does_not_fit_is_said(config_of, fields, message):
  with pytest.raises(InputError, match=message):
    videorefer_task(config_of([0], **fields))
