"""A real Slurm of two nodes on this machine: runs that are preempted, that reach their time limit,
and sweeps. Needs root and the packages slurm-wlm and munge."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vr_jax.checkpoint import load_params
from vr_jax.training.metrics import read_metrics

pytestmark = [pytest.mark.slurm, pytest.mark.multiprocess]
TESTS = Path(__file__).parent
CONFIG = str(TESTS / "toy_config.py")
CLUSTER = TESTS / "slurm_on_one_machine.sh"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
  """Calls a command of Slurm, where `vr` is this checkout's, and gives what it prints."""
  folder = tmp_path_factory.mktemp("slurm")
  os.chmod(folder, 0o755)
  vr = folder / "vr"
  vr.write_text(f'#!/bin/sh\nexec {sys.executable} -m vr_jax "$@"\n')
  vr.chmod(0o755)
  env = os.environ | {"SLURM_CONF": str(folder / "d" / "etc" / "slurm.conf")}
  env |= {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "JAX_PLATFORMS": "cpu"}
  env |= {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
  env |= {"JAX_NUM_CPU_DEVICES": "2", "TOY_SECONDS": "1.5"}

  def call(*words, **environment):
    done = subprocess.run(
      words, env=env | environment, cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()

  # What it starts goes on, and would hold a pipe open.
  subprocess.run([CLUSTER, "up", folder / "d"], stdout=subprocess.DEVNULL, check=True)
  yield call
  subprocess.run([CLUSTER, "down", folder / "d"], check=True)


def wait(condition, seconds=120):
  ends = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < ends
    time.sleep(1)


def state(slurm, job):
  shown = slurm("scontrol", "show", "job", job)
  return re.search(r"JobState=(\w+)", shown)[1], int(re.search(r"Restarts=(\d+)", shown)[1])


def steps(workdir):
  return len(read_metrics(workdir))


def test_a_preempted_run_of_two_nodes_saves_queues_again_and_ends(slurm, tmp_path):
  words = (TESTS.parent / "launch" / "slurm.sh", "--config", CONFIG, "--workdir", tmp_path / "W")
  log = f"--output={tmp_path / 'log'}"
  job = slurm("sbatch", "--parsable", "--nodes=2", "--time=30", log, *map(str, words))
  wait(lambda: steps(tmp_path / "W") >= 2)
  assert "2 x 2 cpu" in (tmp_path / "log").read_text()
  slurm("sbatch", "-p", "high", "--nodes=2", "--output=/dev/null", "--wrap=sleep 1")
  wait(lambda: state(slurm, job) == ("PENDING", 1))
  saved = [int(p.name) for p in (tmp_path / "W" / "checkpoints").iterdir() if p.name.isdigit()]
  assert max(saved) >= 2
  slurm("scontrol", "update", f"JobId={job}", "StartTime=now")
  wait(lambda: state(slurm, job)[0] == "COMPLETED")
  assert load_params(tmp_path / "W")
  assert [line["step"] for line in read_metrics(tmp_path / "W")] == list(range(1, 11))


def test_a_sweep_member_near_its_time_limit_queues_again_and_the_table_follows(slurm, tmp_path):
  sweep = ("vr", "sweep", str(TESTS / "sweep_config.py"), "--workdir", str(tmp_path / "W"))
  # Slurm looks once a minute: a limit of two minutes is near after half of one or after one.
  slurm(*sweep, "--via", "slurm", "--slurm=--time=2 --cpus-per-task=2", TOY_SECONDS="16")
  jobs = slurm("squeue", "--noheader", "--format=%A %j %t").splitlines()
  first = next(line.split()[0] for line in jobs if line.split()[2] == "R")
  wait(lambda: state(slurm, first) == ("PENDING", 1), 150)
  assert list((tmp_path / "W").glob("*/checkpoints/[1-9]*"))
  slurm("scancel", *[line.split()[0] for line in jobs])
