"""`vr eval`: a model's answers to a benchmark, sharded over hosts and resumable.

    O/run.json             what was run: benchmark, data, model, inference settings, counts, times
    O/predictions.jsonl    every item in order, with its answer or why it has none
    O/published.jsonl ...  the same in the published shape
    O/parts/K-of-N.jsonl   what shard K has done; a further call goes on from there

The first three are written by whichever shard finds all items done. A shard is whole videos, and
answers them in any order, so that each is read and encoded once.
"""

import collections
import datetime
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipes.errors import InputError
from data_pipes.files import JsonLines, is_unused, json_line, locked, read_json_lines
from vr_jax.checkpoint import sha256_of
from vr_jax.evaluation.benchmark import Benchmark, Dataset
from vr_jax.evaluation.benchmarks import registry
from vr_jax.evaluation.items import MISSING, Item, Prediction, counts
from vr_jax.evaluation.provenance import code_version, environment, model_facts
from vr_jax.evaluation.reading.strict import labelled
from vr_jax.evaluation.results import RUN_SCHEMA, write
from vr_jax.evaluation.settings import Settings
from vr_jax.inference.model import Model
from vr_jax.models.videorefer import VideoReferConfig


def evaluate(
  model: Model,
  name: str,
  data: Path | str,
  out: Path | str,
  settings: Settings | None = None,
  *,
  checkpoint: Path | str | None = None,
  media: Path | str | None = None,
  split: str = "",
  shard: tuple[int, int] | None = None,
  limit: int | None = None,
  progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
  """Asks the items of this shard that have no answer yet; returns the content of run.json.

  Args:
    checkpoint: where the model came from, for its hash.
    media, split: see `benchmarks.read`.
    shard: (k, n): part k of n, see `share`; by default `shard_of` this process.
    limit: only so many items, as many of each type as possible alike.
    progress: called with a line of text now and then.

  Raises:
    InputError: the files cannot be read, `out` holds a run of other settings, or not a single item
      could be asked.
  """
  benchmark, out = registry.benchmark(name), Path(out)
  settings = (settings or Settings()).resolve(benchmark, model)
  kind = model.cfg.region.kind
  dataset = registry.read(benchmark, data, media, split, settings.subtitles, kind)
  items = limited(dataset.items, limit)
  k, n = shard or shard_of(os.environ)
  if not 0 <= k < n:
    raise InputError(f"--shard {k}/{n}; accepted: K from 0 to N-1, as in 0/4")
  run = _describe(benchmark, dataset, items, settings, model, checkpoint)
  with locked(out, f"{run['task']} {run['inference']} {n}", f"shard {k}/{n}" if n > 1 else None):
    _claim(out, run)
    return _go_on(model, benchmark, dataset, items, settings, run, out, (k, n), progress)


def _go_on(
  model: Model,
  benchmark: Benchmark,
  dataset: Dataset,
  items: Sequence[Item],
  settings: Settings,
  run: dict[str, Any],
  out: Path,
  shard: tuple[int, int],
  progress: Callable[[str], None],
) -> dict[str, Any]:
  """Asks what is left of a shard (k, n); with the last answer, writes the files of the run."""
  k, n = shard
  ids = {item.id for item in items}
  done = {i for i, p in _read_parts(out).items() if i in ids and p.error is None}
  todo = [item for item in share(items, k, n) if item.id not in done]
  progress(f"{benchmark.title}: {len(items)} items, {len(done)} done, {len(todo)} to ask here")
  started = time.perf_counter()
  if todo:
    _answer(model, todo, dataset.media, settings, out / "parts" / f"{k}-of-{n}.jsonl", progress)
  seconds = time.perf_counter() - started
  answers = _read_parts(out)
  predictions = [answers[item.id] for item in items if item.id in answers]
  run |= {
    "counts": counts(predictions) | {"total": len(items)},
    "timing": {
      "wall": seconds,
      "items_per_s": len(todo) / seconds if todo else None,
      "shards": n,
    },
    "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
  }
  if len(predictions) < len(items):
    progress(f"{len(items) - len(predictions)} items are left to other shards")
    return run
  _finish(out, benchmark, run, predictions)
  return run


def limited(items: Sequence[Item], limit: int | None) -> list[Item]:
  """The first items of each type, in the order of the file, `limit` in all.

  Types take turns, so that each has as many as the others unless it has no more.
  """
  if limit is None:
    return list(items)
  if limit < 1:
    raise InputError(f"--limit {limit}; accepted: 1 or more")
  turns: collections.Counter[str] = collections.Counter()
  place = []
  for i, item in enumerate(items):
    place.append((turns[item.type], i))
    turns[item.type] += 1
  return [items[i] for i in sorted(i for _, i in sorted(place)[:limit])]


def shard_of(environ: Mapping[str, str]) -> tuple[int, int]:
  """(k, n) of process k of the n that were started together, which work apart.

  They are named as for training (training/processes.py): by VR_PROCESS and VR_PROCESSES, as tasks
  of a Slurm step or as workers of a TPU slice.
  """
  workers = len(environ.get("TPU_WORKER_HOSTNAMES", "").split(","))
  for index, count in (
    ("VR_PROCESS", environ.get("VR_PROCESSES")),
    ("SLURM_PROCID", environ.get("SLURM_STEP_NUM_TASKS")),
    ("TPU_WORKER_ID", str(workers)),
  ):
    if index in environ and count:
      return parse_shard(f"{environ[index]}/{count}") or (0, 1)
  return 0, 1


def share(items: Sequence[Item], k: int, n: int) -> list[Item]:
  """The items of shard k of n: whole videos, so that no two shards read and encode the same one.

  Every shard deals alike: the video with the most questions first, each to the shard that has the
  fewest questions so far.
  """
  questions = collections.Counter(item.video for item in items)
  loads, shard_of_video = [0] * n, {}
  for video, count in questions.most_common():
    shard = loads.index(min(loads))
    shard_of_video[video] = shard
    loads[shard] += count
  return [item for item in items if shard_of_video[item.video] == k]


def parse_shard(text: str | None) -> tuple[int, int] | None:
  """ "K/N" as numbers; None as it is."""
  if text is None:
    return None
  k, slash, n = text.partition("/")
  if not (slash and k.isdecimal() and n.isdecimal()):
    raise InputError(f"--shard {text!r}; accepted: K/N, as in 0/4")
  return int(k), int(n)


def _finish(
  out: Path, benchmark: Benchmark, run: dict[str, Any], predictions: Sequence[Prediction]
) -> None:
  """Writes the predictions of all items in their shapes, and run.json, which gets their hashes."""
  failed = [p for p in predictions if p.error]
  if len(failed) == len(predictions):
    raise InputError(f"none of {len(failed)} items could be asked; the first: {failed[0].error}")
  lines = "".join(json_line(p.to_dict()) for p in predictions)
  files = {"predictions.jsonl": lines, **benchmark.export(predictions)}
  for file_name, text in files.items():
    write(out / file_name, text)
  run["files"] = [{"path": f, "sha256": sha256_of([out / f])} for f in files]
  run["run_id"] = f"{benchmark.name}-{run['files'][0]['sha256'][:12]}"
  write(out / "run.json", json.dumps(run, indent=2, ensure_ascii=False) + "\n")


def say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


def _answer(
  model: Model,
  items: Sequence[Item],
  media: Path,
  settings: Settings,
  part: Path,
  progress: Callable[[str], None],
) -> None:
  """Writes a prediction of each item into a shard's file as soon as it is there."""
  encoded = model.visual.counts["frames"]
  started = time.perf_counter()
  with JsonLines(
    part, lambda record: record["id"], lambda record: not record.get("error")
  ) as lines:
    for count, prediction in enumerate(_predictions(model, items, media, settings), 1):
      lines.add(prediction.to_dict())
      if prediction.error:
        progress(f"  {prediction.error}")
      if count % 50 == 0 or count == len(items):
        rate = count / (time.perf_counter() - started)
        frames = model.visual.counts["frames"] - encoded
        progress(f"  {count} of {len(items)}, {rate:.2f} a second, {frames} frames encoded")


def _predictions(
  model: Model, items: Sequence[Item], media: Path, settings: Settings
) -> Iterator[Prediction]:
  """Predictions as they come; an item without media or with a defect has the reason instead."""
  requests = {}
  for i, item in enumerate(items):
    # A path that leads out of the folder is refused when the request is made.
    if not (media / item.video).exists():
      yield Prediction.for_item(item, None, error=f"{MISSING}: {item.where}: {media / item.video}")
      continue
    try:
      requests[i] = item.request(media, settings.mode, settings.scene_frames or 0)
    except InputError as error:
      yield _unusable(item, error)
  how: dict[str, Any] = {
    "max_new_tokens": settings.max_new_tokens or 0,
    "scene_frames": settings.scene_frames,
    "batch_size": settings.batch_size,
    "mask_rule": settings.mask_rule or "keep",
  }
  if settings.by == "likelihood":
    yield from _likeliest(model, items, requests, how)
    return
  for i, answer in model.answer_each(requests, **how):
    if isinstance(answer, InputError):
      yield _unusable(items[i], answer)
    else:
      frames, warnings = answer.scene_frames, answer.warnings
      yield Prediction.for_item(items[i], answer.text, scene_frames=frames, warnings=warnings)


def _likeliest(
  model: Model, items: Sequence[Item], requests: Mapping[int, Any], how: Mapping[str, Any]
) -> Iterator[Prediction]:
  """The label of each item's likeliest option, the first of equal ones, as its prediction.

  The label alone is scored: it is what is asked for, and a long option is not less likely for its
  length.
  """
  labels = {i: [f"({letter})" for letter in labelled(items[i].options)[0]] for i in requests}
  for i, result in model.choices_each(requests, labels, **how):
    if isinstance(result, InputError):
      yield _unusable(items[i], result)
    else:
      yield Prediction.for_item(
        items[i], labels[i][result.index(max(result))], likelihoods=tuple(result)
      )


def _unusable(item: Item, error: InputError) -> Prediction:
  where = "" if str(error).startswith(item.where) else f"{item.where}: "
  return Prediction.for_item(item, None, error=f"unusable: {where}{error}")


def _describe(
  benchmark: Benchmark,
  dataset: Dataset,
  items: Sequence[Item],
  settings: Settings,
  model: Model,
  checkpoint: Path | str | None,
) -> dict[str, Any]:
  questions = hashlib.sha256("\0".join(item.question for item in items).encode()).hexdigest()
  return {
    "schema": RUN_SCHEMA,
    "run_id": None,  # once it is complete
    "task": {
      "name": benchmark.name,
      "title": benchmark.title,
      "version": 1,
      "split": dataset.split,
      "n": len(items),
      "items_in_file": len(dataset.items),
      "data": [str(f) for f in dataset.files],
      "media": str(dataset.media),
      "data_sha256": sha256_of(dataset.files),
    },
    "model": model_facts(model, checkpoint),
    "inference": {
      "mode": settings.mode if benchmark.regions else None,
      "u": model.cfg.region.tokens,
      "frames": settings.scene_frames,
      "mask_rule": settings.mask_rule if benchmark.regions else None,
      "weights": model.weights,
      "sampler": "uniform",
      "prompt_template": benchmark.prompt_template,
      "prompt_sha": questions,
      "decoding": "greedy" if settings.by == "generation" else None,
      # Runs of before there was another way say nothing either.
      **({} if settings.by == "generation" else {"by": settings.by}),
      "max_new_tokens": settings.max_new_tokens,
      "subtitles": settings.subtitles if benchmark.subtitles else None,
      "seed": None,
    },
    "code": code_version(),
    "env": environment(),
  }


def _of_this_version(config: Any) -> Any:
  """A model's config as an older version wrote it, with the fields that came since at their
  defaults; as it is where it is none."""
  try:
    return json.loads(json.dumps(VideoReferConfig.from_dict(config).to_dict()))
  except (InputError, TypeError):
    return config


_PLACES = ("data", "media", "items_in_file")  # of a run's task, that may differ when it goes on


def _claim(out: Path, run: Mapping[str, Any]) -> None:
  """Makes the folder this run's, or checks that it is; InputError if it holds another."""
  path = out / "parts" / "settings.json"
  mine = {key: run[key] for key in ("task", "model", "inference")}
  mine["task"] = {k: v for k, v in mine["task"].items() if k not in _PLACES}
  mine["model"] = {k: v for k, v in mine["model"].items() if k != "name"}
  mine = json.loads(json.dumps(mine))
  if path.is_file():
    held = json.loads(path.read_text(encoding="utf-8"))
    if "model" in held:
      held["model"]["config"] = _of_this_version(held["model"].get("config"))
    for part, fields in mine.items():
      for key, value in fields.items():
        if held.get(part, {}).get(key) != value:
          raise InputError(
            f"--out {out}: holds a run with {part} {key}={held.get(part, {}).get(key)!r}, not "
            f"{value!r}; accepted: another folder, or the same settings to go on"
          )
  elif not is_unused(out) and not (out / "parts").is_dir():
    raise InputError(f"--out {out}: the folder holds other files; accepted: a new or empty folder")
  else:
    write(path, json.dumps(mine, indent=2) + "\n")


def _read_parts(out: Path) -> dict[Any, Prediction]:
  """The latest prediction of each id, whichever shard made it; an answer stays before an error.

  Reads alone: another process may be writing its part at this moment.
  """
  latest: dict[Any, Prediction] = {}
  for path in sorted((out / "parts").glob("*.jsonl")):
    for record in read_json_lines(path):
      prediction = Prediction.from_dict(record)
      if not (prediction.error and prediction.id in latest and not latest[prediction.id].error):
        latest[prediction.id] = prediction
  return latest
