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

  def __post_init__(self):
    if not isinstance(self.question, str):
      raise InputError(f"question {shown(self.question)}; accepted: text")
    check_text([self.question], "question")
    for name, kind, accepted in (
      ("regions", Region, "a list of Region"),
      ("annotation", Mapping, "a list of {frame number: segmentation}"),
    ):
      entries = getattr(self, name)
      if not isinstance(entries, Sequence) or not all(isinstance(e, kind) for e in entries):
        raise InputError(f"{name} {shown(entries)}; accepted: {accepted}")
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
