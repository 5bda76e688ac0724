"""VideoMME: 900 videos with three questions each, with or without subtitles.

    DIR/videomme/test-00000-of-00001.parquet (or any .parquet, .json or .jsonl of its rows)
    DIR/videos/<videoID>.mp4
    DIR/subtitles/<videoID>.srt

Format and prompt: videorefer/eval/inference_video_mcqa_videomme.py.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipes.bench_prompts import videomme_prompt
from data_pipes.errors import InputError
from data_pipes.frame_rules import grid_frames
from data_pipes.records import read_items
from data_pipes.video import open_video
from vr_jax.evaluation.answers import videomme_index
from vr_jax.evaluation.items import Item, Prediction

KEYS = (
  "video_id",
  "videoID",
  "duration",
  "domain",
  "sub_category",
  "question_id",
  "task_type",
  "question",
  "options",
  "answer",
)
SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm")


def read(path: Path, media: Path, subtitles: Path | None = None) -> list[Item]:
  """The questions; with `subtitles`, the folder of SRT files, each is asked with its subtitles."""
  return [_item(row, media, subtitles, f"{path}: row {i}") for i, row in enumerate(_rows(path))]


def _rows(path: Path) -> Sequence[Mapping[str, Any]]:
  if path.suffix == ".json":
    return list(read_items(path))
  if path.suffix == ".jsonl":
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
  try:
    import pyarrow.parquet
  except ImportError:
    raise InputError(
      f"{path}: reading Parquet needs the extra [parquet]: pip install 'vr-jax[parquet]'; or give "
      "its rows as .json or .jsonl"
    ) from None
  return pyarrow.parquet.read_table(path).to_pylist()


def _item(row: Mapping[str, Any], media: Path, subtitles: Path | None, where: str) -> Item:
  missing = [key for key in KEYS if key not in row]
  if missing:
    raise InputError(f"{where}: no column {missing[0]!r}; accepted: {', '.join(KEYS)}")
  names = [f"{row['videoID']}{suffix}" for suffix in SUFFIXES]
  options = tuple(row["options"])
  preface = None
  if subtitles is not None:
    preface = functools.partial(_preface, subtitles / f"{row['videoID']}.srt")
  return Item(
    id=row["question_id"],
    where=where,
    video=next((name for name in names if (media / name).exists()), names[0]),
    question=videomme_prompt(row["question"], options),
    asked=row["question"],
    type=row["task_type"],
    truth=row["answer"],
    options=options,
    slices={
      "duration": row["duration"],
      "domain": row["domain"],
      "sub_category": row["sub_category"],
      "video_id": row["video_id"],
    },
    preface=preface,
  )


def _preface(subtitles: Path, video: Path, scene_frames: int) -> str:
  """The prompt's opening: the subtitles of the sampled frames, none if there is no file."""
  text = ""
  if subtitles.is_file():
    shown = open_video(video)
    numbers = grid_frames(len(shown), scene_frames)  # the older rule, as published (B20)
    text = subtitle_text(read_srt(subtitles), [round(1000 * n / shown.fps) for n in numbers])
  return f"This video's subtitles are listed below:\n{text}\n"


def subtitle_text(entries: Sequence[tuple[int, int, str]], times: Sequence[float]) -> str:
  """For each time (ms) the first entry strictly around it, a line each, not de-duplicated."""
  found = (next((text for a, b, text in entries if a < t < b), "") for t in times)
  return "\n".join(text for text in found if text.strip())


_TIME = r"(\d+):(\d\d):(\d\d)[,.](\d{1,3})"


def read_srt(path: Path) -> list[tuple[int, int, str]]:
  """(start ms, end ms, text) of each entry by start; a line break within one is a space."""
  text = path.read_text(encoding="utf-8-sig", errors="replace").replace("\r\n", "\n")
  times = list(re.finditer(rf"(?m)^{_TIME}\s*-->\s*{_TIME}.*$", text))
  entries = []
  for i, match in enumerate(times):
    end = times[i + 1].start() if i + 1 < len(times) else len(text)
    body = text[match.end() : end].strip("\n")
    if i + 1 < len(times):
      body = re.sub(r"\n*\s*\d+\s*\Z", "", body)  # the number of the next entry
    numbers = [int(n) for n in match.groups()]
    start, stop = (
      ((h * 60 + m) * 60 + s) * 1000 + ms for h, m, s, ms in (numbers[:4], numbers[4:])
    )
    body = re.sub(r"<[^>\n]*>", "", body)
    entries.append((start, stop, body.strip().replace("\n", " ").replace("\\N", " ")))
  return sorted(entries, key=lambda entry: entry[:2])


def published_json(predictions: Sequence[Prediction]) -> str:
  """The file of the published scorer: a list of videos with the letters of their questions."""
  videos: dict[str, dict[str, Any]] = {}
  for p in predictions:
    video = videos.setdefault(
      p.video,
      {
        "video_id": p.slices["video_id"],
        "youtube_id": Path(p.video).stem,
        "duration": p.slices["duration"],
        "domain": p.slices["domain"],
        "sub_category": p.slices["sub_category"],
        "missing": False,
        "questions": [],
      },
    )
    video["missing"] |= p.pred is None
    letter = "" if p.pred is None else "ABCD"[videomme_index(p.pred, p.options)]
    video["questions"].append(
      {
        "question_id": p.id,
        "task_type": p.type,
        "question": p.question,
        "choices": list(p.options),
        "answer": p.truth,
        "response": letter,
      }
    )
  return json.dumps(list(videos.values()), ensure_ascii=False, indent=1)
