"""VideoMME: 900 videos with three questions each, with or without subtitles.

    DIR/videomme/test-00000-of-00001.parquet (or any .parquet, .json or .jsonl of its rows)
    DIR/videos/<videoID>.mp4
    DIR/subtitles/<videoID>.srt

Format and prompt: videorefer/eval/inference_video_mcqa_videomme.py.
"""

import codecs
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipes.errors import InputError
from data_pipes.frame_rules import grid_frames
from data_pipes.json_items import read_items
from data_pipes.prompts import LETTER_ONLY
from data_pipes.video import open_video
from vr_jax.evaluation.answers import FALLBACK, without_answer
from vr_jax.evaluation.benchmark import (
  Benchmark,
  Published,
  Row,
  Source,
  in_videos,
  one_file,
)
from vr_jax.evaluation.items import MISSING, Item, Prediction
from vr_jax.evaluation.reading.text import letter_at
from vr_jax.evaluation.scoring.choice import CHOICE

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


_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def read(source: Source) -> list[Item]:
  """The questions; with a folder of SRT files each is asked with its subtitles."""
  (path,) = source.files
  return [_item(row, source, f"{path}: row {i}") for i, row in enumerate(_rows(path))]


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


def _item(row: Mapping[str, Any], source: Source, where: str) -> Item:
  missing = [key for key in KEYS if key not in row]
  if missing:
    raise InputError(f"{where}: no column {missing[0]!r}; accepted: {', '.join(KEYS)}")
  names = [f"{row['videoID']}{suffix}" for suffix in SUFFIXES]
  options = tuple(row["options"])
  preface = None
  if source.subtitles is not None:
    preface = functools.partial(_preface, source.subtitles / f"{row['videoID']}.srt")
  return Item(
    id=row["question_id"],
    where=where,
    video=next((name for name in names if (source.media / name).exists()), names[0]),
    bare_question=row["question"],
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


def videomme_prompt(question: str, choices: Sequence[str]) -> str:
  """The question with its choices, which carry their letters, as in "A. Two."."""
  lines = "".join(f"{choice}\n" for choice in choices)
  return (
    "Select the best answer to the following multiple-choice question based on the video. "
    "Respond with only the letter (A, B, C, or D) of the correct option.\n"
    f"{question}\n{lines}{LETTER_ONLY} and only give the best option. The best answer is: "
  )


def subtitles_preface(text: str) -> str:
  """What stands in front of the question where subtitles are shown."""
  return f"This video's subtitles are listed below:\n{text}\n"


def _preface(subtitles: Path, video: Path, scene_frames: int) -> str:
  """The prompt's opening: the subtitles of the sampled frames, none if there is no file."""
  text = ""
  if subtitles.is_file():
    shown = open_video(video)
    numbers = grid_frames(len(shown), scene_frames)  # the older rule, as published (B20)
    text = subtitle_text(read_srt(subtitles), [round(1000 * n / shown.fps) for n in numbers])
  return subtitles_preface(text)


def subtitle_text(entries: Sequence[tuple[int, int, str]], times: Sequence[float]) -> str:
  """The first entry strictly around each time (ms), a line each, not de-duplicated."""
  shown = (next((text for a, b, text in entries if a < t < b), "") for t in times)
  return "\n".join(text for text in shown if text.strip())


_TIME = r"(?:(\d+):)?(\d\d?):(\d\d)[,.](\d{1,3})"


def read_srt(path: Path) -> list[tuple[int, int, str]]:
  """(start ms, end ms, text) of each entry by start; a line break within one is a space.

  UTF-8, or UTF-16 with its mark; entries with or without numbers, times with or without hours.
  """
  content = path.read_bytes()
  wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
  text = content.decode("utf-16" if wide else "utf-8-sig", errors="replace").replace("\r\n", "\n")
  times = list(re.finditer(rf"(?m)^{_TIME}\s*-->\s*{_TIME}.*$", text))
  entries = []
  for i, match in enumerate(times):
    end = times[i + 1].start() if i + 1 < len(times) else len(text)
    body = text[match.end() : end]
    if i + 1 < len(times):
      # The number of the next entry stands right above its time; a text ends with an empty line.
      body = re.sub(r"\n[ \t]*\d+[ \t]*\n\Z", "\n", body)
    body = body.strip("\n")
    numbers = [int(n or 0) for n in match.groups()]
    for k in (3, 7):  # "1.5" is half a second
      numbers[k] = int(match[k + 1].ljust(3, "0"))
    start, stop = (
      ((h * 60 + m) * 60 + s) * 1000 + ms for h, m, s, ms in (numbers[:4], numbers[4:])
    )
    body = re.sub(r"<[^>\n]*>", "", body)
    entries.append((start, stop, body.strip().replace("\n", " ").replace("\\N", " ")))
  return sorted(entries, key=lambda entry: entry[:2])


def videomme_index(prediction: str, choices: Sequence[str]) -> int:
  """The first of A-D anywhere, else an option's text or its number as a word.

  `choices` carry letters, "A. Two.". Unlike upstream, whose pattern cuts off the last character of
  an option whatever it is (B20 in the model specification), only a closing dot is cut.
  """
  text = without_answer(prediction)
  match = re.search(r"[A-D]", text)
  if match:
    return ord(match[0]) - ord("A")
  for i, choice in enumerate(choices):
    option = re.sub(r"^\s*[A-D]\. ?", "", choice).removesuffix(".").lower()
    spelt = _WORDS[int(option)] if re.fullmatch("[0-9]", option) else option
    if option in text.lower() or spelt in text.lower():
      return i
  return FALLBACK


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
    letter = "" if p.pred is None else letter_at(videomme_index(p.pred, p.options))
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


def _published_predictions(record: Mapping[str, Any], index: int) -> Iterator[Prediction]:
  """The questions of one video; "missing" takes the whole video out, as published."""
  slices = {k: str(record.get(k, "")) for k in ("duration", "domain", "sub_category")}
  for question in record["questions"]:
    yield Prediction(
      id=question["question_id"],
      video=str(record.get("video_id") or record.get("youtube_id")),
      pred=None if record["missing"] else question.get("response", ""),
      truth=question["answer"],
      type=question["task_type"],
      options=tuple(question.get("choices") or ()),
      slices=slices,
      error=MISSING if record["missing"] else None,
    )


_IDS = {f"{video:03}-{question}" for video in range(1, 901) for question in (1, 2, 3)}
VIDEOMME = Benchmark(
  name="videomme",
  title="VideoMME",
  kind=CHOICE,
  files=one_file("videomme/*.parquet", "*.parquet", "*.jsonl", "*.json"),
  root=in_videos,
  read=read,
  prompt=videomme_prompt,
  export=lambda predictions: {"published.json": published_json(predictions)},
  new_tokens=64,
  subtitles=True,
  published=Published(("questions", "missing"), _published_predictions),
  parse=lambda text, options: letter_at(videomme_index(text, options)),
  paper=(
    Row("VideoRefer-7B, no subtitles", {"All": 0.559}),
    Row("VideoRefer-7B, with subtitles", {"All": 0.576}),
  ),
  is_published=lambda items: {item["id"] for item in items} == _IDS,
)
