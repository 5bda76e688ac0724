"""The same global batches in real processes: any number of them, of threads, from any position."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_prepare import prepare

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def shards(golden, tmp_path_factory):
  out = tmp_path_factory.mktemp("processes") / "s"
  prepare(out, [golden / "data/train.json"], golden / "media")
  return out


def start(shards, golden, mode, count, position=0, threads=2):
  """The processes of one run, all at the same time."""
  env = os.environ | {"PYTHONPATH": str(TESTS.parent), "JAX_PLATFORMS": "cpu"}
  tokenizer = golden / "tiny_videorefer_qwen2"
  return [
    subprocess.Popen(
      [
        sys.executable, TESTS / "loader_process.py", shards, tokenizer, mode, str(p), str(count),
        str(position), str(threads),
      ],
      env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    for p in range(count)
  ]  # fmt: skip


def global_batches(processes):
  """Rows of process p are the global rows p, p + count, ..."""
  parts = []
  for process in processes:
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    parts.append([json.loads(line) for line in out.splitlines()])
  return [[row for rows in zip(*s, strict=True) for row in rows] for s in zip(*parts, strict=True)]


@pytest.mark.multiprocess
@pytest.mark.parametrize(
  "mode",
  [
    "packed",
    pytest.param("buckets", marks=pytest.mark.slow),
    pytest.param("plain", marks=pytest.mark.slow),
  ],
)
def test_any_number_of_processes_gives_the_same_global_batches(shards, golden, mode):
  one = start(shards, golden, mode, 1)
  two = start(shards, golden, mode, 2, threads=3)
  rest = start(shards, golden, mode, 2, position=2, threads=1)
  one, two, rest = map(global_batches, (one, two, rest))
  assert len(one) >= 3
  assert len({row for batch in one for row in batch}) >= 4
  assert one == two
  # Resumed on another number of processes, a run goes on with exactly what it had not seen.
  assert one[2:] == rest


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("count", [4, 8])
def test_more_processes(shards, golden, count):
  whole = global_batches(start(shards, golden, "packed", 1))
  assert global_batches(start(shards, golden, "packed", count, threads=1)) == whole
