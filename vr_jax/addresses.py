"""Addresses of files: paths of this machine, and gs://BUCKET/… where a bucket will do."""

import os
import re

from data_pipes.buckets import as_path, is_address
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


def local_or_bucket(path: str, where: str) -> str:
  """As `local`, and addresses gs://BUCKET/… are accepted.

  Raises:
    InputError: another scheme, or the extra [gcs] is not installed.
  """
  if is_address(path):
    try:
      as_path(path)
    except InputError as error:
      raise InputError(f"{where}: {error}") from None
    return path
  if SCHEME.match(path):
    raise InputError(
      f"{where}: {path}: accepted: a path of this machine, or gs://BUCKET/PATH; mount other "
      "buckets first (s3fs)"
    )
  return os.path.expanduser(path)
