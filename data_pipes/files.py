"""Files that survive a kill (written whole, or line by line and gone on with), and the lock that
keeps other runs out of a work directory."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from data_pipes.buckets import as_path, is_address
from data_pipes.errors import InputError

LOCK = ".lock"  # in a work directory, while a run is at work in it
BEAT_SECONDS, STALE_SECONDS = 30.0, 300.0  # a holder of the lock says so; it is taken to be dead
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of a disk, a quota, a limit of file sizes
BREAKS = "\x85\u2028\u2029"  # line breaks to `str.splitlines` that JSON leaves as they are


@contextlib.contextmanager
def replaced(path: Path | str, *, durable: bool = True, alone: bool = True) -> Iterator[Path]:
  """Gives a path to write to; if the block ends well it takes the place of `path` in one go.

  A reader sees the old file or the new one, never a part. If the block raises, the part is removed
  and the old file stays.

  Args:
    durable: the new file is on the disk before it takes its place, so that a power cut leaves the
      old file or the new one.
    alone: no other process writes this path meanwhile, not even one that a killed run left behind.
      Then the part has one name, and what a kill leaves is overwritten by the next write.
  """
  if is_address(path):  # a bucket has whole objects alone
    with tempfile.TemporaryDirectory() as folder:
      part = Path(folder, "part")
      yield part
      as_path(path).write_bytes(part.read_bytes())
    return
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(f".{path.name}.tmp" if alone else f".{path.name}.{os.getpid()}.tmp")
  try:
    yield part
    if durable:
      with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
  finally:
    part.unlink(missing_ok=True)


def path_below(root: Path | str | os.PathLike, path: str) -> str | None:
  """A path, absolute or from `root`, as one from `root`, the same for each way to write it.

  None where it leads out. The text alone decides: links that the user has put into the folder may
  lead anywhere.
  """
  if "\0" in path:
    return None
  joined = os.path.abspath(os.path.join(root, path))
  for whole in (os.path.abspath, os.path.realpath):
    base = whole(root)
    if joined == base or joined.startswith(os.path.join(base, "")):
      return os.path.relpath(joined, base)
  return None


class DiskFull(InputError):
  """No room for what is written; what was written before is whole."""


@contextlib.contextmanager
def refused_if_full(path: Path | str) -> Iterator[None]:
  """Raises DiskFull for the error of the system that says so, naming `path`."""
  try:
    yield
  except (OSError, RuntimeError) as error:  # libraries in C++ give the system's text alone
    texts = [os.strerror(code) for code in FULL]
    reason = next((text for text in texts if text in str(error)), None)
    if reason is None:
      raise
    raise DiskFull(
      f"{path}: {reason}; nothing that was done is lost: make room and run again"
    ) from error


def write_text(path: Path | str, text: str) -> None:
  """Writes a file whole, in UTF-8."""
  with replaced(path) as part:
    part.write_text(text, encoding="utf-8")


def json_line(record: Mapping[str, Any]) -> str:
  """A record as one line of UTF-8, its end included; `str.splitlines` finds one line too."""
  text = json.dumps(record, ensure_ascii=False)
  try:
    text.encode()
  except UnicodeEncodeError:  # half a surrogate pair, which JSON can hold and UTF-8 cannot
    text = json.dumps(record)
  for character in BREAKS:
    text = text.replace(character, f"\\u{ord(character):04x}")
  return text + "\n"


def read_json_lines(path: Path | str) -> list[dict[str, Any]]:
  """The records of a file of JSON lines, one object a line; none if there is no such file.

  A last line without an end is what a kill cut off; it is left out.

  Raises:
    InputError: another line is no object, or the file is not UTF-8.
  """
  path = Path(path)
  try:
    content = path.read_bytes()
  except FileNotFoundError:
    return []
  except OSError as error:
    raise InputError(f"{path}: cannot be read ({error.strerror})") from None
  records = []
  # Not splitlines: U+2028 within a text is no line break.
  for number, line in enumerate(content.split(b"\n")[:-1], 1):
    if not line.strip():
      continue
    try:
      record = json.loads(line)
    except ValueError as error:  # UnicodeDecodeError is one
      raise InputError(f"{path}: line {number}: cannot be read as JSON ({error})") from None
    if not isinstance(record, dict):
      kind = type(record).__name__
      raise InputError(f"{path}: line {number}: found {kind}; accepted: an object a line")
    records.append(record)
  return records


class JsonLines:
  """Records appended to a file as they come, one object a line; a run that was killed goes on.

  Attributes:
    records: the latest record of each key, in the order in which the keys came first.

  The line that a kill cut off is taken out of the file when it is opened, since the next record
  would be written behind it. `add` may be called by several threads; one process has the file.
  """

  def __init__(
    self,
    path: Path | str,
    key: Callable[[dict[str, Any]], Hashable],
    keep: Callable[[dict[str, Any]], bool] = lambda record: True,
  ):
    """Reads what is there.

    Args:
      key: what tells a record from the others.
      keep: records for which it is false are taken out of the file: they will be made again.

    Raises:
      InputError: the file is none of JSON lines.
    """
    self.path, self._key = Path(path), key
    before = read_json_lines(self.path)
    kept = [record for record in before if keep(record)]
    self.records = {key(record): record for record in kept}
    self._lock = threading.Lock()
    if len(kept) != len(before) or _is_torn(self.path):
      write_text(self.path, "".join(map(json_line, kept)))
    self.path.parent.mkdir(parents=True, exist_ok=True)
    self._file = self.path.open("a", encoding="utf-8")

  def __contains__(self, key: Hashable) -> bool:
    return key in self.records

  def __len__(self) -> int:
    return len(self.records)

  def add(self, record: dict[str, Any]) -> None:
    """Appends a record; a kill of this process after the call does not lose it."""
    with self._lock:
      self._file.write(json_line(record))
      self._file.flush()
      self.records[self._key(record)] = record

  def close(self) -> None:
    self._file.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


def _is_torn(path: Path) -> bool:
  """Whether a file's last line has no end."""
  if not path.exists() or not path.stat().st_size:
    return False
  with path.open("rb") as file:
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"


@contextlib.contextmanager
def locked(folder: Path | str, run: str = "", part: str | None = None) -> Iterator[None]:
  """Keeps other runs out of a work directory, which is made if it is absent.

  A run holds the lock, not a process: parts (shards, processes) that name the same `run` share it,
  each part once; what works for them need not ask. A holder is dead when its process is gone from
  this host, or when it was not heard of for STALE_SECONDS. A holder that was taken to be dead and
  is not (it was stopped for minutes) ends at once: the directory is another run's then. Storage by
  address (gs://...) has no locks, and none is taken.

  Args:
    run: text that tells a run from others that may use the folder, such as its settings.
    part: of the run, that this process is; None: all of it.

  Raises:
    InputError: another run is at work there, or the same part of this one; or the folder cannot be
      written.
  """
  if is_address(folder):
    yield
    return
  path = Path(folder) / LOCK
  run = hashlib.blake2b(run.encode(), digest_size=8).hexdigest()
  me = {
    "run": run,
    "part": part,
    "host": _host(),
    "pid": os.getpid(),
    "began": _began(os.getpid()),
    "since": time.time(),
    "token": secrets.token_hex(8),
  }
  made = not path.parent.exists()
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with _holders(path) as holders:
      others = [h for h in holders if _is_alive(h)]
      for other in others:
        if other["run"] != run or None in (part, other["part"]) or other["part"] == part:
          raise InputError(f"{folder}: {_in_words(other)} is at work here; wait for it, or end it")
      holders[:] = [*others, me | {"heard": time.time()}]
  except OSError as error:
    raise InputError(f"{folder}: cannot be written: {error.strerror}") from None
  ended = threading.Event()
  thread = threading.Thread(target=_beat, args=(path, me, ended), name="vr-lock", daemon=True)
  thread.start()
  try:
    yield
  finally:
    ended.set()
    thread.join()
    with contextlib.suppress(OSError), _holders(path, make=False) as holders:
      holders[:] = [h for h in holders if h["token"] != me["token"]]
    if made:
      with contextlib.suppress(OSError):
        path.parent.rmdir()  # nothing came of the run


def is_unused(folder: Path | str) -> bool:
  """Whether a folder is absent, or holds nothing but the lock of its run."""
  folder = Path(folder)
  return not folder.exists() or all(entry.name == LOCK for entry in folder.iterdir())


def _beat(path: Path, me: Mapping[str, Any], ended: threading.Event) -> None:
  while not ended.wait(BEAT_SECONDS):
    with contextlib.suppress(OSError), _holders(path, make=False) as holders:
      mine = [h for h in holders if h["token"] == me["token"]]
      for holder in mine:
        holder["heard"] = time.time()
      if holders and not mine:
        print(f"{path.parent}: another run has taken over; this one ends", file=sys.stderr)
        sys.stderr.flush()
        os._exit(2)  # to save now would be to write into the folder of that run


@contextlib.contextmanager
def _holders(path: Path, make: bool = True) -> Iterator[list[dict[str, Any]]]:
  """The holders of a lock, to be changed: nobody else reads or changes them meanwhile.

  Changes of a block that raises are dropped. The file is gone when nobody is left. Raises OSError.
  """
  while True:
    file = os.open(path, os.O_RDWR | (os.O_CREAT if make else 0), 0o666)
    with contextlib.suppress(OSError):  # a file system without flock: two at once may both get it
      fcntl.flock(file, fcntl.LOCK_EX)
    try:
      if os.path.samestat(os.fstat(file), os.stat(path)):
        break
    except FileNotFoundError:
      pass
    os.close(file)  # the last holder removed it between our opening it and our turn
  try:
    before = _parse_holders(os.pread(file, 1 << 20, 0))
    holders = list(before)
    try:
      yield holders
    except BaseException:
      holders = before
      raise
    finally:
      if holders:
        # Written over and then cut, so that a kill in between leaves the list and some rubbish.
        content = json.dumps(holders).encode()
        os.pwrite(file, content, 0)
        os.truncate(file, len(content))
      else:
        os.unlink(path)
  finally:
    os.close(file)


def _parse_holders(content: bytes) -> list[dict[str, Any]]:
  try:
    holders, _ = json.JSONDecoder().raw_decode(content.decode("utf-8", "replace"))
  except ValueError:
    return []
  keys = ("run", "part", "host", "pid", "began", "since", "token", "heard")
  return [h for h in holders if isinstance(h, dict) and all(key in h for key in keys)]


def _is_alive(holder: Mapping[str, Any]) -> bool:
  if time.time() - holder["heard"] > STALE_SECONDS:
    return False
  if holder["host"] != _host():
    return True
  try:
    os.kill(holder["pid"], 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    pass  # somebody else's
  return holder["began"] in (None, _began(holder["pid"]))


def _in_words(holder: Mapping[str, Any]) -> str:
  part = "another run" if holder["part"] is None else f"part {holder['part']} of a run"
  since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["since"]))
  host = holder["host"].partition("/")[0]
  return f"{part} (process {holder['pid']} on {host}, since {since})"


def _host() -> str:
  """This machine, and on it the space that its process numbers belong to (containers)."""
  try:
    return f"{socket.gethostname()}/{os.readlink('/proc/self/ns/pid')}"
  except OSError:
    return socket.gethostname()


def _began(pid: int) -> str | None:
  """When a process began, in ticks of its host; tells it from a later one of the same number."""
  try:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
  except (OSError, IndexError):
    return None
