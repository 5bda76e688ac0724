"""Three epochs of packed rows from prepared shards, as `vr train` would run them."""

from vr_jax.configs import base_config, parse_arg


def get_config(arg=None):
  arg = parse_arg(arg, shards="", model="")
  config = base_config()
  config.task = "shards_task:make"
  config.model_init = (("", arg.model),)
  config.input.files = (arg.shards,)
  config.input.batch_size = 4
  config.input.pack = 256
  config.input.masks = "half"
  config.input.single_frame = "random"
  config.total_epochs = 3.0
  config.schedule = (("(img|llm)/.*", None), (".*", {"decay": "constant"}))
  config.ckpt_steps = 2
  config.log_steps = 1
  return config
