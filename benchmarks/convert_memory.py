"""Resident memory of `vr convert` on a synthetic sharded checkpoint at the published widths.

    python benchmarks/convert_memory.py [--folder DIR] [--layers N]

Writes a published folder in bfloat16 (2 decoder layers: 4.7 GB in shards of 1 GB), converts it with
`vr convert --to vr --logits never` in a process of its own and prints its peak resident memory
beside the goal: 6 GB and the largest tensor. Each layer is a tensor of its own on one side and a
piece of a stacked one on the other, so the peak does not grow with the number of layers.
"""

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from vr_jax.interop import videorefer
from vr_jax.interop.table import outputs
from vr_jax.interop.writers import ShardWriter, size_of
from vr_jax.models.variants import get_variant
from vr_jax.models.videorefer import VideoReferConfig

GOAL = 6e9
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def published(layers: int) -> VideoReferConfig:
  """The published model with fewer decoder layers and no tower layer that does not run."""
  cfg = get_variant("videorefer-7b")
  return dataclasses.replace(
    cfg,
    llm=dataclasses.replace(cfg.llm, depth=layers),
    img=dataclasses.replace(cfg.img, depth=cfg.img.layers, select_layer=-1),
  )


def make(folder: Path, cfg: VideoReferConfig) -> tuple[int, int]:
  """Writes a folder in bfloat16; returns its bytes and those of its largest tensor."""
  shapes = videorefer.model_shapes(cfg)
  entries = {
    output.name: (output.shape, BFLOAT16)
    for output in outputs(videorefer.model_slots(cfg, shapes), shapes)
  }
  writer = ShardWriter(folder, entries, 1_000_000_000)
  block = np.random.default_rng(0).normal(size=1 << 22).astype(np.float32).astype(BFLOAT16)
  for name, (shape, _) in entries.items():
    writer.write(name, np.resize(block, shape))
  writer.finish()
  fields = videorefer.config_json(cfg, {}, {}, "bfloat16")
  fields["mm_vision_tower"] = "google/siglip-so400m-patch14-384"
  (folder / "config.json").write_text(json.dumps(fields))
  sizes = [size_of(*entry) for entry in entries.values()]
  return sum(sizes), max(sizes)


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--folder", help="where there is room for twice the size")
  parser.add_argument("--layers", type=int, default=2)
  args = parser.parse_args()
  folder = Path(tempfile.mkdtemp(dir=args.folder))
  try:
    total, largest = make(folder / "published", published(args.layers))
    command = ["-m", "vr_jax", "convert", str(folder / "published"), str(folder / "vr")]
    start = time.monotonic()
    process = subprocess.Popen(
      [sys.executable, *command, "--to", "vr", "--logits", "never"],
      env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
      sys.exit(f"vr convert failed with status {os.waitstatus_to_exitcode(status)}")
    seconds, peak = time.monotonic() - start, usage.ru_maxrss * 1024
    verdict = "met" if peak <= GOAL + largest else "NOT MET"
    print(
      f"convert_memory: {total / 1e9:.2f} GB in bfloat16, largest tensor {largest / 1e9:.2f} GB: "
      f"peak resident {peak / 1e9:.2f} GB (goal {(GOAL + largest) / 1e9:.2f}: {verdict}), "
      f"{seconds:.0f} s, {usage.ru_utime + usage.ru_stime:.0f} s of CPU"
    )
  finally:
    shutil.rmtree(folder)


if __name__ == "__main__":
  main()
