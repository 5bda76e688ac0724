"""`vr parity`: a golden-case folder of the published code through this code."""

import json
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

  results = run_parity(options.folder, options.stage or None, report)
  if options.json:
    print(json.dumps([asdict(r) for r in results], indent=2))
  return int(any(r.status == FAIL for r in results))
