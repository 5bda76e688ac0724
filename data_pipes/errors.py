"""What a user did wrong, told apart from our own faults."""


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
