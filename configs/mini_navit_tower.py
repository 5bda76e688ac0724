"""Pre-training of vr-mini-navit's tower on crowded pictures and crops of their things.

    vr train --config mini_navit_tower --workdir W/tower

It was not run to its end yet. A step takes 0.4 s of CPU; in 350 steps, with heads that began large,
the loss fell from 216 to 23 (2026-12-01).
"""

from ml_collections import ConfigDict

from vr_jax.configs import base_config, parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
  """`steps` optimizer steps on `pictures` of each of `crowds`, from vr-mini's tower or `init`."""
  arg = parse_arg(arg, steps=6000, crowds=240, pictures=40, batch=2, lr=1e-3, init="")
  config = base_config().unlock()
  config.task = "vr_jax.mini.pretrain_navit:zoom_task"
  config.model_name = "vr-mini-navit"
  if arg.init:
    config.model_init = (("img", arg.init),)
    config.dont_load = ("(states|looks|thing)/.*",)
  config.crowds = arg.crowds
  config.crowd_pictures = arg.pictures
  config.crowd_seed = 30_000_000
  config.total_steps = arg.steps
  config.input.batch_size = arg.batch
  config.input.threads = 2
  config.lr = arg.lr
  config.schedule = ((".*", {"warmup_steps": 100, "decay": "cosine"}),)
  config.wd = 0.01
  config.b2 = 0.98
  config.log_steps = 50
  config.ckpt_steps = 250
  return config.lock()
