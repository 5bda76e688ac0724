"""Scores of DLC-Bench: a judge answers questions about an object from the description alone.

Source: eval_model_outputs.py of NVlabs/describe-anything, which PixelRefer's evaluation/dam copies.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from data_pipes.errors import InputError
from vr_jax.evaluation.benchmark import Benchmark, Kind
from vr_jax.evaluation.items import Prediction, counts, item_record
from vr_jax.evaluation.metrics import BY_VIDEO, Metric
from vr_jax.evaluation.results import Result
from vr_jax.evaluation.scoring.descriptions import judge_of, progress_of
from vr_jax.evaluation.scoring.judge import Reply, Sampling
from vr_jax.evaluation.scoring.settings import ScoreSettings
from vr_jax.evaluation.scoring.statistics import bootstrap_mean_of_means, cluster_bootstrap

PROMPT = """\
Answer the multiple-choice question based on the text description of an object in an image. You \
need to follow these rules:
1. Do not output any reasoning. Do not perform correction. Please output exactly one answer from \
the choices for each question. Do not repeat the question.
2. There is no need for exact matching. Please choose the closest option based on the description.

The description is:
{description}

From the description above, please answer the following question with one of the choices:
{question}
"""
SAMPLING = Sampling(temperature=0.0, top_p=1.0, max_tokens=300)
TYPES = ("positive", "negative")
_LETTERS = "abcde"
_AGAIN = "of a similar type? Again, It does not have to be an exact match."


@dataclasses.dataclass(frozen=True)
class Question:
  """One question: its choices with their scores, and its type, one of TYPES or "recognition"."""

  text: str
  choices: tuple[tuple[str, float], ...]
  type: str

  def prompt(self, description: str) -> str:
    lines = [self.text, *(f"{x}. {c}" for x, (c, _) in zip("ABCDE", self.choices, strict=False))]
    return PROMPT.format(description=description, question="\n".join(lines).strip())

  def score(self, reply: str) -> float:
    """Of the choice that the reply names; 0 where it names none."""
    index = choice_of(reply, [choice for choice, _ in self.choices])
    return 0.0 if index is None else self.choices[index][1]


def questions_of(truth: str) -> list[Question]:
  """An item's questions: first whether the description is of this kind of object at all."""
  content = json.loads(truth)
  name = content["class"]
  kind = (
    f"objects in the description are {name} or objects"
    if is_plural(name)
    else f"object in the description is {with_article(name)} or an object"
  )
  known = Question(f"Is it likely that the {kind} {_AGAIN}", (("Yes", 1), ("No", 0)), "recognition")
  rest = [
    Question(q["question"], tuple((text, float(score)) for text, score in q["choices"]), q["type"])
    for q in content["questions"]
  ]
  return [known, *rest]


def is_plural(name: str) -> bool:
  """A plain rule for names of things (the published script takes the package inflect)."""
  word = name.split()[-1].lower() if name.split() else ""
  return word.endswith("s") and not word.endswith(("ss", "us", "is")) and word != "bus"


def with_article(name: str) -> str:
  """`a` or `an` by the first letter, which names of things rarely contradict."""
  return f"{'an' if name[:1].lower() in set('aeiou') else 'a'} {name}"


def choice_of(reply: str, choices: Sequence[str]) -> int | None:
  """The choice that a reply names, as the published script reads it; None where it names none."""
  text = reply.strip().lower()
  options = [choice.strip().lower() for choice in choices]
  for i, option in enumerate(options):
    if text in (option, f"{_LETTERS[i]}. {option}", _LETTERS[i]):
      return i
  inside = [
    (text.index(option), len(option), i) for i, option in enumerate(options) if option in text
  ]
  if len(inside) == 1:
    return inside[0][2]
  letter = _LETTERS.find(text[0]) if text else -1
  if letter >= 0 and text[1:2] == ".":
    return letter if letter < len(options) else None
  if inside:  # the last one named, the longest of those at one place
    return max(inside, key=lambda place: place[:2])[2]
  around = [(len(option), -i) for i, option in enumerate(options) if text and text in option]
  if around:
    return -max(around)[1]
  return letter if 0 <= letter < len(options) and text[1:2] in ("", "\n") else None


def _score(
  benchmark: Benchmark,
  predictions: Sequence[Prediction],
  run: Mapping[str, Any],
  settings: ScoreSettings,
) -> Result:
  judge = judge_of(settings.judge, settings.source, settings.home, settings.parser, benchmark.title)
  if settings.judge.temperature is None:
    judge.sampling = SAMPLING
  answered = [p for p in predictions if p.pred is not None]
  if not answered:
    raise InputError("no descriptions to score; at least one is needed")
  questions = {p.id: questions_of(p.truth or "") for p in answered}
  asks = [
    (f"{p.id}/{i}", [{"role": "user", "content": question.prompt(p.pred or "")}])
    for p in answered
    for i, question in enumerate(questions[p.id])
  ]
  replies = dict(
    zip((name for name, _ in asks), judge.replies(asks, progress_of(settings)), strict=True)
  )
  items, scored = [], {}
  for p in predictions:
    given = [replies[f"{p.id}/{i}"] for i in range(len(questions.get(p.id, ())))]
    problem = next((f"judge: {r.error}" for r in given if r.text is None), None)
    means = item_means(questions[p.id], given) if given and problem is None else None
    if means:
      scored[p.id] = means
    items.append(
      item_record(
        p,
        parsed=means,
        score=fmean(means.values()) if means else None,
        problem=problem,
        replies=[r.text for r in given],
      )
    )
  failed = len(answered) - len(scored)
  numbers = counts(predictions) | {"judged": len(scored), "judge_failed": failed}
  metrics = _metrics([p for p in answered if p.id in scored], scored, len(predictions))
  facts = judge.facts() | {"prompt": "published", **dataclasses.asdict(judge.sampling)}
  return Result(benchmark.name, run, settings.parser, metrics, numbers, items, [], facts)


def item_means(questions: Sequence[Question], replies: Sequence[Reply]) -> dict[str, float]:
  """Mean score of an item's questions by type.

  Where the description is of another kind of object, no question counts for more than 0.
  """
  values: dict[str, list[float]] = {}
  known = questions[0].score(replies[0].text or "") > 0
  for question, reply in zip(questions[1:], replies[1:], strict=True):
    score = question.score(reply.text or "")
    values.setdefault(question.type, []).append(score if known else min(0.0, score))
  return {name: fmean(values[name]) for name in TYPES if name in values}


def _metrics(
  judged: Sequence[Prediction], scored: Mapping[Any, Mapping[str, float]], total: int
) -> list[Metric]:
  """Means over the items that have questions of a type, and the mean of both."""
  metrics, columns, means = [], [], []
  for name in TYPES:
    kept = [p for p in judged if name in scored[p.id]]
    values, images = [scored[p.id][name] for p in kept], [p.video for p in kept]
    fields: dict[str, Any] = {"name": "mean", "slice": name.capitalize(), "unit": "share"}
    fields |= {"n": len(kept), "n_failed": total - len(judged)}
    if not kept:
      metrics.append(Metric(value=None, note="no item has a score", **fields))
      continue
    interval = cluster_bootstrap(values, images)
    metrics.append(Metric.with_interval(interval, BY_VIDEO, value=fmean(values), **fields))
    columns.append((values, images))
    means.append(fmean(values))
  fields = {"name": "mean", "slice": "Average", "unit": "share", "n": len(judged)}
  fields["n_failed"] = total - len(judged)
  if len(means) < len(TYPES):
    metrics.append(Metric(value=None, note="a type of question has no scores", **fields))
  else:
    interval = bootstrap_mean_of_means(columns)
    metrics.append(Metric.with_interval(interval, BY_VIDEO, value=fmean(means), **fields))
  return metrics


QUESTIONED = Kind(
  name="questioned",
  score=_score,
  headline=("mean", "Average"),
  columns="mean",
  unit="Shares of the highest score",
  axis=("0", "20", "40", "60", "80", "100 %"),
  bars_title="Mean score by type of question",
  bars_text="By the judge's choices, over the items that it answered; wrong details count below 0.",
  item_scores=lambda record: [(n, f"{v:g}") for n, v in (record["parsed"] or {}).items()],
  item_mark="Mean {:.2f}".format,
)
