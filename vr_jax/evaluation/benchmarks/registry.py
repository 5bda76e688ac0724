"""The benchmarks by name: where their files lie, how they are read, graded and written out."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from data_pipes.errors import InputError
from vr_jax.evaluation.answers import mvbench_index, perception_index, videomme_index
from vr_jax.evaluation.benchmarks import hc_stvg, mvbench, perception, videomme, videorefer
from vr_jax.evaluation.items import Item, Prediction, check_ids


@dataclasses.dataclass(frozen=True)
class Dataset:
  """The items of a benchmark, the folder their videos start from, the files they were read from."""

  items: Sequence[Item]
  media: Path
  files: Sequence[Path]
  split: str = ""


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """One benchmark.

  Attributes:
    kind: "choice" (options), "judged" (a judge scores descriptions) or "caption" (metrics against
      a reference).
    regions: its questions name objects, so it has a single-frame and a multi-frame mode.
    new_tokens: the most an answer may have, unless asked otherwise; the published scripts allow
      2048 everywhere.
    published_index: reads the option's index as the published script does (None: see
      `answers.published_letter`).
    export: predictions -> {file name: content} in the published shapes.
    size: number of items of the published benchmark.
    split: its only split; "" where the user must say which one it is.
  """

  name: str
  title: str
  kind: Literal["choice", "judged", "caption"]
  regions: bool
  new_tokens: int
  export: Callable[[Sequence[Prediction]], Mapping[str, str]]
  size: int = 0
  split: str = "test"
  published_index: Callable[[str, Sequence[str]], int] | None = None


def _bench_lines(predictions: Sequence[Prediction]) -> dict[str, str]:
  answered = (p for p in predictions if p.pred is not None)
  lines = (json.dumps(videorefer.published_record(p), ensure_ascii=False) for p in answered)
  return {"published.jsonl": "".join(f"{line}\n" for line in lines)}


def _hc_stvg_files(predictions: Sequence[Prediction]) -> dict[str, str]:
  references, said = hc_stvg.coco_files(predictions)
  return {
    "published.jsonl": hc_stvg.published_lines(predictions),
    "coco_references.json": references,
    "coco_predictions.json": said,
  }


BENCHMARKS = {
  b.name: b
  for b in (
    Benchmark("bench-d", "VideoRefer-Bench-D", "judged", True, 512, _bench_lines, 400),
    Benchmark("bench-q", "VideoRefer-Bench-Q", "choice", True, 64, _bench_lines, 1000),
    Benchmark("hc-stvg", "HC-STVG", "caption", True, 128, _hc_stvg_files, split=""),
    Benchmark(
      "mvbench",
      "MVBench",
      "choice",
      False,
      64,
      lambda ps: {"published.jsonl": mvbench.published_lines(ps)},
      4000,
      published_index=mvbench_index,
    ),
    Benchmark(
      "videomme",
      "VideoMME",
      "choice",
      False,
      64,
      lambda ps: {"published.json": videomme.published_json(ps)},
      2700,
      published_index=videomme_index,
    ),
    Benchmark(
      "perception-test",
      "Perception-Test",
      "choice",
      False,
      64,
      lambda ps: {"submission.json": perception.submission(ps)},
      split="",
      published_index=perception_index,
    ),
  )
}


def benchmark(name: str) -> Benchmark:
  if name not in BENCHMARKS:
    raise InputError(f"benchmark {name!r}; accepted: {', '.join(BENCHMARKS)}")
  return BENCHMARKS[name]


def read(
  of: Benchmark,
  data: Path | str,
  media: Path | str | None = None,
  split: str = "",
  subtitles: bool = False,
) -> Dataset:
  """Reads a benchmark from its published files.

  Args:
    data: the folder with its files, or its annotation file (docs/evaluation.md has the layouts).
    media: the folder that video paths start from; by default where the published layout has it.
    split: of a benchmark with several; it cannot be told from the file.
    subtitles: VideoMME with the subtitles of `<data>/subtitles`.
  """
  data = Path(data)
  if not data.exists():
    raise InputError(f"--data {data}: no such file or folder")
  if not of.split and not split:
    raise InputError(
      f"{of.title} has several splits, and its files do not say which one they are; accepted: "
      "--split NAME, such as v1-test or valid"
    )
  if subtitles and of.name != "videomme":
    raise InputError(f"{of.title} has no subtitles; accepted: videomme")
  folder = data if data.is_dir() else data.parent
  if of.name == "mvbench":
    questions = folder / "json" if (folder / "json").is_dir() else folder
    items = mvbench.read(questions)
    files = [questions / mvbench.task_file(task) for task in mvbench.TASKS]
    root = Path(media) if media else folder / "video"
  else:
    path = _find(of, data)
    files = [path]
    beside = folder / "videos"
    # VideoRefer-Bench names its videos from the folder of the file; elsewhere they lie in videos/.
    root = beside if not of.name.startswith("bench") and beside.is_dir() else folder
    root = Path(media) if media else root
    if of.name == "videomme":
      srt = folder / "subtitles" if subtitles else None
      if srt is not None and not srt.is_dir():
        raise InputError(f"{srt}: no such folder; accepted: <videoID>.srt files in it")
      items = videomme.read(path, root, srt)
    elif of.name == "perception-test":
      items = perception.read(path)
    elif of.name == "hc-stvg":
      items = hc_stvg.read(path)
    else:
      items = videorefer.read_bench(path)
      wanted = of.kind == "choice"
      if any(bool(item.options) != wanted for item in items):
        raise InputError(f"{path}: its items are not those of {of.title}")
  if not items:
    raise InputError(f"{files[0]}: no items; at least one is needed")
  check_ids(items, str(files[0]))
  return Dataset(items, root, files, split or of.split)


_NAMES = {
  "bench-d": ("VideoRefer-Bench-D.json", "bench_d.json"),
  "bench-q": ("VideoRefer-Bench-Q.json", "bench_q.json"),
  "videomme": ("videomme/*.parquet", "*.parquet", "*.jsonl", "*.json"),
  "perception-test": ("mc_question_*.json",),
  "hc-stvg": ("*.json",),
}


def _find(of: Benchmark, data: Path) -> Path:
  """The annotation file: `data` itself, or the one file of a known name in it."""
  if data.is_file():
    return data
  for pattern in _NAMES[of.name]:
    found = sorted(data.glob(pattern))
    if len(found) > 1:
      names = ", ".join(str(f.relative_to(data)) for f in found[:4])
      raise InputError(f"--data {data}: found {names}; accepted: the one file to read")
    if found:
      return found[0]
  raise InputError(
    f"--data {data}: no {' or '.join(_NAMES[of.name])} in it; accepted: a folder with one, or the "
    "file itself"
  )
