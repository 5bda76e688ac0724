"""Chat endpoints that speak the OpenAI protocol: vLLM, SGLang, llama.cpp, hosted ones.

A call ends in time, whatever the other side does: says nothing, reads slowly, sends a byte now and
then for ever, or sends without end. httpcore takes its limits for each wait on a socket; here the
waits of a call share one deadline. Busy, broken and late endpoints are asked again.

What is asked, what an answer must be, and where answers are kept is the caller's: the judge of
Bench-D logs lines (data_pipes.files), the engine has a ledger with prices (engine.calls).
"""

import json
import random
import ssl
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from typing import Any, Literal

import httpcore

from data_pipes.errors import InputError, one_line

LARGEST = 32 << 20  # bytes of a reply
_PIECE = 1 << 16  # bytes that are sent at once
_BUSY = frozenset({408, 409, 425, 429})  # statuses, beside all from 500, that pass by themselves


@dataclass(frozen=True)
class Completion:
  """What a model answered.

  Attributes:
    text: "" where it said nothing.
    refusal: its reason not to answer, "" if it did not refuse.
    finish: why the text ends, such as "stop" or "length".
    model: its exact name, where the server tells.
    usage: tokens by what they were used for, such as "prompt_tokens".
    calls: how many it took.
  """

  text: str
  refusal: str = ""
  finish: str = ""
  model: str | None = None
  usage: Mapping[str, int] = field(default_factory=dict)
  calls: int = 1


class NoCompletion(Exception):
  """An endpoint gave no completion; the text says why, without the key.

  Attributes:
    kind: "status" (an HTTP `status` that is no success), "late", "broken" (no connection, or a cut
      one), "unreadable" (a success that is no chat completion) or "empty".
    final: a further call would not help.
    completion: the empty one.
    calls: how many were made.
    paid: it may be charged for all the same: the request had gone out, and no error came back.
  """

  def __init__(
    self,
    kind: Literal["status", "late", "broken", "unreadable", "empty"],
    text: str,
    *,
    status: int = 0,
    final: bool = False,
    retry_after: str | None = None,
    completion: Completion | None = None,
  ):
    super().__init__(text)
    self.kind, self.status, self.final = kind, status, final
    self.retry_after, self.completion, self.calls = retry_after, completion, 1
    self.paid = kind in ("unreadable", "empty")


class Client:
  """Asks one endpoint; used by many threads.

  Args:
    base_url: such as http://localhost:8000/v1.
    key: sent as a bearer token, "" for none; no message holds it.
    timeout: seconds that a call may take, from connecting to the last byte of its reply.
    tries: calls for one completion.
    first_pause: seconds before the second call, in the mean three quarters of it; twice as long
      before each further one, up to `longest_pause`.
    longest_wait: seconds that a server may ask for by Retry-After.
    insist: what is empty or no chat completion is asked for again.

  Raises:
    InputError: `base_url` is no address.
  """

  def __init__(
    self,
    base_url: str,
    key: str = "",
    *,
    timeout: float = 60.0,
    tries: int = 6,
    first_pause: float = 0.5,
    longest_pause: float = 60.0,
    longest_wait: float = 600.0,
    insist: bool = False,
  ):
    if not base_url.startswith(("http://", "https://")):
      raise InputError(f"base_url {base_url!r}; accepted: http://... or https://...")
    self.timeout, self.tries, self.insist = timeout, tries, insist
    self.first_pause, self.longest_pause = first_pause, longest_pause
    self.longest_wait = longest_wait
    self._url = base_url.rstrip("/") + "/chat/completions"
    self._key = key
    self._headers = {"content-type": "application/json"}
    if key:
      self._headers["authorization"] = f"Bearer {key}"
    self._tls = httpcore.default_ssl_context() if base_url.startswith("https:") else None
    self._thread = threading.local()

  def complete(
    self,
    body: bytes,
    failed: Callable[[NoCompletion], None] = lambda error: None,
    halted: threading.Event | None = None,
  ) -> Completion:
    """The answer to a request's JSON.

    Args:
      failed: told of each call without a completion, before the next is made.
      halted: once it is set no further call is made, and no long pause is waited for.

    Raises:
      NoCompletion: there is none after all tries, or further ones would not help.
    """
    for calls in range(1, self.tries + 1):
      try:
        return replace(self._once(body), calls=calls)
      except NoCompletion as error:
        error.calls = calls
        failed(error)
        if error.final or calls == self.tries:
          raise
        reason = error
        pause = min(self.longest_pause, self.first_pause * 2 ** (calls - 1))
        wait = retry_after(error.retry_after, pause * random.uniform(0.5, 1.0), self.longest_wait)
      if pause_until(wait, halted):
        raise reason
    raise AssertionError(f"tries={self.tries}")

  def _once(self, body: bytes) -> Completion:
    try:
      reply = self._connection().post(body)
    except httpcore.TimeoutException as error:
      late = NoCompletion("late", f"no answer within {self.timeout:g} s")
      late.paid = not isinstance(error, httpcore.ConnectTimeout)
      raise late from None
    except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.ProxyError) as error:
      broken = NoCompletion("broken", f"{type(error).__name__}: {one_line(error)}")
      broken.paid = isinstance(error, httpcore.ReadError | httpcore.RemoteProtocolError)
      raise broken from None
    text = self._without_key(reply.body.decode("utf-8", "replace"))
    if reply.status >= 300:
      raise NoCompletion(
        "status",
        text,
        status=reply.status,
        final=not (reply.status in _BUSY or reply.status >= 500),
        retry_after=reply.headers.get("retry-after"),
      )
    completion = _read(text)
    if completion is None:
      raise NoCompletion("unreadable", text, final=not self.insist)
    completion = replace(
      completion,
      text=self._without_key(completion.text),  # which JSON may have spelt in other ways
      refusal=self._without_key(completion.refusal),
      finish=self._without_key(completion.finish),
      model=completion.model and self._without_key(completion.model),
    )
    if self.insist and not completion.text.strip() and not completion.refusal:
      raise NoCompletion("empty", "an empty reply", completion=completion)
    return completion

  def _without_key(self, text: str) -> str:
    """Servers repeat what they were sent."""
    return text.replace(self._key, "***") if self._key else text

  def _connection(self) -> "_Connection":
    """This thread's: a pool that threads share looks through all its connections for every call."""
    if not hasattr(self._thread, "connection"):
      self._thread.connection = _Connection(self._url, self._headers, self.timeout, self._tls)
    return self._thread.connection


def pause_until(seconds: float, halted: threading.Event | None) -> bool:
  """Waits, at most a second beyond the moment at which `halted` is set; whether it is."""
  if halted is None or seconds < 1:
    time.sleep(seconds)
  else:  # in a thread that can be left
    sleeper = threading.Thread(target=time.sleep, args=(seconds,), daemon=True)
    sleeper.start()
    while sleeper.is_alive() and not halted.is_set():
      sleeper.join(0.1)
  return halted is not None and halted.is_set()


def _read(body: str) -> Completion | None:
  """A reply's completion, None if it is none."""
  try:
    reply = json.loads(body)
    choice = reply["choices"][0]
    message, finish = choice["message"], choice.get("finish_reason") or ""
    text, refusal = message.get("content") or "", message.get("refusal") or ""
    reported = reply.get("usage") or {}
    usage = {k: v for k, v in reported.items() if type(v) is int and v >= 0}  # else it is not told
    model = reply.get("model")
  except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
    return None
  if not isinstance(text, str) or not isinstance(finish, str):
    return None
  model = model if isinstance(model, str) else None
  if not refusal and finish == "content_filter":
    refusal = "content filter"
  return Completion(text, str(refusal), finish, model, usage)


def retry_after(header: str | None, otherwise: float, longest: float = 600.0) -> float:
  """Seconds that a Retry-After header asks for (a number, or a date), at most `longest`."""
  if not header:
    return otherwise
  try:
    seconds = float(header)
  except ValueError:
    try:
      seconds = parsedate_to_datetime(header).timestamp() - time.time()
    except ValueError:
      return otherwise
  return min(max(seconds, 0.0), longest) + random.uniform(0, 0.1)


@dataclass(frozen=True)
class _Reply:
  status: int
  headers: Mapping[str, str]  # names in lower case
  body: bytes


class _Connection:
  """Posts to one URL over a connection that it keeps; one thread at a time.

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

  def post(self, body: bytes) -> _Reply:
    """Raises httpcore's TimeoutException, NetworkError or ProtocolError."""
    self._clock.start(self._seconds)
    reply = self._pool.request("POST", self._url, headers=self._headers, content=body)
    headers = {name.decode("latin-1").lower(): v.decode("latin-1") for name, v in reply.headers}
    return _Reply(reply.status, headers, reply.content)


def _proxy(url: str) -> httpcore.Proxy | None:
  """What http_proxy, https_proxy, all_proxy and no_proxy of the environment say."""
  parts = urllib.parse.urlsplit(url)
  proxies = urllib.request.getproxies()
  proxy = proxies.get(parts.scheme) or proxies.get("all")
  if not proxy or urllib.request.proxy_bypass(parts.netloc.rpartition("@")[2]):
    return None
  user = urllib.parse.urlsplit(proxy)
  names = [urllib.parse.unquote(name) for name in (user.username, user.password) if name]
  return httpcore.Proxy(proxy, auth=(names[0], names[1]) if len(names) == 2 else None)


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
