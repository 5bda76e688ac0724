"""The agents played by chat endpoints: prompts, schemas, and what an answer must be beside JSON."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipes.drawing import FOR_MODELS, data_uri, outline, shrunk
from data_pipes.engine.backends.chat import ChatClient, Endpoint
from data_pipes.engine.calls import Price
from data_pipes.engine.graph import digest
from data_pipes.engine.prompts import as_data, prompt_hash, render
from data_pipes.engine.quality import text as quality
from data_pipes.engine.roles import (
  QUESTION_TYPES,
  Caption,
  Claim,
  Clip,
  Context,
  Described,
  Description,
  Masks,
  Nouns,
  Question,
  Verdict,
)
from data_pipes.frame_rules import uniform_frames

_TEXT = {"type": "string", "minLength": 1}
_WORDS = {"type": "array", "items": {"type": "string", "maxLength": 60}, "maxItems": 20}


def _object(**properties: Any) -> dict[str, Any]:
  return {
    "type": "object",
    "properties": properties,
    "required": list(properties),
    "additionalProperties": False,
  }


class _ChatAgent:
  """What all of them share: an endpoint and the frames they show.

  Args:
    base_url, model, api_key_env, timeout, concurrency, requests_per_minute, tokens_per_minute,
      retries, asks, max_tokens, extra: of chat.Endpoint.
    usd_per_million: (input, output) price.
    schema: send the JSON schema; False for endpoints that refuse `response_format`.
    frames: how many are shown. size: their longer side in pixels.
  """

  prompts: tuple[str, ...] = ()
  schemas: Mapping[str, Any] = {}

  def __init__(
    self,
    context: Context,
    base_url: str,
    model: str,
    api_key_env: str = "",
    timeout: float = 60.0,
    concurrency: int = 16,
    requests_per_minute: float = 0.0,
    tokens_per_minute: float = 0.0,
    retries: int = 5,
    asks: int = 3,
    max_tokens: int = 1024,
    usd_per_million: Sequence[float] = (0.0, 0.0),
    schema: bool = True,
    extra: Mapping[str, Any] | None = None,
    frames: int = 8,
    size: int = 512,
  ):
    self.frames, self.size, self.language = frames, size, context.language
    endpoint = Endpoint(
      base_url,
      model,
      api_key_env,
      timeout,
      concurrency,
      requests_per_minute,
      tokens_per_minute,
      retries,
      asks,
      Price(*usd_per_million),
      max_tokens,
      schema,
      dict(extra or {}),
    )
    self.client = ChatClient(endpoint, context.calls, context.stage)

  @classmethod
  def identity(cls, options: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Model, prompts, schemas and what is shown; not where the model runs nor how fast."""
    decides = ("extra", "frames", "size", "max_tokens", "schema", "asks")
    return {
      "backend": f"openai {options['model']}",
      "prompts": {name: prompt_hash(name) for name in cls.prompts},
      "schemas": digest(dict(cls.schemas)),
      "options": {key: options[key] for key in decides if key in options},
    }

  def _ask(self, prompt: str, images: Sequence[str] = (), check=lambda value: None, **values):
    """Asks with a prompt file; its schema has the same name."""
    name = prompt.partition("/")[2].partition("@")[0]
    content: list[dict[str, Any]] = [{"type": "text", "text": render(prompt, **values)}]
    content += [{"type": "image_url", "image_url": {"url": url}} for url in images]
    messages = [{"role": "user", "content": content if images else content[0]["text"]}]
    return self.client.ask(messages, self.schemas[name], name, check)

  def _pictures(self, clip: Clip, masks: Masks | None = None) -> list[str]:
    """Frames over the clip, the object outlined where it is known."""
    numbers = sorted(set(uniform_frames(clip.frames, self.frames).tolist()))
    if masks:
      seen = [n for n in sorted(masks) if masks[n].any()]
      places = np.linspace(0, len(seen) - 1, min(self.frames, len(seen))).round().astype(int)
      numbers = [seen[i] for i in places]
    frames = clip.open().frames(numbers)
    return [
      data_uri(outline(f, masks[n], self.size) if masks else shrunk(f, self.size), FOR_MODELS)
      for n, f in zip(numbers, frames, strict=True)
    ]

  def _text_fault(self, text: str, least: int = quality.MIN_WORDS) -> str | None:
    return quality.fault(text, self.language, least)


class ChatAnalyzer(_ChatAgent):
  prompts = ("analyzer/nouns@v1",)
  schemas = {"nouns": _object(subjects=_WORDS, others=_WORDS)}  # noqa: RUF012

  def nouns(self, clip: Clip) -> Nouns:
    caption = as_data(clip.caption) if clip.caption else ""
    words = set(re.findall(r"\w+", clip.caption.lower()))

    def invented(value: Any) -> str | None:
      """A subject of a caption has its words; so no command in the caption can add others."""
      for subject in value["subjects"] if caption else ():
        head = re.findall(r"\w+", subject.lower())[-1:]
        if not head or not (head[0] in words or head[0] + "s" in words):
          return f"subject {subject!r} is not in the caption"
      return None

    images = [] if caption else self._pictures(clip)
    value = self._ask(self.prompts[0], images, invented, caption=caption)
    return Nouns(tuple(value["subjects"]), tuple(value["others"]))


class ChatAnnotator(_ChatAgent):
  prompts = ("annotator/motion@v1", "annotator/appearance@v1")
  schemas = {  # noqa: RUF012
    "motion": _object(text=_TEXT, static={"type": "boolean"}),
    "appearance": _object(text=_TEXT),
  }

  def describe(self, clip: Clip, noun: str, masks: Masks | None) -> Description:
    pictures = self._pictures(clip, masks)

    def fault(value: Any) -> str | None:
      return self._text_fault(value["text"])

    motion, looks = (
      self._ask(prompt, pictures, fault, noun=noun, outlined=bool(masks)) for prompt in self.prompts
    )
    return Description(motion["text"], looks["text"], motion["static"])


class ChatDescriber(_ChatAgent):
  prompts = ("describer/region@v1",)
  schemas = {"region": _object(text=_TEXT)}  # noqa: RUF012

  def region(self, clip: Clip, masks: Masks, frame: int) -> str:
    picture = outline(clip.open().frames([frame])[0], masks[frame], self.size)
    return self._ask(
      self.prompts[0],
      [data_uri(picture, FOR_MODELS)],
      lambda value: self._text_fault(value["text"]),
    )["text"]


class ChatJudge(_ChatAgent):
  prompts = ("judge/same_object@v1",)
  schemas = {  # noqa: RUF012
    "same_object": _object(
      same_object={"type": "boolean"},
      reason=_TEXT,
      confidence={"type": "number", "minimum": 0, "maximum": 1},
    )
  }

  def compare(self, claim: Claim) -> Verdict:
    value = self._ask(
      self.prompts[0],
      noun=claim.noun,
      annotated=as_data(claim.annotated),
      region=as_data(claim.region),
    )
    return Verdict(value["same_object"], value["reason"], value["confidence"])


class ChatRefiner(_ChatAgent):
  prompts = ("refiner/caption@v1", "refiner/questions@v1")
  schemas = {  # noqa: RUF012
    "caption": _object(detailed=_TEXT, short=_TEXT),
    "questions": _object(
      questions={
        "type": "array",
        "minItems": 1,
        "maxItems": 12,
        "items": _object(
          question=_TEXT,
          answer=_TEXT,
          type={"enum": list(QUESTION_TYPES)},
          objects={"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
        ),
      }
    ),
  }

  def caption(self, clip: Clip, described: Described) -> Caption:
    description = described.description

    def fault(value: Any) -> str | None:
      return self._text_fault(value["detailed"]) or self._text_fault(value["short"], 2)

    value = self._ask(
      self.prompts[0],
      check=fault,
      noun=described.noun,
      appearance=as_data(description.appearance),
      motion=as_data(description.motion),
    )
    return Caption(value["detailed"], value["short"])

  def questions(self, clip: Clip, objects: Sequence[Described]) -> list[Question]:
    listed = "\n".join(
      f"Object {i}:\n{as_data(f'{o.noun}: {o.description.text}')}" for i, o in enumerate(objects)
    )

    def fault(value: Any) -> str | None:
      for q in value["questions"]:
        if max(q["objects"]) >= len(objects):
          return f"question about object {max(q['objects'])}; there are {len(objects)}"
        missing = [i for i in q["objects"] if f"{{{i}}}" not in q["question"]]
        if missing:
          return f"question {q['question']!r} does not mention {{{missing[0]}}}"
      return None

    rounds = max(3, min(8, 2 * len(objects)))
    value = self._ask(self.prompts[1], check=fault, objects=listed, rounds=rounds)
    return [
      Question(q["question"], q["answer"], q["type"], tuple(q["objects"]))
      for q in value["questions"]
    ]
