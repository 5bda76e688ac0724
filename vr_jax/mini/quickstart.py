"""The embedded default, start to end: make the set, train vr-mini, score it, ask, report.

Every step leaves its result in the work directory, and a second call goes on from there:

    W/set/                  videos and annotation files (data_pipes.embedded.make_set)
    W/stage1 ... W/stage3   work directories of `vr train`, configs/mini_stages.py
    W/bench_q_single, bench_q_multi   answers to the held-out questions and their scores
    W/report.html, results.json
"""

import dataclasses
import datetime
import json
import platform
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from data_pipes.embedded.dialogues import DESCRIBE_DETAIL
from data_pipes.embedded.make_set import make_set
from data_pipes.files import write_text
from data_pipes.tokenizer import REGION
from vr_jax.configs import load_config, to_json
from vr_jax.evaluation.benchmarks.registry import benchmark, read
from vr_jax.evaluation.items import Item
from vr_jax.evaluation.pages.gallery import choice_examples, frames_of, spread
from vr_jax.evaluation.pages.page import (
  FreeAnswer,
  LossCurve,
  ObjectSimilarity,
  Report,
  Scored,
  write_report,
)
from vr_jax.evaluation.results import Result
from vr_jax.evaluation.run import Settings, evaluate
from vr_jax.evaluation.score import score
from vr_jax.evaluation.scoring.choice import summary_of
from vr_jax.evaluation.scoring.statistics import Summary
from vr_jax.inference.model import Model
from vr_jax.inference.requests import Request
from vr_jax.loading import load
from vr_jax.training.loop import make_workdir, train
from vr_jax.training.metrics import read_metrics

STAGES = ("1", "2", "2.5", "3")
MODES = {"single": "Single-frame", "multi": "Multi-frame"}
NEW_TOKENS = 24  # more than any answer with options
EXAMPLES = 12
FREE_QUESTION = DESCRIBE_DETAIL


@dataclasses.dataclass(frozen=True)
class Sizes:
  """How much of everything; the defaults took 10 minutes on two cores.

  `steps` are the optimizer steps of each stage, 0 for the config's own.
  """

  train_videos: int = 640
  test_videos: int = 120
  questions: int = 400
  dialogues: int = 2
  steps: tuple[int, int, int, int] = (0, 0, 0, 0)


def run(workdir: Path | str, sizes: Sizes | None = None) -> dict[str, Any]:
  """Does all of it, or what is left of it; returns the results, also in W/results.json.

  The results: `accuracy` by mode, type and "All" (share, n, interval), `chance`, the free
  question's `answer`, `minutes` of each part, and the `report`'s path.
  """
  sizes, workdir = sizes or Sizes(), Path(workdir)
  make_workdir(workdir)
  clock = Clock(workdir / "minutes.json")

  with clock.part("set"):
    say(f"videos, captions and questions -> {workdir / 'set'}")
    data = make_set(
      workdir / "set",
      sizes.train_videos,
      sizes.test_videos,
      sizes.questions,
      sizes.dialogues,
      lambda done, total: (done % 100 and done != total) or say(f"  {done} of {total} videos"),
    )
  init = ""
  for stage, steps in zip(STAGES, sizes.steps, strict=True):
    folder = workdir / f"stage{stage}"
    spec = f"mini_stages:stage={stage},data={data},init={init},steps={steps}"
    with clock.part(f"stage {stage}"):
      say(f"stage {stage} -> {folder}")
      train(load_config(spec), folder)
    init = folder

  model = load(init)
  items = list(read(benchmark("bench-q"), data).items)
  results: dict[str, Result] = {}
  for mode in MODES:
    with clock.part(f"{mode}-frame questions"):
      say(f"{len(items)} held-out questions, {mode}-frame")
      answers = workdir / f"bench_q_{mode}"
      settings = Settings(mode, max_new_tokens=NEW_TOKENS, batch_size=16)
      evaluate(model, "bench-q", data, answers, settings, checkpoint=init)
      results[mode], _ = score("bench-q", answers)
  scored = {mode: summary_of(result) for mode, result in results.items()}

  with clock.part("report"):
    free = ask_freely(model, items, data)
    report = Report(
      checkpoint=f"vr-mini, trained by vr quickstart in {workdir}",
      date=datetime.date.today().isoformat(),
      minutes=clock.total(),
      scored=[Scored(MODES[mode], summary) for mode, summary in scored.items()],
      tokens_per_object=model.cfg.region.tokens,
      curves=list(loss_curves(workdir)),
      examples=choice_examples(results["multi"], items, data, EXAMPLES, MODES["multi"]),
      similarities=[similarity(model, items[i], data) for i in (0, len(items) // 3)],
      free=free,
      provenance={"python": platform.python_version(), "jax": jax.__version__, "parser": "strict"},
      config=to_json(load_config(f"mini_stages:stage=3,data={data}")),
      notes=[
        "vr-mini is a demonstration model: it knows small synthetic videos of moving shapes, "
        "and nothing else."
      ],
    )
    page = write_report(workdir / "report.html", report)
  summary = {
    "accuracy": {mode: accuracies(summary) for mode, summary in scored.items()},
    "chance": 0.25,
    "question": free.question,
    "answer": free.answer,
    "minutes": clock.minutes,
    "report": str(page),
  }
  write_text(workdir / "results.json", json.dumps(summary, indent=2) + "\n")
  for line in summary_lines(scored):
    say(line)
  say(f"{free.question}  {free.answer}")
  say(f"{clock.total():.1f} minutes; report: {page}")
  return summary


def say(text: str) -> None:
  print(text, flush=True)


class Clock:
  """Minutes by part, kept in a file, so that a resumed run reports the time of the whole."""

  def __init__(self, path: Path):
    self._path = path
    self.minutes: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

  def part(self, name: str) -> "Part":
    return Part(self, name)

  def add(self, name: str, seconds: float) -> None:
    self.minutes[name] = self.minutes.get(name, 0.0) + seconds / 60
    write_text(self._path, json.dumps(self.minutes))

  def total(self) -> float:
    return sum(self.minutes.values())


class Part:
  """Context that adds its wall time to a Clock."""

  def __init__(self, clock: Clock, name: str):
    self._clock, self._name = clock, name

  def __enter__(self) -> None:
    self._since = time.perf_counter()

  def __exit__(self, *_) -> None:
    self._clock.add(self._name, time.perf_counter() - self._since)


def accuracies(summary: Summary) -> dict[str, dict[str, float]]:
  return {
    part.name: {
      "accuracy": part.value,
      "n": part.n,
      "low": part.wilson.low,
      "high": part.wilson.high,
    }
    for part in (*summary.types, summary.micro)
  }


def summary_lines(scored: dict[str, Summary]) -> Iterator[str]:
  """The table on the terminal."""
  yield f"{'held-out questions (chance 25 %)':36}" + "".join(f"{mode:>24}" for mode in scored)
  names = [part.name for part in (*next(iter(scored.values())).types,)] + ["All"]
  for name in names:
    cells = ""
    for summary in scored.values():
      part = next(p for p in (*summary.types, summary.micro) if p.name == name)
      cells += f"{part.value:8.1%} [{part.wilson.low:.0%}, {part.wilson.high:.0%}] n={part.n:<4}"
    yield f"  {name:34}{cells}"


def loss_curves(workdir: Path) -> Iterator[LossCurve]:
  for stage in STAGES:
    lines = [x for x in read_metrics(workdir / f"stage{stage}") if x.get("loss") is not None]
    yield LossCurve(
      f"Stage {stage}", [line["step"] for line in lines], [line["loss"] for line in lines]
    )


def similarity(model: Model, item: Item, data: Path) -> ObjectSimilarity:
  """How alike the item's first object looks over time, and where its tokens were cut."""
  request = Request(data / item.video, REGION, annotation=item.masks("multi")[:1])
  ((matrix, segments),) = model.object_similarity(request)
  return ObjectSimilarity(
    name=f"the object of question {item.id}",
    index=0,
    frames=frames_of(item, data, list(item.objects[0])),
    matrix=matrix,
    segments=segments,
  )


def ask_freely(model: Model, items: Sequence[Item], data: Path) -> FreeAnswer:
  """One object of a held-out video, described."""
  item = items[0]
  request = Request(data / item.video, FREE_QUESTION, annotation=item.masks("multi")[:1])
  answer = model.ask_many([request])[0]
  one = dataclasses.replace(item, objects=item.objects[:1])
  return FreeAnswer(frames_of(one, data, spread(item)), FREE_QUESTION, answer.text)
