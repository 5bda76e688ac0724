"""Samples in the published VideoRefer-700K JSON, with where each came from."""

from collections.abc import Mapping, Sequence
from typing import Any

from data_pipes.engine.graph import Item, Outcome, Process, Rejected, digest
from data_pipes.engine.quality.text import fault
from data_pipes.engine.rows import SampleRow
from data_pipes.tokenizer import REGION

SHORT, DETAILED, QA = "short-caption", "detailed-caption", "qa"
FILES = (SHORT, DETAILED, QA)

# Wordings of the request, ours; the one of a sample is drawn by its key.
BRIEF = (
  f"Please describe the object {REGION} in the video in brief.",
  f"Give a short description of {REGION}.",
  f"In a few words, what is {REGION} in this video?",
)
DETAIL = (
  f"Please describe in detail the object {REGION} in the video.",
  f"Describe {REGION} and what happens to it over the video in detail.",
  f"Tell me in detail about {REGION}: its looks and its actions.",
)


def make_assemble(settings: Mapping[str, Any], names: Mapping[str, str]) -> Process:
  """What a path ends with -> samples.

  `names` maps clips, objects, texts, verdicts to the stages that hold them; absent ones are not
  part of the path.
  """
  path = settings["path"]

  def process(item: Item) -> Outcome:
    clip = item.joined[names["clips"]]
    if path == "qa":
      return Outcome([_dialogue_sample(item, clip, names)])
    masks = item.joined[names["objects"]]
    if path == "short":
      if reason := fault(clip["caption"], settings["language"]):
        return Outcome(rejected=[Rejected(item.key, f"caption unfit as a label: {reason}")])
      texts = {SHORT: clip["caption"]}
    else:
      texts = {DETAILED: item.row["detailed"], SHORT: item.row["short"]}
    wordings = {SHORT: BRIEF, DETAILED: DETAIL}
    rows = []
    for file, text in texts.items():
      key = f"{item.key}/{file}"
      question = wordings[file][int(digest([settings["seed"], key]), 16) % len(wordings[file])]
      sample = _item(key, clip, [(f"<video>\n{question}", text)], [masks["masks"]])
      rows.append(SampleRow(key, file, sample, _provenance(key, item, clip, names, [masks])))
    return Outcome(rows)

  return process


def _dialogue_sample(item: Item, clip: Mapping[str, Any], names: Mapping[str, str]) -> SampleRow:
  """All objects are introduced in the first message and spoken of as <object0>, ... after it."""
  row = item.row
  objects = row["objects"]
  given = {f"{clip['key']}/{i}": g["masks"] for i, g in enumerate(clip["given"])}
  marks = ", ".join(f"<object{i}>{REGION}" for i in range(len(objects)))
  verb = "is one object" if len(objects) == 1 else f"are {len(objects)} objects"
  pairs = []
  for q in row["questions"]:
    mentions = [f"<object{i}>" for i in range(len(objects))]
    pairs.append((_fill(q["question"], mentions), _fill(q["answer"], mentions)))
  pairs[0] = (f"<video>\nThere {verb} in the video: {marks}.\n{pairs[0][0]}", pairs[0][1])
  sample = _item(item.key, clip, pairs, [given[key] for key in objects])
  provenance = _provenance(item.key, item, clip, names, [])
  provenance["types"] = [q["type"] for q in row["questions"]]
  return SampleRow(item.key, QA, sample, provenance)


def _fill(text: str, mentions: Sequence[str]) -> str:
  for i, mention in enumerate(mentions):
    text = text.replace(f"{{{i}}}", mention)
  return text


def _item(
  key: str, clip: Mapping[str, Any], pairs: Sequence[tuple[str, str]], masks: Sequence[Mapping]
) -> dict[str, Any]:
  turns = []
  for question, answer in pairs:
    turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
  return {
    "id": key,
    "video": clip["video"],
    "conversations": turns,
    "annotation": [
      {n: {"segmentation": mask} for n, mask in sorted(m.items(), key=lambda nm: int(nm[0]))}
      for m in masks
    ],
    "height": clip["height"],
    "width": clip["width"],
  }


def _provenance(
  key: str,
  item: Item,
  clip: Mapping[str, Any],
  names: Mapping[str, str],
  objects: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
  out: dict[str, Any] = {
    "id": key,
    "source": clip["source"],
    "video_hash": clip["video_id"],
    "source_frames": [clip["start"], clip["end"]],
    "index_space": "presented",
    "agents": {stage: dict(agent) for stage, agent in sorted(item.agents.items())},
    "scores": [o["quality"] for o in objects],
    "prompts": [o["prompt"] for o in objects],
  }
  texts = item.joined.get(names.get("texts", ""))
  if texts:
    out["noun"], out["text_source"] = texts["noun"], texts["source"]
  verdict = item.joined.get(names.get("verdicts", ""))
  if verdict:
    out["review"] = {
      k: verdict[k] for k in ("same_object", "reason", "confidence", "frame", "annotator_text",
                              "region_text")
    }  # fmt: skip
  return out
