"""Stage 1 of VideoRefer-7B: images and videos aligned with text; the connector alone trains.

    vr train --config configs/stage1_align.py:data=DATA,siglip=SIGLIP,llm=QWEN --workdir W/stage1

DATA/stage1.json is in the published format, media paths relative to DATA; for other places set
--config.input.files="('a.json', 'b.json')" and --config.input.media=DIR. SIGLIP and QWEN are the
folders of google/siglip-so400m-patch14-384 and Qwen/Qwen2-7B-Instruct.

From the paper (arXiv 2501.00599, appendix B.1): lr 1e-3, batch 256, one epoch, 16 scene frames; the
plain text of the published scripts, which supervises the question too. The paper trains it on
VideoLLaMA2.1's stage-1 data (10 M videos, 600 K images).

Further arguments, of every stage (`vr_jax.configs.RECIPE`): `model=videorefer-gemma2-9b` and the
like, with `llm` that decoder's folder; `rows` of a device at a time; `slices` of TPUs; `tensor=4`
to split heads over four devices, `sequence` to split the slots of long videos over them too.

Hardware: any number of devices that divides the batch; the parameters are spread over all of them.
By `vr compile` (2026-11-24; not run at full size here) eight H100 hold it in 10.9 GiB each, about
5.8 s a step at 45 % MFU; docs/scaling.md has TPUs.
"""

from ml_collections import ConfigDict

from vr_jax.configs import RECIPE, base_config, parse_arg
from vr_jax.sharding import SEQUENCE_RULES, TENSOR_RULES, TENSOR_STRATEGY


def get_config(arg: str | None = None) -> ConfigDict:
  """The whole recipe stands here; the later stages change what differs."""
  arg = parse_arg(arg, siglip="siglip", llm="qwen2", **RECIPE)
  config = base_config()
  config.model_name = arg.model
  config.model = (
    ("img.dtype", "bfloat16"),
    ("connector.dtype", "bfloat16"),
    ("region.dtype", "bfloat16"),
    ("llm.dtype", "bfloat16"),
    ("connector.remat", "dots"),
    ("llm.remat", "dots"),
  )
  config.model_init = (("img", arg.siglip), ("llm", arg.llm))
  config.frozen_dtype = "bfloat16"

  config.input.files = (f"{arg.data}/stage1.json",)
  config.input.media = arg.data
  config.input.templated = False
  config.input.batch_size = 256
  config.input.accum_steps = 0
  config.input.device_rows = arg.rows
  config.total_epochs = 1.0
  config.loss_budget = 2048  # as many as a row has text ids

  config.lr = 1e-3
  options = {"warmup_percent": 0.03, "decay": "cosine"}
  config.schedule = (("connector/.*", options), (".*", None))

  config.mesh = (("data", arg.slices), ("fsdp", -1))
  if arg.tensor > 1:
    config.mesh += (("tensor", arg.tensor),)
    config.sharding_strategy = TENSOR_STRATEGY
    config.sharding_rules = SEQUENCE_RULES if arg.sequence else TENSOR_RULES
  config.ckpt_steps = 5000
  return config
