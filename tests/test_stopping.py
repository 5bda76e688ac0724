"""What may end a run, and what may not: signals, and readers of its log that go away."""

import os
import signal
import sys
from pathlib import Path

import pytest

from vr_jax import cli
from vr_jax.streams import lasting_streams
from vr_jax.training.metrics import read_metrics
from vr_jax.training.report import Skipped
from vr_jax.training.stopping import stop_signals

pytestmark = pytest.mark.usefixtures("programs_on_disk")
CONFIG = str(Path(__file__).parent / "toy_config.py")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_that_come_twice_stop_once(number):
  before = signal.getsignal(number)
  with stop_signals(None) as stopped:
    assert not stopped(1)
    for _ in range(3):
      os.kill(os.getpid(), number)
    assert stopped(2)
  assert signal.getsignal(number) == before


def test_a_terminal_that_nohup_let_go_of_stops_nothing():
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    with stop_signals(None) as stopped:
      os.kill(os.getpid(), signal.SIGHUP)
      assert not stopped(1)
  finally:
    signal.signal(signal.SIGHUP, before)


def test_ctrl_c_says_what_it_does_and_the_second_one_interrupts(capsys):
  with stop_signals(None) as stopped:
    os.kill(os.getpid(), signal.SIGINT)
    assert stopped(1)
    assert "stopping after this step and saving" in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)


def closed_pipe():
  reader, writer = os.pipe()
  os.close(reader)
  return open(writer, "w", buffering=1)


def test_a_log_without_a_reader_goes_nowhere(monkeypatch):
  monkeypatch.setattr(sys, "stderr", closed_pipe())
  with pytest.raises(BrokenPipeError):
    print("one", file=sys.stderr)
  monkeypatch.setattr(sys, "stderr", closed_pipe())
  with lasting_streams():
    for _ in range(3):
      print("line" * 100, file=sys.stderr, flush=True)
    os.write(sys.stderr.fileno(), b"from C")
  print("after", file=sys.stderr, flush=True)


def test_training_goes_on_without_its_log(tmp_path, monkeypatch):
  with monkeypatch.context() as patch:
    patch.setattr(sys, "stderr", closed_pipe())
    patch.setattr(sys, "stdout", closed_pipe())
    assert cli.main(["train", "--config", CONFIG, "--workdir", str(tmp_path)]) == 0
  assert len(read_metrics(tmp_path)) == 10


def test_a_terminal_that_closes_saves(tmp_path, monkeypatch):
  monkeypatch.setenv("TOY_SIGNAL", "SIGHUP:4")
  assert cli.main(["train", "--config", CONFIG, "--workdir", str(tmp_path)]) == 143
  assert (tmp_path / "checkpoints" / "5").is_dir()


def test_steps_that_change_nothing_end_the_run_when_they_are_too_many():
  learned = {"skipped": False, "supervised_tokens": 5.0, "loss": 1.0, "grad_norm": 1.0}
  broken = {**learned, "skipped": True, "grad_norm": float("nan")}
  skipped = Skipped(limit=3, share=0.1)
  for step, metrics in enumerate([broken, broken, learned, broken, broken], 1):
    skipped.add(step, 100, metrics, ["a.mp4"])
  assert skipped.counts() == {"not_finite_steps": 4, "empty_batches": 0}
  line = r"step 6: the gradient is not finite \(loss 1.0, .* nan\); the batch holds a.mp4; 3 steps"
  with pytest.raises(ValueError, match=line):
    skipped.add(6, 100, broken, ["a.mp4"])
