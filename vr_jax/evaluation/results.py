"""The result of scoring a run: numbers with their intervals, one record an item, what it rests on.

S/result.json    `Metric`s, counts and provenance; schemas/result.schema.json is its schema
S/items.jsonl    id, video, type, prompt, raw, parsed, gt, score(s), error of every item
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipes.errors import InputError, one_line
from data_pipes.files import json_line, read_json_lines, replaced
from vr_jax.evaluation.items import Prediction, check_ids
from vr_jax.evaluation.metrics import Metric

SCHEMA = "vr_jax.result/1"
RUN_SCHEMA = "vr_jax.run/1"
SCHEMA_FILE = Path(__file__).parent / "schemas" / "result.schema.json"


@dataclasses.dataclass(frozen=True)
class Result:
  """A scored run: what result.json and items.jsonl hold.

  Attributes:
    run: the content of run.json ({} of predictions that are not from `vr eval`).
    parser: "strict" or "published".
    judge: the settings of the judge, where there is one.
    items: one record an item, in the order of the benchmark.
    printed: what the published scorer prints, with its parser.
  """

  benchmark: str
  run: Mapping[str, Any]
  parser: str
  metrics: Sequence[Metric]
  counts: Mapping[str, int]
  items: Sequence[Mapping[str, Any]]
  warnings: Sequence[str] = ()
  judge: Mapping[str, Any] | None = None
  extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  printed: str = ""

  def metric(self, name: str, part: str = "All") -> Metric:
    """The first metric of a name and slice."""
    return next(m for m in self.metrics if m.name == name and m.slice == part)

  @property
  def model(self) -> str:
    """The model's name: of its checkpoint, else of the file that was scored; else ""."""
    name = (self.run.get("model") or {}).get("name") or self.run.get("published_file")
    return Path(str(name or "")).name

  @property
  def by(self) -> str:
    """How the options were chosen: "generation" or "likelihood"."""
    return (self.run.get("inference") or {}).get("by") or "generation"

  @property
  def items_text(self) -> str:
    """ "400", or "24 of 400 (--limit)"."""
    task = self.run.get("task") or {}
    n, whole = self.counts["total"], task.get("items_in_file")
    return f"{n} of {whole} (--limit)" if whole and whole > n else str(n)

  @property
  def label(self) -> str:
    """What tells this result from others, in few words."""
    inference = self.run.get("inference") or {}
    mode, frames = inference.get("mode"), inference.get("frames")
    parts = [f"{mode}-frame" if mode else "", f"{frames} scene frames" if frames else ""]
    if self.items_text.endswith(")"):
      parts.append(self.items_text)
    if inference.get("mask_rule", "keep") not in ("keep", None):
      parts.append(f"{inference['mask_rule']} mask rule")
    if self.by != "generation":
      parts.append(f"by {self.by}")
    if inference.get("weights") == "int8":
      parts.append("int8 weights")
    parts += [f"{self.parser} parser", f"judge {self.judge['name']}" if self.judge else ""]
    return ", ".join(part for part in parts if part)


def to_dict(result: Result) -> dict[str, Any]:
  """The content of result.json."""
  run = result.run
  return {
    "schema": SCHEMA,
    "run_id": run.get("run_id"),
    "task": run.get("task") or {"name": result.benchmark, "n": result.counts["total"]},
    **{key: run.get(key) for key in ("model", "code", "env", "inference", "timing")},
    "judge": result.judge,
    "parser": result.parser,
    "metrics": [dataclasses.asdict(m) for m in result.metrics],
    "counts": dict(result.counts),
    "files": run.get("files", []),
    "warnings": list(result.warnings),
    **({"extra": dict(result.extra)} if result.extra else {}),
  }


def save(result: Result, folder: Path) -> Path:
  """Writes both files; returns the path of result.json."""
  write(folder / "items.jsonl", "".join(map(json_line, result.items)))
  text = json.dumps(to_dict(result), indent=2, ensure_ascii=False, allow_nan=False)
  write(folder / "result.json", f"{text}\n")
  return folder / "result.json"


def load(folder: Path | str) -> Result:
  """A result as `save` wrote it.

  Raises:
    InputError: there is none, or of another version.
  """
  folder = Path(folder)
  path = folder / "result.json"
  if not path.is_file():
    raise InputError(f"{folder}: no result.json; accepted: a folder that vr score wrote")
  content = _object(path)
  if content.get("schema") != SCHEMA:
    raise InputError(f"{path}: schema {content.get('schema')!r}; accepted: {SCHEMA!r}")
  keys = ("run_id", "task", "model", "code", "env", "inference", "timing", "files")
  return Result(
    benchmark=content["task"]["name"],
    run={key: content[key] for key in keys if content.get(key) is not None},
    parser=content["parser"],
    metrics=[Metric(**m) for m in content["metrics"]],
    counts=content["counts"],
    items=read_json_lines(folder / "items.jsonl"),
    warnings=content["warnings"],
    judge=content["judge"],
    extra=content.get("extra", {}),
  )


def read_predictions(folder: Path | str) -> tuple[dict[str, Any], list[Prediction]]:
  """run.json and the predictions of a run folder.

  Raises:
    InputError: no run, or one that is not complete.
  """
  folder = Path(folder)
  if not (folder / "run.json").is_file():
    parts = sorted(p.name for p in folder.glob("parts/*.jsonl"))
    hint = f"; only parts are done ({', '.join(parts)}): run vr eval again" if parts else ""
    raise InputError(f"{folder}: no finished run of vr eval{hint}")
  run = _object(folder / "run.json")
  if not isinstance(run.get("task"), dict) or not isinstance(run["task"].get("name"), str):
    raise InputError(f"{folder / 'run.json'}: names no task; accepted: what vr eval wrote")
  path = folder / "predictions.jsonl"
  predictions = [
    Prediction.from_dict(record, f"{path}: record {i}")
    for i, record in enumerate(read_json_lines(path))
  ]
  if not predictions:
    raise InputError(f"{path}: no predictions; at least one is needed")
  check_ids(predictions, str(path))
  return run, predictions


def _object(path: Path) -> dict[str, Any]:
  """The JSON object of a file; InputError if it is none."""
  try:
    content = json.loads(path.read_bytes())
  except (OSError, ValueError, RecursionError) as error:
    raise InputError(f"{path}: cannot be read as JSON ({one_line(error)})") from None
  if not isinstance(content, dict):
    raise InputError(f"{path}: found {type(content).__name__}; accepted: a JSON object")
  return content


def write(path: Path, text: str) -> None:
  """Writes a file whole; shards of one run may write the same one at the same time."""
  with replaced(path, alone=False) as part:
    part.write_text(text, encoding="utf-8")
