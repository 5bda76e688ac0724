"""Compiled generation against plain loops over the full forward pass, on random decoders."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vr_jax.inference.generate import Generator, bucket, extend, generate, prefill
from vr_jax.inference.sampling import WINDOW, Sampling, penalize, pick
from vr_jax.models.decoder import Decoder, DecoderConfig, KVCache

CFG = DecoderConfig(
  width=32, depth=2, heads=4, kv_heads=2, head_dim=8, mlp_dim=48, vocab_size=50, pattern=("global",)
)
MODEL = Decoder(CFG)


def logits_of(model, tokens):
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  return model.logits(model(model.embed(tokens), positions)[0])


@pytest.fixture(scope="module")
def params():
  params = MODEL.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32), method=logits_of)["params"]
  return jax.tree.map(lambda w: 1.5 * w, params)


def prompts(lengths, seed=0):
  rng = np.random.default_rng(seed)
  return [rng.integers(0, CFG.vocab_size, n).astype(np.int32) for n in lengths]


def batch_of(rows, length=12):
  tokens, valid = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
  for i, row in enumerate(rows):
    tokens[i, : len(row)], valid[i, : len(row)] = row, True
  return {"tokens": tokens, "valid": valid}


def run(params, rows, max_new_tokens=10, eos_ids=(), method=generate, **kwargs):
  cache = KVCache.empty(CFG, len(rows), 12 + 10)
  logits, cache = prefill(MODEL, params, batch_of(rows), cache)
  kwargs |= {"max_new_tokens": max_new_tokens, "eos_ids": eos_ids}
  return method(MODEL, params, logits, cache, **kwargs)


@pytest.fixture(scope="module")
def plain(params):
  """Greedy continuation by the full forward pass, with a penalty on what was generated."""
  apply = jax.jit(lambda t: MODEL.apply({"params": params}, t, method=logits_of))

  def loop(prompt, steps, penalty=1.0):
    tokens = np.zeros((1, 24), np.int32)
    tokens[0, : len(prompt)] = prompt
    for n in range(len(prompt), len(prompt) + steps):
      scores = np.array(apply(tokens)[0, n - 1])
      for token in set(tokens[0, len(prompt) : n]):
        scores[token] *= penalty if scores[token] < 0 else 1 / penalty
      tokens[0, n] = scores.argmax()
    return tokens[0, len(prompt) : len(prompt) + steps]

  return loop


@pytest.mark.slow  # test_engine compares rows with each alone
def test_greedy_rows_of_different_length_equal_each_alone(params, plain):
  rows = prompts([12, 5, 1])
  tokens, lengths = run(params, rows)
  np.testing.assert_array_equal(tokens, [plain(row, 10) for row in rows])
  np.testing.assert_array_equal(lengths, [10, 10, 10])
  alone, _ = run(params, rows[1:2])
  np.testing.assert_array_equal(alone[0], tokens[1])
  generator = Generator(MODEL, params)
  bucketed, _ = generator(batch_of(rows), max_new_tokens=10, eos_ids=())
  np.testing.assert_array_equal(bucketed, tokens)


def test_repetition_penalty_falls_on_generated_tokens_only(params, plain):
  row = prompts([9])[0]
  tokens, _ = run(params, [row], sampling=Sampling(repetition_penalty=1.3))
  expected = plain(row, 10, penalty=1.3)
  assert (expected != plain(row, 10)).any()
  np.testing.assert_array_equal(tokens[0], expected)


def test_rows_stop_at_any_end_token_or_at_their_limit(params, plain):
  rows = prompts([12, 5, 7])
  free = [list(plain(row, 10)) for row in rows]
  eos = (free[0][3], free[1][2])
  stops = [min([r.index(e) for e in eos if e in r] or [9]) + 1 for r in free]
  limits = [10, 10, 4]
  stops = [min(a, b) for a, b in zip(stops, limits, strict=True)]
  tokens, lengths = run(params, rows, max_new_tokens=limits, eos_ids=eos, pad_id=49)
  np.testing.assert_array_equal(lengths, stops)
  for row, full, stop in zip(tokens, free, stops, strict=True):
    np.testing.assert_array_equal(row, full[:stop] + [49] * (10 - stop))


def test_a_shared_prefix_gives_the_same_answers(params):
  prefix, *tails = prompts([6, 4, 4])
  expected, _ = run(params, [np.concatenate([prefix, tail]) for tail in tails])
  _, cache = prefill(MODEL, params, batch_of([prefix], 6), KVCache.empty(CFG, 1, 22))
  positions = np.tile(np.arange(6, 10), (2, 1))
  cache = cache.take(np.zeros(2, int))
  logits, cache = extend(MODEL, params, np.stack(tails), positions, cache)
  tokens, _ = generate(MODEL, params, logits[:, -1], cache, max_new_tokens=10, eos_ids=())
  np.testing.assert_array_equal(tokens, expected)


def test_sampled_rows_depend_on_their_key_alone(params):
  rows = prompts([12, 5, 8])
  keys = jax.random.split(jax.random.key(3), 3)
  hot = Sampling(temperature=1.5, top_k=20, top_p=0.9)
  tokens, _ = run(params, rows, sampling=hot, keys=keys)
  alone, _ = run(params, rows[2:], sampling=hot, keys=keys[2:])
  np.testing.assert_array_equal(alone[0], tokens[2])
  other, _ = run(params, rows, sampling=hot, keys=keys[::-1])
  assert (tokens != other).any()


def test_the_cache_is_donated_and_must_have_room(params):
  row = prompts([3])
  cache = KVCache.empty(CFG, 1, 12)
  logits, filled = prefill(MODEL, params, batch_of(row), cache)
  with pytest.raises(ValueError, match="at most 1"):
    generate(MODEL, params, logits, filled, max_new_tokens=2, eos_ids=())
  generate(MODEL, params, logits, filled, max_new_tokens=1, eos_ids=())
  assert filled.k.is_deleted()


def _drawn(logits, sampling, count=4000):
  keys = jax.random.split(jax.random.key(0), count)
  return np.bincount(
    pick(jnp.tile(logits, (count, 1)), keys, sampling.rows(count)), minlength=len(logits)
  )


PROBABILITIES = np.array([0.4, 0.05, 0.3, 0.1, 0.15])


@pytest.mark.parametrize(
  ("sampling", "expected"),
  [
    (Sampling(temperature=1.0), PROBABILITIES),
    (Sampling(temperature=0.5), PROBABILITIES**2),
    (Sampling(temperature=1.0, top_k=2), PROBABILITIES * [1, 0, 1, 0, 0]),
    (Sampling(temperature=1.0, top_p=0.75), PROBABILITIES * [1, 0, 1, 0, 1]),
    (Sampling(temperature=1.0, top_p=0.69), PROBABILITIES * [1, 0, 1, 0, 0]),
    (Sampling(temperature=1.0, top_p=0.01), [1, 0, 0, 0, 0]),
    (Sampling(temperature=1.0, top_k=4, top_p=0.8), PROBABILITIES * [1, 0, 1, 0, 1]),
    (Sampling(temperature=0.0, top_k=2), [1, 0, 0, 0, 0]),
  ],
)
def test_draws_follow_the_kept_probabilities(sampling, expected):
  counts = _drawn(jnp.log(PROBABILITIES), sampling)
  expected = np.asarray(expected) / np.sum(expected)
  assert (counts[expected == 0] == 0).all()
  np.testing.assert_allclose(counts / 4000, expected, atol=0.03)


def _pick_by_sorting(logits, key, sampling):
  """One row's token, from its words in the order of their logits."""
  if sampling.temperature == 0:
    return int(logits.argmax())
  order = np.argsort(-logits, kind="stable")[: sampling.top_k or None]
  scaled = (logits / np.float32(sampling.temperature))[order]
  if not sampling.top_k and sampling.top_p == 1:
    return int(jax.random.categorical(key, logits / np.float32(sampling.temperature)))
  shares = np.exp(scaled.astype(np.float64) - scaled.max())
  shares /= shares.sum()
  scaled[np.cumsum(shares) - shares >= sampling.top_p] = -np.inf
  return int(order[int(jax.random.categorical(key, scaled))])


def test_rows_of_one_call_are_each_drawn_their_own_way():
  """Mixed rows: each draws what it would alone, as by sorting all words."""
  ways = [
    Sampling(),
    Sampling(temperature=0.7),
    Sampling(temperature=1.2, top_k=5),
    Sampling(temperature=1.0, top_k=WINDOW),
    Sampling(temperature=0.9, top_p=0.6),
    Sampling(temperature=1.1, top_k=40, top_p=0.5),
  ] * 8
  logits = 4 * np.random.default_rng(0).normal(size=(len(ways), 1000)).astype(np.float32)
  keys = jax.random.split(jax.random.key(1), len(ways))
  sampling = jax.tree.map(lambda *xs: np.concatenate(xs), *(way.rows(1) for way in ways))
  expected = [_pick_by_sorting(*one) for one in zip(logits, keys, ways, strict=True)]
  np.testing.assert_array_equal(jax.jit(pick)(logits, keys, sampling), expected)


@pytest.mark.parametrize("field", ["temperature", "top_k", "top_p", "repetition_penalty"])
def test_sampling_refuses_nonsense(field):
  with pytest.raises(ValueError, match=field):
    Sampling(**{field: -1})


def test_buckets_are_few_and_close():
  sizes = {bucket(n) for n in range(1, 4097)}
  assert len(sizes) <= 26
  for n in range(1, 4097):
    assert n <= bucket(n) <= max(64, 1.25 * n)


@pytest.mark.torch
def test_equals_the_processors_of_transformers():
  """Penalty, temperature, top-k and top-p keep the tokens that transformers keeps."""
  import torch
  from transformers import generation as hf

  logits = np.random.default_rng(0).normal(0, 3, (4, 97)).astype("f")
  ids = torch.tensor([[5, 9, 5], [96, 0, 1], [2, 3, 4], [10, 11, 12]])
  scores = hf.RepetitionPenaltyLogitsProcessor(1.2)(ids, torch.tensor(logits))
  seen = np.zeros((4, 97), bool)
  np.put_along_axis(seen, ids.numpy(), True, axis=1)
  ours = penalize(jnp.asarray(logits), jnp.asarray(seen), 1.2)
  np.testing.assert_allclose(ours, scores, rtol=1e-6)

  for k, p in ((7, 1.0), (0, 0.8), (12, 0.6)):
    kept = torch.tensor(logits) / 0.7
    kept = hf.TopKLogitsWarper(k)(None, kept) if k else kept
    kept = hf.TopPLogitsWarper(p)(None, kept)
    expected = torch.softmax(kept, -1).numpy()
    for row in range(4):
      counts = _drawn(logits[row], Sampling(temperature=0.7, top_k=k, top_p=p))
      assert (counts[expected[row] == 0] == 0).all()
      np.testing.assert_allclose(counts / 4000, expected[row], atol=0.04)
