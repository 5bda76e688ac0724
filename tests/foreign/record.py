"""Writes the small folders beside this file with the library that reads them, and what it
computes from them; needs the extra [torch].

    python tests/foreign/record.py

Weights are random, in bfloat16, so that a folder has a few kilobytes; numbers are those of float32.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent
SMALL = {
  "vocab_size": 24,
  "hidden_size": 16,
  "intermediate_size": 20,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 6,
  "max_position_embeddings": 64,
  "tie_word_embeddings": True,
}
WINDOW = {"sliding_window": 4, "query_pre_attn_scalar": 9}
DECODERS = {
  "qwen2": ("qwen2", {"head_dim": 4, "tie_word_embeddings": False}),
  "qwen2_all_heads": ("qwen2", {"head_dim": 4, "num_key_value_heads": 4}),
  "gemma": ("gemma", {"num_key_value_heads": 1}),
  "gemma2": ("gemma2", WINDOW),
  "gemma3": (
    "gemma3_text",
    WINDOW
    | {
      "num_hidden_layers": 3,
      "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
      "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
  ),
}
TOWER = {
  "hidden_size": 16,
  "intermediate_size": 20,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "image_size": 14,
  "patch_size": 4,
}


def randomised(module):
  """The module with weights that bfloat16 holds, norms and biases random too."""
  with torch.no_grad():
    for parameter in module.parameters():
      value = torch.randn_like(parameter) * 0.3 + 0.1 * (parameter.ndim == 1)
      parameter.copy_(value.bfloat16().float())
  return module.eval()


def save(name, module, **arrays):
  folder = HERE / name
  shutil.rmtree(folder, ignore_errors=True)
  module.bfloat16().save_pretrained(folder)
  (folder / "generation_config.json").unlink(missing_ok=True)
  np.savez_compressed(folder / "recorded.npz", **arrays)
  fields = json.loads((folder / "config.json").read_text())
  print(name, fields["transformers_version"], sum(f.stat().st_size for f in folder.iterdir()))


def main():
  torch.manual_seed(0)
  rng = np.random.default_rng(0)
  for name, (family, fields) in DECODERS.items():
    config = transformers.AutoConfig.for_model(family, **SMALL | fields)
    config._attn_implementation = "eager"
    module = randomised(transformers.AutoModelForCausalLM.from_config(config))
    tokens = rng.integers(0, config.vocab_size, (2, 9))
    with torch.no_grad():
      logits = module(torch.from_numpy(tokens)).logits.numpy()
    save(name, module, tokens=tokens.astype(np.int32), logits=logits)
  config = transformers.SiglipVisionConfig(**TOWER)
  module = randomised(transformers.SiglipVisionModel(config))
  pixels = rng.uniform(-1, 1, (2, 14, 14, 3)).astype(np.float32)
  with torch.no_grad():
    out = module(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()))
  save(
    "siglip",
    module,
    pixels=pixels,
    features=out.last_hidden_state.numpy(),
    pooled=out.pooler_output.numpy(),
  )


if __name__ == "__main__":
  main()
