"""A decoder family that the product does not know, from switches that it has: a config under
DECODERS and a row under FAMILIES, nothing else."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from vr_jax.interop import hf_decoder
from vr_jax.models.decoder import Decoder, DecoderConfig, KVCache
from vr_jax.models.fused import fuse
from vr_jax.models.variants import DECODERS

# Qwen2's MLP and norms, Gemma 3's norms of q and k: a mix that no family here has (Qwen3's).
TOY = DecoderConfig(
  width=32,
  depth=2,
  heads=4,
  kv_heads=2,
  head_dim=8,
  mlp_dim=48,
  vocab_size=40,
  activation="silu",
  norm_plus_one=False,
  scale_embedding=False,
  qk_norm=True,
  rope_base=1e6,
)
FIXED = {
  "activation": "silu",
  "norm_plus_one": False,
  "scale_embedding": False,
  "qk_norm": True,
}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
  monkeypatch.setitem(DECODERS, "toy", TOY)
  monkeypatch.setitem(hf_decoder.FAMILIES, "toy", (FIXED, {"rope_theta": 1e6}))


def logits(model, tokens, cache=None, first=0):
  positions = jnp.broadcast_to(first + jnp.arange(tokens.shape[1]), tokens.shape)
  hidden, cache = model(model.embed(tokens), positions, cache)
  return model.logits(hidden), cache


def random_params(cfg):
  shapes = hf_decoder.decoder_shapes(cfg)
  rng = np.random.default_rng(0)
  flat = {path: rng.normal(0, 0.2, shape).astype("float32") for path, shape in shapes.items()}
  return hf_decoder.nested(flat)


def test_it_runs_in_both_layouts_and_with_a_cache():
  cfg = DECODERS["toy"]
  params, tokens = random_params(cfg), np.arange(12, dtype=np.int32).reshape(2, 6)
  scores, _ = Decoder(cfg).apply({"params": params}, tokens, method=logits)
  assert scores.shape == (2, 6, 40)
  fused, weights = fuse(cfg, params)
  first, cache = Decoder(fused).apply(
    {"params": weights}, tokens[:, :4], KVCache.empty(fused, 2, 8), method=logits
  )
  rest, _ = Decoder(fused).apply({"params": weights}, tokens[:, 4:], cache, 4, method=logits)
  np.testing.assert_allclose(jnp.concatenate([first, rest], axis=1), scores, atol=2e-5)
  # The switch matters: without the norms of q and k it is another model.
  other = dataclasses.replace(cfg, qk_norm=False)
  without, _ = Decoder(other).apply({"params": params}, tokens, method=logits)
  assert np.abs(without - scores).max() > 1e-3


def test_a_folder_of_it_is_read(tmp_path):
  cfg = DECODERS["toy"]
  params = random_params(cfg)
  fields = {
    "model_type": "toy",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "vocab_size": 40,
  }
  (tmp_path / "config.json").write_text(json.dumps(fields))
  save_file(hf_decoder.to_hf(cfg, params), tmp_path / "model.safetensors")
  read_cfg, read = hf_decoder.load(tmp_path)
  assert read_cfg == cfg
  jax.tree.map(np.testing.assert_array_equal, read, params)
