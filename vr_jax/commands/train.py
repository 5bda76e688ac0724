"""`vr train`: trains a config, or goes on with what is in the work directory."""

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from vr_jax.commands.options import CONFIG
from vr_jax.streams import lasting_streams

STOPPED = 143  # the exit code of a training that was stopped and has saved


@dataclass(frozen=True)
class Train:
  config: str = field(metadata=CONFIG)
  workdir: str = field(metadata={"help": "folder of checkpoints and metrics"})
  extend: bool = field(
    default=False, metadata={"help": "go on to another total than the run had; see docs/scaling.md"}
  )
  until: int | None = field(
    default=None, metadata={"help": "stop and save after so many steps", "metavar": "STEP"}
  )


def run(options: Train, overrides: Sequence[str]) -> int:
  with lasting_streams():
    logging.basicConfig(format="%(message)s")
    logging.getLogger("vr_jax").setLevel(logging.INFO)
    from vr_jax.configs import load_config
    from vr_jax.program_cache import keep_on_disk
    from vr_jax.training.loop import train
    from vr_jax.training.processes import join

    config = load_config(options.config, overrides)
    join()
    keep_on_disk()
    try:
      result = train(config, options.workdir, extend=options.extend, until=options.until)
    except KeyboardInterrupt:
      # Threads of XLA that are in the middle of a step do not survive the interpreter's end.
      sys.stderr.flush()
      os._exit(130)
    there = options.until is not None and result.step >= options.until
    return 0 if result.finished or there else STOPPED
