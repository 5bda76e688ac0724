"""MVBench: twenty tasks of video QA, a JSON file each, on the videos of a dozen data sets.

    DIR/json/action_sequence.json ...
    DIR/video/star/Charades_v1_480/... ...

Format and prompt: videorefer/eval/inference_video_mcqa_mvbench.py.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipes.bench_prompts import multiple_choice_prompt
from data_pipes.errors import InputError
from data_pipes.records import read_items
from vr_jax.evaluation.answers import mvbench_index
from vr_jax.evaluation.items import Item, Prediction

# Task -> folder of its media; the file is the task's name in lower case with underscores.
TASKS = {
  "Action Sequence": "star/Charades_v1_480",
  "Action Prediction": "star/Charades_v1_480",
  "Action Antonym": "ssv2_video",
  "Fine-grained Action": "Moments_in_Time_Raw/videos",
  "Unexpected Action": "FunQA_test/test",
  "Object Existence": "clevrer/video_validation",
  "Object Interaction": "star/Charades_v1_480",
  "Object Shuffle": "perception/videos",
  "Moving Direction": "clevrer/video_validation",
  "Action Localization": "sta/sta_video",
  "Scene Transition": "scene_qa/video",
  "Action Count": "perception/videos",
  "Moving Count": "clevrer/video_validation",
  "Moving Attribute": "clevrer/video_validation",
  "State Change": "perception/videos",
  "Fine-grained Pose": "nturgbd",
  "Character Order": "perception/videos",
  "Egocentric Navigation": "vlnqa",
  "Episodic Reasoning": "tvqa/frames_fps3_hq",
  "Counterfactual Inference": "clevrer/video_validation",
}
# Only these take the item's start and end; elsewhere upstream ignores them.
BOUNDED = {
  "Action Sequence",
  "Action Prediction",
  "Object Interaction",
  "Action Localization",
  "Episodic Reasoning",
}


_KEYS = ("video", "question", "candidates", "answer")


def task_file(task: str) -> str:
  return f"{task.lower().replace(' ', '_').replace('-', '_')}.json"


def read(folder: Path) -> list[Item]:
  """The items of every task whose file is in the folder; ids are "<task>/<number>".

  Raises:
    InputError: a task's file is absent (all twenty make the average), or an item is malformed.
  """
  absent = [task_file(task) for task in TASKS if not (folder / task_file(task)).is_file()]
  if absent:
    raise InputError(
      f"{folder}: {len(absent)} of {len(TASKS)} task files are absent, the first {absent[0]}; "
      "accepted: all twenty"
    )
  return [
    _item(item, task, i, f"{folder / task_file(task)}: item {i}")
    for task in TASKS
    for i, item in enumerate(read_items(folder / task_file(task)))
  ]


def _item(item: Any, task: str, number: int, where: str) -> Item:
  missing = [key for key in _KEYS if key not in item]
  if missing:
    raise InputError(f"{where}: no key {missing[0]!r}; accepted: {', '.join(_KEYS)}")
  options = tuple(item["candidates"])
  truths = [i for i, option in enumerate(options) if option == item["answer"]]
  if not truths:
    raise InputError(f"{where}: answer {item['answer']!r} is none of the candidates {options}")
  seconds = None
  if task in BOUNDED and item.get("start") is not None and item.get("end") is not None:
    seconds = float(item["start"]), float(item["end"])
  return Item(
    id=f"{task}/{number}",
    where=where,
    video=f"{TASKS[task]}/{item['video']}",
    question=multiple_choice_prompt(item["question"], options),
    asked=item["question"],
    type=task,
    truth=f"({chr(ord('A') + truths[-1])}) {item['answer']}",  # of equal candidates the last
    options=options,
    seconds=seconds,
  )


def published_lines(predictions: Sequence[Prediction]) -> str:
  """JSONL {vid, task_type, pred, gt}: indices, option C where nothing was understood."""
  lines = []
  for p in predictions:
    if p.pred is not None:
      gt = ord((p.truth or "")[1]) - ord("A")
      pred = mvbench_index(p.pred, p.options)
      lines.append(json.dumps({"vid": p.video, "task_type": p.type, "pred": pred, "gt": gt}))
  return "".join(f"{line}\n" for line in lines)
