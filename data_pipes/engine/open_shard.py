"""One shard of one stage in work: its items, its journal, its commit."""

import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from data_pipes.engine.graph import (
  KEPT,
  QUARANTINED,
  REJECTED,
  Item,
  Row,
  Stage,
  canonical,
  digest,
)
from data_pipes.engine.store import Record, Store, stop_if_full
from data_pipes.jobs import Journal, JsonRows


class OpenShard:
  """A shard of a stage in work, in one process at a time.

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
    self._journal: Journal | None = None
    self._left: set[str] = set()
    self._expected: dict[str, str] = {}  # key of each input -> fingerprint
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
    self._expected = {item.key: fp for item, fp in items}
    earlier = self._reusable()
    part = self.path.with_suffix(".part")
    with stop_if_full(part):
      in_use = "another run has this shard in work; wait for it to end"
      self._journal = Journal(part, JsonRows(_journal_key), in_use)
      done = self._take_over(earlier)
    self.total = len(items)
    self._left = self._expected.keys() - done
    return ((item, fp) for item, fp in items if item.key not in done)

  def _items(self) -> list[tuple[Item, str]]:
    """All inputs with their fingerprints: of what they hold, who made it, and the stage itself."""
    stage, store = self.stage, self.store
    joined: dict[str, dict[str, Record]] = {
      name: {r.key: r for r in store.records(name, self.shard) if r.status == KEPT}
      for name in stage.joins
    }
    out = []
    for key, (rows, hashes, agents) in self._groups().items():
      partners = {name: joined[name][rows[0][by]] for name, by in stage.joins.items()}
      hashes = hashes + [record.content() for record in partners.values()]
      note = self._notes.get(key)
      fp = digest([stage.fingerprint, key, hashes, note])
      agents = agents | {name: record.agent for name, record in partners.items()}
      joined_rows = {name: record.row or {} for name, record in partners.items()}
      out.append((Item(key, tuple(rows), joined_rows, note, agents), fp))
    return out

  def _groups(self) -> dict[str, tuple[list[Row], list[str], dict[str, Any]]]:
    """The rows of each input, their hashes, and who made them, by stage."""
    stage = self.stage
    if stage.after is None:
      return {row["key"]: ([row], [digest(row)], {}) for row in self._sources}
    groups: dict[str, tuple[list[Row], list[str], dict[str, Any]]] = {}
    for record in self.store.records(stage.after, self.shard):
      if record.status == KEPT and record.row is not None:
        key = str(record.row[stage.group]) if stage.group else record.key
        rows, hashes, _ = groups.setdefault(key, ([], [], {stage.after: record.agent}))
        rows.append(record.row)
        hashes.append(record.content())
    return groups

  def _reusable(self) -> dict[str, bytes]:
    """Journal lines for the inputs of an outdated commit that are still right."""
    if not self.path.is_file():
      return {}
    by_input: dict[str, list[Record]] = {}
    for record in self.store.records(self.stage.name, self.shard):
      if self._expected.get(record.input) == record.fp:
        by_input.setdefault(record.input, []).append(record)
    return {key: _dump(key, records[0].fp, records) for key, records in by_input.items()}

  def _take_over(self, earlier: Mapping[str, bytes]) -> set[str]:
    """The inputs that are done: in the journal, or in `earlier` lines, which then go there too."""
    assert self._journal is not None
    done = set()
    for key, fp in self._expected.items():
      name = f"{fp} {key}"
      lines = [self._journal[name]] if name in self._journal else []
      lines += [earlier[key]] if key in earlier else []
      for line in lines:
        statuses = [record["status"] for record in json.loads(line)["records"]]
        if not (self._retry and QUARANTINED in statuses):
          if line is earlier.get(key):
            self._journal.add(name, line)
          self.counts.update(statuses)
          done.add(key)
          break
    return done

  def record(self, key: str, line: bytes, statuses: Iterable[str]) -> None:
    """Takes the line that `journal_line` made of a finished item."""
    assert self._journal is not None
    with stop_if_full(self.path):
      self._journal.add(f"{self._expected[key]} {key}", line)
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
    for key, fp in self._expected.items():
      head = json.loads(self._journal[f"{fp} {key}"])
      records[key] = [
        Record(r["key"], key, fp, r["status"], r["reason"], r["row"], head["agent"])
        for r in head["records"]
      ]
    ordered = sorted((r for some in records.values() for r in some), key=lambda r: (r.key, r.input))
    ordered = list(_one_row_a_key(ordered))
    self.counts = Counter(r.status for r in ordered)
    self.store.commit(self.stage, self.shard, ordered, self._meta(ordered, len(records)))
    self._journal.close(delete=True)
    self._journal = None

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


def _journal_key(head: Mapping[str, Any]) -> str:
  """An input together with its fingerprint: a row counts for the settings that it was made with."""
  return f"{head['fp']} {head['input']}"


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
