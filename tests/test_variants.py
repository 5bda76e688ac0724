"""Full-size models under `jax.eval_shape`: parameter counts and FLOPs against known numbers."""

import json

import pytest

from data_pipes.errors import InputError
from vr_jax.models.connector import ConnectorConfig, scene_token_count
from vr_jax.models.costs import (
  connector_flops,
  decoder_flops,
  decoder_parameters,
  parameter_counts,
  prefill_flops,
  tower_flops,
)
from vr_jax.models.siglip import SiglipConfig
from vr_jax.models.variants import DECODERS, VARIANTS, get_variant
from vr_jax.models.videorefer import VideoReferConfig

RELEASED = {
  "qwen2.5-1.5b": 1_543_714_304,
  "qwen2-7b": 7_615_616_512,
  "gemma-2b": 2_506_172_416,
  "gemma-7b": 8_537_680_896,
  "gemma2-9b": 9_241_705_984,
  "gemma3-4b": 3_880_099_328,
}


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_have_the_released_sizes(name):
  assert decoder_parameters(DECODERS[name]) == RELEASED[name]


def test_videorefer_7b_has_the_published_sizes():
  counts = parameter_counts(get_variant("videorefer-7b"))
  assert counts["connector"] == 376_889_248
  assert counts["region"] == 16_980_992
  assert counts["llm"] == 7_615_616_512 - 2 * 3584 * (152_064 - 151_647)
  layer = 4 * 1152 * 1153 + 2 * 1152 * 4304 + 4304 + 1152 + 4 * 1152
  assert counts["img"] == 26 * layer + 1152 * (3 * 14 * 14 + 1 + 729)  # without layer 27 and head


@pytest.mark.parametrize(
  ("name", "decoder", "rows"),
  [
    ("videorefer-gemma-2b", "gemma-2b", 1),
    ("videorefer-gemma2-9b", "gemma2-9b", 1),
    ("videorefer-gemma3-4b", "gemma3-4b", 2),
  ],
)
def test_gemma_variants_add_region_behind_the_tokenizers_own(name, decoder, rows):
  cfg = get_variant(name)
  counts = parameter_counts(cfg)
  assert counts["llm"] == RELEASED[decoder] + rows * cfg.llm.width
  assert counts["img"] == parameter_counts(get_variant("videorefer-7b"))["img"]
  assert scene_token_count(cfg.connector, cfg.num_frames, cfg.img.grid) == 1352


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_survive_json_and_are_hashable(name):
  cfg = get_variant(name)
  assert VideoReferConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg
  assert hash(cfg) == hash(get_variant(name))


def test_mini_fits_the_package():
  assert 1e6 < sum(parameter_counts(get_variant("vr-mini")).values()) < 8e6


def test_an_unknown_variant_is_named():
  with pytest.raises(InputError, match=r"'videorefer-8b' is not one of .*videorefer-7b"):
    get_variant("videorefer-8b")


def test_flops_of_the_published_model():
  """The figures of the published VideoRefer-7B, in TFLOP."""
  cfg = get_variant("videorefer-7b")
  assert tower_flops(cfg.img) / 1e12 == pytest.approx(0.642, abs=5e-4)
  assert tower_flops(SiglipConfig(select_layer=None)) / 1e12 == pytest.approx(0.667, abs=1e-3)
  assert connector_flops(cfg.connector, 1152, 16, 27) / 1e12 == pytest.approx(2.92, abs=5e-3)
  assert connector_flops(cfg.connector, 1152, 1, 27) / 1e12 == pytest.approx(0.204, abs=5e-4)
  assert decoder_flops(cfg.llm, 1500, 0) / 1500 / 1e9 == pytest.approx(13.35, abs=0.01)
  assert decoder_flops(cfg.llm, 1426, 1) / 1e12 == pytest.approx(19.0, abs=0.05)
  parts = prefill_flops(cfg, 17, 1426)
  assert sum(parts.values()) / 1e12 == pytest.approx(32.8, abs=0.1)


@pytest.mark.parametrize(
  ("name", "expected"), [("gemma-7b", 23.8), ("gemma2-9b", 25.7), ("gemma3-4b", 9.9)]
)
def test_flops_of_gemma_decoders(name, expected):
  assert decoder_flops(DECODERS[name], 1500, 0) / 1e12 == pytest.approx(expected, abs=0.1)


def test_flops_of_a_linear_connector():
  flops = connector_flops(ConnectorConfig(kind="mlp2x_gelu", width=64), 32, 4, 5)
  assert flops == 25 * 2 * (32 * 64 + 64 * 64)


@pytest.mark.torch
@pytest.mark.parametrize("name", DECODERS)
def test_sizes_equal_transformers(name):
  """The same counts from `transformers` models without storage."""
  import torch
  import transformers

  cfg = DECODERS[name]
  family = {
    "qwen2": "qwen2",
    "qwen2.5": "qwen2",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
  }
  config = transformers.AutoConfig.for_model(
    family[name.split("-")[0]],
    hidden_size=cfg.width,
    num_hidden_layers=cfg.depth,
    num_attention_heads=cfg.heads,
    num_key_value_heads=cfg.kv_heads,
    head_dim=cfg.head_dim,
    intermediate_size=cfg.mlp_dim,
    vocab_size=cfg.vocab_size,
    tie_word_embeddings=cfg.tied_head,
  )
  with torch.device("meta"):
    model = transformers.AutoModelForCausalLM.from_config(config)
  model.tie_weights()
  assert sum(p.numel() for p in model.parameters()) == RELEASED[name]
