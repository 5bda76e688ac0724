"""`vr compile`: the training step, or what answers, compiled for hardware that is not here."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from data_pipes.errors import InputError
from vr_jax.commands.options import CONFIG
from vr_jax.inference.options import BATCH_SIZE, NEW_TOKENS, SCENE_FRAMES, WEIGHTS

DOES_NOT_FIT = 3  # exit code


@dataclass(frozen=True)
class Compile:
  target: str = field(
    metadata={
      "help": "tpu:v5e:8x8, v5p, v6e (or a slice's name, tpu:v5e-64), gpu:h100:HOSTSxGPUS, h200, "
      "b200, a100-40, a100-80, l4, rtx4090"
    }
  )
  config: str | None = field(default=None, metadata=CONFIG)
  slices: int = field(default=1, metadata={"help": "TPU slices (default 1)", "metavar": "N"})
  quick: bool = field(
    default=False, metadata={"help": "compile 1 and 2 decoder layers and extrapolate"}
  )
  inference: bool = field(
    default=False,
    metadata={"help": "what vr ask runs with the config's model, not the training step"},
  )
  model: str | None = field(
    default=None, metadata={"help": "of --inference: a model by name in the place of --config"}
  )
  weights: str = field(default="bfloat16", metadata={"help": "of --inference", "choices": WEIGHTS})
  mesh: str | None = field(
    default=None,
    metadata={
      "help": "of --inference: data=N,tensor=M over the target's chips (default: all tensor)",
      "metavar": "AXES",
    },
  )
  batch_size: int = field(default=8, metadata=BATCH_SIZE)
  max_new_tokens: int = field(default=256, metadata=NEW_TOKENS)
  scene_frames: int | None = field(default=None, metadata=SCENE_FRAMES)
  json: bool = field(default=False, metadata={"help": "print JSON"})


def run(options: Compile, overrides: Sequence[str]) -> int:
  from vr_jax.hardware import parse_target, quiet

  target = parse_target(options.target, options.slices)
  quiet()
  if options.inference:
    result = _answering(options, overrides, target)
  elif options.config is None:
    raise InputError("--config is missing: which training step; or --inference --model NAME")
  else:
    from vr_jax.configs import load_config
    from vr_jax.training.ahead_of_time import report

    config = load_config(options.config, overrides)
    result = report(options.config, config, target, quick=options.quick)
  print(json.dumps(result.to_dict(), indent=2) if options.json else result)
  return 0 if result.fits else DOES_NOT_FIT


def _answering(options: Compile, overrides: Sequence[str], target):
  from vr_jax.configs import load_config
  from vr_jax.inference.ahead_of_time import report
  from vr_jax.inference.options import Options
  from vr_jax.inference.placement import mesh_axes
  from vr_jax.models.variants import get_variant
  from vr_jax.training.start import model_config

  if (options.config is None) == (options.model is None):
    raise InputError("--inference takes a model: --model NAME or --config F.py, one of them")
  if options.model is not None:
    name, cfg = options.model, get_variant(options.model)
  else:
    name, cfg = options.config, model_config(load_config(options.config, overrides))
  axes = {"data": 1, "tensor": target.chips} if options.mesh is None else mesh_axes(options.mesh)
  how = Options(
    batch_size=options.batch_size,
    max_new_tokens=options.max_new_tokens,
    scene_frames=options.scene_frames,
  )
  return report(
    name,
    cfg,
    target,
    weights=options.weights,
    mesh=tuple(axes.items()),
    options=how,
    quick=options.quick,
  )
