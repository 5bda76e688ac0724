"""A benchmark: its files, questions and published shapes, how it is scored and shown.

A benchmark is one `Benchmark` in a file of `benchmarks/` and one line of `registry.BENCHMARKS`; a
kind of scoring is one `Kind` in a file of `scoring/`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipes.errors import InputError
from vr_jax.evaluation.answers import published_letter
from vr_jax.evaluation.items import Item, Prediction
from vr_jax.evaluation.results import Result

PAPER = "VideoRefer paper"
SUCCESSORS = "PixelRefer paper"


@dataclasses.dataclass(frozen=True)
class Row:
  """One system in a published table, to stand beside our results: its numbers, not measured here.

  `values` by the slice names of our metrics: shares from 0 to 1, points from 0 to 5, caption scores
  from 0.
  """

  system: str
  values: Mapping[str, float]
  source: str = PAPER


@dataclasses.dataclass(frozen=True)
class Source:
  """The places of a benchmark's items: annotation files, media folder, folder of subtitles."""

  files: Sequence[Path]
  media: Path
  subtitles: Path | None = None


@dataclasses.dataclass(frozen=True)
class Dataset:
  """The items of a benchmark, the folder their videos start from, the files they were read from."""

  items: Sequence[Item]
  media: Path
  files: Sequence[Path]
  split: str = ""


@dataclasses.dataclass(frozen=True)
class Published:
  """The published file of predictions, as it is read back for scoring.

  Attributes:
    keys: that each record has.
    predictions: those of (record, its place in the file); the files hold no ids.
    aliases: later names of keys, each with the one it stands for.
  """

  keys: Sequence[str]
  predictions: Callable[[Mapping[str, Any], int], Iterable[Prediction]]
  aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Kind:
  """One way to score answers, and what the pages show of it.

  Attributes:
    score: the result of (benchmark, predictions, the content of their run.json,
      `scoring.settings.ScoreSettings`).
    headline: (metric, slice) of the one number that stands for a result.
    columns: the metric whose slices are the columns and bars; "" takes every metric by its name.
    graded: an item is right or wrong; else a text with a score.
    dimensions: the scores from 0 to 5 that a judge gives each item.
    whole: the value of a full bar, `axis` the labels of its fifths.
    unit: how the tables' values are to be read.
    bars_title, bars_text: stand above the bars.
    item_scores: (name, text) of the scores in an item's record, `item_mark` its `score` in words.
    files: further files of a result by name.
  """

  name: str
  score: Callable[["Benchmark", Sequence[Prediction], Mapping[str, Any], Any], Result]
  headline: tuple[str, str]
  columns: str
  unit: str
  axis: Sequence[str]
  bars_title: str
  bars_text: str
  graded: bool = False
  dimensions: Sequence[str] = ()
  whole: float = 1.0
  item_scores: Callable[[Mapping[str, Any]], list[tuple[str, str]]] = lambda record: []
  item_mark: Callable[[float], str] = "{:g}".format
  files: Callable[[Result], Mapping[str, str]] = lambda result: {}


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """One benchmark.

  Attributes:
    split: its only split; "" where the user must say which one it is.
    files: the annotation files in what `--data` names; `one_file` suits most.
    root: the media folder of a data folder in the published layout.
    read: the items, still without the text of `prompt`.
    prompt: (question, options) as the text after the media tag, byte for byte as published.
    prompts: the same for other generations, by the kind of their region encoder, where the
      published scripts ask them otherwise.
    export: predictions -> {file name: content} in the published shapes.
    new_tokens: the most an answer may have, unless stated otherwise; the published scripts allow
      2048 everywhere.
    regions: its questions name objects, so it has a single-frame and a multi-frame mode.
    subtitles: it can be asked with subtitles.
    published: None where the published files hold no truths.
    parse: (answer, options) -> letter, as the published script reads an answer.
    printed: what the published scorer prints of the summary of a result.
    paper: rows of published tables.
    is_published: whether item records (id, video, type) are all those of the published file; only
      then do the paper's rows stand beside ours.
    prompt_template: the edition of the published code that the prompt is from, for run.json.
    lmms_task: its name as a task of lmms-eval; "" where lmms-eval has its own.
  """

  name: str
  title: str
  kind: Kind
  files: Callable[[Path], Sequence[Path]]
  root: Callable[[Path], Path]
  read: Callable[[Source], list[Item]]
  prompt: Callable[[str, Sequence[str]], str]
  export: Callable[[Sequence[Prediction]], Mapping[str, str]]
  new_tokens: int
  split: str = "test"
  regions: bool = False
  subtitles: bool = False
  published: Published | None = None
  parse: Callable[[str, Sequence[str]], str] = lambda text, options: published_letter(text)
  printed: Callable[[Any], str] = lambda summary: ""
  paper: Sequence[Row] = ()
  is_published: Callable[[Sequence[Mapping[str, Any]]], bool] = lambda items: True
  prompt_template: str = "published"
  prompts: Mapping[str, Callable[[str, Sequence[str]], str]] = dataclasses.field(
    default_factory=dict
  )
  lmms_task: str = ""


def fixed(text: str) -> Callable[[str, Sequence[str]], str]:
  """A prompt that is the same for every item."""
  return lambda question, options: text


def one_file(*patterns: str) -> Callable[[Path], list[Path]]:
  """Finds the annotation file: the data path itself, or the one file of a known name in it."""

  def find(data: Path) -> list[Path]:
    if data.is_file():
      return [data]
    for pattern in patterns:
      paths = sorted(data.glob(pattern))
      if len(paths) > 1:
        names = ", ".join(str(path.relative_to(data)) for path in paths[:4])
        raise InputError(f"--data {data}: found {names}; accepted: the one file to read")
      if paths:
        return paths
    raise InputError(
      f"--data {data}: no {' or '.join(patterns)} in it; accepted: a folder with one, or the "
      "file itself"
    )

  return find


def numbered(items: Sequence[Mapping[str, Any]], count: int) -> bool:
  """Whether ids are the whole numbers of `count` items, from 0 or from 1."""
  ids = {item["id"] for item in items}
  return len(items) == count and ids in (set(range(count)), set(range(1, count + 1)))


def in_data_folder(folder: Path) -> Path:
  """Media paths start from the folder of the annotation file."""
  return folder


def in_videos(folder: Path) -> Path:
  """Media lie in `videos/`, or beside the file where there is no such folder."""
  return _inside(folder, "videos")


def in_images(folder: Path) -> Path:
  """Media lie in `images/`, or beside the file where there is no such folder."""
  return _inside(folder, "images")


def _inside(folder: Path, name: str) -> Path:
  return folder / name if (folder / name).is_dir() else folder


def one_truth(*keys: str, truth: str, **aliases: str) -> Published:
  """Records of one prediction each: `video`, `pred`, the truth under its key, perhaps a type."""

  def predictions(record: Mapping[str, Any], index: int) -> Iterable[Prediction]:
    values = (record["video"], record["pred"], record[truth], record.get("type") or "")
    yield Prediction(record.get("id", index), *values)

  return Published(keys, predictions, aliases)
