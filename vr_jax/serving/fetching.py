"""Media from other hosts: only those that are named, at the address that was checked.

A name is looked up once, every address that it has must be one of the public internet, and the
connection goes to the address that was checked: a name that changes its address between the check
and the connection, or that leads into the own network, gets nothing. Redirects are not followed.
"""

import ipaddress
import socket
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from urllib.parse import urlsplit

import httpcore

from data_pipes.errors import one_line
from vr_jax.serving.body import Node

SECONDS = 30.0  # of a whole fetch
WAIT = 10.0  # seconds, of a wait for the other side
HTTPS = 443
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # addresses of IPv4 in the last 32 bits

Resolve = Callable[[str, int], Iterable[str]]


def addresses(host: str, port: int) -> list[str]:
  """The addresses of a name."""
  entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
  return list(dict.fromkeys(str(entry[4][0]) for entry in entries))


def is_public(address: str) -> bool:
  """Whether an address is one of the public internet, in either form of IP."""
  ip = ipaddress.ip_address(address.partition("%")[0])
  if isinstance(ip, ipaddress.IPv6Address):
    inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo or (None, None))[1]
    ip = inner or (ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in NAT64 else ip)
  return ip.is_global and not ip.is_multicast


class _PinnedBackend(httpcore.SyncBackend):
  """Connects to an address that was checked."""

  def __init__(self, resolve: Resolve):
    self._resolve = resolve

  def connect_tcp(
    self, host: str, port: int, timeout=None, local_address=None, socket_options=None
  ) -> httpcore.NetworkStream:
    try:
      every = list(self._resolve(host, port))
    except OSError as error:
      raise httpcore.ConnectError(f"no such host ({error})") from None
    if not every or not all(map(is_public, every)):
      raise PrivateAddress(host)
    return super().connect_tcp(every[0], port, timeout, local_address, socket_options)


class PrivateAddress(Exception):
  """A name that leads into a network which is not the public one."""


def fetch(
  node: Node,
  hosts: Iterable[str],
  path: Path,
  most: int,
  resolve: Resolve = addresses,
) -> None:
  """Writes what stands at an https address to `path`.

  Args:
    node: the address in the client's body.
    hosts: names that may be asked, HOST or HOST:PORT.
    most: bytes.

  Raises:
    ApiError: 403 for a host that is not named, or an address that is not public; 413; 400 where
      the host gives nothing.
  """
  try:
    url = urlsplit(node.text(8192))
    host, port = (url.hostname or "").lower().rstrip("."), url.port or HTTPS
  except ValueError:
    raise node.error("https://HOST/…") from None
  named = host if port == HTTPS else f"{host}:{port}"
  if named not in hosts or url.username or url.password:
    raise node.refusal(
      f"host {named!r} is not one that this server fetches from (--allow-media-host)",
      status=403,
      code="host_not_allowed",
    )
  deadline = time.monotonic() + SECONDS
  target = url._replace(netloc=named, fragment="").geturl()
  waits = {"timeout": {"connect": WAIT, "read": WAIT, "write": WAIT, "pool": WAIT}}
  backend = _PinnedBackend(resolve)
  try:
    with (
      httpcore.ConnectionPool(network_backend=backend, max_connections=1) as pool,
      pool.stream("GET", target, headers={"accept": "video/*, image/*"}, extensions=waits) as reply,
      open(path, "wb") as file,
    ):
      if reply.status != 200:
        follow = " (redirects are not followed)" if 300 <= reply.status < 400 else ""
        raise node.refusal(f"the host answered {reply.status}{follow}", code="not_fetched")
      for piece in reply.iter_stream():
        if file.tell() + len(piece) > most:
          raise node.refusal(f"accepted: up to {most} bytes", status=413, code="too_large")
        if time.monotonic() > deadline:
          raise node.refusal(f"not there within {SECONDS:g} s", code="not_fetched")
        file.write(piece)
  except PrivateAddress:
    raise node.refusal(
      f"host {named!r} has an address that is not public", status=403, code="host_not_allowed"
    ) from None
  except (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError) as error:
    raise node.refusal(f"cannot be fetched ({one_line(error, 100)})", code="not_fetched") from None
