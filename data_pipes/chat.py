"""HTTP calls that end in time, whatever the other side does: says nothing, reads slowly, sends a
byte now and then for ever, or sends without end.

httpcore takes its limits for each wait on a socket; here the waits of a call share one deadline.
"""

import ssl
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpcore

LARGEST = 32 << 20  # bytes of a reply
_PIECE = 1 << 16  # bytes that are sent at once


@dataclass(frozen=True)
class Reply:
  status: int
  headers: Mapping[str, str]  # names in lower case
  body: bytes

  @property
  def text(self) -> str:
    return self.body.decode("utf-8", "replace")


class Caller:
  """Posts to one URL over a connection that it keeps; one thread at a time.

  A pool that threads share looks through all its connections for every call, so each has its own.

  Args:
    seconds: of a call, from connecting to the last byte of its reply.
    tls: for https.
  """

  def __init__(
    self, url: str, headers: Mapping[str, str], seconds: float, tls: ssl.SSLContext | None
  ):
    self._url, self._headers, self._seconds = url, list(headers.items()), seconds
    self._clock = _Clock()
    self._pool = httpcore.ConnectionPool(
      ssl_context=tls,
      proxy=_proxy(url),
      max_connections=1,
      network_backend=_TimedBackend(self._clock),
    )

  def post(self, body: bytes) -> Reply:
    """Raises httpcore's TimeoutException, NetworkError or ProtocolError."""
    self._clock.start(self._seconds)
    found = self._pool.request("POST", self._url, headers=self._headers, content=body)
    headers = {name.decode("latin-1").lower(): v.decode("latin-1") for name, v in found.headers}
    return Reply(found.status, headers, found.content)


ERRORS = (httpcore.NetworkError, httpcore.ProtocolError, httpcore.ProxyError)
LATE = httpcore.TimeoutException


def _proxy(url: str) -> httpcore.Proxy | None:
  """What http_proxy, https_proxy, all_proxy and no_proxy of the environment say."""
  parts = urllib.parse.urlsplit(url)
  known = urllib.request.getproxies()
  found = known.get(parts.scheme) or known.get("all")
  if not found or urllib.request.proxy_bypass(parts.netloc.rpartition("@")[2]):
    return None
  user = urllib.parse.urlsplit(found)
  names = [urllib.parse.unquote(name) for name in (user.username, user.password) if name]
  return httpcore.Proxy(found, auth=(names[0], names[1]) if len(names) == 2 else None)


class _Clock:
  """Time and bytes that are left of the call under way."""

  def start(self, seconds: float) -> None:
    self._end, self._bytes = time.monotonic() + seconds, LARGEST

  def left(self, late: type[Exception]) -> float:
    seconds = self._end - time.monotonic()
    if seconds <= 0:
      raise late("the call's time is over")
    return seconds

  def take(self, data: bytes) -> bytes:
    self._bytes -= len(data)
    if self._bytes < 0:
      raise httpcore.ReadError(f"reply larger than {LARGEST >> 20} MiB")
    return data


class _TimedBackend(httpcore.NetworkBackend):
  def __init__(self, clock: _Clock):
    self._clock, self._inner = clock, httpcore.SyncBackend()

  def connect_tcp(
    self, host: str, port: int, timeout=None, local_address=None, socket_options=None
  ) -> httpcore.NetworkStream:
    left = self._clock.left(httpcore.ConnectTimeout)
    stream = self._inner.connect_tcp(host, port, left, local_address, socket_options)
    return _TimedStream(stream, self._clock)

  def sleep(self, seconds: float) -> None:
    time.sleep(seconds)


class _TimedStream(httpcore.NetworkStream):
  def __init__(self, inner: httpcore.NetworkStream, clock: _Clock):
    self._inner, self._clock = inner, clock

  def read(self, max_bytes: int, timeout=None) -> bytes:
    left = self._clock.left(httpcore.ReadTimeout)
    return self._clock.take(self._inner.read(max_bytes, left))

  def write(self, buffer: bytes, timeout=None) -> None:
    for start in range(0, len(buffer), _PIECE):
      left = self._clock.left(httpcore.WriteTimeout)
      self._inner.write(buffer[start : start + _PIECE], left)

  def close(self) -> None:
    self._inner.close()

  def start_tls(
    self, ssl_context: ssl.SSLContext, server_hostname=None, timeout=None
  ) -> httpcore.NetworkStream:
    left = self._clock.left(httpcore.ConnectTimeout)
    return _TimedStream(self._inner.start_tls(ssl_context, server_hostname, left), self._clock)

  def get_extra_info(self, info: str) -> Any:
    return self._inner.get_extra_info(info)
