"""Evaluations while a run trains: held-out loss, benchmarks, and the end that they may bring."""

import itertools
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from data_pipes.errors import InputError
from vr_jax.checkpoint import load_params
from vr_jax.compiling import compilations
from vr_jax.configs import base_config, from_json, load_config, to_json
from vr_jax.interop import videorefer as published
from vr_jax.models.videorefer import VideoRefer
from vr_jax.sharding import make_mesh
from vr_jax.training import evals as evals_module
from vr_jax.training.batches import Kept
from vr_jax.training.evals import EarlyStop, is_better, mean_of_ratio
from vr_jax.training.loop import train
from vr_jax.training.loss import model_loss
from vr_jax.training.metrics import read_metrics
from vr_jax.training.questions import Questions
from vr_jax.training.schedule import split_by_table
from vr_jax.training.step import TrainState
from vr_jax.training.videorefer_task import videorefer_task

TESTS = Path(__file__).parent
CONFIG = str(TESTS / "toy_config.py")
HELD_OUT = {"files": (str(TESTS / "toy_held_out.txt"),), "every": 4, "limit": 21}


def config_of(evals, *overrides, **early_stop):
  config = load_config(CONFIG, overrides).unlock()
  config.evals = evals
  config.early_stop.update(early_stop)
  return from_json(to_json(config))


def evaluated(workdir):
  return {
    line["step"]: {k: v for k, v in line.items() if k.startswith("eval/")}
    for line in read_metrics(workdir)
    if any(k.startswith("eval/") for k in line)
  }


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
  """A finished run; no evaluation but the first compiles."""
  workdir, counts = tmp_path_factory.mktemp("straight"), []
  run = evals_module.HeldOut.__call__

  def counted(self, state):
    before = compilations()
    values = run(self, state)
    counts.append(compilations() - before)
    return values

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(evals_module.HeldOut, "__call__", counted)
    assert train(config_of({"held_out": HELD_OUT}, "log_steps=3"), workdir).finished
  assert len(counts) == 3
  assert counts[1:] == [0, 0]
  return workdir


def test_the_loss_on_held_out_files_is_reported_when_due_with_n_and_interval(straight):
  lines = evaluated(straight)
  assert list(lines) == [4, 8, 10]  # every 4, and after the last
  for values in lines.values():
    assert values["eval/held_out/n"] == 21
    assert values["eval/held_out/loss_low"] < values["eval/held_out/loss"]
    assert values["eval/held_out/loss"] < values["eval/held_out/loss_high"]
  assert lines[10]["eval/held_out/loss"] < lines[4]["eval/held_out/loss"]
  assert all(line["eval_seconds"] > 0 for line in read_metrics(straight) if line["step"] in lines)


def test_evaluating_changes_nothing_and_the_log_has_means(straight, tmp_path):
  assert train(load_config(CONFIG, ["log_steps=1"]), tmp_path / "none").finished
  jax.tree.map(np.testing.assert_array_equal, load_params(straight), load_params(tmp_path / "none"))
  # The log has the means over the steps since its last line, an evaluation's line among them.
  losses = {line["step"]: line["loss"] for line in read_metrics(tmp_path / "none")}
  ends, means = [0, 1, 3, 4, 6, 8, 9, 10], {m["step"]: m["loss"] for m in read_metrics(straight)}
  for first, last in itertools.pairwise(ends):
    expected = np.mean([losses[step] for step in range(first + 1, last + 1)])
    np.testing.assert_allclose(means[last], expected, rtol=1e-6)


def test_a_run_stops_when_its_metric_is_not_getting_better_and_stays_stopped(tmp_path, monkeypatch):
  given = iter([3.0, 2.0, 2.5, 2.0, 1.0])
  loss = lambda self, state: {"loss": next(given)}  # noqa: E731
  monkeypatch.setattr(evals_module.HeldOut, "__call__", loss)
  evals = {"held_out": HELD_OUT | {"every": 2}}
  stopping = {"metric": "eval/held_out/loss", "patience": 2}
  monkeypatch.setenv("TOY_SIGNAL", "SIGTERM:5")  # between the best and the end
  assert not train(config_of(evals, **stopping), tmp_path).finished
  monkeypatch.delenv("TOY_SIGNAL")
  result = train(config_of(evals, **stopping), tmp_path)
  assert (result.step, result.finished) == (8, True)
  assert (tmp_path / "checkpoints" / "8").is_dir()
  assert train(config_of(evals, **stopping), tmp_path)[:2] == (8, True)
  # With more patience it goes on.
  assert train(config_of(evals, **stopping | {"patience": 4}), tmp_path)[:2] == (10, True)
  assert [line["eval/held_out/loss"] for line in evaluated(tmp_path).values()] == [3, 2, 2.5, 2, 1]


def test_early_stop_counts_evaluations_of_its_own_metric():
  stop = EarlyStop("eval/bench/accuracy", 2)
  for value in (0.5, 0.6, 0.55, 0.6):
    stop.add({"eval/other/accuracy": 0.9})
    assert not stop.reached
    stop.add({"eval/bench/accuracy": value, "eval/bench/n": 20})
  assert stop.reached
  assert is_better("eval/held_out/loss", 1.0, 2.0)
  with pytest.raises(InputError, match="metric='eval/bench/macro': accepted: eval/bench/accuracy"):
    EarlyStop("eval/bench/macro", 2).add({"eval/bench/accuracy": 0.5})


def test_the_interval_of_a_loss_holds_the_mean_of_all_rows_about_as_often_as_it_says():
  rng = np.random.default_rng(0)
  weights = rng.integers(1, 30, 20_000).astype(float)
  sums = weights * rng.gamma(2.0, 0.5, 20_000)
  truth = sums.sum() / weights.sum()
  parts = np.split(np.arange(20_000), 200)
  ends = [mean_of_ratio(sums[part], weights[part]) for part in parts]
  held = np.mean([e["loss_low"] < truth < e["loss_high"] for e in ends])
  assert 0.88 < held <= 1.0
  assert mean_of_ratio(np.array([4.0, 0.0]), np.array([2.0, 0.0])) == {"loss": 2.0, "n": 1}


def test_few_rows_are_read_once_and_many_each_time(monkeypatch):
  reads = []

  def read():
    reads.append(1)
    yield from ({"tokens": np.zeros(8, np.uint8)} for _ in range(4))

  for room, count in ((32, 1), (31, 3)):
    monkeypatch.setattr("vr_jax.training.batches.HELD", room)
    reads.clear()
    kept = Kept(read)
    assert [len(list(kept)) for _ in range(3)] == [4, 4, 4]
    assert len(reads) == count


@pytest.mark.parametrize(
  ("evals", "message"),
  [
    ({"a": {"every": 2}}, "evals.a: expected one of files .* and benchmark"),
    ({"a": {"files": ("x",), "benchmark": "bench-q", "every": 2}}, "expected one of files"),
    ({"a": {"files": ("x",)}}, "evals.a.every=None: accepted: a number of steps"),
    ({"a": {"files": ("x",), "every": 0}}, "evals.a.every=0"),
    ({"a": {"files": ("x",), "every": 2, "mode": "multi"}}, "evals.a.mode is not known"),
    ({"a": {"benchmark": "bench-q", "every": 2}}, "evals.a.data=None"),
    ({"a": {"benchmark": "bench-q", "data": "d", "every": 2, "by": "luck"}}, "by='luck': accepted"),
    ({"a": {"benchmark": "bench-q", "data": "d", "evry": 2, "every": 2}}, "did you mean 'every'"),
    ({"a/b": {"files": ("x",), "every": 2}}, "expected a name"),
    ({"a": 3}, "expected a name"),
    ({"a": {"benchmark": "bench-q", "data": "d", "every": 2}}, "a: the task's model answers no"),
  ],
)
def test_entries_are_checked_before_the_first_step(evals, message, tmp_path):
  with pytest.raises(InputError, match=message):
    train(config_of(evals), tmp_path)
  assert not (tmp_path / "metrics.jsonl").exists()


def test_entries_may_be_given_and_changed_on_the_command_line(tmp_path):
  config = load_config(
    CONFIG,
    [
      "config.evals={'a': {'files': ('~/x.json',), 'every': 4}}",
      "config.evals.a.every=7",
      "config.evals.b.benchmark=bench-q",
      "config.evals.b.data=d",
      "config.evals.b.every=2",
      "early_stop.metric=eval/a/loss",
    ],
  )
  assert config.evals.a.every == 7
  assert not config.evals.a["files"][0].startswith("~")
  assert dict(config.evals.b) == {"benchmark": "bench-q", "data": "d", "every": 2}
  with pytest.raises(InputError, match=r"early_stop.metric='eval/c/loss': accepted: .*there are n"):
    load_config(CONFIG, ["early_stop.metric=eval/c/loss"])


# --- A benchmark ------------------------------------------------------------------------------


@pytest.fixture
def asked(golden, tmp_path):
  """Puts the golden questions to the tiny published checkpoint: (questions, state, mesh)."""
  source = published.load(golden / "tiny_videorefer_qwen2")
  folder = tmp_path / "data"
  folder.mkdir()
  shutil.copy(golden / "data" / "bench_q.json", folder)
  for name in ("clip_dir", "clip_mp4.mp4"):
    (folder / name).symlink_to(golden / "media" / name)
  config = base_config()
  config.model_name = None
  config.model_init = (("", str(golden / "tiny_videorefer_qwen2")),)
  config.model = (("num_frames", 8),)
  config.input.files = (str(golden / "data" / "train.json"),)
  config.input.media = str(golden / "media")
  config.input.mask_rule = "published"
  train, frozen = split_by_table(source.params, (("img/.*", None), (".*", {})))
  state = TrainState(np.int32(0), train, frozen, {})
  mesh = make_mesh(config.mesh, jax.devices()[:1])

  def ask(**options):
    options = {"benchmark": "bench-q", "data": str(folder), "every": 1, "new_tokens": 16} | options
    with jax.set_mesh(mesh):
      return Questions(config, videorefer_task(config), mesh, 4, ConfigDict(options)), state, mesh

  return ask


def test_a_benchmark_is_answered_as_the_published_scripts_answer_it(asked, golden, monkeypatch):
  recorded = json.loads((golden / "json" / "bench_inference.json").read_text())["Q"]["single"]
  questions, state, mesh = asked(mode="single")
  answers = []
  scores = questions._scores
  monkeypatch.setattr(questions, "_scores", lambda p: (answers.append(p), scores(p))[1])
  with jax.set_mesh(mesh):
    values = questions(state)
    before = compilations()
    assert questions(state) == values
  assert compilations() == before
  expected = [r["output_record"]["pred"] for r in recorded]
  assert [p.pred for p in answers[0]] == [text.strip() for text in expected]
  assert values["n"] == values["accuracy_n"] == 4
  assert values["accuracy_low"] <= values["accuracy"] <= values["accuracy_high"]


@pytest.mark.slow
def test_by_likelihood_the_option_counts_whose_label_the_model_finds_likeliest(asked, monkeypatch):
  questions, state, mesh = asked(by="likelihood", limit=2)
  answers = []
  monkeypatch.setattr(questions, "_scores", lambda p: answers.extend(p) or {})
  (rows,) = questions._read()
  loss, params = jax.jit(model_loss(VideoRefer(questions._cfg))), state.params()
  with jax.set_mesh(mesh):
    questions(state)
  (b,) = np.flatnonzero(rows["number"] == 0)
  for label, nats in zip(rows["options"][b], answers[0].likelihoods, strict=False):
    row = {k: v[[b]].copy() for k, v in rows.items() if k not in ("number", "readable", "options")}
    end, ids = int(row["valid"].sum()), label[label >= 0]
    row = {k: np.pad(v, ((0, 0), (0, 8))) if k == "tokens" else v for k, v in row.items()}
    for name, fill in (("visual", -1), ("valid", False), ("supervised", False)):
      row[name] = np.pad(row[name], ((0, 0), (0, 8)), constant_values=fill)
    for name, fill in (("tokens", ids), ("valid", True), ("supervised", True)):
      row[name][0, end : end + len(ids)] = fill
    np.testing.assert_allclose(-loss(params, row).sum, nats, rtol=1e-4)
