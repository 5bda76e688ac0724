"""`vr data check`: validates annotation files and their media."""

import json
import sys
from dataclasses import dataclass, field

from data_pipes.check import Checks
from data_pipes.check_report import Outputs, check, has_defects, table

DEFECTS = 2  # exit code


@dataclass(frozen=True)
class Files:
  files: tuple[str, ...] = field(
    metadata={"positional": True, "help": "a JSON array of items", "metavar": "FILE"}
  )
  json: bool = field(default=False, metadata={"help": "print the summary as JSON"})


def run(options: Files, checks: Checks, outputs: Outputs) -> int:
  summary = check(
    options.files,
    checks,
    outputs,
    progress=lambda text: sys.stderr.isatty() and print(text, file=sys.stderr),
  )
  print(json.dumps(summary, indent=2) if options.json else "\n".join(table(summary)))
  return DEFECTS if has_defects(summary) else 0
