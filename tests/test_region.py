"""Object tokens: golden cases, the merge against a plain loop, and what must not matter."""

import fractions
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rounding import assert_same_up_to_rounding

from data_pipes.errors import InputError
from vr_jax.models.region import (
  RegionConfig,
  RegionEncoder,
  merge_segments,
  merge_tokens,
  pool_regions,
)
from vr_jax.parity.golden import run_parity

merge = jax.jit(merge_tokens, static_argnums=2)
segments_of = jax.jit(merge_segments, static_argnums=2)


@pytest.mark.parametrize(("stage", "cases"), [("03_region", 39), ("04_token_merge", 54)])
def test_golden(golden, stage, cases):
  results = run_parity(golden, [stage])
  assert not [str(r) for r in results if r.status != "pass"]
  assert len(results) == cases
  assert not [str(r) for r in results if r.unknown]


def loop_merge(x, u):
  """The published rule, one frame after the other: list of merged vectors, segment of each."""
  if len(x) <= u:
    return list(x), list(range(len(x)))
  unit = x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
  similarity = (unit[:-1] * unit[1:]).sum(-1)
  threshold = np.sort(similarity)[::-1][len(x) - u - 1]
  runs, segment = [[x[0]]], [0]
  for frame, before in zip(x[1:], similarity, strict=True):
    if before < threshold:
      runs.append([])
    runs[-1].append(frame)
    segment.append(len(runs) - 1)
  return [np.mean(run, axis=0) for run in runs], segment


def frames_with_ties(rng, k):
  """Vectors whose similarities are exactly 0, 0.6, 0.8, 0.96 or 1, so that ties are ties."""
  basis = np.eye(8, dtype=np.float32)
  choices = [basis[0], basis[1], 0 * basis[0]]
  choices += [3 * basis[i] + 4 * basis[i + 1] for i in range(2)]
  choices += [4 * basis[i] + 3 * basis[i + 1] for i in range(2)]
  return np.array([choices[i] for i in rng.integers(len(choices), size=k)]).reshape(k, 8)


@pytest.mark.parametrize("u", [1, 2, 4, 7])
@pytest.mark.parametrize("room", [1, 6, 16])
def test_merge_is_the_plain_loop(u, room):
  rng = np.random.default_rng(u * 100 + room)
  k = rng.integers(0, room + 1, size=(5, 8))
  k[0, :2] = 0, room
  x = np.full((5, 8, room, 8), np.nan, np.float32)  # frames that are none must not be looked at
  for b, r in np.ndindex(5, 8):
    x[b, r, : k[b, r]] = frames_with_ties(rng, k[b, r]) if r % 2 else rng.normal(size=(k[b, r], 8))
  valid = np.arange(room) < k[..., None]
  tokens, kept = merge(x, valid, u)
  segment, _ = segments_of(x, valid, u)
  assert tokens.shape == (5, 8, u, 8)
  for b, r in np.ndindex(5, 8):
    wanted, runs = loop_merge(x[b, r, : k[b, r]], u)
    assert list(kept[b, r]) == [i < len(wanted) for i in range(u)]
    assert list(segment[b, r]) == runs + [-1] * (room - k[b, r])
    # A mean of at most `room` frames here, of as many there, and the quotients.
    if len(wanted):
      assert_same_up_to_rounding(tokens[b, r][: len(wanted)], np.array(wanted), 2 * room + 2)
    assert not tokens[b, r][len(wanted) :].any()


# Rows whose similarities are 0, 0.6, 0.8, 0.96 or 1.
FRAMES_345 = {
  "a": (5, 0, 0),
  "b": (3, 4, 0),
  "c": (4, 3, 0),
  "d": (0, 3, 4),
  "e": (0, 4, 3),
  "f": (0, 5, 0),
  "z": (0, 0, 0),
}


@pytest.mark.parametrize(
  ("frames", "u", "tokens"),
  [("bbbdeeeaeaf", 10, 7), ("bfdeeeeecbddc", 12, 8), ("ddee", 3, 2)],
)
def test_ties_hold_in_a_compiled_merge(frames, u, tokens):
  x = np.array([FRAMES_345[frame] for frame in frames], np.float32)
  assert int(merge(x, np.ones(len(x), bool), u)[1].sum()) == tokens


def signed_squares(x):
  """cos·|cos| of neighbouring rows of integers, as exact fractions: they order as cosines do."""
  squares = []
  for a, b in itertools.pairwise(x):
    dot, product = int(a @ b), int(a @ a) * int(b @ b)
    squares.append(fractions.Fraction(dot * abs(dot), product) if product else 0)
  return squares


def pythagorean(rng, shape):
  """Vectors of whole norms in any order, with any signs, once, twice or three times as long."""
  norms = [(1, 2, 2, 0), (2, 3, 6, 0), (1, 4, 8, 0), (1, 1, 1, 1), (1, 1, 3, 5), (2, 4, 5, 6)]
  rows = rng.permuted(np.array(norms)[rng.integers(len(norms), size=shape[0])], axis=1)
  rows = rows * rng.choice([-1, 1], size=rows.shape) * rng.integers(1, 4, size=(shape[0], 1))
  return np.pad(rows, ((0, 0), (0, shape[1] - 4)))


EXACT_ROWS = {
  "integers": (8, lambda rng, shape: rng.integers(-3, 4, size=shape)),
  "345": (3, lambda rng, shape: rng.choice(list(FRAMES_345.values()), size=shape[0])),
  "pythagorean": (8, pythagorean),
  "tower width": (1152, lambda rng, shape: rng.integers(-3, 4, size=shape)),
  # 21-bit integers: their products are not exact in float32, as those of any floats.
  "floats": (64, lambda rng, shape: rng.integers(-(2**20), 2**20, size=shape)),
}


@pytest.mark.parametrize("u", [3, 7])
@pytest.mark.parametrize("rows", EXACT_ROWS)
def test_merges_with_repeated_neighbours_are_those_of_exact_arithmetic(rows, u):
  rng, room, cases = np.random.default_rng(u), 16, 60 if rows == "tower width" else 250
  width, draw = EXACT_ROWS[rows]
  x, k = np.zeros((cases, room, width), np.float32), np.zeros(cases, int)
  expected = np.full((cases, room), -1)
  case = 0
  while case < cases:
    n = rng.integers(u + 1, room + 1)
    frames = draw(rng, (n, width))[np.cumsum(rng.random(n) < 0.5) - 1]  # each stays or is new
    similarity = signed_squares(frames)
    # Only exact sums can tell similarities apart that float32 does not hold apart.
    if rows == "floats" and 0 < np.diff(sorted(set(map(float, similarity)))).min(initial=1) < 1e-4:
      continue
    threshold = sorted(similarity)[u - 1]
    x[case, :n], k[case] = frames, n
    expected[case, :n] = np.cumsum([0, *(s < threshold for s in similarity)])
    case += 1
  valid = np.arange(room) < k[:, None]
  together, _ = segments_of(x, valid, u)
  np.testing.assert_array_equal(together, expected)
  one_by_one = jax.jit(lambda rows: jax.lax.map(lambda row: merge_segments(*row, u)[0], rows))
  np.testing.assert_array_equal(one_by_one((x, valid)), expected)


def test_ties_and_empty_masks_of_the_specification():
  rng = np.random.default_rng(0)

  def kept(x):
    x = np.asarray(x, np.float32)
    return int(merge(x, np.ones(len(x), bool), 4)[1].sum())

  same = np.tile(rng.normal(size=16), (32, 1))
  assert kept(same) == 1
  assert kept(np.repeat(rng.normal(size=(3, 16)), [10, 11, 11], axis=0)) == 3
  walk = np.cumsum(rng.normal(size=(32, 16)) * 0.1, axis=0) + 3
  walk[10:25] = 0  # similarity 0 sixteen times, and nothing below it
  assert kept(walk) == 1
  walk[:5] *= -1  # one negative similarity: one cut
  assert kept(walk) == 2
  assert kept(np.zeros((32, 16))) == 1
  assert kept(rng.normal(size=(32, 16))) == 4


@pytest.fixture(scope="module")
def case():
  """Two rows, three objects on different frames of seven, one with an empty mask, one of them no
  object at all."""
  rng = np.random.default_rng(3)
  frames = np.full((2, 3, 6), -1, np.int32)
  frames[0, 0, :6] = [0, 2, 3, 4, 5, 6]
  frames[0, 1, :1] = [2]
  frames[0, 2, :5] = [6, 5, 3, 1, 0]
  frames[1, 0, :3] = [1, 0, 2]
  frames[1, 1, :5] = [0, 1, 2, 3, 4]
  masks = (rng.random((2, 3, 7, 9)) < 0.4).astype(np.uint8)
  masks[0, 2, 3] = 0
  features = rng.normal(size=(2, 7, 9, 10)).astype(np.float32)
  encoder = RegionEncoder(RegionConfig(width=14, tokens=4))
  shapes = jax.eval_shape(encoder.init, jax.random.key(0), features, masks, frames)["params"]
  params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32) * 0.3, shapes)
  return encoder, params, features, masks, frames


@functools.partial(jax.jit, static_argnums=0)
def encode(encoder, params, features, masks, frames):
  return encoder.apply({"params": params}, features, masks, frames)


def test_objects_on_different_frames(case):
  _, params, features, masks, frames = case
  tokens, kept = encode(*case)
  assert tokens.shape == (2, 3, 4, 14)
  for b, r in np.ndindex(2, 3):
    rows = []
    for p in frames[b, r][frames[b, r] >= 0]:
      m = masks[b, r, p].astype(np.float64)
      rows.append((features[b, p] * m[:, None]).sum(0) / max(m.sum(), 1))
    merged, _ = loop_merge(np.array(rows, np.float32).reshape(-1, 10), 4)
    assert kept[b, r].sum() == len(merged)
    x = np.array(merged).reshape(-1, 10) @ params["fc1"]["kernel"] + params["fc1"]["bias"]
    x = jax.nn.gelu(x, approximate=False) @ params["fc2"]["kernel"] + params["fc2"]["bias"]
    # Means of 9 cells and 6 frames, then sums of 10 and 14 terms; both sides round.
    assert_same_up_to_rounding(tokens[b, r][: len(merged)], x, 2 * (9 + 6 + 10 + 14))


def test_order_of_objects_and_padding_do_not_matter(case):
  encoder, params, features, masks, frames = case
  tokens, kept = encode(*case)
  swap = [2, 0, 1]
  again, kept_again = encode(encoder, params, features, masks[:, swap], frames[:, swap])
  np.testing.assert_array_equal(again, tokens[:, swap])
  np.testing.assert_array_equal(kept_again, kept[:, swap])

  more = np.concatenate([frames, np.full((2, 3, 5), -1, np.int32)], axis=2)
  spare = np.full((2, 4, 9, 10), 1e6, np.float32)
  wide = np.concatenate([features, spare], axis=1)
  masks = np.concatenate([masks, np.ones((2, 3, 4, 9), np.uint8)], axis=2)
  again, kept_again = encode(encoder, params, wide, masks, more)
  assert_same_up_to_rounding(again, tokens, 2 * (9 + 6 + 10 + 14))  # as above
  np.testing.assert_array_equal(kept_again, kept)


@pytest.mark.parametrize("exponent", [-30, 0, 60, 120])  # 2^60 is 1.2e18
def test_scaling_by_a_power_of_two_keeps_every_bit(exponent):
  x = np.random.default_rng(0).normal(size=(12, 8)).astype(np.float32)
  scale = 2.0 ** (exponent + np.arange(-6, 6, dtype=np.float32)[:, None])
  valid = np.ones(12, bool)
  (a, s), (b, t) = segments_of(x, valid, 4), segments_of(x * scale, valid, 4)
  np.testing.assert_array_equal(a, b)
  np.testing.assert_array_equal(s, t)


@pytest.mark.parametrize("size", [1e-10, 1e-12, 1e-18, 1e-20])
def test_a_norm_below_1e_12_counts_as_1e_12(size):
  x = (np.random.default_rng(0).normal(size=(9, 8)) * size).astype(np.float32)
  _, similarity = segments_of(x, np.ones(9, bool), 4)
  exact = x.astype(np.float64)
  unit = exact / np.maximum(np.linalg.norm(exact, axis=-1, keepdims=True), 1e-12)
  # Sums of 8 products, a root and a quotient: 16 roundings of what the norms can make of it.
  norms = np.linalg.norm(unit, axis=-1)
  error = np.abs(similarity - (unit[:-1] * unit[1:]).sum(-1))
  assert (error <= 16 * 2**-24 * norms[:-1] * norms[1:]).all()
  assert not segments_of(0 * x, np.ones(9, bool), 4)[1].any()


def test_gradients_are_finite_and_reach_only_what_was_seen(case):
  encoder, params, features, masks, frames = case

  def loss(params, features):
    tokens, kept = encoder.apply({"params": params}, features, masks, frames)
    return jnp.sum(jnp.where(kept[..., None], jnp.sin(tokens), 0))

  of_params, of_features = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, features)
  assert all(np.isfinite(g).all() and g.any() for g in jax.tree.leaves(of_params))
  assert np.isfinite(of_features).all()
  assert of_features.any(axis=(2, 3)).tolist() == [[True] * 7, [True] * 5 + [False] * 2]


def test_an_empty_mask_pools_to_zero_and_soft_values_are_not_needed():
  features = np.random.default_rng(0).normal(size=(1, 1, 4, 3)).astype(np.float32)
  masks = np.array([[[[0, 0, 0, 0]], [[0, 1, 1, 0]], [[1, 1, 1, 1]]]], np.uint8)
  pooled = pool_regions(features, masks)
  assert not pooled[0, 0].any()
  np.testing.assert_allclose(pooled[0, 1, 0], features[0, 0, 1:3].mean(0), rtol=1e-6)
  np.testing.assert_allclose(pooled[0, 2, 0], features[0, 0].mean(0), rtol=1e-5)


def test_parameter_count_at_full_size():
  cfg = RegionConfig()
  arguments = (
    jax.ShapeDtypeStruct((1, 2, 729, 1152), jnp.float32),
    jax.ShapeDtypeStruct((1, 2, 2, 729), jnp.uint8),
    jax.ShapeDtypeStruct((1, 2, 2), jnp.int32),
  )
  params = jax.eval_shape(RegionEncoder(cfg).init, jax.random.key(0), *arguments)["params"]
  assert sum(x.size for x in jax.tree.leaves(params)) == 16_980_992
  assert set(params) == {"fc1", "fc2"}
  with pytest.raises(InputError, match="tokens=0"):
    RegionConfig(tokens=0)
