"""What a user did wrong, told apart from our own faults."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
  """The user's input is wrong: one line saying what, where, what was found, what is accepted.

  The command line prints it and exits with code 2; everything else is our fault.
  """


class Defect(InputError):
  """A defect of one annotated item or its media; `kind` is its class in reports (check.KINDS)."""

  def __init__(self, kind: str, message: str):
    super().__init__(message)
    self.kind = kind

  def __reduce__(self):  # for worker processes
    return Defect, (self.kind, str(self))


def one_line(error: BaseException | str, limit: int = 200) -> str:
  """The message of an error on one line, cut to `limit` characters."""
  return " ".join(str(error).split())[:limit]


def nearest(name: str, known: Iterable[str]) -> str:
  """`; did you mean 'x'?` for the closest known name, or nothing."""
  known = list(known)
  by_tail = {k.rpartition(".")[2]: k for k in reversed(known)}
  close = difflib.get_close_matches(name, known, 1, 0.6) or [
    by_tail[k] for k in difflib.get_close_matches(name.rpartition(".")[2], by_tail, 1, 0.6)
  ]
  return f"; did you mean {close[0]!r}?" if close else ""
