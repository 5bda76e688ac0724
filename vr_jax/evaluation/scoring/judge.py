"""The judge of VideoRefer-Bench-D: a text model that scores a description against the reference.

Backends: an OpenAI-compatible endpoint (any provider, or a local server), `replay` of recorded
replies, and `rule`, a stand-in that counts common words and is comparable with nothing.

Every reply is appended to a log, a JSON line keyed by all that it depends on: a restart asks only
what has no reply yet. Keys of an endpoint come from the environment and are never written anywhere.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol

from data_pipes.chat import Client, NoCompletion
from data_pipes.errors import InputError, one_line
from data_pipes.files import JsonLines
from vr_jax.evaluation.scoring.judge_scores import (
  DIMENSIONS,
  HIGHEST,
  Scores,
  published_scores,
  strict_scores,
)

# Ours: upstream's text has no licence. `--judge-prompt FILE` takes theirs.
SYSTEM = """\
You compare a model's description of one object in a video with a reference description of the \
same object that a person wrote. Judge only against the reference. Give four whole numbers from 0 \
(worst) to 5 (best):

1. Subject Correspondence: is the described object the one in the reference (its kind and identity)?
2. Appearance Description: are its looks right (colour, shape, clothing, texture, position)?
3. Temporal Description: are its actions, movements and changes over time right?
4. Hallucination Detection: is the description free of things the reference does not support? \
5 means nothing is made up, 0 means most of it is.

Reply with exactly four lines, the name, a colon and the number, each followed by a short reason \
in brackets, and nothing else:
1. Subject Correspondence: 5 (reason)
2. Appearance Description: 4 (reason)
3. Temporal Description: 3 (reason)
4. Hallucination Detection: 2 (reason)
"""
UPSTREAM_PROMPT = "39596092"  # how the sha256 of upstream's system.txt begins (evaluation spec)
_REPAIR = (
  "Your reply could not be read ({error}). Reply again with exactly four lines and nothing else, "
  "each a name, a colon and one number from 0 to 5: "
) + ", ".join(DIMENSIONS)
_MARKERS = re.compile(r"#+\s*((?:correct|predicted)\s+answer)\s*:", re.IGNORECASE)
_DATED = re.compile(r"\d{4}-?\d{2}-?\d{2}|-\d{4}\b")
_LONGEST_WAIT = 120.0  # seconds; a server that asks for more is asked again after this long

Messages = Sequence[Mapping[str, str]]


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the judge samples: greedily; the published settings are V1_SAMPLING."""

  temperature: float = 0.0
  top_p: float = 1.0
  max_tokens: int = 800


V1_SAMPLING = Sampling(temperature=0.7, top_p=0.95)


@dataclasses.dataclass(frozen=True)
class Reply:
  """One reply of a judge. `text` is None where there is none, and `error` says why.

  `permanent`: asking again would not help.
  """

  text: str | None
  error: str | None = None
  permanent: bool = False
  model: str | None = None
  finish: str | None = None
  usage: Mapping[str, int] = dataclasses.field(default_factory=dict)
  latency: float = 0.0
  attempts: int = 1


class Backend(Protocol):
  """Answers messages; `comparable`: its scores may be compared with those of other models."""

  name: str
  url: str
  comparable: bool

  def ask(self, messages: Messages, sampling: Sampling, item_id: Any, repeat: int) -> Reply: ...


class Stopped(InputError):
  """The endpoint will refuse every request: a wrong key, model or address."""


@dataclasses.dataclass
class Endpoint:
  """An OpenAI-compatible `/chat/completions` (data_pipes.chat).

  Attributes:
    url: up to and without `/chat/completions`.
    key: sent as a bearer token; "" for none.
    timeout: seconds that a call may take, from connecting to the last byte of its reply.
    tries: calls for one reply; between them an exponential pause with jitter, or what the server's
      Retry-After asks for.
  """

  name: str
  url: str
  key: str = dataclasses.field(default="", repr=False)
  timeout: float = 120.0
  tries: int = 5
  first_pause: float = 1.0
  comparable: bool = True

  def __post_init__(self):
    self._client = Client(
      self.url,
      self.key,
      timeout=self.timeout,
      tries=self.tries,
      first_pause=self.first_pause,
      longest_pause=_LONGEST_WAIT,
      longest_wait=_LONGEST_WAIT,
      insist=True,
    )

  def ask(self, messages: Messages, sampling: Sampling, item_id: Any, repeat: int) -> Reply:
    started = time.perf_counter()
    body = {"model": self.name, "messages": list(messages), **dataclasses.asdict(sampling)}
    text, error, permanent = None, None, False
    try:
      completion = self._client.complete(json.dumps(body).encode())
    except NoCompletion as failure:
      completion, calls = failure.completion, failure.calls
      error, permanent = self._reason(failure), failure.final
    else:
      text, calls = completion.text, completion.calls
      if not text.strip():
        text, error, permanent = None, f"refused: {one_line(completion.refusal, 300)}", True
    facts: dict[str, Any] = {}
    if completion:
      facts = {
        "model": completion.model,
        "finish": completion.finish or None,
        "usage": completion.usage,
      }
    latency = time.perf_counter() - started
    return Reply(text, error, permanent, latency=latency, attempts=calls, **facts)

  def _reason(self, failure: NoCompletion) -> str:
    """Why there is no reply. Raises Stopped if there will be none to any request."""
    reason = one_line(failure, 300)
    if failure.kind == "status":
      reason = f"HTTP {failure.status}: {reason}"
    elif failure.kind == "unreadable":
      reason = f"no choices in the answer: {reason}"
    elif failure.kind == "broken":
      reason = f"no answer: {reason}"
    if failure.status in (401, 403, 404):
      raise Stopped(f"judge {self.url}: {reason}; accepted: its key, model name and address")
    return reason


@dataclasses.dataclass
class Replay:
  """Recorded replies: a log of this module, or JSON records with `reply` or `gpt`, and `id`.

  Records without an id take their place in the file. Of repeats the n-th is taken.
  """

  path: Path
  comparable: bool = True
  url: str = ""

  def __post_init__(self):
    self.name = f"replay:{self.path.name}"
    self.replies: dict[tuple[str, int], str | None] = {}
    for index, record in enumerate(read_records(self.path)):
      item_id = str(record.get("id", index))
      text = record.get("reply", record.get("gpt"))
      if text is None and "reply" in record and record.get("error"):
        continue  # a failed attempt in a log; a later line may hold the reply
      repeat = record.get("repeat")
      if repeat is None:
        repeat = sum(i == item_id for i, _ in self.replies)
      self.replies[item_id, repeat] = text
    if not self.replies:
      raise InputError(f"{self.path}: no recorded replies; accepted: records with 'reply' or 'gpt'")

  def ask(self, messages: Messages, sampling: Sampling, item_id: Any, repeat: int) -> Reply:
    text = self.replies.get((str(item_id), repeat))
    if text is None:
      return Reply(None, "no recorded reply", permanent=True)
    return Reply(text, model=self.name)


@dataclasses.dataclass
class Rule:
  """Counts common words. For tests and dry runs: its scores are comparable with nothing."""

  name: str = "rule"
  url: str = ""
  comparable: bool = False

  def ask(self, messages: Messages, sampling: Sampling, item_id: Any, repeat: int) -> Reply:
    match = re.search(
      r"##Correct answer: (.*)\n##Predicted answer: (.*)\n\Z", messages[-1]["content"], re.DOTALL
    )
    if match is None:
      raise InputError("--judge rule scores descriptions; accepted here: --judge URL, replay:FILE")
    truth, answer = (re.findall(r"\w+", text.lower()) for text in match.groups())
    common = len(set(truth) & set(answer))
    recall = common / max(len(set(truth)), 1)
    precision = common / max(len(set(answer)), 1)
    pairs = set(itertools.pairwise(truth)), set(itertools.pairwise(answer))
    order = len(pairs[0] & pairs[1]) / max(len(pairs[0]), 1)
    shares = (recall, recall, order, precision)
    lines = [
      f"{i}. {name}: {round(HIGHEST * share)} (words in common, not a judgement)"
      for i, (name, share) in enumerate(zip(DIMENSIONS, shares, strict=True), 1)
    ]
    return Reply("\n".join(lines), model=self.name)


def read_records(path: Path) -> list[dict[str, Any]]:
  """Objects of a JSON list or of JSON lines."""
  try:
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
      records = json.loads(text)
    else:  # not splitlines: U+2028 within a text is no line break
      records = [json.loads(line) for line in text.split("\n") if line.strip()]
  except (OSError, ValueError, RecursionError) as error:
    raise InputError(f"{path}: {one_line(error)}; accepted: a JSON list or JSON lines") from None
  if not all(isinstance(record, dict) for record in records):
    raise InputError(f"{path}: found something else than objects; accepted: one object an item")
  return records


def open_judge(
  spec: str,
  model: str = "",
  key_variable: str = "OPENAI_API_KEY",
  allow_alias: bool = False,
  **options: Any,
) -> Backend:
  """A backend: "rule", "replay:FILE" or the URL of an endpoint, which needs the model's name.

  A name without a date may mean another model tomorrow, so it needs `allow_alias`.
  """
  if spec == "rule":
    return Rule()
  if spec.startswith("replay:"):
    return Replay(Path(spec.removeprefix("replay:")))
  if not re.match(r"https?://", spec):
    raise InputError(f"--judge {spec!r}; accepted: rule, replay:FILE or the URL of an endpoint")
  if not model:
    raise InputError("--judge URL needs --judge-model NAME, such as gpt-4o-2024-08-06")
  if not allow_alias and not _DATED.search(model):
    raise InputError(
      f"--judge-model {model!r} has no date, so nobody can tell later which model it was; "
      "accepted: a dated name, or --allow-alias"
    )
  return Endpoint(model, spec, os.environ.get(key_variable, ""), **options)


def user_message(truth: str, answer: str, neutralise: bool) -> str:
  """The published request. Strictly, the judge's own markers within the answer are taken apart."""
  if neutralise:
    answer = _MARKERS.sub(r"(\1)", answer)
  return f"##Correct answer: {truth}\n##Predicted answer: {answer}\n"


def holds_markers(answer: str) -> bool:
  return bool(_MARKERS.search(answer))


@dataclasses.dataclass(frozen=True)
class Verdict:
  """One item judged: a Scores and the reply it was read from, for each repeat."""

  scores: tuple[Scores, ...]
  replies: tuple[str | None, ...]


class Judge:
  """A backend with its prompt, its log, its repeats and its budget.

  Attributes:
    budget: tokens (request and reply, as the server counts them; a quarter of the characters where
      it does not) after which nothing more is asked.
    used: tokens of this call's requests; `asked` and `cached` count replies.
  """

  def __init__(
    self,
    backend: Backend,
    log: Path,
    *,
    system: str = SYSTEM,
    sampling: Sampling | None = None,
    parser: str = "strict",
    repeats: int = 1,
    budget: int | None = None,
    concurrency: int = 8,
  ):
    if repeats < 1 or concurrency < 1:
      raise InputError(f"repeats={repeats}, concurrency={concurrency}; accepted: 1 or more")
    self.backend, self.system, self.parser = backend, system, parser
    self.sampling = sampling or (V1_SAMPLING if parser == "published" else Sampling())
    self.repeats, self.budget, self.concurrency = repeats, budget, concurrency
    self.prompt_sha = hashlib.sha256(system.encode()).hexdigest()
    self.used = self.asked = self.cached = self.repaired = 0
    self.models: set[str] = set()
    self._path, self._lock = log, threading.Lock()
    self._log: JsonLines | None = None  # the replies there are, while judging

  def facts(self) -> dict[str, Any]:
    """What goes into result.json."""
    prompt = "upstream's" if self.prompt_sha.startswith(UPSTREAM_PROMPT) else "user's"
    return {
      "name": self.backend.name,
      "url": self.backend.url,
      "models": sorted(self.models),
      "comparable": self.backend.comparable,
      "prompt": "own" if self.system == SYSTEM else prompt,
      "prompt_sha256": self.prompt_sha,
      **dataclasses.asdict(self.sampling),
      "repeats": self.repeats,
      "tokens_used": self.used,
      "asked": self.asked,
      "cached": self.cached,
      "repaired": self.repaired,
    }

  def judge(
    self,
    items: Sequence[tuple[Any, str, str]],
    progress: Callable[[int, int], None] = lambda done, total: None,
  ) -> list[Verdict]:
    """Judges (id, reference, prediction) items, several at a time; the order is kept."""
    asks = [(item, repeat) for item in items for repeat in range(self.repeats)]
    done = self._each(lambda ask: self._one(*ask), asks, progress)
    k = self.repeats
    chunks = [done[i : i + k] for i in range(0, len(done), k)]
    return [Verdict(tuple(s for s, _ in c), tuple(r for _, r in c)) for c in chunks]

  def replies(
    self,
    asks: Sequence[tuple[Any, Messages]],
    progress: Callable[[int, int], None] = lambda done, total: None,
  ) -> list[Reply]:
    """The replies to (id, messages) of another protocol than Bench-D's, in order."""
    return self._each(lambda ask: self._ask(ask[1], ask[0], 0), asks, progress)

  def _each(
    self, call: Callable[[Any], Any], asks: Sequence[Any], progress: Callable[[int, int], None]
  ) -> list[Any]:
    """`call` on each of `asks`, several at a time, with the log open."""
    done: list[Any] = []
    paid = not isinstance(self.backend, Replay | Rule)
    log = JsonLines(self._path, itemgetter("key")) if paid else contextlib.nullcontext()
    with log as self._log, ThreadPoolExecutor(self.concurrency) as pool:
      try:
        for result in pool.map(call, asks):
          done.append(result)
          progress(len(done), len(asks))
      except Stopped:
        pool.shutdown(cancel_futures=True)
        raise
    return done

  def _one(self, item: tuple[Any, str, str], repeat: int) -> tuple[Scores, str | None]:
    item_id, truth, answer = item
    strict = self.parser == "strict"
    messages = [
      {"role": "system", "content": self.system},
      {"role": "user", "content": user_message(truth, answer, strict)},
    ]
    reply = self._ask(messages, item_id, repeat)
    if reply.text is None:
      return Scores({}, f"judge: {reply.error}"), None
    if not strict:
      return published_scores(reply.text), reply.text
    scores = strict_scores(reply.text)
    if scores.error is None:
      return scores, reply.text
    if isinstance(self.backend, Replay):
      return scores, reply.text
    repair = [
      *messages,
      {"role": "assistant", "content": reply.text},
      {"role": "user", "content": _REPAIR.format(error=scores.error)},
    ]
    second = self._ask(repair, item_id, repeat)
    again = strict_scores(second.text)
    if again.error is None:
      with self._lock:
        self.repaired += 1
      return again, second.text
    cut = ", the reply was cut off" if reply.finish == "length" else ""
    return Scores({}, f"{scores.error}{cut}, also when asked again"), reply.text

  def _ask(self, messages: Messages, item_id: Any, repeat: int) -> Reply:
    content = {
      "model": self.backend.name,
      "url": self.backend.url,
      "messages": list(messages),
      "sampling": dataclasses.asdict(self.sampling),
      "repeat": repeat,
      "prompt_sha": self.prompt_sha,
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    key = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    logged = {} if self._log is None else self._log.records.get(key, {})
    if logged.get("reply") is not None:
      with self._lock:
        self.cached += 1
        self.models.add(logged.get("model") or self.backend.name)
      return Reply(logged["reply"], model=logged.get("model"), finish=logged.get("finish"))
    with self._lock:
      if self.budget is not None and self.used >= self.budget:
        return Reply(None, f"the budget of {self.budget} tokens is spent", permanent=True)
    reply = self.backend.ask(messages, self.sampling, item_id, repeat)
    tokens = reply.usage.get("total_tokens")
    if tokens is None:
      tokens = (sum(len(m["content"]) for m in messages) + len(reply.text or "")) // 4
    with self._lock:
      self.used += tokens
      self.asked += 1
      if reply.text is not None:
        self.models.add(reply.model or self.backend.name)
    record = {
      "key": key,
      "id": item_id,
      "repeat": repeat,
      "judge": self.backend.name,
      "reply": reply.text,
      "error": reply.error,
      **{k: getattr(reply, k) for k in ("model", "finish", "usage", "latency", "attempts")},
      "time": time.time(),
    }
    if self._log is not None:
      self._log.add(record)
    return reply
