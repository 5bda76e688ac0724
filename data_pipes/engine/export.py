"""The published files out of a run: VideoRefer-700K JSON, provenance beside it."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from data_pipes.engine.agents.assemble import FILES
from data_pipes.engine.stages import ASSEMBLE
from data_pipes.engine.store import Store, stop_if_full
from data_pipes.files import replaced


def export(store: Store) -> dict[str, int]:
  """Writes W/out/videorefer-<file>.json and .provenance.jsonl for every kind of sample there is.

  Constant memory; the same bytes whatever happened on the way. Returns the number of samples.
  """
  out = store.folder / "out"
  counts: Counter[str] = Counter(row["file"] for row in store.rows(ASSEMBLE))
  for file in FILES:
    path, provenance = file_paths(out, file)
    if not counts[file]:
      path.unlink(missing_ok=True)
      provenance.unlink(missing_ok=True)
      continue
    with (
      stop_if_full(path),
      replaced(path) as part,
      replaced(provenance) as beside,
      open(part, "w", encoding="utf-8") as samples,
      open(beside, "w", encoding="utf-8") as sources,
    ):
      separator = "[\n"
      for row in store.rows(ASSEMBLE):
        if row["file"] == file:
          samples.write(separator + _json(row["item"]))
          sources.write(_json(row["provenance"]) + "\n")
          separator = ",\n"
      samples.write("\n]\n")
  return {file: counts[file] for file in FILES if counts[file]}


def file_paths(out: Path, file: str) -> tuple[Path, Path]:
  """Where the samples of a kind and their provenance are."""
  return out / f"videorefer-{file}.json", out / f"videorefer-{file}.provenance.jsonl"


def _json(value: Any) -> str:
  return json.dumps(value, ensure_ascii=False)
