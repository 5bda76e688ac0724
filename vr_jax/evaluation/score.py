"""`vr score`: from predictions to results, and one result against another.

Results of a run folder O go to O/<parser>, with a judge to O/<parser>-<judge>; those of a file of
predictions in the published shape to a folder beside it.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from data_pipes.errors import InputError, one_line
from vr_jax.evaluation.answers import PARSERS
from vr_jax.evaluation.benchmark import Benchmark, Published
from vr_jax.evaluation.benchmarks.registry import benchmark
from vr_jax.evaluation.items import Prediction, check_ids
from vr_jax.evaluation.results import Result, read_predictions, save, write
from vr_jax.evaluation.scoring.judge import read_records
from vr_jax.evaluation.scoring.settings import ScoreSettings
from vr_jax.evaluation.settings import CaptionSettings, JudgeSettings


def score(
  name: str,
  source: Path | str,
  parser: str = "strict",
  *,
  out: Path | str | None = None,
  judge: JudgeSettings | None = None,
  captions_by: CaptionSettings | None = None,
  progress: Callable[[str], None] = lambda text: None,
) -> tuple[Result, Path]:
  """Scores a run folder or a file in the published shape; returns the result and its folder.

  Raises:
    InputError: the source cannot be read, or more than `judge.max_failed` of the descriptions have
      no scores (the result is written all the same, and a further call asks only for those).
  """
  if parser not in PARSERS:
    raise InputError(f"--parser {parser!r}; accepted: {', '.join(PARSERS)}")
  bench, source = benchmark(name), Path(source)
  run, predictions = read_source(bench, source)
  home = source if source.is_dir() else source.with_suffix("")
  judge = judge or JudgeSettings()
  settings = ScoreSettings(parser, source, home, judge, captions_by or CaptionSettings(), progress)
  result = bench.kind.score(bench, predictions, run, settings)
  if dict(run).get("published_file"):
    result = dataclasses.replace(
      result, warnings=[*result.warnings, "scored from a file in the published shape"]
    )
  by_judge = f"{parser}-{_slug(result.judge['name'])}" if result.judge else parser
  folder = Path(out) if out else home / by_judge
  save(result, folder)
  for file_name, text in bench.kind.files(result).items():
    write(folder / file_name, text)
  _check_failures(result, judge.max_failed, folder)
  return result, folder


def read_source(bench: Benchmark, source: Path) -> tuple[Mapping[str, Any], list[Prediction]]:
  """The run and its predictions; of a file in the published shape, {"published_file": path}."""
  if source.is_dir():
    run, predictions = read_predictions(source)
    if run["task"]["name"] != bench.name:
      raise InputError(f"{source}: is a run of {run['task']['name']}, not of {bench.name}")
    return run, predictions
  if not source.is_file():
    raise InputError(f"{source}: no such run folder or file of predictions")
  predictions = list(_published(bench, source))
  if not predictions:
    raise InputError(f"{source}: no predictions; at least one is needed")
  check_ids(predictions, str(source))
  return {"published_file": str(source)}, predictions


def _published(bench: Benchmark, path: Path) -> Iterator[Prediction]:
  """Predictions in the published shape; they have no ids, so their place in the file is one."""
  published = bench.published
  if published is None:
    raise InputError(f"{path}: {bench.title} files hold no truths; accepted: a folder of vr eval")
  for i, record in enumerate(read_records(path)):
    renamed = {name: record[later] for later, name in published.aliases.items() if later in record}
    record = {**record, **renamed}
    missing = [key for key in published.keys if key not in record]
    if missing:
      raise InputError(
        f"{path}: record {i}: no key {missing[0]!r}; accepted: {bench.title} predictions, with "
        f"{', '.join(published.keys)}"
      )
    for prediction in _made(published, record, f"{path}: record {i}", i):
      yield prediction.checked(f"{path}: record {i}")


def _made(published: Published, record: Mapping[str, Any], where: str, i: int) -> list[Prediction]:
  """The predictions of one record; what its benchmark's reader stumbles over is bad input."""
  try:
    return list(published.predictions(record, i))
  except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
    raise InputError(f"{where}: {one_line(error)}; accepted: the published shape") from None


def _check_failures(result: Result, most: float, folder: Path) -> None:
  answered, failed = result.counts["answered"], result.counts.get("judge_failed", 0)
  if result.parser == "strict" and failed > most * answered:
    first = next(i["problem"] for i in result.items if i["problem"] and i["parsed"] is None)
    raise InputError(
      f"{failed} of {answered} descriptions have no scores, more than {most:.0%} (--max-failed); "
      f"the first: {first}. What there is stands in {folder}; run again to ask for the rest"
    )


def _slug(name: str) -> str:
  return re.sub(r"[^\w.-]+", "_", name)
