"""Rows 6 and 7: what the compilers say of the full-size step. Nothing is run on a device.

    python benchmarks/compiled.py vocabulary   # row 7, seconds
    python benchmarks/compiled.py step         # row 6: 7B stage 3 on v5e-64; minutes, [compile]

Row 6, `aot.v5e64.peak_gib`: stage 3 of videorefer-7b compiled for tpu:v5e:8x8, batch 128 rows of
1536 slots, remat dots. `aot.coll_x`: collective bytes of the same step compiled for gpu:h100:8x8
(TPU programs print a reduce-scatter as an all-reduce and a slice) over 3 x 2 bytes x parameters.
Row 7, `aot.vocab_buf_gib`: the largest array along the vocabulary, or along a chunk of it, in the
loss and its gradients for 4096 supervised slots a device, head spread over 8 devices.
"""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vr_jax.configs import base_config, load_config
from vr_jax.hardware import parse_target, quiet
from vr_jax.hlo import Program
from vr_jax.models.embedder import Embedder
from vr_jax.models.variants import DECODERS
from vr_jax.sharding import FSDP_RULES, make_mesh
from vr_jax.training.ahead_of_time import GIB, report
from vr_jax.training.loss import supervised_loss

DEVICES, ROWS, SLOTS = 8, 2, 2049  # the last slot predicts nothing


def vocabulary_buffer(decoder: str, size: int) -> tuple[float, str]:
  """GiB and type of the largest array along a vocabulary of that size."""
  jax.config.update("jax_num_cpu_devices", DEVICES)
  cfg = dataclasses.replace(DECODERS[decoder], vocab_size=size, dtype="bfloat16")
  mesh = make_mesh([("data", 1), ("fsdp", DEVICES)])
  chunk = base_config().loss_chunk

  def loss(params, hidden, tokens, supervised):
    def logits(states, rows=None):
      head = Embedder(cfg, FSDP_RULES)
      return head.apply({"params": params}, states, rows, method="decode")

    return supervised_loss(hidden, tokens, supervised, logits, chunk=chunk).sum

  def struct(shape, dtype, spec):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

  B = ROWS * DEVICES
  table = struct((size, cfg.width), jnp.float32, P(None, "fsdp"))
  names = ["input_embedding", "output_embedding"][: 2 - cfg.tied_head]
  args = (
    dict.fromkeys(names, table),
    struct((B, SLOTS, cfg.width), jnp.bfloat16, P("fsdp")),
    struct((B, SLOTS), jnp.int32, P("fsdp")),
    struct((B, SLOTS), jnp.bool_, P("fsdp")),
  )
  with jax.set_mesh(mesh):
    step = jax.jit(
      jax.grad(loss, (0, 1)), out_shardings=(args[0]["input_embedding"].sharding, None)
    )
    text = step.lower(*args).compile().as_text()
  bytes_, shape = Program(text).largest(size, chunk)
  return bytes_ / GIB, shape


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("row", choices=["vocabulary", "step"])
  args = parser.parse_args()
  quiet()
  if args.row == "vocabulary":
    for decoder, size in (("qwen2-7b", 152_064), ("gemma2-9b", 256_000)):
      gib, shape = vocabulary_buffer(decoder, size)
      print(f"7 aot.vocab_buf_gib  {gib:.3f}  V={size}, {shape}  goal <= 0.5", flush=True)
    return
  config = load_config("stage3_instruct:rows=2")
  on_gpu = report("stage3_instruct:rows=2", config, parse_target("gpu:h100:8x8"))
  times = on_gpu.collective_bytes / on_gpu.fsdp_minimum
  exchanges = on_gpu.measured.collectives.get("all-to-all", (0, 0))
  print(f"6 aot.coll_x  {times:.3f}, {exchanges[0]} all-to-all  goal <= 1.15, 0", flush=True)
  on_tpu = report("stage3_instruct:rows=2", config, parse_target("tpu:v5e:8x8"))
  print(f"6 aot.v5e64.peak_gib  {(on_tpu.measured.peak or jnp.inf) / GIB:.2f}  goal <= 14.5")


if __name__ == "__main__":
  main()
