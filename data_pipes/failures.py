"""Samples that cannot be read: counted, named, and too many of them end a run."""

import logging
import threading
from collections.abc import Callable

from data_pipes.errors import InputError

log = logging.getLogger(__name__)


class TooManyFailures(InputError):
  """More samples could not be read than a run allows."""


class Failures:
  """Samples that could not be read: counted, named in the log, and too many end the run.

  Attributes:
    messages: one line for each failed sample, in the order met.
  """

  def __init__(self, max_share: float = 0.0, report: Callable[[str], None] | None = None):
    """`max_share` of all samples may fail; `report` is called with each line besides the log."""
    self.max_share = max_share
    self.messages: list[str] = []
    self._seen: set[int] = set()
    self._report = report
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return len(self.messages)

  def add(self, index: int, message: str, total: int) -> None:
    """Counts sample `index` of `total` once. Raises TooManyFailures above the allowed share."""
    with self._lock:
      if index not in self._seen:
        self._seen.add(index)
        self.messages.append(message)
        log.warning("unreadable sample %d: %s", len(self.messages), message)
        if self._report:
          self._report(message)
      failed = len(self._seen)
    if failed > self.max_share * total:
      raise TooManyFailures(
        f"{failed} of {total} samples could not be read; accepted: a share up to "
        f"{self.max_share:g}; the last: {message}"
      )
