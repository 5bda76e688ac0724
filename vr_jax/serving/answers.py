"""Answers in OpenAI's shape: a completion, or the chunks of a stream."""

import json
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

from vr_jax.inference.requests import Answer

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"


class Completion:
  """The response to one request, whole or in chunks."""

  def __init__(self, model: str, checkpoint: str | None, token_text: Callable[[int], str]):
    """`token_text` gives the text of a token id."""
    self.id = f"chatcmpl-{secrets.token_hex(16)}"
    self._model, self._checkpoint, self._token_text = model, checkpoint, token_text
    self._created = int(time.time())

  def whole(self, answer: Answer) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer.text, "refusal": None}
    return {
      **self._head("chat.completion"),
      "choices": [
        {
          "index": 0,
          "message": message,
          "finish_reason": answer.reason,
          "logprobs": self._logprobs(answer),
        }
      ],
      "usage": usage(answer),
      "vr": self._extension(answer),
    }

  def first(self, with_usage: bool) -> bytes:
    return self._chunk({"role": "assistant", "content": ""}, with_usage)

  def piece(self, text: str, with_usage: bool) -> bytes:
    return self._chunk({"content": text}, with_usage)

  def last(self, answer: Answer, with_usage: bool) -> list[bytes]:
    """The chunk with the reason, the one with the usage if it is asked for, and the end."""
    more = {"vr": self._extension(answer)}
    chunks = [self._chunk({"content": ""}, with_usage, answer.reason, self._logprobs(answer), more)]
    if with_usage:
      head = self._head("chat.completion.chunk")
      chunks.append(event({**head, "choices": [], "usage": usage(answer)}))
    return [*chunks, DONE]

  def _chunk(
    self,
    delta: dict[str, str],
    with_usage: bool,
    reason: str | None = None,
    logprobs: Any = None,
    more: dict[str, Any] | None = None,
  ) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": logprobs}
    nothing = {"usage": None} if with_usage else {}
    return event(
      {**self._head("chat.completion.chunk"), "choices": [choice], **nothing, **(more or {})}
    )

  def _head(self, kind: str) -> dict[str, Any]:
    return {"id": self.id, "object": kind, "created": self._created, "model": self._model}

  def _extension(self, answer: Answer) -> dict[str, Any]:
    """What OpenAI's object has no place for."""
    timings = answer.timings
    return {
      "objects": [dict(entry) for entry in answer.objects],
      "scene_frames": list(answer.scene_frames),
      "warnings": list(answer.warnings),
      "timings": {}
      if timings is None
      else {
        "queue_ms": _ms(timings.queue),
        "media_ms": _ms(timings.media),
        "encode_ms": _ms(timings.encode),
        "first_token_ms": _ms(timings.first_token),
        "total_ms": _ms(timings.total),
      },
      "checkpoint": self._checkpoint,
    }

  def _logprobs(self, answer: Answer) -> dict[str, Any] | None:
    if answer.logprobs is None:
      return None
    content = [
      {
        **self._token(score.token_id, score.logprob),
        "top_logprobs": [self._token(token, logprob) for token, logprob in score.top],
      }
      for score in answer.logprobs
    ]
    return {"content": content, "refusal": None}

  def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
    text = self._token_text(token_id)
    # A part of a character has no text of its own, and its bytes are not known here.
    parts: Sequence[int] | None = None if "\ufffd" in text else list(text.encode())
    return {"token": text, "logprob": logprob, "bytes": parts}


def usage(answer: Answer) -> dict[str, Any]:
  counts = answer.usage
  prompt, cached = (0, 0) if counts is None else (counts.prompt, counts.cached)
  completion = len(answer.token_ids) if counts is None else counts.completion
  return {
    "prompt_tokens": prompt,
    "completion_tokens": completion,
    "total_tokens": prompt + completion,
    "prompt_tokens_details": {"cached_tokens": cached},
  }


def event(record: dict[str, Any]) -> bytes:
  """A record as one event of a stream."""
  return b"data: " + json.dumps(record, ensure_ascii=False).encode() + b"\n\n"


def _ms(seconds: float) -> float:
  return round(1000 * seconds, 2)
