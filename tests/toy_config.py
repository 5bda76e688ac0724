"""Two epochs of the toy task, as `vr train --config tests/toy_config.py` would run them."""

from vr_jax.configs import base_config, parse_arg


def get_config(arg=None):
  arg = parse_arg(arg, lr=0.01)
  config = base_config()
  config.task = "toy_task:make"
  config.lr = arg.lr
  config.total_epochs = 2.0
  config.input.batch_size = 16
  config.input.accum_steps = 2
  config.schedule = (("tower/.*", None), (".*", {"warmup_percent": 0.1}))
  config.mesh = (("data", -1), ("fsdp", 2))
  config.sharding_strategy = ((".*", "fsdp(axis='fsdp', min_size_to_shard_mb=0)"),)
  config.ckpt_steps = 3
  config.log_steps = 1
  return config
