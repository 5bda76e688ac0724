"""The workers of stages: threads for endpoints, processes for all that may crash or hang."""

import contextlib
import functools
import itertools
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from data_pipes import isolation
from data_pipes.engine.graph import Graph, GraphRef, Item, Process, Stage, StopRun
from data_pipes.engine.open_shard import OpenShard, journal_line
from data_pipes.engine.options import ITEM_SECONDS
from data_pipes.engine.store import stop_if_full
from data_pipes.errors import InputError, one_line

Line = tuple[bytes, list[str]]  # of the journal, and the statuses of its records
CRASHED = "the worker process died with this item"


class Pools:
  """The workers of a graph, opened on first use and kept: a model is loaded once a worker.

  Stages that compute share worker processes, one for each item that may be in work; a stage with a
  model has some of its own. An item that kills its process, or takes longer than it may, is
  quarantined, and the process replaced.

  Args:
    item_seconds: that an item may take in a worker process.
    set_up: called with the name of a stage in the process that is its alone, before it is opened.

  Attributes:
    results: of each item (its shard, its key, its journal line or what was raised).
  """

  def __init__(
    self,
    ref: GraphRef,
    item_seconds: float = ITEM_SECONDS,
    set_up: Callable[[str], None] | None = None,
  ):
    self._set_up = set_up
    self.results: queue.SimpleQueue = queue.SimpleQueue()
    self._ref, self._seconds = ref, item_seconds
    self._token = f"{os.getpid()}-{next(_tokens)}"  # what is opened belongs to these pools
    self._pools: dict[str, _Pool] = {}
    self._places: dict[int, threading.BoundedSemaphore] = {}

  def submit(self, shard: OpenShard, item: Item, fp: str) -> None:
    """Hands an item to the workers of its stage."""
    name = shard.stage.name
    if name not in self._pools:
      self._pools[name] = _Pool(shard.stage, self._work_of(shard.stage), self.results)
    self._pools[name].submit(shard, item, fp)

  def _work_of(self, stage: Stage) -> "_Work":
    if stage.where == "thread":
      return functools.partial(process_item, stage, stage.make())
    ready = functools.partial(_open, self._token, self._ref, stage.name)
    if stage.where == "own process":
      if self._set_up is not None:
        ready = functools.partial(ready, functools.partial(self._set_up, stage.name))
      return _Isolated(stage, isolation.Workers(), ready, self._seconds)
    places = self._places.setdefault(stage.workers, threading.BoundedSemaphore(stage.workers))
    return _Isolated(stage, isolation.shared(), ready, self._seconds, places)

  def close(self) -> None:
    """Ends the workers: threads when they are done with their item, processes at once. Items that
    are not done are dropped: they are done again by the next run."""
    for pool in self._pools.values():
      pool.closing = True
      if isinstance(pool.work, _Isolated):
        pool.work.close()
    for pool in self._pools.values():
      pool.close()
    self._pools.clear()


_tokens = itertools.count()


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
    outcome = one_line(error, 500)
  except Exception as error:
    outcome = f"{type(error).__name__}: {one_line(error, 500)}"
  return journal_line(stage, item.key, fp, outcome[:500])


_Work = Callable[[Item, str], Line]


class _Isolated:
  """Items of a stage, each in a worker process, at most as many at a time as there are `places`."""

  def __init__(
    self,
    stage: Stage,
    workers: isolation.Workers,
    ready: Callable[[], None],
    seconds: float,
    places: threading.BoundedSemaphore | None = None,
  ):
    self.stage, self._workers, self._ready, self._seconds = stage, workers, ready, seconds
    self._places = places or contextlib.nullcontext()

  def __call__(self, item: Item, fp: str) -> Line:
    try:
      with self._places:
        call = (_work, self.stage.name, item, fp)
        limits: Any = {"seconds": self._seconds, "ready": self._ready, "group": self}
        return self._workers.call(*call, **limits)
    except isolation.Ended as error:
      if not error.begun:
        raise InputError(f"{self.stage.name}: what the stage needs {error}") from None
      reason = CRASHED if str(error).startswith("crashed") else f"the worker process {error}"
      return journal_line(self.stage, item.key, fp, reason)

  def close(self) -> None:
    if self._workers is isolation.shared():
      self._workers.end(self)
    else:
      self._workers.close()


class _Pool:
  """Takes items and puts (shard, key, line or exception) into `results`."""

  def __init__(self, stage: Stage, work: _Work, results: queue.SimpleQueue):
    self.work, self.closing, self._results = work, False, results
    self._executor = ThreadPoolExecutor(stage.workers, f"vr-{stage.name}")

  def submit(self, shard: OpenShard, item: Item, fp: str) -> None:
    def run() -> None:
      try:
        line: Any = self.work(item, fp)
      except BaseException as error:
        line = error
      if not self.closing or not isinstance(self.work, _Isolated):
        self._results.put((shard, item.key, line))

    self._executor.submit(run)

  def close(self) -> None:
    self._executor.shutdown(wait=True, cancel_futures=True)


# In a worker process

_opened: tuple[str, Graph, dict[str, Process]] | None = None  # of the pools that asked last


def _open(token: str, ref: GraphRef, name: str, set_up: Callable[[], None] = lambda: None) -> None:
  """Opens a stage for the pools with this token, unless it is open; drops what others opened."""
  global _opened
  if _opened is None or _opened[0] != token:
    set_up()
    _opened = token, ref.build(), {}
  _, graph, processes = _opened
  if name not in processes:
    processes[name] = graph[name].make()


def _work(name: str, item: Item, fp: str) -> Line:
  assert _opened is not None
  _, graph, processes = _opened
  return process_item(graph[name], processes[name], item, fp)
