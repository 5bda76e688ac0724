"""Caption metrics against the golden corpus of pycocoevalcap 1.2, and their edges."""

import json
import math
import random

import pytest

from data_pipes.errors import InputError
from vr_jax import cli
from vr_jax.evaluation.benchmarks.registry import benchmark
from vr_jax.evaluation.items import Prediction
from vr_jax.evaluation.results import load
from vr_jax.evaluation.scoring import captions
from vr_jax.evaluation.scoring.caption_metrics import bleu, cider_d, rouge_l
from vr_jax.evaluation.scoring.captions import CORENLP, jar_tokenize, ours, spice_scores
from vr_jax.evaluation.settings import CaptionSettings

REFERENCES = (
  (
    "The man in the red jacket walks to the door and opens it.",
    "A man in a red jacket opens the door.",
  ),
  ("The woman turns around, then picks up the cup from the table.",),
  ("The brown dog runs across the grass and jumps over a small fence.",),
  ("The boy in the blue shirt sits down next to the girl.",),
  ("The woman with long hair puts her hand on the man's shoulder.",),
  ("The old man stands up; he isn't wearing a hat.",),
)
PREDICTIONS = (
  "The man wearing a red jacket walks towards the door and opens it.",
  "A woman picks up a cup from the table and turns around.",
  "The dog runs through the grass and jumps a fence.",
  "The boy in the blue shirt stands up and walks away from the girl.",
  "The woman puts her hand on the man's shoulder.",
  "The old man stands up and he isn't wearing a hat.",
)
CORPUS = {
  "BLEU-1": 0.783103515794403,
  "BLEU-2": 0.679684973586652,
  "BLEU-3": 0.580045507559609,
  "BLEU-4": 0.494939591828144,
  "ROUGE_L": 0.759148601864006,
  "CIDEr": 4.795867322342505,
}
FIRST_ONLY = {
  "BLEU-1": 0.770,
  "BLEU-2": 0.665,
  "BLEU-3": 0.564,
  "BLEU-4": 0.485,
  "ROUGE_L": 0.759,
  "CIDEr": 5.005,
}
ITEMS = {
  "BLEU-4": (
    0.475873309563,
    0.295023436267,
    0.256116256475,
    0.393499596191,
    0.615399064403,
    0.734888920017,
  ),
  "ROUGE_L": (
    0.769230769231,
    0.583333333333,
    0.764623955432,
    0.624040920716,
    0.849582172702,
    0.964080459770,
  ),
  "CIDEr": (
    3.570364816067,
    4.128894018514,
    3.129489882443,
    3.964109510407,
    6.187339333814,
    7.795006372811,
  ),
}
METEOR = 0.424410735339553
METEOR_ITEMS = (
  0.449151476629,
  0.400250357772,
  0.372441358555,
  0.331732337671,
  0.446760903883,
  0.577096873279,
)


def scores(references, said):
  found = {f"BLEU-{n}": s for n, s in enumerate(bleu(references, said), 1)}
  return found | {"ROUGE_L": rouge_l(references, said), "CIDEr": cider_d(references, said)}


def test_golden_corpus():
  references = [ours(of) for of in REFERENCES]
  said = ours(PREDICTIONS)
  found = scores(references, said)
  assert {n: s.corpus for n, s in found.items()} == pytest.approx(CORPUS, abs=1e-9)
  for name, values in ITEMS.items():
    assert found[name].items == pytest.approx(values, abs=1e-9)
  first = scores([of[:1] for of in references], said)
  assert {n: s.corpus for n, s in first.items()} == pytest.approx(FIRST_ONLY, abs=6e-4)


def test_edges():
  same = ["a dog runs", "the cat sits on one mat"]  # the first has no 4-gram
  assert cider_d([[s] for s in same], same).items == pytest.approx((7.5, 10))
  assert cider_d([["a b c d"]], ["a b c d"]).corpus == 0  # one item: every n-gram is everywhere
  assert rouge_l([["a b"], ["a b"]], ["", "a b"]).items == (0, 1)
  assert rouge_l([[""], ["", "a"], ["a"]], ["", "a", ""]).items == (1, 1, 0)  # as pycocoevalcap
  assert [s.items[0] < 1e-3 for s in bleu([["a b"]], [""])] == [True] * 4
  assert bleu([["a b c", "a b c d e"]], ["a b c d"])[0].corpus == pytest.approx(1)  # the shorter
  assert rouge_l([["a b c d"]], ["a c"]).corpus == pytest.approx(
    (1 + 1.44) * 1 * 0.5 / (0.5 + 1.44 * 1)
  )
  assert math.isfinite(cider_d([["x"], ["x"]], ["x", "x"]).corpus)


@pytest.mark.java
def test_equal_to_pycocoevalcap_on_random_corpora():
  from pycocoevalcap.bleu.bleu import Bleu
  from pycocoevalcap.cider.cider import Cider
  from pycocoevalcap.rouge.rouge import Rouge

  rng = random.Random(0)
  words = ("a", "the", "man", "dog", "red", "runs", "to", "door", "and", "it")

  def text():
    return " ".join(rng.choices(words, k=rng.randint(1, 12)))

  for _ in range(30):
    references = [[text() for _ in range(rng.randint(1, 3))] for _ in range(rng.randint(2, 9))]
    said = [text() for _ in references]
    gts, res = dict(enumerate(references)), {i: [s] for i, s in enumerate(said)}
    found = scores(references, said)
    theirs, items = Bleu(4).compute_score(gts, res, verbose=0)
    for n in range(4):
      assert found[f"BLEU-{n + 1}"].corpus == pytest.approx(theirs[n], abs=1e-12)
      assert found[f"BLEU-{n + 1}"].items == pytest.approx(items[n], abs=1e-12)
    for name, scorer in (("ROUGE_L", Rouge()), ("CIDEr", Cider())):
      corpus, items = scorer.compute_score(gts, res)
      assert found[name].corpus == pytest.approx(corpus, abs=1e-12)
      assert found[name].items == pytest.approx(list(items), abs=1e-12)


@pytest.mark.java
def test_meteor_and_the_jar_give_the_golden_numbers():
  assert jar_tokenize(PREDICTIONS) == ours(PREDICTIONS)
  found = captions._meteor([ours(of) for of in REFERENCES], ours(PREDICTIONS))
  assert found.corpus == pytest.approx(METEOR, abs=1e-9)
  assert found.items == pytest.approx(METEOR_ITEMS, abs=1e-9)


def predictions(said=PREDICTIONS):
  return [
    Prediction(i, f"v{i}", text, of[0])
    for i, (of, text) in enumerate(zip(REFERENCES, said, strict=True))
  ]


def score(said, **settings):
  settings = CaptionSettings(**({"meteor": False} | settings))
  return captions.score(benchmark("hc-stvg"), predictions(said), {}, "strict", settings)


def test_a_line_separator_shifts_no_caption():
  plain = score(PREDICTIONS)
  shifted = score([PREDICTIONS[0].replace(" ", "\u2028", 1), *PREDICTIONS[1:]])
  assert [m.value for m in shifted.metrics] == [m.value for m in plain.metrics]
  assert plain.metric("CIDEr").value == pytest.approx(FIRST_ONLY["CIDEr"], abs=6e-4)


def test_counts_empty_captions_and_the_length_filter():
  said = ("", "A man", None, *PREDICTIONS[3:5], "x" * 300)
  result = score(said)
  assert (result.counts["answered"], result.counts["kept"], result.counts["empty"]) == (5, 5, 1)
  rouge = result.metric("ROUGE_L")
  assert (rouge.n, rouge.n_failed) == (5, 1)
  assert result.items[0]["scores"]["ROUGE_L"] == 0
  filtered = score(said, length_filter="artemis")
  assert filtered.counts["kept"] == 2
  assert filtered.extra["length_filter"] == "artemis: 2 of 5 kept"
  assert filtered.items[0]["problem"] == "left out by the length filter"
  assert rouge.ci_low < rouge.value < rouge.ci_high
  for options, says in (({"length_filter": "x"}, "none, artemis"), ({"tokenizer": "x"}, "ptb-py")):
    with pytest.raises(InputError, match=says):
      score(said, **options)
  with pytest.raises(InputError, match="no captions"):
    score(("",) * 6, length_filter="artemis")


def test_what_cannot_be_computed_says_why(tmp_path, capsys):
  path = tmp_path / "p.jsonl"
  records = [{"video": p.video, "Answer": p.truth, "pred": p.pred} for p in predictions()]
  path.write_text("".join(json.dumps(r) + "\n" for r in records))
  assert cli.main(["score", "hc-stvg", str(path), "--no-meteor"]) == 0
  printed = capsys.readouterr().out
  assert "n/a (left out)" in printed
  assert "CoreNLP 3.6.0" in printed
  assert "tokenizer: ptb-py" in printed
  spice = load(tmp_path / "p" / "strict").metric("SPICE")
  assert spice.value is None


def test_the_folder_of_spice(tmp_path, capsys):
  path = tmp_path / "p.jsonl"
  records = [{"video": p.video, "Answer": p.truth, "pred": p.pred} for p in predictions()]
  path.write_text("".join(json.dumps(r) + "\n" for r in records))
  command = ["score", "hc-stvg", str(path), "--no-meteor", "--spice-home", str(tmp_path)]
  (tmp_path / CORENLP[0]).touch()
  assert cli.main(command) == 2
  assert f"no {CORENLP[1]}" in capsys.readouterr().err


def test_what_spice_writes():
  def of(i, f):
    return {"image_id": i, "scores": {"All": {"pr": 0.5, "re": 0.5, "f": f}, "Color": {"f": 1.0}}}

  scored = spice_scores(json.dumps([of(1, 0.25), of(0, 0.75)]), 2)
  assert scored.items == (0.75, 0.25)
  assert scored.corpus == 0.5
  for records in ([of(0, 0.5)], [of(0, 0.5), of(1, "NaN")]):
    assert "no score for 1 of 2 captions" in spice_scores(json.dumps(records), 2)


@pytest.mark.java
def test_a_spice_that_fails_is_no_number(tmp_path):
  for name in CORENLP:
    (tmp_path / name).touch()  # CoreNLP itself is in no package
  result = score(PREDICTIONS, spice_home=tmp_path)
  found = result.metric("SPICE")
  assert found.value is None
  assert "program failed: " in found.note
  assert "stanford" in found.note
  assert result.metric("CIDEr").value > 0
