"""How a folder of transformers says that its model decodes: generation_config.json, both ways."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vr_jax.interop.fields import field, read_json


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
  fields = read_json(folder / "config.json")
  if (folder / "generation_config.json").is_file():
    fields |= read_json(folder / "generation_config.json")
  eos = fields.get("eos_token_id")
  eos_ids = (eos,) if isinstance(eos, int) else tuple(eos or ())
  penalty = field(fields, folder / "generation_config.json", "repetition_penalty", float, 1.0)
  return Generation(eos_ids, fields.get("pad_token_id"), penalty)


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
