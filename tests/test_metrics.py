"""Metric files and progress."""

import io
import json
import struct

import pytest

from vr_jax.training import metrics
from vr_jax.training.metrics import MetricsWriter, Progress, read_metrics, resident_gb
from vr_jax.training.tensorboard import EventWriter, crc32c


def events(path):
  """The (step, payload) pairs of an event file; checks lengths and checksums."""
  data = path.read_bytes()
  while data:
    (length,) = struct.unpack("<Q", data[:8])
    for part, at in ((data[:8], 8), (data[12 : 12 + length], 12 + length)):
      crc = crc32c(part)
      masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
      assert struct.unpack("<I", data[at : at + 4]) == (masked,)
    record = data[12 : 12 + length]
    assert record[0] == 0x09  # wall time, double
    assert record[9] == 0x10  # step, varint; all steps here are below 128
    yield record[10], record[11:]
    data = data[16 + length :]


def test_crc32c_of_the_standard_vector():
  assert crc32c(b"123456789") == 0xE3069283


def test_event_files_are_what_tensorboard_reads(tmp_path):
  writer = EventWriter(tmp_path, first_step=4)
  writer.scalars(5, {"loss": 0.5, "lr": 0.25})
  writer.close()
  (path,) = tmp_path.iterdir()
  assert path.name.startswith("events.out.tfevents.")
  version, start, scalars = events(path)
  assert version == (0, b"\x1a\x0dbrain.Event:2")
  assert start == (5, b"\x3a\x02\x08\x01")  # session log, status START
  loss = b"\x0a\x04loss\x15" + struct.pack("<f", 0.5)
  lr = b"\x0a\x02lr\x15" + struct.pack("<f", 0.25)
  summary = b"\x0a" + bytes([len(loss)]) + loss + b"\x0a" + bytes([len(lr)]) + lr
  assert scalars == (5, b"\x2a" + bytes([len(summary)]) + summary)


def test_lines_after_the_resumed_step_are_forgotten(tmp_path):
  with MetricsWriter(tmp_path) as writer:
    for step in range(1, 6):
      writer.write(step, {"loss": 1 / step})
  with open(tmp_path / "metrics.jsonl", "a") as file:
    file.write('{"step": 6, "lo')  # cut short by a kill
  with MetricsWriter(tmp_path, first_step=3) as writer:
    writer.write(4, {"loss": 0.125})
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines] == [1, 2, 3, 4]
  assert lines[-1] == {"step": 4, "loss": 0.125}
  assert read_metrics(tmp_path) == lines


def test_what_is_no_number_is_null(tmp_path):
  with MetricsWriter(tmp_path) as writer:
    writer.write(1, {"loss": float("nan"), "grad_norm": float("inf"), "lr": 0.5})
  (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert json.loads(line, parse_constant=pytest.fail) == {
    "step": 1, "loss": None, "grad_norm": None, "lr": 0.5
  }  # fmt: skip


def test_damaged_lines_are_left_out_and_kept_beside(tmp_path):
  content = b'{"step": 1, "loss": 2.0}\n\xff\xfe\n[3]\n{"loss": 1}\n{"step": 2, "loss": 1.0}\n{"st'
  (tmp_path / "metrics.jsonl").write_bytes(content)
  with MetricsWriter(tmp_path, first_step=2) as writer:
    writer.write(3, {"loss": 0.5})
  assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
  assert (tmp_path / "metrics.damaged.jsonl").read_bytes() == content


@pytest.mark.parametrize("content", [b"", b"\xff", b"a b\n", None])
def test_a_run_of_weights_and_biases_without_a_name_gets_one(tmp_path, content):
  file = tmp_path / "wandb_id"
  if content is not None:
    file.write_bytes(content)
  name = metrics._wandb_id(file)
  assert len(name) == 16
  assert metrics._wandb_id(file) == name


def test_progress_is_lines_where_there_is_no_terminal(monkeypatch):
  stream = io.StringIO()
  clock = iter([0.0, 60.0])
  monkeypatch.setattr("time.monotonic", lambda: next(clock))
  with Progress(total=10, stream=stream) as progress:
    progress.update(1, {"loss": 2.0, "lr": 1e-3}, line=True)
    progress.update(2, {"loss": 1.5, "lr": 1e-3}, line=False)
    progress.update(3, {"loss": 1.0, "lr": 1e-3}, line=True)
  lines = stream.getvalue().splitlines()
  assert lines == [
    "step 1/10  loss 2.0000  lr 1.00e-03",
    "step 3/10  loss 1.0000  lr 1.00e-03  0:03:30 left",
  ]


def test_progress_is_a_bar_on_a_terminal():
  class Terminal(io.StringIO):
    def isatty(self):
      return True

  stream = Terminal()
  with Progress(total=2, stream=stream) as progress:
    progress.say("[not markup]")
    progress.update(2, {"loss": 1.0, "lr": 1e-3}, line=False)
  assert "[not markup]" in stream.getvalue()
  assert "2/2" in stream.getvalue()


def test_resident_memory_is_plausible():
  assert 0.01 < resident_gb() < 1000
