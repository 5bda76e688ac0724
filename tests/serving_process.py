"""`vr serve` as a process of its own, for tests and for benchmarks."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request


class ServerProcess:
  """A server on a free port of the loopback.

  Attributes:
    url: such as http://127.0.0.1:40123.
    log: the lines of its stderr so far.
  """

  def __init__(self, *options: str, ready: bool = True, seconds: float = 300.0):
    """Starts it and waits until it listens, and with `ready` until it answers."""
    command = [sys.executable, "-m", "vr_jax", "serve", "--port", "0", *options]
    self._process = subprocess.Popen(
      command, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}
    )
    self.log: list[str] = []
    self._changed = threading.Condition()
    threading.Thread(target=self._read, daemon=True).start()
    self.url = self.wait_for(r"vr serve: (http://\S+)", seconds)
    if ready:
      self.wait_for(r"is (ready)", seconds)

  def _read(self) -> None:
    assert self._process.stderr is not None
    for line in self._process.stderr:
      with self._changed:
        self.log.append(line)
        self._changed.notify_all()

  def wait_for(self, pattern: str, seconds: float = 60.0) -> str:
    """The first group of the first line of the log that matches."""
    until = time.monotonic() + seconds
    with self._changed:
      while True:
        for line in self.log:
          if match := re.search(pattern, line):
            return match[1]
        if self._process.poll() is not None or time.monotonic() > until:
          raise AssertionError(f"no line {pattern!r}: {''.join(self.log)[-3000:]}")
        self._changed.wait(0.5)

  @property
  def pid(self) -> int:
    return self._process.pid

  def get(self, path: str) -> bytes:
    with urllib.request.urlopen(self.url + path, timeout=60) as response:
      return response.read()

  def metric(self, name: str) -> float:
    text = self.get("/metrics").decode()
    match = re.search(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
    assert match is not None, name
    return float(match[1])

  def memory(self) -> int:
    """Bytes of the process that are in memory."""
    with open(f"/proc/{self.pid}/statm", encoding="ascii") as file:
      return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

  def signal(self, number: int = signal.SIGTERM) -> None:
    self._process.send_signal(number)

  def end(self, seconds: float = 120.0) -> int:
    """Ends it as an operator does; its exit code."""
    if self._process.poll() is None:
      self.signal()
    try:
      return self._process.wait(seconds)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()
      raise
