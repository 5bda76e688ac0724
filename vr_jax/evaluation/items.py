"""One question of any benchmark, how it is asked, and what came back."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipes.clips import choose_mask_frames, media_path
from data_pipes.errors import InputError

if TYPE_CHECKING:  # scoring needs no model code
  from vr_jax.inference.requests import Request

MODES = ("single", "multi")


@dataclasses.dataclass(frozen=True)
class Item:
  """One question.

  Attributes:
    where: file and item, for messages.
    video: path of the media file or folder, from the media folder.
    bare_question: the question alone, without options and instructions, for people to read.
    question: the text after the media tag, byte for byte as the published scripts ask; the
      benchmark's `prompt` makes it of the bare question and the options.
    type: what its results are listed under ("" for none), `slices` further such groupings by name.
    truth: the right option or the reference caption, as the file has it; None if it is hidden.
    options: of a multiple-choice question.
    objects: {frame number: segmentation or None} of each object, in the order of the `<region>`s.
    frame: the frame of single-frame mode.
    seconds: start and end of the part of the video that is asked about.
    preface: gives the text in front of the question that depends on the media (its path, the number
      of scene frames), such as subtitles.
  """

  id: str | int
  where: str
  video: str
  bare_question: str = ""
  question: str = ""
  type: str = ""
  truth: str | None = ""
  options: tuple[str, ...] = ()
  objects: tuple[Mapping[int, Any], ...] = ()
  frame: int = 0
  seconds: tuple[float, float] | None = None
  slices: Mapping[str, str] = dataclasses.field(default_factory=dict)
  preface: Callable[[Path, int], str] | None = None

  def masks(self, mode: str) -> list[dict[int, Any]]:
    """The mask frames of each object: `frame` alone (single), or all annotated ones (multi).

    Raises:
      InputError: an object without an entry for the frame of single-frame mode (B28).
    """
    if mode not in MODES:
      raise InputError(f"mode {mode!r}; accepted: {', '.join(MODES)}")
    if mode == "multi":
      return choose_mask_frames(self.objects, single=False)
    for i, by_frame in enumerate(self.objects):
      if self.frame not in by_frame:
        raise InputError(
          f"{self.where}: object {i} has no annotation on frame_idx {self.frame}; it has frames "
          f"{', '.join(map(str, by_frame))}"
        )
    return [{self.frame: by_frame[self.frame]} for by_frame in self.objects]

  def request(self, media: Path | str, mode: str, scene_frames: int) -> "Request":
    """The item as a question to a model that takes `scene_frames` frames of the scene.

    `media` is the folder its video path starts from. Nothing is read here.

    Raises:
      InputError: the video's path leads out of the folder, or see `masks`.
    """
    from vr_jax.inference.requests import Request

    path = media_path(media, self.video)
    preface = functools.partial(self.preface, path, scene_frames) if self.preface else None
    return Request(
      path,
      self.question,
      annotation=self.masks(mode),
      seconds=self.seconds,
      preface=preface,
    )


@dataclasses.dataclass(frozen=True)
class Prediction:
  """What a model answered to an item, with all that scoring needs; one line of predictions.jsonl.

  `pred` is None where the item was not answered, and `error` then says why: "missing media: ..."
  or what was wrong with the item. Where `likelihoods` stand, in nats, one an option, `pred` is the
  label of the likeliest and nothing that the model wrote.
  """

  id: str | int
  video: str
  pred: str | None
  truth: str | None = ""
  type: str = ""
  question: str = ""
  options: tuple[str, ...] = ()
  slices: Mapping[str, str] = dataclasses.field(default_factory=dict)
  scene_frames: tuple[int, ...] = ()
  warnings: tuple[str, ...] = ()
  error: str | None = None
  likelihoods: tuple[float, ...] = ()

  @classmethod
  def for_item(cls, item: Item, pred: str | None, **fields: Any) -> "Prediction":
    """What a model answered to `item`."""
    names = ("id", "video", "truth", "type", "question", "options", "slices")
    return cls(pred=pred, **{name: getattr(item, name) for name in names}, **fields)

  @classmethod
  def from_dict(cls, record: Mapping[str, Any], where: str = "prediction") -> "Prediction":
    """A line of predictions.jsonl; InputError naming `where` if a field is of another kind."""
    names = [field.name for field in dataclasses.fields(cls)]
    known = {name: record[name] for name in names if name in record}
    for name in ("id", "video", "pred"):
      if name not in known:
        raise InputError(f"{where}: no key {name!r}; accepted: a line that vr eval wrote")
    for name in ("options", "scene_frames", "warnings", "likelihoods"):
      value = known.get(name) or ()
      if not isinstance(value, list | tuple):
        raise InputError(f"{where}: {name}: found {type(value).__name__}; accepted: a list")
      known[name] = tuple(value)
    if not isinstance(known.get("slices", {}), Mapping):
      raise InputError(f"{where}: slices: found {known['slices']!r}; accepted: names and texts")
    return cls(**known).checked(where)

  def checked(self, where: str) -> "Prediction":
    """The same, if its fields are what their types say; else an InputError naming `where`."""
    if isinstance(self.id, bool) or not isinstance(self.id, str | int):
      raise InputError(f"{where}: id: found {_shown(self.id)}; accepted: a text or a whole number")
    texts: list[tuple[str, Any]] = [
      (name, getattr(self, name)) for name in ("id", "video", "type", "question")
    ]
    texts += [
      (n, getattr(self, n)) for n in ("pred", "truth", "error") if getattr(self, n) is not None
    ]
    texts += [("options", option) for option in self.options]
    texts += [("slices", text) for pair in self.slices.items() for text in pair]
    for name, text in texts[0 if isinstance(self.id, str) else 1 :]:
      if not isinstance(text, str):
        raise InputError(f"{where}: {name}: found {_shown(text)}; accepted: text")
      if _SURROGATE.search(text):
        raise InputError(f"{where}: {name}: holds half a surrogate pair; accepted: text in UTF-8")
    return self

  def to_dict(self) -> dict[str, Any]:
    record = dataclasses.asdict(self)
    if not self.likelihoods:
      del record["likelihoods"]
    return record

  @property
  def missing(self) -> bool:
    """Its media file is not there."""
    return (self.error or "").startswith(MISSING)


MISSING = "missing media"
_SURROGATE = re.compile("[\ud800-\udfff]")


def _shown(value: Any) -> str:
  return ascii(value)[:60]


def counts(predictions: Sequence[Prediction]) -> dict[str, int]:
  """How many predictions there are, and how many are no answer for which reason."""
  answers = [p.pred for p in predictions if p.pred is not None]
  return {
    "total": len(predictions),
    "answered": len(answers),
    "missing_media": sum(p.missing for p in predictions),
    "unusable": sum(bool(p.error) and not p.missing for p in predictions),
    "empty": sum(not answer.strip() for answer in answers),
  }


def item_record(
  prediction: Prediction,
  *,
  parsed: Any = None,
  gt: str | None = None,
  score: float | None = None,
  problem: str | None = None,
  **more: Any,
) -> dict[str, Any]:
  """The line of items.jsonl: what was asked, what was read from the answer, its score."""
  return {
    "id": prediction.id,
    "video": prediction.video,
    "type": prediction.type,
    "prompt": prediction.question,
    "raw": prediction.pred,
    "parsed": parsed,
    "gt": gt,
    "score": score,
    **more,
    "problem": problem,
    "error": prediction.error,
  }


def check_ids(items: Sequence[Item | Prediction], what: str) -> None:
  """InputError if two items have one id: their answers could not be told apart."""
  seen: dict[Any, int] = {}
  for i, item in enumerate(items):
    if item.id in seen:
      raise InputError(
        f"{what}: items {seen[item.id]} and {i} both have id {item.id!r}; accepted: ids that differ"
      )
    seen[item.id] = i
