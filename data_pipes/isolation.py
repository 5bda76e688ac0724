"""Calls that may crash or never end, made in worker processes: such a call costs itself alone.

Decoders are C code that other people's files drive: a broken one can end the process or loop for
ever, and no `except` catches that. `call` makes a call in a process that stays for the next one; a
process that dies with it, or needs longer than it may, is replaced, and the caller is told.

    caller ── pickled call, arrays beside it ──► worker: runs it under a timer of the kernel
           ◄── result, or what it raised ──────

Workers are started as programs of their own: the caller may have threads (which a fork does not
survive) and a main module without a guard (which `multiprocessing` would run again).
"""

import atexit
import contextlib
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import field
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from data_pipes.errors import InputError

SECONDS = 300.0  # that a call may take
_BEGUN = b"begun"
_GRACE = 5.0  # after which a worker whose caller is gone is ended by its timer


def item_seconds() -> Any:
  """The option --item-seconds of a command, a dataclass field."""
  note = "that an item's decoders may take; then it is given up (default: %(default)g)"
  return field(default=SECONDS, metadata={"help": note, "metavar": "S"})


def check_seconds(seconds: float) -> None:
  """Raises InputError for a limit that is none."""
  if not seconds > 0:
    raise InputError(f"item_seconds={seconds}; accepted: more than 0")


class Ended(InputError):
  """The worker died with a call, or had to be ended; the text says how.

  `begun`: the call itself had begun; what it needs was there.
  """

  def __init__(self, message: str, begun: bool = True):
    super().__init__(message)
    self.begun = begun


def call(
  function: Callable[..., Any],
  *args: Any,
  seconds: float | None = SECONDS,
  room: Iterable[np.ndarray] = (),
  ready: Callable[[], Any] | None = None,
) -> Any:
  """`function(*args)`, made in a worker of this process; any number of threads may call.

  Function, arguments and result must pickle. What the function raises is raised here.

  Args:
    seconds: that the call may take; None: without end.
    room: arrays whose memory the arrays of the result that are as large take, in their order; those
      for which there is none left have memory of their own.
    ready: called before in the worker, and not timed: it loads what the function needs.

  Raises:
    Ended: it crashed its process, or took longer.
  """
  return _workers.call(function, *args, seconds=seconds, room=room, ready=ready)


def shared() -> "Workers":
  """The workers of `call`."""
  return _workers


class Workers:
  """Worker processes, as many as calls were ever under way at a time; each is used again."""

  def __init__(self) -> None:
    self._idle: list[_Worker] = []
    self._all: dict[_Worker, object] = {}  # and for whom it is at work
    self._lock = threading.Lock()

  def call(
    self,
    function: Callable[..., Any],
    *args: Any,
    seconds: float | None = SECONDS,
    room: Iterable[np.ndarray] = (),
    ready: Callable[[], Any] | None = None,
    group: object = None,
  ) -> Any:
    """See `call`. `group`: for `end`."""
    while True:
      worker = self._take(group)
      try:
        worker.send((os.getcwd(), ready, function, args, seconds))
        raised, value = worker.receive(seconds, room)
        break
      except Ended as error:
        self._drop(worker)
        # One that died while it was idle, and was not quite gone when it was taken, costs nothing.
        if error.begun or not worker.was_used or worker.is_ended:
          raise
      except BaseException:
        self._drop(worker)
        raise
    worker.was_used = True
    with self._lock:
      self._all[worker] = None
      self._idle.append(worker)
    if raised:
      raise value
    return value

  def end(self, group: object) -> None:
    """Ends the calls of a group that are under way: they raise Ended."""
    with self._lock:
      workers = [worker for worker, at_work in self._all.items() if at_work is group]
    for worker in workers:
      worker.is_ended = True
      worker.kill()

  def close(self) -> None:
    """Ends the workers; calls that are under way raise Ended."""
    with self._lock:
      workers, self._all, self._idle = list(self._all), {}, []
    for worker in workers:
      worker.is_ended = True
      worker.end()

  def _take(self, group: object) -> "_Worker":
    while True:
      with self._lock:
        worker = self._idle.pop() if self._idle else None
      if worker is None:
        worker = _Worker()
      if worker.is_alive():
        with self._lock:
          self._all[worker] = group
        return worker
      self._drop(worker)

  def _drop(self, worker: "_Worker") -> None:
    worker.end()
    with self._lock:
      self._all.pop(worker, None)

  def forget(self) -> None:
    """For a fork: the workers stay the parent's."""
    self.__init__()  # type: ignore[misc]


class _Worker:
  def __init__(self) -> None:
    ours, theirs = socket.socketpair()
    code = (
      "import sys; sys.path[:] = sys.argv[2:]; from data_pipes import isolation; isolation.serve()"
    )
    with theirs:
      # Its input ends when this process does; its output must not mix with that of a command.
      self._process = subprocess.Popen(
        [sys.executable, "-c", code, str(theirs.fileno()), *sys.path],
        stdin=subprocess.PIPE, stdout=2, pass_fds=[theirs.fileno()],
      )  # fmt: skip
    self._connection = Connection(ours.detach())
    self.was_used, self.is_ended = False, False  # is_ended: by us

  def is_alive(self) -> bool:
    return self._process.poll() is None

  def send(self, message: Any) -> None:
    pickled = pickle.dumps(message, protocol=5)
    try:
      self._connection.send_bytes(pickled)
    except OSError:
      raise self._ended(False) from None

  def receive(self, seconds: float | None, room: Iterable[np.ndarray]) -> tuple[bool, Any]:
    """(whether it is an error, the result). Raises Ended."""
    begun = False
    try:
      first = self._connection.recv_bytes()
      begun = first == _BEGUN  # the time that modules take to load is not the call's
      if begun:
        if not self._connection.poll(seconds):
          raise Ended(f"hung: no result within {seconds:g} s")
        first = self._connection.recv_bytes()
      return _receive(self._connection, first, room)
    except (EOFError, OSError):
      raise self._ended(begun) from None

  def _ended(self, begun: bool) -> Ended:
    how = "crashed: its process hangs"
    with contextlib.suppress(subprocess.TimeoutExpired):
      code = self._process.wait(_GRACE)
      if code == -signal.SIGALRM:
        how = "hung: no result in time"
      elif code < 0:
        how = f"crashed: its process died of {signal.Signals(-code).name}"
      else:
        how = f"crashed: its process ended with exit code {code}"
    return Ended(how, begun)

  def kill(self) -> None:
    with contextlib.suppress(OSError):
      self._process.kill()

  def end(self) -> None:
    self.kill()
    self._process.wait()
    self._connection.close()
    if self._process.stdin:
      self._process.stdin.close()


_workers = Workers()
atexit.register(_workers.close)
os.register_at_fork(after_in_child=_workers.forget)


# --- The worker


def serve() -> None:
  """What a worker does: one call after the other, until its caller is gone."""
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)  # they are for the caller, who ends its workers
  threading.Thread(target=_end_with_caller, daemon=True).start()
  connection = Connection(int(sys.argv[1]))
  with contextlib.suppress(EOFError, OSError):
    while True:
      folder, ready, function, args, seconds = pickle.loads(connection.recv_bytes())
      if folder != os.getcwd():  # paths may be relative to the caller's
        os.chdir(folder)
      try:
        if ready is not None:
          ready()
        connection.send_bytes(_BEGUN)
        # The kernel's timer ends also a loop that never gives Python a turn, caller or no caller.
        signal.setitimer(signal.ITIMER_REAL, 0 if seconds is None else seconds + _GRACE)
        answer = False, function(*args)
      except Exception as error:
        error.add_note(f"in a worker process:\n{traceback.format_exc()}")
        answer = True, error
      signal.setitimer(signal.ITIMER_REAL, 0)
      _send(connection, answer)


def _end_with_caller() -> None:
  sys.stdin.buffer.read()
  os._exit(1)


def _send(connection: Connection, answer: tuple[bool, Any]) -> None:
  """Sends an answer; the memory of arrays goes as it is."""
  buffers: list[pickle.PickleBuffer] = []
  try:
    pickled = pickle.dumps(answer, protocol=5, buffer_callback=buffers.append)
    pickle.loads(pickled, buffers=buffers)  # an exception may pickle and not come back
  except Exception as error:
    text = "".join(traceback.format_exception(answer[1])) if answer[0] else repr(error)
    buffers, pickled = [], pickle.dumps((True, RuntimeError(text)))
  views = [buffer.raw() for buffer in buffers]
  connection.send_bytes(pickle.dumps((pickled, [view.nbytes for view in views])))
  for view in views:
    connection.send_bytes(view)


def _receive(connection: Connection, first: bytes, room: Iterable[np.ndarray]) -> tuple[bool, Any]:
  pickled, sizes = pickle.loads(first)
  free = deque(array.data.cast("B") for array in room)
  buffers: list[Any] = []
  for size in sizes:
    fits = free and free[0].nbytes == size
    buffer = free.popleft() if fits else np.empty(size, np.uint8).data
    connection.recv_bytes_into(buffer)
    buffers.append(buffer)
  return pickle.loads(pickled, buffers=buffers)
