"""Perception-Test, multiple-choice video QA: mc_question_*.json and a folder of videos.

    DIR/mc_question_valid.json (or _test.json, whose answers are hidden)
    DIR/videos/<video_id>.mp4

Format and prompt: videorefer/eval/inference_video_mcqa_perception_test_mcqa.py.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from data_pipes.errors import InputError
from vr_jax.evaluation.answers import FALLBACK, without_answer
from vr_jax.evaluation.benchmark import Benchmark, Row, Source, in_videos, one_file
from vr_jax.evaluation.benchmarks.mvbench import multiple_choice_prompt
from vr_jax.evaluation.items import Item, Prediction
from vr_jax.evaluation.reading.text import letter_at
from vr_jax.evaluation.scoring.choice import CHOICE

ACCEPTED = "mc_question_*.json, {video_id: {metadata, mc_question: [...]}}"


def read(source: Source) -> list[Item]:
  """The questions in the file's order; an id is "<video>/<question>", the truth None if hidden."""
  (path,) = source.files
  try:
    videos = json.loads(path.read_text(encoding="utf-8"))
  except (UnicodeDecodeError, json.JSONDecodeError) as error:
    raise InputError(f"{path}: found {error}; accepted: {ACCEPTED}") from None
  if not isinstance(videos, dict):
    raise InputError(f"{path}: found {type(videos).__name__}; accepted: {ACCEPTED}")
  return [
    _item(question, video, f"{path}: {video}, question {i}")
    for video, entry in videos.items()
    for i, question in enumerate(_questions(entry, f"{path}: {video}"))
  ]


def _questions(entry: Any, where: str) -> list[Any]:
  if not isinstance(entry, dict) or not isinstance(entry.get("mc_question"), list):
    raise InputError(f"{where}: no list 'mc_question'; accepted: {ACCEPTED}")
  return entry["mc_question"]


def _item(question: Any, video: str, where: str) -> Item:
  missing = [key for key in ("id", "question", "options") if key not in question]
  if missing:
    raise InputError(f"{where}: no key {missing[0]!r}; accepted: id, question, options, answer_id")
  options = tuple(question["options"])
  answer = question.get("answer_id")
  if answer is not None and not 0 <= int(answer) < len(options):
    raise InputError(f"{where}: answer_id {answer}; accepted: 0 to {len(options) - 1}")
  tags = question.get("tag") or ()
  return Item(
    id=f"{video}/{question['id']}",
    where=where,
    video=f"{video}.mp4",
    bare_question=question["question"],
    type=str(question.get("area") or ""),
    truth=None if answer is None else f"({letter_at(int(answer))}) {options[int(answer)]}",
    options=options,
    slices={
      "reasoning": str(question.get("reasoning") or ""),
      "tag": ", ".join(tags) if isinstance(tags, list) else str(tags),
    },
  )


def perception_index(prediction: str, options: Sequence[str]) -> int:
  """The first of A, B, C anywhere, else an option's exact text; there are three options."""
  text = without_answer(prediction)
  match = re.search(r"[A-C]", text)
  if match:
    return ord(match[0]) - ord("A")
  lowered = [o.lower() for o in options]
  return lowered.index(text.lower()) if text.lower() in lowered else FALLBACK


def submission(predictions: Sequence[Prediction]) -> str:
  """The file for the challenge's server; where nothing can be read it says C, as published.

  {"video_id": [{"id", "answer_id", "answer"}, ...], ...}
  """
  videos: dict[str, list[dict[str, Any]]] = {}
  for p in predictions:
    if p.pred is None:
      continue
    video, _, number = str(p.id).rpartition("/")
    index = perception_index(p.pred, p.options)
    entry = {"id": int(number), "answer_id": index, "answer": p.options[index]}
    videos.setdefault(video, []).append(entry)
  return json.dumps(videos, ensure_ascii=False)


PERCEPTION_TEST = Benchmark(
  name="perception-test",
  title="Perception-Test",
  kind=CHOICE,
  split="",
  files=one_file("mc_question_*.json"),
  root=in_videos,
  read=read,
  prompt=multiple_choice_prompt,
  export=lambda predictions: {"submission.json": submission(predictions)},
  new_tokens=64,
  parse=lambda text, options: letter_at(perception_index(text, options)),
  paper=(Row("VideoRefer-7B", {"All": 0.563}),),
  is_published=lambda items: False,  # the paper's is of the test split, whose answers are hidden
)
