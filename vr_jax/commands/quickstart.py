"""`vr quickstart`: the main job on the embedded default, from videos to a report."""

import contextlib
import json
import logging
import os
import subprocess
import sys
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Quickstart:
  workdir: str = field(default="vr-quickstart", metadata={"help": "default: %(default)s"})
  json: bool = field(default=False, metadata={"help": "print the results as JSON"})


def run(options: Quickstart) -> int | None:
  if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
    # Huge pages for the large buffers of a training step: a fifth of the CPU time. They are a
    # setting of the process, so it is started again.
    command = [sys.executable, "-m", "vr_jax", "quickstart", "--workdir", options.workdir]
    command += ["--json"] if options.json else []
    return subprocess.call(command, env={**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"})
  logging.basicConfig(format="%(message)s")
  from vr_jax.mini import quickstart

  # With --json the results alone go to stdout.
  with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
    results = quickstart.run(options.workdir)
  if options.json:
    print(json.dumps(results, indent=2))
  return None
