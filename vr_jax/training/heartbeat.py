"""Who holds a run up: each process tells what it does, and one that has waited long reads the rest.

W/heartbeat/<process>.json   {"host", "step", "doing", "since", "now"}; seconds since the epoch

In a step all processes wait for the slowest one. It is the one that is not in the step (it waits
for input, say), or that is not heard of at all.
"""

import json
import logging
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipes.buckets import reached
from data_pipes.errors import InputError
from data_pipes.files import replaced

log = logging.getLogger(__name__)
SILENT = 60.0  # seconds after which a process counts as not heard of; each tells every ten


class Heartbeat:
  """Tells from a thread of its own, so that a process that hangs is still heard of."""

  def __init__(self, folder: Path, index: int, count: int, stall_seconds: float):
    """Process `index` of `count`; after `stall_seconds` without a change it says who stalls."""
    self._folder, self._index, self._count, self._stall = folder, index, count, stall_seconds
    self._pause = min(10.0, stall_seconds / 3)
    self._at: tuple[int, str, float] = (0, "start", time.time())
    self._warned = False
    self._ended = threading.Event()
    folder.mkdir(parents=True, exist_ok=True)
    self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
    self._thread.start()

  def at(self, step: int, doing: str) -> None:
    """This process is in step `step` (from 1), doing "input", "step", "eval" or
    "checkpoint"."""
    self._at, self._warned = (step, doing, time.time()), False

  def close(self) -> None:
    self._ended.set()
    self._thread.join()

  def __enter__(self) -> "Heartbeat":
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def _beat(self) -> None:
    self._write()
    while not self._ended.wait(self._pause):
      self._write()
      waited = time.time() - self._at[2]
      if waited > self._stall and not self._warned:
        self._warned = True
        beats = read_beats(self._folder, self._count)
        line, culprits = stalled(beats, time.time(), SILENT)
        # One that waits speaks for all.
        if self._index == min(set(range(self._count)) - set(culprits), default=0):
          log.warning("no progress for %.0f s: %s", waited, line)
    self._write()

  def _write(self) -> None:
    step, doing, since = self._at
    beat = {"host": socket.gethostname(), "step": step, "doing": doing, "since": since}
    file = self._folder / f"{self._index}.json"
    try:
      # Not durable: a beat that a power cut loses is none.
      with reached(file), replaced(file, durable=False) as part:
        part.write_text(json.dumps({**beat, "now": time.time()}), encoding="utf-8")
    except InputError as error:
      log.warning("%s", error)


def read_beats(folder: Path, count: int) -> list[Mapping[str, Any] | None]:
  """The last beat of each process, None for one that wrote none."""
  beats: list[Mapping[str, Any] | None] = []
  for index in range(count):
    try:
      beats.append(json.loads((folder / f"{index}.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
      beats.append(None)
  return beats


def stalled(
  beats: Sequence[Mapping[str, Any] | None], now: float, silent: float
) -> tuple[str, list[int]]:
  """(who holds the others up, in words; their numbers): the silent ones, else those behind.

  Args:
    silent: seconds after which a process counts as not heard of.
  """
  gone = [i for i, beat in enumerate(beats) if beat is None or now - beat["now"] > silent]
  heard = {i: beat for i, beat in enumerate(beats) if beat is not None and i not in gone}
  if gone:
    hosts = (beat["host"] if beat else "host unknown" for beat in (beats[i] for i in gone))
    names = (f"process {i} ({host})" for i, host in zip(gone, hosts, strict=True))
    return f"not heard of: {', '.join(names)}", gone
  # In a step and waiting for the others counts as further than getting ready for it.
  done = {i: (beat["step"], beat["doing"] == "step") for i, beat in heard.items()}
  behind = [i for i in heard if done[i] < max(done.values())]
  if behind or len(heard) == 1:
    named = behind or list(heard)
    lines = (
      f"process {i} ({heard[i]['host']}) is at step {heard[i]['step']}, {heard[i]['doing']}, for "
      f"{now - heard[i]['since']:.0f} s"
      for i in named
    )
    return "; ".join(lines), behind
  step = max(done.values())[0]
  return f"all {len(heard)} processes are in step {step} (compiling, or a slow collective)", []
