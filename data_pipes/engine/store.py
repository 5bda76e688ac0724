"""Where rows live: one Parquet file for each (stage, shard), and a journal while it is in work
(open_shard).

    W/run.json                          settings and the number of shards
    W/10_analyze/00003-of-00016.parquet committed: sorted by key, no times in it, one atomic rename
    W/10_analyze/00003-of-00016.part    journal: a JSON line for each finished input

A run that was killed anywhere continues from the journals and ends with the same bytes as one that
was not. A line torn by the kill is cut off. Rows whose fingerprint no longer fits (another prompt,
model, setting or input) are made again; the others of the shard are kept.
"""

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipes.engine.graph import (
  KEPT,
  QUARANTINED,
  REJECTED,
  Graph,
  Row,
  Stage,
  StopRun,
  canonical,
  digest,
)
from data_pipes.errors import InputError, one_line
from data_pipes.files import DiskFull, refused_if_full, replaced

FORMAT = 1
_META = b"vr_engine"


@dataclass(frozen=True)
class Record:
  """One candidate of a stage.

  Attributes:
    key: of the row. input: key of the item it came from. fp: fingerprint of that item.
    status: "kept", "rejected" or "quarantined". reason: why it was not kept, "" if it was.
    row: the fields of the stage's row type; None where nothing is known.
    agent: who made it.
  """

  key: str
  input: str
  fp: str
  status: str
  reason: str
  row: Row | None
  agent: Mapping[str, Any]

  def content(self) -> str:
    """Hash of what later stages see: fields and maker, not the fingerprint."""
    return digest([self.key, self.row, dict(self.agent)])


class Store:
  """The folder of a run.

  Args:
    folder: made if absent.
    shards: how many; None takes what the folder was made with.

  Raises:
    InputError: the folder was made with another number of shards, or holds something else.
  """

  def __init__(self, folder: str | os.PathLike, shards: int | None = None):
    self.folder = Path(folder)
    stored = self.settings()
    if stored and stored.get("format") != FORMAT:
      raise InputError(
        f"{self.folder}: run.json is of format {stored.get('format')!r}, not {FORMAT}"
      )
    if stored and shards not in (None, stored["shards"]):
      raise InputError(
        f"{self.folder}: this run has {stored['shards']} shards, {shards} were asked for; "
        "the number stays fixed: leave it out, or take another work directory"
      )
    if not stored and shards is None:
      raise InputError(f"{self.folder}: found no run (run.json); start one with vr engine run")
    self.shards: int = stored["shards"] if stored else int(shards or 0)
    if self.shards < 1:
      raise InputError(f"shards={self.shards}; accepted: 1 or more")

  def settings(self) -> dict[str, Any]:
    """What run.json holds; {} before the first run."""
    path = self.folder / "run.json"
    if not path.is_file():
      return {}
    try:
      return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
      raise InputError(f"{path}: found {error}; accepted: what vr engine run wrote") from None

  def write_settings(self, settings: Mapping[str, Any]) -> None:
    stored = {"format": FORMAT, "shards": self.shards, **settings}
    self.write("run.json", json.dumps(stored, indent=1) + "\n")

  def write(self, name: str, content: str | bytes, durable: bool = True) -> Path:
    """Writes a file of the run whole or not at all."""
    path = self.folder / name
    data = content.encode("utf-8") if isinstance(content, str) else content
    with replaced(path, durable=durable) as part:
      part.write_bytes(data)
    return path

  def path(self, stage: str, shard: int) -> Path:
    return self.folder / stage / f"{shard:05d}-of-{self.shards:05d}.parquet"

  def shard_of(self, key: str) -> int:
    """Where an input of the first stage belongs, whatever else is in the source."""
    number = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
    return number % self.shards

  def meta(self, stage: str, shard: int) -> dict[str, Any] | None:
    """The footer of a committed shard: task, digest, counts, reasons; None if not committed."""
    import pyarrow.parquet as pq

    path = self.path(stage, shard)
    if not path.is_file():
      return None
    try:
      return json.loads(pq.read_metadata(path).metadata[_META])
    except Exception as error:
      raise InputError(
        f"{path}: no shard of this engine ({one_line(error)}); remove it and run again"
      ) from None

  def records(self, stage: str, shard: int) -> Iterator[Record]:
    """The records of a committed shard in key order."""
    import pyarrow.parquet as pq

    file = pq.ParquetFile(self.path(stage, shard))
    columns = json.loads(file.schema_arrow.metadata[_META])["columns"]
    for batch in file.iter_batches(256, use_threads=False):
      for line in batch.to_pylist():
        row = None
        if line.pop("_row"):
          row = {
            name: json.loads(line[name])
            if kind == "json" and line[name] is not None
            else line[name]
            for name, kind in columns.items()
          }
        yield Record(
          line["_key"], line["_input"], line["_fp"], line["_status"], line["_reason"], row,
          json.loads(line["_agent"]),
        )  # fmt: skip

  def rows(self, stage: str, shards: Iterable[int] | None = None) -> Iterator[Row]:
    """The kept rows of committed shards, by default of all."""
    for shard in range(self.shards) if shards is None else shards:
      if self.path(stage, shard).is_file():
        yield from (r.row for r in self.records(stage, shard) if r.status == KEPT and r.row)


def write_parquet(path: Path, stage: Stage, records: list[Record], meta: dict[str, Any]) -> None:
  """Writes the records of a stage, their fields as its columns and `meta` in the footer."""
  import pyarrow as pa
  import pyarrow.parquet as pq

  arrow = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
  names = ("key", "input", "fp", "status", "reason")
  columns = {f"_{n}": pa.array([getattr(r, n) for r in records], pa.string()) for n in names}
  columns["_agent"] = pa.array([canonical(dict(r.agent)) for r in records], pa.string())
  columns["_row"] = pa.array([r.row is not None for r in records], pa.bool_())
  for name, kind in stage.columns.items():
    values = [None if r.row is None else r.row[name] for r in records]
    if kind is object:
      values = [None if v is None else canonical(v) for v in values]
    columns[name] = pa.array(values, arrow.get(kind, pa.string()))
  table = pa.table(columns).replace_schema_metadata({_META: canonical(meta)})
  pq.write_table(table, path, compression="zstd", row_group_size=1024)


@contextlib.contextmanager
def stop_if_full(path: Path) -> Iterator[None]:
  """A full disk stops the run in good order."""
  try:
    with refused_if_full(path):
      yield
  except DiskFull as error:
    raise StopRun(str(error)) from error


def manifest(store: Store, graph: Graph) -> list[dict[str, Any]]:
  """Attrition: per stage the shards committed, inputs, records by status, reasons."""
  out = []
  for stage in graph.stages:
    metas = [m for i in range(store.shards) if (m := store.meta(stage.name, i))]
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for m in metas:
      counts.update(m["counts"])
      reasons.update(m["reasons"])
    entry = {"stage": stage.name, "shards": len(metas), "of": store.shards}
    entry["outdated"] = sum(m["stage"] != stage.fingerprint for m in metas)
    entry["inputs"] = sum(m["inputs"] for m in metas)
    entry |= {status: counts[status] for status in (KEPT, REJECTED, QUARANTINED)}
    entry["reasons"] = dict(reasons.most_common())
    out.append(entry)
  return out
