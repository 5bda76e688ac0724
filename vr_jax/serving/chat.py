"""A chat request in OpenAI's shape as what the client asks for; pure functions, no I/O.

Objects come in one of four ways a message (docs/serving.md): as content parts of type `region`, in
the body's field `regions`, as SPECs in the text, or as pictures whose transparency marks them.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from data_pipes.masks import GRID_RULES
from data_pipes.tokenizer import REGION
from vr_jax.inference.options import ALTERNATIVES, STOPS, WHOLE
from vr_jax.serving.body import Node

# Fields that change the answer, and those that are accepted and have no effect.
EFFECTIVE = (
  *("model", "messages", "regions", "max_tokens", "max_completion_tokens", "temperature", "top_p"),
  *("top_k", "repetition_penalty", "seed", "stop", "stream", "stream_options", "logprobs"),
  *("top_logprobs", "vr", "mm_processor_kwargs"),
)
IGNORED = ("user", "metadata", "store", "service_tier")
# What this server does not do, and the values that ask for none of it.
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
  "n": (1,),
  "tools": ([],),
  "tool_choice": ("none", "auto"),
  "parallel_tool_calls": (True, False),
  "functions": ([],),
  "function_call": ("none", "auto"),
  "response_format": ({"type": "text"},),
  "audio": (),
  "modalities": (["text"],),
  "presence_penalty": (0,),
  "frequency_penalty": (0,),
  "logit_bias": ({},),
  "prediction": (),
  "reasoning_effort": (),
  "verbosity": (),
  "web_search_options": (),
}
VR = ("scene_frames", "mask_rule", "propagate")
MEDIA_PARTS = ("video_url", "image_url", "input_video", "file")
PARTS = ("text", "region", *MEDIA_PARTS)
SHAPES = ("box", "point", "points", "polygon", "rle", "masks", "mask", "object")
MESSAGES, PIECES, OBJECTS = 256, 256, 64  # the most of a conversation, a message, a message
FRAMES = 32  # the most pictures that are the frames of one clip
NAME = 64  # characters
CLOSE, OPEN = (*" \n.,;:?!)]", ""), (*" \n([", "")  # beside which a `<region>` needs no space
HOTTEST = 2.0  # temperature
# `<region>`, `<region cat>`, `<region box:1,2,3,4@12>`, `<region cat=point:9,9@1.5s>`
MENTION = re.compile(r"<region(?:\s+([^<>]{1,200}))?>")
SPEC = re.compile(r"(?:([\w.-]+)=)?(box|point):([^@]+)(?:@(.+))?")


@dataclass(frozen=True)
class Mark:
  """One region as the client wrote it.

  Attributes:
    node: an object with one of SHAPES, and frame, name, coordinates.
    name: of its object; None where it is an object of its own.
  """

  node: Node
  name: str | None


# An object within a message: its name, or the place among `marks` of the one region that it has.
Key = str | int


@dataclass(frozen=True)
class Message:
  """A message of the conversation.

  Attributes:
    text: with `<region>` for each of `mentions`, in their order.
    mentions: the object of each; None where it is in the message's pictures, or nowhere.
    marks: the message's regions, whichever way they came.
  """

  role: str
  text: str
  node: Node
  mentions: tuple[Key | None, ...] = ()
  marks: tuple[Mark, ...] = ()


@dataclass(frozen=True)
class Media:
  """The video or image of a conversation: where it is, as the client wrote it.

  Attributes:
    nodes: of the addresses; several are pictures that are the frames of one clip.
    message: place of the message that holds it.
    fps: frames a second of a folder of frames.
  """

  nodes: tuple[Node, ...]
  message: int
  fps: float | None = None


@dataclass(frozen=True)
class Chat:
  """What a chat request asks for; the objects are not drawn yet (objects.py).

  Attributes:
    options: of `Options`, those that the body gives.
    given: where the body gives each of them.
  """

  model: str
  system: str
  messages: tuple[Message, ...]
  media: Media | None
  options: Mapping[str, Any]
  given: Mapping[str, Node]
  stream: bool = False
  include_usage: bool = False


def read_chat(body: Node) -> Chat:
  """The request in a body.

  Raises:
    ApiError: 400 with the path of what is wrong.
  """
  body.fields([*EFFECTIVE, *IGNORED, *UNSUPPORTED])
  for name, neutral in UNSUPPORTED.items():
    if name in body and body.value[name] not in neutral:
      accepted = " or ".join(map(repr, neutral)) or "none"
      raise body[name].refusal(
        f"is not supported; accepted: {accepted}", code="unsupported_parameter"
      )
  if "model" not in body:
    raise body["model"].error("the name of a model, see GET /v1/models")
  if "messages" not in body:
    raise body["messages"].error("a list of messages")
  nodes = list(body["messages"].items(1, MESSAGES))
  system, nodes = _system(nodes)
  media: list[Media] = []
  messages = [_message(node, place, media) for place, node in enumerate(nodes)]
  _check_turns(messages, body["messages"])
  if "regions" in body:
    messages[-1] = _with_regions(messages[-1], body["regions"])
  pictured = media[0].message if media else None
  messages = list(_matched(messages, pictured))
  options, given = _options(body)
  stream = "stream" in body and body["stream"].flag()
  return Chat(
    body["model"].text(256),
    system,
    tuple(messages),
    _one_media(media),
    options,
    given,
    stream,
    _include_usage(body, stream),
  )


# --- Messages


def _system(nodes: list[Node]) -> tuple[str, list[Node]]:
  """The text of the system's message, which may stand first, and the other messages."""
  first = nodes[0].fields(("role", "content", "name"))
  if first["role"].value not in ("system", "developer"):
    return "", nodes
  if len(nodes) == 1:
    raise first.error("a message of the user behind that of the system")
  return _only_text(first), nodes[1:]


def _only_text(message: Node) -> str:
  content = message["content"]
  if isinstance(content.value, list):
    parts = [part.fields(("type", "text")) for part in content.items(1, PIECES)]
    for part in parts:
      part["type"].choice(("text",))
    return "\n".join(part["text"].text() for part in parts)
  return content.text()


def _message(node: Node, place: int, media: list[Media]) -> Message:
  node.fields(("role", "content", "name", "refusal"))
  role = node["role"].choice(("user", "assistant"))
  if role == "assistant":
    return Message(role, _only_text(node), node)
  content = node["content"]
  if isinstance(content.value, str):
    return _with_mentions(node, [content.text(empty=False)], [])
  pieces: list[str | Mark] = []
  addresses: list[Node] = []
  rates: list[float] = []
  for part in content.items(1, PIECES):
    if not isinstance(part.value, dict):
      raise part.error("an object with type")
    kind = part["type"].choice(PARTS)
    inner = part.fields(("type", kind))[kind]
    if kind == "text":
      pieces.append(inner.text())
    elif kind == "region":
      pieces.append(_mark(inner))
    else:
      addresses.append(_address(inner, kind, rates))
  if addresses:
    if media:
      raise addresses[0].refusal(
        "a second video or image; accepted: one in a conversation", code="unsupported_parameter"
      )
    media.append(Media(tuple(addresses), place, rates[0] if rates else None))
  texts = [piece for piece in pieces if isinstance(piece, str)]
  return _with_mentions(node, texts, pieces)


def _address(part: Node, kind: str, rates: list[float]) -> Node:
  """The node that holds the address of the medium in a content part."""
  if isinstance(part.value, str):
    return part
  part.fields(("file_id",) if kind == "file" else ("url", "file_id", "fps", "detail"))
  if "fps" in part:
    rates.append(part["fps"].number(1e-3, 1e4))
  if ("file_id" in part) == ("url" in part):
    raise part.error("one of url and file_id" if kind != "file" else "file_id")
  return part["file_id" if "file_id" in part else "url"]


def _with_mentions(node: Node, texts: list[str], pieces: list[str | Mark]) -> Message:
  """A user's message with its text put together, and what its `<region>`s name."""
  marks = tuple(piece for piece in pieces if isinstance(piece, Mark))
  text = "\n".join(texts)
  if marks and not MENTION.search(text):
    return Message("user", _placed(pieces), node, tuple(dict.fromkeys(keys(marks))), marks)
  mentions: list[Key | None] = []
  specs: list[Mark] = []

  def note(match: re.Match) -> str:
    mention = _mention(match[1], node)
    if isinstance(mention, Mark):
      specs.append(mention)
      mentions.append(len(specs) - 1 if mention.name is None else mention.name)
    else:
      mentions.append(mention)
    return REGION

  text = MENTION.sub(note, text)
  if len(mentions) > OBJECTS:
    raise node["content"].refusal(f"{len(mentions)} {REGION}; accepted: up to {OBJECTS}")
  if specs and marks:
    raise marks[0].node.refusal(
      "regions both in the text and as content parts; accepted: one way a message"
    )
  return Message("user", text, node, tuple(mentions), marks or tuple(specs))


def keys(marks: Sequence[Mark]) -> list[Key]:
  """The object of each region: regions with one name are one object."""
  return [i if mark.name is None else mark.name for i, mark in enumerate(marks)]


def _matched(messages: list[Message], pictured: int | None) -> Iterator[Message]:
  """Messages whose every `<region>` has its object.

  A `<region NAME>` takes the object of that name, of this message or an earlier one; the i-th of
  the others takes the i-th object that none names.
  """
  known: list[Key] = []  # of the messages so far
  for place, message in enumerate(messages):
    objects = list(dict.fromkeys(keys(message.marks)))
    known += [key for key in objects if isinstance(key, str)]
    for name in message.mentions:
      if isinstance(name, str) and name not in known:
        accepted = ", ".join(map(str, known)) or "a name that a region was given before"
        raise message.node["content"].refusal(
          f"<region {name}>: no such object; accepted: {accepted}"
        )
    rest = [key for key in objects if key not in message.mentions]
    bare = message.mentions.count(None)
    if bare != len(rest) and (message.marks or place != pictured):
      raise message.node["content"].refusal(
        f"found {len(message.mentions)} {REGION} but {len(message.mentions) - bare + len(rest)} "
        f"objects; accepted: one {REGION} for each object"
      )
    if message.marks:
      remaining = iter(rest)
      mentions = tuple(next(remaining) if key is None else key for key in message.mentions)
      message = replace(message, mentions=mentions)
    yield message


def _placed(pieces: list[str | Mark]) -> str:
  """The text with `<region>` at the place of each region part; of an object, at its first."""
  text, names = "", set()
  previous: str | Mark = ""
  for piece in pieces:
    if isinstance(piece, str):
      gap = "\n" if isinstance(previous, str) else "" if piece[:1] in CLOSE else " "
    elif piece.name is not None and piece.name in names:
      continue
    else:
      names.add(piece.name)
      gap = "" if text[-1:] in OPEN else " "
    text += (gap if text else "") + (piece if isinstance(piece, str) else REGION)
    previous = piece
  return text


def _mention(inner: str | None, node: Node) -> str | Mark | None:
  """What stands in a `<region …>`: a name, a region, or nothing."""
  if inner is None:
    return None
  inner = inner.strip()
  spec = SPEC.fullmatch(inner)
  if spec is None:
    if ":" in inner or "=" in inner or "@" in inner:
      raise node["content"].refusal(
        f"<region {inner}>; accepted: <region>, <region NAME>, <region box:x1,y1,x2,y2@FRAME> or "
        "<region NAME=point:x,y@FRAME>"
      )
    return inner
  name, shape, numbers, frame = spec.groups()
  fields: dict[str, Any] = {shape: [_spec_number(n) for n in numbers.split(",")]}
  if frame is not None:
    fields["frame"] = int(frame) if frame.isdecimal() and len(frame) < 10 else frame
  return Mark(Node(fields, node["content"].path), name)


def _spec_number(text: str) -> Any:
  """A number of a SPEC; shares such as 30% stay text, and so does what is no number."""
  try:
    return float(text)
  except ValueError:
    return text.strip()


def _mark(node: Node) -> Mark:
  node.fields((*SHAPES, "frame", "name", "coordinates"))
  shapes = [shape for shape in SHAPES if shape in node]
  if len(shapes) != 1:
    listed = ", ".join(shapes) or "none"
    raise node.refusal(f"{listed}; accepted: exactly one of {', '.join(SHAPES)}")
  if "coordinates" in node:
    node["coordinates"].choice(("pixel", "relative"))
  return Mark(node, node["name"].text(NAME, empty=False) if "name" in node else None)


def _with_regions(message: Message, node: Node) -> Message:
  """The last message with the body's field `regions`."""
  marks = tuple(_mark(entry) for entry in node.items(1, 4096))
  if message.marks:
    raise node.refusal("the last message has regions already; accepted: one way a message")
  return Message(message.role, message.text, message.node, message.mentions, marks)


def _check_turns(messages: list[Message], node: Node) -> None:
  roles = [message.role for message in messages]
  if len(roles) % 2 == 0 or roles != [("user", "assistant")[i % 2] for i in range(len(roles))]:
    raise node.refusal(
      f"roles {', '.join(roles)[:80]}; accepted: user and assistant by turns, the last of the user"
    )


def _one_media(media: list[Media]) -> Media | None:
  if not media:
    return None
  (one,) = media
  if len(one.nodes) > FRAMES:
    raise one.nodes[FRAMES].refusal(f"{len(one.nodes)} pictures; accepted: up to {FRAMES}")
  return one


# --- How to answer


def _options(body: Node) -> tuple[dict[str, Any], dict[str, Node]]:
  """The options that the body gives, and where."""
  nodes = dict(_option_nodes(body))
  options: dict[str, Any] = {}
  if "max_new_tokens" in nodes:
    options["max_new_tokens"] = nodes["max_new_tokens"].whole(*WHOLE["max_new_tokens"])
  if "temperature" in nodes:
    options["temperature"] = nodes["temperature"].number(0, HOTTEST)
  if "top_p" in nodes:
    options["top_p"] = nodes["top_p"].number(1e-9, 1)
  for name in ("top_k", "seed", "scene_frames"):
    if name in nodes:
      options[name] = nodes[name].whole(*WHOLE[name])
  if "repetition_penalty" in nodes:
    options["repetition_penalty"] = nodes["repetition_penalty"].number(1e-3, 1e3)
  if "mask_rule" in nodes:
    options["mask_rule"] = nodes["mask_rule"].choice(GRID_RULES)
  if "stop" in body:
    nodes["stop"] = body["stop"]
    options["stop"] = tuple(_stop(body["stop"]))
  if "logprobs" in body and body["logprobs"].flag():
    nodes["logprobs"] = body["logprobs"]
    options["logprobs"] = (
      body["top_logprobs"].whole(0, ALTERNATIVES) if "top_logprobs" in body else 0
    )
  elif "top_logprobs" in body:
    raise body["top_logprobs"].refusal("goes with logprobs: true")
  return options, nodes


def _option_nodes(body: Node) -> Iterator[tuple[str, Node]]:
  limits = [name for name in ("max_tokens", "max_completion_tokens") if name in body]
  if len(limits) == 2 and body.value[limits[0]] != body.value[limits[1]]:
    raise body[limits[1]].refusal("max_tokens has another value; accepted: one of them")
  if limits:
    yield "max_new_tokens", body[limits[-1]]
  for name in ("temperature", "top_p", "top_k", "repetition_penalty", "seed"):
    if name in body:
      yield name, body[name]
  if "mm_processor_kwargs" in body:
    inner = body["mm_processor_kwargs"].fields(("num_frames", "fps"))
    if "fps" in inner:
      raise inner["fps"].refusal(
        "a scene has a fixed number of frames; accepted: num_frames",
        code="unsupported_parameter",
      )
    if "num_frames" in inner:
      yield "scene_frames", inner["num_frames"]
  if "vr" in body:
    inner = body["vr"].fields(VR)
    if "propagate" in inner:
      raise inner["propagate"].refusal("is not supported", code="unsupported_parameter")
    for name in ("scene_frames", "mask_rule"):
      if name in inner:
        yield name, inner[name]


def _stop(node: Node) -> Iterator[str]:
  entries = [node] if isinstance(node.value, str) else node.items(0, STOPS)
  for entry in entries:
    yield entry.text(1000, empty=False)


def _include_usage(body: Node, stream: bool) -> bool:
  if "stream_options" not in body:
    return False
  options = body["stream_options"].fields(("include_usage", "include_obfuscation"))
  if not stream:
    raise options.refusal("goes with stream: true")
  return "include_usage" in options and options["include_usage"].flag()
