"""`vr ask --jsonl`: one line a result, resumable, nothing written over."""

import json

import pytest

from vr_jax import cli

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
  return {r["id"]: r for r in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


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
  lines[2] |= {"video": lines[0]["video"]}
  code, printed, _ = run(lines, "--json")
  assert code == 2  # an answer about another video stands in the file under that id
  run.out.write_text("".join(line for line in kept if '"a"' in line) + whole[0][:20])
  code, printed, _ = run(lines, "--json")
  assert (code, json.loads(printed)) == (0, {"answered": 3, "refused": 0, "before": 1})
  again = records(run.out)
  assert again.keys() == found.keys()
  assert {k: again[k] for k in ("a", "b", 4)} == {k: found[k] for k in ("a", "b", 4)}


@pytest.mark.parametrize(
  ("line", "says"),
  [
    ('{"video": \n', "line 2: cannot be read as JSON"),
    ("[]\n", "line 2: found list"),
    ('{"video": "x"}\n', "line 2: no key 'question'"),
    ('{"video": 3, "question": "x"}\n', "key 'video': found 3; accepted: str"),
    ('{"video": "x", "question": "x", "frames": 3}\n', "key 'frames'"),
    ('{"video": "x", "question": "x", "id": "a"}\n', "line 2: id 'a' was given"),
  ],
)
def test_a_line_that_is_no_request_stops_before_anything_is_written(run, lines, line, says):
  code, printed, error = run([lines[0], line])
  assert (code, printed) == (2, "")
  assert says in error
  assert error.count("\n") == 1
  assert not run.out.exists()


def test_answers_to_other_requests_are_not_written_over(run, lines):
  run.out.write_text('{"id": "a", "video": "other.mp4", "question": "What?"}\n')
  code, _, error = run(lines)
  assert code == 2
  assert "line 1: id 'a' answers another request" in error
  run.out.write_text("notes\n")
  assert run(lines)[0] == 2
  assert run.out.read_text() == "notes\n"


def test_arguments_that_do_not_go_together(run, lines, capsys):
  assert run(lines, "--video", "x.mp4")[0] == 2
  assert cli.main(["ask", "--video", "x.mp4"]) == 2
  assert "--video and --question" in capsys.readouterr().err
