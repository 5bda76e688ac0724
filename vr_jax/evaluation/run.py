"""`vr eval`: a model's answers to a benchmark, sharded over hosts and resumable.

    O/run.json             what was run: benchmark, data, model, inference settings, counts, times
    O/predictions.jsonl    every item in order, with its answer or why it has none
    O/published.jsonl ...  the same in the published shape
    O/parts/K-of-N.jsonl   what shard K has done; a further call goes on from there

The first three are written by whichever shard finds all items done.
"""

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
from vr_jax.checkpoint import sha256_of
from vr_jax.evaluation.benchmarks.registry import Benchmark, Dataset, benchmark, read
from vr_jax.evaluation.items import MISSING, Item, Prediction
from vr_jax.evaluation.provenance import code_version, environment, model_facts
from vr_jax.evaluation.results import RUN_SCHEMA, write
from vr_jax.evaluation.settings import Settings
from vr_jax.inference.model import Answer, Model


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
    shard: (k, n): every n-th item from the k-th on; by default `shard_of` this process.
    limit: only the first items.
    progress: called with a line of text now and then.

  Raises:
    InputError: the files cannot be read, `out` holds a run of other settings, or not a single item
      could be asked.
  """
  of, out = benchmark(name), Path(out)
  settings = (settings or Settings()).resolve(of, model)
  dataset = read(of, data, media, split, settings.subtitles)
  items = list(dataset.items)[: limit or None]
  k, n = shard or shard_of(os.environ)
  if not 0 <= k < n:
    raise InputError(f"--shard {k}/{n}; accepted: K from 0 to N-1, as in 0/4")
  run = _describe(of, dataset, items, settings, model, checkpoint)
  _claim(out, run)
  done = _answered(out, {item.id for item in items})
  todo = [item for item in items[k::n] if item.id not in done]
  progress(f"{of.title}: {len(items)} items, {len(done)} done, {len(todo)} to ask here")
  started = time.perf_counter()
  if todo:
    with open(out / "parts" / f"{k}-of-{n}.jsonl", "a", encoding="utf-8") as file:
      for count, prediction in enumerate(_answers(model, todo, dataset.media, settings), 1):
        file.write(json.dumps(prediction.to_dict(), ensure_ascii=False) + "\n")
        file.flush()
        if prediction.error:
          progress(f"  {prediction.error}")
        if count % 50 == 0 or count == len(todo):
          rate = count / (time.perf_counter() - started)
          progress(f"  {count} of {len(todo)}, {rate:.2f} a second")
  seconds = time.perf_counter() - started
  found = _read_parts(out)
  predictions = [found[item.id] for item in items if item.id in found]
  run |= {
    "counts": counts(items, predictions),
    "timing": {"wall": seconds, "items_per_s": len(todo) / seconds if todo else None},
    "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
  }
  if len(predictions) < len(items):
    progress(f"{len(items) - len(predictions)} items are left to other shards")
    return run
  failed = [p for p in predictions if p.error]
  if len(failed) == len(predictions):
    raise InputError(f"none of {len(failed)} items could be asked; the first: {failed[0].error}")
  lines = (json.dumps(p.to_dict(), ensure_ascii=False) for p in predictions)
  files = {"predictions.jsonl": "".join(f"{line}\n" for line in lines), **of.export(predictions)}
  for file_name, text in files.items():
    write(out / file_name, text)
  run["files"] = [{"path": f, "sha256": sha256_of([out / f])} for f in files]
  run["run_id"] = f"{name}-{run['files'][0]['sha256'][:12]}"
  write(out / "run.json", json.dumps(run, indent=2, ensure_ascii=False) + "\n")
  return run


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


def parse_shard(text: str | None) -> tuple[int, int] | None:
  """ "K/N" as numbers; None as it is."""
  if text is None:
    return None
  k, slash, n = text.partition("/")
  if not (slash and k.isdecimal() and n.isdecimal()):
    raise InputError(f"--shard {text!r}; accepted: K/N, as in 0/4")
  return int(k), int(n)


def counts(items: Sequence[Item], predictions: Sequence[Prediction]) -> dict[str, int]:
  """How many items there are, and how many of them have no answer for which reason."""
  return {
    "total": len(items),
    "answered": sum(p.error is None for p in predictions),
    "missing_media": sum(p.missing for p in predictions),
    "unusable": sum(bool(p.error) and not p.missing for p in predictions),
    "empty": sum(p.error is None and not (p.pred or "").strip() for p in predictions),
  }


def say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


def _answers(
  model: Model, items: Sequence[Item], media: Path, settings: Settings
) -> Iterator[Prediction]:
  """Predictions of the items; one without media or with a defect has the reason instead."""
  there = []
  for item in items:
    # A path that leads out of the folder is refused when the item is asked.
    if (media / item.video).exists():
      there.append(item)
    else:
      yield Prediction.of(item, None, error=f"{MISSING}: {item.where}: {media / item.video}")
  for first in range(0, len(there), settings.batch_size):
    chunk = there[first : first + settings.batch_size]
    try:
      answers: list[Answer | InputError] = _ask(model, chunk, media, settings)
    except InputError:
      answers = [_ask_one(model, item, media, settings) for item in chunk]  # which one is it?
    for item, answer in zip(chunk, answers, strict=True):
      if isinstance(answer, InputError):
        where = "" if str(answer).startswith(item.where) else f"{item.where}: "
        yield Prediction.of(item, None, error=f"unusable: {where}{answer}")
      else:
        yield Prediction.of(
          item, answer.text, scene_frames=answer.scene_frames, warnings=answer.warnings
        )


def _ask_one(model: Model, item: Item, media: Path, settings: Settings) -> Answer | InputError:
  try:
    return _ask(model, [item], media, settings)[0]
  except InputError as error:
    return error


def _ask(model: Model, items: Sequence[Item], media: Path, settings: Settings) -> list[Answer]:
  return model.ask_many(
    [item.request(media, settings.mode, settings.scene_frames or 0) for item in items],
    max_new_tokens=settings.max_new_tokens or 0,
    scene_frames=settings.scene_frames,
    batch_size=settings.batch_size,
    mask_rule=settings.mask_rule or "keep",
  )


def _describe(
  of: Benchmark,
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
      "name": of.name,
      "title": of.title,
      "version": 1,
      "split": dataset.split,
      "n": len(items),
      "data": [str(f) for f in dataset.files],
      "media": str(dataset.media),
      "data_sha256": sha256_of(dataset.files),
    },
    "model": model_facts(model, checkpoint),
    "inference": {
      "mode": settings.mode if of.regions else None,
      "u": model.cfg.region.tokens,
      "frames": settings.scene_frames,
      "mask_rule": settings.mask_rule if of.regions else None,
      "weights": model.weights,
      "sampler": "uniform",
      "prompt_template": "published" if of.name != "hc-stvg" else "published, later edition",
      "prompt_sha": questions,
      "decoding": "greedy",
      "max_new_tokens": settings.max_new_tokens,
      "subtitles": settings.subtitles if of.name == "videomme" else None,
      "seed": None,
    },
    "code": code_version(),
    "env": environment(),
  }


def _claim(out: Path, run: Mapping[str, Any]) -> None:
  """Makes the folder this run's, or checks that it is; InputError if it holds another."""
  path = out / "parts" / "settings.json"
  mine = {key: run[key] for key in ("task", "model", "inference")}
  mine["task"] = {k: v for k, v in mine["task"].items() if k not in ("data", "media")}
  mine["model"] = {k: v for k, v in mine["model"].items() if k != "name"}
  mine = json.loads(json.dumps(mine))
  if path.is_file():
    held = json.loads(path.read_text(encoding="utf-8"))
    for part, fields in mine.items():
      for key, value in fields.items():
        if held.get(part, {}).get(key) != value:
          raise InputError(
            f"--out {out}: holds a run with {part} {key}={held.get(part, {}).get(key)!r}, not "
            f"{value!r}; accepted: another folder, or the same settings to go on"
          )
  elif out.is_dir() and any(out.iterdir()) and not (out / "parts").is_dir():
    raise InputError(f"--out {out}: the folder holds other files; accepted: a new or empty folder")
  else:
    write(path, json.dumps(mine, indent=2) + "\n")


def _read_parts(out: Path) -> dict[Any, Prediction]:
  """The latest prediction of each id; a line cut off by a kill is left out."""
  found: dict[Any, Prediction] = {}
  for path in sorted((out / "parts").glob("*.jsonl")):
    text = path.read_text(encoding="utf-8")
    if text and not text.endswith("\n"):
      text = text[: text.rfind("\n") + 1]
      write(path, text)
    for line in text.split("\n"):
      if line:
        prediction = Prediction.from_dict(json.loads(line))
        if not (prediction.error and prediction.id in found and not found[prediction.id].error):
          found[prediction.id] = prediction
  return found


def _answered(out: Path, ids: set) -> set:
  """Ids with an answer; items without media or with a defect are tried again."""
  return {i for i, p in _read_parts(out).items() if i in ids and p.error is None}
