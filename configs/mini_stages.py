"""The stages of the recipe on the embedded set, for vr-mini.

    vr train --config mini_stages:stage=1,data=W/set --workdir W/stage1
    vr train --config mini_stages:stage=2,data=W/set,init=W/stage1 --workdir W/stage2
    vr train --config mini_stages:stage=2.5,data=W/set,init=W/stage2 --workdir W/stage2.5
    vr train --config mini_stages:stage=3,data=W/set,init=W/stage2.5 --workdir W/stage3

`vr quickstart` makes the set and runs them. Stage 1 starts from the packaged tower and decoder
(mini_tower.py, mini_decoder.py). What trains in a stage is the paper's; learning rates and batch
are those of a small model.
"""

from ml_collections import ConfigDict

from data_pipes.errors import InputError
from vr_jax.assets import MINI_PARTS, VR_MINI
from vr_jax.configs import base_config, parse_arg
from vr_jax.models.videorefer import PARTS

# stage -> (file, steps, batch, learning rate, what trains). A model this small learns by the step:
# four rows teach it nearly what sixteen do. Stage 1 is short on purpose: with scene tokens that
# tell more, the frozen decoder of stage 2 guesses at the object instead of reading its tokens (the
# loss then stays at 0.4; otherwise it falls below 0.2).
STAGES = {
  "1": ("scene_captions.json", 40, 4, 2e-3, ("connector",)),
  "2": ("short_captions.json", 260, 4, 4e-3, ("region",)),
  "2.5": ("detailed_captions.json", 150, 4, 1e-3, ("connector", "region", "llm")),
  "3": ("qa.json", 520, 4, 1e-3, ("connector", "region", "llm")),
}


def get_config(arg: str | None = None) -> ConfigDict:
  """Stage `stage` on the set in folder `data`, from `init`; a 0 is the stage's own number."""
  arg = parse_arg(arg, stage="1", data="set", init="", steps=0, batch=0, lr=0.0)
  if arg.stage not in STAGES:
    raise InputError(f"argument stage={arg.stage!r}: accepted: {', '.join(STAGES)}")
  file, steps, batch, lr, trained = STAGES[arg.stage]
  config = base_config().unlock()
  config.model_name = "vr-mini"
  config.tokenizer = str(VR_MINI)
  config.model_init = (("", arg.init or str(MINI_PARTS)),)
  config.input.media = arg.data
  config.input.files = (f"{arg.data}/{file}",)
  config.input.batch_size = arg.batch or batch
  config.input.templated = arg.stage != "1"
  config.input.masks = "single" if arg.stage == "2" else "half"
  config.input.single_frame = "random"
  # With the order that "spread" gives seed 42, stage 1 ends where stage 2 stays at 0.46 (see
  # STAGES); with this one stage 2 falls to 0.25 by step 120 (2026-12-01).
  config.input.epoch_seeds = "consecutive"
  config.input.max_mask_frames = 8  # of the 31 annotated: half the tower's work
  config.input.threads = 2
  config.total_steps = arg.steps or steps
  config.lr = arg.lr or lr
  options = {"warmup_percent": 0.03, "decay": "cosine"}
  config.schedule = tuple((f"{p}/.*", options if p in trained else None) for p in PARTS)
  config.b2 = 0.98
  config.log_steps = 20
  config.ckpt_steps = 100
  return config.lock()
