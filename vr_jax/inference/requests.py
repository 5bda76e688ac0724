"""Requests to a model, and its answers."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipes.errors import InputError, reading, shown
from data_pipes.json_items import check_text
from data_pipes.video import check_fps
from vr_jax.inference.regions import Region

LONGEST = 1e9  # seconds, of a time in a video


@dataclasses.dataclass(frozen=True)
class Turn:
  """An earlier question of a conversation, and the answer to it.

  Regions go with the question as those of a Request do.
  """

  question: str
  answer: str
  regions: Sequence[Region] = ()

  def __post_init__(self):
    _check_question(self.question, "an earlier question")
    _check_question(self.answer, "an earlier answer")
    _check_list("regions", self.regions, Region, "a list of Region")


@dataclasses.dataclass(frozen=True)
class Request:
  """One question about one video; the first three fields are those of `Model.ask`.

  Attributes:
    video: None where the question is about no video.
    annotation: takes the place of `regions` where the objects are annotated as in the published
      files: {frame number: COCO segmentation or None} of each object, in merge order. There an
      object may be empty.
    seconds: start and end of the part of the video that the scene frames are taken from; None is
      the whole video. Frame numbers count in the whole video all the same.
    preface: gives the text in front of the question that depends on the media, such as subtitles;
      called when the video is read.
    fps: frames a second of a folder of frames, for the times of regions.
    starts: for models that join an object's cells by k-means, the cells that it starts from, of
      each crop in the order of their tokens; [] for one of no more cells than tokens. By default
      they are evenly spaced. (The published code draws them at random.)

  Raises:
    InputError: a field that is not of its kind. What regions and annotation hold is looked at when
      the video is.
  """

  video: Any
  question: str
  regions: Sequence[Region] = ()
  annotation: Sequence[Mapping[int, Any]] = ()
  seconds: tuple[float, float] | None = None
  preface: Callable[[], str] | None = None
  fps: float | None = None
  starts: Sequence[Sequence[int]] = ()
  turns: Sequence[Turn] = ()
  system: str = ""

  def __post_init__(self):
    _check_question(self.question, "question")
    _check_question(self.system, "system")
    _check_list("regions", self.regions, Region, "a list of Region")
    _check_list("annotation", self.annotation, Mapping, "a list of {frame number: segmentation}")
    _check_list("turns", self.turns, Turn, "a list of Turn")
    for number in (number for by_frame in self.annotation for number in by_frame):
      if not isinstance(number, int | np.integer):
        raise InputError(f"annotation: frame {shown(number)}; accepted: a frame number")
    if self.fps is not None:
      object.__setattr__(self, "fps", check_fps(self.fps))
    self._check_starts()
    if self.seconds is None:
      return
    failure, accepted = f"seconds={shown(self.seconds)}", "two numbers, start and end"
    with reading(failure, accepted):
      start, end = map(float, self.seconds)
    if isinstance(self.seconds, str) or not abs(start) + abs(end) < LONGEST:
      raise InputError(f"{failure}; accepted: {accepted}")
    object.__setattr__(self, "seconds", (start, end))

  def _check_starts(self) -> None:
    """Lists of whole numbers; how many and how large is known when the crops are."""

    def is_list(value: Any) -> bool:
      return isinstance(value, Sequence | np.ndarray) and not isinstance(value, str | bytes)

    for start in self.starts if is_list(self.starts) else [self.starts]:
      cells = start if is_list(start) else [None]
      if not all(isinstance(c, int | np.integer) and not isinstance(c, bool) for c in cells):
        raise InputError(
          f"starts {shown(self.starts)}; accepted: for each crop a list of numbers of cells"
        )


def _check_question(text: Any, name: str) -> None:
  if not isinstance(text, str):
    raise InputError(f"{name} {shown(text)}; accepted: text")
  check_text([text], name)


def _check_list(name: str, entries: Any, kind: type, accepted: str) -> None:
  if not isinstance(entries, Sequence) or not all(isinstance(e, kind) for e in entries):
    raise InputError(f"{name} {shown(entries)}; accepted: {accepted}")


def conversation(
  messages: Sequence[Mapping[str, Any]], regions: Sequence[Region] = ()
) -> dict[str, Any]:
  """Messages as the fields `question`, `regions`, `turns` and `system` of a Request.

  Args:
    messages: {"role", "content"}, user and assistant by turns, the last of the user; before them
      one of the system may stand. A user's may hold "regions", a list of Region.
    regions: of the last question, behind those that its message holds.

  Raises:
    InputError: other roles, another order, or a message of another form.
  """
  accepted = "{role, content}, with regions where role is user"
  for message in messages:
    if not isinstance(message, Mapping) or not set(message) <= {"role", "content", "regions"}:
      raise InputError(f"message {shown(message)}; accepted: {accepted}")
    if not isinstance(message.get("content"), str):
      raise InputError(f"message {shown(message)}; accepted: content that is text")
  system = ""
  if messages and messages[0].get("role") == "system":
    system, messages = messages[0]["content"], messages[1:]
  roles = [message.get("role") for message in messages]
  if len(roles) % 2 == 0 or roles != [("user", "assistant")[i % 2] for i in range(len(roles))]:
    listed = ", ".join(map(str, roles)) or "nothing"
    raise InputError(f"messages of {listed[:80]}; accepted: user, assistant, …, user")
  turns = [
    Turn(user["content"], assistant["content"], user.get("regions") or ())
    for user, assistant in zip(messages[:-1:2], messages[1::2], strict=True)
  ]
  last = messages[-1]
  return {
    "question": last["content"],
    "regions": [*(last.get("regions") or ()), *regions],
    "turns": turns,
    "system": system,
  }


@dataclasses.dataclass(frozen=True)
class Usage:
  """Tokens of an answer: of its prompt, of them those that were computed before, and new ones.

  A prompt counts text, scene tokens and object tokens.
  """

  prompt: int
  cached: int
  completion: int


@dataclasses.dataclass(frozen=True)
class Timings:
  """Seconds: waiting to be read, reading the media, encoding them and the scene's prefix; and from
  the request to the first token, and to the end."""

  queue: float
  media: float
  encode: float
  first_token: float
  total: float


@dataclasses.dataclass(frozen=True)
class TokenScore:
  """Log-probability of a token, in nats, and the likeliest tokens in its place with theirs.

  They are those of the model, before temperature, penalty and windows.
  """

  token_id: int
  logprob: float
  top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Answer:
  """The text that the model gave, and what it rests on.

  Attributes:
    text: the answer, which `str(answer)` gives too.
    token_ids: the generated tokens, the end token included.
    scene_frames: frame numbers of the scene in the source video (negative: black filling).
    objects: per object its name and, for each of its tokens, the frames that the token stands for.
    warnings: one line each, such as an object too small for the model's grid.
    reason: why it ended: "stop" (an end token or a stop text) or "length" (the most tokens, or the
      deadline).
    logprobs: of each token, where they were asked for.
    usage, timings: tokens and seconds; they depend on what else was asked, and equality of answers
      does not look at them.
  """

  text: str
  token_ids: tuple[int, ...]
  scene_frames: tuple[int, ...]
  objects: tuple[Mapping[str, Any], ...]
  warnings: tuple[str, ...]
  reason: str = "stop"
  logprobs: tuple[TokenScore, ...] | None = None
  usage: Usage | None = dataclasses.field(default=None, compare=False)
  timings: Timings | None = dataclasses.field(default=None, compare=False)

  def __str__(self) -> str:
    return self.text

  def to_dict(self) -> dict[str, Any]:
    """The answer as JSON-ready values."""
    return dataclasses.asdict(self)
