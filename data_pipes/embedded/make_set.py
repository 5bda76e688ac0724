"""Writes the embedded set: H.264 videos and annotation files in the published format.

W/videos/<seed>.mp4
W/scene_captions.json     stage 1: one caption of the whole video
W/short_captions.json     stage 2: VideoRefer-700K short captions, an object a turn
W/detailed_captions.json  stage 2.5: VideoRefer-700K detailed captions
W/qa.json                 stage 3: VideoRefer-700K QA, most with options
W/pixelrefer_stage1.json  the dialogues of stages 1 to 2.5 in PixelRefer's SFT format
W/pixelrefer_stage2.json  those of stage 3
W/bench_d.json            VideoRefer-Bench-D, held-out videos
W/bench_q.json            VideoRefer-Bench-Q, held-out videos
"""

import json
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from data_pipes.embedded.captions import detailed_caption
from data_pipes.embedded.dialogues import (
  Dialogue,
  caption_dialogue,
  question_dialogue,
  question_text,
  scene_dialogue,
)
from data_pipes.embedded.questions import TYPES, Balance, Choice, candidates
from data_pipes.embedded.render import render, write_video
from data_pipes.embedded.scenes import FRAMES, HEIGHT, WIDTH, Scene, make_scene
from data_pipes.files import write_text
from data_pipes.frame_rules import grid_frames
from data_pipes.masks import encode_mask, string_to_counts
from data_pipes.prompts import Turn
from data_pipes.tokenizer import REGION

TRAIN_SEED, TEST_SEED = 0, 900_000_000  # apart, whatever the number of videos
# Questions of each type in VideoRefer-Bench-Q, in the order of TYPES.
BENCH_SHARES = (236, 255, 253, 142, 114)
SFT = {
  "pixelrefer_stage1": ("scene_captions", "short_captions", "detailed_captions"),
  "pixelrefer_stage2": ("qa",),
}
CLEAR = 0.6  # of its largest visible area: a frame that shows a thing well enough to ask from

Annotation = dict[str, dict]


def make_set(
  folder: Path | str,
  train_videos: int = 800,
  test_videos: int = 120,
  questions: int = 480,
  dialogues: int = 2,
  progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
  """Makes the whole set, the same for the same numbers.

  Args:
    folder: made if absent; a set that is complete there is left as it is.
    train_videos: videos of the training files.
    test_videos: held-out videos; `questions` of Bench-Q are spread over them.
    dialogues: question dialogues of each training video.
    progress: called with the number of videos done and their total.

  Returns the folder.
  """
  folder = Path(folder)
  numbers = [train_videos, test_videos, questions, dialogues]
  done = folder / "made.json"
  if done.is_file() and json.loads(done.read_text()) == numbers:
    return folder
  (folder / "videos").mkdir(parents=True, exist_ok=True)
  seeds = [TRAIN_SEED + i for i in range(train_videos)]
  seeds += [TEST_SEED + i for i in range(test_videos)]
  annotations = {}
  with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
    jobs = pool.map(_make_video, seeds, [str(folder)] * len(seeds), chunksize=8)
    for count, (seed, made) in enumerate(zip(seeds, jobs, strict=True), 1):
      annotations[seed] = made
      progress(count, len(seeds))
  for name, items in _training_items(seeds[:train_videos], annotations, dialogues).items():
    _write(folder / f"{name}.json", items)
  scenes = [make_scene(seed) for seed in seeds[train_videos:]]
  _write(folder / "bench_d.json", bench_d_items(scenes, annotations))
  _write(folder / "bench_q.json", bench_q_items(scenes, annotations, questions))
  _write(done, numbers)
  return folder


def _make_video(seed: int, folder: str) -> list[Annotation]:
  """Writes the video of a seed; the annotation of each thing on the 32-frame grid."""
  frames, masks = render(make_scene(seed))
  write_video(Path(folder) / video_name(seed), frames)
  grid = dict.fromkeys(int(n) for n in grid_frames(FRAMES))
  return [
    {str(n): {"segmentation": encode_mask(mask[n]) if mask[n].any() else None} for n in grid}
    for mask in masks.astype(np.uint8)
  ]


def video_name(seed: int) -> str:
  return f"videos/{seed}.mp4"


def _training_items(seeds, annotations, dialogues) -> dict[str, list[dict]]:
  names = ("scene_captions", "short_captions", "detailed_captions", "qa", *SFT)
  files: dict[str, list[dict]] = {name: [] for name in names}
  balance = Balance(0)
  for seed in seeds:
    scene, rng = make_scene(seed), np.random.default_rng((seed, 2))
    made = {
      "scene_captions": [scene_dialogue(scene)],
      "short_captions": [caption_dialogue(scene, False, rng)],
      "detailed_captions": [caption_dialogue(scene, True, rng)],
      "qa": [question_dialogue(scene, balance, rng, 4, captions=1) for _ in range(dialogues)],
    }
    for name, some in made.items():
      files[name] += [_training_item(seed, d, annotations[seed]) for d in some]
    rng = np.random.default_rng((seed, 7))
    for name, parts in SFT.items():
      some = [d for part in parts for d in made[part]]
      files[name] += [_sft_item(seed, d, annotations[seed], rng) for d in some]
  return files


def _training_item(seed: int, dialogue: Dialogue, annotation: list[Annotation]) -> dict:
  item = _item(seed, dialogue)
  if dialogue.things:
    item["annotation"] = [annotation[i] for i in dialogue.things]
  return item


def _item(seed: int, dialogue: Dialogue) -> dict:
  """What the formats share."""
  return {
    "video": video_name(seed),
    "conversations": [{"from": turn.role, "value": turn.text} for turn in dialogue.turns],
    "height": HEIGHT,
    "width": WIDTH,
  }


def _sft_item(
  seed: int, dialogue: Dialogue, annotation: list[Annotation], rng: np.random.Generator
) -> dict:
  """The same in the SFT format: each mention of a thing has a mask on one frame that shows it.

  A region brings its brackets there.
  """
  masks = []
  for i in dialogue.things:
    frame = clear_frame([annotation[i]], rng)
    assert frame is not None  # one thing alone is seen well where it is seen best
    masks.append({frame: annotation[i][frame]["segmentation"]})
  turns = [Turn(turn.role, turn.text.replace(f"[{REGION}]", REGION)) for turn in dialogue.turns]
  item = _item(seed, Dialogue(tuple(turns), dialogue.things)) | {"video": [video_name(seed)]}
  return item | ({"masks": masks} if masks else {})


def clear_frame(annotations: list[Annotation], rng: np.random.Generator) -> str | None:
  """A frame that shows all of some things well, drawn evenly; None if there is none."""
  areas = np.array(
    [[_area(entry["segmentation"]) for entry in of_thing.values()] for of_thing in annotations]
  )
  well = (areas >= CLEAR * np.maximum(areas.max(1, keepdims=True), 1)).all(0)
  frames = np.flatnonzero(well)
  return list(annotations[0])[int(rng.choice(frames))] if len(frames) else None


def _area(segmentation: dict | None) -> int:
  if segmentation is None:
    return 0
  return int(string_to_counts(segmentation["counts"])[1::2].sum())


def bench_d_items(scenes: list[Scene], annotations: dict[int, list[Annotation]]) -> list[dict]:
  """One thing of each scene with its detailed caption."""
  items: list[dict] = []
  for scene in scenes:
    rng = np.random.default_rng((scene.seed, 4))
    i = int(rng.integers(len(scene.things)))
    annotation = [annotations[scene.seed][i]]
    frame = clear_frame(annotation, rng)
    if frame is not None:
      items.append(
        {
          "id": len(items),
          "video": video_name(scene.seed),
          "caption": detailed_caption(scene, i),
          "frame_idx": frame,
          "annotation": annotation,
        }
      )
  return items


def bench_q_items(
  scenes: list[Scene], annotations: dict[int, list[Annotation]], count: int
) -> list[dict]:
  """`count` questions spread over the scenes, in the published shares of the five types."""
  balance = Balance(1)
  items: list[dict] = []
  questions = [candidates(scene) for scene in scenes]
  used: set[tuple] = set()
  counts = np.diff(np.round(np.cumsum((0, *BENCH_SHARES)) * count / sum(BENCH_SHARES))).astype(int)
  at = 0
  for kind, number in zip(TYPES, counts, strict=True):
    made = tries = 0
    while made < number and tries < 20 * number:
      scene, choices = scenes[at % len(scenes)], questions[at % len(scenes)]
      at, tries = at + 1, tries + 1
      question = balance.pick([q for q in choices if (scene.seed, q) not in used], kind)
      if question is None:
        continue
      used.add((scene.seed, question))
      annotation = [annotations[scene.seed][i] for i in question.things]
      frame = clear_frame(annotation, np.random.default_rng((scene.seed, made)))
      if frame is not None:
        items.append(_bench_q_item(len(items), scene, balance.choose(question), frame, annotation))
        made += 1
  return items


def _bench_q_item(
  number: int, scene: Scene, choice: Choice, frame: str, annotation: list[Annotation]
) -> dict:
  return {
    "id": number,
    "video": video_name(scene.seed),
    "Question": question_text(choice),
    "type": choice.question.kind,
    "options": choice.options,
    "Answer": f"({choice.letter}) {choice.question.answer}",
    "frame_idx": frame,
    "annotation": annotation,
  }


def _write(path: Path, content) -> None:
  write_text(path, json.dumps(content))
