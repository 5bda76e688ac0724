"""`vr convert`: weights of one format into another, tensor by tensor, with proof.

The result grows in `DST.partial`, where a journal names what is written, so a killed conversion
goes on where it stopped; it takes its name when it is complete and has been read back. One
conversion has that folder at a time, and a folder of that name that no conversion made is left
alone. What was read, written and compared stands in parity.json: in the folder, or beside the file.
"""

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_pipes.buckets import here, is_address, uploaded
from data_pipes.errors import InputError
from data_pipes.files import JsonLines, is_unused, locked, write_text
from vr_jax.checkpoint import package_versions
from vr_jax.interop import peft, proof
from vr_jax.interop.options import ConvertOptions
from vr_jax.interop.source import Source
from vr_jax.interop.sources import open_source
from vr_jax.interop.table import DTYPES, Joined, Parameters, dtype_name, pieces
from vr_jax.interop.targets import FORMATS, Cast, Item, Target, lay_out
from vr_jax.weights import locate

CASTS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
JOURNAL, PLAN, PARITY = "journal.jsonl", "plan.json", "parity.json"
NOT_PROVEN = "not proven"


def convert(
  src: str | Path,
  dst: str | Path,
  to: str,
  *,
  report: Callable[[str], None] = print,
  **options: Any,
) -> dict[str, Any]:
  """Converts weights and returns what parity.json holds.

  Its `passed` is true where another implementation agrees with the result, false where anything
  differs, and "not proven" where all was written as it should be but no other implementation ran.

  Args:
    src: weights of any format that `open_source` knows.
    dst: what is written; must not exist.
    to: a key of FORMATS.
    report: takes each line about what came from where.
    **options: those of `ConvertOptions`.

  Raises:
    InputError: one line about a source that is damaged or unknown, a format that cannot say it, a
      `dst` that exists, a `dst`.partial of somebody else or of a conversion at work, weights that
      are not finite or that overflow, too little disk. Nothing is then left at `dst`.
  """
  if is_address(dst):
    with uploaded(dst) as made:
      return convert(src, made, to, report=report, **options)
  chosen = ConvertOptions(**options)
  dtype, adapter, logits = chosen.dtype, chosen.adapter, chosen.logits
  dst = Path(dst)
  _check_arguments(dst, to, dtype)
  src = here(locate(src).path)
  source = open_source(src)
  if adapter is not None:
    source = _with_adapter(source, adapter)
  if source.whole and source.tokenizer_files.keys() & {"tokenizer.json", "vocab.json"}:
    source.tokenizer()  # refuses ids beyond the table
  if to == "peft":
    source = _adapter_of(source)
  if logits == "always" and (reason := proof.cannot(source, logits, adapter)):
    raise InputError(f"--logits always: {reason}")
  _describe(source, report)
  plan = {
    "source": _fingerprint(src) + (_fingerprint(adapter) if adapter else []),
    "to": to,
    "dtype": dtype,
    "shard_bytes": int(chosen.shard_gb * 1e9),
  }
  partial = dst.parent / f"{dst.name}.partial"
  _refuse_others(partial)
  with locked(partial):
    _check_arguments(dst, to, dtype)  # another conversion may have come to its end meanwhile
    _claim(partial, plan)
    return _write(source, partial, dst, to, chosen, report)


def _write(
  source: Source,
  partial: Path,
  dst: Path,
  to: str,
  chosen: ConvertOptions,
  report: Callable[[str], None],
) -> dict[str, Any]:
  """Writes what is not written yet, proves it and gives it its name; returns parity.json."""
  stage = partial / "result"
  try:
    with JsonLines(partial / JOURNAL, key=lambda entry: entry["name"]) as journal:
      if journal.records:
        report(f"going on after {len(journal)} tensors in {partial}")
      cast = _cast_to(chosen.dtype)
      target = lay_out(to, source, stage, cast, int(chosen.shard_gb * 1e9))
      _check_disk(target, stage)
      tensors = _stream(target, journal, chosen.allow_nonfinite)
    target.finish(stage)
  except InputError:
    shutil.rmtree(partial, ignore_errors=True)
    raise
  for note in target.notes:
    report(note)
  parity = {"source": {"name": source.path.name, "kind": source.kind, "parts": list(source.parts)}}
  parity |= _prove(source, to, stage, target, tensors, chosen)
  _publish(partial, stage, target, dst, parity)
  return parity


def _check_arguments(dst: Path, to: str, dtype: str | None) -> None:
  if to not in FORMATS:
    raise InputError(f"--to {to!r}: accepted: {', '.join(FORMATS)}")
  if dtype is not None and dtype not in CASTS:
    raise InputError(f"--dtype {dtype!r}: accepted: {', '.join(CASTS)}")
  if dst.exists() and not (dst.is_dir() and not any(dst.iterdir())):
    raise InputError(f"{dst}: exists; nothing is written over, give another place")


def _cast_to(dtype: str | None) -> Cast:
  """The dtype that a tensor gets from the one that it has; what is no weight keeps its own."""
  if dtype is None:
    return lambda old: old
  new = DTYPES[CASTS[dtype]]
  return lambda old: new if dtype_name(old) in CASTS.values() else old


def _with_adapter(source: Source, adapter: str | Path) -> Source:
  if "llm" not in source.parts:
    raise InputError(f"{source.path}: holds no decoder to merge the adapter {adapter} into")
  return source.with_adapter(peft.open_adapter(adapter, source.parts["llm"]), adapter)


def _adapter_of(source: Source) -> Source:
  """The adapter alone that a source has merged in."""
  if source.adapter is None:
    raise InputError(
      f"{source.path}: holds no adapter; --to peft takes a run whose model has llm.lora_rank"
    )
  kind = f"adapter of rank {source.adapter.rank}"
  parts, adapter = {"llm": source.parts["llm"]}, source.adapter
  return Source(kind, source.path, parts, adapter.params, adapter=adapter)


def _describe(source: Source, report: Callable[[str], None]) -> None:
  report(f"{source.path}: {source.kind} with {', '.join(source.parts)}")
  for note in source.notes:
    report(note)
  if source.skipped:
    more = f" and {len(source.skipped) - 3} more" if len(source.skipped) > 3 else ""
    kept = "kept for the way back" if source.kept else "left out"
    report(f"not part of the model, {kept}: {', '.join(source.skipped[:3])}{more}")


# --- Resuming ---------------------------------------------------------------------------------


def _fingerprint(path: str | Path) -> list[list[Any]]:
  """What tells whether a source is still the same: names, sizes and times of its files."""
  root = Path(str(path))
  if not root.exists():
    root = Path(str(path).rpartition(":")[0])
  files = sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else [root]
  return [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files]


def _refuse_others(partial: Path) -> None:
  """Refuses a folder at the place of ours that no conversion made: its plan is our marker."""
  if partial.is_symlink() or (not is_unused(partial) and _plan_in(partial) is None):
    raise InputError(
      f"{partial}: exists, and no conversion made it; the result grows there: move it, or give "
      "another DST"
    )


def _plan_in(partial: Path) -> dict[str, Any] | None:
  """The plan of a conversion that was killed, None where there is none."""
  try:
    plan = json.loads((partial / PLAN).read_text())
  except (OSError, ValueError):
    return None
  ours = isinstance(plan, dict) and plan.keys() >= {"source", "to", "dtype", "shard_bytes"}
  return plan if ours else None


def _claim(partial: Path, plan: dict[str, Any]) -> None:
  """Makes the folder one of this plan; what a conversion of another plan left in it is removed."""
  if (before := _plan_in(partial)) == plan:
    return
  if before is not None:
    shutil.rmtree(partial / "result", ignore_errors=True)
    (partial / JOURNAL).unlink(missing_ok=True)
  write_text(partial / PLAN, json.dumps(plan))


def _check_disk(target: Target, stage: Path) -> None:
  """Refuses what does not fit; a file laid out already counts only by the blocks it has."""
  need = sum(item.bytes for item in target.items) * (2 if target.twice else 1)
  have = sum(p.stat().st_blocks * 512 for p in stage.rglob("*") if p.is_file())
  free = shutil.disk_usage(stage).free
  if need - have > free:
    raise InputError(
      f"{stage.parent.parent}: {(need - have) / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB free"
    )


# --- Streaming --------------------------------------------------------------------------------


def _stream(target: Target, journal: JsonLines, allow_nonfinite: bool) -> list[dict[str, Any]]:
  """Reads, checks, casts and writes every item; returns what parity.json says of each.

  Items that hold NaN or Inf, or that overflow in the new dtype, are all named before it gives up.
  """
  nonfinite: list[str] = []
  overflow: list[str] = []
  items = sorted(target.items, key=lambda item: item.order)
  for item in _progress(items):
    if item.name in journal:
      continue
    array = item.make()
    finite = _finite(array)
    if not finite and not allow_nonfinite:
      nonfinite.append(item.name)
      continue
    new, difference = _cast(array, item.dtype)
    if finite and not _finite(new):
      overflow.append(f"{item.name} (up to {np.abs(array.astype(np.float32)).max():.4g})")
    if nonfinite or overflow:
      continue
    item.write(new)
    journal.add(
      {
        "name": item.name,
        "shape": list(item.shape),
        "dtype": dtype_name(item.dtype),
        "sha256": hashlib.sha256(np.ascontiguousarray(new).view(np.uint8).data).hexdigest(),
        "from": list(item.sources),
        "from_dtype": dtype_name(array.dtype),
        "largest_difference": difference,
      }
    )
  if nonfinite:
    raise InputError(
      f"NaN or Inf in {len(nonfinite)} tensors ({_some(nonfinite)}); --allow-nonfinite goes on"
    )
  if overflow:
    raise InputError(
      f"{len(overflow)} tensors do not fit the range of the new dtype ({_some(overflow)}); "
      "bfloat16 and float32 have the range"
    )
  return [journal.records[item.name] for item in items]


def _some(names: list[str], most: int = 20) -> str:
  more = f" and {len(names) - most} more" if len(names) > most else ""
  return ", ".join(names[:most]) + more


def _blocks(array: np.ndarray, most: int = 1 << 24) -> Iterator[np.ndarray]:
  """Flat views of at most `most` elements, so that a check needs little memory."""
  whole = array.reshape(-1)
  for start in range(0, whole.size, most):
    yield whole[start : start + most]


def _finite(array: np.ndarray) -> bool:
  if array.dtype.kind in "iub":
    return True
  return all(bool(np.isfinite(block).all()) for block in _blocks(array))


def _cast(array: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, float]:
  """The array in another dtype, and the largest difference that makes."""
  if array.dtype == dtype:
    return array, 0.0
  with np.errstate(over="ignore"):
    new = array.astype(dtype)
  return new, _largest(zip(_blocks(array), _blocks(new), strict=True))


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
  if a.dtype != b.dtype:
    return False
  a, b = (np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (a, b))
  return all(np.array_equal(x, y) for x, y in zip(_blocks(a), _blocks(b), strict=True))


def _largest(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> float:
  largest = 0.0
  for a, b in pairs:
    a, b = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore"):
      gap = np.abs(a - b)
    gap[(a == b) | (np.isnan(a) & np.isnan(b))] = 0
    largest = max(largest, float(gap.max(initial=0)))
  return largest


def _progress(items: list[Item]) -> Iterator[Item]:
  """The items, with a line on stderr: rewritten on a terminal, else at each tenth."""
  total, written, shown = sum(item.bytes for item in items), 0, 0.0
  start, terminal = time.monotonic(), sys.stderr.isatty()
  for item in items:
    yield item
    written += item.bytes
    share = written / max(total, 1)
    if total < 1 << 28 and not terminal:
      continue
    if terminal or share >= shown + 0.1:
      shown = share
      speed = written / 1e6 / max(time.monotonic() - start, 1e-3)
      line = f"{share:4.0%} of {total / 1e9:.2f} GB, {speed:.0f} MB/s"
      print(f"\r{line}" if terminal else line, end="" if terminal else "\n", file=sys.stderr)
  if terminal:
    print(file=sys.stderr)


# --- Proof and the end ------------------------------------------------------------------------


def reopen(to: str, stage: Path, target: Target, source: Source) -> Parameters:
  """The parameters of a result, read as anyone would read it."""
  if to == "peft":
    return peft.open_adapter(stage, source.parts["llm"]).params
  if to == "hf" and not (stage / "config.json").is_file():
    names = [f for f in ("tower", "decoder") if (stage / f).is_dir()]
    opened = [open_source(stage / name) for name in names]
    if any(stage.glob("*.safetensors")):
      opened.append(open_source(stage))
    return Joined(*(source.params for source in opened))
  return open_source(stage / target.weights if target.weights else stage).params


def compare(source: Parameters, result: Parameters, cast: Cast = lambda old: old) -> dict[str, Any]:
  """Every parameter of the source against the one read back, layer by layer.

  `wrong` are those that are not, to the bit, what the cast makes of the source. (A parameter of
  ours whose tensors have two dtypes may come back in float32, which holds both.)
  """
  differ: dict[str, float] = {}
  wrong: list[str] = []
  identical = True
  for path, shape in source.shapes.items():
    largest, right = 0.0, True
    for index in pieces(path, shape):
      a, b = source.read(path, index), result.read(path, index)
      if not _same_bits(a, b):
        identical = False
        expected, _ = _cast(a, cast(a.dtype))
        right &= _same_bits(expected, b) or _same_bits(expected.astype(np.float32), b)
        largest = max(largest, _largest(zip(_blocks(a), _blocks(b), strict=True)))
    if largest:
      differ[path] = largest
    if not right:
      wrong.append(path)
  return {
    "parameters": len(source.shapes),
    "bit_identical": identical,
    "largest_difference": max(differ.values(), default=0.0),
    "differences": differ,
    "wrong": wrong,
  }


def _prove(
  source: Source,
  to: str,
  stage: Path,
  target: Target,
  tensors: list[dict[str, Any]],
  chosen: ConvertOptions,
) -> dict[str, Any]:
  """What parity.json says of a result that stands in `stage`, but for where it comes from."""
  parity = {
    "to": to,
    "notes": [*source.notes, *target.notes],
    "left_out": [] if source.kept else list(source.skipped),
    "versions": package_versions(),
    "tensors": tensors,
    **compare(source.params, reopen(to, stage, target, source), _cast_to(chosen.dtype)),
  }
  compared = proof.logits(source, to, stage / target.weights, chosen.logits, chosen.adapter)
  passed = False if parity["wrong"] else compared.get("passed", NOT_PROVEN)
  return parity | {"passed": passed, "logits": compared}


def summary(parity: dict[str, Any], dst: str | Path) -> str:
  """What parity.json says, in a few lines."""
  same = "bit-identical" if parity["bit_identical"] else "equal"
  if parity["largest_difference"]:
    same = f"largest difference {parity['largest_difference']:.3g}"
  lines = [
    f"{dst}: {len(parity['tensors'])} tensors written, {parity['parameters']} parameters read back "
    f"{same}"
  ]
  if wrong := parity["wrong"]:
    lines.append(f"{len(wrong)} parameters are NOT what was written: {_some(wrong, 5)}")
  logits = parity["logits"]
  if "skipped" in logits:
    lines.append(f"{NOT_PROVEN} by another implementation: {logits['skipped']}")
  for name, part in logits.items():
    if isinstance(part, dict):
      more = ""
      if "kl" in part:
        more = f", KL {part['kl']:.2g}, top-1 {part['top1_agreement']:.4g}"
      if "greedy_tokens" in part:
        more += f", {part['greedy_equal']} of {part['greedy_tokens']} greedy tokens equal"
      lines.append(
        f"{name}: max abs {part['max_abs']:.2g}{more}: "
        f"{'passed' if part['passed'] else 'OVER TOLERANCE'}"
      )
  return "\n".join(lines)


def _publish(partial: Path, stage: Path, target: Target, dst: Path, parity: dict[str, Any]) -> None:
  """Gives the result its name, in one step."""
  text = json.dumps(parity, indent=2) + "\n"
  if target.weights:
    write_text(dst.parent / f"{dst.name}.{PARITY}", text)
    os.replace(stage / target.weights, dst)
  else:
    write_text(stage / PARITY, text)
    if dst.is_dir():
      dst.rmdir()  # empty
    os.replace(stage, dst)
  shutil.rmtree(partial)
