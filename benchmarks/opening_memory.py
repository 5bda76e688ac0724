"""Resident memory of opening weights: the peak over what stays, from a folder in bfloat16.

    python benchmarks/opening_memory.py [--folder DIR] [--width 1024] [--layers 12] [--full SRC]

Writes a published folder with a decoder of that size and opens it in processes of its own: on one
device in bfloat16 and in int8 (extra [int8]), and on eight CPU devices of which each has a share.
Prints for each the peak of resident memory over what the process had before and what its parameters
take afterwards, in units of the largest tensor. Goals: one device, weights + 2 GiB; eight devices,
1.1 times the shares and one tensor. `--full SRC` opens that folder instead and asks nothing.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from convert_memory import make

from vr_jax.assets import ASSETS, VR_MINI
from vr_jax.checkpoint import load_meta, tokenizer_files_of
from vr_jax.models.variants import get_variant
from vr_jax.models.videorefer import VideoReferConfig

OPEN = """
import json, resource, sys, threading, time
import jax
folder, weights, mesh = sys.argv[1:]
if mesh:
  jax.config.update("jax_num_cpu_devices", 8)
import vr_jax
from vr_jax.inference.placement import parse_mesh
jax.devices()
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
before, peak, done = resident(), 0, False

def watch():
  global peak
  while not done:
    peak = max(peak, resident())
    time.sleep(0.005)

thread = threading.Thread(target=watch)
thread.start()
start = time.monotonic()
options = {"mesh": parse_mesh(mesh)} if mesh else {}
model = vr_jax.load(folder, weights=weights, **options)
seconds = time.monotonic() - start
done = True
thread.join()
shares = {}
for leaf in jax.tree.leaves(model.params):
  for shard in leaf.addressable_shards:
    shares[shard.device.id] = shares.get(shard.device.id, 0) + shard.data.nbytes
print(json.dumps({"before": before, "peak": peak, "shares": shares, "seconds": seconds}))
"""


def sized(width: int, layers: int) -> VideoReferConfig:
  """The published model with a smaller decoder and tower."""
  cfg = get_variant("videorefer-7b")
  heads = width // 128
  llm = dataclasses.replace(
    cfg.llm, width=width, depth=layers, heads=heads, kv_heads=heads, mlp_dim=width * 11 // 2,
    vocab_size=32_000,
  )  # fmt: skip
  img = dataclasses.replace(cfg.img, depth=4, select_layer=-1)
  connector = dataclasses.replace(cfg.connector, kind="mlp2x_gelu", width=width)
  return dataclasses.replace(
    cfg, llm=llm, img=img, connector=connector, region=dataclasses.replace(cfg.region, width=width)
  )


def measure(folder: Path, weights: str, mesh: str, largest: int) -> None:
  done = subprocess.run(
    [sys.executable, "-c", OPEN, str(folder), weights, mesh],
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  measured = json.loads(done.stdout.splitlines()[-1])
  shares = list(measured["shares"].values())
  held, over = sum(shares), measured["peak"] - measured["before"] - sum(shares)
  goal = 0.1 * held + largest if mesh else 2 * 2**30
  verdict = "met" if over <= goal else "NOT MET"
  print(
    f"opening_memory: {weights}{' on ' + mesh if mesh else ''}: {held / 1e9:.2f} GB held"
    f"{f' (largest share {max(shares) / 1e9:.2f})' if mesh else ''}, peak {over / 1e9:.2f} GB over "
    f"it, {over / largest:.1f} largest tensors (goal {goal / 1e9:.2f} GB: {verdict}), "
    f"{measured['seconds']:.0f} s"
  )


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--folder", help="where there is room")
  parser.add_argument("--width", type=int, default=1024)
  parser.add_argument("--layers", type=int, default=12)
  parser.add_argument("--full", help="a folder to open instead")
  args = parser.parse_args()
  home = Path(tempfile.mkdtemp(dir=args.folder))
  try:
    folder, largest = Path(args.full or home / "published"), 151_647 * 3584 * 2
    if not args.full:
      total, largest = make(folder, sized(args.width, args.layers))
      for name, content in tokenizer_files_of(load_meta(ASSETS / VR_MINI.name)).items():
        (folder / name).write_bytes(content)
      print(f"opening_memory: a folder of {total / 1e9:.2f} GB, largest tensor {largest / 1e9:.2f}")
    int8 = ["int8"] if importlib.util.find_spec("qwix") else []
    for weights in ["bfloat16", *int8]:
      measure(folder, weights, "", largest)
    measure(folder, "bfloat16", "data=1,tensor=8" if not args.full else "data=2,tensor=4", largest)
  finally:
    shutil.rmtree(home)


if __name__ == "__main__":
  main()
