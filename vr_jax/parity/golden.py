"""Golden cases: outputs of the published code against ours, made by the modules that users run.

A golden folder holds `cases.json` (stages, their cases, arrays and tolerances) beside weights,
arrays, media and JSON files; its README describes every array. A stage is compared by the function
that `STAGES` names; it takes the folder and yields a `CaseResult` for each case.
"""

import dataclasses
import functools
import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_pipes.errors import InputError

# Stage of a golden folder, or a name in its `other_json` -> module:function(golden) -> results.
STAGES = {
  "01_siglip": "vr_jax.parity.model:siglip",
  "02_projectors": "vr_jax.parity.model:projectors",
  "03_region": "vr_jax.parity.model:region",
  "04_token_merge": "vr_jax.parity.model:token_merge",
  "05_forward": "vr_jax.parity.forward:forward",
  "06_gradients": "vr_jax.parity.training:gradients",
  "06b_training": "vr_jax.parity.training:training",
  "07_generate": "vr_jax.parity.forward:generation",
  "08_preprocess": "vr_jax.parity.text:preprocess",
  "frame_sample": "vr_jax.parity.text:frame_sample",
  "prompts": "vr_jax.parity.text:prompts",
  "bench_q_scoring": "vr_jax.parity.text:bench_q_scoring",
  "bench_d_scoring": "vr_jax.parity.text:bench_d_scoring",
  "bench_inference": "vr_jax.parity.forward:bench_inference",
}
# The same for a folder whose index says that its family is another.
FAMILIES = {
  "videollama3 successors": {
    "01_vision": "vr_jax.parity.successors:vision",
    "02_projector": "vr_jax.parity.successors:projector",
    "03_compressor": "vr_jax.parity.successors:compressor",
    "04_region_prep": "vr_jax.parity.successors_data:region_prep",
    "05_kmeans": "vr_jax.parity.successors:k_means_cases",
    "06_region": "vr_jax.parity.successors:region",
    "07_forward": "vr_jax.parity.successors_rows:forward",
    "08_gradients": "vr_jax.parity.successors_rows:gradients",
    "09_generate": "vr_jax.parity.successors_rows:generation",
    "10_preprocess": "vr_jax.parity.successors_data:preprocess",
    "prompts": "vr_jax.parity.successors_data:prompts",
    "smart_resize": "vr_jax.parity.successors_data:smart_resize",
    "frame_sample": "vr_jax.parity.successors_data:frame_sample",
    "train_data": "vr_jax.parity.successors_data:training_samples",
  }
}
UNTOLD = {"atol": 1e-5}  # of a float array without limits among arrays that have their own

PASS, FAIL, REFUSED, SKIPPED = "pass", "fail", "refused by design", "skipped"


@dataclasses.dataclass(frozen=True)
class CaseResult:
  """What came of one case.

  `max_error` and `rms_error` are the largest over the case's arrays (for exact data: of the
  differences), None where nothing numeric was compared; `tolerance` and `rms_tolerance` are what
  the folder allows. `status` is pass, fail, refused by design or skipped; only fail is a failure.
  `unknown` names the arrays of the case that no code here compares.
  """

  stage: str
  case: str
  status: str
  max_error: float | None = None
  rms_error: float | None = None
  tolerance: float | None = None
  rms_tolerance: float | None = None
  note: str = ""
  unknown: tuple[str, ...] = ()

  def __str__(self) -> str:
    def against(name, error, tolerance):
      if error is None:
        return ""
      return f"{name} {error:.1e}" + ("" if tolerance is None else f" (of {tolerance:.1e})")

    errors = against("max", self.max_error, self.tolerance)
    rms = against("rms", self.rms_error, self.rms_tolerance)
    unknown = f"not known here, so not compared: {', '.join(self.unknown)}" if self.unknown else ""
    note = "; ".join(filter(None, [self.note, unknown]))
    return f"{self.stage:16}{self.case:31} {self.status:19}{errors:26}{rms:26}{note}".rstrip()


class Refused(Exception):
  """Our code does not reproduce a case, and says by which decision (B1 ... B28) of its design."""


class Skipped(Exception):
  """A case is about something that is not built, and that is optional."""


class Case:
  """One golden case. `case["x"]` reads an input array; arrays never read are expected outputs."""

  def __init__(self, fields: Mapping[str, Any], stage: str, npz: Mapping[str, np.ndarray]):
    self.stage, self.id = stage, fields["id"]
    self.meta: dict[str, Any] = fields.get("meta") or {}
    self.tolerance: dict[str, Any] = fields.get("tol") or {}
    arrays = fields.get("arrays") or {}
    self._keys = {name: array["key"] for name, array in arrays.items()}
    self._tolerances = {name: array["tol"] for name, array in arrays.items() if "tol" in array}
    self._npz = npz
    self._inputs: set[str] = set()

  def __getitem__(self, name: str) -> np.ndarray:
    self._inputs.add(name)
    return self.reference(name)

  def get(self, name: str) -> np.ndarray | None:
    """An input array, None where the case has none of this name."""
    if name not in self:
      return None
    return self[name]

  def allowed(self, name: str) -> Mapping[str, Any]:
    """The limits of one array: its own, or where the arrays have none those of the case."""
    if not self.own_limits:
      return self.tolerance
    return self._tolerances.get(name, UNTOLD)

  @property
  def own_limits(self) -> bool:
    """Whether each array has limits of its own."""
    return bool(self._tolerances)

  def stored(self, key: str) -> np.ndarray:
    """An array of the stage by its key, which another case may hold."""
    if key not in self._npz:
      raise InputError(f"{self.stage} {self.id}: the stage has no array {key}")
    return self._npz[key]

  def __contains__(self, name: str) -> bool:
    return name in self._keys

  def reference(self, name: str) -> np.ndarray:
    """An array of the case, without making it an input."""
    if name not in self._keys:
      raise InputError(f"{self.stage} {self.id}: the case has no array {name}")
    return self._npz[self._keys[name]]

  def expected(self) -> list[str]:
    """Names of the arrays that our code must produce."""
    return [name for name in self._keys if name not in self._inputs]


class Golden:
  """A golden folder; raises InputError if it is none."""

  def __init__(self, folder: Path | str):
    self.folder = Path(folder)
    index = self.folder / "cases.json"
    if not index.is_file():
      raise InputError(f"{self.folder}: no golden folder (it has no cases.json)")
    try:
      self.index: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))
      self._stages = {stage["stage"]: stage for stage in self.index["stages"]}
    except (ValueError, KeyError, TypeError) as error:
      raise InputError(f"{index}: no index of golden cases ({error!r})") from None

  def stages(self) -> list[str]:
    """The folder's stages, then those of its other JSON files that hold cases."""
    others = self.index.get("other_json", {})
    return [*self._stages, *(name for name in others if name in self.runs())]

  def runs(self) -> Mapping[str, str]:
    """What compares each stage of a folder of this family."""
    family = self.index.get("family")
    if family is None:
      return STAGES
    if family not in FAMILIES:
      raise InputError(f"{self.folder}: family {family!r} is not one of {', '.join(FAMILIES)}")
    return FAMILIES[family]

  def path(self, name: str) -> Path:
    """A file or folder that the index or a case names."""
    path = self.folder / name
    if not path.exists():
      raise InputError(f"{self.folder}: golden folder without {name}")
    return path

  @functools.cached_property
  def checkpoint(self) -> Path:
    """The folder of the tiny published model."""
    return self.path(self.index["checkpoint"])

  def array(self, key: str) -> np.ndarray:
    """An array by stage and key, as in 01_vision:layers/features."""
    stage, _, name = key.partition(":")
    if stage not in self._stages:
      raise InputError(f"{self.folder}: no stage {stage!r} of {key}")
    npz = np.load(self.path(self._stages[stage]["npz"]))
    if name not in npz:
      raise InputError(f"{self.folder}: stage {stage} has no array {name}")
    return npz[name]

  def other_json(self, name: str) -> Any:
    """One of the JSON files that the index lists beside its stages."""
    return json.loads(self.path(self.index["other_json"][name]).read_text(encoding="utf-8"))

  def cases(self, stage: str) -> list[Case]:
    fields = self._stages[stage]
    npz = np.load(self.path(fields["npz"])) if "npz" in fields else {}
    return [Case(case, stage, npz) for case in fields["cases"]]


@dataclasses.dataclass(frozen=True)
class Produced:
  """Our arrays for a case.

  `atol` replaces the case's tolerances for the arrays it names. Those in `loose` hinge on one
  rounding of the published code: they are compared, but not held strictly.
  """

  arrays: Mapping[str, np.ndarray]
  atol: Mapping[str, float] = dataclasses.field(default_factory=dict)
  loose: frozenset[str] = frozenset()
  note: str = ""


def compare(case: Case, produced: Produced) -> CaseResult:
  """Every expected array of a case with ours: floats within `atol` and `rms_tol`, others equal.

  An array that ours lack is named as unknown; a case with no other has failed.
  """
  problems, notes = [], [produced.note] if produced.note else []
  worst, worst_rms = 0.0, 0.0
  limits = case.tolerance  # those beside which the errors are told
  shares: list[tuple[float, str, float, float]] = []
  unknown = tuple(name for name in case.expected() if name not in produced.arrays)
  known = [name for name in case.expected() if name not in unknown]
  if unknown and not known:
    problems.append("nothing was compared")
  for name in known:
    expected, tolerance = case.reference(name), case.allowed(name)
    ours = np.asarray(produced.arrays[name])
    if ours.shape != expected.shape:
      problem = f"{name} has shape {list(ours.shape)} instead of {list(expected.shape)}"
    else:
      error = np.abs(ours.astype(np.float64) - expected.astype(np.float64))
      largest = float(error.max(initial=0.0))
      rms = float(np.sqrt(np.mean(error**2))) if error.size else 0.0
      if not np.issubdtype(expected.dtype, np.floating):
        within = not error.any()
      elif name in produced.atol:
        within = largest <= produced.atol[name]
      else:
        allowed = tolerance.get("atol", 0.0) + tolerance.get("rtol", 0.0) * np.abs(expected)
        within = np.all(error <= allowed) and rms <= tolerance.get("rms_tol", np.inf)
      if within or name not in produced.loose:
        worst, worst_rms = np.fmax(worst, largest), np.fmax(worst_rms, rms)
        limit = produced.atol.get(name, tolerance.get("atol"))
        share = largest / limit if limit else 0.0
        shares.append((share if np.isfinite(share) else np.inf, name, largest, rms))
      problem = None if within else f"{name} differs by {largest:.1e} (rms {rms:.1e})"
    if problem:
      (notes if name in produced.loose else problems).append(problem)
  if case.own_limits and shares:  # the array that takes the largest share of its limit
    _, name, worst, worst_rms = max(shares)
    limits = {"atol": produced.atol[name]} if name in produced.atol else case.allowed(name)
  return CaseResult(
    stage=case.stage,
    case=case.id,
    status=FAIL if problems else PASS,
    max_error=float(worst),
    rms_error=float(worst_rms),
    tolerance=limits.get("atol", max(produced.atol.values(), default=None)),
    rms_tolerance=limits.get("rms_tol"),
    note="; ".join(problems + notes),
    unknown=unknown,
  )


def compare_cases(
  cases: Iterable[Case], run: Callable[[Case], Produced | Mapping[str, np.ndarray]]
) -> Iterator[CaseResult]:
  """`run` on every case, compared. `Refused`, `Skipped` and `InputError` become results."""
  for case in cases:
    try:
      produced = run(case)
    except Refused as reason:
      yield CaseResult(case.stage, case.id, REFUSED, note=str(reason))
    except Skipped as reason:
      yield CaseResult(case.stage, case.id, SKIPPED, note=str(reason))
    except InputError as error:
      yield CaseResult(case.stage, case.id, FAIL, note=str(error))
    else:
      yield compare(case, produced if isinstance(produced, Produced) else Produced(produced))


def exact(
  stage: str, group: str, pairs: Iterable[tuple[Any, Any, Any]], note: str = ""
) -> CaseResult:
  """One result for many (what, ours, published) that must be equal; the first few are named."""
  count, wrong = 0, []
  try:
    for what, ours, published in pairs:
      count += 1
      if ours != published:
        wrong.append(f"{what!r:.60}: {ours!r:.80} instead of {published!r:.80}")
  except InputError as error:
    return CaseResult(stage, group, FAIL, note=f"after {count}: {error}")
  if not wrong:
    return CaseResult(stage, group, PASS, note=f"{count} equal{note and f'; {note}'}")
  shown = "; ".join(wrong[:3])
  return CaseResult(stage, group, FAIL, note=f"{len(wrong)} of {count} differ: {shown}")


def run_parity(
  folder: Path | str,
  stages: Iterable[str] | None = None,
  report: Callable[[CaseResult], None] = lambda result: None,
) -> list[CaseResult]:
  """Runs the cases of a golden folder (all stages, or those named), telling `report` of each.

  A stage of the folder that nothing compares is a failure. Raises InputError where the folder is
  no golden set or has no such stage.
  """
  golden = Golden(folder)
  chosen = list(stages) if stages is not None else golden.stages()
  for stage in chosen:
    if stage not in golden.stages():
      raise InputError(f"{folder}: no stage {stage!r}; it has {', '.join(golden.stages())}")
  results = []
  for stage in chosen:
    if stage in golden.runs():
      module, function = golden.runs()[stage].split(":")
      outcomes: Iterable[CaseResult] = getattr(importlib.import_module(module), function)(golden)
    else:
      outcomes = [CaseResult(stage, "*", FAIL, note="no code compares this stage")]
    for result in outcomes:
      report(result)
      results.append(result)
  return results
