"""Runs stages and shards of a graph in this process and its workers.

One coordinator feeds each stage's pool from its open shards, a bounded number of items ahead, and
writes down what comes back. Later stages are served first, so rows move on as soon as their shard
is committed and no queue grows.
"""

import contextlib
import json
import queue
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_pipes.engine.graph import (
  KEPT,
  QUARANTINED,
  REJECTED,
  Graph,
  GraphRef,
  Item,
  Row,
  Stage,
  StopRun,
)
from data_pipes.engine.open_shard import OpenShard
from data_pipes.engine.options import ITEM_SECONDS
from data_pipes.engine.pools import Line, Pools
from data_pipes.engine.store import Store
from data_pipes.errors import InputError

Place = tuple[str, int]  # (stage name, shard)

_IN_WORK_PER_WORKER = 2  # items handed out ahead of each worker: back-pressure
_PROGRESS_SECONDS = 1.0


@dataclass
class Progress:
  """What has been done, shown live. Counts of one stage are over its shards in this run."""

  stages: dict[str, dict[str, Any]]
  started: float = field(default_factory=time.time)
  stopped: str = ""
  finished: bool = False

  def to_dict(self) -> dict[str, Any]:
    now = time.time()
    return {
      "started": self.started,
      "updated": now,
      "seconds": round(now - self.started, 1),
      "stopped": self.stopped,
      "finished": self.finished,
      "stages": self.stages,
    }


def run_stages(
  ref: GraphRef,
  store: Store,
  *,
  stages: Sequence[str] | None = None,
  shards: Sequence[int] | None = None,
  graph: Graph | None = None,
  retry_quarantined: bool = False,
  report: Callable[[Progress], None] = lambda progress: None,
  name: str = "local",
  pools: Pools | None = None,
  item_seconds: float = ITEM_SECONDS,
  set_up: Callable[[str], None] | None = None,
  notes: dict[str, Any] | None = None,
) -> Progress:
  """Does what is left of the given stages and shards (default: all).

  Args:
    ref: builds the graph in worker processes; `graph` may be the built one of this process.
    retry_quarantined: gives quarantined items another try.
    report: called about once a second and at the end.
    name: of the progress file, progress/<name>.json.
    pools: workers that stay open for the next call; None opens some for this one.
    item_seconds, set_up: of those `Pools`.
    notes: what surveys say, by stage; those made here are added for the next call, whose shards
      then cost no look at all the others.

  Raises:
    InputError: a shard that a stage reads is not there, or another run has one in work.
    StopRun: budget spent, endpoint down, disk full; what is done is kept.
  """
  graph = graph or ref.build()
  run = _Run(
    graph,
    store,
    stages,
    shards,
    retry_quarantined,
    pools or Pools(ref, item_seconds, set_up),
    {} if notes is None else notes,
  )
  shown = -_PROGRESS_SECONDS

  def show(force: bool = False) -> None:
    nonlocal shown
    if force or time.monotonic() - shown >= _PROGRESS_SECONDS:
      shown = time.monotonic()
      with contextlib.suppress(OSError):
        content = json.dumps(run.refresh().to_dict(), indent=1)
        store.write(f"progress/{name}.json", content + "\n", durable=False)
      report(run.progress)

  try:
    while run.advance():
      show()
    run.progress.finished = True
  except BaseException as error:
    run.progress.stopped = str(error) or type(error).__name__
    graph.halt()
    raise
  finally:
    if pools is None or not run.progress.finished:
      run.pools.close()
    run.close()
    show(force=True)
  return run.progress


class _Run:
  def __init__(
    self,
    graph: Graph,
    store: Store,
    stages: Sequence[str] | None,
    shards: Sequence[int] | None,
    retry: bool,
    pools: Pools,
    notes: dict[str, Any],
  ):
    self.graph, self.store, self.retry, self.pools = graph, store, retry, pools
    names = [s.name for s in graph.stages] if stages is None else list(stages)
    self.stages: list[Stage] = [s for s in graph.stages if s.name in {graph[n].name for n in names}]
    self.shards = list(range(store.shards)) if shards is None else list(shards)
    # What has to be done first, by shard; by None what all shards of a stage wait for (surveys).
    self.missing: Counter[tuple[str, int | None]] = Counter()
    self.waiting: dict[str, deque[int]] = {s.name: deque() for s in self.stages}  # nothing missing
    self.feeding: dict[str, tuple[OpenShard, Iterator[tuple[Item, str]]]] = {}
    self.open: dict[Place, OpenShard] = {}
    self.in_work = dict.fromkeys((s.name for s in self.stages), 0)
    self.sources: dict[int, list[Row]] | None = None
    self.notes = notes
    self.progress = Progress(
      {
        s.name: {"shards": 0, "of": len(self.shards), "done": 0, "reused": 0, "total": 0,
                 "kept": 0, "rejected": 0, "quarantined": 0, "seconds": 0.0}
        for s in self.stages
      }
    )  # fmt: skip
    self._clock: dict[str, float] = {}
    self.committed: dict[str, Counter[str]] = {s.name: Counter() for s in self.stages}
    self._plan()

  def advance(self) -> bool:
    """Hands out what can be handed out, waits for something to come back; False at the end."""
    for stage in reversed(self.stages):
      self._feed(stage)
    if not any(self.in_work.values()):
      if any(self.waiting.values()):
        return True  # a shard just committed lets others begin
      return bool(self.feeding)
    with contextlib.suppress(queue.Empty):
      self._take(*self.pools.results.get(timeout=_PROGRESS_SECONDS))
      while True:
        self._take(*self.pools.results.get_nowait())
    return True

  def _feed(self, stage: Stage) -> None:
    while self.in_work[stage.name] < _IN_WORK_PER_WORKER * stage.workers:
      if stage.name not in self.feeding and not self._open_next(stage):
        return
      shard, items = self.feeding[stage.name]
      item, fp = next(items, (None, ""))
      if item is None:
        del self.feeding[stage.name]
        self._commit_if_finished(shard)
        continue
      self.in_work[stage.name] += 1
      self.pools.submit(shard, item, fp)

  def _open_next(self, stage: Stage) -> bool:
    """Opens the next shard of a stage whose input is there; False if there is none now."""
    waiting = self.waiting[stage.name]
    while waiting:
      number = waiting.popleft()
      sources = self._sources(number) if stage.after is None else ()
      shard = OpenShard(self.store, stage, number, sources, self._survey(stage), self.retry)
      counts = self.progress.stages[stage.name]
      items = iter(()) if shard.current else shard.open()
      counts["total"] += shard.total
      counts["reused"] += shard.total - shard.left
      counts["done"] += shard.total - shard.left
      if shard.current:
        self._finish(shard)
        continue
      self.open[stage.name, number] = shard
      self._clock.setdefault(stage.name, time.monotonic())
      self.feeding[stage.name] = shard, items
      return True
    return False

  def _plan(self) -> None:
    """Counts for each shard of each stage what it waits for, and lists those that wait for nothing.

    What a run does not make itself has to be there. Raises InputError: it is not.
    """
    mine, shards = {s.name for s in self.stages}, set(self.shards)
    for stage in self.stages:
      for name in dict.fromkeys(stage.reads):
        whole = stage.survey is not None and name == stage.after
        if whole and stage.name in self.notes:
          continue  # what was surveyed was there
        for number in range(self.store.shards) if whole else self.shards:
          if name in mine and number in shards:
            self.missing[stage.name, None if whole else number] += 1
          elif self.store.meta(name, number) is None:
            raise InputError(
              f"{stage.name}, shard {self.shards[0] if whole else number}: reads shard {number} of "
              f"{name}, which is not done yet; run that first"
            )
      self._release(stage, self.shards)

  def _release(self, stage: Stage, shards: Iterable[int]) -> None:
    """Lets those of the shards begin that wait for nothing any more."""
    if not self.missing[stage.name, None]:
      self.waiting[stage.name].extend(n for n in shards if not self.missing[stage.name, n])

  def _sources(self, shard: int) -> list[Row]:
    if self.sources is None:
      self.sources = {}
      for row in self.graph.source():
        self.sources.setdefault(self.store.shard_of(row["key"]), []).append(row)
    return self.sources.get(shard, [])

  def _survey(self, stage: Stage) -> Any:
    if stage.survey is None:
      return None
    if stage.name not in self.notes:
      self.notes[stage.name] = stage.survey(self.store.rows(stage.after or ""))
    return self.notes[stage.name]

  def _take(self, shard: OpenShard, key: str, line: Line | BaseException) -> None:
    self.in_work[shard.stage.name] -= 1
    if isinstance(line, BaseException):
      raise line
    shard.record(key, *line)
    counts = self.progress.stages[shard.stage.name]
    counts["done"] += 1
    counts["seconds"] = round(time.monotonic() - self._clock[shard.stage.name], 2)
    self._commit_if_finished(shard)

  def _commit_if_finished(self, shard: OpenShard) -> None:
    feeding = self.feeding.get(shard.stage.name)
    if shard.finished and (feeding is None or feeding[0] is not shard):
      shard.commit()
      del self.open[shard.stage.name, shard.shard]
      self._finish(shard)
    elif shard.finished and feeding and feeding[0] is shard:
      del self.feeding[shard.stage.name]
      self._commit_if_finished(shard)

  def _finish(self, shard: OpenShard) -> None:
    name, number = shard.stage.name, shard.shard
    for stage in self.stages:
      if name in stage.reads:
        whole = stage.survey is not None and name == stage.after
        self.missing[stage.name, None if whole else number] -= 1
        self._release(stage, self.shards if whole else [number])
    self.progress.stages[shard.stage.name]["shards"] += 1
    self.committed[shard.stage.name].update(shard.counts)

  def refresh(self) -> Progress:
    """The progress with the counts of committed and open shards."""
    for name, counts in self.progress.stages.items():
      total = Counter(self.committed[name])
      for (stage, _), shard in self.open.items():
        if stage == name:
          total.update(shard.counts)
      counts.update({status: total[status] for status in (KEPT, REJECTED, QUARANTINED)})
    return self.progress

  def close(self) -> None:
    """Keeps what came back meanwhile, and leaves the journals."""
    with contextlib.suppress(queue.Empty):
      while True:
        shard, key, line = self.pools.results.get_nowait()
        if not isinstance(line, BaseException) and (shard.stage.name, shard.shard) in self.open:
          with contextlib.suppress(StopRun):
            shard.record(key, *line)
    for shard in self.open.values():
      shard.close()
