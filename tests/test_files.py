"""Files written whole, and files of lines that a killed run goes on with."""

import json

import pytest

from data_pipes.errors import InputError
from data_pipes.files import JsonLines, read_json_lines, replaced, write_text


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
