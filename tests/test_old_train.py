"""Work directories that older code made are read and continued (see tests/old/train/README.md)."""

import importlib
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from data_pipes.errors import InputError
from vr_jax.checkpoint import load_params
from vr_jax.configs import load_config
from vr_jax.training import loop, task
from vr_jax.training.loop import train
from vr_jax.training.metrics import read_metrics

OLD = Path(__file__).parent / "old" / "train"
CONFIG = str(Path(__file__).parent / "toy_config.py")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
  """The uninterrupted run of the same config, by today's code."""
  workdir = tmp_path_factory.mktemp("straight")
  assert train(load_config(CONFIG), workdir).finished
  return workdir


@pytest.mark.parametrize("moved", [False, True])
def test_a_run_that_older_code_began_ends_as_one_of_today(straight, moved, tmp_path, monkeypatch):
  workdir = tmp_path / "run"
  shutil.copytree(OLD / "half_way", workdir)
  assert [p.name for p in (workdir / "checkpoints").iterdir()] == ["5"]
  if moved:  # as if the task had stood in another module then
    monkeypatch.setitem(task.MOVED, "old_toy_task:make", "toy_task:make")
    file = workdir / "config.json"
    file.write_text(file.read_text().replace("toy_task:make", "old_toy_task:make"))
  result = train(load_config(CONFIG), workdir)
  assert (result.step, result.finished) == (10, True)
  jax.tree.map(np.testing.assert_array_equal, load_params(straight), load_params(workdir))
  ours, theirs = read_metrics(straight), read_metrics(workdir)
  assert [m["step"] for m in theirs] == [m["step"] for m in ours] == list(range(1, 11))
  assert [m["loss"] for m in theirs] == [m["loss"] for m in ours]
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
