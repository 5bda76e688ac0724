"""`vr data stats`: counts what annotation files and shards hold."""

from dataclasses import dataclass, field

from vr_jax.commands.options import RECORDS


@dataclass(frozen=True)
class Stats:
  files: tuple[str, ...] = field(metadata=RECORDS)
  html: str | None = field(
    default=None, metadata={"help": "write a page with plots", "metavar": "PAGE"}
  )
  json: bool = field(default=False, metadata={"help": "print the counts as JSON"})


def run(options: Stats) -> None:
  from data_pipes import stats

  result = stats.read_stats(options.files)
  print(stats.dumps(result) if options.json else "\n".join(stats.table(result)))
  if options.html:
    stats.write_page(options.html, result)
