"""The configs of our parts, made from what a file says: every field known, typed and in range."""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipes.errors import InputError
from vr_jax.interop.fields import DEPTH, IDS, WIDTH, require, shown
from vr_jax.models.layer import ACTIVATIONS, DecoderConfig
from vr_jax.models.siglip import SiglipConfig
from vr_jax.models.videorefer import PARTS, VideoReferConfig, part_class, part_config
from vr_jax.remat import POLICIES

_WORDS = {
  "activation": tuple(ACTIVATIONS),
  "compare_dtype": ("float32", "bfloat16", "float16"),
  "dtype": ("float32", "bfloat16", "float16"),
  "layout": ("scanned",),  # fused is for inference and never stored
  "remat": ("none", *POLICIES),
}
_MOST = {"depth": DEPTH, "vocab_size": IDS, "window": IDS, "max_text_ids": IDS}
_LEAST = {"lora_rank": 0, "select_layer": -DEPTH}


def read_part(part: str, fields: Any, where: Path | str, *, adapters: bool = False) -> Any:
  """The config of a part (img, connector, region, llm) from its JSON fields.

  `adapters`: the decoder may have some.

  Raises:
    InputError: a field that is unknown, absent, of another type or out of range.
  """
  where_part = f"{where}: {part}"
  if not isinstance(fields, Mapping):
    raise InputError(f"{where_part}: {shown(fields)}; accepted: an object of fields")
  _check(part_class(part, fields), fields, where_part)
  if not adapters:
    require(fields, f"{where}: {part}", "lora_rank", (0,), 0)
  return checked(part_config(part, dict(fields)), f"{where}: {part}")


def read_settings(fields: Mapping[str, Any], where: Path | str) -> dict[str, Any]:
  """The fields of a whole model beside its parts (name, num_frames, …), checked."""
  _check(VideoReferConfig, fields, where, without=(*PARTS, "name"))
  return dict(fields)


def checked(cfg: Any, where: Path | str) -> Any:
  """The config of a part, its sizes checked against each other."""
  if isinstance(cfg, SiglipConfig) and cfg.patch_size > cfg.image_size:
    raise InputError(f"{where}: patches of {cfg.patch_size} pixels, images of {cfg.image_size}")
  for name, known in _WORDS.items():
    if getattr(cfg, name, known[0]) not in known:
      value = shown(getattr(cfg, name))
      raise InputError(f"{where}: {name}={value}; accepted: {', '.join(known)}")
  if not isinstance(cfg, DecoderConfig):
    return cfg
  if cfg.heads % cfg.kv_heads:
    raise InputError(
      f"{where}: {cfg.heads} heads, {cfg.kv_heads} key heads; accepted: a number that divides"
    )
  if cfg.head_dim % 2:
    raise InputError(f"{where}: heads of {cfg.head_dim}; accepted: an even width (rotary pairs)")
  if not cfg.pattern or set(cfg.pattern) - {"local", "global"}:
    raise InputError(f"{where}: pattern={shown(cfg.pattern)}; accepted: local, global")
  if "local" in cfg.layer_kinds() and cfg.window is None:
    raise InputError(f"{where}: local layers and no window; accepted: its number of slots")
  return cfg


def _check(cls: type, fields: Any, where: Path | str, without: tuple[str, ...] = ()) -> None:
  if not isinstance(fields, Mapping):
    raise InputError(f"{where}: {shown(fields)}; accepted: an object of fields")
  hints = typing.get_type_hints(cls)
  known = {f.name: f for f in dataclasses.fields(cls)}
  if odd := [name for name in fields if name not in known]:
    raise InputError(f"{where}: unknown field {shown(odd[0])}; accepted: {', '.join(known)}")
  for name, entry in known.items():
    if name in fields:
      _check_value(name, fields[name], hints[name], where)
    elif entry.default is dataclasses.MISSING and name not in without:
      raise InputError(f"{where}: no field {name}")


def _check_value(name: str, value: Any, hint: Any, where: Path | str) -> None:
  kinds = typing.get_args(hint) if typing.get_origin(hint) is types.UnionType else (hint,)
  kind = kinds[0]
  if value is None and types.NoneType in kinds:
    return
  least, most = _LEAST.get(name, 1), _MOST.get(name, WIDTH)
  if typing.get_origin(kind) is tuple:
    fits = isinstance(value, list | tuple) and all(isinstance(v, str) for v in value)
    accepted = "a list of words"
  elif kind is int:
    fits = type(value) is int and least <= value <= most
    accepted = f"a whole number from {least} to {most}"
  elif kind is float:
    fits = type(value) in (int, float) and 0 < value < math.inf
    accepted = "a finite number above 0"
  else:
    fits, accepted = type(value) is kind, kind.__name__
  if not fits:
    raise InputError(f"{where}: {name}={shown(value)}; accepted: {accepted}")
