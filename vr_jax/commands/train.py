"""`vr train`: trains a config, or goes on with what is in the work directory."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from vr_jax.commands.options import CONFIG

STOPPED = 143  # the exit code of a training that was stopped and has saved


@dataclass(frozen=True)
class Train:
  config: str = field(metadata=CONFIG)
  workdir: str = field(metadata={"help": "folder of checkpoints and metrics"})


def run(options: Train, overrides: Sequence[str]) -> int:
  logging.basicConfig(format="%(message)s")
  logging.getLogger("vr_jax").setLevel(logging.INFO)
  from vr_jax.configs import load_config
  from vr_jax.program_cache import keep_on_disk
  from vr_jax.training.loop import train
  from vr_jax.training.processes import join

  config = load_config(options.config, overrides)
  join()
  keep_on_disk()
  return 0 if train(config, options.workdir).finished else STOPPED
