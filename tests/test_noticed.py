"""What one-line changes broke and no other test noticed (benchmarks/mutants.py)."""

from types import SimpleNamespace

import numpy as np
import pytest

from data_pipes.engine import review, stages
from data_pipes.engine.agents.texts import QUESTION_TYPES, question_fault
from data_pipes.engine.backends.chat_agents import ChatJudge
from data_pipes.engine.calls import Calls, StopRun
from data_pipes.engine.graph import GraphRef
from data_pipes.engine.job import EngineJob
from data_pipes.engine.quality.duplicates import survey
from data_pipes.engine.roles import Question
from data_pipes.engine.store import Store
from data_pipes.feature_shards import sample_key
from vr_jax.evaluation.metrics import Interval
from vr_jax.evaluation.scoring.comparison import Comparison
from vr_jax.evaluation.scoring.descriptions import _mean
from vr_jax.evaluation.scoring.judge import Verdict
from vr_jax.evaluation.scoring.judge_scores import DIMENSIONS, Scores
from vr_jax.evaluation.scoring.statistics import (
  Difference,
  bootstrap_mean_of_means,
  cluster_bootstrap,
)


def test_a_mean_of_one_mean_is_that_mean_resampled():
  """Clusters of different sizes: the denominators are drawn too."""
  values = np.random.default_rng(0).random(60)
  clusters = [0] * 30 + [1] * 15 + [i // 3 for i in range(6, 51, 3)]
  assert bootstrap_mean_of_means([(values, clusters)]) == cluster_bootstrap(values, clusters)


def test_all_repeats_of_a_judge_count():
  replies = [Scores(dict.fromkeys(DIMENSIONS, value)) for value in (1.0, 4.0)]
  merged = _mean(Verdict((*replies, Scores({}, "no reply")), ("a", "b", None)))
  assert merged.values == dict.fromkeys(DIMENSIONS, 2.5)


@pytest.mark.parametrize(
  ("p", "p_holm", "verdict"),
  [
    (0.01, None, "differs"),
    (0.01, 0.04, "differs"),
    (0.2, None, "within the noise"),
    (0.01, 0.2, "within the noise"),  # Holm has the last word
    (None, None, "differs"),  # scores have no p value
  ],
)
def test_a_difference_needs_its_p_value(p, p_holm, verdict):
  difference = Difference(0.1, Interval(0.02, 0.2))
  assert Comparison("All", 50, 0.6, 0.5, difference, p, p_holm, 40).verdict == verdict


@pytest.mark.parametrize(
  ("mask", "rle"), [([[1, 1], [1, 0]], "0, 3, 1"), ([[0, 1], [1, 1]], "1, 3"), ([[1]], "0, 1")]
)
def test_run_lengths_begin_with_zeros_also_where_the_corner_is_filled(mask, rle):
  assert review._cvat_rle(np.array(mask))["rle"] == rle


def test_a_question_without_an_answer_says_so():
  question = Question("What is {0}?", " ", next(iter(QUESTION_TYPES)), (0,))
  assert question_fault(question, 1, "en") == "question without an answer"


def test_the_key_of_cached_features_changes_with_the_masks():
  record = SimpleNamespace(stored=SimpleNamespace(source="abc"), size=(4, 4), where="r")
  one, other = ({3: {"counts": text, "size": [4, 4]}} for text in ("04", "13"))
  assert sample_key(record, [one]) != sample_key(record, [other])
  assert sample_key(record, [one]) == sample_key(record, [dict(one)])


def test_what_decides_a_stage_is_in_its_fingerprint(tmp_path):
  def prints(**changes):
    c = stages.engine_config().unlock()
    c.input.videos, c.input.files = str(tmp_path), (str(tmp_path / "captions.json"),)
    c.update(changes)
    graph = stages.make_graph(stages.check_settings(c, tmp_path))
    return {stage.name: stage.fingerprint for stage in graph.stages}

  before, after = prints(drop_static=True), prints(drop_static=False)
  assert {name[3:] for name in before if before[name] != after[name]} >= {"texts"}

  def identity(**options):
    return ChatJudge.identity({"model": "m", **options}, None)

  assert identity(extra={"temperature": 1}) != identity(extra={"temperature": 0})


def test_calls_in_flight_count_against_the_budget(tmp_path):
  calls = Calls(tmp_path / "a", budget_usd=2.0)
  calls.begin("r", "s", "m", 0.8)
  calls.begin("r", "s", "m", 0.8)
  with pytest.raises(StopRun, match=r"1\.6000 set aside"):
    calls.begin("r", "s", "m", 0.8)


def test_workers_share_what_is_left_of_a_budget(tmp_path):
  Store(tmp_path, 4).write_settings({})
  calls = Calls(tmp_path / "calls", "ray-1")
  calls.end(calls.begin("r", "stage", "model", 1.0), {"text": "a"}, usd=0.4)
  calls.close()
  job = EngineJob(GraphRef("engine_toy:make", {}), tmp_path, budget_usd=1.0)
  budgets = [one.budget_usd for one in job.split(3)]
  assert budgets == pytest.approx([0.2, 0.6, 0.2])  # one has spent 0.4 of its own


def clip(key: str, hashes: list[int], mirrored: list[int]) -> dict:
  texts = {"hashes": hashes, "mirrored": mirrored}
  return {"key": key, "video_id": key, **{k: [f"{h:016x}" for h in v] for k, v in texts.items()}}


def test_most_frames_make_a_duplicate_as_they_are_or_mirrored():
  rng = np.random.default_rng(0)
  one, two, three, *other = (int(n) for n in rng.integers(0, 2**63, 9))
  first = clip("a", [one, two, three], other[:3])
  like = {
    "b": clip("b", [one, *other[3:5]], other[:3]),  # one frame, such as a title card
    "c": clip("c", [one, two, other[3]], other[:3]),
    "d": clip("d", other[3:6], [one, two, three]),
  }
  dropped = {key: survey([first, row], {}, 8) for key, row in like.items()}
  assert {key: list(drop) for key, drop in dropped.items()} == {"b": [], "c": ["c"], "d": ["d"]}
  pictures = list(np.random.default_rng(1).integers(0, 255, (4, 16, 16, 3)).astype(np.uint8))
  looks = {"a": pictures[:3], "c": [pictures[0], pictures[3], pictures[3]]}
  assert survey([first, like["c"]], {}, 8, looks=looks.get) == {}  # one of two looks like it
  looks["c"][1] = pictures[1]
  assert list(survey([first, like["c"]], {}, 8, looks=looks.get)) == ["c"]
