"""Runs of several real processes on this machine, started as launch/local.sh starts them."""

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from test_prepare import prepare
from toy_task import EXAMPLES

from data_pipes.errors import InputError
from vr_jax.checkpoint import export, load_params, make_meta, read_tokenizer_files
from vr_jax.configs import load_config
from vr_jax.interop import videorefer as published
from vr_jax.training import processes
from vr_jax.training.loop import train
from vr_jax.training.metrics import read_metrics
from vr_jax.training.processes import coordinator, differences

TESTS = Path(__file__).parent
CONFIG = str(TESTS / "toy_config.py")
STEPS = 10
BATCH = 16
EPOCHS = 3  # of shards_config.py


def test_found_reads_the_environment():
  plain = {"VR_COORDINATOR": "10.0.0.1:80", "VR_PROCESSES": "4", "VR_PROCESS": "3"}
  assert coordinator({}) is None
  assert coordinator(plain) == {
    "coordinator_address": "10.0.0.1:80",
    "num_processes": 4,
    "process_id": 3,
  }
  assert coordinator(plain | {"VR_PROCESSES": "1", "VR_PROCESS": "0"}) is None
  assert coordinator({"VR_COORDINATOR": "auto", "VR_PROCESSES": ""}) == {}
  # A step of `srun`, a shell in an allocation, a pod of two hosts, a single TPU host.
  assert coordinator({"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}) == {}
  assert coordinator({"SLURM_NTASKS": "2"}) is None
  assert coordinator({"TPU_WORKER_HOSTNAMES": "a,b"}) == {}
  assert coordinator({"TPU_WORKER_HOSTNAMES": "localhost"}) is None


STEP = {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "8"}
STEP |= {"SLURM_JOB_ID": "4099", "SLURM_STEP_NODELIST": "gpu[007-014]", "SLURM_PROCID": "3"}
STEP |= {"SLURM_LOCALID": "0"}


@pytest.mark.parametrize("extra", [{}, {"VR_COORDINATOR": "auto"}, {"VR_COORDINATOR": "h:80"}])
def test_a_process_of_a_slurm_step_drives_all_gpus_of_its_node(extra, monkeypatch):
  """JAX's own detection would restrict it to the GPU of its local number."""
  if extra.get("VR_COORDINATOR") == "h:80":
    extra = extra | {"VR_PROCESSES": "8", "VR_PROCESS": "3"}
  made = {}
  monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: made.update(arguments))
  processes.join(STEP | extra)
  assert made["coordinator_address"] == ("h:80" if "VR_PROCESS" in extra else "gpu007:61443")
  assert (made["num_processes"], made["process_id"]) == (8, 3)
  assert made["cluster_detection_method"] == "deactivate"
  assert "local_device_ids" not in made


@pytest.mark.parametrize(
  ("nodes", "first"), [("a", "a"), ("a,b", "a"), ("n[1-2,5]", "n1"), ("n[01,03],m", "n01")]
)
def test_the_first_node_of_a_step_coordinates(nodes, first):
  address = coordinator(STEP | {"SLURM_STEP_NODELIST": nodes})["coordinator_address"]
  assert address == f"{first}:61443"


def test_several_tasks_on_a_node_are_left_to_jax():
  assert coordinator(STEP | {"SLURM_STEP_NUM_NODES": "4"}) == {}


def test_fewer_gpus_than_the_job_holds_are_refused(monkeypatch):
  class Gpu:
    platform = "gpu"

  processes.check_devices(STEP | {"SLURM_GPUS_ON_NODE": "16"})  # not on a CPU
  monkeypatch.setattr(jax, "devices", lambda: [Gpu()])
  processes.check_devices(STEP | {"SLURM_GPUS_ON_NODE": "8"})
  with pytest.raises(InputError, match="JAX sees 8 of the 16 GPUs that the job holds"):
    processes.check_devices(STEP | {"SLURM_GPUS_ON_NODE": "16"})


@pytest.mark.parametrize(
  ("changed", "message"),
  [
    ({"VR_PROCESS": ""}, "VR_COORDINATOR, VR_PROCESSES without VR_PROCESS; accepted: all three"),
    ({"VR_PROCESS": "2"}, "VR_PROCESS='2' of VR_PROCESSES='2'"),
    ({"VR_PROCESSES": "two"}, "VR_PROCESSES='two'"),
    ({"VR_COORDINATOR": "localhost"}, "VR_COORDINATOR='localhost': accepted: HOST:PORT, or auto"),
  ],
)
def test_settings_that_do_not_fit(changed, message):
  plain = {"VR_COORDINATOR": "localhost:80", "VR_PROCESSES": "2", "VR_PROCESS": "1"}
  with pytest.raises(InputError, match=message):
    coordinator(plain | changed)


def test_differences_are_named():
  first = {"config": {"lr": 1.0, "n": {"a": 2}}, "code": "x", "versions": {"jax": "1", "flax": "2"}}
  assert differences(first, first) == []
  other = {"config": {"lr": 2.0, "n": {"a": 2}}, "code": "y", "versions": {"jax": "3", "flax": "2"}}
  assert differences(first, other) == [
    "config.lr is 2.0, not 1.0",
    "jax is 3, not 1",
    "the files of vr_jax, data_pipes or of the task differ",
  ]


def run_processes(
  tmp_path, workdir, configs=(CONFIG, CONFIG), paths=("", ""), devices=2, **environment
):
  """(exit codes, stderrs) of `vr train` in a process for each config, of `devices` each."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  processes, logs = [], [tmp_path / f"stderr{i}" for i in range(len(configs))]
  for i, log in enumerate(logs):
    env = os.environ | {"VR_COORDINATOR": f"localhost:{port}", "VR_PROCESSES": str(len(configs))}
    env |= {"VR_PROCESS": str(i), "VR_HEARTBEAT_SECONDS": "10"}
    env |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), **environment}
    env["PYTHONPATH"] = os.pathsep.join(
      filter(None, [*paths[i : i + 1], str(TESTS.parent), str(TESTS)])
    )
    command = [sys.executable, "-m", "vr_jax", "train", "--config", configs[i]]
    with open(log, "w") as file:
      processes.append(
        subprocess.Popen([*command, "--workdir", workdir], env=env, stderr=file, stdout=file)
      )
  try:
    codes = [process.wait(timeout=300) for process in processes]
  finally:
    for process in processes:
      process.kill()
  return codes, [log.read_text() for log in logs]


def drawn(log):
  """position -> the examples of that global batch, of all processes; the last drawing counts."""
  batches = {}
  for line in log.read_text().splitlines():
    position, examples = json.loads(line)
    batches.setdefault(position, []).extend(examples)
  return batches


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
  """The run of one process that nothing interrupts."""
  workdir = tmp_path_factory.mktemp("straight")
  assert train(load_config(CONFIG), workdir).finished
  return workdir


def assert_ends_like(straight, workdir):
  """The same parameters and losses, up to the order of sums on another number of devices."""
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    load_params(straight),
    load_params(workdir),
  )
  assert_same_losses(straight, workdir, STEPS)


def assert_same_losses(straight, workdir, steps):
  ours, theirs = read_metrics(straight), read_metrics(workdir)
  assert [m["step"] for m in theirs] == list(range(1, steps + 1))
  np.testing.assert_allclose([m["loss"] for m in ours], [m["loss"] for m in theirs], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_one_killed_resume_as_one(straight, tmp_path, monkeypatch):
  run, before, after = (tmp_path / name for name in ("run", "before", "after"))
  codes, errors = run_processes(
    tmp_path, run, TOY_LOG=str(before), TOY_SIGNAL="SIGKILL:7:1", VR_HEARTBEAT_SECONDS="5"
  )
  assert codes[1] == -9, errors[1]
  assert codes[0] != 0, errors[0]
  # That of step 6 may have been cut short; that of step 3 was complete before 6 was begun.
  saved = max(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit())
  assert saved in (3, 6)

  monkeypatch.setenv("TOY_LOG", str(after))
  assert train(load_config(CONFIG), run).finished
  first, rest = drawn(before), drawn(after)
  assert sorted(rest) == list(range(saved, STEPS))
  # Each example once an epoch: before the checkpoint by two processes, after it by one.
  seen = [n for position in range(saved) for n in first[position]]
  seen += [n for position in range(saved, STEPS) for n in rest[position]]
  assert len(seen) == STEPS * BATCH
  assert [Counter(seen[i : i + EXAMPLES]) for i in (0, EXAMPLES)] == [Counter(range(EXAMPLES))] * 2
  # What was drawn and lost is drawn again, as the same global batches.
  for position in range(saved, 7):
    assert sorted(first[position]) == sorted(rest[position])
  assert_ends_like(straight, run)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_four_processes_end_like_one(straight, tmp_path):
  run, log = tmp_path / "run", tmp_path / "log"
  codes, errors = run_processes(tmp_path, run, configs=[CONFIG] * 4, devices=1, TOY_LOG=str(log))
  assert codes == [0] * 4, errors
  batches = drawn(log)
  assert all(len(examples) == BATCH for examples in batches.values())
  seen = [n for position in range(STEPS) for n in batches[position]]
  assert [Counter(seen[i : i + EXAMPLES]) for i in (0, EXAMPLES)] == [Counter(range(EXAMPLES))] * 2
  assert_ends_like(straight, run)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_stop_signal_to_one_process_saves_in_both(straight, tmp_path):
  codes, errors = run_processes(
    tmp_path, tmp_path / "run", TOY_SIGNAL="SIGTERM:4:1", TOY_SECONDS="1"
  )
  assert codes == [143, 143], errors
  (saved,) = [p.name for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit()]
  assert 5 <= int(saved) < STEPS
  assert train(load_config(CONFIG), tmp_path / "run").finished
  assert_ends_like(straight, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.multiprocess
def test_processes_that_were_not_started_alike_are_refused(tmp_path):
  other = tmp_path / "other"
  other.mkdir()
  for name in ("toy_task.py", "toy.py"):
    (other / name).write_text((TESTS / name).read_text() + "# changed\n")
  codes, errors = run_processes(
    tmp_path, tmp_path / "run", configs=(CONFIG, f"{CONFIG}:lr=0.5"), paths=("", str(other))
  )
  assert codes == [2, 2], errors
  for text in errors:
    line = next(line for line in text.splitlines() if line.startswith("vr train:"))
    assert "config.lr is 0.5, not 0.01; the files of vr_jax, data_pipes or of the task" in line
    assert "Traceback" not in text
  assert not (tmp_path / "run" / "config.json").exists()


@pytest.fixture(scope="module")
def shards_config(golden, tmp_path_factory):
  """(shards_config.py on 32 samples and the tiny published model, that model)."""
  folder = tmp_path_factory.mktemp("shards")
  items = []
  for k in range(4):
    for item in json.loads((golden / "data/train.json").read_text()):
      *turns, answer = item["conversations"]
      answer = {**answer, "value": f"{answer['value']} {k}"}
      items.append(item | {"id": f"{item['id']} {k}", "conversations": [*turns, answer]})
  (folder / "f.json").write_text(json.dumps(items))
  prepare(folder / "s", [folder / "f.json"], golden / "media")
  tiny = golden / "tiny_videorefer_qwen2"
  model = published.load(tiny)
  meta = make_meta(model.config.to_dict(), read_tokenizer_files(tiny))
  export(folder / "m", model.params, meta)
  return f"{TESTS / 'shards_config.py'}:shards={folder / 's'},model={folder / 'm'}", folder / "m"


def distance(tree, other):
  """The Euclidean distance of two trees of parameters."""
  squares = jax.tree.map(lambda a, b: float(np.square(a - b).sum()), tree, other)
  return sum(jax.tree.leaves(squares)) ** 0.5


@pytest.mark.slow
@pytest.mark.multiprocess
def test_training_from_shards_killed_goes_on_in_one_process_and_again_in_two(
  shards_config, tmp_path
):
  config, model = shards_config

  def run(workdir, count, name, **environment):
    log = tmp_path / name
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs")}
    codes, errors = run_processes(
      tmp_path, workdir, [config] * count, devices=1, TOY_LOG=str(log), **environment
    )
    return drawn(log), codes, errors

  def saved(workdir):
    return max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())

  whole, resumed = tmp_path / "whole", tmp_path / "resumed"
  straight, codes, errors = run(whole, 1, "straight")
  assert codes == [0], errors
  steps = len(straight)
  assert list(straight) == list(range(steps))
  rows = [row for position in range(steps) for row in straight[position]]
  count = len(rows) // EPOCHS
  assert count > 8
  *each, rest = [Counter(rows[i : i + count]) for i in range(0, len(rows), count)]
  assert each == [Counter(set(rows[:count]))] * EPOCHS  # every row once an epoch
  assert set(rest).isdisjoint(rows[:count])  # empty, to fill the last batch

  kill = {"TOY_SIGNAL": "SIGKILL:5:1", "VR_HEARTBEAT_SECONDS": "5"}
  first, codes, errors = run(resumed, 2, "two", **kill)
  assert codes[1] == -9, errors[1]
  assert codes[0] != 0, errors[0]
  one = saved(resumed)
  assert one in (2, 4)  # the later one may have been cut short
  second, codes, errors = run(resumed, 1, "one", TOY_SIGNAL=f"SIGKILL:{one + 4}")
  assert codes == [-9], errors
  two = saved(resumed)
  assert two > one
  third, codes, errors = run(resumed, 2, "again")
  assert codes == [0, 0], errors
  assert (min(second), min(third), max(third)) == (one, two, steps - 1)
  for batches, last in ((first, one), (second, two), (third, steps)):
    for position in range(min(batches), last):
      assert sorted(batches[position]) == sorted(straight[position]), position
  assert_same_losses(whole, resumed, steps)
  # AdamW scales the rounding of small gradients up; as a whole the parameters went the same way.
  start, ours, theirs = map(load_params, (model, whole, resumed))
  assert distance(ours, theirs) < 1e-3 * distance(ours, start)
