"""Stage 3 of VideoRefer-7B: visual instruction tuning; all but the tower trains.

    vr train --config configs/stage3_instruct.py:data=DATA,init=W/stage2p5 --workdir W/stage3

DATA/stage3.json holds VideoRefer-QA and the region, video and image instructions of the recipe in
the published format (the published file was not released). `init` is stage 2.5's work directory, or
the published VideoRefer-7B-stage2.5.

From the paper (appendix B.1): lr 2e-5 (the released scripts say 1e-5: `lr=1e-5`), batch 128, one
epoch, half of the samples with one mask frame and half with all. The paper's model then scores 71.9
on VideoRefer-Bench-Q and 3.42 on Bench-D in single-frame mode.

Hardware: as stage2p5_knowledge.py.
"""

from ml_collections import ConfigDict

from vr_jax.configs import RECIPE, as_arg, load_config, parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
  """Stage 2.5's config on the instruction data."""
  arg = parse_arg(arg, init="stage2p5", lr=2e-5, **RECIPE)
  config = load_config(f"stage2p5_knowledge:{as_arg(arg, ('init', 'lr', *RECIPE))}")
  config.input.files = (f"{arg.data}/stage3.json",)
  return config
