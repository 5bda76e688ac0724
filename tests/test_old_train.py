"""Work directories that older code made are read and continued (see tests/old/train/README.md)."""

import importlib
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from rounding import share
from toy import LENGTH, VOCABULARY, ToyModel

from data_pipes.errors import InputError
from vr_jax.checkpoint import load_params
from vr_jax.configs import load_config
from vr_jax.training import loop, task
from vr_jax.training.loop import train
from vr_jax.training.metrics import read_metrics

OLD = Path(__file__).parent / "old" / "train"
WIDTH = ToyModel.width
CONFIG = str(Path(__file__).parent / "toy_config.py")


# The older run's five steps were made on another processor, so its parameters are today's up to
# rounding. Adam divides each gradient by its own size: a rounding of `share` of the largest one
# is share / r of one r times as small, at most 2. Over gradients of all sizes that is a norm of
# sqrt(mean of min(share / r, 2)^2) = 2 sqrt(share) of the update. Lost moments, another rate or
# another example change a tenth of it and more.
LARGEST = 2 * share(2 * (LENGTH + 3 * WIDTH + VOCABULARY)) ** 0.5


def run(workdir, monkeypatch):
  """Trains to the end; the examples of each batch that it drew."""
  monkeypatch.setenv("TOY_LOG", str(workdir.with_suffix(".log")))
  result = train(load_config(CONFIG), workdir)
  assert (result.step, result.finished) == (10, True)
  return [json.loads(line) for line in workdir.with_suffix(".log").read_text().splitlines()]


def distance(a, b):
  """The norm of the difference of two parameter trees."""
  return float(optax.global_norm(jax.tree.map(np.subtract, a, b)))


@pytest.mark.parametrize("moved", [False, True])
def test_a_run_that_older_code_began_ends_as_one_of_today(moved, tmp_path, monkeypatch):
  straight, workdir = tmp_path / "straight", tmp_path / "run"
  batches = run(straight, monkeypatch)
  shutil.copytree(OLD / "half_way", workdir)
  assert [p.name for p in (workdir / "checkpoints").iterdir()] == ["5"]
  half_way = load_params(workdir)
  if moved:  # as if the task had stood in another module then
    monkeypatch.setitem(task.MOVED, "old_toy_task:make", "toy_task:make")
    file = workdir / "config.json"
    file.write_text(file.read_text().replace("toy_task:make", "old_toy_task:make"))
  assert run(workdir, monkeypatch) == batches[5:]
  end, expected = load_params(workdir), load_params(straight)
  assert distance(end, expected) <= LARGEST * distance(expected, half_way)
  ours, theirs = read_metrics(straight), read_metrics(workdir)
  assert [m["step"] for m in theirs] == [m["step"] for m in ours] == list(range(1, 11))
  np.testing.assert_allclose([m["loss"] for m in theirs], [m["loss"] for m in ours], rtol=LARGEST)
  assert json.loads((workdir / "config.json").read_text())["task"] == "toy_task:make"


def test_tasks_that_have_moved_are_found_by_their_old_names():
  for old, new in task.MOVED.items():
    assert old != new
    module, _, function = task.task_name(old).partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_a_work_directory_names_the_task_as_it_was_called(tmp_path):
  (tmp_path / "checkpoints" / "500").mkdir(parents=True)
  shutil.copy(OLD / "mini_tower.json", tmp_path / "config.json")
  loop._check_workdir(tmp_path, load_config("mini_tower"))
  with pytest.raises(InputError, match=r"task was .vr_jax\.training\.pretrain_tower:tower_task"):
    loop._check_workdir(tmp_path, load_config("mini_decoder"))
