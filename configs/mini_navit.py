"""The two stages of PixelRefer on the embedded set, for vr-mini-navit.

    vr train --config mini_navit:stage=1,data=W/set,tower=W/tower --workdir W/stage1
    vr train --config mini_navit:stage=2,data=W/set,init=W/stage1 --workdir W/stage2

The tower is that of mini_navit_tower.py, the decoder begins as vr-mini's. What trains is as in
pixelrefer_stage1.py and pixelrefer_stage2.py, all but the tower: in stage 1 the region encoder ten
times as fast as the decoder, and so the connector, which PixelRefer finds trained. Rates, batch and
row length are those of a small model.

The stages were not run to their end yet, so that no vr-mini-navit is packaged. Once they are, the
result goes beside vr-mini:

    vr convert W/stage2 vr_jax/assets/vr-mini-navit --to vr --dtype bfloat16
"""

from ml_collections import ConfigDict

from data_pipes.errors import InputError
from vr_jax.assets import VR_MINI, VR_MINI_NAVIT
from vr_jax.configs import base_config, parse_arg

# stage -> (steps, learning rate, share of it that the decoder gets)
STAGES = {"1": (600, 4e-3, 0.1), "2": (1200, 1e-3, 1.0)}


def get_config(arg: str | None = None) -> ConfigDict:
  """Stage `stage` on the set in folder `data`; a 0 is the stage's own number."""
  arg = parse_arg(arg, stage="1", data="set", tower="tower", init="", steps=0, lr=0.0, batch=4)
  if arg.stage not in STAGES:
    raise InputError(f"argument stage={arg.stage!r}: accepted: {', '.join(STAGES)}")
  steps, lr, share = STAGES[arg.stage]
  config = base_config().unlock()
  config.model_name = "vr-mini-navit"
  config.tokenizer = str(VR_MINI_NAVIT)
  config.model_init = (("img", arg.tower), ("llm", str(VR_MINI)))
  if arg.init:
    config.model_init = (("", arg.init),)
  config.input.media = arg.data
  config.input.files = (f"{arg.data}/pixelrefer_stage{arg.stage}.json",)
  config.input.pack = 448
  config.input.batch_size = arg.batch
  config.input.threads = 2
  config.total_steps = arg.steps or steps
  config.lr = arg.lr or lr
  options = {"warmup_percent": 0.03, "decay": "cosine"}
  slow = {**options, "peak": share}
  config.schedule = (("img/.*", None), ("(connector|region)/.*", options), ("llm/.*", slow))
  config.b2 = 0.98
  config.log_steps = 20
  config.ckpt_steps = 100
  return config.lock()
