"""Addresses of files: paths of this machine; other places by their scheme."""

import os
import re

from data_pipes.errors import InputError

SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")


def local(path: str, where: str) -> str:
  """The path with `~` expanded.

  Raises:
    InputError: an address with a scheme, such as s3://…; `where` says who gave it.
  """
  if SCHEME.match(path):
    raise InputError(
      f"{where}: {path}: accepted: a path of this machine; mount a bucket first (gcsfuse, s3fs)"
    )
  return os.path.expanduser(path)
