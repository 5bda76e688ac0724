"""Pre-training of vr-mini's decoder on words about simulated scenes (no pixels).

    vr train --config mini_decoder --workdir W/decoder

Two CPU cores. The packaged decoder went on with `steps=2500,lr=1e-3,init=…` for 25 minutes
(2026-11-24); its last loss was not written down.
"""

from ml_collections import ConfigDict

from vr_jax.assets import VR_MINI
from vr_jax.configs import base_config, parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
  """`steps` optimizer steps on the dialogues of `corpus` scenes, from decoder `init` if given."""
  arg = parse_arg(arg, steps=6000, corpus=32_000, batch=16, lr=2e-3, init="")
  config = base_config().unlock()
  config.task = "vr_jax.mini.pretrain_decoder:decoder_task"
  config.model_name = "vr-mini"
  config.tokenizer = str(VR_MINI)
  if arg.init:
    config.model_init = (("llm", arg.init),)
    config.dont_load = ("states/.*",)
  config.corpus = arg.corpus
  config.corpus_seed = 2_000_000
  config.total_steps = arg.steps
  config.input.batch_size = arg.batch
  config.input.row_length = 240
  config.input.threads = 2
  config.loss_budget = 112
  config.lr = arg.lr
  config.schedule = ((".*", {"warmup_steps": 200, "decay": "cosine"}),)
  config.wd = 0.01
  config.b2 = 0.98
  config.log_steps = 50
  config.ckpt_steps = 250
  return config.lock()
