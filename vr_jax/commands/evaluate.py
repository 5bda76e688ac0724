"""`vr eval`: a model's answers to a benchmark."""

import json
from dataclasses import dataclass, field

from vr_jax.commands.loading import Loading, load_model
from vr_jax.evaluation.benchmarks import registry
from vr_jax.evaluation.settings import Settings


@dataclass(frozen=True)
class Evaluation:
  benchmark: str = field(
    metadata={"positional": True, "help": "what is asked", "choices": registry.names}
  )
  data: str = field(metadata={"help": "the benchmark's folder or annotation file"})
  out: str = field(metadata={"help": "folder of the predictions", "metavar": "O"})
  media: str | None = field(
    default=None, metadata={"help": "folder that video paths start from (default: in --data)"}
  )
  split: str = field(default="", metadata={"help": "needed where a benchmark has several"})
  shard: str | None = field(
    default=None, metadata={"help": "the K-th of N parts of whole videos", "metavar": "K/N"}
  )
  limit: int | None = field(
    default=None, metadata={"help": "only N items, evenly over the types", "metavar": "N"}
  )
  json: bool = field(default=False, metadata={"help": "print run.json"})


def run(options: Evaluation, settings: Settings, loading: Loading) -> None:
  from vr_jax.evaluation.run import evaluate, parse_shard, say

  shard = parse_shard(options.shard)
  content = evaluate(
    load_model(loading),
    options.benchmark,
    options.data,
    options.out,
    settings,
    checkpoint=loading.checkpoint,
    media=options.media,
    split=options.split,
    shard=shard,
    limit=options.limit,
    progress=say,
  )
  print(json.dumps(content, indent=2) if options.json else f"{options.out}: {content['counts']}")
