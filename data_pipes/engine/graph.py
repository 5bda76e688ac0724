"""A graph of stages: what each reads, what decides its rows, and how its rows are fingerprinted.

Nothing here knows about videos: `store` keeps the rows, `open_shard` has one shard of a stage in
work, `pipeline` takes items through the stages, `job` spreads shards over processes and machines,
and the engine's own stages are made in `stages`.
"""

import hashlib
import importlib
import json
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cached_property
from typing import Any

from data_pipes.errors import InputError

Row = dict[str, Any]  # the fields of a stage's row type; always with "key"

KEPT, REJECTED, QUARANTINED = "kept", "rejected", "quarantined"


@dataclass(frozen=True)
class Item:
  """What a stage is given at once.

  Attributes:
    key: of the input row, or the common value of a group of rows.
    rows: the input row; or all rows of a group.
    joined: per joined stage, the row that belongs to the (first) input row.
    note: what the stage's survey of all shards says about this key.
    agents: per stage that was read, who made its row.
  """

  key: str
  rows: tuple[Row, ...]
  joined: Mapping[str, Row] = field(default_factory=dict)
  note: Any = None
  agents: Mapping[str, Any] = field(default_factory=dict)

  @property
  def row(self) -> Row:
    return self.rows[0]


@dataclass(frozen=True)
class Rejected:
  """A candidate that was dropped; `row` keeps what was known of it, as evidence."""

  key: str
  reason: str
  row: Any = None


@dataclass(frozen=True)
class Outcome:
  """What became of an item: rows of the stage's row type, and dropped candidates."""

  rows: Sequence[Any] = ()
  rejected: Sequence[Rejected] = ()


Process = Callable[[Item], Outcome]


class StopRun(Exception):
  """Ends a run early with every item in order: budget spent, endpoint down, disk full.

  Nothing is quarantined for it; the same command goes on from here.
  """


@dataclass(frozen=True)
class Stage:
  """One stage.

  Attributes:
    name: also its folder, such as "10_analyze".
    row: dataclass of its rows; scalar fields become Parquet columns, others JSON text.
    make: opens what the stage needs (models, clients) and returns its process; called once in each
      worker process.
    identity: everything that decides the rows: code version, settings, prompts, models.
    after: the stage whose rows it reads; None reads the graph's source.
    joins: {stage: field of the input row that holds that stage's key}.
    group: field of the input rows whose equal values come together as one item.
    survey: a function of all rows of `after`, over all shards, to {key: note}; such a stage waits
      until `after` is complete.
    where: "thread"; "process", shared with other stages; "own process", which loads a model.
    workers: items in work at the same time.
  """

  name: str
  row: type
  make: Callable[[], Process]
  identity: Mapping[str, Any]
  after: str | None = None
  joins: Mapping[str, str] = field(default_factory=dict)
  group: str | None = None
  survey: Callable[[Iterable[Row]], Mapping[str, Any]] | None = None
  where: str = "thread"
  workers: int = 1

  @cached_property
  def fingerprint(self) -> str:
    return digest([self.name, self.row.__name__, dict(self.identity)])

  @property
  def agent(self) -> Mapping[str, Any]:
    """Who made a row of this stage, for provenance."""
    return {key: self.identity[key] for key in ("backend", "prompts") if key in self.identity}

  @property
  def reads(self) -> tuple[str, ...]:
    """The stages whose shard must be there first."""
    return tuple(filter(None, (self.after, *self.joins)))

  @cached_property
  def columns(self) -> dict[str, type]:
    """Fields of the row type and their Python types; what is not a scalar is `object`."""
    hints = typing.get_type_hints(self.row)
    return {f.name: _scalar(hints[f.name]) for f in fields(self.row)}


def _scalar(kind: Any) -> type:
  if typing.get_origin(kind) in (types.UnionType, typing.Union):
    inner = [a for a in typing.get_args(kind) if a is not type(None)]
    kind = inner[0] if len(inner) == 1 else object
  return kind if kind in (str, int, float, bool) else object


@dataclass(frozen=True)
class Graph:
  """Stages in an order in which each comes after those it reads, and where their input comes from.

  `source` lists the input rows, each with a "key" and whatever identifies its content. `halt` is
  called when a run stops early: who waits in a thread need not any longer.
  """

  stages: tuple[Stage, ...]
  source: Callable[[], Iterable[Row]]
  halt: Callable[[], None] = lambda: None

  def __post_init__(self):
    seen: set[str] = set()
    for stage in self.stages:
      missing = [name for name in stage.reads if name not in seen]
      assert not missing, f"{stage.name} reads {missing}, which do not come before it"
      assert is_dataclass(stage.row), stage.row
      seen.add(stage.name)

  def __getitem__(self, name: str) -> Stage:
    for stage in self.stages:
      if stage.name == name:
        return stage
    names = ", ".join(s.name for s in self.stages)
    raise InputError(f"stage {name!r} is not in this graph; accepted: {names}")


@dataclass(frozen=True)
class GraphRef:
  """A graph that any process can build: "module:function" and its one argument, JSON values."""

  target: str
  settings: Any

  def build(self) -> Graph:
    return load_target(self.target)(self.settings)


def load_target(target: str) -> Any:
  """What "module:name" names.

  Raises:
    InputError: no such module or name in it.
  """
  module, colon, name = target.partition(":")
  try:
    if not colon:
      raise ValueError("a colon is missing")
    return getattr(importlib.import_module(module), name)
  except (ImportError, AttributeError, ValueError) as error:
    raise InputError(f"target {target!r}: {error}; accepted: 'module:name'") from error


def canonical(value: Any) -> str:
  """JSON with sorted keys and no spaces: equal values give equal text."""
  return json.dumps(
    value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=_plain
  )


def digest(value: Any, size: int = 12) -> str:
  """blake2b of a value's canonical JSON, in hex."""
  return hashlib.blake2b(canonical(value).encode("utf-8", "replace"), digest_size=size).hexdigest()


def _plain(value: Any) -> Any:
  if hasattr(value, "item"):  # numpy scalars
    return value.item()
  if is_dataclass(value) and not isinstance(value, type):
    return {f.name: getattr(value, f.name) for f in fields(value)}
  raise TypeError(f"{type(value).__name__} does not belong into a row")
