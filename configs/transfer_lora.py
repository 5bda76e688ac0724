"""Your own data on one GPU: adapters in the decoder, connector and region encoder beside them.

    vr train --config configs/transfer_lora.py:data=DATA,init=VideoRefer-7B --workdir W/mine
    vr ask --checkpoint W/mine --video clip.mp4 --region box:40,60,200,220@0 --question '…'
    vr convert W/mine OUT --to peft       # the adapter alone, for the library peft

DATA/train.json is in the published format, media paths relative to DATA. `init` is `vr-mini`, a
published folder of any size (the model is the one it holds), a run of another stage, or a run of
this config to go on from (its adapter is taken over if `rank` is the same, else merged). With an
adapter in the PEFT format: --config.model_init="(('', 'VideoRefer-7B'), ('llm', 'ADAPTER'))".

Every matrix of the decoder has an adapter of rank `rank`, alpha is twice that; lr 2e-4, for the
connector and the region encoder a tenth of it (LLaVA's finetune_lora.sh, which has rank 128); batch
16, three epochs. `qlora` keeps the decoder's matrices in int8 (extra [int8]). What trains is
float32, all else bfloat16.

Hardware: one GPU. `vr compile --config transfer_lora --target gpu:h100:1x1` (2026-11-24): 31.2
GiB at the peak, of them 14.9 GiB frozen, which are 8.9 GiB with `qlora` (by count of bytes; its
peak was not compiled). A step of 16 rows cannot take less than 1.4 s on an H100 and takes about 3
s at the MFU of published runs (45 %): 1000 samples in 3 minutes. Not run at full size here. On
vr-mini (`model=vr-mini,rank=8`, lr 2e-3, batch 4) 60 steps took the loss on 80 dialogues in
another wording from 8.3 to 2.9 in two minutes on two busy cores.
"""

from ml_collections import ConfigDict

from vr_jax.configs import RECIPE, as_arg, load_config, parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
  """Stage 3's config with adapters in the place of the decoder."""
  arg = parse_arg(arg, **RECIPE | {"init": "stage3", "rank": 64, "qlora": False, "model": ""})
  recipe = [name for name in RECIPE if name != "model" or arg.model]
  config = load_config(f"stage3_instruct:{as_arg(arg, ('init', *recipe))}")
  config.model_name = arg.model or None
  config.model += (("llm.lora_rank", arg.rank), ("llm.lora_alpha", 2.0 * arg.rank))
  config.frozen_dtype = "int8" if arg.qlora else "bfloat16"
  config.input.files = (f"{arg.data}/train.json",)
  config.input.batch_size = 16
  config.total_epochs = 3.0
  config.lr = 2e-4
  options = {"warmup_percent": 0.03, "decay": "cosine"}
  beside = {**options, "peak": 0.1}
  config.schedule = ((".*_lora_[ab]", options), ("(connector|region)/.*", beside), (".*", None))
  config.ckpt_steps = 500
  return config
