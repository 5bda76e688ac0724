"""What a server is started with: options of `vr serve`. For --help, no package of the extra."""

import hmac
import ipaddress
import re
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from data_pipes.errors import InputError, shown

KEY = re.compile(r"[\x21-\x7e]{16,256}")
LOOPBACK_NAMES = ("localhost",)


@dataclass(frozen=True)
class Listening:
  host: str = field(
    default="127.0.0.1",
    metadata={"help": "address to listen on (default: %(default)s); others need --key-file"},
  )
  port: int = field(
    default=8000, metadata={"help": "default: %(default)d; 0: any that is free", "metavar": "N"}
  )
  key_file: str | None = field(
    default=None,
    metadata={"help": "keys that clients must send, a line each: KEY [NAME [WEIGHT]]"},
  )
  allow_host: tuple[str, ...] = field(
    default=(),
    metadata={"repeat": True, "metavar": "NAME", "help": "a name that the server is reached by"},
  )
  allow_origin: tuple[str, ...] = field(
    default=(),
    metadata={
      "repeat": True,
      "metavar": "ORIGIN",
      "help": "pages of this origin may call, such as https://lab.example (default: none)",
    },
  )
  model_name: str | None = field(
    default=None, metadata={"help": "default: as --checkpoint", "metavar": "NAME"}
  )
  max_body: int = field(
    default=64, metadata={"help": "of a JSON body (default: %(default)d)", "metavar": "MIB"}
  )
  request_timeout: float = field(
    default=300.0,
    metadata={"help": "after which an answer ends with what is there", "metavar": "S"},
  )
  drain_timeout: float = field(
    default=300.0,
    metadata={"help": "that running answers have after SIGTERM", "metavar": "S"},
  )

  def __post_init__(self):
    if not 0 <= self.port < 65536:
      raise InputError(f"--port {self.port}; accepted: 0 to 65535")
    for name in ("max_body", "request_timeout", "drain_timeout"):
      if not getattr(self, name) > 0:
        raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}; accepted: more than 0")
    for origin in self.allow_origin:
      if not re.fullmatch(r"https?://[^/\s]+", origin):
        raise InputError(f"--allow-origin {origin}; accepted: such as https://lab.example")
    if not self.is_loopback and self.key_file is None:
      raise InputError(
        f"--host {self.host} is reached from other machines; accepted: with --key-file, or "
        "127.0.0.1"
      )

  @property
  def is_loopback(self) -> bool:
    return is_loopback(self.host)


@dataclass(frozen=True)
class Capacity:
  """What the engine is declared for; nothing is compiled after the start."""

  rows: int | None = field(
    default=None,
    metadata={"help": "answers at once (default: what fits, up to 32; CPU: 4)", "metavar": "N"},
  )
  new_tokens: int = field(
    default=512, metadata={"help": "the most tokens of an answer", "metavar": "N"}
  )
  question_tokens: int = field(
    default=512, metadata={"help": "of a question, its objects, earlier turns", "metavar": "N"}
  )
  scene_frames: tuple[int, ...] = field(
    default=(),
    metadata={"help": "that clients may choose (default: as many as in training)", "metavar": "N"},
  )
  queue: int = field(default=256, metadata={"help": "requests that may wait", "metavar": "N"})
  per_client: int = field(
    default=16, metadata={"help": "of one client that may wait", "metavar": "N"}
  )
  media_memory: int = field(
    default=2048, metadata={"help": "of frames that wait for the device", "metavar": "MIB"}
  )

  def __post_init__(self):
    for name in ("rows", "new_tokens", "question_tokens", "queue", "per_client", "media_memory"):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise InputError(f"--{name.replace('_', '-')} {value}; accepted: 1 or more")


@dataclass(frozen=True)
class Key:
  """A client's key, of which only the hash is kept; its turns are weighted."""

  digest: bytes
  name: str
  weight: float = 1.0


@dataclass(frozen=True)
class Keys:
  """The keys that are accepted; none where clients need none."""

  keys: tuple[Key, ...] = ()

  def match(self, key: str) -> Key | None:
    """The key that a client sent, compared in the same time whatever it sent."""
    digest = sha256(key.encode("utf-8", "surrogateescape")).digest()
    same = [entry for entry in self.keys if hmac.compare_digest(entry.digest, digest)]
    return same[0] if same else None


def read_keys(path: str) -> Keys:
  """The keys of a file: a line each, KEY [NAME [WEIGHT]]; # begins a comment.

  Raises:
    InputError: the file cannot be read, holds no key, or a line is none. No message holds a key.
  """
  try:
    lines = Path(path).read_text(encoding="utf-8").splitlines()
  except (OSError, ValueError) as error:
    reason = getattr(error, "strerror", None) or "not UTF-8"
    raise InputError(f"--key-file {path}: cannot be read ({reason})") from None
  keys: list[Key] = []
  for number, line in enumerate(lines, 1):
    words = line.partition("#")[0].split()
    if not words:
      continue
    where = f"--key-file {path}: line {number}"
    if len(words) > 3 or not KEY.fullmatch(words[0]):
      raise InputError(f"{where}; accepted: KEY [NAME [WEIGHT]], KEY of 16 characters or more")
    name = words[1] if len(words) > 1 else f"key {number}"
    try:
      weight = float(words[2]) if len(words) > 2 else 1.0
    except ValueError:
      weight = 0.0
    if not 0 < weight <= 1000:
      raise InputError(f"{where}: weight {shown(words[2])}; accepted: above 0, up to 1000")
    if name in (key.name for key in keys):
      raise InputError(f"{where}: name {name!r} has another key already")
    keys.append(Key(sha256(words[0].encode()).digest(), name, weight))
  if not keys:
    raise InputError(f"--key-file {path}: holds no key")
  return Keys(tuple(keys))


def is_loopback(host: str) -> bool:
  """Whether a host, a name or an address, is this machine alone."""
  try:
    return ipaddress.ip_address(host.strip("[]")).is_loopback
  except ValueError:
    return host.lower() in LOOPBACK_NAMES
