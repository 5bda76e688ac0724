"""Stage 2 of PixelRefer: visual instruction tuning; all but the tower trains, at one rate.

    vr train --config configs/pixelrefer_stage2.py:data=DATA,init=W/stage1 --workdir W/stage2

DATA/pixelrefer_stage2.json is in the published SFT format (PixelRefer_stage2_trainingdata.json);
`init` is stage 1's work directory, or a published folder to go on from. lr 1e-5 throughout; all
else as in pixelrefer_stage1.py.
"""

from ml_collections import ConfigDict

from vr_jax.configs import as_arg, load_config, parse_arg

STAGE1 = {"data": "data", "model": "pixelrefer-2b", "pack": 16_384, "batch": 128, "rows": 1}


def get_config(arg: str | None = None) -> ConfigDict:
  """Stage 1's config from a whole model."""
  arg = parse_arg(arg, init="stage1", slices=1, **STAGE1)
  config = load_config(f"pixelrefer_stage1:{as_arg(arg, ('init', 'slices', *STAGE1))}")
  config.model_init = (("", arg.init),)
  config.tokenizer = None
  config.input.files = (f"{arg.data}/pixelrefer_stage2.json",)
  config.lr = 1e-5
  options = {"warmup_percent": 0.03, "decay": "cosine"}
  config.schedule = (("img/.*", None), (".*", options))
  return config
