"""Where rows live: one Parquet file for each (stage, shard), and a journal while it is in work.

    W/run.json                          settings and the number of shards
    W/10_analyze/00003-of-00016.parquet committed: sorted by key, no times in it, one atomic rename
    W/10_analyze/00003-of-00016.part    journal: a JSON line for each finished input

A run that was killed anywhere continues from the journals and ends with the same bytes as one that
was not. A line torn by the kill is cut off. Rows whose fingerprint no longer fits (another prompt,
model, setting or input) are made again; the others of the shard are kept.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from data_pipes.engine.graph import (
  KEPT,
  QUARANTINED,
  REJECTED,
  Graph,
  Item,
  Row,
  Stage,
  StopRun,
  canonical,
  digest,
)
from data_pipes.errors import InputError

FORMAT = 1
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
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
    with atomic(path, durable) as part:
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
        f"{path}: no shard of this engine ({_line(error)}); remove it and run again"
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


class Task:
  """One (stage, shard) in work: its items, its journal, its commit. One process at a time.

  Args:
    sources: the rows of the graph's source that belong to this shard (first stage only).
    notes: what the stage's survey says, by key.
  """

  def __init__(
    self,
    store: Store,
    stage: Stage,
    shard: int,
    sources: Iterable[Row] = (),
    notes: Mapping[str, Any] | None = None,
    retry_quarantined: bool = False,
  ):
    self.store, self.stage, self.shard = store, stage, shard
    self.path = store.path(stage.name, shard)
    self._notes = notes or {}
    self._sources = sorted(sources, key=lambda row: row["key"])
    self._retry = retry_quarantined
    self.counts: Counter[str] = Counter()
    self._journal: IO[bytes] | None = None
    self._left: set[str] = set()
    self._wanted: dict[str, str] = {}
    self.total = 0  # inputs
    upstream = [digest(self._sources)]
    for name in stage.reads:
      meta = store.meta(name, shard)
      assert meta is not None, f"{stage.name}: shard {shard} of {name} is not committed"
      upstream.append(meta["digest"])
    mine = {} if stage.survey is None else self._notes_of_shard()
    self.fingerprint = digest([stage.fingerprint, upstream, mine])
    meta = store.meta(stage.name, shard)
    self.current = bool(
      meta
      and meta["task"] == self.fingerprint
      and not (self._retry and meta["counts"].get(QUARANTINED))
    )
    if self.current and meta:
      self.counts.update(meta["counts"])
      self.total = meta["inputs"]
      self.path.with_suffix(".part").unlink(missing_ok=True)  # killed between rename and this

  def _notes_of_shard(self) -> dict[str, Any]:
    assert self.stage.after is not None
    keys = (row["key"] for row in self.store.rows(self.stage.after, [self.shard]))
    return {key: self._notes[key] for key in keys if key in self._notes}

  def open(self) -> Iterator[tuple[Item, str]]:
    """The items still to be done, each with its fingerprint; `record` takes their lines.

    Raises:
      InputError: another process has this shard in work.
    """
    items = self._items()
    self._wanted = wanted = {item.key: fp for item, fp in items}
    lines = self._reusable(wanted)
    done = self._open_journal(wanted, lines)
    self.total = len(items)
    self._left = set(wanted) - done
    return ((item, fp) for item, fp in items if item.key not in done)

  def _items(self) -> list[tuple[Item, str]]:
    stage, store = self.stage, self.store
    if stage.after is None:
      items = [(row["key"], (row,), [digest(row)], {}) for row in self._sources]
    else:
      found: dict[str, tuple[list[Row], list[str], dict[str, Any]]] = {}
      for record in store.records(stage.after, self.shard):
        if record.status == KEPT and record.row is not None:
          key = str(record.row[stage.group]) if stage.group else record.key
          made = {stage.after: record.agent}
          rows, hashes, _ = found.setdefault(key, ([], [], made))
          rows.append(record.row)
          hashes.append(record.content())
      items = [(key, tuple(rows), hashes, made) for key, (rows, hashes, made) in found.items()]
    joined: dict[str, dict[str, Record]] = {
      name: {r.key: r for r in store.records(name, self.shard) if r.status == KEPT}
      for name in stage.joins
    }
    out = []
    for key, rows, hashes, agents in items:
      partners = {name: joined[name][rows[0][by]] for name, by in stage.joins.items()}
      hashes = hashes + [record.content() for record in partners.values()]
      note = self._notes.get(key)
      fp = digest([stage.fingerprint, key, hashes, note])
      agents = agents | {name: record.agent for name, record in partners.items()}
      joined_rows = {name: record.row or {} for name, record in partners.items()}
      out.append((Item(key, rows, joined_rows, note, agents), fp))
    return out

  def _reusable(self, wanted: Mapping[str, str]) -> dict[str, bytes]:
    """Journal lines for the inputs of an outdated commit that are still right."""
    if not self.path.is_file():
      return {}
    of_input: dict[str, list[Record]] = {}
    for record in self.store.records(self.stage.name, self.shard):
      if wanted.get(record.input) == record.fp:
        of_input.setdefault(record.input, []).append(record)
    return {
      key: _dump(key, records[0].fp, records)
      for key, records in of_input.items()
      if not (self._retry and any(r.status == QUARANTINED for r in records))
    }

  def _open_journal(self, wanted: Mapping[str, str], lines: Mapping[str, bytes]) -> set[str]:
    part = self.path.with_suffix(".part")
    with stop_if_full(part):
      part.parent.mkdir(parents=True, exist_ok=True)
      self._journal = journal = open(part, "ab+")  # noqa: SIM115
      try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        journal.close()
        raise InputError(
          f"{part}: another run has this shard in work; wait for it to end"
        ) from None
      end, done = 0, set()
      journal.seek(0)
      for raw in journal:
        head = _parse(raw)
        if head is None:
          break  # torn by a kill: cut off here, whatever follows
        end += len(raw)
        quarantined = any(r["status"] == QUARANTINED for r in head["records"])
        if wanted.get(head["input"]) == head["fp"] and not (self._retry and quarantined):
          self._count(head["records"])
          done.add(head["input"])
      journal.truncate(end)
      for key, line in lines.items():
        if key not in done:
          journal.write(line)
          self._count(json.loads(line)["records"])
          done.add(key)
      journal.flush()
    return done

  def _count(self, records: Iterable[Mapping[str, Any]]) -> None:
    self.counts.update(r["status"] for r in records)

  def record(self, key: str, line: bytes, statuses: Iterable[str]) -> None:
    """Takes the line that `journal_line` made of a finished item."""
    assert self._journal is not None
    with stop_if_full(self.path):
      self._journal.write(line)
      self._journal.flush()  # to the system: survives the death of this process
    self.counts.update(statuses)
    self._left.discard(key)

  @property
  def left(self) -> int:
    """Inputs that are not done."""
    return len(self._left)

  @property
  def finished(self) -> bool:
    return not self._left

  def close(self) -> None:
    """Leaves the journal for a later run."""
    if self._journal is not None:
      with contextlib.suppress(OSError):  # a full disk was reported where it was met
        self._journal.close()
      self._journal = None

  def commit(self) -> None:
    """Writes the shard in key order by one rename and drops the journal."""
    assert self._journal is not None, "not open"
    assert self.finished, f"{len(self._left)} items are not done"
    records: dict[str, list[Record]] = {}
    self._journal.seek(0)
    for raw in self._journal:
      head = _parse(raw)
      if head and self._wanted.get(head["input"]) == head["fp"]:  # the last line of an input counts
        agent = head["agent"]
        records[head["input"]] = [
          Record(r["key"], head["input"], head["fp"], r["status"], r["reason"], r["row"], agent)
          for r in head["records"]
        ]
    ordered = sorted((r for some in records.values() for r in some), key=lambda r: (r.key, r.input))
    ordered = list(_one_row_a_key(ordered))
    self.counts = Counter(r.status for r in ordered)
    with stop_if_full(self.path), atomic(self.path) as part:
      _write_parquet(part, self.stage, ordered, self._meta(ordered, len(records)))
    self.path.with_suffix(".part").unlink()
    self.close()

  def _meta(self, records: list[Record], inputs: int) -> dict[str, Any]:
    reasons = Counter(_kind(r.reason) for r in records if r.status != KEPT)
    return {
      "task": self.fingerprint,
      "stage": self.stage.fingerprint,
      "digest": digest([r.content() for r in records if r.status == KEPT]),
      "inputs": inputs,
      "counts": dict(sorted(Counter(r.status for r in records).items())),
      "reasons": dict(sorted(reasons.items())),
      "columns": {n: "json" if t is object else t.__name__ for n, t in self.stage.columns.items()},
    }


def _value(cell: Any, kind: str) -> Any:
  return json.loads(cell) if kind == "json" and cell is not None else cell


def journal_line(stage: Stage, key: str, fp: str, outcome: Any) -> tuple[bytes, list[str]]:
  """A finished item as its journal line, and the statuses of its records.

  `outcome` is an Outcome, or the text of the fault for which the item is quarantined.
  """
  if isinstance(outcome, str):
    records = [Record(key, key, fp, QUARANTINED, outcome, None, stage.agent)]
  else:
    records = [
      Record(row.key, key, fp, KEPT, "", vars(row), stage.agent) for row in outcome.rows
    ] + [
      Record(r.key, key, fp, REJECTED, r.reason, vars(r.row) if r.row is not None else None,
             stage.agent)
      for r in outcome.rejected
    ]  # fmt: skip
    if not records:
      records = [Record(key, key, fp, REJECTED, "nothing found", None, stage.agent)]
  return _dump(key, fp, records), [r.status for r in records]


def _dump(key: str, fp: str, records: list[Record]) -> bytes:
  line = {
    "input": key,
    "fp": fp,
    "agent": dict(records[0].agent),
    "records": [
      {"key": r.key, "status": r.status, "reason": r.reason, "row": r.row} for r in records
    ],
  }
  return canonical(line).encode("utf-8", "replace") + b"\n"


def _parse(raw: bytes) -> dict[str, Any] | None:
  if not raw.endswith(b"\n"):
    return None
  try:
    return json.loads(raw)
  except ValueError:
    return None


def _one_row_a_key(records: list[Record]) -> Iterator[Record]:
  seen: dict[str, str] = {}
  for r in records:
    if r.status == KEPT and r.key in seen:
      reason = f"same key as from {seen[r.key]}"
      yield Record(r.key, r.input, r.fp, REJECTED, reason, r.row, r.agent)
      continue
    if r.status == KEPT:
      seen[r.key] = r.input
    yield r


def _kind(reason: str) -> str:
  """The reason without its particulars, to count by: what stands before the first colon."""
  return reason.partition(":")[0][:80]


def _write_parquet(path: Path, stage: Stage, records: list[Record], meta: dict[str, Any]) -> None:
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
def atomic(path: Path, durable: bool = True, alone: bool = True) -> Iterator[Path]:
  """Gives a path to write to; on success it takes the place of `path`.

  `durable`: it is on the disk before it does, so that a power cut leaves the old file or the new.
  `alone`: no other process writes this path meanwhile, not even one that a killed run left behind;
  then the part has one name, and a kill leaves nothing for good.
  """
  part = path.with_name(f".{path.name}.tmp" if alone else f".{path.name}.{os.getpid()}.tmp")
  path.parent.mkdir(parents=True, exist_ok=True)
  try:
    yield part
    if durable:
      with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
  finally:
    part.unlink(missing_ok=True)


@contextlib.contextmanager
def stop_if_full(path: Path) -> Iterator[None]:
  """A full disk stops the run in good order."""
  try:
    yield
  except OSError as error:
    if error.errno not in _FULL:
      raise
    raise StopRun(
      f"{path}: {error.strerror}; nothing that was done is lost: make room and run again"
    ) from error


def _line(error: Exception) -> str:
  return " ".join(str(error).split())[:200]


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
