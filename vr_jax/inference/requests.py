"""Requests to a model, the options of answering, and answers."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from typing import Any

from data_pipes.errors import InputError
from data_pipes.masks import GRID_RULES
from vr_jax.inference.regions import Region
from vr_jax.inference.sampling import Sampling

# Options that `vr ask` and `vr eval` have in common, as their --help prints them.
NEW_TOKENS_HELP = "the most tokens of an answer"
SCENE_FRAMES_HELP = "default: as many as in training"
BATCH_SIZE_HELP = "answers at once"
MASK_RULE_HELP = (
  "masks on the tower's grid: keep (default) leaves every object a cell, published may not"
)


@dataclasses.dataclass(frozen=True)
class Request:
  """One question about one video; the first three fields are those of `Model.ask`.

  Attributes:
    annotation: takes the place of `regions` where the objects are annotated as in the published
      files: {frame number: COCO segmentation or None} of each object, in merge order. There an
      object may be empty.
    seconds: start and end of the part of the video that the scene frames are taken from; None is
      the whole video. Frame numbers count in the whole video all the same.
    preface: gives the text in front of the question that depends on the media, such as subtitles;
      called when the video is read.

  Raises:
    InputError: `seconds` are not two numbers.
  """

  video: Any
  question: str
  regions: Sequence[Region] = ()
  annotation: Sequence[Mapping[int, Any]] = ()
  seconds: tuple[float, float] | None = None
  preface: Callable[[], str] | None = None

  def __post_init__(self):
    if self.seconds is None:
      return
    try:
      start, end = map(float, self.seconds)
    except (TypeError, ValueError):
      raise InputError(f"seconds={self.seconds!r}; accepted: two numbers, start and end") from None
    object.__setattr__(self, "seconds", (start, end))


@dataclasses.dataclass(frozen=True)
class Answer:
  """The text that the model gave, and what it rests on.

  Attributes:
    text: the answer, which `str(answer)` gives too.
    token_ids: the generated tokens, the end token included.
    scene_frames: frame numbers of the scene in the source video (negative: black filling).
    objects: per object its name and, for each of its tokens, the frames that the token stands for.
    warnings: one line each, such as an object too small for the model's grid.
  """

  text: str
  token_ids: tuple[int, ...]
  scene_frames: tuple[int, ...]
  objects: tuple[Mapping[str, Any], ...]
  warnings: tuple[str, ...]

  def __str__(self) -> str:
    return self.text

  def to_dict(self) -> dict[str, Any]:
    """The answer as JSON-ready values."""
    return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Options:
  """How to answer; the keywords of `ask`, `ask_many`, `answer_each`, `stream` and `warm_up`.

  Attributes:
    max_new_tokens: the most tokens of an answer.
    temperature, top_k, top_p: as in `Sampling`; temperature 0 is greedy.
    seed: sampled answers are a function of it and of the request's place in the list.
    scene_frames: frames of the scene; None is as many as in training.
    batch_size: answers under way at once. A greedy answer does not depend on the other requests;
      with 1 a single answer comes soonest.
    share: questions about one video share its features and its prefix. Off, each is computed by
      itself; the answers are the same.
    mask_rule: how masks come onto the tower's grid, as `input.mask_rule` in training: "keep"
      (default) leaves every object at least one cell, "published" may lose small ones, "area".
  """

  max_new_tokens: int = field(default=256, metadata={"help": NEW_TOKENS_HELP})
  temperature: float = field(default=0.0, metadata={"help": "0 (default) is greedy"})
  top_k: int = field(
    default=0, metadata={"help": "sample from the K likeliest tokens; 0 (default): from all"}
  )
  top_p: float = field(
    default=1.0, metadata={"help": "sample from the likeliest tokens that hold this share"}
  )
  seed: int = field(default=0, metadata={"help": "of the sampling"})
  scene_frames: int | None = field(default=None, metadata={"help": SCENE_FRAMES_HELP})
  batch_size: int = field(default=8, metadata={"help": BATCH_SIZE_HELP})
  share: bool = field(
    default=True, metadata={"help": "questions about one video share what is computed of it"}
  )
  mask_rule: str = field(default="keep", metadata={"help": MASK_RULE_HELP})

  def __post_init__(self):
    if self.mask_rule not in GRID_RULES:
      raise InputError(f"mask_rule={self.mask_rule!r}; accepted: {', '.join(GRID_RULES)}")
    for name in ("max_new_tokens", "batch_size"):
      if getattr(self, name) < 1:
        raise InputError(f"{name}={getattr(self, name)}; accepted: 1 or more")

  def sampling(self, default: Sampling) -> Sampling:
    try:
      return dataclasses.replace(
        default, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p
      )
    except ValueError as error:
      raise InputError(str(error)) from None
