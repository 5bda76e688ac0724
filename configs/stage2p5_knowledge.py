"""Stage 2.5 of VideoRefer-7B: high-quality knowledge; all but the tower trains.

    vr train --config configs/stage2p5_knowledge.py:data=DATA,init=W/stage2 --workdir W/stage2p5

DATA/stage2p5.json holds VideoRefer-700K's detailed captions and the image and video captions of the
recipe in the published format (the published file was not released). `init` is stage 2's work
directory: Qwen2-7B-Instruct with stage 1's connector and stage 2's region encoder.

From the paper (appendix B.1): lr 2e-5 (the released scripts say 1e-5: `lr=1e-5`), batch 128, one
epoch, half of the samples with one mask frame and half with all (how they are drawn is not
published: here by a hash of the sample's number).

Hardware, by `vr compile` (2026-11-24; nothing of this size was run here): the smallest tried are
eight H100 (28.9 GiB each; about 3.6 s a step at 45 % MFU) and sixteen v6e or v5p chips (16.7 GiB
each; 2.2 s by the links of v6e, 3.2 s at 55 % MFU on v5p).
"""

from ml_collections import ConfigDict

from vr_jax.configs import RECIPE, as_arg, load_config, parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
  """Stage 2's config with the decoder and the connector trained as well."""
  arg = parse_arg(arg, init="stage2", lr=2e-5, **RECIPE)
  config = load_config(f"stage2_region:{as_arg(arg, ('init', *RECIPE))}")
  config.input.files = (f"{arg.data}/stage2p5.json",)
  config.input.masks = "half"
  config.input.batch_size = 128
  config.lr = arg.lr
  options = {"warmup_percent": 0.03, "decay": "cosine"}
  config.schedule = (("img/.*", None), (".*", options))
  return config
