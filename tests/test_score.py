"""`vr score`: the published scorers' output, denominators, result files, comparisons."""

import json
from importlib import resources

import jsonschema
import numpy as np
import pytest

from data_pipes.errors import InputError
from vr_jax import cli
from vr_jax.evaluation.benchmarks.registry import benchmark
from vr_jax.evaluation.items import Prediction
from vr_jax.evaluation.results import SCHEMA_FILE, Result, load, save, to_dict
from vr_jax.evaluation.scoring.choice import score as score_choice
from vr_jax.evaluation.scoring.comparison import compare
from vr_jax.evaluation.scoring.reviewer import confusion, score_reviewer

OPTIONS = ("(A) red", "(B) blue", "(C) green", "(D) none")
RUN = {
  "run_id": "bench-q-0123456789ab",
  "task": {"name": "bench-q", "n": 4, "version": 1, "split": "test", "data_sha256": "0" * 64},
  "model": {"name": "m", "checkpoint_sha256": None, "params": 1, "dtype": "f", "config": {}},
  "code": {"version": "0", "git": None, "dirty": None},
  "env": dict.fromkeys(("python", "jax", "jaxlib", "backend", "device", "java")),
  "inference": {
    **dict.fromkeys(("sampler", "prompt_template", "prompt_sha", "decoding", "seed")),
    "mode": "multi",
    "u": 4,
    "frames": 16,
  },
  "timing": {"wall": 1.0, "items_per_s": 4.0},
}


def prediction(i, pred="(A)", truth="(A) red", kind="Basic", video=None, **fields):
  return Prediction(i, video or f"v{i // 2}", pred, truth, kind, options=OPTIONS, **fields)


def result_of(predictions, parser="strict", name="bench-q"):
  return score_choice(benchmark(name), predictions, RUN, parser)


def printed(capsys, *command):
  assert cli.main(["score", *map(str, command)]) == 0
  return capsys.readouterr().out


def test_bench_q_prints_what_the_published_scorer_prints(golden, tmp_path, capsys):
  recorded = json.loads((golden / "json" / "bench_q_scoring.json").read_text())
  path = tmp_path / "q.jsonl"
  path.write_text("".join(json.dumps(item) + "\n" for item in recorded["items"]))
  assert recorded["stdout"] in printed(capsys, "bench-q", path, "--parser", "published")
  items = load(tmp_path / "q" / "published").items
  for ours, theirs in zip(items, recorded["items"], strict=True):
    assert (ours["parsed"], ours["gt"]) == (theirs["extracted"], theirs["gt"])
    assert bool(ours["score"]) == theirs["correct"]
  # What stops the published script counts as wrong here, and is counted.
  path.write_text(
    "".join(json.dumps({**recorded["items"][0], "pred": p}) + "\n" for p in ("", "."))
  )
  told = json.loads(printed(capsys, "bench-q", path, "--parser", "published", "--json"))
  assert (told["counts"]["correct"], told["counts"]["empty"]) == (0, 2)


@pytest.mark.parametrize(("part", "count"), [("whole", None), ("first6", 6)])
def test_bench_d_prints_what_the_published_scorers_print(part, count, golden, tmp_path, capsys):
  recorded = json.loads((golden / "json" / "bench_d_scoring.json").read_text())
  path = tmp_path / "d.json"
  path.write_text(json.dumps(recorded["input"][:count]))
  text = printed(capsys, "bench-d", path, "--parser", "published")
  assert recorded[part]["extract_stdout"] + recorded[part]["analyze_stdout"] in text


def test_denominators_are_printed_and_nothing_is_dropped():
  missing = {"pred": None, "error": "missing media: x"}
  predictions = [
    prediction(0),
    prediction(1, "no idea"),
    prediction(2, ""),
    prediction(3, "(B)", kind="Future"),
    prediction(4, **missing),
    prediction(5, None, error="unusable: y"),
  ]
  result = result_of(predictions)
  assert result.counts == {
    "total": 6,
    "hidden": 0,
    "answered": 4,
    "missing_media": 1,
    "unusable": 1,
    "empty": 1,
    "unparsed": 2,
    "correct": 1,
  }
  assert result.metric("accuracy").value == 1 / 4
  assert result.metric("accuracy_all").value == 1 / 6
  assert result.metric("macro").value == pytest.approx((1 / 3 + 0) / 2)
  assert result.metric("unparsed").value == 2 / 4
  assert [i["problem"] for i in result.items] == [None, "unparsed", "empty", None, None, None]
  with pytest.raises(InputError, match="no answers to score"):
    result_of([prediction(0, **missing)])


def test_general_qa_is_read_as_published_and_strictly():
  said = [prediction(0, "Because it is red"), prediction(1, "A man", "(A) red"), prediction(2, "x")]
  published = result_of(said, "published", "mvbench")
  assert [i["parsed"] for i in published.items] == ["B", "A", "C"]  # the third is the fallback
  strict = result_of(said, "strict", "mvbench")
  assert [i["parsed"] for i in strict.items] == ["A", None, None]
  with pytest.raises(InputError, match="answers of this split are hidden"):
    result_of([prediction(0, truth=None)], name="perception-test")


def test_slices_beside_the_types():
  predictions = [
    prediction(i, "(A)" if i % 3 else "(B)", slices={"duration": ("short", "long")[i % 2]})
    for i in range(12)
  ]
  result = result_of(predictions, name="videomme")
  short = result.metric("accuracy", "duration: short")
  assert (short.n, short.value) == (6, 4 / 6)


def test_result_files_follow_their_schema(tmp_path):
  schema = json.loads(SCHEMA_FILE.read_text())
  assert resources.files("vr_jax.evaluation").joinpath("schemas/result.schema.json").is_file()
  jsonschema.Draft202012Validator.check_schema(schema)
  result = result_of([prediction(i, "(A)\u2028 yes" if i else "(B)") for i in range(5)])
  folder = tmp_path / "result"
  save(result, folder)
  jsonschema.validate(json.loads((folder / "result.json").read_text()), schema)
  again = load(folder)
  assert to_dict(again) == to_dict(result)
  assert again.items == result.items
  broken = json.loads((folder / "result.json").read_text())
  broken["metrics"][0]["unit"] = "%"
  with pytest.raises(jsonschema.ValidationError):
    jsonschema.validate(broken, schema)
  (folder / "result.json").write_text('{"schema": "vr_jax.result/2"}')
  with pytest.raises(InputError, match=r"accepted: 'vr_jax.result/1'"):
    load(folder)


def test_comparison_is_paired_by_id():
  a = result_of([prediction(i, "(A)", kind="TU"[i % 2]) for i in range(40)])
  b = [prediction(i, "(A)" if i % 4 else "(B)", kind="TU"[i % 2]) for i in range(40)]
  found = {c.slice: c for c in compare(a, result_of(b[::-1]))}
  assert list(found) == ["U", "T", "All"] or list(found) == ["T", "U", "All"]
  assert found["All"].difference.value == pytest.approx(0.25)
  assert found["All"].certain
  assert (found["T"].n, found["T"].p, found["U"].p) == (20, pytest.approx(2 / 2**10), 1.0)
  assert found["T"].p_holm == pytest.approx(4 / 2**10)
  assert found["U"].needed is None
  assert found["All"].p == found["T"].p


def test_gap_within_the_noise_says_how_many_items_it_takes():
  rng = np.random.default_rng(0)

  def drawn(share):
    right = rng.random(80) < share
    return result_of([prediction(i, "(A)" if r else "(B)", video=i) for i, r in enumerate(right)])

  a, b = drawn(0.6), drawn(0.55)
  (whole,) = [c for c in compare(a, b) if c.slice == "All"]
  assert not whole.certain
  gaps = np.array([x["score"] - y["score"] for x, y in zip(a.items, b.items, strict=True)])
  expected = (1.96 * gaps.std() / gaps.mean()) ** 2  # each item its own video
  assert whole.needed == pytest.approx(expected, rel=0.01)
  assert whole.needed > 80


def test_runs_over_different_items_are_not_compared_silently(tmp_path, capsys):
  a = result_of([prediction(i) for i in range(6)])
  b = result_of([prediction(i) for i in range(2, 9)])
  with pytest.raises(InputError, match="2 only in the first, 3 only in the second"):
    compare(a, b)
  assert compare(a, b, common=True)[-1].n == 4
  other = result_of([prediction(i, truth="(B) blue" if i == 3 else "(A) red") for i in range(6)])
  with pytest.raises(InputError, match="item 3 has another truth"):
    compare(a, other, common=True)
  with pytest.raises(InputError, match="nothing to compare"):
    compare(a, Result("mvbench", {}, "strict", (), {}, ()))


def test_the_command_compares(tmp_path, capsys):
  def file(name, says):
    path = tmp_path / f"{name}.jsonl"
    records = [
      {"id": i, "video": f"v{i}", "Answer": "(A) red", "pred": says(i), "type": "Basic"}
      for i in range(30)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path

  worse = file("worse", lambda i: "(A)" if i % 2 else "(B)")
  printed(capsys, "bench-q", worse)
  text = printed(
    capsys, "bench-q", file("better", lambda i: "(A)"), "--against", tmp_path / "worse" / "strict"
  )
  assert "first minus second" in text
  assert "50.0 %" in text.split("first minus second")[1]


@pytest.mark.parametrize(
  ("content", "says"),
  [
    ("", "no predictions"),
    ("[1]", "accepted: one object an item"),
    ("{", "accepted: a JSON list or JSON lines"),
    ('{"video": "v", "Answer": "(A) x", "type": "t"}', "no key 'pred'"),
    ('{"id":1,"video":"v","Answer":"(A) x","pred":"A","type":"t"}\n' * 2, "both have id 1"),
    ('{"id":[1],"video":"v","Answer":"(A) x","pred":"A","type":"t"}', "id: found [1]"),
    ('{"id":true,"video":"v","Answer":"(A) x","pred":"A","type":"t"}', "id: found True"),
    ('{"video":"v","Answer":"(A) x","pred":7,"type":"t"}', "pred: found 7; accepted: text"),
    ('{"video":["v"],"Answer":"(A) x","pred":"A","type":"t"}', "video: found ['v']"),
    ('{"video":"v","Answer":{"A":1},"pred":"A","type":"t"}', "truth: found {'A': 1}"),
    ('{"video":"v","Answer":"(A) x","pred":"A","type":{"t":1}}', "type: found {'t': 1}"),
    ('{"video":"v","Answer":"(A) x","pred":"A \\ud83d","type":"t"}', "pred: holds half a"),
    ('{"id":"\\udc00","video":"v","Answer":"(A) x","pred":"A","type":"t"}', "id: holds half a"),
    ("[" * 100_000, "accepted: a JSON list or JSON lines"),
  ],
)
def test_bad_prediction_files(content, says, tmp_path, capsys):
  path = tmp_path / "p.jsonl"
  path.write_text(content)
  assert cli.main(["score", "bench-q", str(path)]) == 2
  told = capsys.readouterr().err
  assert says in told
  assert told.count("\n") == 1
  assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
  ("file", "content", "says"),
  [
    ("run.json", "{", "run.json: cannot be read as JSON"),
    ("run.json", "[]", "run.json: found list"),
    ("run.json", "{}", "run.json: names no task"),
    ("predictions.jsonl", "", "no predictions"),
    ("predictions.jsonl", '{"id": 1}\n', "record 0: no key 'video'"),
    ("predictions.jsonl", '{"id": {}, "video": "v", "pred": "A"}\n', "id: found {}"),
    ("predictions.jsonl", '{"id": 1, "video": "v", "pred": 3.5}\n', "pred: found 3.5"),
    ("predictions.jsonl", '{"id": 1, "video": "v", "pred": "A", "options": "AB"}\n', "options: "),
    ("predictions.jsonl", '{"id": 1, "video": "v", "pred": "A", "slices": []}\n', "slices: "),
    ("predictions.jsonl", '{"id": 1, "video": "v", "pred": "A"}\n' * 2, "both have id 1"),
  ],
)
def test_a_damaged_run_is_one_line(file, content, says, tmp_path, capsys):
  (tmp_path / "run.json").write_text('{"task": {"name": "bench-q"}}')
  (tmp_path / "predictions.jsonl").write_text('{"id": 1, "video": "v", "pred": "A"}\n')
  (tmp_path / file).write_text(content)
  assert cli.main(["score", "bench-q", str(tmp_path)]) == 2
  told = capsys.readouterr().err
  assert says in told
  assert told.count("\n") == 1


def test_table_8(tmp_path, capsys):
  found = confusion(88, 12, 36, 64)
  assert found.precision[0] == 0.88
  assert (found.precision[1].low, found.precision[1].high) == pytest.approx(
    (0.802, 0.930), abs=6e-4
  )
  assert (found.npv[1].low, found.npv[1].high) == pytest.approx((0.542, 0.727), abs=6e-4)
  assert (found.accuracy[0], found.f1, found.mcc, found.kappa) == pytest.approx(
    (0.76, 0.786, 0.536, 0.52), abs=6e-4
  )
  assert (found.recall[0], found.specificity[0]) == pytest.approx((0.710, 0.842), abs=6e-4)
  weighted = confusion(88, 12, 36, 64, accept_rate=0.5)  # as sampled: nothing changes
  assert weighted.recall[0] == pytest.approx(found.recall[0])
  assert weighted.recall[1] is None
  # Of 1000 items 800 accepted: 704 good and 96 bad ones; 200 rejected: 72 good, 128 bad.
  rare = confusion(88, 12, 36, 64, accept_rate=0.8)
  assert rare.recall[0] == pytest.approx(704 / 776)
  assert rare.specificity[0] == pytest.approx(128 / 224)
  assert rare.accuracy[0] == pytest.approx(832 / 1000)
  assert rare.precision == found.precision
  path = tmp_path / "labels.jsonl"
  pairs = [(True, True)] * 88 + [(True, False)] * 12 + [(False, True)] * 36 + [(False, False)] * 64
  path.write_text("".join(json.dumps({"reviewer": r, "manual": m}) + "\n" for r, m in pairs))
  assert score_reviewer(path, None) == found
  assert "0.880  0.802 to 0.930  n=100" in printed(capsys, "reviewer", path)
  assert "80.0% accepted" in printed(capsys, "reviewer", path, "--accept-rate", "0.8")
  for arguments, says in (((1, 0, 0, 0), "at least one"), ((1, 1, 1, 1, 2.0), "between 0 and 1")):
    with pytest.raises(InputError, match=says):
      confusion(*arguments)
