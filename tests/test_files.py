"""Files written whole, and files of lines that a killed run goes on with."""

import json
import subprocess
import sys
import threading
import time

import pytest

from data_pipes import files
from data_pipes.errors import InputError
from data_pipes.files import (
  LOCK,
  JsonLines,
  is_unused,
  locked,
  read_json_lines,
  replaced,
  write_text,
)


def by_id(record):
  return record["id"]


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
  path = tmp_path / "folder" / "a.txt"
  write_text(path, "é1")

  def fail():
    with replaced(path) as part:
      part.write_text("half")
      assert path.read_text("utf-8") == "é1"
      raise RuntimeError

  with pytest.raises(RuntimeError):
    fail()
  assert path.read_text("utf-8") == "é1"
  with replaced(path, alone=False) as part:
    part.write_text("2")
  assert path.read_text() == "2"
  assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_the_part_is_written_anew_where_a_kill_left_one(tmp_path):
  (tmp_path / ".a.txt.tmp").write_text("left behind, and longer than the new one")
  write_text(tmp_path / "a.txt", "new")
  assert (tmp_path / "a.txt").read_text() == "new"


@pytest.mark.parametrize("cut", [1, 5, 13])
def test_a_line_that_a_kill_cut_off_is_taken_out_before_the_next_is_written(tmp_path, cut):
  path = tmp_path / "a.jsonl"
  with JsonLines(path, by_id) as lines:
    for i in range(3):
      lines.add({"id": i, "text": "a\u2028b"})
  whole = path.read_bytes()
  path.write_bytes(whole[:-cut])
  with JsonLines(path, by_id) as lines:
    assert list(lines.records) == [0, 1]
    assert 2 not in lines
    assert len(lines) == 2
    lines.add({"id": 2, "text": "a\u2028b"})
  assert path.read_bytes() == whole
  assert [r["id"] for r in read_json_lines(path)] == [0, 1, 2]


def test_the_latest_record_of_a_key_counts_and_those_not_kept_are_gone(tmp_path):
  path = tmp_path / "a.jsonl"
  records = [{"id": 1, "error": "x"}, {"id": 2, "n": 1}, {"id": 2, "n": 2}]
  path.write_text("".join(json.dumps(r) + "\n" for r in records))
  with JsonLines(path, by_id, keep=lambda r: "error" not in r) as lines:
    assert lines.records == {2: {"id": 2, "n": 2}}
  assert [r["id"] for r in read_json_lines(path)] == [2, 2]


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b'{"id": 1}\n{\n', "line 2: cannot be read as JSON"),
    (b"[1]\n", "line 1: found list; accepted: an object a line"),
    (b'{"id": "\xff"}\n', "line 1: cannot be read as JSON"),
  ],
)
def test_another_file_is_refused_and_left_alone(tmp_path, content, message):
  path = tmp_path / "a.jsonl"
  path.write_bytes(content)
  with pytest.raises(InputError, match=message):
    JsonLines(path, by_id)
  assert path.read_bytes() == content


def test_half_a_surrogate_pair_is_kept(tmp_path):
  with JsonLines(tmp_path / "a.jsonl", by_id) as lines:
    lines.add({"id": "\ud800 é"})
  assert read_json_lines(tmp_path / "a.jsonl") == [{"id": "\ud800 é"}]


def test_a_file_that_is_not_there_holds_nothing(tmp_path):
  assert read_json_lines(tmp_path / "none.jsonl") == []


def refused(folder, run="", part=None) -> str:
  with pytest.raises(InputError) as error, locked(folder, run, part):
    pass
  return str(error.value)


def test_another_run_is_kept_out_and_parts_of_one_run_share(tmp_path):
  folder = tmp_path / "W"
  with locked(folder, "a"):
    assert is_unused(folder)
    assert "another run (process" in refused(folder, "a")
    assert "another run (process" in refused(folder, "a", "0-of-2")
  assert not folder.exists()  # nothing came of it
  folder.mkdir()
  with locked(folder, "a", "0-of-2"):
    with locked(folder, "a", "1-of-2"):
      assert "part 0-of-2 of a run" in refused(folder, "b")
    assert "part 0-of-2 of a run" in refused(folder, "a", "0-of-2")
    assert "part 0-of-2 of a run" in refused(folder, "b", "1-of-2")
  assert list(folder.iterdir()) == []


def test_a_run_that_raises_leaves_no_lock(tmp_path):
  with pytest.raises(RuntimeError), locked(tmp_path):
    raise RuntimeError
  assert list(tmp_path.iterdir()) == []


def test_storage_by_address_has_no_lock():
  with locked("gs://bucket/run"), locked("gs://bucket/run"):
    pass


def test_one_of_many_that_begin_together_gets_the_lock(tmp_path):
  held, tries = [], threading.Barrier(8)

  def begin():
    tries.wait()
    try:
      with locked(tmp_path):
        held.append(1)
        tries.wait()
    except InputError:
      tries.wait()

  threads = [threading.Thread(target=begin) for _ in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(held) == 1


KILLED = """
import os, sys
from data_pipes.files import locked
with locked(sys.argv[1]):
  print("held", flush=True)
  sys.stdin.read()
  os._exit(9)
"""


def test_the_lock_of_a_killed_process_is_nobodys(tmp_path):
  words = [sys.executable, "-c", KILLED, str(tmp_path)]
  with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
    assert other.stdout.readline() == b"held\n"
    assert f"process {other.pid} on " in refused(tmp_path)
  assert (tmp_path / LOCK).exists()
  with locked(tmp_path):
    pass
  assert list(tmp_path.iterdir()) == []


def rewrite(folder, **changes):
  (holder,) = json.loads((folder / LOCK).read_text())
  (folder / LOCK).write_text(json.dumps([holder | changes]) + " cut off by a kill")


def test_a_holder_that_is_not_heard_of_is_dead(tmp_path, monkeypatch):
  with locked(tmp_path):
    rewrite(tmp_path, host="elsewhere", heard=time.time() - 290)
    assert "on elsewhere" in refused(tmp_path)
    rewrite(tmp_path, heard=time.time() - 310)
    with locked(tmp_path):
      pass
  with locked(tmp_path):
    rewrite(tmp_path, began="1")  # the number of a process that is gone went to another
    with locked(tmp_path):
      pass
  monkeypatch.setattr(files, "BEAT_SECONDS", 0.01)
  with locked(tmp_path):
    rewrite(tmp_path, heard=0)
    time.sleep(0.1)
    assert "another run" in refused(tmp_path)


TAKEN_OVER = """
import json, sys, time
from pathlib import Path
from data_pipes import files
files.BEAT_SECONDS = 0.05
with files.locked(sys.argv[1]):
  lock = Path(sys.argv[1]) / files.LOCK
  (holder,) = json.loads(lock.read_text())
  lock.write_text(json.dumps([holder | {"token": "of another run"}]))
  time.sleep(60)
"""


def test_a_run_whose_folder_was_taken_over_ends(tmp_path):
  words = [sys.executable, "-c", TAKEN_OVER, str(tmp_path)]
  ended = subprocess.run(words, capture_output=True, text=True, timeout=30)
  assert ended.returncode == 2
  assert ended.stderr == f"{tmp_path}: another run has taken over; this one ends\n"


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
  (tmp_path / "file").write_text("")
  assert "cannot be written: Not a directory" in refused(tmp_path / "file" / "W")
