"""Standard output and error that may go away: a closed terminal, a pipe whose reader has ended."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


class LastingStream:
  """A text stream that is written to as long as it can be, and never raises after that."""

  def __init__(self, stream: Any):
    self._stream = stream

  def write(self, text: str) -> int:
    try:
      return self._stream.write(text)
    except (OSError, ValueError):  # the reader is gone, or the stream was closed
      self._let_go()
      return len(text)

  def flush(self) -> None:
    try:
      self._stream.flush()
    except (OSError, ValueError):
      self._let_go()

  def _let_go(self) -> None:
    """Nothing more comes of it: what is buffered, and what C writes there, goes nowhere too."""
    with contextlib.suppress(OSError, ValueError):
      nowhere = os.open(os.devnull, os.O_WRONLY)
      os.dup2(nowhere, self._stream.fileno())
      os.close(nowhere)

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)


@contextlib.contextmanager
def lasting_streams() -> Iterator[None]:
  """Within it, a reader of stdout or stderr that goes away ends nothing."""
  before = sys.stdout, sys.stderr
  sys.stdout, sys.stderr = LastingStream(sys.stdout), LastingStream(sys.stderr)  # type: ignore[assignment]
  try:
    yield
  finally:
    for stream in (sys.stdout, sys.stderr):
      stream.flush()
    sys.stdout, sys.stderr = before
