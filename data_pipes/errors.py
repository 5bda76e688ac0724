"""What a user did wrong, told apart from our own faults."""


class InputError(ValueError):
  """The user's input is wrong: one line saying what, where, what was found, what is accepted.

  The command line prints it and exits with code 2; everything else is our fault.
  """
