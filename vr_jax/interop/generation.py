"""How a folder of transformers says that its model decodes: generation_config.json, both ways."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipes.errors import InputError
from vr_jax.interop.fields import IDS, positive, read_json, shown, size


@dataclasses.dataclass(frozen=True)
class Generation:
  """What generation_config.json asks of decoding: it holds for greedy decoding too.

  The repetition penalty falls on generated tokens only, never on the prompt.
  """

  eos_ids: tuple[int, ...]
  pad_id: int | None = None
  repetition_penalty: float = 1.0


def generation(folder: Path | str) -> Generation:
  """The settings in generation_config.json; where it is silent or absent, those in config.json."""
  folder = Path(folder)
  where = folder / "config.json"
  beside = (folder / "generation_config.json").is_file()
  fields = read_json(where) if where.is_file() or not beside else {}
  if beside:
    where = folder / "generation_config.json"
    fields |= read_json(where)
  pad = next(iter(_ids(fields, where, "pad_token_id")), None)
  penalty = positive(fields, where, "repetition_penalty", 1.0)
  return Generation(_ids(fields, where, "eos_token_id"), pad, penalty)


def _ids(fields: Mapping[str, Any], where: Path, key: str) -> tuple[int, ...]:
  """A token id or a list of them."""
  value = fields.get(key)
  if isinstance(value, list):
    if len(value) > 1000:
      raise InputError(f"{where}: {key}={shown(value)}; accepted: an id, or a list of a few")
    return tuple(size({key: one}, where, key, least=0, most=IDS) for one in value)
  return () if value is None else (size(fields, where, key, least=0, most=IDS),)


def generation_json(settings: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of generation_config.json; `generation` reads them back."""
  eos = list(settings.get("eos_ids") or ())
  return {
    "bos_token_id": settings.get("pad_id"),
    "do_sample": False,
    "eos_token_id": eos,
    "pad_token_id": settings.get("pad_id"),
    "repetition_penalty": settings.get("repetition_penalty") or 1.0,
  }
