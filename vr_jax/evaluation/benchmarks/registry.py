"""The table of the benchmarks, and how the items of one are read.

The table names its entries instead of importing them: the command line wants the names alone.
"""

import dataclasses
import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipes.errors import InputError

if TYPE_CHECKING:
  from vr_jax.evaluation.benchmark import Benchmark, Dataset

BENCHMARKS = {
  "bench-d": "vr_jax.evaluation.benchmarks.videorefer:BENCH_D",
  "bench-q": "vr_jax.evaluation.benchmarks.videorefer:BENCH_Q",
  "hc-stvg": "vr_jax.evaluation.benchmarks.hc_stvg:HC_STVG",
  "mvbench": "vr_jax.evaluation.benchmarks.mvbench:MVBENCH",
  "videomme": "vr_jax.evaluation.benchmarks.videomme:VIDEOMME",
  "ref-l4": "vr_jax.evaluation.benchmarks.ref_l4:REF_L4",
  "dlc-bench": "vr_jax.evaluation.benchmarks.dlc_bench:DLC_BENCH",
  "perception-test": "vr_jax.evaluation.benchmarks.perception:PERCEPTION_TEST",
}


def names() -> tuple[str, ...]:
  """The names of the benchmarks; none is imported."""
  return tuple(BENCHMARKS)


def benchmark(name: str) -> "Benchmark":
  """The benchmark of a name; InputError if there is none."""
  if name not in BENCHMARKS:
    raise InputError(f"benchmark {name!r}; accepted: {', '.join(BENCHMARKS)}")
  module, _, attribute = BENCHMARKS[name].partition(":")
  return getattr(importlib.import_module(module), attribute)


def read(
  bench: "Benchmark",
  data: Path | str,
  media: Path | str | None = None,
  split: str = "",
  subtitles: bool = False,
  region: str = "",
) -> "Dataset":
  """Reads a benchmark from its published files.

  Args:
    data: the folder with its files, or its annotation file (docs/evaluation.md has the layouts).
    media: the folder that video paths start from; by default where the published layout has it.
    split: its name, where a benchmark has several; the file does not say.
    region: the kind of the model's region encoder, which decides how it is asked.
    subtitles: with those of `<data>/subtitles`, where the benchmark has them.
  """
  from vr_jax.evaluation.benchmark import Dataset, Source
  from vr_jax.evaluation.items import check_ids

  data = Path(data)
  if not data.exists():
    raise InputError(f"--data {data}: no such file or folder")
  if not bench.split and not split:
    raise InputError(
      f"{bench.title} has several splits, and its files do not say which one they are; accepted: "
      "--split NAME, such as v1-test or valid"
    )
  if subtitles and not bench.subtitles:
    accepted = ", ".join(name for name in BENCHMARKS if benchmark(name).subtitles)
    raise InputError(f"{bench.title} has no subtitles; accepted: {accepted}")
  folder = data if data.is_dir() else data.parent
  files = bench.files(data)
  root = Path(media) if media else bench.root(folder)
  texts = folder / "subtitles" if subtitles else None
  if texts is not None and not texts.is_dir():
    raise InputError(f"{texts}: no such folder; accepted: <videoID>.srt files in it")
  prompt = bench.prompts.get(region, bench.prompt)
  items = [
    dataclasses.replace(item, question=prompt(item.bare_question, item.options))
    for item in bench.read(Source(files, root, texts))
  ]
  if not items:
    raise InputError(f"{files[0]}: no items; at least one is needed")
  check_ids(items, str(files[0]))
  return Dataset(items, root, files, split or bench.split)
