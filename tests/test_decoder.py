"""The decoder: every family against itself here, against transformers under the torch marker."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rounding import assert_same_up_to_rounding, decoder_roundings, share

from vr_jax.inference.generate import Generator
from vr_jax.models.decoder import Decoder, DecoderConfig, KVCache, visible
from vr_jax.models.fused import fuse
from vr_jax.models.scanned import ScannedBlock

GEMMA = DecoderConfig(
  width=64, depth=4, heads=4, kv_heads=2, head_dim=16, mlp_dim=96, vocab_size=120
)
FAMILIES = {
  "gemma": dataclasses.replace(GEMMA, kv_heads=1),
  "gemma_mha": dataclasses.replace(GEMMA, kv_heads=4),
  "gemma2": dataclasses.replace(
    GEMMA,
    post_norms=True,
    attn_soft_cap=50.0,
    final_soft_cap=30.0,
    query_scale=24**-0.5,
    pattern=("local", "global"),
    window=4,
  ),
  "gemma3": dataclasses.replace(
    GEMMA,
    post_norms=True,
    qk_norm=True,
    pattern=("local", "local", "global"),
    window=4,
    rope_base=1e6,
    local_rope_base=1e4,
    rope_scale=8.0,
  ),
  "qwen2": dataclasses.replace(
    GEMMA,
    activation="silu",
    norm_plus_one=False,
    scale_embedding=False,
    tied_head=False,
    qkv_bias=True,
    rope_base=1e6,
  ),
}


@pytest.fixture(params=FAMILIES)
def cfg(request):
  return FAMILIES[request.param]


def init(cfg, seed=0):
  """Parameters with nothing left at zero or one, so that every one of them matters."""
  shapes = jax.eval_shape(lambda: Decoder(cfg).init(jax.random.key(0), *example(cfg), method=full))
  leaves, tree = jax.tree.flatten(shapes)
  rng = np.random.default_rng(seed)
  scale = [0.3 if leaf.ndim < 3 else max(leaf.shape[-3:-1]) ** -0.5 for leaf in leaves]
  values = [rng.normal(0, s, leaf.shape).astype("f") for s, leaf in zip(scale, leaves, strict=True)]
  return jax.tree.unflatten(tree, values)


def example(cfg, rows=2, length=11):
  tokens = np.random.default_rng(1).integers(0, cfg.vocab_size, (rows, length), np.int32)
  return tokens, np.tile(np.arange(length, dtype=np.int32), (rows, 1))


def full(model, tokens, positions, cache=None, **kwargs):
  hidden, cache = model(model.embed(tokens), positions, cache, **kwargs)
  logits = model.logits(hidden)
  return logits if cache is None else (logits, cache)


@functools.partial(jax.jit, static_argnums=0)
def apply(cfg, params, *args, **kwargs):
  return Decoder(cfg).apply(params, *args, method=full, **kwargs)


def test_cached_decode_equals_full_forward(cfg):
  params, (tokens, positions) = init(cfg), example(cfg)
  expected = apply(cfg, params, tokens, positions)
  cache = KVCache.empty(cfg, 2, 16)
  steps = []
  for i, j in ((0, 5), (5, 8), (8, 11)):
    logits, cache = apply(cfg, params, tokens[:, i:j], positions[:, i:j], cache)
    steps.append(logits)
  assert_same_up_to_rounding(jnp.concatenate(steps, 1), expected, decoder_roundings(cfg, 11))
  assert int(cache.end) == 11
  assert not cache.fresh


def test_the_fused_layout_is_the_same_model(cfg):
  params, (tokens, positions) = init(cfg), example(cfg)
  expected = apply(cfg, params, tokens, positions)
  fused, weights = fuse(cfg, params["params"])
  ours = apply(fused, {"params": weights}, tokens, positions)
  assert_same_up_to_rounding(ours, expected, decoder_roundings(cfg, 11))
  made = jax.eval_shape(lambda: Decoder(fused).init(jax.random.key(0), *example(cfg), method=full))
  assert jax.tree.map(jnp.shape, made["params"]) == jax.tree.map(jnp.shape, weights)
  cache = KVCache.empty(fused, 1, 12)
  _, cache = apply(fused, {"params": weights}, tokens[:1, :7], positions[:1, :7], cache)
  cache = cache.take(jnp.zeros(2, int))
  tokens = np.concatenate([tokens[[0, 0], :7], tokens[:, 7:]], 1)
  logits, _ = apply(fused, {"params": weights}, tokens[:, 7:], positions[:, 7:], cache)
  expected = apply(cfg, params, tokens, positions)
  assert_same_up_to_rounding(logits, expected[:, 7:], decoder_roundings(cfg, 11))


def test_tables_of_an_odd_vocabulary_have_a_spare_row_in_two_shards():
  """So that a tensor axis splits them over the vocabulary; no token is the spare row."""
  cfg = dataclasses.replace(FAMILIES["qwen2"], vocab_size=101, heads=4, kv_heads=2)
  params, (tokens, positions) = init(cfg), example(cfg)
  expected = apply(cfg, params, tokens, positions)
  fused, weights = fuse(cfg, params["params"], shards=2)
  assert {len(table) for table in weights["embedder"].values()} == {102}
  ours = apply(fused, {"params": weights}, tokens, positions)
  assert_same_up_to_rounding(ours, expected, decoder_roundings(cfg, 11))


def test_rows_of_different_length_equal_each_alone(cfg):
  params, (tokens, positions) = init(cfg), example(cfg)
  lengths = jnp.array([[11], [6]])
  padded = jnp.where(positions < lengths, positions, -1)
  logits, cache = apply(cfg, params, tokens, padded, KVCache.empty(cfg, 2, 14))
  more, _ = apply(cfg, params, tokens[:, :2], lengths + jnp.arange(2), cache)
  for row, n in enumerate(lengths[:, 0]):
    alone, cache = apply(
      cfg, params, tokens[row, None, :n], positions[:1, :n], KVCache.empty(cfg, 1, 14)
    )
    alone_more, _ = apply(cfg, params, tokens[row, None, :2], n + jnp.arange(2)[None], cache)
    roundings = decoder_roundings(cfg, 13)
    assert_same_up_to_rounding(logits[row, :n], alone[0], roundings)
    assert_same_up_to_rounding(more[row], alone_more[0], roundings)


def test_prefix_cache_serves_many_questions(cfg):
  params, (tokens, positions) = init(cfg), example(cfg, rows=3)
  tokens[:, :7] = tokens[0, :7]
  expected = apply(cfg, params, tokens, positions)
  _, cache = apply(cfg, params, tokens[:1, :7], positions[:1, :7], KVCache.empty(cfg, 1, 12))
  logits, _ = apply(cfg, params, tokens[:, 7:], positions[:, 7:], cache.take(jnp.zeros(3, int)))
  assert_same_up_to_rounding(logits, expected[:, 7:], decoder_roundings(cfg, 11))


def test_scanned_layers_equal_a_loop_over_stacked_parameters(cfg):
  params, (tokens, positions) = init(cfg), example(cfg)

  @jax.jit
  def loop(params):
    model = Decoder(cfg).bind(params)
    tables = model._tables(positions, None, None, None, None, None).replace(causal=None)
    x = model.embed(tokens)
    for i, kind in enumerate(tables.kinds):
      layer = jax.tree.map(lambda w, i=i: w[i], params["params"]["layers"])
      block = ScannedBlock(cfg)
      (x, _), _ = block.apply({"params": layer}, (x, None), tables, (kind, i, None))
    return model.logits(model.final_norm(x))

  expected = apply(cfg, params, tokens, positions)
  assert_same_up_to_rounding(loop(params), expected, decoder_roundings(cfg, 11))


@pytest.mark.parametrize(
  "remat", ["dots", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("full", "offload"))]
)
def test_remat_changes_no_value_or_gradient(remat):
  cfg = FAMILIES["gemma3"]
  params, inputs = init(cfg), example(cfg)

  def loss(cfg):
    return jax.jit(jax.value_and_grad(lambda p: jnp.sin(apply(cfg, p, *inputs)).sum()))(params)

  # Through the layers and back: each sum of the way forward has two in the gradient.
  roundings = 3 * decoder_roundings(cfg, 11)
  assert_same_up_to_rounding(loss(dataclasses.replace(cfg, remat=remat)), loss(cfg), roundings)


def test_packed_segments_equal_each_alone(cfg):
  params, (tokens, _) = init(cfg), example(cfg, rows=1)
  positions = jnp.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, -1, -1]])
  segments = jnp.array([[1] * 5 + [2] * 4 + [0] * 2])
  packed = apply(cfg, params, tokens, positions, segments=segments)
  for i, j in ((0, 5), (5, 9)):
    alone = apply(cfg, params, tokens[:, i:j], positions[:, i:j])
    assert_same_up_to_rounding(packed[:, i:j], alone, decoder_roundings(cfg, 11))


def test_visible_is_causal_windowed_and_skips_padding():
  positions = jnp.array([[0, 1, 2, 3, -1]])
  mask = visible(positions, positions)[0].astype(int)
  np.testing.assert_array_equal(mask[:4], np.tri(4, 5))
  np.testing.assert_array_equal(
    visible(positions, positions, window=2)[0, :4].astype(int), np.tri(4, 5) - np.tri(4, 5, -2)
  )


def test_prefix_sees_itself_and_the_rest_is_causal():
  positions = jnp.arange(5)[None]
  mask = visible(positions, positions, prefix=jnp.array([3]))[0]
  expected = np.tri(5, dtype=bool)
  expected[:3, :3] = True
  np.testing.assert_array_equal(mask, expected)
  # A window cuts what comes behind the prefix, not the prefix.
  mask = visible(positions, positions, window=2, prefix=jnp.array([3]))[0]
  expected[3:] &= ~np.tri(5, k=-2, dtype=bool)[3:]
  np.testing.assert_array_equal(mask, expected)

  cfg = dataclasses.replace(FAMILIES["gemma"], prefix_lm=True)
  params, (tokens, positions) = init(cfg), example(cfg)
  causal = apply(cfg, params, tokens, positions)
  prefixed = apply(cfg, params, tokens, positions, prefix=jnp.array([6, 0]))
  other = tokens.copy()
  other[:, 5] += 1
  changed = apply(cfg, params, other, positions, prefix=jnp.array([6, 0]))
  assert np.abs(prefixed[0, 0] - changed[0, 0]).max() > 1e-3  # the first slot sees the sixth
  roundings = decoder_roundings(cfg, 11)
  assert_same_up_to_rounding(prefixed[1], causal[1], roundings)
  cache = KVCache.empty(cfg, 2, 12)
  head, cache = apply(cfg, params, tokens[:, :8], positions[:, :8], cache, prefix=jnp.array([6, 0]))
  tail, _ = apply(cfg, params, tokens[:, 8:], positions[:, 8:], cache)
  assert_same_up_to_rounding(jnp.concatenate([head, tail], 1), prefixed, roundings)


def test_arguments_that_do_not_go_together():
  cfg = FAMILIES["gemma"]
  params, (tokens, positions) = init(cfg), example(cfg)
  with pytest.raises(ValueError, match="prefix_lm"):
    apply(cfg, params, tokens, positions, prefix=jnp.array([2, 2]))
  with pytest.raises(ValueError, match="segments"):
    apply(cfg, params, tokens, positions, KVCache.empty(cfg, 2, 16), segments=positions)


def test_dtype_policy():
  cfg = dataclasses.replace(FAMILIES["gemma2"], dtype="bfloat16")
  params, (tokens, positions) = init(cfg), example(cfg)
  embeds = jnp.zeros((2, 11, cfg.width))
  fresh = jax.eval_shape(Decoder(cfg).init, jax.random.key(0), embeds, positions)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(fresh)} == {"float32"}
  cache = KVCache.empty(cfg, 2, 11)
  hidden, cache = jax.eval_shape(Decoder(cfg).apply, params, embeds, positions, cache)
  assert hidden.dtype == cache.k.dtype == cache.v.dtype == jnp.bfloat16
  logits = apply(cfg, params, tokens, positions)
  assert logits.dtype == jnp.float32
  exact = apply(dataclasses.replace(cfg, dtype="float32"), params, tokens, positions)
  assert np.abs(logits - exact).max() < 0.05 * np.abs(exact).max()


HF = {
  "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": False, "rope_theta": 1e6},
  "qwen2_tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
  "qwen2_mha": {"num_key_value_heads": 4, "tie_word_embeddings": False},
  "gemma": {"num_key_value_heads": 1, "head_dim": 24},
  "gemma_mha": {"num_key_value_heads": 4, "head_dim": 16},
  "gemma2": {
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 7,
    "query_pre_attn_scalar": 24,
  },
  "gemma3_text": {
    "num_key_value_heads": 2,
    "head_dim": 32,
    "sliding_window": 7,
    "num_hidden_layers": 7,
    "query_pre_attn_scalar": 20,
    "rope_parameters": {
      "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
      "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
  },
}


@pytest.mark.torch
@pytest.mark.parametrize("name", HF)
def test_equals_transformers(name, tmp_path):
  """Logits and 32 greedy tokens of a small random model, read from the folder it saves."""
  import torch
  import transformers

  from vr_jax.interop import hf_decoder

  torch.manual_seed(0)
  sizes = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 211,
  }
  family = name.removesuffix("_mha").removesuffix("_tied")
  config = transformers.AutoConfig.for_model(family, **sizes | HF[name])
  theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
  with torch.no_grad():
    for key, weight in theirs.named_parameters():
      weight.normal_(0, 0.3 if weight.ndim == 1 else weight.shape[-1] ** -0.5)
      if key.endswith("embed_tokens.weight"):
        weight.normal_(0, 1.0 if family == "qwen2" else weight.shape[-1] ** -0.5)
  theirs.save_pretrained(tmp_path)

  cfg, params = hf_decoder.load(tmp_path)
  tokens = np.random.default_rng(0).integers(0, 211, (2, 23))
  positions = np.tile(np.arange(23), (2, 1))
  ours = apply(cfg, {"params": params}, tokens, positions)
  with torch.no_grad():
    logits = theirs(torch.tensor(tokens)).logits.numpy()
    assert_same_up_to_rounding(ours, logits, decoder_roundings(cfg, 23))
    generated = theirs.generate(
      torch.tensor(tokens),
      attention_mask=torch.ones(2, 23),
      do_sample=False,
      max_new_tokens=32,
      pad_token_id=0,
      eos_token_id=None,
      output_logits=True,
      return_dict_in_generate=True,
    )
  # No token hangs on a rounding: the second best is further off than rounding could move both.
  second, best = np.sort(np.stack(generated.logits), axis=-1)[..., -2:].reshape(-1, 2).T
  roundings = decoder_roundings(cfg, 55)
  assert (best - second).min() > 2 * share(roundings) * np.abs(best).max()
  batch = {"tokens": tokens.astype(np.int32), "valid": np.ones((2, 23), bool)}
  greedy, _ = Generator(Decoder(cfg), params)(batch, max_new_tokens=32, eos_ids=())
  np.testing.assert_array_equal(greedy, generated.sequences[:, 23:])

  back = hf_decoder.to_hf(cfg, params)
  state = {k: v.numpy() for k, v in theirs.state_dict().items()}
  if cfg.tied_head:
    state.pop("lm_head.weight")
  assert back.keys() == state.keys()
  for key, value in state.items():
    np.testing.assert_array_equal(back[key], value)
