"""`vr ask --jsonl`: one line a result, resumable, nothing written over."""

import json
import signal
import subprocess
import sys
import time

import pytest

from vr_jax import cli
from vr_jax.inference import bulk
from vr_jax.inference.bulk import read_requests

QUESTION = "What is <region> doing?"


@pytest.fixture
def lines(golden):
  media = golden / "media"
  spec = {"box": [10, 10, 60, 50], "frame": 3}
  return [
    {
      "id": "a",
      "video": str(media / "clip_mp4.mp4"),
      "question": QUESTION,
      "regions": ["box:10,10,60,50@3"],
    },
    {"id": "b", "video": str(media / "clip_mp4.mp4"), "question": QUESTION, "regions": [spec]},
    {"id": 7, "video": str(media / "nowhere.mp4"), "question": "What happens?"},
    {"video": str(media / "img_a.png"), "question": "A line\u2028break. What is it?"},
  ]


@pytest.fixture
def run(golden, tmp_path, capsys):
  """Runs the command on lines; gives (exit code, standard output, standard error)."""
  source, out = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"

  def run(lines, *extra):
    text = "".join(
      line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) + "\n"
      for line in lines
    )
    source.write_text(text, encoding="utf-8")
    command = ["ask", "--checkpoint", str(golden / "tiny_videorefer_qwen2"), "--jsonl", str(source)]
    command += ["--out", str(out), "--max-new-tokens", "4", "--scene-frames", "4"]
    code = cli.main([*command, *extra])
    return (code, *capsys.readouterr())

  run.out = out
  return run


def records(path):
  """Answers and refusals by id, or by line where there is no request."""
  found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
  by_id = {r.get("line", r["id"]): r for r in found}
  assert len(by_id) == len(found)
  return by_id


def answered(path):
  return {key: r for key, r in records(path).items() if "error" not in r}


def test_answers_refusals_and_going_on(run, lines):
  code, printed, _ = run(lines)
  assert (code, printed) == (2, f"3 answered, 1 refused: {run.out}\n")
  found = records(run.out)
  assert found.keys() == {"a", "b", 7, 4}
  assert found["a"]["token_ids"] == found["b"]["token_ids"]
  assert len(found["a"]["token_ids"]) == 4
  assert "nowhere.mp4" in found[7]["error"]
  assert found[4]["question"] == lines[3]["question"]

  # Cut off while a line was written: what is whole stays, the rest and the refusal are asked again.
  whole = run.out.read_text(encoding="utf-8").splitlines(keepends=True)
  kept = [line for line in whole if '"a"' in line or "error" in line]
  run.out.write_text("".join(kept) + whole[0][:20], encoding="utf-8")
  lines[2] |= {"video": lines[0]["video"]}  # a refused request may be mended
  code, printed, _ = run(lines, "--json")
  assert (code, json.loads(printed)) == (0, {"answered": 3, "refused": 0, "before": 1})
  again = records(run.out)
  assert again.keys() == found.keys()
  assert {k: again[k] for k in ("a", "b", 4)} == {k: found[k] for k in ("a", "b", 4)}
  before = run.out.read_bytes()
  assert run(lines, "--json")[0] == 0
  assert run.out.read_bytes() == before


def test_a_bad_line_costs_itself_alone(run, lines):
  """Each kind of line that is no request, and requests that turn out to be unusable."""
  bad = {
    '{"video": \n': "cannot be read as JSON",
    "[]\n": "found list",
    '{"video": "x"}\n': "no key 'question'",
    '{"video": 3, "question": "x"}\n': "key 'video': found 3; accepted: str",
    '{"video": "x", "question": "x", "frames": 3}\n': "key 'frames'",
    '{"video": "x", "question": "x", "seconds": 3}\n': "key 'seconds': found 3; accepted: list",
    '{"video": "x", "question": "x", "id": "a"}\n': "id 'a' was given to line 1",
  }
  unusable = {
    "missing": ({"video": "nowhere.mp4"}, "nowhere.mp4"),
    "off the frame": ({"regions": ["box:900,900,990,990@3"]}, "box:900,900,990,990@3"),
    "off the clip": ({"regions": ["box:10,10,60,50@999"]}, "999"),
    "no region": ({"regions": [{"circle": 3}]}, "circle"),
    "no spec": ({"regions": ["circle:3"]}, "circle:3"),
    "no span": ({"seconds": [1]}, "accepted: two numbers"),
    "off the end": ({"seconds": [60, 61]}, "no frame lies between 60 s and 61 s"),
    "too few": ({"regions": []}, "1 <region> but 0 objects"),
  }
  requests = [{**lines[0], "id": name, **fields} for name, (fields, _) in unusable.items()]
  code, printed, error = run([lines[0], *bad, *requests, lines[3]])
  assert (code, printed) == (2, f"2 answered, {len(bad) + len(unusable)} refused: {run.out}\n")
  assert [line for line in error.splitlines() if not line.endswith(" a second")] == []  # progress
  found = records(run.out)
  for number, says in enumerate(bad.values(), 2):
    assert found[number]["id"] is None
    assert f"requests.jsonl: line {number}: " in found[number]["error"]
    assert says in found[number]["error"]
  for name, (_, says) in unusable.items():
    assert says in found[name]["error"]
  assert answered(run.out).keys() == {"a", len(bad) + len(unusable) + 2}
  # Mended, the file goes on.
  code, printed, _ = run([lines[0], *["\n"] * (len(bad) + len(unusable)), lines[3]])
  assert (code, printed) == (0, f"0 answered, 0 refused, 2 answered before: {run.out}\n")
  assert records(run.out).keys() == answered(run.out).keys()


def test_a_file_without_one_request_is_refused_whole(run):
  code, printed, error = run(["video,question\n", "a.mp4,What?\n"])
  assert (code, printed) == (2, "")
  assert "line 1: cannot be read as JSON" in error
  assert error.count("\n") == 1
  assert not run.out.exists()


def test_bytes_that_are_no_text_cost_their_line(tmp_path):
  path = tmp_path / "requests.jsonl"
  path.write_bytes(b'{"video": "a", "question": "b"}\n{"video": "\xff"}\n')
  asked, refused = read_requests(path)
  assert [one.id for one in asked] == [1]
  assert "line 2: cannot be read as JSON" in refused[2]


def test_answers_to_other_requests_or_of_other_settings_are_not_written_over(run, lines, golden):
  lines = lines[:2]
  assert run(lines)[0] == 0
  before = run.out.read_bytes()
  others = {
    "id 'a' answers another request": [{**lines[0], "question": "Where is <region>?"}, lines[1]],
    "id 'b' answers another": [lines[0], {**lines[1], "regions": ["box:10,10,60,51@3"]}],
    "line 2: id 'b' answers": [lines[0]],
  }
  for says, changed in others.items():
    code, printed, error = run(changed)
    assert (code, printed, error.count("\n")) == (2, "", 1)
    assert says in error
  for flags, says in (
    (["--max-new-tokens", "5"], "answered with max_new_tokens=4, not 5"),
    (["--mask-rule", "area"], "answered with mask_rule='keep', not 'area'"),
    (["--weights", "bfloat16"], "answered with weights='float32', not 'bfloat16'"),
    (["--checkpoint", "vr-mini"], "answered with checkpoint="),
    (["--temperature", "0.5"], "answered with temperature=0.0, not 0.5"),
  ):
    code, _, error = run(lines, *flags)
    assert (code, error.count("\n")) == (2, 1), error
    assert says in error
  assert run.out.read_bytes() == before
  assert run(lines, "--batch-size", "1", "--top-k", "3")[0] == 0  # which change no greedy answer
  for text in ("notes\n", '{"id": "a", "error": "theirs"}\n', '{"id": [], "settings": {}}\n'):
    run.out.write_text(text)
    assert run(lines)[0] == 2
    assert run.out.read_text() == text


def test_an_out_that_cannot_be_written_is_found_before_the_model_is_loaded(run, tmp_path, lines):
  for out in (tmp_path, tmp_path / "absent" / "answers.jsonl"):
    code, _, error = run(lines, "--out", str(out), "--checkpoint", "no model")
    assert code == 2
    assert "--out" in error


@pytest.mark.slow
def test_sampled_answers_are_those_of_a_run_that_was_not_stopped(run, lines):
  del lines[2]
  hot = ["--temperature", "1", "--seed", "3"]
  assert run(lines, *hot)[0] == 0
  whole = answered(run.out)
  kept = run.out.read_text(encoding="utf-8").splitlines(keepends=True)[:1]
  run.out.write_text("".join(kept), encoding="utf-8")
  assert run(lines, *hot)[0] == 0
  assert answered(run.out) == whole


def test_arguments_that_do_not_go_together(run, lines, capsys):
  assert run(lines, "--video", "x.mp4")[0] == 2
  assert cli.main(["ask", "--video", "x.mp4"]) == 2
  assert "--video and --question" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_killed_run_loses_and_doubles_nothing(run, lines, golden, tmp_path):
  """SIGKILL in the middle, and once more within a line."""
  clip = lines[0]
  asked = [{**clip, "id": i, "question": f"{i} times: {QUESTION}"} for i in range(24)]
  assert run(asked)[0] == 0
  whole = records(run.out)
  run.out.unlink()
  command = [sys.executable, "-m", "vr_jax", "ask", "--batch-size", "1", "--scene-frames", "4"]
  command += ["--checkpoint", str(golden / "tiny_videorefer_qwen2"), "--max-new-tokens", "4"]
  command += ["--jsonl", str(tmp_path / "requests.jsonl"), "--out", str(run.out)]
  process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
  try:
    while process.poll() is None and not (run.out.exists() and run.out.read_bytes().count(b"\n")):
      time.sleep(0.002)
    process.kill()
    _, error = process.communicate()
  finally:
    process.kill()
  assert process.returncode == -signal.SIGKILL, error
  text = run.out.read_text(encoding="utf-8")
  assert 1 <= text.count("\n") < 24
  run.out.write_text(text + text[: text.index("\n") // 2], encoding="utf-8")
  kept = text.count("\n")
  code, printed, _ = run(asked, "--json")
  assert (code, json.loads(printed)) == (0, {"answered": 24 - kept, "refused": 0, "before": kept})
  assert records(run.out) == whole


def test_progress_is_told_where_there_is_no_terminal(run, lines, monkeypatch):
  monkeypatch.setattr(bulk, "EVERY", 0.0)
  code, _, error = run(lines)
  assert code == 2
  assert [line.split(",")[0] for line in error.splitlines()] == [f"{n} of 4" for n in (1, 2, 3, 4)]
