"""MVBench: twenty tasks of video QA, a JSON file each, on the videos of a dozen data sets.

    DIR/json/action_sequence.json ...
    DIR/video/star/Charades_v1_480/... ...

Format and prompt: videorefer/eval/inference_video_mcqa_mvbench.py.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipes.errors import InputError
from data_pipes.json_items import read_items
from data_pipes.prompts import LETTER_ONLY
from vr_jax.evaluation.answers import FALLBACK, without_answer
from vr_jax.evaluation.benchmark import Benchmark, Published, Row, Source
from vr_jax.evaluation.items import Item, Prediction
from vr_jax.evaluation.reading.text import letter_at
from vr_jax.evaluation.scoring.choice import CHOICE

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


def task_files(data: Path) -> list[Path]:
  """The file of every task, in the order of TASKS.

  Raises:
    InputError: one is absent (all twenty make the average).
  """
  folder = data if data.is_dir() else data.parent
  folder = folder / "json" if (folder / "json").is_dir() else folder
  files = [folder / task_file(task) for task in TASKS]
  absent = [file.name for file in files if not file.is_file()]
  if absent:
    raise InputError(
      f"{folder}: {len(absent)} of {len(TASKS)} task files are absent, the first {absent[0]}; "
      "accepted: all twenty"
    )
  return files


def read(source: Source) -> list[Item]:
  """The items of every task; ids are "<task>/<number>"."""
  return [
    _item(item, task, i, f"{file}: item {i}")
    for task, file in zip(TASKS, source.files, strict=True)
    for i, item in enumerate(read_items(file))
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
    bare_question=item["question"],
    type=task,
    truth=f"({letter_at(truths[-1])}) {item['answer']}",  # of equal candidates the last
    options=options,
    seconds=seconds,
  )


def multiple_choice_prompt(question: str, options: Sequence[str]) -> str:
  """The question of MVBench and Perception-Test; `options` are bare texts, any number of them."""
  lines = "".join(f"({letter_at(i)}) {option}\n" for i, option in enumerate(options))
  return f"Question: {question}\nOptions:\n{lines}{LETTER_ONLY} and only give the best option."


def mvbench_index(prediction: str, options: Sequence[str]) -> int:
  """The first capital within the options' letters wherever it stands ("A man ..." is A).

  "A," with its comma counts as nothing, as published.
  """
  text = without_answer(prediction)
  last = letter_at(len(options) - 1)
  match = re.search(rf"[\(, ]*[A-{last}][\), ]*", text)
  if match:
    letter = match[0].strip().strip("()")
    return ord(letter) - ord("A") if len(letter) == 1 else FALLBACK
  return next((i for i, o in enumerate(options) if o.lower() in text.lower()), FALLBACK)


def _published_prediction(record: Mapping[str, Any], index: int) -> Iterator[Prediction]:
  pred, truth = (f"({letter_at(int(record[key]))})" for key in ("pred", "gt"))
  yield Prediction(index, str(record["vid"]), pred, truth, str(record["task_type"]))


def published_lines(predictions: Sequence[Prediction]) -> str:
  """JSONL {vid, task_type, pred, gt}: indices, option C where nothing was understood."""
  lines = []
  for p in predictions:
    if p.pred is not None:
      gt = ord((p.truth or "")[1]) - ord("A")
      pred = mvbench_index(p.pred, p.options)
      lines.append(json.dumps({"vid": p.video, "task_type": p.type, "pred": pred, "gt": gt}))
  return "".join(f"{line}\n" for line in lines)


MVBENCH = Benchmark(
  name="mvbench",
  title="MVBench",
  kind=CHOICE,
  files=task_files,
  root=lambda folder: folder / "video",
  read=read,
  prompt=multiple_choice_prompt,
  export=lambda predictions: {"published.jsonl": published_lines(predictions)},
  new_tokens=64,
  published=Published(("vid", "task_type", "pred", "gt"), _published_prediction),
  parse=lambda text, options: letter_at(mvbench_index(text, options)),
  paper=(Row("VideoRefer-7B", {"All": 0.596}),),
  is_published=lambda items: list(Counter(i["type"] for i in items).values()) == [200] * 20,
)
