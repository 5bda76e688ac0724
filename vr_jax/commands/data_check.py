"""`vr data check`: validates annotation files and their media."""

import json
import sys
from dataclasses import dataclass, field

from data_pipes.check import Checks

DEFECTS = 2  # exit code


@dataclass(frozen=True)
class Files:
  files: tuple[str, ...] = field(
    metadata={"positional": True, "help": "a JSON array of items", "metavar": "FILE"}
  )
  report: str | None = field(
    default=None, metadata={"help": "and every finding in R.json.items.jsonl", "metavar": "R.json"}
  )
  fix: str | None = field(
    default=None,
    metadata={"help": "write cleaned copies and lists of changes there", "metavar": "DIR"},
  )
  jobs: int = field(default=2, metadata={"help": "threads (default: %(default)s)", "metavar": "N"})
  json: bool = field(default=False, metadata={"help": "print the summary as JSON"})


def run(options: Files, checks: Checks) -> int:
  from data_pipes import check

  summary = check.check(
    options.files,
    checks,
    jobs=options.jobs,
    report=options.report,
    fix=options.fix,
    progress=lambda text: sys.stderr.isatty() and print(text, file=sys.stderr),
  )
  print(json.dumps(summary, indent=2) if options.json else "\n".join(check.table(summary)))
  return DEFECTS if check.found_defects(summary) else 0
