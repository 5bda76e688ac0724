"""Who is said to hold a run up."""

import logging
import time

from vr_jax.training.heartbeat import Heartbeat, read_beats, stalled


def beat(step, doing, since=0.0, now=100.0, host="h"):
  return {"host": host, "step": step, "doing": doing, "since": since, "now": now}


def test_the_one_that_waits_for_input_is_named():
  beats = [beat(7, "step", 40.0), beat(7, "input", 35.0, host="b"), beat(7, "step", 41.0)]
  line, culprits = stalled(beats, 100.0, silent=50)
  assert culprits == [1]
  assert line == "process 1 (b) is at step 7, input, for 65 s"


def test_the_one_that_is_a_step_behind_is_named():
  assert stalled([beat(8, "input"), beat(7, "step")], 100.0, silent=50)[1] == [1]


def test_silent_processes_come_first():
  beats = [beat(7, "step"), None, beat(7, "input", now=40.0, host="c")]
  line, culprits = stalled(beats, 100.0, silent=50)
  assert culprits == [1, 2]
  assert line == "not heard of: process 1 (host unknown), process 2 (c)"


def test_where_all_are_in_the_step_nobody_is_named():
  line, culprits = stalled([beat(1, "step"), beat(1, "step")], 100.0, silent=50)
  assert culprits == []
  assert "all 2 processes are in step 1" in line


def test_one_of_two_that_stalls_is_told_by_the_other(tmp_path, caplog):
  """Once for each stall, and not at all while both get on."""
  with caplog.at_level(logging.WARNING), Heartbeat(tmp_path, 0, 2, 0.6) as first:
    with Heartbeat(tmp_path, 1, 2, 0.6) as second:
      second.at(3, "input")
      for _ in range(3):
        first.at(3, "step")
        time.sleep(0.25)
      assert not caplog.records
      time.sleep(1.2)
    (record,) = caplog.records
    assert "is at step 3, input" in record.getMessage()
    assert "process 1" in record.getMessage()
  assert read_beats(tmp_path, 2)[0]["doing"] == "step"
