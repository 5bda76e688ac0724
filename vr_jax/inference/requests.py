"""Requests to a model, and its answers."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from data_pipes.errors import InputError
from vr_jax.inference.regions import Region


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
