"""LoRA adapters of the decoder in the PEFT format: read and written.

Source: LoRA (arXiv 2106.09685); the files of the library peft (adapter_config.json,
adapter_model.safetensors).
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_pipes.errors import InputError
from vr_jax.interop import hf_decoder
from vr_jax.interop.adapter import Adapter, Replaced
from vr_jax.interop.fields import field, read_json, require, section, shown, size
from vr_jax.interop.table import (
  DENSE,
  HEADS_IN,
  HEADS_OUT,
  Mapped,
  Row,
  Safetensors,
  Shapes,
  Slot,
  Tensors,
  Tree,
  arrays,
  nested,
  outputs,
  slots,
  their_shape,
)
from vr_jax.interop.writers import ShardWriter
from vr_jax.models.decoder import DecoderConfig
from vr_jax.models.lora import is_factor

_PREFIX = "base_model.model."
_MATRICES = r"layers/(?:attn/\w+_einsum/w|mlp/gating_einsum|mlp/linear)"


def rows(cfg: DecoderConfig) -> list[Row]:
  """The table: two rows for each row of the decoder that is a matrix of a layer."""

  def renamed(names: str | tuple[str, ...], letter: str) -> str | tuple[str, ...]:
    if isinstance(names, str):
      return _PREFIX + names.replace(".weight", f".lora_{letter}.weight")
    return tuple(str(renamed(name, letter)) for name in names)

  table = []
  for row in hf_decoder.rows(cfg):
    if re.fullmatch(_MATRICES, row.ours):
      heads_in = "attn_vec" in row.ours
      heads_out = row.transform is not DENSE and not heads_in
      a, b = HEADS_IN if heads_in else DENSE, HEADS_OUT if heads_out else DENSE
      table.append(Row(f"{row.ours}_lora_a", renamed(row.theirs, "A"), a))
      table.append(Row(f"{row.ours}_lora_b", renamed(row.theirs, "B"), b))
  return table


def adapter_shapes(cfg: DecoderConfig, rank: int, adapted: Mapping[str, Any]) -> Shapes:
  """Path -> shape of the factors of the matrices at the paths `adapted`."""
  with_factors = hf_decoder.decoder_shapes(dataclasses.replace(cfg, lora_rank=rank))
  return {
    path: shape
    for path, shape in with_factors.items()
    if is_factor(path) and re.sub("_lora_[ab]$", "", path) in adapted
  }


def is_adapter(path: str | Path) -> bool:
  """Whether a folder holds an adapter in the PEFT format."""
  return (Path(path) / "adapter_config.json").is_file()


# What adapter_config.json may say. `_FREE`: what the weights do not depend on, or how they began
# where that leaves the base alone. The others by the values that are read; a field that is not
# listed is one that we do not know, and may only be empty.
_FREE = {
  "arrow_config", "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config",
  "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config",
  "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "peft_version",
  "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip
_READ = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save"}
_ACCEPTED: dict[str, tuple[Any, ...]] = {
  "peft_type": ("LORA",),
  "bias": ("none", None),
  # The others (pissa, olora, corda, loftq, lora_ga, …) change the base as they begin.
  "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "mica", None),
}


def _check_fields(fields: Mapping[str, Any], where: Path) -> None:
  """Refuses what an adapter may say and we do not compute."""
  for key, value in fields.items():
    accepted = _ACCEPTED.get(key, (None, False, {}, [], ""))
    if key in _FREE or key in _READ:
      continue
    if value not in accepted or (key not in _ACCEPTED and value == 0 and value is not False):
      names = ", ".join(repr(a) for a in accepted if a is not None)
      raise InputError(f"{where}: {key}={shown(value)} is not supported; accepted: {names}")
  require(fields, where, "peft_type", _ACCEPTED["peft_type"], None)


class _Scales:
  """The rank and scale of each adapted matrix, as the library peft takes them from its config.

  Ours have one of each: factors of lower rank are filled up with zeros, and what a matrix's scale
  is more or less goes into its B.
  """

  def __init__(self, fields: Mapping[str, Any], where: Path, modules: Iterable[str]):
    self._rslora = field(fields, where, "use_rslora", bool, False)
    rank = size(fields, where, "r")
    alpha = _number(fields, where, "lora_alpha")
    ranks = _patterns(fields, where, "rank_pattern", functools.partial(size, least=1))
    alphas = _patterns(fields, where, "alpha_pattern", _number)
    self.ranks, self._scales = {}, {}
    for module in modules:
      self.ranks[module] = _matching(ranks, module, rank)
      self._scales[module] = self._scale(_matching(alphas, module, alpha), self.ranks[module])
    self.rank = max(self.ranks.values(), default=rank)
    even = len(set(self._scales.values())) == 1 and len(set(self.ranks.values())) == 1
    self.scale = next(iter(self._scales.values())) if even else self._scale(alpha, rank)

  def _scale(self, alpha: float, rank: int) -> float:
    return alpha / (rank**0.5 if self._rslora else rank)

  @property
  def alpha(self) -> float:
    return self.scale * self.rank

  def factor(self, module: str) -> float:
    """By what a matrix counts more than the adapter as a whole."""
    return 1.0 if self._scales[module] == self.scale else self._scales[module] / self.scale


def _number(fields: Mapping[str, Any], where: Any, key: str) -> float:
  value = field(fields, where, key, float)
  if not math.isfinite(value) or not value:
    raise InputError(f"{where}: {key}={value!r}; accepted: a finite number that is not 0")
  return value


def _patterns(
  fields: Mapping[str, Any], where: Path, key: str, read: Callable[..., Any]
) -> dict[re.Pattern, Any]:
  """The values of a pattern field by the ends of module names that they hold for."""
  values = section(fields, where, key)
  try:
    return {
      re.compile(rf"(.*\.)?({name})$"): read(values, f"{where}: {key}", name) for name in values
    }
  except (re.error, RecursionError, OverflowError) as error:
    raise InputError(f"{where}: {key}: no pattern of module names ({error})") from None


def _matching(patterns: Mapping[re.Pattern, Any], module: str, default: Any) -> Any:
  return next((value for key, value in patterns.items() if key.match(module)), default)


def open_adapter(folder: str | Path, cfg: DecoderConfig) -> Adapter:
  """Opens a PEFT folder for a decoder.

  Raises:
    InputError: no adapter, one of another kind (DoRA, a bias, an initialisation that changed the
      base), or one whose tensors do not fit the decoder.
  """
  folder, cfg = Path(folder), dataclasses.replace(cfg, lora_rank=0)
  where = folder / "adapter_config.json"
  fields = read_json(where)
  _check_fields(fields, where)
  file = folder / "adapter_model.safetensors"
  if not file.is_file() and (folder / "adapter_model.bin").is_file():
    raise InputError(f"{folder}: found adapter_model.bin, expected adapter_model.safetensors")
  tensors = Safetensors(file)
  adapted = _adapted(tensors, cfg)
  everything = list(slots(adapter_shapes(cfg, 1, dict.fromkeys(adapted)), rows(cfg)))
  scales = _Scales(fields, where, dict.fromkeys(_module(slot.theirs) for slot in everything))
  shapes = adapter_shapes(cfg, scales.rank, dict.fromkeys(adapted))
  table = list(slots(shapes, rows(cfg)))
  whole = _whole_tensors(tensors, cfg, fields, where)
  factors = Mapped(
    _Completed(tensors, table, shapes, scales),
    table,
    shapes,
    unused=lambda name: any(name == slot.theirs for slot in whole),
  )
  replaced = Replaced(tensors, whole) if whole else None
  return Adapter(factors, scales.rank, scales.alpha, replaced)


def _module(theirs: str) -> str:
  """The module that a factor belongs to, as patterns name it."""
  return re.sub(r"\.lora_[AB]\.weight$", "", theirs.removeprefix(_PREFIX))


def _whole_tensors(
  tensors: Tensors, cfg: DecoderConfig, fields: Mapping[str, Any], where: Path
) -> list[Slot]:
  """The tensors of the decoder that the file holds whole, in the place of the base's.

  They are those of `modules_to_save`, and the tables that peft adds where they grew.
  """
  shapes = hf_decoder.decoder_shapes(cfg)
  table = [
    slot._replace(theirs=_PREFIX + slot.theirs) for slot in slots(shapes, hf_decoder.rows(cfg))
  ]
  whole = [slot for slot in table if slot.theirs in tensors]
  saved = fields.get("modules_to_save") or []
  if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
    raise InputError(f"{where}: modules_to_save={shown(saved)}; accepted: a list of names")
  tables = [n for n in tensors if n.endswith(("embed_tokens.weight", "lm_head.weight"))]
  if cfg.tied_head and tables:
    raise InputError(
      f"{where}: {tables[0].removeprefix(_PREFIX)} saved whole over a base whose head is its token "
      "table; accepted: a base with a head of its own"
    )
  modules = {slot.theirs.removeprefix(_PREFIX).rpartition(".")[0] for slot in whole}
  for name in saved:
    if not any(f".{module}".endswith(f".{name}") for module in modules):
      raise InputError(
        f"{where}: modules_to_save names {shown(name)}, and {tensors.path.name} holds no tensor of "
        "the decoder for it"
      )
  for slot in whole:
    expected = their_shape(slot, shapes[slot.ours])
    if tensors.shape(slot.theirs) != expected:
      raise InputError(
        f"{tensors.path}: {slot.theirs} {list(tensors.shape(slot.theirs))} instead of "
        f"{list(expected)}, as the base has it"
      )
  return whole


class _Completed:
  """An adapter's tensors as if all had one rank and scale, and zeros for what it leaves alone.

  We stack what the file may adapt apart: k_proj and v_proj, gate_proj and up_proj, the layers.
  """

  def __init__(self, tensors: Safetensors, table: list[Slot], shapes: Shapes, scales: _Scales):
    self.path, self._tensors = tensors.path, tensors
    self._zeros: dict[str, tuple[int, ...]] = {}
    self._missing: dict[str, int] = {}  # rows of A, or columns of B, that are filled up
    self._factor: dict[str, float] = {}
    for slot in table:
      full = their_shape(slot, shapes[slot.ours])
      module = _module(slot.theirs)
      pair = (re.sub(r"\.lora_[AB]\.", f".lora_{letter}.", slot.theirs) for letter in "AB")
      if not any(name in tensors for name in pair):
        self._zeros[slot.theirs] = full
      elif slot.theirs in tensors:
        self._missing[slot.theirs] = scales.rank - scales.ranks[module]
        if ".lora_B." in slot.theirs:
          self._factor[slot.theirs] = scales.factor(module)
    scaled = any(factor != 1 for factor in self._factor.values())
    first = next((tensors.dtype(name) for name in tensors), np.dtype(np.float32))
    self._dtype = np.dtype(np.float32) if scaled else first

  def __iter__(self) -> Iterator[str]:
    return iter(sorted([*self._tensors, *self._zeros]))

  def __contains__(self, name: object) -> bool:
    return name in self._zeros or name in self._tensors

  def _padding(self, name: str) -> tuple[tuple[int, int], tuple[int, int]]:
    rows = (0, self._missing.get(name, 0))
    return ((0, 0), rows) if ".lora_B." in name else (rows, (0, 0))

  def shape(self, name: str) -> tuple[int, ...]:
    if name in self._zeros:
      return self._zeros[name]
    shape = self._tensors.shape(name)
    if not self._missing.get(name) or len(shape) != 2:
      return shape
    return tuple(n + more for n, (_, more) in zip(shape, self._padding(name), strict=True))

  def dtype(self, name: str) -> np.dtype:
    scaled = self._factor.get(name, 1.0) != 1
    return self._dtype if name in self._zeros or scaled else self._tensors.dtype(name)

  def read(self, name: str, index: tuple[int, ...] = ()) -> np.ndarray:
    if name in self._zeros:
      return np.zeros(self._zeros[name], self._dtype)[index]
    value = self._tensors.read(name)
    if (factor := self._factor.get(name, 1.0)) != 1:
      value = value.astype(np.float32) * np.float32(factor)
    if self._missing.get(name):
      value = np.pad(value, self._padding(name))
    return value[index]


def _adapted(tensors: Tensors, cfg: DecoderConfig) -> set[str]:
  """The matrices of ours for which the file holds factors."""
  adapted = set()
  for path, shape in hf_decoder.decoder_shapes(cfg).items():
    for slot in slots({path: shape}, hf_decoder.rows(cfg)):
      if _PREFIX + slot.theirs.replace(".weight", ".lora_A.weight") in tensors:
        adapted.add(path)
        break
  return adapted


def write_adapter(
  folder: str | Path, cfg: DecoderConfig, adapter: Mapping[str, Any], alpha: float
) -> None:
  """Writes factors (nested; paths as in `adapter`) as a PEFT folder."""
  folder = Path(folder)
  tree = Tree(adapter)
  made = outputs(slots(tree.shapes, rows(cfg)), tree.shapes)
  entries = {output.name: (output.shape, output.dtype(tree)) for output in made}
  writer = ShardWriter(folder, entries, stem="adapter_model")
  for output in made:
    writer.write(output.name, output.make(tree))
  rank = next(shape[-1] for path, shape in tree.shapes.items() if path.endswith("_lora_a"))
  fields = config_json([output.name for output in made], rank, alpha)
  (folder / "adapter_config.json").write_text(json.dumps(fields, indent=2) + "\n")


def config_json(names: Iterable[str], rank: int, alpha: float) -> dict[str, Any]:
  """The fields of adapter_config.json for an adapter of these tensors."""
  return {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": rank,
    "lora_alpha": alpha,
    "lora_dropout": 0.0,
    "bias": "none",
    "fan_in_fan_out": False,
    "target_modules": sorted({name.split(".")[-3] for name in names}),
    "base_model_name_or_path": None,
    "inference_mode": True,
  }


def read_adapter(folder: str | Path, cfg: DecoderConfig) -> tuple[dict[str, Any], float]:
  """(factors as a nested dict, alpha / r) of a PEFT folder; see `open_adapter`."""
  adapter = open_adapter(folder, cfg).factors_alone(folder)
  return nested(arrays(adapter.params)), adapter.scale
