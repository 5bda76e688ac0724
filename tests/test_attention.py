"""Kernels of attention: numerics against xla on the head sizes in use, and who takes which call."""

import functools
from dataclasses import replace as but

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rounding import assert_same_up_to_rounding

from vr_jax import attention as module
from vr_jax.attention import Call, Causal, attention, choice
from vr_jax.flops import count_flops
from vr_jax.sharding import TENSOR_RULES, make_mesh

NAMES = ("batch", "heads", "kv_heads")


def inputs(B, L, N, K, H, segments=None):
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = (B, L, N, H), (B, L, K, H), (B, L, K, H)
  q, k, v = (jax.random.normal(key, s) for key, s in zip(keys, shapes, strict=True))
  if segments is None:
    return q, k, v, None, None
  segments = jnp.asarray(np.broadcast_to(segments, (B, L)), jnp.int32)
  return q, k, v, segments, segments >= 0


def dense(segments, window=None):
  """The mask that `Causal` describes."""
  slot = jnp.arange(segments.shape[1])
  mask = (slot[:, None] >= slot) & (segments[:, :, None] == segments[:, None, :])
  mask &= segments[:, None, :] >= 0
  return mask if window is None else mask & (slot[:, None] - slot < window)


def with_gradients(run, q, k, v, valid):
  """(output at valid queries, gradients of a weighting of it)."""

  def total(q, k, v):
    y = run(q, k, v)
    y = y if valid is None else jnp.where(valid[..., None, None], y, 0)
    return (y * jnp.sin(jnp.arange(y.size).reshape(y.shape))).sum(), y

  (_, y), grads = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(q, k, v)
  return y, *grads


ROW = np.where(np.arange(256) < 200, 0, -1)  # padding behind one segment
PACKED = np.repeat([0, 1, -1], [100, 120, 36])
CASES = {
  # Qwen2 (grouped), the tower, Gemma (one key head, soft cap, packed), Gemma's local layers
  "qwen2": ((1, 256, 4, 2, 128), ROW, False, None, None),
  "tower": ((1, 169, 2, 2, 72), None, False, None, None),
  "gemma": ((1, 256, 2, 1, 256), PACKED, True, 50.0, None),
  "local": ((1, 256, 2, 1, 64), ROW, False, None, 40),
}


@pytest.mark.parametrize(
  "name", ["qwen2", *(pytest.param(n, marks=pytest.mark.slow) for n in CASES if n != "qwen2")]
)
def test_splash_equals_xla(name):
  sizes, segments, packed, soft_cap, window = CASES[name]
  q, k, v, segments, valid = inputs(*sizes, segments)
  causal = None if segments is None else Causal(segments, packed, window)
  mask = None if segments is None else dense(segments, window)
  scale = sizes[-1] ** -0.5
  splash = functools.partial(module._splash, interpret=True)
  got, want = (
    with_gradients(
      lambda q, k, v, run=run: run(q, k, v, mask, causal, scale, soft_cap, (), NAMES),
      *(q, k, v, valid),
    )
    for run in (splash, module._xla)
  )
  for a, b in zip(got, want, strict=True):
    # Scores, softmax and mean forward; each has two sums in the gradient.
    assert_same_up_to_rounding(a, b, 3 * (sizes[-1] + 3 * sizes[1]))


@pytest.mark.parametrize(
  "name", [*(pytest.param(n, marks=pytest.mark.slow) for n in ("qwen2", "gemma")), "local"]
)
def test_blocks_of_a_causal_call_equal_the_whole_with_its_mask(name):
  (B, _, N, K, H), segments, packed, soft_cap, window = CASES[name]
  segments = np.concatenate([segments, np.full(44, -1)])  # a last block that is not full
  q, k, v, segments, valid = inputs(B, 300, N, K, H, segments)
  mask = dense(segments, window)

  def run(causal, q, k, v):
    return attention(q, k, v, mask, scale=H**-0.5, soft_cap=soft_cap, causal=causal)

  blocks, whole = (
    functools.partial(run, causal) for causal in (Causal(segments, packed, window), None)
  )
  got, want = (with_gradients(f, q, k, v, valid) for f in (blocks, whole))
  for a, b in zip(got, want, strict=True):
    assert_same_up_to_rounding(a, b, 3 * (H + 3 * 300))  # as above
  assert count_flops(blocks, q, k, v) < 0.7 * count_flops(whole, q, k, v)


@pytest.mark.slow
def test_splash_works_on_each_devices_rows_and_heads():
  q, k, v, segments, _ = inputs(4, 128, 4, 2, 32, ROW[72:200])
  run = functools.partial(module._splash, interpret=True)
  want = module._xla(q, k, v, dense(segments), None, 0.2, None, (), NAMES)
  with jax.set_mesh(make_mesh([("data", 2), ("fsdp", 2), ("tensor", 2)])):
    got = jax.jit(lambda q, k, v: run(q, k, v, None, Causal(segments), 0.2, None, RULES, NAMES))(
      q, k, v
    )
  assert_same_up_to_rounding(got, want, 32 + 3 * 128)


RULES = TENSOR_RULES
TPU = Call("tpu", "bfloat16", 2048, 2048, 28, 4, 128, "causal")
GPU = Call("cuda", "bfloat16", 2048, 2048, 28, 4, 128, "causal")


@pytest.mark.parametrize(
  ("call", "taken"),
  [
    (TPU, "splash"),
    (but(TPU, packed=True, soft_cap=50.0, H=256), "splash"),
    (but(TPU, mask="none", L=729, S=729, N=16, K=16, H=72), "splash"),
    (but(TPU, mask="dense"), "xla"),
    (but(TPU, L=1), "xla"),
    (but(TPU, N=8, K=2, shards=(4, 1)), "xla"),
    (but(TPU, N=8, K=1, shards=(4, 1)), "splash"),
    (GPU, "cudnn"),
    (but(GPU, mask="none", L=729, S=729, N=16, K=16, H=72), "cudnn"),
    (but(GPU, packed=True), "xla"),
    (but(GPU, soft_cap=50.0), "xla"),
    (but(GPU, H=260), "xla"),
    (but(GPU, dtype="float32"), "xla"),
    (but(GPU, platform="cpu"), "xla"),
  ],
)
def test_the_first_kernel_that_can_takes_the_call(call, taken, monkeypatch):
  monkeypatch.setattr(module, "_has_cudnn", lambda: True)
  report = choice(call)
  assert report.pop(taken) == "taken"
  assert all(report.values())  # a reason for each that was passed over


def test_without_cudnn_a_gpu_takes_xla_and_says_why(monkeypatch, caplog):
  monkeypatch.setattr(module, "_has_cudnn", lambda: False)
  assert choice(GPU) == {
    "splash": "runs on TPU, not on cuda",
    "cudnn": "cuDNN is not installed",
    "xla": "taken",
  }
  with caplog.at_level("INFO", "vr_jax.attention"):
    for _ in range(2):
      module._say(but(GPU, L=1234, S=1234))
  (record,) = caplog.records  # once
  assert "attention: xla for 1234 x 1234 slots, 28 heads of 128 over 4" in record.getMessage()
  assert "not cudnn: cuDNN is not installed" in record.getMessage()


def test_here_attention_is_xla():
  q = jnp.ones((1, 4, 2, 8))
  assert choice(module.describe(q, q, None, None, None))["xla"] == "taken"
  assert attention(q, q, q, scale=1.0).shape == q.shape


@pytest.mark.compile
@pytest.mark.parametrize(
  ("sizes", "is_causal", "soft_cap"),
  [
    ((2, 1536, 28, 4, 128), True, None),
    ((2, 729, 16, 16, 72), False, None),
    ((2, 2048, 16, 8, 256), True, 50.0),
  ],
)
def test_splash_compiles_for_a_tpu(sizes, is_causal, soft_cap):
  """Forward and backward, over two rows and two groups of heads, with no scores in memory."""
  from vr_jax.hardware import parse_target, target_devices

  mesh = make_mesh(
    [("data", 1), ("fsdp", 2), ("tensor", 2)], target_devices(parse_target("tpu:v5e:2x2"))
  )
  B, L, N, K, H = sizes
  rows = jax.NamedSharding(mesh, jax.P("fsdp"))

  def total(q, k, v, segments):
    causal = Causal(segments) if is_causal else None
    options = {"scale": H**-0.5, "soft_cap": soft_cap, "causal": causal, "rules": RULES}
    return attention(q, k, v, **options).astype(jnp.float32).sum()

  shapes = [
    jax.ShapeDtypeStruct((B, L, heads, H), jnp.bfloat16, sharding=rows) for heads in (N, K, K)
  ]
  segments = jax.ShapeDtypeStruct((B, L), jnp.int32, sharding=rows)
  with jax.set_mesh(mesh):
    compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(*shapes, segments).compile()
  assert compiled.as_text().count("custom-call") >= 2
  assert compiled.memory_analysis().temp_size_in_bytes < L * L * 4  # less than one head's scores


@pytest.mark.compile
@pytest.mark.parametrize("axis", ["data", "tensor"])
@pytest.mark.parametrize(
  ("sizes", "is_causal"), [((4, 1536, 28, 4, 128), True), ((1, 729, 16, 16, 72), False)]
)
def test_splash_compiles_for_inference_on_several_chips(axis, sizes, is_causal):
  """As the programs of inference call it: without rules, on a mesh of one axis."""
  from vr_jax.hardware import parse_target, target_devices

  mesh = make_mesh([(axis, 4)], target_devices(parse_target("tpu:v5e:2x2")))
  B, L, N, K, H = sizes
  names = {} if is_causal else {"names": ("frame", None, None)}

  def run(q, k, v, segments):
    causal = Causal(segments) if is_causal else None
    return attention(q, k, v, scale=H**-0.5, causal=causal, **names)

  whole = jax.NamedSharding(mesh, jax.P())
  shapes = [
    jax.ShapeDtypeStruct((B, L, heads, H), jnp.bfloat16, sharding=whole) for heads in (N, K, K)
  ]
  segments = jax.ShapeDtypeStruct((B, L), jnp.int32, sharding=whole)
  with jax.set_mesh(mesh):
    compiled = jax.jit(run).lower(*shapes, segments).compile()
  assert "tpu_custom_call" in compiled.as_text()


@pytest.mark.parametrize("scores", [module.SCORES, 1 << 14])
def test_pictures_in_one_row_see_themselves_alone(scores, monkeypatch):
  """Whatever window is taken, or the row itself, gives what each picture gives alone."""
  monkeypatch.setattr(module, "SCORES", scores)
  q, k, v, *_ = inputs(1, 640, 2, 2, 8)
  run = jax.jit(lambda segments: attention(q, k, v, scale=0.3, causal=module.Inside(segments)))
  for sizes in ((7,) * 70, (90, 200, 60), (3, 500), (300, 1)):
    segments = np.full((1, 640), -1, np.int32)
    segments[0, : sum(sizes)] = np.repeat(np.arange(len(sizes)), sizes)
    y, at = run(segments), 0
    for size in sizes[:3]:
      part = slice(at, at := at + size)
      alone = attention(q[:, part], k[:, part], v[:, part], scale=0.3)
      np.testing.assert_allclose(y[:, part], alone, atol=2e-6)
