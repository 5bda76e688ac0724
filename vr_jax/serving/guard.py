"""What stands before every route: hosts, origins, keys, sizes of bodies, ids, counts of requests.

A route is closed unless it is named here: a new one cannot escape.
"""

import asyncio
import ipaddress
import json
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from vr_jax.serving.errors import ApiError
from vr_jax.serving.metrics import Metrics
from vr_jax.serving.settings import Keys, Listening, is_loopback

OPEN = ("/", "/health", "/health/ready")  # answered without a key; they tell nothing
REQUEST_ID = re.compile(r"[\w-]{1,64}", re.ASCII)
COOKIE = re.compile(r"(?:^|;\s*)vr_session=([\w-]{16,64})(?:;|$)", re.ASCII)
UPLOADS = "/v1/files"
PIECE_SECONDS = 30.0  # until the next piece of a body
SEND_SECONDS = 120.0  # until a client takes the next piece of an answer
HEADERS = {
  "x-content-type-options": "nosniff",
  "referrer-policy": "no-referrer",
  "x-frame-options": "DENY",
  "content-security-policy": "default-src 'self'; frame-ancestors 'none'",
  "cross-origin-resource-policy": "same-origin",
}

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
log = logging.getLogger("vr.serve")


class Guard:
  """An ASGI application around the routes.

  In `scope["state"]` routes find: request_id; client, whose turn a request takes; owner, whose
  files it may see; weight.
  """

  def __init__(self, app: Any, listening: Listening, keys: Keys, metrics: Metrics, max_upload: int):
    self._app, self._listening, self._keys, self._metrics = app, listening, keys, metrics
    self._names = {name.lower() for name in listening.allow_host}
    self._most = {True: (max_upload << 20) + (1 << 20), False: listening.max_body << 20}

  async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
      return
    headers = _headers(scope)
    given = headers.get("x-request-id", "")
    request_id = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(16)
    started = time.monotonic()
    status = 0

    async def respond(message: Message) -> None:
      nonlocal status
      if message["type"] == "http.response.start":
        status = message["status"]
        fixed = HEADERS | {"x-request-id": request_id}
        message["headers"] = [*message.get("headers", ()), *_encoded(fixed)]
      async with asyncio.timeout(SEND_SECONDS):
        await send(message)

    scope.setdefault("state", {})["request_id"] = request_id
    try:
      self._check(scope, headers)
      await self._app(scope, self._bounded(scope, headers, receive), respond)
    except ApiError as error:
      await refuse(respond, error)
    except (TimeoutError, ConnectionError):
      log.info("%s left", request_id)  # it no longer takes what it asked for
    finally:
      route = getattr(scope.get("route"), "path", "none")
      self._metrics.request(route, status, time.monotonic() - started)
      log.info(
        "%s %s %s %d %.0f ms", request_id, scope["method"], route, status,
        1000 * (time.monotonic() - started),
      )  # fmt: skip

  def _check(self, scope: Message, headers: Mapping[str, str]) -> None:
    """Raises ApiError where the request may not be answered; notes whose it is."""
    host = headers.get("host", "")
    if not self._is_allowed_host(host):
      raise ApiError(
        403, f"host {host[:80]!r} is not a name of this server (--allow-host)",
        code="host_not_allowed",
      )  # fmt: skip
    self._check_origin(scope, headers, host)
    state = scope["state"]
    peer = (scope.get("client") or ("",))[0]
    cookie = COOKIE.search(headers.get("cookie", ""))
    state["client"], state["owner"], state["weight"] = cookie[1] if cookie else peer, "", 1.0
    # A browser asks without a key whether it may call.
    asks = scope["method"] == "OPTIONS" and headers.get("origin") in self._listening.allow_origin
    if not self._keys.keys or scope["path"] in OPEN or asks:
      return
    scheme, _, sent = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not sent:
      raise ApiError(401, "no key; accepted: Authorization: Bearer KEY", code="no_api_key")
    key = self._keys.match(sent.strip())
    if key is None:
      raise ApiError(401, "this key is not accepted", code="invalid_api_key")
    state["client"], state["owner"], state["weight"] = key.name, key.name, key.weight

  def _is_allowed_host(self, host: str) -> bool:
    """A name may have been pointed here by somebody else's DNS; an address cannot."""
    name = (urlsplit(f"//{host}").hostname or "") if _is_plain(host) else ""
    if name in self._names:
      return True
    if self._listening.is_loopback:
      return is_loopback(name)
    try:
      ipaddress.ip_address(name)
    except ValueError:
      return False
    return True

  def _check_origin(self, scope: Message, headers: Mapping[str, str], host: str) -> None:
    """A page of another origin may not call, nor show what is here."""
    origin = headers.get("origin")
    allowed = self._listening.allow_origin
    if origin is not None and origin not in (f"http://{host}", f"https://{host}", *allowed):
      raise ApiError(
        403, f"pages of {origin[:80]!r} may not call (--allow-origin)", code="origin_not_allowed"
      )
    crosses = headers.get("sec-fetch-site") in ("cross-site", "same-site")
    visits = headers.get("sec-fetch-mode") == "navigate" and scope["path"] == "/"
    if origin is None and crosses and not visits:
      raise ApiError(403, "a page of another origin may not call", code="origin_not_allowed")

  def _bounded(self, scope: Message, headers: Mapping[str, str], receive: Receive) -> Receive:
    """`receive` of a body that is neither too long nor too slow."""
    most = self._most[scope["path"] == UPLOADS]
    length = headers.get("content-length", "0")
    too_long = ApiError(413, f"the body; accepted: up to {most >> 20} MiB", code="too_large")
    if length.isdecimal() and int(length[:20]) > most:
      raise too_long
    count, is_whole = 0, False

    async def bounded() -> Message:
      nonlocal count, is_whole
      if is_whole:
        return await receive()  # until the client leaves
      try:
        async with asyncio.timeout(PIECE_SECONDS):
          message = await receive()
      except TimeoutError:
        raise ApiError(408, f"no more of the body within {PIECE_SECONDS:g} s") from None
      count += len(message.get("body", b""))
      is_whole = not message.get("more_body")
      if count > most:
        raise too_long
      return message

    return bounded


async def refuse(send: Send, error: ApiError) -> None:
  """Sends an error as the whole response; the connection ends, its body may not be read."""
  content = json.dumps(error.to_dict()).encode()
  headers = {"content-type": "application/json", "content-length": str(len(content))}
  headers |= error.headers | ({"connection": "close"} if error.status in (408, 413) else {})
  start = {"type": "http.response.start", "status": error.status, "headers": _encoded(headers)}
  await send(start)
  await send({"type": "http.response.body", "body": content})


def _headers(scope: Message) -> dict[str, str]:
  """The headers; of one that comes twice, nothing that could be mistaken for either."""
  headers: dict[str, str] = {}
  for name, value in scope["headers"]:
    key, text = name.decode("latin-1").lower(), value.decode("latin-1")
    headers[key] = f"{headers[key]}, {text}" if key in headers else text
  return headers


def _is_plain(host: str) -> bool:
  return re.fullmatch(r"(?:[\w.-]+|\[[0-9a-fA-F:.]+\])(?::\d{1,5})?", host, re.ASCII) is not None


def _encoded(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
  return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
