"""FLOPs that our 7B step executes over those the mathematics asks for; shapes only, a minute.

    python benchmarks/flop_overhead.py

The step is that of configs/stage*.py: `jax.make_jaxpr` of the real loss and its gradient on one
row, every trip of every scan counted. The rows are those of a VideoRefer-700K sample: 1 500 slots
with 100 supervised ones, 16 scene frames and 1 or 32 mask frames, or an image of 1 420 slots.
Needed are the FLOPs without recomputation, padding, double frames or the masked half of attention;
the backward pass costs two forward ones where weights train, one where gradients only pass, none
before.
"""

import functools
import time

# isort: split  (rows chooses the processors)
import jax
import jax.numpy as jnp
from rows import row

from vr_jax.configs import load_config
from vr_jax.flops import count_flops
from vr_jax.inference.generate import bucket
from vr_jax.models.costs import prefill_flops, training_flops
from vr_jax.models.decoder import KVCache
from vr_jax.models.videorefer import VideoRefer, init_params
from vr_jax.params import merge
from vr_jax.training.loss import model_loss
from vr_jax.training.schedule import split_by_table
from vr_jax.training.start import model_config
from vr_jax.training.videorefer_task import trained_parts

STAGES = {1: "stage1_align", 2: "stage2_region", 3: "stage3_instruct"}
SUPERVISED = 100
SAMPLES = {"video, 1 mask": (17, 1500), "video, 32 masks": (48, 1500), "image": (1, 1420)}


def batch(cfg, frames: int, length: int, rows: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes of rows with so many frames, one object and no padding."""
  S, N = cfg.img.image_size, cfg.img.grid**2
  shapes = {
    "frames": ((frames, S, S, 3), jnp.uint8),
    "scene": ((cfg.num_frames,), jnp.int32),
    "region_masks": ((1, frames, N), jnp.uint8),
    "region_frames": ((1, max(1, frames - cfg.num_frames)), jnp.int32),
    "tokens": ((length,), jnp.int32),
    "visual": ((length,), jnp.int32),
    "valid": ((length,), jnp.bool_),
    "supervised": ((length,), jnp.bool_),
  }
  return {k: jax.ShapeDtypeStruct((rows, *shape), dtype) for k, (shape, dtype) in shapes.items()}


def executed(config, cfg, frames: int, length: int) -> int:
  """FLOPs of the gradient of one row."""
  shapes = jax.eval_shape(functools.partial(init_params, cfg), jax.random.key(0))
  train, frozen = split_by_table(shapes, config.schedule)
  model = VideoRefer(cfg, trained=trained_parts(config, cfg))
  loss = model_loss(model, budget=SUPERVISED, chunk=config.loss_chunk)

  def step(train, frozen, rows):
    return jax.value_and_grad(lambda train: loss(merge(train, frozen), rows).sum)(train)

  return count_flops(step, train, frozen, batch(cfg, frames, length))


def needed(config, cfg, frames: int, length: int) -> int:
  """What that gradient needs."""
  scene = 1 if frames == 1 else cfg.num_frames
  return training_flops(cfg, trained_parts(config, cfg), frames, length, SUPERVISED, scene)


def inference() -> tuple[int, int]:
  """(executed, needed) FLOPs of a prefill: 16 frames, 1 mask, 1 426 slots in their bucket."""
  cfg = model_config(load_config(STAGES[3]))
  length = 1426
  slots = bucket(length)
  cache = jax.eval_shape(functools.partial(KVCache.empty, cfg.llm, 1, slots))
  prefill = functools.partial(VideoRefer(cfg).apply, method="prefill")
  params = jax.eval_shape(functools.partial(init_params, cfg), jax.random.key(0))
  flops = count_flops(prefill, {"params": params}, batch(cfg, 17, slots), cache)
  return flops, sum(prefill_flops(cfg, 17, length).values())


def main() -> None:
  start = time.perf_counter()
  for stage, name in STAGES.items():
    config = load_config(name)
    cfg = model_config(config)
    worst, details = 0.0, []
    for sample, (frames, length) in SAMPLES.items():
      done, need = executed(config, cfg, frames, length), needed(config, cfg, frames, length)
      worst = max(worst, done / need)
      details.append(f"{sample} {done / 1e12:.1f} / {need / 1e12:.1f} TF")
    row(f"flop.overhead{stage}", worst, "<= 1.05", detail="; ".join(details))
  done, need = inference()
  row(
    "flop.overhead_infer",
    done / need,
    "<= 1.05",
    detail=f"{done / 1e12:.1f} / {need / 1e12:.1f} TF",
  )
  print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
  main()
