"""`vr parity`: a golden-case folder of the published code through this code."""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Parity:
  folder: str = field(metadata={"positional": True, "help": "cases and their manifest"})
  stage: tuple[str, ...] = field(
    default=(), metadata={"repeat": True, "help": "such as 03_region", "metavar": "NAME"}
  )
  json: bool = field(default=False, metadata={"help": "print the results as JSON"})


def run(options: Parity) -> int:
  from vr_jax.parity.golden import FAIL, run_parity

  def report(result) -> None:
    if not options.json:
      print(result, flush=True)

  with _no_warnings():
    results = run_parity(options.folder, options.stage or None, report)
  if options.json:
    print(json.dumps([asdict(r) for r in results], indent=2))
  return int(any(r.status == FAIL for r in results))


@contextmanager
def _no_warnings() -> Iterator[None]:
  """Logged and raised warnings are dropped: those of golden cases are what the cases are about."""
  before = logging.root.manager.disable
  logging.disable(logging.WARNING)
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      yield
  finally:
    logging.disable(before)
