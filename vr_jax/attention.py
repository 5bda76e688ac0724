"""One attention for every module; a table says which kernel takes a call, and why not another.

    splash   TPU: blocks of scores stay on the chip; causal, windows, padding, packed rows, soft cap
    cudnn    CUDA with cuDNN, half precision: the same on Hopper; no packed rows, no soft cap
    xla      everything else: scores in memory, any mask, half of them where it is causal

What a query sees is told as `Causal`, as `Inside` (all of its own segment) or, where kernels
cannot know it, as a mask.

Letters: B batch, L query, S key, N query head, K key/value head, G query heads of one K, H head.
"""

import dataclasses
import functools
import importlib.util
import logging
from collections.abc import Callable
from typing import no_type_check

import flax
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Bool, Float, Int

from vr_jax.arrays import Array
from vr_jax.sharding import ActivationRules, act_spec

MASKED = -2.0e38  # finite, so that a padding query with no visible key gives numbers, not NaN
BLOCK = 128  # blocks of slots are multiples of it
XLA_BLOCKS = 8  # at most, so that long rows do not make long programs
log = logging.getLogger(__name__)


@no_type_check  # JAX rebuilds it with leaves of any kind
@flax.struct.dataclass
class Causal:
  """A causal mask as kernels know it, for queries that are their own keys, slots in order.

  segments i32 [B,L]: a slot sees the slots before it of its own segment; -1 is padding. `packed`:
  a row may hold several segments (otherwise one, with all padding behind it). `window` w keeps keys
  closer than w.
  """

  segments: Int[Array, "B L"]
  packed: bool = flax.struct.field(pytree_node=False, default=False)
  window: int | None = flax.struct.field(pytree_node=False, default=None)


@no_type_check  # JAX rebuilds it with leaves of any kind
@flax.struct.dataclass
class Inside:
  """Full attention inside segments, for queries that are their own keys: pictures in one row.

  segments i32 [B,L]: a slot sees every slot of its own segment, which stands in one piece; -1 is
  padding, behind them.
  """

  segments: Int[Array, "B L"]


@dataclasses.dataclass(frozen=True)
class Call:
  """All that decides which kernel takes a call. `mask`: "none", "causal", "inside" or "dense";
  sizes are those of the whole arrays, `shards` the parts that the heads are split into."""

  platform: str
  dtype: str
  L: int
  S: int
  N: int
  K: int
  H: int
  mask: str
  packed: bool = False
  soft_cap: float | None = None
  shards: tuple[int, int] = (1, 1)  # of query heads, of key heads


@dataclasses.dataclass(frozen=True)
class Kernel:
  """A way to compute attention and its limits: `refuses(call)` gives a reason or None."""

  name: str
  run: Callable[..., Array]
  refuses: Callable[[Call], str | None]


def attention(
  q: Float[Array, "B L N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  mask: Bool[Array, "B L S"] | None = None,
  *,
  scale: float,
  soft_cap: float | None = None,
  causal: Causal | Inside | None = None,
  rules: ActivationRules = (),
  names: tuple[str | None, ...] = ("batch", "heads", "kv_heads"),
) -> Float[Array, "B L N H"]:
  """Softmax attention of N query heads over K = N/G key heads, softmax in float32.

  A query sees the keys where `mask` is True (None: all). `soft_cap` c replaces a score s by
  c * tanh(s / c) (Gemma 2, arXiv 2408.00118 section 2). Returns q's dtype.

  Args:
    causal: what `mask` says in a form that every kernel takes; padding queries then give anything.
      An `Inside` needs no mask beside it.
    rules: placement of activations; the kernels run on each device's part of them. (): rows over
      the mesh axis `data`, heads over `tensor` and frames over both, as far as there are such axes.
    names: the activation axes of B, N and K in the rules, None for one that stays whole.
  """
  call = describe(q, k, mask, causal, soft_cap, rules, names)
  kernel = next(kernel for kernel in KERNELS if kernel.refuses(call) is None)
  if call.platform != "cpu":
    _say(call)

  def run(q, k, v):
    return kernel.run(q, k, v, mask, causal, scale, soft_cap, rules, names)

  if isinstance(causal, Inside):
    return _of_pictures(run, q, k, v, causal.segments, scale, soft_cap)
  return run(q, k, v)


def choice(call: Call) -> dict[str, str]:
  """Kernel name -> 'taken' or the reason it was passed over, in order of preference."""
  report = {}
  for kernel in KERNELS:
    reason = kernel.refuses(call)
    report[kernel.name] = reason or "taken"
    if reason is None:
      break
  return report


def describe(q, k, mask, causal, soft_cap, rules=(), names=("batch", "heads", "kv_heads")) -> Call:
  """The call of `attention` with these arrays or shapes, on the platform of the current mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  device = mesh.abstract_device
  specs = _specs(q, k, rules, names)
  sizes = [1 if part is None else mesh.shape[part] for part in (specs[0][2], specs[1][2])]
  return Call(
    platform=jax.default_backend() if device is None else device.platform,
    dtype=q.dtype.name,
    L=q.shape[1],
    S=k.shape[1],
    N=q.shape[2],
    K=k.shape[2],
    H=q.shape[3],
    mask=_kind_of_mask(mask, causal),
    packed=isinstance(causal, Inside) or (causal is not None and causal.packed),
    soft_cap=soft_cap,
    shards=(sizes[0], sizes[1]),
  )


def _kind_of_mask(mask, causal) -> str:
  if isinstance(causal, Inside):
    return "inside"
  if causal is not None:
    return "causal"
  return "none" if mask is None else "dense"


@functools.cache
def _say(call: Call) -> None:
  """Once for every kind of call."""
  *passed, (taken, _) = choice(call).items()
  why = "".join(f"; not {name}: {reason}" for name, reason in passed)
  shape = f"{call.L} x {call.S} slots, {call.N} heads of {call.H} over {call.K}, {call.dtype}"
  log.info("attention: %s for %s%s", taken, shape, why)


# Of a mesh of inference, where no rules are given: the compiler places all else (see
# inference/placement.py), and must be told of the kernels alone, which it cannot cut.
_INFERENCE = {
  "batch": ("data",),
  "frame": ("data", "tensor"),
  "heads": ("tensor",),
  "kv_heads": ("tensor",),
}


def _specs(q, k, rules, names):
  """Partitions of q and of k, v."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return jax.P(None, None, None, None), jax.P(None, None, None, None)
  if not rules:
    present = {n: tuple(a for a in axes if a in mesh.axis_names) for n, axes in _INFERENCE.items()}
    rules = tuple((n, axes or None) for n, axes in present.items())
  batch, heads, kv_heads = names
  return (
    act_spec(q.shape, rules, batch, None, heads, None),
    act_spec(k.shape, rules, batch, None, kv_heads, None),
  )


# --- Pictures ---------------------------------------------------------------------------------

WINDOWS = (256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)  # keys
SCORES = 1 << 22  # of a head, that are held at once


def _of_pictures(over_row, q, k, v, segments, scale, soft_cap):
  """Each block of queries over a window of keys that holds all of its pictures.

  Over the whole row each frame of a clip of 180 would cost 180 times what it needs. How long a
  window must be is known when the pictures are: the least of a few sizes that is enough is taken,
  or `over_row` where none is.

      row       a a a a a a b b b b b b c c c c c c - -
      block             └─┬─┘
      window    └─────────┴─────────┘
  """
  windows = _windows(q.shape[1])
  if not windows:
    return over_row(q, k, v)
  first, last = _runs(segments)
  branches = [
    functools.partial(_over_windows, segments, first, *window, scale, soft_cap)
    for window in windows
  ]
  return jax.lax.switch(_level(first, last, windows), [*branches, over_row], q, k, v)


def _windows(L: int) -> list[tuple[int, int]]:
  """Keys of a window and queries of a block, of those that a row of L slots is long enough for."""
  return [(size, min(max(size // 8, 32), BLOCK)) for size in WINDOWS if size <= 0.8 * L]


def _level(first, last, windows) -> Int[Array, ""]:
  """The first window that is enough, or their number."""
  enough = jnp.stack([_longest(first, last, block) <= size for size, block in windows])
  return jnp.where(enough.any(), jnp.argmax(enough), len(windows))


def keys_of_pictures(segments: Int[Array, "B L"]) -> int:
  """How many keys each patch of these rows is compared with, for accounts of FLOPs."""
  L = segments.shape[1]
  windows = _windows(L)
  level = int(_level(*_runs(segments), windows)) if windows else 0
  return windows[level][0] if level < len(windows) else L


def _runs(segments: Int[Array, "B L"]) -> tuple[Int[Array, "B L"], Int[Array, "B L"]]:
  """The first and the last slot of each slot's segment; padding may see anything and sees itself.

  segments   0 0 0 1 1 -1 -1
  first      0 0 0 3 3  5  6
  last       2 2 2 4 4  5  6
  """
  slots = jnp.arange(segments.shape[1])
  padding = segments < 0
  begins = (jnp.diff(segments, axis=1, prepend=-2) != 0) | padding
  ends = (jnp.diff(segments, axis=1, append=-2) != 0) | padding
  first = jax.lax.cummax(jnp.where(begins, slots, 0), axis=1)
  last = jax.lax.cummin(jnp.where(ends, slots, len(slots)), axis=1, reverse=True)
  return first, last


def _longest(first: Int[Array, "B L"], last: Int[Array, "B L"], block: int) -> Int[Array, ""]:
  """How many keys the pictures of a block of queries have at most."""
  L = first.shape[1]
  ends = jnp.minimum(jnp.arange(block - 1, L - 1 + block, block), L - 1)
  return (last[:, ends] + 1 - first[:, ::block]).max()


def _over_windows(segments, first, size, block, scale, soft_cap, q, k, v):
  B, L = segments.shape
  count = -(-L // block)
  here = jnp.pad(segments, ((0, 0), (0, count * block - L)), constant_values=-1)
  queries = jnp.pad(q, ((0, 0), (0, count * block - L), (0, 0), (0, 0)))
  queries, here = (rearrange(x, "B (n b) ... -> n B b ...", b=block) for x in (queries, here))
  starts = jnp.minimum(first[:, ::block], L - size).T
  slices = jax.vmap(lambda x, at: jax.lax.dynamic_slice_in_dim(x, at, size))

  def attend(one):
    queries, here, start = one
    seen = here[:, :, None] == slices(segments, start)[:, None]
    return _masked(queries, slices(k, start), slices(v, start), seen, scale, soft_cap)

  together = max(1, SCORES // (B * block * size))
  if together >= count:
    y = jax.vmap(attend)((queries, here, starts))
  else:
    y = jax.lax.map(attend, (queries, here, starts), batch_size=together)
  return rearrange(y, "n B b N H -> B (n b) N H")[:, :L]


# --- xla --------------------------------------------------------------------------------------


def _xla(q, k, v, mask, causal, scale, soft_cap, rules, names):
  """Where the mask is causal, in up to XLA_BLOCKS blocks of queries, each over the keys that it may
  see: what lies beyond is not computed. Pictures are taken in as many blocks, to hold less."""
  L = q.shape[1]
  if isinstance(causal, Inside):
    return _inside(q, k, v, causal.segments, scale, soft_cap)
  size = BLOCK * -(-L // (BLOCK * XLA_BLOCKS))
  if causal is None or size >= L:
    return _masked(q, k, v, mask, scale, soft_cap)
  parts = []
  for start in range(0, L, size):
    end = min(start + size, L)
    first = 0 if causal.window is None else max(0, start - causal.window + 1)
    seen = None if mask is None else mask[:, start:end, first:end]
    parts.append(_masked(q[:, start:end], k[:, first:end], v[:, first:end], seen, scale, soft_cap))
  return jnp.concatenate(parts, axis=1)


def _inside(q, k, v, segments, scale, soft_cap):
  """A few blocks of queries, one after another over the whole row, to hold less at once."""
  L = q.shape[1]
  size = BLOCK * -(-L // (BLOCK * XLA_BLOCKS))
  parts = []
  for start in range(0, L, size):
    block = slice(start, min(start + size, L))
    seen = segments[:, block, None] == segments[:, None, :]
    parts.append(_masked(q[:, block], k, v, seen, scale, soft_cap))
  return jnp.concatenate(parts, axis=1)


def _masked(q, k, v, mask, scale, soft_cap):
  """One matmul for each key head.

  Query heads come in groups: the G = N / K that share key head K follow each other among the N.
  The queries of a group stand above each other as G * L rows of one matrix, so that a key head's
  keys are read once, whether a group has one head (K = N) or all of them (K = 1):

      q [B,L,(K G),H]  ──►  [B,K,(G L),H]  @  k [B,K,S,H]  ──►  scores [B,K,(G L),S]
  """
  L, K = q.shape[1], k.shape[2]
  q = rearrange(q, "B L (K G) H -> B K (G L) H", K=K)
  k, v = (rearrange(x, "B S K H -> B K S H") for x in (k, v))
  scores = jnp.einsum("BKRH,BKSH->BKRS", q, k, preferred_element_type=jnp.float32) * scale
  if soft_cap is not None:
    scores = jnp.tanh(scores / soft_cap) * soft_cap
  if mask is not None:  # the same for all heads
    scores = rearrange(scores, "B K (G L) S -> B K G L S", L=L)
    scores = jnp.where(mask[:, None, None], scores, MASKED)
    scores = rearrange(scores, "B K G L S -> B K (G L) S")
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  y = jnp.einsum("BKRS,BKSH->BKRH", weights, v)
  return rearrange(y, "B K (G L) H -> B L (K G) H", L=L)


# --- splash -----------------------------------------------------------------------------------


def _splash_refuses(call: Call) -> str | None:
  if call.platform != "tpu":
    return f"runs on TPU, not on {call.platform}"
  if call.mask == "dense":
    return "takes no mask that is not causal"
  if call.L != call.S:
    return f"{call.L} queries over {call.S} keys"
  if call.L < BLOCK:
    return f"{call.L} slots are less than one block of {BLOCK}"
  if call.shards[0] != call.shards[1] and call.K > 1:
    return f"{call.K} key heads are not split as {call.N} query heads are"
  return None


def _splash(q, k, v, mask, causal, scale, soft_cap, rules, names, interpret=False):
  """Pads the slots to whole blocks; the partitioner cannot cut a kernel, so each device is given
  its own rows and heads."""
  L = q.shape[1]
  extra = -L % BLOCK
  if causal is not None:
    segments = causal.segments
  else:
    segments = jnp.zeros(q.shape[:2], jnp.int32)
  q = (q.astype(jnp.float32) * scale).astype(q.dtype)  # the kernel scales nothing
  q, k, v = (jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, 0))) for x in (q, k, v))
  segments = jnp.pad(segments, ((0, 0), (0, extra)), constant_values=-1)
  window = causal.window if isinstance(causal, Causal) else None
  run = functools.partial(
    _splash_local,
    is_causal=isinstance(causal, Causal),
    window=window,
    soft_cap=soft_cap,
    interpret=interpret,
  )
  if not jax.sharding.get_abstract_mesh().empty:
    q_spec, k_spec = _specs(q, k, rules, names)
    segments_spec = jax.P(q_spec[0], None)
    run = jax.shard_map(
      run, in_specs=(q_spec, k_spec, k_spec, segments_spec), out_specs=q_spec, check_vma=False
    )
  return run(q, k, v, segments)[:, :L]


def _splash_local(q, k, v, segments, *, is_causal, window, soft_cap, interpret):
  # Pallas is slow to import and only TPUs need it.
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  L, N, K = q.shape[1], q.shape[2], k.shape[2]
  if not is_causal:
    mask = masks.FullMask((L, L))
  elif window is None:
    mask = masks.CausalMask((L, L))
  else:
    mask = masks.LocalMask((L, L), (window - 1, 0), 0)
  block = next(b for b in (512, 384, 256, BLOCK) if L % b == 0)
  blocks = kernels.BlockSizes(
    block_q=block,
    block_kv=block,
    block_kv_compute=block,
    block_q_dkv=block,
    block_kv_dkv=block,
    block_kv_dkv_compute=block,
    use_fused_bwd_kernel=True,
  )
  kernel = kernels.make_splash_mqa_single_device(
    masks.MultiHeadMask([mask] * (N // K)),
    block_sizes=blocks,
    attn_logits_soft_cap=soft_cap,
    interpret=interpret,
  )
  # The kernel takes one key head and its G query heads; rows and key heads are mapped over it.
  q = rearrange(q, "B L (K G) H -> B K G L H", K=K)
  k, v = (rearrange(x, "B S K H -> B K S H") for x in (k, v))
  key_heads = jax.vmap(kernel, in_axes=(0, 0, 0, None))
  y = jax.vmap(key_heads)(q, k, v, kernels.SegmentIds(segments, segments))
  return rearrange(y, "B K G L H -> B L (K G) H").astype(q.dtype)


# --- cuDNN ------------------------------------------------------------------------------------


@functools.cache
def _has_cudnn() -> bool:
  """Whether cuDNN is here: programs for absent GPUs can hold its kernels only then."""
  try:
    return importlib.util.find_spec("nvidia.cudnn") is not None
  except ModuleNotFoundError:
    return False


def _cudnn_refuses(call: Call) -> str | None:
  if call.platform not in ("cuda", "gpu"):
    return f"runs on CUDA, not on {call.platform}"
  if not _has_cudnn():
    return "cuDNN is not installed"
  if call.dtype not in ("bfloat16", "float16"):
    return f"takes half precision, not {call.dtype}"
  if call.H > 256 or call.H % 8:
    return f"takes heads of up to 256 in multiples of 8, not {call.H}"
  if call.soft_cap is not None:
    return "has no soft cap"
  if call.packed:
    return "takes one segment a row"
  if call.mask == "dense":
    return "takes no mask that is not causal"
  if call.L != call.S:
    return f"{call.L} queries over {call.S} keys"
  return None


def _cudnn(q, k, v, mask, causal, scale, soft_cap, rules, names):
  lengths = {}
  if causal is not None:
    valid = (causal.segments >= 0).sum(-1, dtype=jnp.int32)
    lengths = {"query_seq_lengths": valid, "key_value_seq_lengths": valid, "is_causal": True}
    if causal.window is not None:
      lengths["local_window_size"] = (causal.window - 1, 0)
  return jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="cudnn", **lengths)


KERNELS = (
  Kernel("splash", _splash, _splash_refuses),
  Kernel("cudnn", _cudnn, _cudnn_refuses),
  Kernel("xla", _xla, lambda call: None),
)
