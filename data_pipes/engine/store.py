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
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
  import pyarrow as pa

FORMAT = 1
_META = b"vr_engine"
_REMEMBERED = 8 << 20  # bytes of committed shards that are also kept in memory
_SMALL = 1 << 16  # bytes of a shard below which to compress costs more than it saves


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
    self._recent = _Recent()

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

  def commit(self, stage: Stage, shard: int, records: list[Record], meta: dict[str, Any]) -> None:
    """Writes a shard by one rename. Raises StopRun: the disk is full."""
    path = self.path(stage.name, shard)
    with stop_if_full(path), replaced(path) as part:
      write_parquet(part, stage, records, meta)
    self._recent.add(path, stage, records, meta)

  def meta(self, stage: str, shard: int) -> dict[str, Any] | None:
    """The footer of a committed shard: task, digest, counts, reasons; None if not committed."""
    path = self.path(stage, shard)
    if recent := self._recent.get(path):
      return recent.meta
    if not path.is_file():
      return None
    import pyarrow.parquet as pq

    try:
      return json.loads(pq.read_metadata(path).metadata[_META])
    except Exception as error:
      raise InputError(
        f"{path}: no shard of this engine ({one_line(error)}); remove it and run again"
      ) from None

  def records(self, stage: str, shard: int) -> Iterator[Record]:
    """The records of a committed shard in key order."""
    path = self.path(stage, shard)
    if recent := self._recent.get(path):
      yield from map(_parse_record, recent.lines)
      return
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
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


@dataclass(frozen=True)
class _Shard:
  """A committed shard in memory; its file is still the one that was written if `state` is its."""

  state: tuple[int, ...]
  meta: dict[str, Any]
  lines: list[str]
  size: int


class _Recent:
  """The shards that this process committed last: the next stage reads them without their files.

  To open a Parquet file costs as much as a hundred rows, so small shards would cost more than their
  items. Rows are kept as text and read anew each time: no reader changes what another gets.
  """

  def __init__(self) -> None:
    self._shards: dict[Path, _Shard] = {}  # the oldest first
    self._size = 0

  def __getstate__(self) -> dict[str, Any]:
    return {"_shards": {}, "_size": 0}  # another process reads the files

  def add(self, path: Path, stage: Stage, records: list[Record], meta: dict[str, Any]) -> None:
    self._drop(path)
    casts = {name: kind for name, kind in stage.columns.items() if kind in (int, float)}
    lines = [_record_line(record, casts) for record in records]
    size = sum(map(len, lines))
    if size > _REMEMBERED:
      return
    self._shards[path] = _Shard(_state(path), meta, lines, size)
    self._size += size
    while self._size > _REMEMBERED:
      self._drop(next(iter(self._shards)))

  def get(self, path: Path) -> _Shard | None:
    """The shard of a file; None once the file is another."""
    shard = self._shards.get(path)
    if shard is None:
      return None
    try:
      if _state(path) == shard.state:
        return shard
    except FileNotFoundError:
      pass
    self._drop(path)
    return None

  def _drop(self, path: Path) -> None:
    shard = self._shards.pop(path, None)
    self._size -= shard.size if shard else 0


def _state(path: Path) -> tuple[int, ...]:
  stat = os.stat(path)
  return stat.st_ino, stat.st_mtime_ns, stat.st_size


def _record_line(record: Record, casts: Mapping[str, type]) -> str:
  """A record as text; its numbers become what the columns of the file would give back."""
  row = record.row
  if row is not None:
    row = {n: casts[n](v) if n in casts and v is not None else v for n, v in row.items()}
  return canonical(vars(record) | {"row": row, "agent": dict(record.agent)})


def _parse_record(line: str) -> Record:
  return Record(**json.loads(line))


def write_parquet(path: Path, stage: Stage, records: list[Record], meta: dict[str, Any]) -> None:
  """Writes the records of a stage, their fields as its columns and `meta` in the footer."""
  import pyarrow as pa
  import pyarrow.parquet as pq

  columns: list[list[Any]] = [
    [getattr(r, n) for r in records] for n in ("key", "input", "fp", "status", "reason")
  ]
  columns.append([canonical(dict(r.agent)) for r in records])
  columns.append([r.row is not None for r in records])
  for name, kind in stage.columns.items():
    values = [None if r.row is None else r.row[name] for r in records]
    if kind is object:
      values = [None if v is None else canonical(v) for v in values]
    columns.append(values)
  schema = _schema(tuple(stage.columns.items()))
  arrays = [pa.array(values, field.type) for values, field in zip(columns, schema, strict=True)]
  table = pa.table(arrays, schema=schema.with_metadata({_META: canonical(meta)}))
  small = table.nbytes < _SMALL
  with pa.OSFile(str(path), "wb") as file:
    pq.write_table(
      table,
      file,
      compression="none" if small else "zstd",
      use_dictionary=not small,
      row_group_size=1024,
    )


@cache
def _schema(columns: tuple[tuple[str, type], ...]) -> "pa.Schema":
  """Of a stage's files: what every record has, then the fields of the stage's rows."""
  import pyarrow as pa

  arrow = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
  names = ("key", "input", "fp", "status", "reason", "agent")
  fields = [(f"_{name}", pa.string()) for name in names] + [("_row", pa.bool_())]
  return pa.schema(fields + [(name, arrow.get(kind, pa.string())) for name, kind in columns])


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
