"""Stage 1 of PixelRefer: objects; all but the tower trains, the region encoder 100 times as fast.

    vr train --config configs/pixelrefer_stage1.py:data=DATA,init=VIDEOLLAMA3 --workdir W/stage1

DATA/pixelrefer_stage1.json is in the published SFT format (PixelRefer_stage1_trainingdata.json),
paths relative to DATA. VIDEOLLAMA3 is the folder of DAMO-NLP-SG/VideoLLaMA3-2B-Image (or -7B with
model=pixelrefer-7b), which gives all but the region encoder; `tokenizer` names a folder whose files
have the token <REGION> too, such as PixelRefer-2B's. `model=pixelrefer-lite-2b` with PixelRefer-
Lite's data is Lite's stage 1, `model=videorefer-videollama3-2b` trains the model before.

From the scripts and the paper (arXiv 2510.23603): batch 256, one epoch, lr 1e-5 and 1e-3 for the
region encoder, 1 frame a second and at most 180, 8192 scene tokens, 16 384 ids. The published run
also computes the tower's gradients and multiplies them by 0; here it is frozen. It puts two samples
in a row of their own length; here rows of `pack` slots hold as many as fit, and `batch_size` counts
rows, by default about as many as hold 256 samples.
"""

from ml_collections import ConfigDict

from vr_jax.configs import base_config, parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
  """The whole recipe; stage 2 changes what differs."""
  arg = parse_arg(
    arg,
    data="data",
    init="videollama3",
    tokenizer="",
    model="pixelrefer-2b",
    pack=16_384,
    batch=128,
    rows=1,
    slices=1,
  )
  config = base_config()
  config.model_name = arg.model
  config.model = (
    ("img.dtype", "bfloat16"),
    ("connector.dtype", "bfloat16"),
    ("region.dtype", "bfloat16"),
    ("llm.dtype", "bfloat16"),
    ("img.compare_dtype", "bfloat16"),
    ("llm.remat", "full"),
  )
  config.model_init = tuple((part, arg.init) for part in ("img", "connector", "llm"))
  config.tokenizer = arg.tokenizer or arg.init
  config.frozen_dtype = "bfloat16"

  config.input.files = (f"{arg.data}/pixelrefer_stage1.json",)
  config.input.media = arg.data
  config.input.pack = arg.pack
  config.input.batch_size = arg.batch
  config.input.accum_steps = 0
  config.input.device_rows = arg.rows
  config.total_epochs = 1.0

  config.lr = 1e-3
  options = {"warmup_percent": 0.03, "decay": "cosine"}
  slow = {**options, "peak": 0.01}
  config.schedule = (("img/.*", None), ("region/.*", options), (".*", slow))
  config.mesh = (("data", arg.slices), ("fsdp", -1))
  return config
