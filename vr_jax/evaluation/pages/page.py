"""The report of a run as one HTML page that needs nothing else: no network, no other file.

`write_report` draws what a `Report` holds: accuracies beside chance, losses, questions answered
right and wrong, the similarity of an object's frames (Fig. 7 of the paper), one free question.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from data_pipes import page
from data_pipes.drawing import LOSSLESS, colour_of, data_uri, draw_objects, luminance
from data_pipes.page import Bar, percent
from data_pipes.tokenizer import REGION
from vr_jax.evaluation.reading.strict import labelled
from vr_jax.evaluation.results import write
from vr_jax.evaluation.scoring.statistics import Accuracy, Summary

# Dark to bright in equal steps of lightness, also for colour-blind readers (cividis).
_SCALE = ((0, 32, 76), (65, 77, 107), (124, 123, 120), (188, 175, 111), (255, 234, 70))


@dataclass(frozen=True)
class Frame:
  """A frame as shown: RGB uint8 [H, W, 3], its objects' masks [H, W] by object index, a caption."""

  image: np.ndarray
  masks: Mapping[int, np.ndarray] = field(default_factory=dict)
  caption: str = ""


@dataclass(frozen=True)
class Scored:
  """The held-out questions asked in one mode, such as "Single-frame"."""

  mode: str
  summary: Summary


@dataclass(frozen=True)
class LossCurve:
  """The training loss of one stage, nats per supervised token, at optimizer steps."""

  stage: str
  steps: Sequence[int]
  losses: Sequence[float]


@dataclass(frozen=True)
class Example:
  """One question as asked and answered.

  `question` is the published text with `<objectN>` and `<region>`; the i-th `<region>` is object i
  of the frames' masks. `options` carry their letters. `letter` is what the parser read from
  `answer`, None if nothing.
  """

  type: str
  mode: str
  video: str
  frames: Sequence[Frame]
  question: str
  options: Sequence[str]
  answer: str
  letter: str | None
  truth: str

  @property
  def correct(self) -> bool:
    return self.letter == self.truth


@dataclass(frozen=True)
class TextExample:
  """One description or caption: the reference, what the model wrote, what it was given for it.

  `scores` are (name, value as text); `explanation` the judge's reply; `problem` why there are none.
  """

  video: str
  frames: Sequence[Frame]
  question: str
  reference: str
  answer: str
  score: float | None
  scores: Sequence[tuple[str, str]] = ()
  explanation: str = ""
  problem: str = ""


@dataclass(frozen=True)
class ObjectSimilarity:
  """How alike an object looks in its F frames, and which token each frame went to.

  `matrix` [F, F] holds cosine similarities of the pooled features, `segments` [F] the merged token
  of each frame, in order (`RegionEncoder.similarity` gives both).
  """

  name: str
  index: int
  frames: Sequence[Frame]
  matrix: np.ndarray
  segments: Sequence[int]


@dataclass(frozen=True)
class FreeAnswer:
  """A question in the user's own words, and what the model said."""

  frames: Sequence[Frame]
  question: str
  answer: str


@dataclass(frozen=True)
class Report:
  """Everything on the page; a part that is empty or None is left out.

  `minutes` is the wall time of the whole run. `provenance` holds short facts by name (versions,
  seed, frame rule, parser), `config` the resolved configs as text, `notes` sentences a reader
  should see first (such as that the model is a demonstration).
  """

  checkpoint: str
  date: str
  minutes: float
  scored: Sequence[Scored]
  tokens_per_object: int
  curves: Sequence[LossCurve] = ()
  examples: Sequence[Example] = ()
  similarities: Sequence[ObjectSimilarity] = ()
  free: FreeAnswer | None = None
  provenance: Mapping[str, Any] = field(default_factory=dict)
  config: str = ""
  notes: Sequence[str] = ()


def write_report(path: Path | str, report: Report) -> Path:
  """Writes the page and returns its path; an older page is replaced in one step."""
  return render(
    Path(path),
    "report.html.j2",
    report=report,
    tiles=[_tile(scored) for scored in report.scored],
    rows=_rows(report.scored),
    bars=[(row["name"], [_bar(*mode) for mode in row["modes"]]) for row in _rows(report.scored)],
    scale=", ".join(_heat(i / 8) for i in range(9)),
    curves=[_curve(curve) for curve in report.curves],
    examples=[example_cells(example) for example in report.examples],
    right=sum(example.correct for example in report.examples),
    strips=[_strip(similarity) for similarity in report.similarities],
    free=report.free and _free(report.free),
  )


def render(path: Path, template: str, **content: Any) -> Path:
  """Writes a page from a template; an older page is replaced in one step."""
  write(path, page.render(template, "vr_jax.evaluation.pages", **content))
  return path


def _tile(scored: Scored) -> dict[str, Any]:
  return {"mode": scored.mode, "all": scored.summary.micro, "macro": scored.summary.macro}


def _rows(scored: Sequence[Scored]) -> list[dict[str, Any]]:
  """Per question type (and "All" last) the accuracy of each mode."""
  names = list(dict.fromkeys(t.name for s in scored for t in s.summary.types))
  rows: dict[str, list[tuple[str, Accuracy]]] = {name: [] for name in [*names, "All"]}
  for s in scored:
    for slice_ in (*s.summary.types, s.summary.micro):
      rows[slice_.name].append((s.mode, slice_))
  return [{"name": name, "modes": modes} for name, modes in rows.items() if modes]


def _bar(mode: str, part: Accuracy) -> Bar:
  """The accuracy of one mode with its Wilson interval, beside chance."""
  low, high = part.wilson.low, part.wilson.high
  note = f", interval {percent(low)}–{percent(high)} %, chance {percent(part.chance)} %"
  text = f"{percent(part.value)} %"
  return Bar(mode, part.value, text, part.n, low, high, part.chance, note)


# --- Losses.


def _curve(curve: LossCurve) -> dict[str, Any]:
  """Paths and ticks in percent of the plot; a loss that falls more than 20-fold gets a log axis."""
  points = [
    (s, v) for s, v in zip(curve.steps, curve.losses, strict=True) if math.isfinite(v) and v >= 0
  ]
  if not points:
    return {"stage": curve.stage, "empty": True}
  steps, losses = np.array(points, float).T
  low, high = losses.min(), losses.max()
  log = bool(low > 0 and high / low > 20)
  ticks = _log_ticks(low, high) if log else _linear_ticks(high)
  axis = np.log10 if log else np.asarray
  bottom, top = axis(ticks[0]), axis(ticks[-1])
  first, last = steps[0], max(steps[-1], steps[0] + 1)

  def path(values: np.ndarray) -> str:
    x = 100 * (steps - first) / (last - first)
    y = 100 * (1 - (axis(values) - bottom) / (top - bottom))
    return "M" + "L".join(f"{a:.2f} {b:.2f}" for a, b in zip(x, y, strict=True))

  smooth = _smoothed(losses)
  return {
    "stage": curve.stage,
    "empty": False,
    "log": log,
    "raw": path(losses),
    "smooth": path(smooth),
    "last": smooth[-1],
    "y": [(f"{t:g}", float(100 * (1 - (axis(t) - bottom) / (top - bottom)))) for t in ticks],
    "x": [f"{round(first + share * (last - first)):,}" for share in (0, 0.5, 1)],
  }


def _smoothed(values: np.ndarray) -> np.ndarray:
  """Mean over a twentieth of the curve around each point, less at its ends."""
  reach = len(values) // 40
  sums = np.concatenate([[0.0], np.cumsum(values)])
  index = np.arange(len(values))
  first, end = np.maximum(index - reach, 0), np.minimum(index + reach + 1, len(values))
  return (sums[end] - sums[first]) / (end - first)


def _linear_ticks(high: float) -> list[float]:
  """Ticks from 0 to at least `high` in three to six round steps."""
  rough = max(high, 1e-9) / 4
  unit = 10.0 ** math.floor(math.log10(rough))
  step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= rough)
  return [i * step for i in range(math.ceil(high / step - 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
  decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
  ticks = [m * 10.0**d for d in decades for m in (1, 2, 5)]
  inside = [i for i, t in enumerate(ticks) if low < t < high]
  return ticks[max(inside[0] - 1, 0) : inside[-1] + 2]


# --- Questions.


def example_cells(example: Example) -> dict[str, Any]:
  names = _object_names(example.question)
  options = []
  for letter, text in zip(*labelled(example.options), strict=True):
    truth, answered = letter == example.truth, letter == example.letter
    text = _chips(text, names)
    options.append({"letter": letter, "text": text, "truth": truth, "said": answered})
  wide = 480 if len(example.frames) == 1 else 360
  return {
    "it": example,
    "frames": _pictures(example.frames, wide),
    "question": _chips(example.question, names),
    "options": options,
  }


def text_cells(example: TextExample) -> dict[str, Any]:
  names = _object_names(example.question)
  return {
    "it": example,
    "frames": _pictures(example.frames, 480 if len(example.frames) == 1 else 360),
    "question": _chips(example.question, names),
  }


def _free(free: FreeAnswer) -> dict[str, Any]:
  names = _object_names(free.question)
  return {
    "frames": _pictures(free.frames, 520),
    "question": _chips(free.question, names),
    "answer": _chips(free.answer, names),
  }


def _pictures(frames: Sequence[Frame], width: int, **drawing: Any) -> list[dict[str, Any]]:
  out = []
  for frame in frames:
    image = draw_objects(frame.image, frame.masks, width, **drawing)
    seen = [str(i) for i, mask in frame.masks.items() if np.any(mask)]
    marked = f"object {', '.join(seen)}" if seen else "no object"
    alt = f"{frame.caption or 'Frame'}, {marked} marked"
    out.append({"uri": data_uri(image), "alt": alt, "caption": frame.caption, "size": image.size})
  return out


_TAG = re.compile(
  rf"<object(\d+)>\s*\[?{re.escape(REGION)}\]?|<object(\d+)>|\[?{re.escape(REGION)}\]?"
)


def _object_names(question: str) -> dict[str, int]:
  """`<objectN>`'s N -> index of the object: N is a label, the i-th `<region>` is object i."""
  names: dict[str, int] = {}
  index = 0
  for match in _TAG.finditer(question):
    if match[2] is None:
      if match[1] is not None:
        names.setdefault(match[1], index)
      index += 1
  return names


def _chips(text: str, names: Mapping[str, int]) -> Markup:
  """Text with every object's name as a coloured chip that shows its number in the pictures."""
  parts, at, index = [], 0, 0
  for match in _TAG.finditer(text):
    parts.append(escape(text[at : match.start()]))
    at = match.end()
    label = match[1] or match[2]
    if match[2] is None:
      here, index = index, index + 1
    elif label in names:
      here = names[label]
    else:
      parts.append(escape(match[0]))
      continue
    word = f"<object{label}>" if label else f"<object{here}>"
    colour = colour_of(here)
    ink = "#000" if luminance(colour) > 0.35 else "#fff"
    chip = '<span class="chip"><b style="background:{};color:{}">{}</b>{}</span>'
    parts.append(Markup(chip).format(colour, ink, here, word))
  return Markup("").join([*parts, escape(text[at:])])


# --- Fig. 7.


def _strip(similarity: ObjectSimilarity) -> dict[str, Any]:
  """Thumbnails in a row, a cell between each two, a bracket under each merged token."""
  matrix = np.asarray(similarity.matrix, float)
  segments = [int(s) for s in similarity.segments]
  count = len(segments)
  assert matrix.shape == (count, count) == (len(similarity.frames),) * 2, matrix.shape
  neighbours = np.diagonal(matrix, 1)
  low, high = (neighbours.min(), neighbours.max()) if count > 1 else (0.0, 1.0)
  cells = []
  for i, value in enumerate(neighbours):
    colour = _heat((value - low) / (high - low) if high > low else 1.0)
    ink = "#111" if luminance(colour) > 0.2 else "#fff"
    cut = segments[i] != segments[i + 1]
    cells.append({"value": value, "colour": colour, "ink": ink, "cut": cut, "column": 2 * i + 2})
  tokens: list[dict[str, int]] = []
  for token in dict.fromkeys(segments):
    first, size = segments.index(token), segments.count(token)
    tokens.append({"number": len(tokens) + 1, "column": 2 * first + 1, "span": 2 * size, "n": size})
  apart = matrix[~np.eye(count, dtype=bool)] if count > 1 else np.array([0.0, 1.0])
  lowest, highest = apart.min(), apart.max()
  shades = (np.clip(matrix, lowest, highest) - lowest) / (highest - lowest or 1.0)
  picture = np.array([[_rgb(v) for v in row] for row in shades], np.uint8)
  return {
    "it": similarity,
    "colour": colour_of(similarity.index),
    "ink": "#000" if luminance(colour_of(similarity.index)) > 0.35 else "#fff",
    "frames": _pictures(similarity.frames, 132, tint=0.5, numbers=False),
    "cells": cells,
    "tokens": tokens,
    "digits": "%.2f" if high - low >= 0.1 else "%.3f",
    "low": low,
    "high": high,
    "matrix": data_uri(picture, LOSSLESS),
    "cuts": [100 * (i + 1) / count for i, cell in enumerate(cells) if cell["cut"]],
    "lowest": lowest,
    "highest": highest,
  }


def _rgb(share: float) -> tuple[int, int, int]:
  at = min(max(share, 0.0), 1.0) * (len(_SCALE) - 1)
  i = min(int(at), len(_SCALE) - 2)
  mixed = (1 - (at - i)) * np.array(_SCALE[i]) + (at - i) * np.array(_SCALE[i + 1])
  return tuple(round(c) for c in mixed)


def _heat(share: float) -> str:
  return "#%02x%02x%02x" % _rgb(share)  # noqa: UP031 - shorter than an f-string of three
