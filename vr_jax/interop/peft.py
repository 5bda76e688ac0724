"""LoRA adapters of the decoder in the PEFT format: read and written.

Source: LoRA (arXiv 2106.09685); the files of the library peft (adapter_config.json,
adapter_model.safetensors).
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_pipes.errors import InputError
from vr_jax.interop import hf_decoder
from vr_jax.interop.adapter import Adapter
from vr_jax.interop.fields import read_json
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


def open_adapter(folder: str | Path, cfg: DecoderConfig) -> Adapter:
  """Opens a PEFT folder for a decoder.

  Raises:
    InputError: no adapter, one of another kind (DoRA, a bias, ranks that differ), or one whose
      tensors do not fit the decoder.
  """
  folder, cfg = Path(folder), dataclasses.replace(cfg, lora_rank=0)
  where = folder / "adapter_config.json"
  fields = read_json(where)
  features: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("peft_type", ("LORA",)),
    ("use_dora", (False, None)),
    ("bias", ("none", None)),
    ("use_rslora", (False, None)),
    ("fan_in_fan_out", (False, None)),
    ("rank_pattern", ({}, None)),
    ("alpha_pattern", ({}, None)),
  )
  for key, accepted in features:
    if fields.get(key, accepted[-1]) not in accepted:
      names = ", ".join(repr(a) for a in accepted if a is not None)
      raise InputError(f"{where}: {key}={fields.get(key)!r} is not supported; accepted: {names}")
  rank, alpha = fields.get("r"), fields.get("lora_alpha")
  if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
    raise InputError(f"{where}: r={rank!r}, lora_alpha={alpha!r}; accepted: numbers, r at least 1")
  tensors = Safetensors(folder / "adapter_model.safetensors")
  adapted = _adapted(tensors, cfg)
  shapes = adapter_shapes(cfg, rank, dict.fromkeys(adapted))
  table = list(slots(shapes, rows(cfg)))
  return Adapter(Mapped(_Completed(tensors, table, shapes), table, shapes), rank, float(alpha))


class _Completed:
  """An adapter's tensors, and zeros for what it leaves alone of a parameter of ours.

  We stack what the file may adapt apart: k_proj and v_proj, gate_proj and up_proj, the layers.
  """

  def __init__(self, tensors: Safetensors, table: list[Slot], shapes: Shapes):
    self.path, self._tensors = tensors.path, tensors
    self._zeros = {}
    for slot in table:
      pair = (re.sub(r"\.lora_[AB]\.", f".lora_{letter}.", slot.theirs) for letter in "AB")
      if not any(name in tensors for name in pair):
        self._zeros[slot.theirs] = their_shape(slot, shapes[slot.ours])
    self._dtype = next((tensors.dtype(name) for name in tensors), np.dtype(np.float32))

  def __iter__(self) -> Iterator[str]:
    return iter(sorted([*self._tensors, *self._zeros]))

  def __contains__(self, name: object) -> bool:
    return name in self._zeros or name in self._tensors

  def shape(self, name: str) -> tuple[int, ...]:
    return self._zeros[name] if name in self._zeros else self._tensors.shape(name)

  def dtype(self, name: str) -> np.dtype:
    return self._dtype if name in self._zeros else self._tensors.dtype(name)

  def read(self, name: str, index: tuple[int, ...] = ()) -> np.ndarray:
    if name in self._zeros:
      return np.zeros(self._zeros[name], self._dtype)[index]
    return self._tensors.read(name, index)


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
  adapter = open_adapter(folder, cfg)
  return nested(arrays(adapter.params)), adapter.scale
