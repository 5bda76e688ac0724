"""What a user did wrong, told apart from our own faults."""

import difflib
from collections.abc import Iterable
from types import TracebackType


class InputError(ValueError):
  """The user's input is wrong: one line saying what, where, what was found, what is accepted.

  The command line prints it and exits with code 2; everything else is our fault.
  """

  def __init__(self, message: str = ""):
    super().__init__(" ".join(str(message).splitlines()))  # names and values may hold line ends


class Defect(InputError):
  """A defect of one annotated item or its media; `kind` is its class in reports (check.KINDS)."""

  def __init__(self, kind: str, message: str):
    super().__init__(message)
    self.kind = kind

  def __reduce__(self):  # for worker processes
    return Defect, (self.kind, str(self))


class reading:  # stands behind `with`, like contextlib.suppress
  """Turns whatever is raised in the block into InputError.

      with reading(f"{path}: cannot be read as an image"):
        image.load()

  Libraries raise what they like over a user's bytes (IndexError, AttributeError, MemoryError), and
  so do conversions of a user's values. The block holds such calls and nothing else: a fault in our
  own code must stay a traceback.
  """

  def __init__(self, failure: str, accepted: str = "", kind: str | None = None):
    """The message is `{failure} ({reason})`, or `{failure}; accepted: {accepted}`.

    `kind` makes it a Defect of that kind.
    """
    self.failure, self.accepted, self.kind = failure, accepted, kind

  def __enter__(self) -> None:
    return None

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    if not isinstance(error, Exception) or isinstance(error, InputError):
      return
    reason = getattr(error, "strerror", None) or one_line(error, 100) or type(error).__name__
    rest = f"; accepted: {self.accepted}" if self.accepted else f" ({reason})"
    message = self.failure + rest
    raise (Defect(self.kind, message) if self.kind else InputError(message)) from error


def one_line(error: BaseException | str, limit: int = 200) -> str:
  """The message of an error on one line, cut to `limit` characters."""
  return " ".join(str(error).split())[:limit]


def shown(value: object) -> str:
  """A value in a message: its repr on one line, cut to 60 characters."""
  text = one_line(repr(value), 61)
  return text if len(text) <= 60 else f"{text[:57]}..."


def nearest(name: str, known: Iterable[str]) -> str:
  """`; did you mean 'x'?` for the closest known name, or nothing."""
  known = list(known)
  by_tail = {k.rpartition(".")[2]: k for k in reversed(known)}
  close = difflib.get_close_matches(name, known, 1, 0.6) or [
    by_tail[k] for k in difflib.get_close_matches(name.rpartition(".")[2], by_tail, 1, 0.6)
  ]
  return f"; did you mean {close[0]!r}?" if close else ""
