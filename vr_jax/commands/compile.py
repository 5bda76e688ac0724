"""`vr compile`: the training step, compiled for hardware that is not here."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from vr_jax.commands.options import CONFIG

DOES_NOT_FIT = 3  # exit code


@dataclass(frozen=True)
class Compile:
  config: str = field(metadata=CONFIG)
  target: str = field(
    metadata={
      "help": "tpu:v5e:8x8, v5p, v6e (or a slice's name, tpu:v5e-64), gpu:h100:HOSTSxGPUS, "
      "gpu:h200:…"
    }
  )
  slices: int = field(default=1, metadata={"help": "TPU slices (default 1)", "metavar": "N"})
  quick: bool = field(
    default=False, metadata={"help": "compile 1 and 2 decoder layers and extrapolate"}
  )
  json: bool = field(default=False, metadata={"help": "print JSON"})


def run(options: Compile, overrides: Sequence[str]) -> int:
  from vr_jax.configs import load_config
  from vr_jax.hardware import parse_target, quiet
  from vr_jax.training.ahead_of_time import report

  target = parse_target(options.target, options.slices)
  quiet()
  config = load_config(options.config, overrides)
  result = report(options.config, config, target, quick=options.quick)
  print(json.dumps(result.to_dict(), indent=2) if options.json else result)
  return 0 if result.fits else DOES_NOT_FIT
