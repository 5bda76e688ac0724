"""Batches in OpenAI's form: a file of requests, a file of responses, the answers of the server.

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {…}}
    {"id": …, "custom_id": "a", "response": {"status_code": 200, "body": {…}}, "error": null}

A run that was stopped goes on: what is answered stays, what was refused is tried again.
"""

import json
import secrets
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from data_pipes.errors import InputError, shown
from data_pipes.files import JsonLines, read_json_lines
from vr_jax.inference.bulk import Summary
from vr_jax.inference.model import Model
from vr_jax.serving.body import Node
from vr_jax.serving.chat import read_chat
from vr_jax.serving.engine import Caller, Engine, refusal
from vr_jax.serving.errors import ApiError
from vr_jax.serving.media import MediaOptions, Store
from vr_jax.serving.settings import Capacity, Listening

URL = "/v1/chat/completions"
FIELDS = ("custom_id", "method", "url", "body")


@dataclass(frozen=True)
class Line:
  """A request of the file."""

  custom_id: str
  body: dict[str, Any]

  @property
  def sha256(self) -> str:
    """Tells an answer to this request from one to another of the same id."""
    return sha256(json.dumps(self.body, sort_keys=True).encode()).hexdigest()[:16]


def run(
  load: Callable[[], Model],
  checkpoint: str | None,
  model_id: str,
  requests: Path | str,
  out: Path | str,
  capacity: Capacity,
  media: MediaOptions,
) -> Summary:
  """Answers the requests that `out` does not answer yet, each written as soon as it is there.

  Args:
    load: gives the model, once the files are known to be usable.
    checkpoint: hash of its weights.

  Raises:
    InputError: a line is no request; `out` holds answers to other requests, or of other weights.
  """
  lines, out = read_lines(Path(requests)), Path(out)
  if not out.parent.is_dir() or out.is_dir():
    raise InputError(f"--out {out}: cannot be written; accepted: a file in a folder that is there")
  before = _check_answers(out, lines, checkpoint)
  remaining = [line for line in lines.values() if line.custom_id not in before]
  counts = {True: 0, False: 0}
  with tempfile.TemporaryDirectory(prefix="vr-media-") as scratch:
    store = Store(media, Path(scratch))
    engine = Engine(Listening(), capacity, store, model_id, int(time.time()))
    if remaining:
      engine.start(load, checkpoint)
    answers = JsonLines(out, lambda record: record["custom_id"], _is_answer)
    threads = ThreadPoolExecutor(min(capacity.queue, capacity.per_client, 32), "vr-batch")
    try:
      with answers:
        for line, (status, body) in zip(
          remaining, threads.map(lambda line: _answer(engine, line), remaining), strict=True
        ):
          counts[status == 200] += 1
          answers.add(_record(line, status, body, checkpoint))
    finally:
      threads.shutdown(cancel_futures=True)
      engine.close()
  return Summary(counts[True], counts[False], len(before))


def read_lines(path: Path) -> dict[str, Line]:
  """The requests of a file by their ids.

  Raises:
    InputError: a line is none, or two have one id.
  """
  if not path.is_file():
    raise InputError(f"{path}: no such file")
  content = path.read_bytes()
  lines: dict[str, Line] = {}
  for number, text in enumerate(content.split(b"\n"), 1):
    if not text.strip():
      continue
    where = f"{path}: line {number}"
    try:
      record = json.loads(text)
    except (ValueError, RecursionError) as error:
      raise InputError(f"{where}: cannot be read as JSON ({error})") from None
    try:
      node = Node(record, "").fields(FIELDS)
      custom_id = node["custom_id"].text(512, empty=False)
      if node["url"].value != URL:
        raise node["url"].error(URL)
      if node["method"].value not in (None, "POST"):
        raise node["method"].error("POST")
      if not isinstance(node["body"].value, dict):
        raise node["body"].error("an object")
    except ApiError as error:
      raise InputError(f"{where}: {error}") from None
    if custom_id in lines:
      raise InputError(f"{where}: custom_id {shown(custom_id)} was given to an earlier line")
    lines[custom_id] = Line(custom_id, node["body"].value)
  return lines


def _is_answer(record: Mapping[str, Any]) -> bool:
  return record["response"]["status_code"] == 200


def _check_answers(out: Path, lines: Mapping[str, Line], checkpoint: str | None) -> set[str]:
  """Ids that `out` answers; InputError where it holds anything but answers to these requests."""
  answered: set[str] = set()
  for number, record in enumerate(read_json_lines(out), 1):
    where = f"{out}: line {number}"
    try:
      custom_id, held = record["custom_id"], record["vr"]
      if not _is_answer(record):
        continue
      request, weights = held["request"], held["checkpoint"]
    except (KeyError, TypeError):
      raise InputError(f"{where}: not a line that vr batch wrote; give another --out") from None
    if custom_id not in lines or request != lines[custom_id].sha256:
      raise InputError(
        f"{where}: custom_id {shown(custom_id)} answers another request; give another --out"
      )
    if weights != checkpoint:
      raise InputError(f"{where}: answered by other weights; give another --out")
    answered.add(custom_id)
  return answered


def _answer(engine: Engine, line: Line) -> tuple[int, Mapping[str, Any]]:
  """Status and body of the response, as the server gives them."""
  medium = None
  try:
    chat = read_chat(Node(line.body, ""))
    if chat.stream:
      raise Node(True, "stream").refusal("is not for batches", code="unsupported_parameter")
    ticket, medium = engine.ask(chat, Caller(), None)
    return 200, engine.completion().whole(ticket.result())
  except ApiError as error:
    return error.status, error.to_dict()
  except InputError as error:
    refused = refusal(error, medium)
    return refused.status, refused.to_dict()


def _record(
  line: Line, status: int, body: Mapping[str, Any], checkpoint: str | None
) -> dict[str, Any]:
  return {
    "id": f"batch_req_{secrets.token_hex(16)}",
    "custom_id": line.custom_id,
    "response": {"status_code": status, "request_id": "", "body": body},
    "error": None,
    "vr": {"request": line.sha256, "checkpoint": checkpoint},
  }
