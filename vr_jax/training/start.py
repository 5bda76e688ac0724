"""What a run starts from: the model's config, weights from elsewhere, tokenizer files.

A source is weights of any format that `vr_jax.interop.sources` knows: a checkpoint of ours, a
published VideoRefer folder or one of its stages' files, folders of transformers, a big_vision npz,
a Gemma folder. Each part of the model may come from another one, and the decoder's adapter from a
PEFT folder.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np
from ml_collections import ConfigDict

from data_pipes.errors import InputError
from data_pipes.tokenizer import Tokenizer
from vr_jax.checkpoint import (
  is_checkpoint,
  load_meta,
  read_tokenizer_files,
  tokenizer_files_of,
)
from vr_jax.configs import nearest
from vr_jax.interop import peft
from vr_jax.interop import videorefer as published
from vr_jax.interop.big_vision import fit_positions
from vr_jax.interop.source import Source
from vr_jax.interop.sources import open_source
from vr_jax.interop.table import Joined, Part, arrays
from vr_jax.models.decoder import DecoderConfig
from vr_jax.models.lora import is_factor
from vr_jax.models.quantize import is_quantized
from vr_jax.models.variants import get_variant
from vr_jax.models.videorefer import VideoReferConfig
from vr_jax.params import Params

PARTS = ("img", "connector", "region", "llm")


def model_config(config: ConfigDict) -> VideoReferConfig:
  """The model of a config: the variant `model_name` with the fields of `model` changed.

  Without a model_name, it is the one that the first checkpoint of ours in `model_init` holds.

  Raises:
    InputError: an unknown variant or field, a value of the wrong type, no model at all.
  """
  if config.model_name is not None:
    cfg = get_variant(config.model_name)
  else:
    ours = [path for _, path in config.model_init if is_checkpoint(path)]
    if not ours:
      raise InputError(
        "config.model_name is not set; give a variant, or a checkpoint of vr_jax in model_init"
      )
    cfg = VideoReferConfig.from_dict(load_meta(ours[0])["model"])
  for key, value in config.model:
    cfg = _replaced(cfg, key.split("."), value, f"config.model: {key}")
  return cfg


def starting_params(config: ConfigDict, shapes: Params) -> Params:
  """The parameters that `model_init` names, checked against `shapes`: a part of the tree.

  Entries are ("", path) for all that the source holds or (part, path) for that part of it; later
  entries win. Parameters that match a regex of `dont_load` are left out. An adapter that a
  checkpoint holds stays apart if the model has one of its rank and alpha, else it is merged. Says
  on stdout what comes from where.

  Raises:
    InputError: a source lacks a parameter, has one too many or one of another shape; the message
      lists them.
  """
  wanted = flax.traverse_util.flatten_dict(shapes, sep="/")
  fresh = {k for k in wanted if any(re.fullmatch(p, k) for p in config.dont_load)}
  loaded: dict[str, Any] = {}
  came: dict[str, str] = {}
  for part, path in config.model_init:
    llm = model_config(config).llm if any(map(is_factor, wanted)) else None
    source, found = _read(path, part, llm)
    changes = fit_tower(found, wanted)
    if part == "llm":
      changes += fit_vocabulary(found, wanted)
    held = {k.split("/")[0] for k in found}
    alone = all(map(is_factor, found))  # an adapter
    needed = {k for k in wanted if k.split("/")[0] in held and not (alone or is_factor(k))}
    expected = [k for k in wanted if k in found or k in needed]
    problems = [f"{k} is missing" for k in expected if k not in found and k not in fresh]
    problems += [f"{k} is not expected" for k in found if k not in wanted]
    problems += [
      f"{k} has shape {list(found[k].shape)} instead of {list(wanted[k].shape)}"
      for k in expected
      if k in found and k not in fresh and tuple(found[k].shape) != tuple(wanted[k].shape)
    ]
    if problems:
      more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
      raise InputError(f"config.model_init: {path}: {'; '.join(problems[:5])}{more}")
    # (What is kept in int8 is cast there, layer by layer.)
    loaded |= {
      k: found[k] if is_quantized(wanted[k]) else found[k].astype(wanted[k].dtype)
      for k in expected
      if k not in fresh
    }
    told = "".join(f"; {line}" for line in (*source.notes, *changes))
    came |= {k: f"{path} ({source.kind}{told})" for k in expected if k not in fresh}
  _print_origins(wanted, came)
  return flax.traverse_util.unflatten_dict(loaded, sep="/")


def _print_origins(wanted: Mapping[str, Any], came: Mapping[str, str]) -> None:
  """A line for each part and where its parameters come from."""
  counts: dict[tuple[str, str], list[int]] = {}
  for path, leaf in wanted.items():
    row = counts.setdefault((path.split("/")[0], came.get(path, "initialised")), [0, 0])
    row[0] += 1
    row[1] += math.prod(leaf.shape)
  if jax.process_index() == 0:
    for (part, origin), (tensors, size) in counts.items():
      print(f"model_init: {part:9} {tensors:4} arrays {size:13,} parameters from {origin}")


def _read(path: str | Path, part: str, llm: DecoderConfig | None) -> tuple[Source, dict[str, Any]]:
  """A source and its parameters by path; only those of `part` ("img", …) if given.

  A tower that holds more than the model runs, as SigLIP folders do, gives what is run. `llm`: the
  model's decoder, if it has adapters.

  Raises:
    InputError: no source, or one without that part.
  """
  if part and part not in PARTS:
    raise InputError(f"config.model_init: part {part!r}: accepted: {', '.join(PARTS)}, or ''")
  try:
    source = _open_adapter(path, llm) if peft.is_adapter(path) else open_source(path)
  except InputError as error:
    raise InputError(f"config.model_init: {error}") from error
  if part and part not in source.parts:
    raise InputError(f"config.model_init: {path} holds {', '.join(source.parts)}, not {part!r}")
  params, adapter = source.params, source.adapter
  if adapter and isinstance(params, peft.Merged) and _same_adapter(adapter, llm):
    params = Joined(params.base, Part(adapter.params, "", "llm/"))
    source = dataclasses.replace(source, notes=source.notes[:-1])  # that it is merged
  return source, arrays(Part(params, f"{part}/", f"{part}/") if part else params)


def _open_adapter(path: str | Path, llm: DecoderConfig | None) -> Source:
  """A PEFT folder as the adapter that a decoder begins with."""
  if llm is None:
    raise InputError(
      f"{path}: an adapter, and the model has none; set llm.lora_rank in config.model, or merge it "
      f"before: vr convert BASE MERGED --to vr --adapter {path}"
    )
  adapter = peft.open_adapter(path, llm)
  if not _same_adapter(adapter, llm):
    raise InputError(
      f"{path}: an adapter of rank {adapter.rank} and alpha {adapter.alpha:g}; the model has "
      f"llm.lora_rank={llm.lora_rank} and llm.lora_alpha={llm.lora_alpha:g}; accepted: the same"
    )
  return Source("PEFT adapter", Path(path), {"llm": llm}, Part(adapter.params, "", "llm/"))


def _same_adapter(adapter: peft.Adapter, llm: DecoderConfig | None) -> bool:
  mine = None if llm is None else (llm.lora_rank, llm.lora_alpha)
  return (adapter.rank, adapter.alpha) == mine


def fit_tower(found: dict[str, Any], wanted: Mapping[str, Any]) -> list[str]:
  """Cuts a tower, in place, to what the model runs: its first layers, without norm and head.

  Position embeddings of another grid are resampled. Returns what was done.
  """
  changes = []
  for name in [k for k in found if k.startswith("img/")]:
    if name not in wanted and re.match(r"img/(Transformer/encoder_norm|MAPHead_0)/", name):
      del found[name]
    elif "/encoderblock/" in name and name in wanted:
      layers = wanted[name].shape[0]
      if len(found[name]) > layers:
        changes = [f"the first {layers} of {len(found[name])} layers"]
        found[name] = found[name][:layers]
  if fit_positions(found, wanted):
    changes.append("position embeddings resampled")
  return changes


def fit_vocabulary(found: dict[str, Any], wanted: Mapping[str, Any]) -> list[str]:
  """Gives the token tables of a decoder as many rows as the model has, in place.

  Released tables have spare rows, which the published code cuts off after adding `<region>`
  (Qwen2-7B: 152064 to 151647; `<region>` takes a formerly spare row). Rows that are missing become
  the mean of the others. Returns what was done.
  """
  changes = []
  for name in ("llm/embedder/input_embedding", "llm/embedder/output_embedding"):
    if name in found and name in wanted and len(found[name]) != wanted[name].shape[0]:
      table, rows = found[name], wanted[name].shape[0]
      mean = table.mean(0, keepdims=True, dtype=np.float32).astype(table.dtype)
      missing = np.repeat(mean, max(0, rows - len(table)), axis=0)
      found[name] = np.concatenate([table[:rows], missing])
      changes = [f"vocabulary {len(table)} to {rows} rows"]
  return changes


def tokenizer_files(config: ConfigDict) -> dict[str, bytes]:
  """The files of `config.tokenizer` (a folder), else of the first source that has some.

  Raises:
    InputError: there are none.
  """
  if config.tokenizer:
    return read_tokenizer_files(config.tokenizer)
  for _, path in config.model_init:
    if is_checkpoint(path):
      if files := tokenizer_files_of(load_meta(path)):
        return files
    elif (Path(path) / "tokenizer_config.json").is_file():
      return read_tokenizer_files(path)
  sources = ", ".join(str(path) for _, path in config.model_init) or "none"
  raise InputError(
    "config.tokenizer is not set and no source in model_init has tokenizer files "
    f"(or is not there): {sources}"
  )


def generation(config: ConfigDict, tokenizer: Tokenizer) -> dict[str, Any]:
  """How to decode with the trained model: as the first source says, else until the tokenizer's eos.

  Keys: eos_ids, pad_id, repetition_penalty.
  """
  for _, path in config.model_init:
    if is_checkpoint(path) and (stored := load_meta(path).get("generation")):
      return stored
    if published.is_published(path):
      return dataclasses.asdict(published.generation(path))
  eos = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
  return dataclasses.asdict(published.Generation(eos, tokenizer.pad_id))


def _replaced(cfg: Any, names: list[str], value: Any, where: str) -> Any:
  """A frozen dataclass with the field at a dotted path changed."""
  name, *rest = names
  fields = {field.name for field in dataclasses.fields(cfg)}
  if name not in fields:
    raise InputError(f"{where}: no such field{nearest(name, fields)}")
  old = getattr(cfg, name)
  if rest:
    if not dataclasses.is_dataclass(old):
      raise InputError(f"{where}: {name!r} has no fields")
    return dataclasses.replace(cfg, **{name: _replaced(old, rest, value, where)})
  accepted = (int, float) if isinstance(old, float) else type(old)
  if old is not None and value is not None and not isinstance(value, accepted):
    raise InputError(f"{where}={value!r}: expected {type(old).__name__}")
  return dataclasses.replace(cfg, **{name: value})
