"""The five agents as typed roles: one input and one output each, whatever does the work.

A backend is a class made from its options (a dict of the config) and a `Context`. Its static
`identity(options, context)` says, without loading anything, what decides its results. Options that
`hub_models` names take a model of the Hub at a commit, OWNER/NAME@COMMIT.
"""

import importlib
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from data_pipes import hub
from data_pipes.engine.calls import Calls
from data_pipes.engine.graph import digest
from data_pipes.errors import InputError
from data_pipes.video import Video, open_video

UNPINNED = "hub"  # the version of a model of the Hub whose commit is not known
QUESTION_TYPES = ("basic", "reasoning", "future")


@dataclass(frozen=True)
class Clip:
  """One shot. `caption` is data, never instructions; "" where there is none."""

  path: str
  caption: str
  frames: int
  fps: float | None
  height: int
  width: int

  def open(self) -> Video:
    return open_video(self.path)


@dataclass(frozen=True)
class Nouns:
  """Analyzer: a clip -> singular nouns (phrases) of its subjects, and the other nouns."""

  subjects: tuple[str, ...]
  others: tuple[str, ...] = ()


class Ambiguous(InputError):
  """A noun that could stand for too many things of a clip; it is dropped, not quarantined."""


@dataclass(frozen=True)
class Track:
  """Segmentor: clip and noun -> an object with a mask on each looked-at frame.

  Attributes:
    masks: {frame: bool [H, W]}, empty where it is not seen.
    prompt: {"frame", "box": [x1, y1, x2, y2], "score"} that the masks grew from.
    scores: numbers of the model, such as pred_iou and cycle_iou.
  """

  masks: Mapping[int, np.ndarray]
  prompt: Mapping[str, Any]
  scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Description:
  """Annotator: clip, noun and (where known) masks -> two texts about one object.

  `static`: it does nothing over the clip (the published engine drops such subjects).
  """

  motion: str
  appearance: str
  static: bool
  source: Literal["model", "measured"] = "model"
  facts: Mapping[str, Any] = field(default_factory=dict)

  @property
  def text(self) -> str:
    return f"{self.appearance} {self.motion}".strip()


@dataclass(frozen=True)
class Claim:
  """What the Reviewer's judge decides on: does the Annotator's text describe these masks?

  Attributes:
    annotated: the Annotator's text about `noun`. region: the describer's, of the object on `frame`.
    masks: {frame: bool [H, W]}, for judges that look themselves.
  """

  clip: Clip
  noun: str
  annotated: str
  region: str
  masks: "Masks"
  frame: int


@dataclass(frozen=True)
class Verdict:
  """Reviewer, second half: a claim -> do both texts speak of the same object?"""

  same_object: bool
  reason: str
  confidence: float


@dataclass(frozen=True)
class Caption:
  """Refiner: two texts -> one description, long and short."""

  detailed: str
  short: str


@dataclass(frozen=True)
class Question:
  """Refiner: a round of QA. "{i}" stands for object number i, which `objects` names too."""

  question: str
  answer: str
  type: str
  objects: tuple[int, ...]


@dataclass(frozen=True)
class Described:
  """An object as the Refiner knows it."""

  noun: str
  description: Description


Masks = Mapping[int, np.ndarray]


class Analyzer(Protocol):
  def nouns(self, clip: Clip) -> Nouns: ...


class Segmentor(Protocol):
  def tracks(self, clip: Clip, noun: str, frames: Sequence[int]) -> list[Track]:
    """Objects of that name, best first; [] where none is found."""


class Annotator(Protocol):
  def describe(self, clip: Clip, noun: str, masks: Masks | None) -> Description: ...


class Describer(Protocol):
  """Reviewer, first half: what is this region of this frame? It is not told the noun."""

  def region(self, clip: Clip, masks: Masks, frame: int) -> str: ...


class Judge(Protocol):
  def compare(self, claim: Claim) -> Verdict: ...


class Refiner(Protocol):
  def caption(self, clip: Clip, described: Described) -> Caption: ...

  def questions(self, clip: Clip, objects: Sequence[Described]) -> list[Question]: ...


@dataclass(frozen=True)
class Context:
  """What a backend may use beside its options.

  Attributes:
    calls: opens the cache, ledger and budget of paid calls.
    stage: who calls, for the ledger.
    language: ISO 639-1 code that texts must be in.
  """

  calls: Callable[[], Calls]
  stage: str
  language: str = "en"


_BUILTIN = "data_pipes.engine.backends.builtin"
_CHAT = "data_pipes.engine.backends.chat_agents"
_LOCAL = "data_pipes.engine.backends.transformers_models"
KINDS: dict[str, dict[str, str]] = {
  "builtin": {
    "analyzer": f"{_BUILTIN}:NounPhrases",
    "segmentor": "data_pipes.engine.backends.flow_segmentor:FlowSegmentor",
    "annotator": f"{_BUILTIN}:Measured",
    "describer": f"{_BUILTIN}:MeasuredRegion",
    "judge": f"{_BUILTIN}:AttributeJudge",
    "refiner": f"{_BUILTIN}:Templates",
  },
  "openai": {
    "analyzer": f"{_CHAT}:ChatAnalyzer",
    "annotator": f"{_CHAT}:ChatAnnotator",
    "describer": f"{_CHAT}:ChatDescriber",
    "judge": f"{_CHAT}:ChatJudge",
    "refiner": f"{_CHAT}:ChatRefiner",
  },
  "transformers": {
    "segmentor": f"{_LOCAL}:DinoSam2",
    "annotator": f"{_LOCAL}:LocalAnnotator",
    "describer": f"{_LOCAL}:LocalDescriber",
  },
}
ROLES = ("analyzer", "segmentor", "annotator", "describer", "judge", "refiner")


def backend_class(role: str, options: Mapping[str, Any]) -> type:
  """The class that `options["kind"]` names for a role; "python" takes `options["target"]`.

  Raises:
    InputError: no such kind for the role, an option the backend does not know, or one missing.
  """
  kind = options.get("kind", "builtin")
  known = [name for name, roles in KINDS.items() if role in roles]
  if kind == "python":
    target = options.get("target")
    if not isinstance(target, str):
      raise InputError(f"roles.{role}: kind 'python' needs target, 'package.module:Class'")
  elif kind in known:
    target = KINDS[kind][role]
  else:
    raise InputError(
      f"roles.{role}: found kind {kind!r}; accepted: {', '.join(known)}, or python with a target"
    )
  module, _, name = target.partition(":")
  try:
    backend = getattr(importlib.import_module(module), name)
  except (ImportError, AttributeError) as error:
    raise InputError(f"roles.{role}: {target}: {error}") from error
  accepted = inspect.signature(backend).parameters
  given = {key for key in options if key not in ("kind", "target")}
  for key in sorted(given - set(accepted)):
    names = ", ".join(name for name in accepted if name != "context")
    raise InputError(f"roles.{role}.{key} is not known; accepted for kind {kind!r}: {names}")
  missing = [
    name
    for name, p in accepted.items()
    if p.default is p.empty and name not in given and name != "context"
  ]
  if missing:
    raise InputError(f"roles.{role}: kind {kind!r} needs {', '.join(missing)}")
  return backend


def arguments(options: Mapping[str, Any]) -> dict[str, Any]:
  """The options that go to the backend's constructor."""
  return {key: value for key, value in options.items() if key not in ("kind", "target")}


def identity(role: str, options: Mapping[str, Any], context: Context) -> dict[str, Any]:
  """What decides the results of a backend: its own word for it, or all its options."""
  backend = backend_class(role, options)
  identify = getattr(backend, "identity", None)
  named = identify(arguments(options), context) if identify else {"options": arguments(options)}
  return {"kind": options.get("kind", "builtin"), "class": backend.__name__, **named}


def make_backend(role: str, options: Mapping[str, Any], context: Context) -> Any:
  """Opens a backend: loads its model or makes its client."""
  backend = backend_class(role, options)
  return backend(context=context, **arguments(options))


def model_version(name: str | os.PathLike) -> str:
  """Of a local folder, a hash of its configuration and the sizes of its files; of a model of the
  Hub, the commit that its name ends with, UNPINNED if it has none."""
  folder = Path(name)
  if not folder.is_dir():
    parsed = hub.parse_address(str(name))
    return (parsed and parsed[1]) or UNPINNED
  config = folder / "config.json"
  text = config.read_text(encoding="utf-8") if config.is_file() else ""
  files = sorted(p for p in folder.rglob("*") if p.is_file())
  return digest([text, [(str(p.relative_to(folder)), p.stat().st_size) for p in files]], 6)
