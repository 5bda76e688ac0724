"""A client for chat endpoints that speak the OpenAI protocol: vLLM, SGLang, llama.cpp, hosted ones.

Answers are JSON that a schema describes; servers may ignore the schema, so every answer is checked,
and asked for again with what was wrong, before the item is given up. Answered calls are stored
before they are used: no answer is paid for twice.
"""

import json
import os
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any

from data_pipes.engine.calls import Calls, Price, request_key
from data_pipes.engine.graph import StopRun, canonical
from data_pipes.engine.quality.text import refused
from data_pipes.errors import InputError

_RETRY = {408, 409, 425, 429, 500, 502, 503, 504, 529}
_KEY_REFUSED = {401, 402, 403}
_DOWN_AFTER = 5  # calls in a row, over all threads, that failed for good


class Unanswered(InputError):
  """The endpoint gave no usable answer to this item; the item is quarantined."""


@dataclass(frozen=True)
class Endpoint:
  """Where and how to ask.

  Attributes:
    base_url: such as http://localhost:8000/v1.
    model: its name there.
    api_key_env: environment variable that holds the key; "" for none.
    timeout: seconds that a call may take, from connecting to the last byte of its answer.
    concurrency: calls in flight at once. requests_per_minute, tokens_per_minute: 0 for no limit.
    retries: further tries after a busy, broken or hanging endpoint; asks: tries at a valid answer.
    price: US dollars for a million input and output tokens.
    extra: further fields of the request body, such as {"temperature": 0}.
  """

  base_url: str
  model: str
  api_key_env: str = ""
  timeout: float = 60.0
  concurrency: int = 16
  requests_per_minute: float = 0.0
  tokens_per_minute: float = 0.0
  retries: int = 5
  asks: int = 3
  price: Price = field(default_factory=Price)
  max_tokens: int = 1024
  schema: bool = True
  extra: Mapping[str, Any] = field(default_factory=dict)


class ChatClient:
  """Asks one endpoint; used by many threads."""

  def __init__(self, endpoint: Endpoint, calls: Callable[[], Calls], stage: str):
    import httpcore

    self.endpoint, self.stage = endpoint, stage
    self._calls = calls
    key = ""
    if endpoint.api_key_env:
      key = os.environ.get(endpoint.api_key_env, "")
      if not key:
        raise InputError(f"environment variable {endpoint.api_key_env} is empty; it holds the key")
    if not endpoint.base_url.startswith(("http://", "https://")):
      raise InputError(f"base_url {endpoint.base_url!r}; accepted: http://... or https://...")
    self._headers = {"content-type": "application/json"}
    if key:
      self._headers["authorization"] = f"Bearer {key}"
    self._url = endpoint.base_url.rstrip("/") + "/chat/completions"
    secure = self._url.startswith("https:")
    self._tls = httpcore.default_ssl_context() if secure else None
    self._of_thread = threading.local()
    self._validators: dict[str, Any] = {}
    self._slots = threading.BoundedSemaphore(endpoint.concurrency)
    self._pace = Pace(endpoint.requests_per_minute, endpoint.tokens_per_minute)
    self._failed = 0
    self._lock = threading.Lock()

  def ask(
    self,
    messages: Sequence[Mapping[str, Any]],
    schema: Mapping[str, Any],
    name: str,
    check: Callable[[Any], str | None] = lambda answer: None,
  ) -> Any:
    """The answer as a JSON value that fits `schema` and passes `check`.

    Args:
      messages: OpenAI messages.
      schema: JSON Schema of the answer. name: of the schema.
      check: says what is wrong with a value that fits the schema, None if nothing.

    Raises:
      Unanswered: no usable answer after all tries.
      StopRun: the endpoint is down or refuses the key, or the budget is spent.
    """
    messages = list(messages)
    wrong = ""
    for _ in range(self.endpoint.asks):
      answer = self.once(messages, schema, name)
      text = answer["text"]
      if answer["refusal"] or refused(text):
        raise Unanswered(f"model refused: {(answer['refusal'] or text)[:120]!r}")
      value, wrong = self.read(text, schema, name, answer["finish"])
      if not wrong:
        wrong = check(value) or ""
      if not wrong:
        return value
      messages = [
        *messages,
        {"role": "assistant", "content": text[:2000]},
        {"role": "user", "content": f"That answer cannot be used: {wrong}. Answer again, with "
                                    "nothing but JSON that fits the schema."},
      ]  # fmt: skip
    raise Unanswered(f"answer unusable after {self.endpoint.asks} tries: {wrong}")

  def once(
    self, messages: Sequence[Mapping[str, Any]], schema: Mapping[str, Any], name: str
  ) -> dict[str, Any]:
    """The answer as it came: {"text", "refusal", "finish"}. Raises as `ask`."""
    endpoint, calls = self.endpoint, self._calls()
    body = {
      "model": endpoint.model,
      "messages": messages,
      "max_tokens": endpoint.max_tokens,
      **endpoint.extra,
    }
    if endpoint.schema:
      body["response_format"] = {
        "type": "json_schema",
        "json_schema": {"name": name, "strict": True, "schema": schema},
      }
    raw = canonical(body)  # once: with images it is large
    request = request_key(raw)
    if (stored := calls.answer(request)) is not None:
      return stored
    size = len(raw) // 4  # tokens, roughly; images cost less than their base64
    with self._slots:
      self._pace.wait(size)
      number = calls.begin(
        request, self.stage, endpoint.model, endpoint.price.usd(min(size, 4000), 200)
      )
      try:
        reply = self._post(raw.encode("utf-8"))
      except BaseException as error:
        calls.end(number, None, note=" ".join(str(error).split())[:200])
        raise
      usage = reply["usage"]
      usd = endpoint.price.usd(usage[0], usage[1])
      calls.end(
        number,
        reply["answer"],
        input_tokens=usage[0],
        output_tokens=usage[1],
        usd=usd,
      )
    return reply["answer"]

  def read(
    self, text: str, schema: Mapping[str, Any], name: str, finish: str = ""
  ) -> tuple[Any, str]:
    """The JSON value of an answer, and what is wrong with it ("" for nothing)."""
    import jsonschema

    if name not in self._validators:
      self._validators[name] = jsonschema.Draft202012Validator(schema)
    return _parse(text, self._validators[name], finish)

  def _caller(self) -> Any:
    """The connection of this thread."""
    from data_pipes.chat import Caller

    if not hasattr(self._of_thread, "caller"):
      self._of_thread.caller = Caller(self._url, self._headers, self.endpoint.timeout, self._tls)
    return self._of_thread.caller

  def _post(self, body: bytes) -> dict[str, Any]:
    """One call with its retries."""
    from data_pipes import chat as timed_http

    reason = ""
    for attempt in range(self.endpoint.retries + 1):
      wait = min(60.0, 0.5 * 2**attempt) * random.uniform(0.5, 1.0)
      try:
        response = self._caller().post(body)
      except timed_http.LATE:
        reason = f"no answer within {self.endpoint.timeout:g} s"
      except timed_http.ERRORS as error:
        reason = f"{type(error).__name__}: {error}"
      else:
        if response.status in _KEY_REFUSED:
          raise StopRun(f"{self._who()}: status {response.status}: {_short(response.text)}")
        if response.status not in _RETRY:
          return self._read(response)
        reason = f"status {response.status}: {_short(response.text)}"
        wait = retry_after(response.headers.get("retry-after"), wait)
      if attempt < self.endpoint.retries:
        time.sleep(wait)
    with self._lock:
      self._failed += 1
      down = self._failed >= _DOWN_AFTER
    message = f"{self._who()}: {reason}, after {self.endpoint.retries + 1} tries"
    if down:
      raise StopRun(f"{message}; {self._failed} calls in a row failed: the endpoint seems down")
    raise Unanswered(message)

  def _read(self, response) -> dict[str, Any]:
    """What a reply says; one that is no chat completion leaves nothing to ask again for."""
    with self._lock:
      self._failed = 0
    if response.status >= 400:
      raise Unanswered(f"{self._who()}: status {response.status}: {_short(response.text)}")
    try:
      reply = json.loads(response.body)
      choice = reply["choices"][0]
      message = choice["message"]
      answer = {
        "text": message.get("content") or "",
        "refusal": message.get("refusal")
        or ("content filter" if choice.get("finish_reason") == "content_filter" else ""),
        "finish": choice.get("finish_reason") or "",
      }
      assert isinstance(answer["text"], str)
    except Exception:
      raise Unanswered(
        f"{self._who()}: found {_short(response.text)!r}; accepted: a chat completion"
      ) from None
    usage = reply.get("usage") or {}
    tokens = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
    self._pace.spent(sum(tokens))
    return {"answer": answer, "usage": tokens}

  def _who(self) -> str:
    return f"{self.endpoint.base_url} ({self.endpoint.model})"


class Pace:
  """Spreads calls so that they keep to a number of requests and tokens a minute."""

  def __init__(self, requests_per_minute: float, tokens_per_minute: float):
    self._requests, self._tokens = requests_per_minute, tokens_per_minute
    self._next = 0.0
    self._mean_tokens = 0.0
    self._lock = threading.Lock()

  def wait(self, likely_tokens: int) -> None:
    """Returns when the next call may go out."""
    with self._lock:
      gap = 60 / self._requests if self._requests else 0.0
      if self._tokens:
        gap = max(gap, 60 * (self._mean_tokens or likely_tokens) / self._tokens)
      now = time.monotonic()
      due = max(now, self._next)
      self._next = due + gap
    if due > now:
      time.sleep(due - now)

  def spent(self, tokens: int) -> None:
    """Takes note of what a call used."""
    with self._lock:
      self._mean_tokens = 0.8 * (self._mean_tokens or tokens) + 0.2 * tokens


def retry_after(header: str | None, otherwise: float) -> float:
  """Seconds that a Retry-After header asks for (a number, or a date), at most ten minutes."""
  if not header:
    return otherwise
  try:
    seconds = float(header)
  except ValueError:
    try:
      seconds = parsedate_to_datetime(header).timestamp() - time.time()
    except ValueError:
      return otherwise
  return min(max(seconds, 0.0), 600.0) + random.uniform(0, 0.1)


def _parse(text: str, validator: Any, finish: str) -> tuple[Any, str]:
  """The JSON value of an answer, and what is wrong with it ("" for nothing)."""
  inner = text.strip()
  if inner.startswith("```"):
    inner = inner.strip("`").removeprefix("json").strip()
  try:
    value = json.loads(inner)
  except ValueError as error:
    cut = "; it was cut off at max_tokens" if finish == "length" else ""
    return None, f"it is no JSON ({error}){cut}"
  errors = sorted(validator.iter_errors(value), key=str)
  if errors:
    where = "/".join(map(str, errors[0].absolute_path)) or "the value"
    return None, f"{where}: {errors[0].message}"[:300]
  return value, ""


def _short(text: str) -> str:
  return " ".join(text.split())[:120]
