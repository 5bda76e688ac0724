"""Units of work that may be killed anywhere and run again, and the runners that run them.

A job is a row of stages; a stage is a number of shards; a task is one (stage, shard). A task writes
its output once, by an atomic rename (`files.replaced`), and is done when the output is there. While
it runs, finished rows go to a `Journal`; started again, it goes on behind them. So a killed job
that is started again ends with the same bytes as one that was not, and any scheduler can run the
tasks: the stages one after another, the shards of a stage in any order and at the same time.
"""

import contextlib
import fcntl
import json
import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import IO, Any, Protocol

from data_pipes.errors import InputError

RUNNERS = ("local", "array", "ray")


class Job(Protocol):
  """What a runner needs to know; must pickle, as other processes run it."""

  @property
  def stages(self) -> tuple[str, ...]:
    """In order: a stage may read what those before it wrote."""
    ...

  def shards(self, stage: str) -> int:
    """Tasks of a stage."""
    ...

  def done(self, stage: str, shard: int) -> bool:
    """Whether the task's output is committed."""
    ...

  def run(self, stage: str, shard: int) -> None:
    """Does the task, or what is left of it. Running a task that is done changes nothing."""
    ...

  def command(self, stage: str, shard: int) -> str:
    """The shell command that does the same."""
    ...

  def split(self, workers: int) -> "Sequence[Job]":
    """The job as each of several workers does it; what it opens for one task it keeps for more."""
    ...


class Rows(Protocol):
  """How a journal's rows stand in its file."""

  def pack(self, key: str, value: bytes) -> tuple[bytes, int]:
    """The row's bytes, and where in them the value begins."""
    ...

  def scan(self, file: IO[bytes]) -> Iterator[tuple[str, int, int]]:
    """(key, start of the value, end of the row) of each whole row; stops at a torn one."""
    ...


class BinaryRows:
  """Values are any bytes; a checksum tells a torn row."""

  _HEAD = struct.Struct("<IIQ")  # checksum of key and value, length of key, length of value

  def pack(self, key: str, value: bytes) -> tuple[bytes, int]:
    name = key.encode()
    row = name + value
    head = self._HEAD.pack(zlib.crc32(row), len(name), len(value))
    return head + row, len(head) + len(name)

  def scan(self, file: IO[bytes]) -> Iterator[tuple[str, int, int]]:
    end, size = 0, os.fstat(file.fileno()).st_size
    while end + self._HEAD.size <= size:
      check, key_length, length = self._HEAD.unpack(file.read(self._HEAD.size))
      if end + self._HEAD.size + key_length + length > size:
        return
      row = file.read(key_length + length)
      if zlib.crc32(row) != check:
        return
      start = end + self._HEAD.size + key_length
      end = start + length
      yield row[:key_length].decode(), start, end


class JsonRows:
  """Values are lines of JSON, their end included, that hold their own key: for people to read."""

  def __init__(self, key: Callable[[Any], str]):
    self._key = key

  def pack(self, key: str, value: bytes) -> tuple[bytes, int]:
    return value, 0

  def scan(self, file: IO[bytes]) -> Iterator[tuple[str, int, int]]:
    end = 0
    for line in file:
      try:
        if not line.endswith(b"\n"):
          return
        key = self._key(json.loads(line))
      except ValueError:
        return
      start, end = end, end + len(line)
      yield key, start, end


class Journal:
  """Finished rows of a task, appended to a file as they come: key -> bytes.

  A row that a kill cut off is dropped when the file is opened again. One process at a time has it.
  `rows` is the file's format. There are two, since journals lie in folders that an earlier version
  began: encoded frames are no text, and the engine's rows have been lines from the start.
  """

  def __init__(
    self,
    path: Path,
    rows: Rows | None = None,
    in_use: str = "another process is at this task; wait for it, or end it",
  ):
    """Opens or makes the file. Raises InputError, saying `in_use`, if another process has it."""
    self.path, self._rows = path, rows or BinaryRows()
    path.parent.mkdir(parents=True, exist_ok=True)
    self._file = path.open("a+b")
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      self._file.close()
      raise InputError(f"{path}: {in_use}") from None
    self._places: dict[str, tuple[int, int]] = {}  # key -> start and end of its last value
    self._end = 0
    self._file.seek(0)
    for key, start, end in self._rows.scan(self._file):
      self._places[key] = (start, end)
      self._end = end
    self._file.truncate(self._end)
    self._file.seek(self._end)

  def __contains__(self, key: str) -> bool:
    return key in self._places

  def __len__(self) -> int:
    return len(self._places)

  def __iter__(self) -> Iterator[str]:
    """The keys, in the order of the first row of each."""
    return iter(self._places)

  def add(self, key: str, value: bytes) -> None:
    """Appends a row; it is kept from now on, whatever becomes of this process."""
    row, offset = self._rows.pack(key, value)
    self._file.write(row)  # at the end, wherever was read before
    self._file.flush()
    start, self._end = self._end + offset, self._end + len(row)
    self._places[key] = (start, self._end)

  def __getitem__(self, key: str) -> bytes:
    start, end = self._places[key]
    self._file.seek(start)
    return self._file.read(end - start)

  def close(self, delete: bool = False) -> None:
    """Gives the file free; `delete` once its rows are committed elsewhere."""
    if delete:
      self.path.unlink()
    self._file.close()

  def __enter__(self) -> "Journal":
    return self

  def __exit__(self, *_) -> None:
    if not self._file.closed:
      self.close()


def die_with_parent() -> None:
  """Initializer of a worker process: it ends when the process that started it was killed.

  Otherwise it would go on with its item, and hold or write files that a new run needs.
  """
  parent = parent_process()
  assert parent is not None

  def watch() -> None:
    parent.join()
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


Progress = Callable[[str, int, int], None]

_job: Job  # of a worker process


def _start_worker(job: Job) -> None:
  global _job
  die_with_parent()
  _job = job


def _run_task(stage: str, shard: int) -> None:
  _job.run(stage, shard)


def run_local(
  job: Job, workers: int = 1, progress: Progress = lambda stage, done, total: None
) -> None:
  """Runs what is left of a job in `workers` processes of this machine (1: in this one)."""
  for stage in job.stages:
    total = job.shards(stage)
    left = [shard for shard in range(total) if not job.done(stage, shard)]
    progress(stage, total - len(left), total)
    if workers == 1 or len(left) <= 1:
      for count, shard in enumerate(left, 1):
        job.run(stage, shard)
        progress(stage, total - len(left) + count, total)
      continue
    with ProcessPoolExecutor(
      min(workers, len(left)), get_context("spawn"), _start_worker, (job,)
    ) as pool:
      futures = [pool.submit(_run_task, stage, shard) for shard in left]
      try:
        for count, future in enumerate(as_completed(futures), 1):
          future.result()
          progress(stage, total - len(left) + count, total)
      except BaseException:
        pool.shutdown(cancel_futures=True)
        raise


class _RayWorker:
  """Runs tasks of a job in a process of its own; becomes a Ray actor."""

  def __init__(self, job: Job, folder: Path):
    self._job = job
    with contextlib.suppress(OSError):  # paths may be relative to it, where it is here too
      os.chdir(folder)

  def run(self, stage: str, shard: int) -> None:
    self._job.run(stage, shard)


def run_ray(
  job: Job,
  address: str | None = None,
  cpus: float = 1,
  gpus: float = 0,
  progress: Progress = lambda stage, done, total: None,
) -> None:
  """Runs what is left of a job on Ray Core; all hosts must see its folders alike.

  As many actors as the cluster has room for take `cpus` and `gpus` each and the next task whenever
  they are free, so what a job opens for a task is opened once an actor. A task that fails lets
  those at work end; then its error is raised.

  Args:
    address: of the cluster; None: one on this machine.

  Raises:
    InputError: Ray is not installed, or there is no room for one actor.
  """
  try:
    import ray
  except ImportError:
    raise InputError("--runner ray needs Ray; pip install 'vr-jax[ray]'") from None
  ours = not ray.is_initialized()
  if ours:
    ray.init(address=address, include_dashboard=False, log_to_driver=False)
  actors: list[Any] = []
  try:
    count = min(_room(ray, cpus, gpus), max(map(job.shards, job.stages)))
    kind = ray.remote(_RayWorker).options(
      num_cpus=cpus, num_gpus=gpus, max_restarts=3, max_task_retries=3
    )
    actors += [kind.remote(part, Path.cwd()) for part in job.split(count)]
    for stage in job.stages:
      _run_stage(ray, actors, job, stage, progress)
  finally:
    for actor in actors:
      ray.kill(actor)
    if ours:
      ray.shutdown()


def _room(ray: Any, cpus: float, gpus: float) -> int:
  """Actors of this size that the cluster takes now; one that never starts would hang the job."""
  nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
  fit = sum(
    int(min(node.get("CPU", 0) / cpus, node.get("GPU", 0) / gpus if gpus else 1e9))
    for node in nodes
  )
  if not fit:
    more = f" and {gpus:g} GPUs" if gpus else ""
    raise InputError(f"no Ray node has the {cpus:g} CPUs{more} that a task takes")
  free = ray.available_resources()
  count = min(fit, int(free.get("CPU", 0) / cpus))
  if gpus:
    count = min(count, int(free.get("GPU", 0) / gpus))
  if count < 1:
    raise InputError(f"--runner ray: found free {free}; needed: {cpus:g} CPU and {gpus:g} GPU")
  return count


def _run_stage(ray: Any, actors: Sequence[Any], job: Job, stage: str, progress: Progress) -> None:
  """Gives every free actor the next shard until all are done.

  An actor that died for good (Ray has started it again a few times) leaves its shard to the others.
  """
  total = job.shards(stage)
  left = [shard for shard in range(total) if not job.done(stage, shard)][::-1]
  done = total - len(left)
  progress(stage, done, total)
  free: list[Any] = list(actors)
  at_work: dict[Any, tuple[Any, int]] = {}  # and which shard
  failure: Any = None
  while at_work or (left and not failure):
    while free and left and not failure:
      actor, shard = free.pop(), left.pop()
      at_work[actor.run.remote(stage, shard)] = actor, shard
    if not at_work:
      raise InputError(f"--runner ray: all actors died, at last with shard {left[-1]} of {stage}")
    (ready,), _ = ray.wait(list(at_work))
    actor, shard = at_work.pop(ready)
    try:
      ray.get(ready)
    except ray.exceptions.RayTaskError as error:
      failure = failure or error
      free.append(actor)
    except ray.exceptions.RayActorError:
      left.append(shard)
    else:
      free.append(actor)
      done += 1
      progress(stage, done, total)
  if failure:
    raise failure.cause from failure  # as the task raised it; Ray's text has the traceback there


def array_commands(job: Job, heading: Callable[[str], str] | None = None) -> Iterator[str]:
  """Shell commands, one a task, for a scheduler's array jobs; comments part the stages.

  `heading`: of a stage, instead of how many tasks it has and when they may begin.
  """
  for number, stage in enumerate(job.stages, 1):
    shards = job.shards(stage)
    if heading:
      yield f"# {heading(stage)}"
    else:
      when = "" if number == 1 else f"; when all of {job.stages[number - 2]} have ended"
      yield f"# stage {number} of {len(job.stages)}, {stage}: {shards} tasks in any order{when}"
    for shard in range(shards):
      yield job.command(stage, shard)
