"""The engine's graph: which stages a path has, in which order, and what decides their rows."""

import os
import threading
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from data_pipes import hub
from data_pipes.engine.agents import assemble, ingest, objects, texts
from data_pipes.engine.agents.sources import list_sources
from data_pipes.engine.calls import Calls
from data_pipes.engine.graph import Graph, GraphRef, Process, Stage, digest
from data_pipes.engine.licences import UNKNOWN
from data_pipes.engine.quality import masks as mask_quality
from data_pipes.engine.roles import Context, backend_class, identity, make_backend
from data_pipes.engine.rows import (
  CaptionRow,
  ClipRow,
  DialogueRow,
  GateRow,
  NounRow,
  ObjectRow,
  SampleRow,
  TextRow,
  VerdictRow,
  VideoRow,
)
from data_pipes.errors import InputError

PATHS = ("short", "detailed", "qa")
ORDERS = ("mask_first", "paper")
VERSION = 1  # of the stages' own code; a change redoes all
EMBEDDED = (
  "Embedded agents took part: their masks and texts show that the engine runs. "
  "Do not train on them."
)
INGEST, SHOTS, UNIQUE = "00_ingest", "05_shots", "06_unique"
ANALYZE, SEGMENT, MASKS = "10_analyze", "20_segment", "25_masks"
ANNOTATE, TEXTS, REVIEW, REFINE = "30_annotate", "35_texts", "40_review", "50_refine"
ASSEMBLE = "60_assemble"


def engine_config() -> ConfigDict:
  """Every field that the engine reads, with its default; locked."""
  config = ConfigDict()
  config.path = "detailed"  # "short", "detailed" or "qa", as published
  # "mask_first": masks and their gate before the Annotator is paid; "paper": as published.
  config.order = "mask_first"
  config.language = "en"  # ISO 639-1, of captions and of all texts
  config.seed = 0
  config.shards = 0  # 0: one for each 200 videos; fixed by the first run

  config.input = ConfigDict()
  config.input.videos = "."  # folder that holds the videos
  config.input.files = ()  # .json, .jsonl, .csv of {"video", "caption"}; QA: annotated items
  config.input.limit = 0  # only so many videos; 0: all

  config.shots = ConfigDict()
  config.shots.min_seconds = 1.0
  config.shots.max_seconds = 20.0  # longer shots are cut into equal parts
  config.shots.min_motion = 0.15  # mean change between frames, grey levels of 255
  config.shots.adaptive_threshold = 3.0  # PySceneDetect's AdaptiveDetector
  config.shots.min_content = 15.0

  config.duplicates = ConfigDict()
  config.duplicates.distance = 8  # bits of 64 by which the same frame may differ
  config.duplicates.benchmark = ()  # videos, or folders of them, that must not be trained on

  config.grid_frames = 32  # frames with masks, on the published grid
  config.max_objects = 5  # of a clip
  config.masks = ConfigDict(dict(mask_quality.LIMITS))
  config.drop_static = True  # the published engine drops subjects that do nothing
  config.review = ConfigDict()
  config.review.min_confidence = 0.0

  # Which backend plays each role: {"kind": "builtin" | "openai" | "transformers" | "python", …}.
  config.roles = {
    role: {"kind": "builtin"}
    for role in ("analyzer", "segmentor", "annotator", "describer", "judge", "refiner")
  }
  config.workers = 0  # processes of stages that compute; 0: one a core
  config.ray_gpus = 0.0  # GPUs of each actor of --runner ray
  return config.lock()


def graph_ref(settings: Mapping[str, Any]) -> GraphRef:
  """The engine's graph for settings that `check_settings` has passed."""
  return GraphRef("data_pipes.engine.stages:make_graph", settings)


def check_settings(config: Mapping[str, Any], workdir: str | os.PathLike) -> dict[str, Any]:
  """The config as plain values, checked; with the work directory.

  Raises:
    InputError: a choice that does not exist, a backend that is not there or misses an option.
  """
  settings = _plain(config)
  for key, accepted in (("path", PATHS), ("order", ORDERS)):
    if settings[key] not in accepted:
      raise InputError(f"config.{key}={settings[key]!r}; accepted: {', '.join(accepted)}")
  if not 0 <= settings["duplicates"]["distance"] <= 15:
    raise InputError(
      f"config.duplicates.distance={settings['duplicates']['distance']}; accepted: 0 to 15"
    )
  unknown = set(settings["roles"]) - set(_ROLE_STAGES)
  if unknown:
    raise InputError(
      f"config.roles.{sorted(unknown)[0]} is no role; accepted: {', '.join(_ROLE_STAGES)}"
    )
  for role in roles_of(settings):
    options = settings["roles"].get(role)
    if options is None:
      raise InputError(f"config.roles.{role} is missing; path {settings['path']!r} needs it")
    backend = backend_class(role, options)
    if settings["order"] == "paper" and role == "annotator" and _needs_masks(backend, settings):
      raise InputError(
        f"config.roles.annotator: {backend.__name__} works on masks; accepted: order 'mask_first'"
      )
  settings["workdir"] = str(Path(workdir).absolute())
  settings["input"]["videos"] = str(Path(settings["input"]["videos"]).absolute())
  return settings


def pin_models(
  settings: Mapping[str, Any], stored: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
  """The settings with the commit of each model of the Hub, and the licences that the Hub names.

  A run keeps the commits that it began with: `stored` is its config of before, whose names stay as
  they are, and the network is not asked again. A model that the Hub does not know, or that cannot
  be looked up now, stays without a commit.
  """
  roles, licences = {}, {}
  for role, options in settings["roles"].items():
    before = stored.get("roles", {}).get(role, {})
    roles[role] = dict(options)
    if role not in roles_of(settings):
      continue
    for key in getattr(backend_class(role, options), "hub_models", ()):
      name, earlier = options.get(key), before.get(key)
      if not isinstance(name, str):
        continue
      if earlier and name.removeprefix(hub.PREFIX) in (earlier, earlier.rpartition("@")[0]):
        roles[role][key] = earlier
      elif pinned := hub.pin(name):
        roles[role][key] = pinned.address
        licences[pinned.address] = pinned.licence or UNKNOWN
  return {**settings, "roles": roles}, licences


def _needs_masks(backend: type, settings: Mapping[str, Any]) -> bool:
  return settings["path"] == "detailed" and getattr(backend, "needs_masks", False)


def _plain(value: Any) -> Any:
  if isinstance(value, ConfigDict | Mapping):
    return {str(k): _plain(v) for k, v in value.items()}
  return [_plain(v) for v in value] if isinstance(value, tuple | list) else value


_ROLE_STAGES = {
  "analyzer": ANALYZE,
  "segmentor": SEGMENT,
  "annotator": ANNOTATE,
  "describer": REVIEW,
  "judge": REVIEW,
  "refiner": REFINE,
}
_ROLES_OF_PATH = {
  "short": ("analyzer", "segmentor"),
  "detailed": tuple(_ROLE_STAGES),
  "qa": ("annotator", "refiner"),
}


def roles_of(settings: Mapping[str, Any]) -> tuple[str, ...]:
  """The roles that a path needs."""
  return _ROLES_OF_PATH[settings["path"]]


def warning(settings: Mapping[str, Any]) -> str:
  """What every page about a run must say; "" for nothing."""
  kinds = {settings["roles"][role].get("kind", "builtin") for role in roles_of(settings)}
  return EMBEDDED if "builtin" in kinds else ""


def make_graph(settings: Mapping[str, Any]) -> Graph:
  """The stages of `settings["path"]`."""
  media = Path(settings["workdir"]) / "media"
  build = _Builder(settings)
  videos = build(INGEST, VideoRow, lambda: ingest.make_ingest(settings), None, keys=())
  shots = build(
    SHOTS, ClipRow, lambda: ingest.make_shots(settings, media), videos, keys=("shots",), cpu=True,
    more={"libraries": {n: version(n) for n in ("scenedetect", "av")}},
  )  # fmt: skip
  clips = build(
    UNIQUE,
    ClipRow,
    lambda: ingest.make_unique(settings),
    shots,
    keys=("duplicates",),
    survey=ingest.survey_duplicates(settings),
  )
  path = {"short": _short, "detailed": _detailed, "qa": _qa}[settings["path"]]
  path(build, settings, clips)
  halt = partial(halt_calls, settings["workdir"])
  return Graph(tuple(build.stages), partial(list_sources, settings), halt)


def _short(build: "_Builder", settings: Mapping[str, Any], clips: str) -> None:
  gate = _objects(build, settings, _analyze(build, settings, clips), clips)
  names = {"clips": clips, "objects": SEGMENT}
  _assemble(build, settings, gate, names, {clips: "clip_id", SEGMENT: "key", ANALYZE: "noun_id"})


def _detailed(build: "_Builder", settings: Mapping[str, Any], clips: str) -> None:
  nouns = _analyze(build, settings, clips)
  names = {"clips": clips, "objects": SEGMENT, "texts": TEXTS}
  paper = settings["order"] == "paper"
  if paper:
    texts_ = _texts(build, settings, nouns, clips, objects_=None)
    gate = _objects(build, settings, texts_, clips)
    joins = {clips: "clip_id", SEGMENT: "key", TEXTS: "noun_id"}
  else:
    gate = _objects(build, settings, nouns, clips)
    gate = _texts(build, settings, gate, clips, objects_=SEGMENT)
    joins = {clips: "clip_id", SEGMENT: "key"}
  verdicts = build(
    REVIEW,
    VerdictRow,
    lambda: texts.make_review(build.backend("describer"), build.backend("judge"), settings, names),
    gate,
    joins=joins,
    roles=("describer", "judge"),
    keys=("seed", "review"),
  )
  texts_key = "noun_id" if paper else "key"
  joins = {clips: "clip_id", TEXTS: texts_key}
  captions = build(
    REFINE,
    CaptionRow,
    lambda: texts.make_caption(build.backend("refiner"), settings, names),
    verdicts,
    joins=joins,
    roles=("refiner",),
    keys=("language",),
  )
  names = {**names, "verdicts": REVIEW}
  joins |= {ANALYZE: "noun_id", SEGMENT: "key", ANNOTATE: texts_key, REVIEW: "key"}
  _assemble(build, settings, captions, names, joins)


def _qa(build: "_Builder", settings: Mapping[str, Any], clips: str) -> None:
  given = build(SEGMENT, ObjectRow, lambda: objects.make_given(settings), clips, keys=())
  gate = _texts(build, settings, given, clips, objects_=SEGMENT)
  dialogues = build(
    REFINE,
    DialogueRow,
    lambda: texts.make_dialogue(build.backend("refiner"), settings, clips),
    gate,
    joins={clips: "clip_id"},
    group="clip_id",
    roles=("refiner",),
    keys=("language", "max_objects"),
  )
  _assemble(build, settings, dialogues, {"clips": clips}, {clips: "clip_id"})


def _analyze(build: "_Builder", settings: Mapping[str, Any], clips: str) -> str:
  return build(
    ANALYZE,
    NounRow,
    lambda: objects.make_analyze(build.backend("analyzer"), settings),
    clips,
    roles=("analyzer",),
    keys=("max_objects",),
  )


def _objects(build: "_Builder", settings: Mapping[str, Any], nouns: str, clips: str) -> str:
  """Segmentor and mask gate."""
  objects_ = build(
    SEGMENT,
    ObjectRow,
    lambda: objects.make_segment(build.backend("segmentor"), settings, clips),
    nouns,
    joins={clips: "clip_id"},
    roles=("segmentor",),
    keys=("grid_frames",),
  )
  return build(
    MASKS,
    GateRow,
    lambda: objects.make_mask_gate(settings),
    objects_,
    group="clip_id",
    keys=("masks",),
  )


def _texts(
  build: "_Builder", settings: Mapping[str, Any], after: str, clips: str, objects_: str | None
) -> str:
  """Annotator and text gate."""
  described = build(
    ANNOTATE,
    TextRow,
    lambda: texts.make_annotate(build.backend("annotator"), settings, clips, objects_),
    after,
    joins={clips: "clip_id", **({objects_: "key"} if objects_ else {})},
    roles=("annotator",),
    keys=(),
  )
  return build(
    TEXTS,
    TextRow,
    lambda: texts.make_text_gate(settings),
    described,
    keys=("drop_static", "language"),
  )


def _assemble(
  build: "_Builder",
  settings: Mapping[str, Any],
  after: str,
  names: Mapping[str, str],
  joins: Mapping[str, str],
) -> None:
  build(
    ASSEMBLE,
    SampleRow,
    lambda: assemble.make_assemble(settings, names),
    after,
    joins=joins,
    keys=("path", "seed", "language"),
  )


class _Builder:
  """Collects stages; knows the backends of their roles, and how wide each may run."""

  def __init__(self, settings: Mapping[str, Any]):
    self.settings = settings
    self.stages: list[Stage] = []

  def backend(self, role: str) -> Any:
    return make_backend(role, self.settings["roles"][role], self._context(role))

  def _context(self, role: str) -> Context:
    return Context(
      partial(calls_of, self.settings["workdir"]), _ROLE_STAGES[role], self.settings["language"]
    )

  def __call__(
    self,
    name: str,
    row: type,
    make: Callable[[], Process],
    after: str | None,
    *,
    keys: tuple[str, ...],
    roles: tuple[str, ...] = (),
    cpu: bool = False,
    more: Mapping[str, Any] | None = None,
    **options: Any,
  ) -> str:
    """Adds a stage; `keys` are the settings that decide its rows."""
    who: dict[str, Any] = {"code": VERSION, "settings": {k: self.settings[k] for k in keys}}
    who |= more or {}
    backends = [identity(r, self.settings["roles"][r], self._context(r)) for r in roles]
    if backends:
      who["roles"] = backends
      who["backend"] = " + ".join(f["backend"] if "backend" in f else f["class"] for f in backends)
      prompts = {k: v for f in backends for k, v in f.get("prompts", {}).items()}
      if prompts:
        who["prompts"] = prompts
    else:
      who["backend"] = f"engine@{VERSION}:{digest(who, 4)}"
    where, workers = self._width(roles, cpu)
    self.stages.append(Stage(name, row, make, who, after, where=where, workers=workers, **options))
    return name

  def _width(self, roles: tuple[str, ...], cpu: bool) -> tuple[str, int]:
    """Threads for endpoints, a process for a model, processes to compute."""
    allowed = getattr(os, "sched_getaffinity", None)  # of this process; Linux tells
    cores = self.settings["workers"] or (len(allowed(0)) if allowed else os.cpu_count() or 1)
    everyone = [self.settings["roles"][role] for role in roles]
    kinds = {options.get("kind", "builtin") for options in everyone} - {"builtin"}
    if "openai" in kinds:
      return "thread", min(
        threads_for(options.get("concurrency", 16)) if options["kind"] == "openai" else 1
        for options in everyone
        if options.get("kind", "builtin") != "builtin"
      )
    if kinds:
      return "own process", 1
    computes = cpu or any(
      getattr(backend_class(role, options), "computes", False)
      for role, options in zip(roles, everyone, strict=True)
    )
    return "process", cores if computes else 1


def threads_for(concurrency: int) -> int:
  """Some more than the calls in flight (which the client holds to `concurrency`): they get pictures
  and requests ready meanwhile."""
  return concurrency + max(1, concurrency // 8)


_open_calls: dict[str, Calls] = {}
_opening = threading.Lock()  # the threads of a stage make their first calls at the same time


def calls_of(workdir: str) -> Calls:
  """The calls of this process in a work directory, opened on first use."""
  with _opening:
    if workdir not in _open_calls:
      _open_calls[workdir] = Calls(Path(workdir) / "calls", *_calls_options.get(workdir, ()))
    return _open_calls[workdir]


_calls_options: dict[str, tuple[str, float | None, bool, bool]] = {}


def set_calls(
  workdir: str, name: str, budget_usd: float | None, alone: bool = False, retry: bool = False
) -> None:
  """Names this process's file of calls and sets its budget (calls.Calls), before the first call."""
  close_calls(workdir)
  _calls_options[workdir] = (name, budget_usd, alone, retry)


def set_calls_of_stage(
  workdir: str, name: str, budget_usd: float | None, retry: bool, stage: str
) -> None:
  """`set_calls` in a process that a stage has for itself: a file of its own, and the same budget,
  of which it counts what others had spent when it began."""
  set_calls(workdir, f"{name}-{stage}", budget_usd, retry=retry)


def halt_calls(workdir: str) -> None:
  """Lets threads that wait to ask again give up: the run stops."""
  if calls := _open_calls.get(workdir):
    calls.halted.set()


def close_calls(workdir: str) -> None:
  if calls := _open_calls.pop(workdir, None):
    calls.close()
