"""Calls in worker processes: a crash or an endless loop costs the call, and nothing else."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import isolation_toy
import numpy as np
import pytest

from data_pipes import isolation
from data_pipes.errors import Defect


def pid() -> int:
  return isolation.call(isolation_toy.double, np.zeros(1))[0]


def test_a_call_is_made_elsewhere_and_its_arrays_come_back():
  array = np.arange(300_000, dtype=np.float32).reshape(3, -1)
  number, result = isolation.call(isolation_toy.double, array)
  assert number != os.getpid()
  np.testing.assert_array_equal(result["twice"], 2 * array)
  result["twice"][0] = 1  # it is the caller's
  assert pid() == number  # the process stays


def test_arrays_come_into_the_memory_that_is_given():
  room = np.zeros((1, 3), np.float32)
  _, result = isolation.call(isolation_toy.double, np.ones(3, np.float32), room=room)
  assert np.may_share_memory(result["twice"], room)
  np.testing.assert_array_equal(room, [[2, 2, 2]])
  _, result = isolation.call(isolation_toy.double, np.ones(4, np.float32), room=room)
  assert not np.may_share_memory(result["twice"], room)


@pytest.mark.parametrize(
  ("function", "args", "message"),
  [
    (isolation_toy.abort, (), "crashed: its process died of SIGABRT"),
    (isolation_toy.leave, (3,), "crashed: its process ended with exit code 3"),
    (isolation_toy.loop, (), "hung: no result within 0.5 s"),
    (isolation_toy.hold_the_interpreter, (), "hung: no result within 0.5 s"),
  ],
)
def test_a_crash_or_an_endless_loop_costs_the_call(function, args, message):
  before, started = pid(), time.monotonic()
  with pytest.raises(isolation.Ended) as error:
    isolation.call(function, *args, seconds=0.5)
  assert str(error.value) == message
  assert time.monotonic() - started < 10
  assert pid() != before


def test_what_a_call_raises_is_raised_here_and_keeps_the_process():
  before = pid()
  with pytest.raises(Defect, match="as it says") as error:
    isolation.call(isolation_toy.refuse)
  assert error.value.kind == "media-damaged"
  with pytest.raises(KeyError, match="ours") as fault:
    isolation.call(isolation_toy.blunder)
  assert "isolation_toy.py" in fault.value.__notes__[0]
  with pytest.raises(RuntimeError, match="Unreadable: lost"):
    isolation.call(isolation_toy.raise_what_does_not_come_back)
  assert pid() == before


def test_threads_have_a_worker_each_and_one_crash_is_one_calls(monkeypatch):
  with ThreadPoolExecutor(3) as pool:
    napping = [pool.submit(isolation.call, isolation_toy.nap, 0.5) for _ in range(2)]
    crash = pool.submit(isolation.call, isolation_toy.abort)
    assert len({n.result() for n in napping}) == 2
    assert isinstance(crash.exception(), isolation.Ended)


def test_a_worker_that_died_between_calls_is_replaced():
  workers = isolation.Workers()
  first, _ = workers.call(isolation_toy.double, np.zeros(1))
  os.kill(first, signal.SIGKILL)
  while Path(f"/proc/{first}/stat").read_text().split()[2] != "Z":
    time.sleep(0.01)
  assert workers.call(isolation_toy.double, np.zeros(1))[0] != first
  threading.Timer(0.2, workers.close).start()
  with pytest.raises(isolation.Ended):
    workers.call(isolation_toy.nap, 60)


# Without a guard: `multiprocessing` would run it once more in each worker.
SCRIPT = """
import os, sys, isolation_toy
from data_pipes import isolation
print(isolation.call(isolation_toy.nap, 0), flush=True)
isolation.call(getattr(isolation_toy, sys.argv[1]), *map(float, sys.argv[2:]))
"""


@pytest.mark.parametrize("words", [["nap", "60"], ["loop"]])
def test_workers_end_with_a_caller_that_is_killed(tmp_path, words):
  script = tmp_path / "script.py"
  script.write_text(SCRIPT)
  env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
  with subprocess.Popen(
    [sys.executable, script, *words], stdout=subprocess.PIPE, env=env
  ) as process:
    worker = int(process.stdout.readline())
    time.sleep(0.1)
    process.kill()
  deadline = time.monotonic() + 10
  while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
    if Path(f"/proc/{worker}/stat").read_text().split()[2] == "Z":
      return
    time.sleep(0.02)
  assert not Path(f"/proc/{worker}").exists()
