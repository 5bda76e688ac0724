"""The workers of stages: threads and processes that open a stage once and take its items."""

import multiprocessing
import queue
from concurrent.futures import (
  BrokenExecutor,
  Executor,
  Future,
  ProcessPoolExecutor,
  ThreadPoolExecutor,
)
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

from data_pipes.engine.graph import GraphRef, Item, Process, Stage, StopRun
from data_pipes.engine.open_shard import OpenShard, journal_line
from data_pipes.engine.store import stop_if_full
from data_pipes.errors import InputError, one_line
from data_pipes.jobs import die_with_parent

Line = tuple[bytes, list[str]]  # of the journal, and the statuses of its records


class Pools:
  """The workers of a graph, opened on first use and kept: a model is loaded once a worker.

  Args:
    everything_in_threads: also stages that ask for processes.

  Attributes:
    results: of each item (its shard, its key, its journal line or what was raised).
  """

  def __init__(self, ref: GraphRef, everything_in_threads: bool = False):
    self.results: queue.SimpleQueue = queue.SimpleQueue()
    self._ref, self._threads = ref, everything_in_threads
    self._pools: dict[str, _Pool] = {}

  def submit(self, shard: OpenShard, item: Item, fp: str) -> None:
    """Hands an item to the workers of its stage."""
    stage = shard.stage
    if stage.name not in self._pools:
      kind = _Threads if self._threads or stage.where == "thread" else _Processes
      self._pools[stage.name] = kind(stage, self._ref, self.results)
    self._pools[stage.name].submit(shard, item, fp)

  def close(self) -> None:
    """Waits for the items that workers are at; those that wait for a worker are dropped."""
    for pool in self._pools.values():
      pool.close()
    self._pools.clear()


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


class _Pool:
  """Takes items and puts (shard, key, line or exception) into `results`."""

  def submit(self, shard: OpenShard, item: Item, fp: str) -> None:
    raise NotImplementedError

  def close(self) -> None:
    raise NotImplementedError


class _Threads(_Pool):
  def __init__(self, stage: Stage, ref: GraphRef, results: queue.SimpleQueue):
    self.stage, self.results = stage, results
    self.process = stage.make()
    self.executor: Executor = ThreadPoolExecutor(stage.workers, f"vr-{stage.name}")

  def submit(self, shard: OpenShard, item: Item, fp: str) -> None:
    def work() -> None:
      try:
        line: Any = process_item(self.stage, self.process, item, fp)
      except BaseException as error:
        line = error
      self.results.put((shard, item.key, line))

    self.executor.submit(work)

  def close(self) -> None:
    self.executor.shutdown(wait=True, cancel_futures=True)


class _Processes(_Pool):
  """Spawned worker processes. One that dies takes its pool along; the items that were in work are
  then tried one by one, and the one with which the process dies again is quarantined."""

  def __init__(self, stage: Stage, ref: GraphRef, results: queue.SimpleQueue):
    self.stage, self.ref, self.results = stage, ref, results
    self.in_work: dict[Future, tuple[OpenShard, Item, str]] = {}
    self.executor = self._start(stage.workers)

  def _start(self, workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(
      workers, multiprocessing.get_context("spawn"), _open_stage, (self.ref, self.stage.name)
    )

  def submit(self, shard: OpenShard, item: Item, fp: str) -> None:
    try:
      future = self.executor.submit(_work, item, fp)
    except BrokenExecutor:
      self.executor = self._start(self.stage.workers)
      future = self.executor.submit(_work, item, fp)
    future.add_done_callback(partial(self._done, shard, item, fp))

  def _done(self, shard: OpenShard, item: Item, fp: str, future: Future) -> None:
    if future.cancelled():
      return
    error = future.exception()
    line: Any = error if error else future.result()
    if isinstance(error, BrokenProcessPool):
      line = self._alone(item, fp)
    self.results.put((shard, item.key, line))

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
