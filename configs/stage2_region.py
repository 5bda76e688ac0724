"""Stage 2 of VideoRefer-7B: regions aligned with text; the region encoder alone trains.

    vr train --config configs/stage2_region.py:data=DATA,init=W/stage1 --workdir W/stage2

DATA/stage2.json holds VideoRefer-700K's short captions and referring-segmentation sets in the
published format (the published stage2.json itself was not released). `init` is stage 1's work
directory, or a published folder.

From the paper (appendix B.1): lr 1e-3, batch 256, one epoch, one mask frame an object. Which frame
is not published: here the first in which the object is seen (`input.single_frame`).

Hardware, by `vr compile` (2026-11-24; not run at full size here): eight H100 hold it in 4.8 GiB
each, 3.2 s a step, which is what gathering the weights 32 times takes: `rows=4` or more is faster.
"""

from ml_collections import ConfigDict

from vr_jax.configs import RECIPE, as_arg, load_config, parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
  """Stage 1's config with another trained part, other data and the chat template."""
  arg = parse_arg(arg, init="stage1", **RECIPE)
  config = load_config(f"stage1_align:{as_arg(arg, RECIPE)}")
  config.model_init = (("", arg.init),)
  config.input.files = (f"{arg.data}/stage2.json",)
  config.input.templated = True
  config.input.masks = "single"
  options = {"warmup_percent": 0.03, "decay": "cosine"}
  config.schedule = (("region/.*", options), (".*", None))
  return config
