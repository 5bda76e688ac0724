"""Our decoder against `transformers` generate: a Gemma-shaped one of 106 M parameters, fp32, CPU.

    python benchmarks/decoder_speed.py                    # extra [torch]; 3 to 10 minutes

Both sides hold the same random weights. First they must agree: the logits after the prompt within
1e-4 of the largest, and every greedy token. Prefill is the time to the first token, decoding that
from there to the last; both sides read the same weights, so decoding one row is bound by the
memory: its bytes a second stand beside a measured copy.
"""

import functools
import os
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import rows
import torch
import transformers
from rows import NAN, alternate, ratio, row, typical

from vr_jax.inference.generate import Generator, generate
from vr_jax.interop import hf_decoder
from vr_jax.models.decoder import Decoder
from vr_jax.models.fused import fuse

PROMPT, NEW = 512, 33  # tokens; the first new one is the prefill's
GOALS = {("prefill", 1): 1.3, ("prefill", 8): 1.6, ("decode", 1): 1.0, ("decode", 8): 1.15}
CONFIG = transformers.GemmaConfig(
  hidden_size=640,
  num_hidden_layers=9,
  num_attention_heads=4,
  num_key_value_heads=1,
  head_dim=256,
  intermediate_size=4096,
  vocab_size=32_000,
  eos_token_id=None,
)


class Clock(transformers.StoppingCriteria):
  """Notes the time after every token and never stops."""

  def __init__(self):
    self.times = []

  def __call__(self, input_ids, scores, **kwargs):
    self.times.append(time.perf_counter())
    return torch.zeros(len(input_ids), dtype=torch.bool)


def rates(batch: int, start: float, first: float, last: float) -> dict[str, float]:
  """Tokens a second of a prefill that ended at `first` and of the decoding after it."""
  return {
    "prefill": batch * PROMPT / (first - start),
    "decode": batch * (NEW - 1) / (last - first),
  }


@torch.inference_mode()
def theirs(model, tokens: np.ndarray, out: dict | None = None) -> dict[str, float]:
  clock, start = Clock(), time.perf_counter()
  result = model.generate(
    torch.from_numpy(tokens).long(),
    max_new_tokens=NEW,
    do_sample=False,
    stopping_criteria=[clock],
    return_dict_in_generate=True,
    output_logits=out is not None,
  )
  if out is not None:
    out["logits"] = result.logits[0].numpy()
    out["tokens"] = result.sequences[:, PROMPT:].numpy()
  return rates(len(tokens), start, clock.times[0], clock.times[-1])


def ours(generator: Generator, tokens: np.ndarray, out: dict | None = None) -> dict[str, float]:
  start = time.perf_counter()
  batch = {"tokens": tokens, "valid": np.ones(tokens.shape, bool)}
  logits, cache = generator.prefill(batch, NEW)
  np.asarray(jnp.argmax(logits, axis=-1))
  first = time.perf_counter()
  if out is not None:
    out["logits"] = np.asarray(logits)
  new, _ = generate(
    generator.model, generator.params, logits, cache, max_new_tokens=NEW, eos_ids=(), pad_id=0
  )
  if out is not None:
    out["tokens"] = new
  return rates(len(tokens), start, first, time.perf_counter())


def copied(source: torch.Tensor, target: torch.Tensor) -> dict[str, float]:
  """Bytes read and written a second."""
  start = time.perf_counter()
  target.copy_(source)
  return {"bytes": 2 * source.nbytes / (time.perf_counter() - start)}


def agree(a: dict, b: dict) -> bool:
  """Logits within 1e-4 of the largest, the same tokens."""
  error = np.abs(a["logits"] - b["logits"]).max() / np.abs(b["logits"]).max()
  same = bool((a["tokens"] == b["tokens"]).all())
  print(f"parity: logits within {error:.1e} of the largest, tokens {'equal' if same else 'differ'}")
  return same and error <= 1e-4


def main() -> None:
  torch.set_num_threads(rows.THREADS)
  torch.manual_seed(0)
  model = transformers.GemmaForCausalLM(CONFIG).eval()
  model.generation_config.eos_token_id = None
  with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    cfg, params = fuse(*hf_decoder.load(folder))
  generator = Generator(Decoder(cfg), jax.device_put(params))
  weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  print(
    f"{weights / 4e6:.0f} M parameters, prompt {PROMPT}, {NEW} new tokens, jax {jax.__version__}, "
    f"torch {torch.__version__}, transformers {transformers.__version__}, load {os.getloadavg()[0]}"
  )
  source = torch.ones(64 << 20)
  copy = functools.partial(copied, source, torch.empty_like(source))
  for batch in (1, 8):
    tokens = np.random.default_rng(batch).integers(0, CONFIG.vocab_size, (batch, PROMPT), np.int32)
    a: dict = {}
    b: dict = {}
    ours(generator, tokens, a), theirs(model, tokens, b)
    if not agree(a, b):
      for part in ("prefill", "decode"):
        row(f"cpu.{part}{batch}_x", NAN, f">= {GOALS[part, batch]}")
      continue
    reached = alternate(
      {
        "ours": functools.partial(ours, generator, tokens),
        "torch": functools.partial(theirs, model, tokens),
        "copy": copy,
      }
    )
    for part in ("prefill", "decode"):
      speeds = [typical(reached, side, part) for side in ("ours", "torch")]
      detail = f"{speeds[0]:.0f} against {speeds[1]:.0f} tokens/s"
      row(f"cpu.{part}{batch}_x", ratio(reached, part), f">= {GOALS[part, batch]}", detail=detail)
    cached = 2 * 4 * cfg.depth * cfg.kv_heads * cfg.head_dim * (PROMPT + NEW / 2) * batch
    read = (weights + cached) * typical(reached, "ours", "decode") / batch / 1e9
    copying = typical(reached, "copy", "bytes") / 1e9
    row(f"cpu.decode{batch}_gb_s", read, "", detail=f"read; a copy moves {copying:.1f} GB/s")


if __name__ == "__main__":
  main()
