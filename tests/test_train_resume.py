"""Runs that are stopped, killed and started again, and work directories of other configs."""

import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
import toy_task
from toy_task import EXAMPLES

from data_pipes.errors import InputError
from vr_jax.checkpoint import StoredParams, export, load_for_inference, load_meta, load_params
from vr_jax.configs import load_config
from vr_jax.hardware import CHIPS
from vr_jax.params import by_path
from vr_jax.training import loop
from vr_jax.training.heartbeat import read_beats
from vr_jax.training.loop import train
from vr_jax.training.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("programs_on_disk")
CONFIG = str(Path(__file__).parent / "toy_config.py")
PARAMETERS = {
  *(f"{name}/{kind}" for name in ("tower", "mlp", "head") for kind in ("kernel", "bias")),
  "table/embedding",
}
STEPS = 10  # two epochs of 80 examples, 16 a step

RUN = """
import sys, jax
jax.config.update("jax_num_cpu_devices", 8)
from vr_jax.configs import load_config
from vr_jax.training.loop import train
train(load_config(sys.argv[1], sys.argv[3:]), sys.argv[2], extend=True)
"""


def run_process(workdir, overrides=(), **environment):
  root = Path(__file__).parent.parent
  path = os.pathsep.join([str(root), str(root / "tests")])
  return subprocess.run(
    [sys.executable, "-c", RUN, CONFIG, str(workdir), *overrides],
    env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"} | environment,
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )


def examples_seen(log):
  """Per epoch, how often each example was trained on: what a batch was last drawn for counts."""
  drawn = dict(json.loads(line) for line in log.read_text().splitlines())
  assert sorted(drawn) == list(range(STEPS))
  order = [number for index in sorted(drawn) for number in drawn[index]]
  return [Counter(order[i : i + EXAMPLES]) for i in range(0, len(order), EXAMPLES)]


def assert_same_params(a, b):
  jax.tree.map(np.testing.assert_array_equal, load_params(a), load_params(b))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("straight")
  assert train(load_config(CONFIG), workdir).finished
  return workdir


def as_an_earlier_version_left_it(workdir):
  """Takes from a stopped run what later versions have added, and gives it a field that is gone."""
  files = [workdir / "config.json"]
  files += (workdir / "checkpoints").glob("*/meta/metadata")
  for file in files:
    content = json.loads(file.read_text())
    config = content.get("config", content)
    del config["ema_decay"], config["max_skipped"], config["input"]["max_empty"]
    config["gone"] = 1
    content.pop("counts", None)
    file.write_text(json.dumps(content))


@pytest.mark.multiprocess
def test_a_killed_moved_and_upgraded_run_ends_as_its_twin_and_sees_every_example_once(
  straight, tmp_path, monkeypatch, caplog
):
  """The twin ran on without a stop, on the rows of the same seed."""
  log = tmp_path / "log"
  first, then = tmp_path / "first", tmp_path / "then"
  # Between two checkpoints, and while the one of step 6 is being written; elsewhere meanwhile.
  for folder, position in ((first, 4), (then, 6)):
    folder.mkdir()
    (folder / "seed").write_text("0")
    if folder is then:
      shutil.move(first / "run", then / "run")
      shutil.rmtree(first)
    killed = run_process(
      folder / "run",
      [f"input.files=('{folder / 'seed'}',)"],
      TOY_LOG=str(log),
      TOY_SIGNAL=f"SIGKILL:{position}",
    )
    assert killed.returncode == -9, killed.stderr
  as_an_earlier_version_left_it(then / "run")
  monkeypatch.setenv("TOY_LOG", str(log))
  config = load_config(CONFIG, [f"input.files=('{then / 'seed'}',)"])
  assert train(config, then / "run").finished
  assert "config.gone=1 is not a field any more" in caplog.text

  assert_same_params(straight, then / "run")
  assert examples_seen(log) == [Counter(range(EXAMPLES))] * 2
  ours, theirs = read_metrics(straight), read_metrics(then / "run")
  assert [m["step"] for m in ours] == [m["step"] for m in theirs] == list(range(1, STEPS + 1))
  assert [m["loss"] for m in ours] == [m["loss"] for m in theirs]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_killed_extended_run_ends_as_its_twin_that_was_extended_at_the_same_step(
  tmp_path, monkeypatch
):
  monkeypatch.setenv("TOY_SIGNAL", "SIGTERM:4")
  assert train(load_config(CONFIG), tmp_path / "twin").step == 5
  monkeypatch.delenv("TOY_SIGNAL")
  shutil.copytree(tmp_path / "twin", tmp_path / "killed")
  longer = ["total_epochs=3.0"]
  assert train(load_config(CONFIG, longer), tmp_path / "twin", extend=True).step == 15
  killed = run_process(tmp_path / "killed", longer, TOY_SIGNAL="SIGKILL:8")
  assert killed.returncode == -9, killed.stderr
  # By the same command, or without --extend: the run has its new length.
  assert train(load_config(CONFIG, longer), tmp_path / "killed").finished
  assert_same_params(tmp_path / "twin", tmp_path / "killed")
  rates = [[line["lr"] for line in read_metrics(tmp_path / name)] for name in ("twin", "killed")]
  assert rates[0] == rates[1]
  assert len(rates[0]) == 15


def test_a_stop_signal_saves_and_the_same_command_goes_on(straight, tmp_path, monkeypatch):
  monkeypatch.setenv("TOY_SIGNAL", "SIGTERM:4")
  stopped = train(load_config(CONFIG), tmp_path)
  assert (stopped.step, stopped.finished) == (5, False)
  assert stopped.metrics["supervised_tokens"] > 0
  assert (tmp_path / "checkpoints" / "5").is_dir()
  monkeypatch.delenv("TOY_SIGNAL")
  assert train(load_config(CONFIG), tmp_path).finished
  assert_same_params(straight, tmp_path)


def test_a_batch_without_a_supervised_token_is_a_counted_step_that_changes_nothing(
  tmp_path, monkeypatch, caplog
):
  monkeypatch.setenv("TOY_EMPTY", "4")
  monkeypatch.setenv("TOY_SIGNAL", "SIGTERM:6")
  assert train(load_config(CONFIG), tmp_path).step == 7
  monkeypatch.delenv("TOY_SIGNAL")
  drawn = toy_task.make(load_config(CONFIG)).names(4, STEPS)
  (line,) = [r.getMessage() for r in caplog.records if "supervised" in r.getMessage()]
  assert line == (
    "step 5: the batch has no supervised token, so there is nothing to learn from; expected "
    f"answers ('gpt' turns) that fit the row length; the batch holds {', '.join(drawn)}; the step "
    "is skipped"
  )
  # The count goes on in the next process, and a second empty batch is more than a tenth of them.
  monkeypatch.setenv("TOY_EMPTY", "8")
  with pytest.raises(
    InputError, match=r"step 9: .* 2 of the 10 batches, accepted: .*max_empty=0\.1"
  ):
    train(load_config(CONFIG), tmp_path)
  lines = read_metrics(tmp_path)
  assert [line["empty_batches"] for line in lines] == [0] * 4 + [1] * 4
  monkeypatch.delenv("TOY_EMPTY")
  assert train(load_config(CONFIG), tmp_path).finished


def test_frozen_weights_are_written_once_and_belong_to_each_checkpoint(straight, tmp_path):
  (name,) = (p.name for p in (straight / "frozen").iterdir())
  step = straight / "checkpoints" / str(STEPS)
  assert load_meta(step)["frozen"] == name
  assert set(by_path(load_params(step))) == {*StoredParams(step).shapes} == PARAMETERS
  assert {*StoredParams(straight / "frozen" / name).shapes} == {"tower/kernel", "tower/bias"}
  shutil.copytree(step, tmp_path / "alone")
  with pytest.raises(InputError, match=r"alone: its frozen weights are not here; accepted: a step"):
    load_params(tmp_path / "alone")
  # A run that an earlier version has begun holds all in each step, and goes on.
  shutil.copytree(straight, tmp_path / "old")
  old = tmp_path / "old" / "checkpoints"
  meta = {key: value for key, value in load_meta(step).items() if key != "frozen"}
  export(tmp_path / "whole", load_params(step), meta)
  for item in ("params", "meta"):
    shutil.rmtree(old / str(STEPS) / item)
    shutil.copytree(tmp_path / "whole" / item, old / str(STEPS) / item)
  shutil.rmtree(tmp_path / "old" / "frozen")
  longer = load_config(CONFIG, ["total_epochs=2.2", "keep_ckpts=2"])
  assert train(longer, tmp_path / "old", extend=True).step == STEPS + 1
  assert [p.name for p in (tmp_path / "old" / "frozen").iterdir()] == [name]
  np.testing.assert_array_equal(
    load_params(tmp_path / "old")["tower"]["kernel"], load_params(step)["tower"]["kernel"]
  )


def test_the_best_checkpoint_stays(tmp_path, caplog):
  caplog.set_level("INFO")
  config = load_config(CONFIG, ["keep_best=('loss', 'max')"])
  assert train(config, tmp_path).finished
  losses = {line["step"]: line["loss"] for line in read_metrics(tmp_path)}
  best = max((3, 6, 9, STEPS), key=losses.get)
  kept = {int(p.name) for p in (tmp_path / "checkpoints").iterdir()}
  assert kept == {best, STEPS}
  assert f"checkpoints/{best}: the best loss is {losses[best]:.6g}" in caplog.text
  # It may be another metric later on; one that is not measured keeps nothing, and is named.
  other = load_config(CONFIG, ["keep_best=('pope/f1', 'max')", "total_epochs=2.2"])
  assert train(other, tmp_path, extend=True).finished
  assert "step 11: keep_best: no pope/f1 was measured at this step" in caplog.text
  for value in (["keep_best=('loss',)"], ["keep_best=('loss', 'low')"]):
    with pytest.raises(InputError, match=r"config.keep_best=.*accepted: \(metric, 'min' or "):
      load_config(CONFIG, value)


def test_a_finished_run_is_left_alone(straight):
  before = sorted(p.name for p in (straight / "checkpoints").iterdir())
  result = train(load_config(CONFIG), straight)
  assert (result.step, result.finished, result.metrics) == (STEPS, True, {})
  assert sorted(p.name for p in (straight / "checkpoints").iterdir()) == before
  assert len(read_metrics(straight)) == STEPS


def test_the_log_tells_what_happened(straight):
  lines = read_metrics(straight)
  assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
  assert lines[-1]["loss"] < lines[0]["loss"]
  assert lines[0]["lr"] == 0  # warm-up
  assert lines[4]["epoch"] == 1.0
  assert {"grad_norm", "supervised_tokens", "seconds", "input_seconds", "rss_gb"} <= set(lines[0])
  assert lines[0]["compile_seconds"] > lines[-1]["compile_seconds"]
  assert max(line["checkpoint_seconds"] for line in lines) > 0
  (beat,) = read_beats(straight / "heartbeat", 1)
  assert beat is not None
  assert list((straight / "tensorboard").glob("events*"))


def test_the_checkpoint_holds_the_resolved_config_and_the_model(straight):
  loaded = load_for_inference(straight)
  assert loaded.model["name"] == "toy"
  assert loaded.config["input"]["batch_size"] == 16
  assert loaded.config["grad_clip_norm"] == 1.0


def test_another_config_is_refused_with_the_keys_that_differ(straight):
  config = load_config(f"{CONFIG}:lr=0.02", ["input.batch_size=8"])
  with pytest.raises(InputError) as error:
    train(config, straight)
  message = str(error.value)
  assert "input.batch_size was 16, is 8" in message
  assert "lr was 0.01, is 0.02" in message
  assert "\n" not in message


def test_another_mesh_may_go_on(straight):
  config = load_config(CONFIG, ["mesh=(('data', 8), ('fsdp', 1))", "log_steps=5"])
  assert train(config, straight).finished


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_goes_on(
  straight, tmp_path, monkeypatch, caplog
):
  monkeypatch.setenv("TOY_SIGNAL", "SIGTERM:7")
  config = load_config(CONFIG, ["keep_ckpts=2"])
  assert train(config, tmp_path).step == 8
  monkeypatch.delenv("TOY_SIGNAL")
  checkpoints = tmp_path / "checkpoints"
  assert sorted(p.name for p in checkpoints.iterdir()) == ["6", "8"]
  (checkpoints / "8" / "data" / "metadata").write_text("{")
  intact = (checkpoints / "6" / "data" / "metadata").read_text()
  (checkpoints / "6" / "data" / "metadata").write_text("{")
  with pytest.raises(InputError, match=r"checkpoints/6.*there is no older one"):
    train(config, tmp_path)
  (checkpoints / "6" / "data" / "metadata").write_text(intact)
  assert train(config, tmp_path).finished
  (line,) = [r.getMessage() for r in caplog.records if "set aside" in r.getMessage()]
  assert str(checkpoints / "8") in line
  assert (checkpoints / "damaged-8").is_dir()
  assert_same_params(straight, tmp_path)


def test_running_mean_trace_and_rates(straight, tmp_path, monkeypatch):
  make = toy_task.make
  monkeypatch.setattr(
    toy_task, "make", lambda c: dataclasses.replace(make(c), work=lambda rows: (100, 3 * 10**12))
  )
  monkeypatch.setattr(loop, "chip_of", lambda device: CHIPS["v5e"])
  config = load_config(CONFIG, ["ema_decay=0.5", "profile_steps=(2, 3)"])
  assert train(config, tmp_path).finished
  assert_same_params(straight, tmp_path)  # the mean changes nothing in the training
  mean, last = load_params(tmp_path / "ema"), load_params(tmp_path)
  np.testing.assert_array_equal(mean["tower"]["kernel"], last["tower"]["kernel"])  # frozen
  distance = np.abs(mean["head"]["kernel"] - last["head"]["kernel"]).max()
  assert 0 < distance < 0.1
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))
  for line in read_metrics(tmp_path):
    np.testing.assert_allclose(line["tokens_per_second"] * line["seconds"], 100)
    np.testing.assert_allclose(line["mfu"] * line["seconds"] * 8 * 197, 3)
  assert train(config, tmp_path).finished  # with what is there


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    (["total_epochs=None"], "set one of total_steps, total_examples, total_epochs"),
    (["total_steps=3"], "config: set only one of total_steps, total_epochs"),
    (["task=toy_task:mke"], "config.task='toy_task:mke': .*no attribute 'mke'"),
    (["task=videorefr"], "accepted: videorefer, or module:function"),
    (["mesh=(('data', 3),)"], "data=3 does not fit 8 devices"),
    (["input.accum_steps=3"], "batch_size=16 is not divisible .*accum_steps=3 x .* 8; use 24"),
    (["input.accum_steps=4"], "batch_size=16 is not divisible .*accum_steps=4 x .* 8; use 32"),
    (["schedule.0.0=towr/.*"], "schedule: rule 'towr.*' matches no parameter"),
  ],
)
def test_a_config_that_does_not_fit_writes_nothing(tmp_path, overrides, message):
  with pytest.raises(InputError, match=message):
    train(load_config(CONFIG, overrides), tmp_path / "run")
  assert not (tmp_path / "run" / "config.json").exists()


def test_a_work_directory_that_cannot_be_written_is_refused(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(InputError, match="cannot be written: Not a directory"):
    train(load_config(CONFIG), tmp_path / "file" / "run")


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(straight, tmp_path, monkeypatch):
  """No file may grow beyond a limit that checkpoints pass, as on a disk that is full."""
  monkeypatch.setenv("TOY_SIGNAL", "SIGTERM:2")
  assert train(load_config(CONFIG), tmp_path).step == 3
  monkeypatch.delenv("TOY_SIGNAL")
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
  try:
    with pytest.raises(InputError, match="could not be saved: File too large; those before") as e:
      train(load_config(CONFIG), tmp_path)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  assert "\n" not in str(e.value)
  assert train(load_config(CONFIG), tmp_path).finished
  assert_same_params(straight, tmp_path)


@pytest.mark.wandb
def test_metrics_go_to_weights_and_biases_and_a_resumed_run_is_the_same_one(tmp_path, monkeypatch):
  monkeypatch.setenv("WANDB_MODE", "offline")
  monkeypatch.setenv("TOY_SIGNAL", "SIGTERM:4")
  config = load_config(CONFIG, ["config.wandb=toy"])
  assert not train(config, tmp_path).finished
  monkeypatch.delenv("TOY_SIGNAL")
  assert train(config, tmp_path).finished
  name = (tmp_path / "wandb_id").read_text()
  runs = list((tmp_path / "wandb").glob(f"offline-run-*-{name}"))
  assert len(runs) == 2  # parts of one run
  assert all(list(run.glob("*.wandb")) for run in runs)


def test_weights_and_biases_that_is_not_there_is_said(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(InputError, match=r"config.wandb='toy': wandb is not installed; pip install"):
    train(load_config(CONFIG, ["config.wandb=toy"]), tmp_path)


def test_an_unknown_field_is_refused(tmp_path):
  config = load_config(CONFIG).unlock()
  config.learning_rate = 1.0
  with pytest.raises(InputError, match=r"config.learning_rate is not known"):
    train(config.lock(), tmp_path)
