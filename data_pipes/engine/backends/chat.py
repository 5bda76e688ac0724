"""Answers of chat endpoints (data_pipes.chat) that a schema describes, at a pace and a price.

Servers may ignore the schema, so every answer is checked, and asked for again with what was wrong,
before the item is given up. Answered calls are stored before they are used: no answer is paid for
twice.
"""

import json
import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_pipes.chat import Client, Completion, NoCompletion, pause_until
from data_pipes.engine.calls import Calls, Price, request_key
from data_pipes.engine.graph import StopRun, canonical
from data_pipes.engine.quality.text import refused
from data_pipes.errors import InputError, one_line

_KEY_REFUSED = {401, 402, 403}
_PICTURE = re.compile(r"data:image/[^\"]*")
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
    self.endpoint, self.stage = endpoint, stage
    self._calls = calls
    key = ""
    if endpoint.api_key_env:
      key = os.environ.get(endpoint.api_key_env, "")
      if not key:
        raise InputError(f"environment variable {endpoint.api_key_env} is empty; it holds the key")
    self._client = Client(
      endpoint.base_url, key, timeout=endpoint.timeout, tries=endpoint.retries + 1
    )
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
    requests: list[str] = []
    for _ in range(self.endpoint.asks):
      answer = self.once(messages, schema, name, requests)
      text = answer["text"]
      if answer["refusal"] or refused(text):
        self._calls().give_up(requests)
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
    self._calls().give_up(requests)
    raise Unanswered(f"answer unusable after {self.endpoint.asks} tries: {wrong}")

  def once(
    self,
    messages: Sequence[Mapping[str, Any]],
    schema: Mapping[str, Any],
    name: str,
    requests: list[str] | None = None,
  ) -> dict[str, Any]:
    """The answer as it came: {"text", "refusal", "finish"}; adds the request to `requests`.
    Raises as `ask`."""
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
    if requests is not None:
      requests.append(request)
    if (stored := calls.answer(request)) is not None:
      return stored
    size = len(raw) // 4  # tokens, roughly; images cost less than their base64
    most = endpoint.price.usd(likely_tokens(raw), most_tokens(body))
    with self._slots:
      self._pace.wait(size, calls.halted)
      number = calls.begin(request, self.stage, endpoint.model, most)

      def settle(error: NoCompletion) -> None:
        if error.paid:
          calls.try_again(number, most)

      try:
        completion = self._complete(raw.encode("utf-8"), settle, calls.halted)
      except BaseException as error:
        calls.end(number, None, note=one_line(error))
        raise
      complete = {"prompt_tokens", "completion_tokens"} <= completion.usage.keys()
      tokens_in = completion.usage.get("prompt_tokens", 0)
      tokens_out = completion.usage.get("completion_tokens", 0)
      self._pace.spent(tokens_in + tokens_out)
      answer = {
        "text": completion.text,
        "refusal": completion.refusal,
        "finish": completion.finish,
      }
      calls.end(
        number,
        answer,
        input_tokens=tokens_in,
        output_tokens=tokens_out,
        usd=endpoint.price.usd(tokens_in, tokens_out) if complete else most,
      )
    return answer

  def read(
    self, text: str, schema: Mapping[str, Any], name: str, finish: str = ""
  ) -> tuple[Any, str]:
    """The JSON value of an answer, and what is wrong with it ("" for nothing)."""
    import jsonschema

    if name not in self._validators:
      self._validators[name] = jsonschema.Draft202012Validator(schema)
    return _parse(text, self._validators[name], finish)

  def _complete(
    self, body: bytes, settle: Callable[[NoCompletion], None], halted: threading.Event
  ) -> Completion:
    """One answer, and whether the endpoint is still there. Raises as `ask`."""
    where = f"{self.endpoint.base_url} ({self.endpoint.model})"
    try:
      completion = self._client.complete(body, settle, halted)
    except NoCompletion as error:
      reason = one_line(error, 120)
      if error.kind == "status":
        reason = f"status {error.status}: {reason}"
      elif error.kind == "unreadable":
        reason = f"found {reason!r}; accepted: a chat completion"
      if halted.is_set():
        raise StopRun(f"{where}: not asked again, as the run stops") from None
      if error.status in _KEY_REFUSED:
        raise StopRun(f"{where}: {reason}") from None
      with self._lock:
        self._failed = 0 if error.final else self._failed + 1
        failed = self._failed
      if error.final:  # the endpoint is there, and asking it again would not help
        raise Unanswered(f"{where}: {reason}") from None
      message = f"{where}: {reason}, after {error.calls} tries"
      if failed >= _DOWN_AFTER:
        raise StopRun(
          f"{message}; {failed} calls in a row failed: the endpoint seems down"
        ) from None
      raise Unanswered(message) from None
    with self._lock:
      self._failed = 0
    return completion


def likely_tokens(raw: str) -> int:
  """About as many tokens as a request's JSON may be, its pictures counted as 1 500 each."""
  text, pictures = _PICTURE.subn("", raw)
  return len(text.encode("utf-8", "replace")) // 3 + 1500 * pictures


def most_tokens(body: Mapping[str, Any]) -> int:
  """Tokens of the longest answer that a request allows."""
  limits = [body.get(key) for key in ("max_completion_tokens", "max_tokens")]
  return max(n for n in (*limits, 0) if isinstance(n, int))


class Pace:
  """Spreads calls so that they keep to a number of requests and tokens a minute."""

  def __init__(self, requests_per_minute: float, tokens_per_minute: float):
    self._requests, self._tokens = requests_per_minute, tokens_per_minute
    self._next = 0.0
    self._mean_tokens = 0.0
    self._lock = threading.Lock()

  def wait(self, likely_tokens: int, halted: threading.Event | None = None) -> None:
    """Returns when the next call may go out. Raises StopRun: the run stops meanwhile."""
    with self._lock:
      gap = 60 / self._requests if self._requests else 0.0
      if self._tokens:
        gap = max(gap, 60 * (self._mean_tokens or likely_tokens) / self._tokens)
      now = time.monotonic()
      due = max(now, self._next)
      self._next = due + gap
    if due > now and pause_until(due - now, halted):
      raise StopRun("not asked, as the run stops")

  def spent(self, tokens: int) -> None:
    """Takes note of what a call used."""
    with self._lock:
      self._mean_tokens = 0.8 * (self._mean_tokens or tokens) + 0.2 * tokens


def _refuse(constant: str) -> None:
  raise ValueError(f"found {constant}")


def _parse(text: str, validator: Any, finish: str) -> tuple[Any, str]:
  """The JSON value of an answer, and what is wrong with it ("" for nothing)."""
  inner = text.strip()
  if inner.startswith("```"):
    inner = inner.strip("`").removeprefix("json").strip()
  try:
    value = json.loads(inner, parse_constant=_refuse)  # NaN is no JSON, and passes comparisons
  except ValueError as error:
    cut = "; it was cut off at max_tokens" if finish == "length" else ""
    return None, f"it is no JSON ({error}){cut}"
  errors = sorted(validator.iter_errors(value), key=str)
  if errors:
    where = "/".join(map(str, errors[0].absolute_path)) or "the value"
    return None, f"{where}: {errors[0].message}"[:300]
  return value, ""
