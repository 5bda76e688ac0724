"""What a run starts from: the model's config, weights from elsewhere, tokenizer files.

A source is weights of any format that `vr_jax.interop.sources` knows: a checkpoint of ours, a
published VideoRefer folder or one of its stages' files, folders of transformers, a big_vision npz,
a Gemma folder. Each part of the model may come from another one, and the decoder's adapter from a
PEFT folder.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np
from ml_collections import ConfigDict

from data_pipes.errors import InputError, nearest
from data_pipes.prompts import turn_end
from data_pipes.tokenizer import Tokenizer
from vr_jax.checkpoint import (
  is_checkpoint,
  load_meta,
  read_tokenizer_files,
  tokenizer_files_of,
)
from vr_jax.configs import RECIPE
from vr_jax.interop import peft
from vr_jax.interop import videorefer as published
from vr_jax.interop.adapter import Adapter
from vr_jax.interop.big_vision import fit_positions
from vr_jax.interop.source import Source
from vr_jax.interop.sources import open_source
from vr_jax.interop.table import Part, arrays
from vr_jax.models.decoder import DecoderConfig
from vr_jax.models.lora import is_factor
from vr_jax.models.quantize import is_quantized
from vr_jax.models.variants import get_variant
from vr_jax.models.videorefer import PARTS, VideoReferConfig
from vr_jax.params import Params, nearest_rule
from vr_jax.weights import locate, weights_path


def model_config(config: ConfigDict) -> VideoReferConfig:
  """The model of a config: the variant `model_name` with the fields of `model` changed.

  Without a model_name, it is that of the first source in `model_init` that holds a whole one; the
  published one as long as no source is there.

  Raises:
    InputError: an unknown variant or field, a value of the wrong type, no model at all.
  """
  if config.model_name is not None:
    cfg = get_variant(config.model_name)
  else:
    cfg = _first_whole_model(config)
  for key, value in config.model:
    cfg = _replaced(cfg, key.split("."), value, f"config.model: {key}")
  return cfg


def _first_whole_model(config: ConfigDict) -> VideoReferConfig:
  sources = _sources(config)
  if sources and not any(path.exists() for path in sources):
    return get_variant(RECIPE["model"])  # to look at a recipe before its weights are here
  for path in sources:
    if is_checkpoint(path):
      return VideoReferConfig.from_dict(load_meta(path)["model"])
    if not peft.is_adapter(path) and (source := open_source(path)).whole:
      return source.model_config()
  raise InputError(
    "config.model_name is not set; give a variant, or a checkpoint of a whole model in model_init"
  )


def _sources(config: ConfigDict) -> list[Path]:
  """The paths of `model_init`, in order."""
  return [weights_path(path) for _, path in config.model_init]


def starting_params(config: ConfigDict, shapes: Params) -> Params:
  """The parameters that `model_init` names, checked against `shapes`: a part of the tree.

  Entries are ("", path) for all that the source holds or (part, path) for that part of it; later
  entries win. Parameters that match a regex of `dont_load` are left out. An adapter that a
  checkpoint holds stays apart if the model has one of its rank and alpha, else it is merged. A line
  on stdout for each part says where it comes from.

  Raises:
    InputError: a source lacks a parameter, has one too many or one of another shape; the message
      lists them.
  """
  target = flax.traverse_util.flatten_dict(shapes, sep="/")
  fresh = _left_out(config.dont_load, target)
  loaded: dict[str, Any] = {}
  origins: dict[str, str] = {}
  for part, path in config.model_init:
    llm = model_config(config).llm if any(map(is_factor, target)) else None
    source, params = _read(path, part, llm)
    notes = [*source.notes, *fit_tower(params, target)]
    if part == "llm":
      notes += fit_vocabulary(params, target)
    expected = _expected(params, target)
    _check_fit(f"config.model_init: {path}", params, target, expected, fresh)
    origin = f"{path} ({'; '.join([source.kind, *notes])})"
    for name in expected:
      if name not in fresh:
        # (What is kept in int8 is cast later, layer by layer.)
        int8 = is_quantized(target[name])
        loaded[name] = params[name] if int8 else params[name].astype(target[name].dtype)
        origins[name] = origin
  _print_origins(target, origins)
  return flax.traverse_util.unflatten_dict(loaded, sep="/")


def _left_out(rules: Sequence[str], target: Iterable[str]) -> set[str]:
  """The parameters that the regexes of `dont_load` name.

  Raises:
    InputError: a rule that matches none.
  """
  fresh: set[str] = set()
  for rule in rules:
    matched = {name for name in target if re.fullmatch(rule, name)}
    if not matched:
      raise InputError(
        f"config.dont_load: rule {rule} matches no parameter{nearest_rule(rule, target)}"
      )
    fresh |= matched
  return fresh


def _expected(params: Mapping[str, Any], target: Mapping[str, Any]) -> list[str]:
  """The parameters of the model that a source with `params` must give.

  A source that gives something of a part (img, connector, …) must give all of it, so that no part
  is half loaded. Adapters are the exception, both ways: a decoder without factors is whole, since
  those begin fresh; and factors alone, as PEFT folders hold them, owe no decoder.
  """
  parts = {name.split("/")[0] for name in params}
  factors_alone = all(map(is_factor, params))
  owed = {
    name
    for name in target
    if name.split("/")[0] in parts and not factors_alone and not is_factor(name)
  }
  return [name for name in target if name in params or name in owed]


def _check_fit(
  where: str,
  params: Mapping[str, Any],
  target: Mapping[str, Any],
  expected: Sequence[str],
  fresh: Set[str],
) -> None:
  """Refuses a source that lacks a parameter, has one too many or one of another shape.

  Parameters that begin `fresh` whatever the source holds may be missing or differ.

  Raises:
    InputError: the first five of what does not fit.
  """
  problems = [f"{k} is missing" for k in expected if k not in params and k not in fresh]
  problems += [f"{k} is not expected" for k in params if k not in target]
  problems += [
    f"{k} has shape {list(params[k].shape)} instead of {list(target[k].shape)}"
    for k in expected
    if k in params and k not in fresh and tuple(params[k].shape) != tuple(target[k].shape)
  ]
  if problems:
    more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
    raise InputError(f"{where}: {'; '.join(problems[:5])}{more}")


def _print_origins(target: Mapping[str, Any], origins: Mapping[str, str]) -> None:
  """A line for each part and where its parameters come from."""
  counts: dict[tuple[str, str], list[int]] = {}
  for path, leaf in target.items():
    row = counts.setdefault((path.split("/")[0], origins.get(path, "initialised")), [0, 0])
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
    path = locate(path).path
    source = _open_adapter(path, llm) if peft.is_adapter(path) else open_source(path)
  except InputError as error:
    raise InputError(f"config.model_init: {error}") from error
  if part and part not in source.parts:
    raise InputError(f"config.model_init: {path} holds {', '.join(source.parts)}, not {part!r}")
  if source.adapter and _same_adapter(source.adapter, llm):
    source = source.unmerged()
  params = Part(source.params, f"{part}/", f"{part}/") if part else source.params
  return source, arrays(params)


def _open_adapter(path: str | Path, llm: DecoderConfig | None) -> Source:
  """A PEFT folder as the adapter that a decoder begins with."""
  if llm is None:
    raise InputError(
      f"{path}: an adapter, and the model has none; set llm.lora_rank in config.model, or merge it "
      f"before: vr convert BASE MERGED --to vr --adapter {path}"
    )
  adapter = peft.open_adapter(path, llm).factors_alone(path)
  if not _same_adapter(adapter, llm):
    raise InputError(
      f"{path}: an adapter of rank {adapter.rank} and alpha {adapter.alpha:g}; the model has "
      f"llm.lora_rank={llm.lora_rank} and llm.lora_alpha={llm.lora_alpha:g}; accepted: the same"
    )
  return Source("PEFT adapter", Path(path), {"llm": llm}, Part(adapter.params, "", "llm/"))


def _same_adapter(adapter: Adapter, llm: DecoderConfig | None) -> bool:
  mine = None if llm is None else (llm.lora_rank, llm.lora_alpha)
  return (adapter.rank, adapter.alpha) == mine


def fit_tower(params: dict[str, Any], target: Mapping[str, Any]) -> list[str]:
  """Cuts a tower, in place, to what the model runs: its first layers, without norm and head.

  Position embeddings of another grid are resampled. Returns what was done.
  """
  changes = []
  for name in [k for k in params if k.startswith("img/")]:
    if name not in target and re.match(r"img/(Transformer/encoder_norm|MAPHead_0)/", name):
      del params[name]
    elif "/encoderblock/" in name and name in target:
      layers = target[name].shape[0]
      if len(params[name]) > layers:
        changes = [f"the first {layers} of {len(params[name])} layers"]
        params[name] = params[name][:layers]
  if fit_positions(params, target):
    changes.append("position embeddings resampled")
  return changes


def fit_vocabulary(params: dict[str, Any], target: Mapping[str, Any]) -> list[str]:
  """Gives the token tables of a decoder as many rows as the model has, in place.

  Released tables have spare rows, which the published code cuts off after adding `<region>`
  (Qwen2-7B: 152064 to 151647; `<region>` takes a formerly spare row). Rows that are missing become
  the mean of the others. Returns what was done.
  """
  changes = []
  for name in ("llm/embedder/input_embedding", "llm/embedder/output_embedding"):
    if name in params and name in target and len(params[name]) != target[name].shape[0]:
      table, rows = params[name], target[name].shape[0]
      mean = table.mean(0, keepdims=True, dtype=np.float32).astype(table.dtype)
      missing = np.repeat(mean, max(0, rows - len(table)), axis=0)
      params[name] = np.concatenate([table[:rows], missing])
      changes = [f"vocabulary {len(table)} to {rows} rows"]
  return changes


def tokenizer_files(config: ConfigDict) -> dict[str, bytes]:
  """The files of `config.tokenizer` (a folder), else of the first source that has some.

  Raises:
    InputError: there are none.
  """
  if config.tokenizer:
    return read_tokenizer_files(weights_path(config.tokenizer))
  for path in _sources(config):
    if is_checkpoint(path):
      if files := tokenizer_files_of(load_meta(path)):
        return files
    elif (path / "tokenizer_config.json").is_file():
      return read_tokenizer_files(path)
  sources = ", ".join(str(path) for _, path in config.model_init) or "none"
  raise InputError(
    "config.tokenizer is not set and no source in model_init has tokenizer files "
    f"(or is not there): {sources}"
  )


def generation(config: ConfigDict, tokenizer: Tokenizer) -> dict[str, Any]:
  """How to decode with the trained model: as the first source says that says how, whatever part of
  the model it is of; else until the tokenizer's eos.

  The token that ends a turn of the chat template ends an answer too, since training teaches it:
  Gemma's <end_of_turn>, where its folder names <eos> alone. Keys: eos_ids, pad_id,
  repetition_penalty.
  """
  settings = None
  folders = [weights_path(config.tokenizer)] if config.tokenizer else []
  for path in [*_sources(config), *folders]:
    if is_checkpoint(path):
      if stored := load_meta(path).get("generation"):
        return stored
    elif (path / "config.json").is_file() or (path / "generation_config.json").is_file():
      stated = published.generation(path)
      if settings is None and (stated.eos_ids or published.is_published(path)):
        settings = stated
  if settings is None:
    eos = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    settings = published.Generation(eos, tokenizer.pad_id)
  end = turn_end(tokenizer)
  if end is not None and end not in settings.eos_ids:
    settings = dataclasses.replace(settings, eos_ids=(*settings.eos_ids, end))
  return dataclasses.asdict(settings)


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
