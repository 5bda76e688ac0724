"""`vr data import`: masks and texts of other tools and sets as items of our annotation format."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from data_pipes.importers.formats import FORMATS, import_items


@dataclass(frozen=True)
class Import:
  source: Path = field(
    metadata={"positional": True, "help": "its file, or the folder of the set", "metavar": "SRC"}
  )
  format: str = field(
    metadata={"flag": "--from", "help": "the format of SRC", "choices": tuple(FORMATS)}
  )
  out: Path = field(metadata={"help": "the annotation file", "metavar": "F.json"})
  captions: Path | None = field(
    default=None, metadata={"help": "a file of texts about the media or objects"}
  )
  media: Path | None = field(
    default=None,
    metadata={"help": "where the media lie (default: the folder of SRC)", "metavar": "DIR"},
  )
  json: bool = field(default=False, metadata={"help": "print the summary as JSON"})


def run(options: Import) -> None:
  summary = import_items(
    options.source, options.format, options.out, options.captions, options.media
  )
  if options.json:
    print(json.dumps(summary, indent=2))
    return
  print(
    f"{options.out}: {summary['items']} items about {summary['media']} media, "
    f"{summary['objects']} objects"
  )
  for what, counts in summary["left"].items():
    print(f"left out: {counts['count']} {what}; first: {counts['first']}")
