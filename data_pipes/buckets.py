"""Addresses of Google Cloud Storage, gs://BUCKET/PATH, through etils.epath (extra [gcs]).

A path here is a `pathlib.Path` or its like of a bucket, which has the same methods. What is read
once (shards, annotation files, configs, foreign weights) is copied to the user's cache; checkpoints
are read and written where they lie.
"""

import contextlib
import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipes.errors import InputError, one_line

SCHEME = "gs://"
CACHE = "VR_BUCKET_CACHE"  # names another folder for copies than the user's cache


def is_address(path: str | os.PathLike) -> bool:
  """Whether a path is one of a bucket."""
  return os.fspath(path).startswith(SCHEME)


def as_path(path: str | os.PathLike) -> Any:
  """A path of this machine, or one of a bucket (`etils.epath.Path`).

  Raises:
    InputError: an address, and the extra [gcs] is not installed; or one without a bucket.
  """
  if not is_address(path):
    return Path(path)
  text = os.fspath(path)
  if not text.removeprefix(SCHEME).partition("/")[0]:
    raise InputError(f"{text}: no bucket; accepted: gs://BUCKET/PATH")
  if importlib.util.find_spec("gcsfs") is None:
    raise InputError(f"{text}: gs:// needs gcsfs; pip install 'vr-jax[gcs]'")
  from etils import epath  # a quarter of a second that local paths do not wait for

  return epath.Path(text)


def absolute(path: str | os.PathLike) -> Any:
  """`as_path`, from the root of this machine or with its bucket."""
  return as_path(path) if is_address(path) else Path(path).absolute()


@contextlib.contextmanager
def reached(address: str | os.PathLike, where: str = "") -> Iterator[None]:
  """Raises InputError for whatever goes wrong there: no such bucket, no rights, no network."""
  try:
    yield
  except InputError:
    raise
  except Exception as error:  # gcsfs, its HTTP client and Google's have kinds of their own
    reason = f"{type(error).__name__}: {one_line(error)}"
    subject = "the bucket cannot be used" if is_address(address) else "cannot be used"
    raise InputError(f"{where}{address}: {subject} ({reason})") from error


def here(path: str | os.PathLike) -> Path:
  """The path itself, or a copy of the file or folder at an address.

  A copy is named after the sizes and tags of its objects: one that has changed is fetched again.

  Raises:
    InputError: nothing is there, or the bucket cannot be used.
  """
  if not is_address(path):
    return Path(path)
  address = os.fspath(path).rstrip("/")
  as_path(address)
  import fsspec

  with reached(address):
    bucket = fsspec.filesystem("gs")
    bucket.invalidate_cache()
    objects = {
      name: entry
      for name, entry in bucket.find(address, detail=True).items()
      if not name.endswith("/")  # the mark of an empty folder
    }
    if not objects:
      raise InputError(f"{address}: no such file or folder in the bucket")
    digest = hashlib.blake2b(address.encode(), digest_size=12)
    for name, entry in sorted(objects.items()):
      version = entry.get("etag") or entry.get("mtime")
      digest.update(f"{name}\0{entry['size']}\0{version}\n".encode())
    copy = _cache() / digest.hexdigest()
    root = address.removeprefix(SCHEME)
    if not copy.exists():
      copy.parent.mkdir(parents=True, exist_ok=True)
      part = Path(tempfile.mkdtemp(prefix=".", dir=copy.parent))
      for name in objects:
        file = part / Path(root).name / Path(name).relative_to(root)
        file.parent.mkdir(parents=True, exist_ok=True)
        bucket.get_file(name, str(file))
      with contextlib.suppress(OSError):  # another process was first
        part.rename(copy)
      shutil.rmtree(part, ignore_errors=True)
  return copy / Path(root).name


@contextlib.contextmanager
def uploaded(path: str | os.PathLike) -> Iterator[Path]:
  """A path to write a folder to: `path` itself, or one whose content then goes to the address.

  Raises:
    InputError: there is something at the address already, or the bucket cannot be used.
  """
  if not is_address(path):
    yield Path(path)
    return
  address = as_path(path)
  with reached(address):
    if address.exists():
      raise InputError(f"{address}: exists; nothing is written over, give another place")
  with tempfile.TemporaryDirectory(prefix="vr-") as folder:
    made = Path(folder, address.name)
    yield made
    with reached(address):
      copy_files(made, address)


def copy_files(source: Any, target: Any) -> None:
  """Copies a file, or all files below a folder, between this machine and a bucket."""
  for name, file in files_below(source):
    place = target / name if name else target
    place.parent.mkdir(parents=True, exist_ok=True)
    with file.open("rb") as read, place.open("wb") as write:
      shutil.copyfileobj(read, write, 1 << 22)


def files_below(path: Any) -> list[tuple[str, Any]]:
  """(name from there, path) of all files below a folder, in order; of a file ("", itself)."""
  if path.is_file():
    return [("", path)]
  if is_address(path):
    import fsspec

    root = os.fspath(path).removeprefix(SCHEME).rstrip("/")
    names = [name[len(root) + 1 :] for name in fsspec.filesystem("gs").find(root)]
    names = [name for name in names if name and not name.endswith("/")]  # no mark of a folder
  else:
    names = [p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()]
  return [(name, path / name) for name in sorted(names, key=lambda name: name.split("/"))]


def size_of(file: Any) -> int:
  """Bytes of a file."""
  return file.stat().length if is_address(file) else file.stat().st_size


def remove(folder: Any) -> None:
  """Removes a folder with all that is in it, if it is there."""
  if is_address(folder):
    folder.rmtree(missing_ok=True)
  else:
    shutil.rmtree(folder, ignore_errors=True)


def _cache() -> Path:
  if folder := os.environ.get(CACHE):
    return Path(folder)
  home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  if not os.path.isabs(home):  # a user without a home
    home = os.path.join(tempfile.gettempdir(), f"cache-{os.getuid()}")
  return Path(home, "vr_jax", "buckets")
