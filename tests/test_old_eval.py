"""Evaluation folders written before shards were whole videos: they are gone on with and scored.

`old/eval` was made by the commit 06b30db with vr-mini, 4 scene frames and 16 new tokens:

    data/    8 questions about 2 clips, no two neighbours about one
    whole/   a finished run, without its parts
    run/     the same as shard 1 of 3, killed while it wrote its last line
"""

import json
import shutil
from pathlib import Path

import pytest

import vr_jax
from vr_jax.evaluation.results import read_predictions
from vr_jax.evaluation.run import Settings, evaluate
from vr_jax.evaluation.score import score

OLD = Path(__file__).parent / "old" / "eval"
SETTINGS = Settings("multi", scene_frames=4, max_new_tokens=16, batch_size=4)


@pytest.fixture
def old(tmp_path):
  return Path(shutil.copytree(OLD, tmp_path / "old"))


def test_a_finished_run_is_scored_as_before(old):
  result, _ = score("bench-q", old / "whole")
  key = ("accuracy", "All", "wilson")
  (accuracy,) = [m for m in result.metrics if (m.name, m.slice, m.ci_method) == key]
  assert (accuracy.value, accuracy.n) == (0.75, 8)


@pytest.mark.parametrize("shards", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_killed_run_goes_on(old, shards):
  part = old / "run" / "parts" / "1-of-3.jsonl"
  before = part.read_bytes()
  model, messages = vr_jax.load(), []
  for k in range(shards):
    evaluate(
      model, "bench-q", old / "data", old / "run", SETTINGS, shard=(k, shards),
      progress=messages.append,
    )  # fmt: skip
  assert "8 items, 2 done" in messages[0]
  assert part.read_bytes() == before  # another shard's file
  run, predictions = read_predictions(old / "run")
  held, expected = read_predictions(old / "whole")
  assert predictions == expected
  assert run["counts"] == held["counts"]
  assert run["inference"] == held["inference"]
  kept = {json.loads(line)["id"] for line in before.decode().splitlines()[:-1]}
  again = {
    json.loads(line)["id"]
    for path in (old / "run" / "parts").glob(f"*-of-{shards}.jsonl")
    for line in path.read_text().splitlines()
  }
  assert kept | again == {p.id for p in expected}
  assert not kept & again
