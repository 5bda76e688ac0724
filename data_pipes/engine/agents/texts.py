"""The Annotator, the Reviewer and the Refiner, and the gate that texts must pass."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from data_pipes.engine.agents.objects import clip_of, masks_of
from data_pipes.engine.graph import Item, Outcome, Process, Rejected, digest
from data_pipes.engine.quality import text as quality
from data_pipes.engine.roles import (
  QUESTION_TYPES,
  Annotator,
  Claim,
  Described,
  Describer,
  Description,
  Judge,
  Refiner,
)
from data_pipes.engine.rows import CaptionRow, DialogueRow, TextRow, VerdictRow


def make_annotate(
  annotator: Annotator, settings: Mapping[str, Any], clips: str, objects: str | None
) -> Process:
  """GateRow (or NounRow, where `objects` is None: the paper's order) -> TextRow."""

  def process(item: Item) -> Outcome:
    row, clip = item.row, clip_of(item.joined[clips], settings)
    masks = masks_of(item.joined[objects]) if objects else None
    description = annotator.describe(clip, row["noun"], masks)
    text = TextRow(
      key=row["key"],
      clip_id=row["clip_id"],
      noun_id=row["noun_id"] if objects else row["key"],
      noun=row["noun"],
      motion=description.motion.strip(),
      appearance=description.appearance.strip(),
      static=description.static,
      source=description.source,
      facts=dict(description.facts),
    )
    return Outcome([text])

  return process


def make_text_gate(settings: Mapping[str, Any]) -> Process:
  """TextRow -> the same if both texts are fit to use."""

  def process(item: Item) -> Outcome:
    row = TextRow(**item.row)
    if row.static and settings["drop_static"]:
      return Outcome(rejected=[Rejected(row.key, "static: the object does nothing", row)])
    for text in (row.motion, row.appearance):
      if reason := quality.fault(text, settings["language"]):
        return Outcome(rejected=[Rejected(row.key, reason, row)])
    return Outcome([row])

  return process


def described(row: Mapping[str, Any]) -> Described:
  """A TextRow as the Refiner takes it."""
  description = Description(
    row["motion"], row["appearance"], row["static"], row["source"], row["facts"] or {}
  )
  return Described(row["noun"], description)


def make_review(
  describer: Describer,
  judge: Judge,
  settings: Mapping[str, Any],
  names: Mapping[str, str],
) -> Process:
  """A described object -> its verdict; a rejected one is kept with both texts as evidence."""

  def process(item: Item) -> Outcome:
    row, clip = item.row, clip_of(item.joined[names["clips"]], settings)
    text = item.joined.get(names["texts"], row)
    masks = masks_of(item.joined[names["objects"]])
    frame = review_frame(masks, row["key"], settings["seed"])
    annotated = described(text).description.text
    region = describer.region(clip, masks, frame)
    verdict = judge.compare(Claim(clip, row["noun"], annotated, region, masks, frame))
    made = VerdictRow(
      key=row["key"],
      clip_id=row["clip_id"],
      noun_id=row["noun_id"],
      noun=row["noun"],
      same_object=verdict.same_object,
      reason=verdict.reason,
      confidence=float(verdict.confidence),
      annotator_text=annotated,
      region_text=region,
      frame=frame,
    )
    if not verdict.same_object:
      return Outcome(rejected=[Rejected(row["key"], f"reviewer: {verdict.reason}", made)])
    least = settings["review"]["min_confidence"]
    if not max(0.0, least) <= verdict.confidence <= 1.0:  # nor is NaN
      reason = f"reviewer unsure: confidence {verdict.confidence:g}"
      return Outcome(rejected=[Rejected(row["key"], reason, made)])
    return Outcome([made])

  return process


def review_frame(masks: Mapping[int, np.ndarray], key: str, seed: int) -> int:
  """A frame that shows the object well (at least half of its largest area), drawn by its key."""
  areas = {n: int(m.sum()) for n, m in masks.items()}
  good = [n for n in sorted(areas) if areas[n] and 2 * areas[n] >= max(areas.values())]
  return good[int(digest([seed, key]), 16) % len(good)]


def make_caption(
  refiner: Refiner, settings: Mapping[str, Any], names: Mapping[str, str]
) -> Process:
  """VerdictRow -> CaptionRow."""

  def process(item: Item) -> Outcome:
    row, clip = item.row, clip_of(item.joined[names["clips"]], settings)
    caption = refiner.caption(clip, described(item.joined[names["texts"]]))
    made = CaptionRow(row["key"], row["clip_id"], row["noun_id"], caption.detailed, caption.short)
    for text, least in ((caption.detailed, quality.MIN_WORDS), (caption.short, 2)):
      if reason := quality.fault(text, settings["language"], least):
        return Outcome(rejected=[Rejected(row["key"], f"refined {reason}", made)])
    return Outcome([made])

  return process


def make_dialogue(refiner: Refiner, settings: Mapping[str, Any], clips: str) -> Process:
  """All TextRows of a clip -> one DialogueRow."""

  def process(item: Item) -> Outcome:
    clip = clip_of(item.joined[clips], settings)
    rows = item.rows[: settings["max_objects"]]
    questions, rejected = [], []
    for number, q in enumerate(refiner.questions(clip, [described(row) for row in rows])):
      reason = question_fault(q, len(rows), settings["language"])
      if reason:
        rejected.append(Rejected(f"{item.key}#{number}", reason))
      else:
        questions.append({"question": q.question, "answer": q.answer, "type": q.type,
                          "objects": list(q.objects)})  # fmt: skip
    if not questions:
      return Outcome(rejected=[*rejected, Rejected(item.key, "no usable question")])
    keys = [row["key"] for row in rows]
    return Outcome([DialogueRow(item.key, item.key, keys, questions)], rejected)

  return process


def question_fault(question: Any, objects: int, language: str) -> str | None:
  """Why a round of QA is not usable; None if it is."""
  mentioned = {i for i in range(16) if f"{{{i}}}" in question.question}
  if question.type not in QUESTION_TYPES:
    return f"question of no known type: {question.type!r}"
  if not mentioned or mentioned != set(question.objects) or max(mentioned) >= objects:
    return f"question mentions objects that are not there: {question.question[:60]!r}"
  if not question.answer.strip():
    return "question without an answer"
  for text in (question.question, question.answer):
    fault = quality.fault(text, language, 1, objects)
    if fault:
      return f"question {fault}"
  return None
