"""Units of work that may be killed anywhere and run again, and the runners that run them.

A job is a row of stages; a stage is a number of shards; a task is one (stage, shard). A task writes
its output once, by an atomic rename (`committed`), and is done when the output is there. While it
runs, finished rows go to a `Journal`; started again, it goes on behind them. So a killed job that
is started again ends with the same bytes as one that was not, and any scheduler can run the tasks:
the stages one after another, the shards of a stage in any order and at the same time.
"""

import contextlib
import fcntl
import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Protocol

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


@contextlib.contextmanager
def committed(path: Path) -> Iterator[Path]:
  """Gives a path to write to, which becomes `path` if the block ends well."""
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(path.name + ".part")
  yield part
  part.replace(path)


class Journal:
  """Finished rows of a task, appended to a file as they come: key -> bytes.

  A row that a kill cut off is dropped when the file is opened again. One process at a time has it.
  """

  _HEAD = struct.Struct("<IIQ")  # checksum of key and value, length of key, length of value

  def __init__(self, path: Path):
    """Opens or makes the file. Raises InputError if another process has it."""
    self.path = path
    path.parent.mkdir(parents=True, exist_ok=True)
    self._file = path.open("a+b")
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      self._file.close()
      raise InputError(f"{path}: another process is at this task; wait for it, or end it") from None
    self._at: dict[str, tuple[int, int]] = {}
    end = self._scan()
    self._file.truncate(end)
    self._file.seek(end)

  def _scan(self) -> int:
    """Finds the whole rows; returns where they end."""
    file, end = self._file, 0
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    while end + self._HEAD.size <= size:
      check, key_length, length = self._HEAD.unpack(file.read(self._HEAD.size))
      if end + self._HEAD.size + key_length + length > size:
        break
      row = file.read(key_length + length)
      if zlib.crc32(row) != check:
        break
      start = end + self._HEAD.size + key_length
      self._at[row[:key_length].decode()] = (start, length)
      end = start + length
    return end

  def __contains__(self, key: str) -> bool:
    return key in self._at

  def __len__(self) -> int:
    return len(self._at)

  def add(self, key: str, value: bytes) -> None:
    """Appends a row; it is kept from now on."""
    name = key.encode()
    row = name + value
    start = self._file.seek(0, os.SEEK_END) + self._HEAD.size + len(name)
    self._file.write(self._HEAD.pack(zlib.crc32(row), len(name), len(value)) + row)
    self._file.flush()
    self._at[key] = (start, len(value))

  def __getitem__(self, key: str) -> bytes:
    start, length = self._at[key]
    self._file.seek(start)
    return self._file.read(length)

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


def run_local(
  job: Job, workers: int = 1, progress: Progress = lambda stage, done, total: None
) -> None:
  """Runs what is left of a job in `workers` processes of this machine (1: in this one)."""
  for stage in job.stages:
    total = job.shards(stage)
    left = [shard for shard in range(total) if not job.done(stage, shard)]
    progress(stage, total - len(left), total)
    if workers == 1 or len(left) == 1:
      for count, shard in enumerate(left, 1):
        job.run(stage, shard)
        progress(stage, total - len(left) + count, total)
      continue
    with ProcessPoolExecutor(
      min(workers, max(len(left), 1)), get_context("spawn"), die_with_parent
    ) as pool:
      futures = [pool.submit(job.run, stage, shard) for shard in left]
      try:
        for count, future in enumerate(as_completed(futures), 1):
          future.result()
          progress(stage, total - len(left) + count, total)
      except BaseException:
        pool.shutdown(cancel_futures=True)
        raise


def run_ray(
  job: Job,
  address: str | None = None,
  cpus: float = 1,
  progress: Progress = lambda stage, done, total: None,
) -> None:
  """Runs what is left of a job as Ray tasks of `cpus` each; all hosts must see its folders alike.

  Raises:
    InputError: Ray is not installed, or no node has that many CPUs.
  """
  try:
    import ray
  except ImportError:
    raise InputError("--runner ray needs Ray; pip install 'vr-jax[ray]'") from None
  ray.init(address=address, ignore_reinit_error=True, log_to_driver=False)
  try:
    if not any(node["Resources"].get("CPU", 0) >= cpus for node in ray.nodes() if node["Alive"]):
      raise InputError(f"no Ray node has the {cpus:g} CPUs that a task takes")

    here = Path.cwd()  # paths may be relative to it

    @ray.remote(num_cpus=cpus, max_retries=3)
    def run(stage: str, shard: int) -> None:
      os.chdir(here)
      job.run(stage, shard)

    for stage in job.stages:
      total = job.shards(stage)
      waiting = [run.remote(stage, k) for k in range(total) if not job.done(stage, k)]
      progress(stage, total - len(waiting), total)
      while waiting:
        ready, waiting = ray.wait(waiting)
        ray.get(ready)
        progress(stage, total - len(waiting), total)
  except ray.exceptions.RayTaskError as error:
    if isinstance(error.cause, InputError):
      raise error.cause from None
    raise
  finally:
    ray.shutdown()


def array_commands(job: Job) -> Iterator[str]:
  """Shell commands, one a task, for a scheduler's array jobs; comments part the stages."""
  for number, stage in enumerate(job.stages, 1):
    shards = job.shards(stage)
    when = "" if number == 1 else f"; when all of {job.stages[number - 2]} have ended"
    yield f"# stage {number} of {len(job.stages)}, {stage}: {shards} tasks in any order{when}"
    for shard in range(shards):
      yield job.command(stage, shard)
