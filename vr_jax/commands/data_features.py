"""`vr data features`: caches what a frozen tower makes of prepared shards."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Features:
  shards: str = field(
    metadata={"positional": True, "help": "a folder of vr data prepare", "metavar": "SHARDS"}
  )
  checkpoint: str = field(metadata={"help": "whose tower; as in vr ask"})
  out: str = field(metadata={"help": "folder of the cache", "metavar": "CACHE"})
  config: str | None = field(
    default=None, metadata={"help": "whose mask mode, frames and seed", "metavar": "F.py[:ARGS]"}
  )
  frames: bool = field(
    default=False,
    metadata={"help": "of the scene frames too, so that the tower never runs"},
  )


def run(options: Features) -> None:
  from data_pipes.shards import ShardSet
  from vr_jax.configs import base_config, load_config
  from vr_jax.loading import load
  from vr_jax.training.feature_cache import frame_cache_size, make_cache, make_frame_cache
  from vr_jax.training.videorefer_task import row_rules

  model = load(options.checkpoint)
  config = load_config(options.config) if options.config else base_config()
  rules = row_rules(config, model.cfg)
  shards = ShardSet(options.shards)
  if options.frames:
    print(frame_cache_size(shards, model.cfg)[1], flush=True)
    count = make_frame_cache(options.out, shards, model.cfg, model.params, rules)
    print(f"{options.out}: features of {count} new scene frames")
  count = make_cache(options.out, shards, model.cfg, model.params, rules)
  print(f"{options.out}: object features of {count} samples")
