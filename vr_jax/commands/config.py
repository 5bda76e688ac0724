"""`vr config`: resolves configs without running them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from data_pipes.errors import InputError
from vr_jax.commands.options import CONFIG


@dataclass(frozen=True)
class Config:
  what: str = field(
    metadata={
      "positional": True,
      "help": "what to print",
      "choices": ("show", "diff", "shapes", "shardings"),
    }
  )
  configs: tuple[str, ...] = field(metadata={**CONFIG, "positional": True})
  devices: int | None = field(
    default=None, metadata={"help": "shardings: of the mesh (default: those here)"}
  )
  json: bool = field(default=False, metadata={"help": "print JSON"})


def run(options: Config, overrides: Sequence[str]) -> None:
  from vr_jax import configs

  resolved = [configs.load_config(c, overrides) for c in options.configs]
  if options.what == "diff":
    if len(resolved) != 2:
      raise InputError(f"diff compares two configs; found {len(resolved)}")
    changes = configs.diff(*resolved)
    if options.json:
      print(json.dumps({key: [repr(v) for v in pair] for key, pair in changes.items()}, indent=2))
    else:
      print("\n".join(f"{key}: {a!r} -> {b!r}" for key, (a, b) in changes.items()))
    return
  for config in resolved:
    if options.what == "show":
      print(configs.to_json(config))
      continue
    from vr_jax.training import resolve

    if options.what == "shapes":
      lines = resolve.shapes(config)
    else:
      lines = resolve.shardings(config, options.devices)
    print(json.dumps(lines, indent=2) if options.json else resolve.table(lines))
