"""Runs the tasks of a graph on this machine: threads and processes, no server.

One coordinator feeds each stage's pool from its open tasks, a bounded number of items ahead, and
writes down what comes back. Later stages are served first, so rows move on as soon as their shard
is committed and no queue grows.
"""

import contextlib
import json
import multiprocessing
import queue
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import (
  BrokenExecutor,
  Executor,
  Future,
  ProcessPoolExecutor,
  ThreadPoolExecutor,
)
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from data_pipes.engine.graph import (
  KEPT,
  QUARANTINED,
  REJECTED,
  Graph,
  GraphRef,
  Item,
  Process,
  Row,
  Stage,
  StopRun,
)
from data_pipes.engine.store import Store, Task, journal_line, stop_if_full
from data_pipes.errors import InputError
from data_pipes.jobs import die_with_parent

Wanted = tuple[str, int]  # (stage name, shard)
Line = tuple[bytes, list[str]]

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


def run_tasks(
  ref: GraphRef,
  store: Store,
  *,
  stages: Sequence[str] | None = None,
  shards: Sequence[int] | None = None,
  graph: Graph | None = None,
  retry_quarantined: bool = False,
  report: Callable[[Progress], None] = lambda progress: None,
  name: str = "local",
  everything_in_threads: bool = False,
) -> Progress:
  """Does all tasks of the given stages and shards (default: all) that are not done yet.

  Args:
    ref: builds the graph in worker processes; `graph` may be the built one of this process.
    retry_quarantined: gives quarantined items another try.
    report: called about once a second and at the end.
    name: of the progress file, progress/<name>.json.
    everything_in_threads: also stages that ask for processes.

  Raises:
    InputError: a shard that a stage reads is not there, or another run has one in work.
    StopRun: budget spent, endpoint down, disk full; what is done is kept.
  """
  graph = graph or ref.build()
  run = _Run(ref, graph, store, stages, shards, retry_quarantined, everything_in_threads)
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
    raise
  finally:
    run.close()
    show(force=True)
  return run.progress


class _Run:
  def __init__(self, ref, graph, store, stages, shards, retry, threads):
    self.ref, self.graph, self.store, self.retry = ref, graph, store, retry
    names = [s.name for s in graph.stages] if stages is None else list(stages)
    self.stages: list[Stage] = [s for s in graph.stages if s.name in {graph[n].name for n in names}]
    self.shards = list(range(store.shards)) if shards is None else list(shards)
    self.waiting: dict[str, deque[int]] = {s.name: deque(self.shards) for s in self.stages}
    self.feeding: dict[str, tuple[Task, Iterator[tuple[Item, str]]]] = {}
    self.open: dict[Wanted, Task] = {}
    self.done: set[Wanted] = set()
    self.pools: dict[str, _Pool] = {}
    self.results: queue.SimpleQueue = queue.SimpleQueue()
    self.in_work = dict.fromkeys((s.name for s in self.stages), 0)
    self.threads = threads
    self.sources: dict[int, list[Row]] | None = None
    self.notes: dict[str, Any] = {}
    self.progress = Progress(
      {
        s.name: {"shards": 0, "of": len(self.shards), "done": 0, "reused": 0, "total": 0,
                 "kept": 0, "rejected": 0, "quarantined": 0, "seconds": 0.0}
        for s in self.stages
      }
    )  # fmt: skip
    self._clock: dict[str, float] = {}
    self.committed: dict[str, Counter[str]] = {s.name: Counter() for s in self.stages}

  def advance(self) -> bool:
    """Hands out what can be handed out, waits for something to come back; False at the end."""
    for stage in reversed(self.stages):
      self._feed(stage)
    if not any(self.in_work.values()):
      if any(self.waiting.values()):
        return True  # a task just committed lets others begin
      return bool(self.feeding)
    with contextlib.suppress(queue.Empty):
      self._take(*self.results.get(timeout=_PROGRESS_SECONDS))
      while True:
        self._take(*self.results.get_nowait())
    return True

  def _feed(self, stage: Stage) -> None:
    while self.in_work[stage.name] < _IN_WORK_PER_WORKER * stage.workers:
      if stage.name not in self.feeding and not self._open_next(stage):
        return
      task, items = self.feeding[stage.name]
      found = next(items, None)
      if found is None:
        del self.feeding[stage.name]
        self._commit_if_finished(task)
        continue
      self.in_work[stage.name] += 1
      self._pool(stage).submit(task, *found)

  def _open_next(self, stage: Stage) -> bool:
    """Opens the next task of a stage whose input is there; False if there is none now."""
    waiting = self.waiting[stage.name]
    for _ in range(len(waiting)):
      shard = waiting.popleft()
      if not self._ready(stage, shard):
        waiting.append(shard)
        continue
      sources = self._sources(shard) if stage.after is None else ()
      task = Task(self.store, stage, shard, sources, self._survey(stage), self.retry)
      counts = self.progress.stages[stage.name]
      items = iter(()) if task.current else task.open()
      counts["total"] += task.total
      counts["reused"] += task.total - task.left
      counts["done"] += task.total - task.left
      if task.current:
        self._finish(task)
        continue
      self.open[stage.name, shard] = task
      self._clock.setdefault(stage.name, time.monotonic())
      self.feeding[stage.name] = task, items
      return True
    return False

  def _ready(self, stage: Stage, shard: int) -> bool:
    mine = {s.name for s in self.stages}
    for name in stage.reads:
      every = range(self.store.shards) if stage.survey and name == stage.after else [shard]
      for needed in every:
        if name in mine and needed in self.shards:
          if (name, needed) not in self.done:
            return False
        elif self.store.meta(name, needed) is None:
          raise InputError(
            f"{stage.name}, shard {shard}: reads shard {needed} of {name}, which is not done yet; "
            "run that first"
          )
    return True

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

  def _take(self, task: Task, key: str, line: Line | BaseException) -> None:
    self.in_work[task.stage.name] -= 1
    if isinstance(line, BaseException):
      raise line
    task.record(key, *line)
    counts = self.progress.stages[task.stage.name]
    counts["done"] += 1
    counts["seconds"] = round(time.monotonic() - self._clock[task.stage.name], 2)
    self._commit_if_finished(task)

  def _commit_if_finished(self, task: Task) -> None:
    feeding = self.feeding.get(task.stage.name)
    if task.finished and (feeding is None or feeding[0] is not task):
      task.commit()
      del self.open[task.stage.name, task.shard]
      self._finish(task)
    elif task.finished and feeding and feeding[0] is task:
      del self.feeding[task.stage.name]
      self._commit_if_finished(task)

  def _finish(self, task: Task) -> None:
    self.done.add((task.stage.name, task.shard))
    self.progress.stages[task.stage.name]["shards"] += 1
    self.committed[task.stage.name].update(task.counts)

  def refresh(self) -> Progress:
    """The progress with the counts of committed and open tasks."""
    for name, counts in self.progress.stages.items():
      total = Counter(self.committed[name])
      for (stage, _), task in self.open.items():
        if stage == name:
          total.update(task.counts)
      counts.update({status: total[status] for status in (KEPT, REJECTED, QUARANTINED)})
    return self.progress

  def _is_thread(self, stage: Stage) -> bool:
    return self.threads or stage.where == "thread"

  def _pool(self, stage: Stage) -> "_Pool":
    if stage.name not in self.pools:
      kind = _Threads if self._is_thread(stage) else _Processes
      self.pools[stage.name] = kind(stage, self.ref, self.results)
    return self.pools[stage.name]

  def close(self) -> None:
    """Ends the pools, lets what comes back meanwhile be kept, and leaves the journals."""
    for pool in self.pools.values():
      pool.close()
    with contextlib.suppress(queue.Empty):
      while True:
        task, key, line = self.results.get_nowait()
        if not isinstance(line, BaseException) and (task.stage.name, task.shard) in self.open:
          with contextlib.suppress(StopRun):
            task.record(key, *line)
    for task in self.open.values():
      task.close()


def process_item(stage: Stage, process: Process, item: Item, fp: str) -> Line:
  """Runs one item; whatever fails in it quarantines it, unless the run has to stop.

  Raises:
    StopRun: nothing more can be done now.
  """
  try:
    with stop_if_full(Path(stage.name)):
      outcome: Any = process(item)
    return journal_line(stage, item.key, fp, outcome)
  except StopRun:
    raise
  except InputError as error:
    outcome = " ".join(str(error).split())
  except Exception as error:
    outcome = f"{type(error).__name__}: {' '.join(str(error).split())}"
  return journal_line(stage, item.key, fp, outcome[:500])


class _Pool:
  """Takes items and puts (task, key, line or exception) into `results`."""

  def submit(self, task: Task, item: Item, fp: str) -> None:
    raise NotImplementedError

  def close(self) -> None:
    raise NotImplementedError


class _Threads(_Pool):
  def __init__(self, stage: Stage, ref: GraphRef, results: queue.SimpleQueue):
    self.stage, self.results = stage, results
    self.process = stage.make()
    self.executor: Executor = ThreadPoolExecutor(stage.workers, f"vr-{stage.name}")

  def submit(self, task: Task, item: Item, fp: str) -> None:
    def work() -> None:
      try:
        line: Any = process_item(self.stage, self.process, item, fp)
      except BaseException as error:
        line = error
      self.results.put((task, item.key, line))

    self.executor.submit(work)

  def close(self) -> None:
    self.executor.shutdown(wait=True, cancel_futures=True)


class _Processes(_Pool):
  """Spawned worker processes. One that dies takes its pool along; the items that were in work are
  then tried one by one, and the one with which the process dies again is quarantined."""

  def __init__(self, stage: Stage, ref: GraphRef, results: queue.SimpleQueue):
    self.stage, self.ref, self.results = stage, ref, results
    self.in_work: dict[Future, tuple[Task, Item, str]] = {}
    self.executor = self._start(stage.workers)

  def _start(self, workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(
      workers, multiprocessing.get_context("spawn"), _open_stage, (self.ref, self.stage.name)
    )

  def submit(self, task: Task, item: Item, fp: str) -> None:
    try:
      future = self.executor.submit(_work, item, fp)
    except BrokenExecutor:
      self.executor = self._start(self.stage.workers)
      future = self.executor.submit(_work, item, fp)
    future.add_done_callback(partial(self._done, task, item, fp))

  def _done(self, task: Task, item: Item, fp: str, future: Future) -> None:
    if future.cancelled():
      return
    error = future.exception()
    line: Any = error if error else future.result()
    if isinstance(error, BrokenProcessPool):
      line = self._alone(item, fp)
    self.results.put((task, item.key, line))

  def _alone(self, item: Item, fp: str) -> Any:
    with self._start(1) as single:
      try:
        return single.submit(_work, item, fp).result()
      except BrokenProcessPool:
        return journal_line(self.stage, item.key, fp, "the worker process died with this item")
      except StopRun as error:
        return error

  def close(self) -> None:
    self.executor.shutdown(wait=True, cancel_futures=True)


_opened: tuple[Stage, Process] | Exception | None = None


def _open_stage(ref: GraphRef, name: str) -> None:
  global _opened
  die_with_parent()
  try:
    stage = ref.build()[name]
    _opened = stage, stage.make()
  except Exception as error:  # raised here it would only break the pool
    _opened = error


def _work(item: Item, fp: str) -> Line:
  assert _opened is not None
  if isinstance(_opened, Exception):
    raise _opened
  return process_item(*_opened, item, fp)
