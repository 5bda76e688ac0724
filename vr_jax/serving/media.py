"""The clips of clients: uploaded files, data URLs, files below named folders, fetched addresses.

    folder/file-…/     clip.mp4 (or .jpg, .video …), meta.json; proxy.mp4 once it is asked for

A file is there when its meta.json is; what a kill left without one is removed at the next start.
Everything here blocks: the server calls it in threads.
"""

import base64
import binascii
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import secrets
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, unquote_to_bytes, urlsplit

import numpy as np

from data_pipes import isolation
from data_pipes.errors import InputError
from data_pipes.files import DiskFull, refused_if_full, write_text
from vr_jax.serving import clips
from vr_jax.serving.body import Node
from vr_jax.serving.chat import Media
from vr_jax.serving.clips import ClipInfo, Limits
from vr_jax.serving.errors import ApiError
from vr_jax.serving.fetching import fetch

META = "meta.json"
CLIP, PROXY = "clip", "proxy.mp4"
PIECE = 4 << 20  # bytes that are copied, or characters that are decoded, at once
ID = re.compile(r"file-[0-9a-f]{32}")
KNOWN = 1024  # clips of which the description is kept
PICTURES = 64 << 20  # bytes of encoded frames that are kept
ADDRESS = 8192  # characters, of all but data URLs
FORMS = "a file id, data:, file:// or https://"


@dataclass(frozen=True)
class MediaOptions:
  media_root: tuple[str, ...] = field(
    default=(),
    metadata={
      "repeat": True,
      "metavar": "DIR",
      "help": "file:// addresses below DIR may be asked about (default: none)",
    },
  )
  allow_media_host: tuple[str, ...] = field(
    default=(),
    metadata={
      "repeat": True,
      "metavar": "HOST",
      "help": "https addresses of HOST[:PORT] are fetched (default: none)",
    },
  )
  media_dir: str | None = field(
    default=None,
    metadata={"help": "uploads are kept in DIR (default: until the end)", "metavar": "DIR"},
  )
  max_upload: int = field(default=512, metadata={"help": "of a file", "metavar": "MIB"})
  media_disk: int = field(default=8192, metadata={"help": "of all files", "metavar": "MIB"})
  file_hours: float = field(
    default=24.0, metadata={"help": "after which a file is removed", "metavar": "H"}
  )
  max_pixels: int = field(
    default=1 << 25, metadata={"help": "of a frame (default: %(default)d)", "metavar": "N"}
  )
  max_frames: int = field(
    default=500_000, metadata={"help": "of a clip (default: %(default)d)", "metavar": "N"}
  )
  max_seconds: float = field(
    default=4 * 3600.0, metadata={"help": "of a clip (default: %(default)g)", "metavar": "S"}
  )
  media_timeout: float = field(
    default=60.0,
    metadata={"help": "that a clip's decoder may take (default: %(default)g)", "metavar": "S"},
  )

  def __post_init__(self):
    for name in ("max_upload", "media_disk", "file_hours", "max_pixels", "max_frames",
                 "max_seconds", "media_timeout"):  # fmt: skip
      if not getattr(self, name) > 0:
        raise InputError(f"{name}={getattr(self, name)}; accepted: more than 0")
    for root in self.media_root:
      if not os.path.isdir(root):
        raise InputError(f"--media-root {root}: no such folder")


@dataclass(frozen=True)
class Medium:
  """A clip that may be asked about.

  Attributes:
    name: what the client calls it; messages hold it, never the path.
    path: of the clip.
    id: of an uploaded file, "" for others.
    owner: the client that it belongs to.
    pictures: where the clip was sent as pictures whose transparency marks the object: RGB frames
      and their masks uint8 [H, W].
  """

  name: str
  path: Path
  info: ClipInfo
  id: str = ""
  owner: str = ""
  bytes: int = 0
  created: int = 0
  purpose: str = ""
  pictures: tuple[Sequence[np.ndarray], Sequence[np.ndarray]] | None = None

  @property
  def source(self) -> Any:
    """What `Request` takes as the video."""
    if self.pictures is not None and len(self.pictures[0]) > 1:
      return list(self.pictures[0])
    return self.path

  def to_dict(self) -> dict[str, Any]:
    """As OpenAI's file object."""
    return {
      "id": self.id,
      "object": "file",
      "bytes": self.bytes,
      "created_at": self.created,
      "filename": self.name,
      "purpose": self.purpose,
      "status": "processed",
    }

  def without_path(self, error: object) -> str:
    """The text of an error, the clip called by its name."""
    return str(error).replace(str(self.path), self.name)


class Store:
  """The clips that the server holds or may open; used by many threads."""

  def __init__(self, options: MediaOptions, folder: Path):
    """Reads what an earlier server left in `folder`, which must be this server's alone."""
    self.options, self._folder = options, folder
    self._limits = Limits(options.max_pixels, options.max_frames, options.max_seconds)
    self._roots = [os.path.realpath(root) for root in options.media_root]
    self._lock = threading.Lock()
    self._files: OrderedDict[str, Medium] = OrderedDict()
    self._data: OrderedDict[str, Medium] = OrderedDict()  # of data URLs, by owner and content
    self._opened: OrderedDict[tuple, ClipInfo] = OrderedDict()  # below the roots, by identity
    self._frames: OrderedDict[tuple, bytes] = OrderedDict()
    self._at_work: dict[tuple, threading.Lock] = {}
    folder.mkdir(parents=True, exist_ok=True)
    for entry in sorted(folder.glob("file-*")):
      try:
        self._files[entry.name] = _read_meta(entry)
      except (OSError, ValueError, KeyError, TypeError):
        shutil.rmtree(entry, ignore_errors=True)

  # --- Files

  @property
  def bytes(self) -> int:
    with self._lock:
      return sum(m.bytes for m in (*self._files.values(), *self._data.values()))

  def add(self, content: BinaryIO, name: str, purpose: str, owner: str) -> Medium:
    """Keeps an uploaded file.

    Raises:
      ApiError: 413, 415, or 429 where there is no room.
    """
    medium = self._keep(lambda path: self._copy(content, path), name, purpose, owner)
    with self._lock:
      self._files[medium.id] = medium
    return medium

  def get(self, file_id: str, owner: str) -> Medium:
    """A file of this client.

    Raises:
      ApiError: 404.
    """
    self._expire()
    with self._lock:
      medium = self._files.get(file_id)
    if medium is None or medium.owner != owner:
      raise ApiError(404, f"no such file, or it has expired: {file_id[:64]!r}", code="no_such_file")
    return medium

  def files(self, owner: str) -> list[Medium]:
    self._expire()
    with self._lock:
      return [medium for medium in self._files.values() if medium.owner == owner]

  def remove(self, file_id: str, owner: str) -> None:
    medium = self.get(file_id, owner)
    with self._lock:
      self._files.pop(medium.id, None)
    shutil.rmtree(medium.path.parent, ignore_errors=True)

  def _copy(self, content: BinaryIO, path: Path) -> None:
    with open(path, "wb") as file:
      while piece := content.read(PIECE):
        if file.tell() + len(piece) > self._most:
          raise ApiError(
            413, f"file: accepted: up to {self.options.max_upload} MiB", param="file",
            code="too_large",
          )  # fmt: skip
        file.write(piece)

  @property
  def _most(self) -> int:
    return self.options.max_upload << 20

  def _keep(
    self, write: Callable[[Path], None], name: str, purpose: str, owner: str,
    node: Node = Node(None, "file"),
  ) -> Medium:  # fmt: skip
    """Writes a clip into a folder of its own and describes it."""
    self._expire()
    file_id = f"file-{secrets.token_hex(16)}"
    folder = self._folder / file_id
    folder.mkdir()
    try:
      path = folder / CLIP
      with refused_if_full(name):
        write(path)
      size = path.stat().st_size
      self._make_room(size)
      suffix, info = self._in_worker(node, name, clips.settle, path, self._limits)
      path = path.with_name(CLIP + suffix)
      medium = Medium(name, path, info, file_id, owner, size, int(time.time()), purpose)
      _write_meta(folder, medium)
    except BaseException as error:
      shutil.rmtree(folder, ignore_errors=True)
      if isinstance(error, DiskFull):
        raise _no_room() from None
      raise
    return medium

  def _make_room(self, size: int) -> None:
    """Drops data URLs that nobody used for longest until a file fits."""
    most = self.options.media_disk << 20
    while self.bytes + size > most:
      with self._lock:
        if not self._data:
          raise _no_room()
        _, oldest = self._data.popitem(last=False)
      shutil.rmtree(oldest.path.parent, ignore_errors=True)

  def _expire(self) -> None:
    before = time.time() - 3600 * self.options.file_hours
    with self._lock:
      old = [m for m in (*self._files.values(), *self._data.values()) if m.created < before]
      for kept in (self._files, self._data):
        for key in [key for key, medium in kept.items() if medium in old]:
          del kept[key]
    for medium in old:
      shutil.rmtree(medium.path.parent, ignore_errors=True)

  def _in_worker(self, node: Node, name: str, function: Callable, path: Path, *args: Any) -> Any:
    """A call of clips.py in a worker, its refusals those of the client's medium."""
    try:
      return isolation.call(function, path, *args, seconds=self.options.media_timeout)
    except InputError as error:
      text = re.sub(re.escape(str(path)) + r"(\.\w+)?", lambda _: name, str(error))
      if clips.unreadable(error):
        raise node.refusal(text, status=415, code="unsupported_media") from None
      raise node.refusal(text, status=413, code="too_large") from None

  # --- The medium of a conversation

  def resolve(self, media: Media, owner: str) -> Medium:
    """The clip of a conversation.

    Raises:
      ApiError: 400, 403, 404, 413 or 415, with the path in the body.
    """
    several = [self._resolve(node, owner) for node in media.nodes]
    if len(several) == 1 and not several[0].info.marked:
      return several[0]
    sizes = {medium.info.size for medium in several}
    for node, medium in zip(media.nodes, several, strict=True):
      if not medium.info.marked:
        raise node.refusal(
          "one of several pictures; accepted: one video or image in a conversation, or up to 32 "
          "PNG pictures whose transparency marks the object"
        )
      if len(sizes) > 1:
        raise node.refusal(f"pictures of {len(sizes)} sizes; accepted: frames of one size")
    drawn = [
      self._in_worker(node, medium.name, clips.transparency, medium.path)
      for node, medium in zip(media.nodes, several, strict=True)
    ]
    frames, masks = zip(*drawn, strict=True)
    first = several[0]
    if len(frames) > 1:
      kind = {"kind": "list", "frames": len(frames), "times": None, "fps": None}
      first = dataclasses.replace(first, info=dataclasses.replace(first.info, **kind))
    return dataclasses.replace(first, pictures=(frames, masks))

  def _resolve(self, node: Node, owner: str) -> Medium:
    if not isinstance(node.value, str):
      raise node.error(FORMS)
    address = node.value
    if not address.isascii():
      raise node.error(f"{FORMS}, other characters as %XX")
    if address.startswith("data:"):
      return self._from_data(node, owner)
    node.text(ADDRESS)
    if address.startswith("file:"):
      return self._below_root(node)
    if address.startswith("https:"):
      return self._fetched(node, owner)
    if not ID.fullmatch(address):
      raise node.error(FORMS)
    try:
      return self.get(address, owner)
    except ApiError as error:
      raise node.refusal(error, status=404, code=error.code) from None

  def _from_data(self, node: Node, owner: str) -> Medium:
    """A data URL; one that was sent before is known, so that a further turn costs nothing."""
    key = f"{owner}:{hashlib.blake2b(node.value.encode(), digest_size=20).hexdigest()}"
    write = lambda path: _write_data(node, path)  # noqa: E731
    return self._once(key, lambda: self._keep(write, "the data URL", "data", owner, node))

  def _fetched(self, node: Node, owner: str) -> Medium:
    hosts = [host.lower() for host in self.options.allow_media_host]
    write = lambda path: fetch(node, hosts, path, self._most)  # noqa: E731
    name = node.value.rpartition("/")[2].partition("?")[0][:100] or "the address"
    keep = lambda: self._keep(write, name, "fetch", owner, node)  # noqa: E731
    return self._once(f"{owner}:{node.value}", keep)

  def _once(self, key: str, make: Callable[[], Medium]) -> Medium:
    with self._alone(("data", key)):
      with self._lock:
        if key in self._data:
          self._data.move_to_end(key)
          return self._data[key]
      medium = make()
      with self._lock:
        self._data[key] = medium
      return medium

  @contextlib.contextmanager
  def _alone(self, key: tuple):
    """Makes a thing once, where several ask for it at a time."""
    with self._lock:
      lock = self._at_work.setdefault(key, threading.Lock())
    try:
      with lock:
        yield
    finally:
      with self._lock:
        self._at_work.pop(key, None)

  def _below_root(self, node: Node) -> Medium:
    try:
      address = urlsplit(node.value)
    except ValueError:
      raise node.error("file:///PATH") from None
    path = os.path.realpath(unquote(address.path)) if "\0" not in unquote(address.path) else ""
    root = next((r for r in self._roots if path.startswith(os.path.join(r, ""))), None)
    if root is None or address.netloc not in ("", "localhost"):
      raise node.refusal(
        "not below a folder that this server reads (--media-root)",
        status=403, code="path_not_allowed",
      )  # fmt: skip
    name = os.path.relpath(path, root)
    inside = os.path.join(root, "")
    if any(not os.path.realpath(entry).startswith(inside) for entry in _entries(path)):
      raise node.refusal(
        f"{name}: holds links out of the folder", status=403, code="path_not_allowed"
      )
    try:
      status = os.stat(path)
    except OSError:
      raise node.refusal(f"{name}: no such file", status=404, code="no_such_file") from None
    identity = (path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    with self._lock:
      info = self._opened.get(identity)
    if info is None:
      with self._alone(identity):
        info = self._in_worker(node, name, clips.describe, Path(path), self._limits)
      with self._lock:
        self._opened[identity] = info
        while len(self._opened) > KNOWN:
          self._opened.popitem(last=False)
    return Medium(name, Path(path), info)

  # --- Frames and playback

  def frame(self, medium: Medium, number: int, width: int | None, form: str) -> bytes:
    """A frame as a file of the format, kept for the next who asks.

    Raises:
      ApiError: 404 for a frame that the clip does not have; 415.
    """
    if not 0 <= number < medium.info.frames:
      raise ApiError(
        404, f"frame {number}; {medium.name} has frames 0 to {medium.info.frames - 1}", param="n"
      )
    key = (medium.id, number, width, form)
    with self._lock:
      if key in self._frames:
        self._frames.move_to_end(key)
        return self._frames[key]
    node = Node(None, "n")
    content = self._in_worker(
      node, medium.name, clips.encode_frame, medium.path, number, width, form
    )
    with self._lock:
      self._frames[key] = content
      while sum(map(len, self._frames.values())) > PICTURES:
        self._frames.popitem(last=False)
    return content

  def playable(self, medium: Medium) -> tuple[Path, str]:
    """The file that a browser plays, and its media type: the clip itself, or its proxy."""
    if medium.info.kind == "image":
      raise ApiError(415, f"{medium.name} is an image; see frames/0", code="unsupported_media")
    if medium.info.playable:
      return medium.path, medium.info.playable
    proxy = medium.path.with_name(PROXY)
    with self._alone(("proxy", medium.id)):
      if not proxy.exists():
        self._in_worker(Node(None, "id"), medium.name, clips.write_proxy, medium.path, proxy)
    return proxy, "video/mp4"


def _no_room() -> ApiError:
  return ApiError(429, "no room for further files; delete some, or ask later", code="no_room")


def _entries(path: str) -> list[str]:
  """The entries of a folder; none of a file."""
  return [entry.path for entry in os.scandir(path)] if os.path.isdir(path) else []


def _write_data(node: Node, path: Path) -> None:
  """Decodes a data URL piece by piece, so that its bytes are never all in memory twice."""
  head, comma, _ = node.value[:1024].partition(",")
  if not comma:
    raise node.refusal("a data URL without a comma; accepted: data:TYPE;base64,…")
  begin, text = len(head) + 1, node.value
  with open(path, "wb") as file:
    if not head.endswith(";base64"):
      file.write(unquote_to_bytes(text[begin:]))
      return
    try:
      for at in range(begin, len(text), PIECE):
        file.write(base64.b64decode(text[at : at + PIECE], validate=True))
    except (binascii.Error, ValueError):
      raise node.refusal("a data URL that is not base64; accepted: data:TYPE;base64,…") from None
    if not file.tell():
      raise node.refusal("a data URL with nothing in it")


def _write_meta(folder: Path, medium: Medium) -> None:
  times = medium.info.times
  record = {
    "name": medium.name,
    "file": medium.path.name,
    "owner": medium.owner,
    "bytes": medium.bytes,
    "created": medium.created,
    "purpose": medium.purpose,
    "info": {**vars(medium.info), "times": None if times is None else times.tolist()},
  }
  write_text(folder / META, json.dumps(record))


def _read_meta(folder: Path) -> Medium:
  record = json.loads((folder / META).read_text())
  info = record.pop("info")
  info["size"] = tuple(info["size"])
  if info["times"] is not None:
    info["times"] = np.array(info["times"], np.float64)
  path = folder / record.pop("file")
  if record["purpose"] in ("data", "fetch"):
    raise ValueError("of an earlier server's conversation")
  return Medium(path=path, info=ClipInfo(**info), id=folder.name, **record)
