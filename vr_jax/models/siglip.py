"""SigLIP vision tower.

Letters: X image, S pixel, P patch side, N patch (grid * grid), D width, A head, H head width,
K layer that runs; of a batch: B row, P frame of the row, T scene frame, C clip of a packed row,
V scene token, E decoder width.

Parameters carry big_vision's names, the layer axis K in front (its scanned layout):
  embedding/{kernel [P,P,3,D], bias}, pos_embedding [1,N,D]
  Transformer/encoderblock/{LayerNorm_0,LayerNorm_1}/{scale,bias}
  Transformer/encoderblock/MultiHeadDotProductAttention_0/{query,key,value,out}/{kernel,bias}
  Transformer/encoderblock/MlpBlock_0/{Dense_0,Dense_1}/{kernel,bias}
  Transformer/encoder_norm/{scale,bias}                (only where every layer runs)
  MAPHead_0/...                                        (only with `pool`)

Source: SigLIP (arXiv 2303.15343); VideoRefer Suite (2501.00599) section 3.1 and its published
`encoder.py`, which takes the output of the last layer but one.
"""

import dataclasses
import functools
from typing import Any, ClassVar, Protocol, no_type_check, runtime_checkable

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Bool, Float, Int, UInt8

from data_pipes.errors import InputError
from vr_jax.arrays import Array
from vr_jax.attention import Inside, attention
from vr_jax.models.rotary import rotate
from vr_jax.remat import remat
from vr_jax.sharding import ActivationRules, shard_act


@dataclasses.dataclass(frozen=True)
class SiglipConfig:
  """Sizes of the tower; the defaults are so400m/14 at 384 pixels.

  `depth` counts the layers of the published tower. `select_layer` says which hidden state is the
  output, as an index into [embeddings, layer 1, ..., layer `depth`] (-2: the last layer but one);
  layers above it are not built. None runs all layers and the norm behind them. `pool` adds the
  attention-pooling head and needs None. `dtype` is that of the matmuls; `remat` is none, dots,
  full or offload.
  """

  kind: ClassVar[str] = "siglip"  # of videorefer.TOWERS

  image_size: int = 384
  patch_size: int = 14
  width: int = 1152
  depth: int = 27
  heads: int = 16
  mlp_dim: int = 4304
  select_layer: int | None = -2
  pool: bool = False
  dtype: str = "float32"
  remat: str = "none"

  def __post_init__(self):
    if self.width % self.heads:
      raise InputError(f"width={self.width} is not divisible by heads={self.heads}")
    if self.pool and self.select_layer is not None:
      raise InputError("pool=True needs select_layer=None: the head reads the normed last layer")
    if not 0 <= self.layers <= self.depth:
      raise InputError(
        f"select_layer={self.select_layer} is not a hidden state of a tower with "
        f"{self.depth} layers ({-self.depth - 1}..{self.depth})"
      )

  @property
  def grid(self) -> int:
    """Patches per side; pixels beyond the last whole patch are never seen (384 / 14 gives 27)."""
    return self.image_size // self.patch_size

  @property
  def layers(self) -> int:
    """Layers that run."""
    if self.select_layer is None:
      return self.depth
    return self.select_layer + (self.depth + 1 if self.select_layer < 0 else 0)


@runtime_checkable
class AttentionSizes(Protocol):
  """What a config says of attention."""

  @property
  def width(self) -> int: ...

  @property
  def heads(self) -> int: ...

  @property
  def dtype(self) -> str: ...


@runtime_checkable
class TowerSizes(AttentionSizes, Protocol):
  """What a config says of the layers, here and in `navit.NavitConfig`."""

  @property
  def patch_size(self) -> int: ...

  @property
  def mlp_dim(self) -> int: ...

  @property
  def layers(self) -> int: ...

  @property
  def select_layer(self) -> int | None: ...

  @property
  def remat(self) -> str: ...


@no_type_check  # JAX rebuilds it with leaves of any kind
@flax.struct.dataclass
class Pictures:
  """Where the patches of a row stand that holds several pictures.

  segments i32 [X,N]: the picture of a patch, -1 for padding; cos, sin f32 [X,N,H/2]: its rotary
  angles.
  """

  segments: Int[Array, "X N"]
  cos: Float[Array, "X N A"]
  sin: Float[Array, "X N A"]


def pixels(frames: UInt8[Array, "..."]) -> Float[Array, "..."]:
  """uint8 to the tower's range [-1, 1], float32, bit-equal to SiglipImageProcessor."""
  scaled = frames.astype(jnp.float32) * jnp.float32(0.00392156862745098)
  return (scaled - 0.5) / 0.5


class PatchEmbedding(nn.Module):
  """Convolution with stride = kernel = patch and valid padding, as a reshape and one matmul."""

  cfg: TowerSizes

  def __call__(self, pixels: Float[Array, "X S S 3"]) -> Float[Array, "X N D"]:
    P = self.cfg.patch_size
    seen = pixels.shape[1] // P * P
    patches = rearrange(pixels[:, :seen, :seen], "X (h p) (w q) C -> X (h w) (p q C)", p=P, q=P)
    return self.of_patches(patches)

  @nn.compact
  def of_patches(self, patches: Float[Array, "X N C"]) -> Float[Array, "X N D"]:
    """The same of patches that hold their pixels row by row, the colour last."""
    c = self.cfg
    shape = (c.patch_size, c.patch_size, 3, c.width)
    kernel = self.param("kernel", nn.initializers.lecun_normal(in_axis=(0, 1, 2)), shape)
    bias = self.param("bias", nn.initializers.zeros, (c.width,))
    kernel = rearrange(kernel, "p q C D -> (p q C) D").astype(c.dtype)
    return patches.astype(c.dtype) @ kernel + bias.astype(c.dtype)


class LayerNorm(nn.Module):
  """Over the last axis, in float32 with the two-pass variance; the result has `dtype`."""

  dtype: str
  epsilon: float = 1e-6

  @nn.compact
  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
    bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + self.epsilon)
    return (x * scale + bias).astype(self.dtype)


class MultiHeadDotProductAttention(nn.Module):
  """Attention of `x` over `keys`: over all, those that `mask` shows, or those of its picture."""

  cfg: AttentionSizes
  rules: ActivationRules = ()

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "X L D"],
    keys: Float[Array, "X N D"],
    pictures: Pictures | None = None,
    mask: Bool[Array, "X L N"] | None = None,
  ) -> Float[Array, "X L D"]:
    c = self.cfg
    head_dim = c.width // c.heads
    dense = functools.partial(
      nn.DenseGeneral, dtype=c.dtype, kernel_init=nn.initializers.xavier_uniform()
    )
    query = dense((c.heads, head_dim), name="query")(x)
    key = dense((c.heads, head_dim), name="key")(keys)
    if pictures is not None:
      query, key = (rotate(t, pictures.cos, pictures.sin) for t in (query, key))
    y = attention(
      query,
      key,
      dense((c.heads, head_dim), name="value")(keys),
      mask,
      scale=head_dim**-0.5,
      causal=None if pictures is None else Inside(pictures.segments),
      rules=self.rules,
      names=("frame", None, None),
    )
    return dense(c.width, axis=(-2, -1), name="out")(y)


class MlpBlock(nn.Module):
  """Two layers with the tanh form of GELU."""

  cfg: TowerSizes

  @nn.compact
  def __call__(self, x: Float[Array, "X L D"]) -> Float[Array, "X L D"]:
    c = self.cfg
    dense = functools.partial(
      nn.Dense,
      dtype=c.dtype,
      kernel_init=nn.initializers.xavier_uniform(),
      bias_init=nn.initializers.normal(1e-6),
    )
    x = nn.gelu(dense(c.mlp_dim, name="Dense_0")(x), approximate=True)
    return dense(c.width, name="Dense_1")(x)


class Encoder1DBlock(nn.Module):
  """One pre-norm layer; scanned, so it returns (carry, what it emits)."""

  cfg: TowerSizes
  emit: bool = False
  rules: ActivationRules = ()

  @nn.compact
  def __call__(self, x: Float[Array, "X N D"], pictures: Pictures | None):
    c = self.cfg
    y = LayerNorm(c.dtype, name="LayerNorm_0")(x)
    attend = MultiHeadDotProductAttention(c, self.rules, name="MultiHeadDotProductAttention_0")
    x = x + attend(y, y, pictures)
    y = LayerNorm(c.dtype, name="LayerNorm_1")(x)
    x = shard_act(x + MlpBlock(c, name="MlpBlock_0")(y), self.rules, "frame", None, None)
    return x, x if self.emit else None


def run_narrow(
  layer: nn.Module, params: Any, x: Float[Array, "X N D"], pictures: Pictures | None, count: int
) -> tuple[Float[Array, "X N D"], Any]:
  """One layer after the other, of parameters [K,...] in less than float32.

  A CPU multiplies in float32. Left to the compiler, the kernels of all layers are widened before
  the first one runs, and the tower takes three times its place; the barrier keeps that in the loop.
  """

  def run(x, i):
    kept, i = jax.lax.platform_dependent(
      params, i, cpu=lambda *same: jax.lax.optimization_barrier(same), default=lambda *same: same
    )
    one = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, i, keepdims=False), kept)
    return layer.apply({"params": one}, x, pictures)

  return jax.lax.scan(run, x, jnp.arange(count))


class Encoder(nn.Module):
  """The layers that run, and the norm behind them if that is all of them."""

  cfg: TowerSizes
  rules: ActivationRules = ()

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "X N D"],
    out: dict[str, Array],
    intermediates: bool,
    pictures: Pictures | None = None,
  ) -> Float[Array, "X N D"]:
    c = self.cfg
    if intermediates:
      out["hidden"] = x[None]
    if c.layers:
      block = remat(Encoder1DBlock, c.remat, scanned=True)
      params = self.variables.get("params", {}).get("encoderblock", {})
      if any(w.dtype != jnp.float32 for w in jax.tree.leaves(params)):
        layer = block(c, intermediates, self.rules, parent=None)
        x, hidden = run_narrow(layer, params, x, pictures, c.layers)
      else:
        layers = nn.scan(
          block,
          variable_axes={"params": 0},
          split_rngs={"params": True},
          in_axes=nn.broadcast,
          length=c.layers,
        )(c, intermediates, self.rules, name="encoderblock")
        x, hidden = layers(x, pictures)
      if intermediates:
        out["hidden"] = jnp.concatenate([out["hidden"], hidden])
    return LayerNorm(c.dtype, name="encoder_norm")(x) if c.select_layer is None else x


class MAPHead(nn.Module):
  """Attention pooling: one learned query over all patches."""

  cfg: SiglipConfig

  @nn.compact
  def __call__(self, x: Float[Array, "X N D"]) -> Float[Array, "X D"]:
    c = self.cfg
    probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, c.width))
    probe = jnp.broadcast_to(probe.astype(c.dtype), (x.shape[0], 1, c.width))
    x = MultiHeadDotProductAttention(c, name="MultiHeadDotProductAttention_0")(probe, x)
    y = LayerNorm(c.dtype, name="LayerNorm_0")(x)
    return (x + MlpBlock(c, name="MlpBlock_0")(y))[:, 0]


class Siglip(nn.Module):
  """Images to patch features."""

  cfg: SiglipConfig
  rules: ActivationRules = ()

  @nn.compact
  def __call__(
    self, pixels: Float[Array, "X S S 3"], *, intermediates: bool = False
  ) -> tuple[Float[Array, "X N D"], dict[str, Array]]:
    """Patch features in `cfg.dtype`, rows of the grid first, and a dict of what else was made.

    `pixels` are in [-1, 1]. The dict holds "pooled" [X,D] with `cfg.pool`, and "hidden"
    [K+1,X,N,D] (the embeddings, then each layer's output) with `intermediates`.
    """
    c = self.cfg
    out: dict[str, Array] = {}
    if pixels.shape[1:] != (c.image_size, c.image_size, 3):
      raise ValueError(
        f"pixels have shape {pixels.shape}; this tower takes [X,{c.image_size},{c.image_size},3]"
      )
    x = PatchEmbedding(c, name="embedding")(shard_act(pixels, self.rules, "frame", *[None] * 3))
    init = nn.initializers.normal(c.width**-0.5)
    x = x + self.param("pos_embedding", init, (1, c.grid**2, c.width)).astype(c.dtype)
    x = Encoder(c, self.rules, name="Transformer")(x, out, intermediates)
    if c.pool:
      out["pooled"] = MAPHead(c, name="MAPHead_0")(x)
    return x, out

  def features(self, batch: dict[str, Array]) -> Float[Array, "B P N D"]:
    """Features of every frame of the rows, each frame once; cached ones as they are."""
    frames = batch["frames"]
    if frames.ndim == 4:
      features = frames.astype(self.cfg.dtype)
    else:
      features, _ = self(rearrange(pixels(frames), "B P h w C -> (B P) h w C"))
      features = rearrange(features, "(B P) N D -> B P N D", B=len(frames))
    return shard_act(features, self.rules, "batch", None, None, None)

  def scene(
    self, connector: Any, features: Float[Array, "B P N D"], batch: dict[str, Array]
  ) -> tuple[Float[Array, "B V E"], Bool[Array, "B V"]]:
    """Scene tokens of the rows (of packed rows, those of clip after clip), and which count: all."""
    B, T = len(features), batch["scene"].shape[-1]
    if features.shape[1] == 1 and batch["scene"].ndim == 2:  # images alone
      scene = connector(features, stands_for=T)
    else:
      index = batch["scene"].reshape(B, -1)[:, :, None, None]
      frames = jnp.take_along_axis(features, index, axis=1)
      scene = connector(rearrange(frames, "B (C T) N D -> (B C) T N D", T=T))
      scene = rearrange(scene, "(B C) V E -> B (C V) E", B=B)
    return scene, jnp.ones(scene.shape[:2], bool)

  @staticmethod
  def empty_batch(
    cfg: SiglipConfig, frames: int, scene: int, objects: int
  ) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shapes and dtypes of a row's pictures and objects; `scene` frames of the scene."""
    N = cfg.grid**2
    return {
      "frames": ((frames, cfg.image_size, cfg.image_size, 3), jnp.uint8),
      "scene": ((scene,), jnp.int32),
      "region_masks": ((objects, frames, N), jnp.uint8),
      "region_frames": ((objects, frames), jnp.int32),
    }


def resample_posemb(pos: Float[Array, "1 N D"], grid: int) -> Float[Array, "1 M D"]:
  """Position embeddings for another grid size, M = grid * grid.

  big_vision's rule (its `models/vit.py`): bilinear between the corners, which stay where they are.
  """
  old = round(pos.shape[1] ** 0.5)
  if old * old != pos.shape[1]:
    raise ValueError(f"pos_embedding has {pos.shape[1]} positions, which is no square grid")
  if old == grid:
    return pos
  at = jnp.linspace(0, old - 1, grid)[:, None]
  weight = jnp.maximum(1 - jnp.abs(at - jnp.arange(old)), 0)  # [new, old], rows sum to one
  square = pos.reshape(old, old, -1).astype(jnp.float32)
  square = jnp.einsum("ax,by,xyD->abD", weight, weight, square, precision="highest")
  return square.reshape(1, grid * grid, -1).astype(pos.dtype)
