"""VideoRefer-Bench: the published D (description) and Q (multiple choice) files, and predictions.

Formats and prompts: videorefer/eval/inference_videorefer_{d,q}_bench.py of the published code.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipes.bench_prompts import DESCRIBE, bench_q_prompt
from data_pipes.clips import choose_mask_frames
from data_pipes.errors import InputError
from data_pipes.records import parse_objects, read_items
from vr_jax.inference.model import Answer, Model, Request

MODES = ("single", "multi")
_KEYS = {
  "D": ("video", "caption", "frame_idx", "annotation"),
  "Q": ("video", "Question", "options", "Answer", "frame_idx", "annotation"),
}


@dataclasses.dataclass(frozen=True)
class BenchItem:
  """One item of either benchmark.

  Attributes:
    kind: "D" or "Q".
    question: the text after the media tag, byte for byte as the published scripts ask.
    objects: {frame number: segmentation or None} of each object, in the order of the `<region>`s.
    frame: the frame of single-frame mode.
    fields: the item as the file has it.
  """

  kind: str
  id: Any
  where: str
  video: str
  question: str
  objects: tuple[Mapping[int, Any], ...]
  frame: int
  fields: Mapping[str, Any]

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

  def request(self, media: Path | str, mode: str) -> Request:
    """The item as a question to a model; `media` is the folder its video path starts from."""
    return Request(Path(media) / self.video, self.question, annotation=self.masks(mode))

  def prediction(self, answer: Answer) -> dict[str, Any]:
    """The record of the published scripts, with the id, which they leave out."""
    kept = {"D": ("video", "caption"), "Q": ("video", "Answer")}[self.kind]
    record = {"id": self.id, **{key: self.fields[key] for key in kept}, "pred": answer.text}
    return record | ({"type": self.fields.get("type")} if self.kind == "Q" else {})


def read_bench(path: Path | str) -> list[BenchItem]:
  """Reads VideoRefer-Bench-D.json or -Q.json; which of the two, its keys tell.

  Raises:
    InputError: not JSON, no list, or an item without one of the published keys.
  """
  return [_parse(item, f"{path}: item {i}") for i, item in enumerate(read_items(path))]


def _parse(item: Any, where: str) -> BenchItem:
  if not isinstance(item, dict):
    raise InputError(f"{where}: found {type(item).__name__}; accepted: an object")
  kind = "Q" if "Question" in item else "D"
  missing = [key for key in _KEYS[kind] if key not in item]
  if missing:
    raise InputError(
      f"{where}: no key {missing[0]!r}; accepted: VideoRefer-Bench-{kind}, whose items have "
      f"{', '.join(_KEYS[kind])}"
    )
  try:
    frame = int(item["frame_idx"])
  except (TypeError, ValueError):
    raise InputError(
      f"{where}: key 'frame_idx': found {item['frame_idx']!r}; accepted: a frame number"
    ) from None
  question = DESCRIBE if kind == "D" else bench_q_prompt(item["Question"], item["options"])
  return BenchItem(
    kind=kind,
    id=item.get("id"),
    where=where,
    video=item["video"],
    question=question,
    objects=parse_objects(item, where),
    frame=frame,
    fields=item,
  )


def predict(
  model: Model,
  items: Sequence[BenchItem],
  media: Path | str,
  mode: str,
  *,
  batch_size: int = 8,
  **options: Any,
) -> Iterator[tuple[BenchItem, Answer]]:
  """Answers of a model, in the order of the items; `options` are those of `Model.ask_many`."""
  for first in range(0, len(items), batch_size):
    chunk = items[first : first + batch_size]
    requests = [item.request(media, mode) for item in chunk]
    answers = model.ask_many(requests, batch_size=batch_size, **options)
    yield from zip(chunk, answers, strict=True)
