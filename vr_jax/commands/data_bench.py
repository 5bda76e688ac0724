"""`vr data bench`: times the input pipeline alone, stage by stage."""

import json
from dataclasses import dataclass, field

from vr_jax.commands.options import MEDIA, RECORDS


@dataclass(frozen=True)
class Bench:
  files: tuple[str, ...] = field(metadata=RECORDS)
  media: str = field(default=".", metadata=MEDIA)
  model: str = field(
    default="videorefer-7b", metadata={"help": "whose sizes (default: %(default)s)"}
  )
  tokenizer: str | None = field(
    default=None, metadata={"help": "default: that of the packaged vr-mini", "metavar": "DIR"}
  )
  masks: str = field(default="half", metadata={"help": "single, multi or half (default)"})
  samples: int = field(default=64, metadata={"help": "default: %(default)s", "metavar": "N"})
  threads: int = field(default=2, metadata={"help": "default: %(default)s", "metavar": "N"})
  json: bool = field(default=False, metadata={"help": "print the times as JSON"})


def run(options: Bench) -> None:
  from data_pipes import loader_bench
  from vr_jax.training.videorefer_task import bench_inputs

  for file in options.files:
    inputs = bench_inputs(file, options.model, options.tokenizer, options.masks)
    timed = loader_bench.Options(options.media, options.samples, options.threads)
    result = loader_bench.bench(*inputs, timed)
    lines = [file, *loader_bench.table(result)]
    print(json.dumps({"file": file, **result}, indent=2) if options.json else "\n".join(lines))
