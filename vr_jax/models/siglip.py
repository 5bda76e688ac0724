"""SigLIP vision tower.

Letters: X image, S pixel, P patch side, N patch (grid * grid), D width, A head, H head width,
K layer that runs.

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

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Float

from data_pipes.errors import InputError
from vr_jax.arrays import Array
from vr_jax.attention import attention
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


class PatchEmbedding(nn.Module):
  """Convolution with stride = kernel = patch and valid padding, as a reshape and one matmul."""

  cfg: SiglipConfig

  @nn.compact
  def __call__(self, pixels: Float[Array, "X S S 3"]) -> Float[Array, "X N D"]:
    c = self.cfg
    shape = (c.patch_size, c.patch_size, 3, c.width)
    kernel = self.param("kernel", nn.initializers.lecun_normal(in_axis=(0, 1, 2)), shape)
    bias = self.param("bias", nn.initializers.zeros, (c.width,))
    seen, P = c.grid * c.patch_size, c.patch_size
    patches = pixels[:, :seen, :seen]
    patches = rearrange(patches, "X (h p) (w q) C -> X (h w) (p q C)", p=P, q=P).astype(c.dtype)
    kernel = rearrange(kernel, "p q C D -> (p q C) D").astype(c.dtype)
    return patches @ kernel + bias.astype(c.dtype)


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
  """Full attention of `x` over `keys`."""

  cfg: SiglipConfig
  rules: ActivationRules = ()

  @nn.compact
  def __call__(
    self, x: Float[Array, "X L D"], keys: Float[Array, "X N D"]
  ) -> Float[Array, "X L D"]:
    c = self.cfg
    head_dim = c.width // c.heads
    dense = functools.partial(
      nn.DenseGeneral, dtype=c.dtype, kernel_init=nn.initializers.xavier_uniform()
    )
    y = attention(
      dense((c.heads, head_dim), name="query")(x),
      dense((c.heads, head_dim), name="key")(keys),
      dense((c.heads, head_dim), name="value")(keys),
      scale=head_dim**-0.5,
      rules=self.rules,
      names=("frame", None, None),
    )
    return dense(c.width, axis=(-2, -1), name="out")(y)


class MlpBlock(nn.Module):
  """Two layers with the tanh form of GELU."""

  cfg: SiglipConfig

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

  cfg: SiglipConfig
  emit: bool = False
  rules: ActivationRules = ()

  @nn.compact
  def __call__(self, x: Float[Array, "X N D"], _):
    c = self.cfg
    y = LayerNorm(c.dtype, name="LayerNorm_0")(x)
    attend = MultiHeadDotProductAttention(c, self.rules, name="MultiHeadDotProductAttention_0")
    x = x + attend(y, y)
    y = LayerNorm(c.dtype, name="LayerNorm_1")(x)
    x = shard_act(x + MlpBlock(c, name="MlpBlock_0")(y), self.rules, "frame", None, None)
    return x, x if self.emit else None


class Encoder(nn.Module):
  """The layers that run, and the norm behind them if that is all of them."""

  cfg: SiglipConfig
  rules: ActivationRules = ()

  @nn.compact
  def __call__(self, x: Float[Array, "X N D"], out: dict[str, Array], intermediates: bool):
    c = self.cfg
    if intermediates:
      out["hidden"] = x[None]
    if c.layers:
      layers = nn.scan(
        remat(Encoder1DBlock, c.remat, scanned=True),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=c.layers,
      )(c, intermediates, self.rules, name="encoderblock")
      x, hidden = layers(x, None)
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
