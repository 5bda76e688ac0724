"""Samples that cannot be read: counted, named, and too many of them end a run."""

import logging
import threading
from collections.abc import Callable, Iterable

from data_pipes.errors import InputError

log = logging.getLogger(__name__)


class TooManyFailures(InputError):
  """More samples could not be read than a run allows."""


class Failures:
  """Samples that could not be read: counted, named in the log, and too many end the run.

  Attributes:
    messages: one line for each sample that failed here, in the order met.
    last: of the last one, how many samples there are in all, and its line.
  """

  def __init__(self, max_share: float = 0.0, report: Callable[[str], None] | None = None):
    """`max_share` of all samples may fail; `report` is called with each line besides the log."""
    self.max_share = max_share
    self.messages: list[str] = []
    self._seen: set[int] = set()
    self.last = (0, "")  # (samples in all, message) of the last failure
    self._report = report
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return len(self._seen)

  def known(self) -> set[int]:
    """The numbers of the samples that failed, in this process or another, now or before."""
    with self._lock:
      return set(self._seen)

  def add_known(self, numbers: Iterable[int]) -> None:
    """Counts samples that failed elsewhere: in another process, or before the run was stopped."""
    with self._lock:
      self._seen |= set(numbers)

  def add(self, index: int, message: str, total: int) -> None:
    """Counts sample `index` of `total` once. Raises TooManyFailures above the allowed share."""
    with self._lock:
      if index not in self._seen:
        self._seen.add(index)
        self.messages.append(message)
        log.warning("unreadable sample %d: %s", len(self._seen), message)
        if self._report:
          self._report(message)
      self.last = (total, message)
    self.check()

  def check(self) -> None:
    """Raises TooManyFailures above the allowed share."""
    total, message = self.last
    failed = len(self)
    if total and failed > self.max_share * total:
      raise TooManyFailures(
        f"{failed} of {total} samples could not be read; accepted: a share up to "
        f"{self.max_share:g}; the last: {message}"
      )
