"""Connectors: the features of the scene frames become scene tokens.

Letters: B batch, T scene frame, N patch (h * w), D tower width, C channel, E decoder width,
V scene token, R squeezed channel, X image (B * T).

  stc_connector_v35, stc_connector, stp_connector   s1 -> sampler 2x2x2 -> s2 -> readout
  spatial_conv, spatial_pool                        sampler 1x2x2 -> readout (needs D == E)
  mlp2x_gelu, linear                                mean over frames -> readout

Source: VideoLLaMA 2 (arXiv 2406.07476) section 2.2; published `projector.py` on timm's RegNet
stage. Arrays are channels-last throughout.
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Float

from data_pipes.errors import InputError
from vr_jax.arrays import Array
from vr_jax.models.siglip import LayerNorm
from vr_jax.remat import remat
from vr_jax.sharding import ActivationRules, shard_act


@dataclasses.dataclass(frozen=True)
class Kind:
  """What a published connector type is made of.

  `stage_depth` blocks in each of s1 and s2; `stride` (frames, rows, columns) of the sampler, None
  where there is no sampler; `conv`: the sampler is a convolution, otherwise an average; `padding`
  of that convolution on every axis; `readout_depth` linear layers at the end.
  """

  stage_depth: int = 0
  stride: tuple[int, int, int] | None = None
  conv: bool = False
  padding: int = 0
  readout_depth: int = 2


KINDS = {
  "stc_connector_v35": Kind(4, (2, 2, 2), conv=True),
  "stc_connector": Kind(4, (2, 2, 2), conv=True, padding=1),
  "stp_connector": Kind(4, (2, 2, 2)),
  "spatial_conv": Kind(0, (1, 2, 2), conv=True, padding=1),
  "spatial_pool": Kind(0, (1, 2, 2)),
  "mlp2x_gelu": Kind(),
  "linear": Kind(readout_depth=1),
}


@dataclasses.dataclass(frozen=True)
class ConnectorConfig:
  """`kind` is a published `mm_projector_type`, `width` that of the decoder (E).

  `dtype` is that of the matmuls; `remat` (see `vr_jax.remat`) applies to each block of s1 and s2.
  """

  kind: str = "stc_connector_v35"
  width: int = 3584
  dtype: str = "float32"
  remat: str = "none"

  def __post_init__(self):
    if self.kind not in KINDS:
      raise InputError(f"connector kind {self.kind!r} is not one of {', '.join(KINDS)}")


def scene_token_count(cfg: ConnectorConfig, frames: int, grid: int) -> int:
  """Scene tokens V of `frames` frames with grid x grid patches each."""
  kind = KINDS[cfg.kind]
  if kind.stride is None:
    return grid * grid
  t, h, w = (n + 2 * kind.padding for n in (frames, grid, grid))
  a, b, d = kind.stride
  return (t // a) * (h // b) * (w // d)


class DepthwiseConv3x3(nn.Module):
  """3x3 convolution of each channel with itself, zero padding 1, no bias.

  Nine shifted multiply-adds: XLA fuses them, while its grouped convolution is many times slower.
  """

  @nn.compact
  def __call__(self, x: Float[Array, "X h w C"]) -> Float[Array, "X h w C"]:
    _, h, w, C = x.shape
    kernel = self.param("kernel", nn.initializers.lecun_normal(in_axis=(0, 1)), (3, 3, C))
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))).astype(jnp.float32)
    y = jnp.zeros_like(x, jnp.float32)
    for i in range(3):
      for j in range(3):
        y += padded[:, i : i + h, j : j + w] * kernel[i, j]
    return y.astype(x.dtype)


def gathered(rules: ActivationRules) -> Callable[..., jax.Array]:
  """The matmul of an `nn.Dense` whose kernel may lie spread over a mesh.

  The kernel is gathered and its gradient summed; left to the compiler, tokens would be exchanged to
  suit the kernel's parts.
  """

  def matmul(x, kernel, dimensions, precision=None):
    kernel = shard_act(kernel, rules, None, None)
    return jax.lax.dot_general(x, kernel, dimensions, precision)

  return matmul


class SqueezeExcite(nn.Module):
  """Channels scaled by a gate that sees their mean over the image."""

  squeezed: int
  dtype: str
  rules: ActivationRules = ()

  @nn.compact
  def __call__(self, x: Float[Array, "X h w C"]) -> Float[Array, "X h w C"]:
    def dense(width, name):
      return nn.Dense(width, dtype=self.dtype, dot_general=gathered(self.rules), name=name)

    y = x.mean((1, 2), dtype=jnp.float32).astype(self.dtype)
    y = nn.silu(dense(self.squeezed, "fc1")(y))
    y = shard_act(y, self.rules, "frame", None)
    y = nn.sigmoid(dense(x.shape[-1], "fc2")(y))
    y = shard_act(y, self.rules, "frame", None)
    return x * y[:, None, None]


class Bottleneck(nn.Module):
  """RegNet block without bottleneck (ratio 1) and with groups of one channel.

  The norms' epsilon is 1e-5: timm turns the LayerNorm2d it is given into LayerNormAct2d. The
  squeeze follows the width of the block's *input*.
  """

  cfg: ConnectorConfig
  rules: ActivationRules = ()

  @nn.compact
  def __call__(self, x: Float[Array, "X h w D"]) -> Float[Array, "X h w E"]:
    c = self.cfg

    def norm(name):
      return LayerNorm(c.dtype, epsilon=1e-5, name=name)

    def conv1x1(name):
      matmul = gathered(self.rules)
      return nn.Dense(c.width, use_bias=False, dtype=c.dtype, dot_general=matmul, name=name)

    y = nn.silu(norm("norm1")(conv1x1("conv1")(x)))
    y = nn.silu(norm("norm2")(DepthwiseConv3x3(name="conv2")(y)))
    y = SqueezeExcite(round(x.shape[-1] / 4), c.dtype, self.rules, name="se")(y)
    y = norm("norm3")(conv1x1("conv3")(y))
    if x.shape[-1] != c.width:
      x = norm("downsample_norm")(conv1x1("downsample")(x))
    return nn.silu(y + x.astype(y.dtype))


class Stage(nn.Module):
  """Blocks b1, b2, ... applied to every frame by itself."""

  cfg: ConnectorConfig
  depth: int
  rules: ActivationRules = ()

  @nn.compact
  def __call__(self, x: Float[Array, "B T h w D"]) -> Float[Array, "B T h w E"]:
    B = x.shape[0]
    x = rearrange(x, "B T h w C -> (B T) h w C")
    for i in range(self.depth):
      x = shard_act(x, self.rules, "frame", None, None, None)
      x = remat(Bottleneck, self.cfg.remat)(self.cfg, self.rules, name=f"b{i + 1}")(x)
    return rearrange(x, "(B T) h w C -> B T h w C", B=B)


class Sampler(nn.Module):
  """Strided convolution or average over blocks, then SiLU.

  Kernel and stride are the same, a x b x d (frames, rows, columns), so blocks do not overlap, and
  the convolution is a matmul: a block's a*b*d*C numbers become one row, the kernel one matrix.

      x [B, T, h, w, C] ─► [B, t, h', w', (a b d C)] @ kernel [(a b d C), E] ─► [B, t, h', w', E]

  No compiler has to find a convolution's layout, forward or backward, and the kernel is gathered
  over a mesh as any other matrix. Frames, rows and columns that do not fill a block are dropped.
  """

  cfg: ConnectorConfig
  rules: ActivationRules = ()

  @nn.compact
  def __call__(self, x: Float[Array, "B T h w C"]) -> Float[Array, "B t h2 w2 E"]:
    c, kind = self.cfg, KINDS[self.cfg.kind]
    pad = kind.padding
    x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (pad, pad), (0, 0)))
    (a, b, d), C = kind.stride, x.shape[-1]
    t, h, w = x.shape[1] // a, x.shape[2] // b, x.shape[3] // d
    x = x[:, : t * a, : h * b, : w * d]
    blocks = {"a": a, "b": b, "d": d}
    if kind.conv:
      init = nn.initializers.lecun_normal(in_axis=(0, 1, 2, 3))
      kernel = self.param("kernel", init, (a, b, d, C, c.width)).astype(c.dtype)
      bias = self.param("bias", nn.initializers.zeros, (c.width,)).astype(c.dtype)
      x = rearrange(x, "B (t a) (h b) (w d) C -> B t h w (a b d C)", **blocks)
      kernel = rearrange(kernel, "a b d C E -> (a b d C) E")
      x = x.astype(c.dtype) @ shard_act(kernel, self.rules, None, None) + bias
    else:
      x = rearrange(x, "B (t a) (h b) (w d) C -> B t a h b w d C", **blocks)
      x = x.mean((2, 4, 6), dtype=jnp.float32).astype(c.dtype)
    return nn.silu(x)


class Mlp(nn.Module):
  """Linear layers fc1, fc2, ... with the exact (erf) GELU between them."""

  width: int
  depth: int
  dtype: str
  rules: ActivationRules = ()

  @nn.compact
  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... E"]:
    matmul = gathered(self.rules)
    for i in range(self.depth):
      x = nn.gelu(x, approximate=False) if i else x
      x = nn.Dense(self.width, dtype=self.dtype, dot_general=matmul, name=f"fc{i + 1}")(x)
    return x


class Connector(nn.Module):
  """Features of the scene frames to scene tokens, in the order (frame, row, column)."""

  cfg: ConnectorConfig
  rules: ActivationRules = ()

  def __call__(
    self, features: Float[Array, "B T N D"], *, stands_for: int = 1
  ) -> Float[Array, "B V E"]:
    """Scene tokens in `cfg.dtype`; V is `scene_token_count(cfg, T * stands_for, grid)`.

    An image is one frame that `stands_for` many equal ones (T = 1). Only the sampler mixes frames,
    so that one block of them is computed and its tokens are repeated: the same tokens.
    """
    c = self.cfg
    if stands_for == 1 or KINDS[c.kind].padding:  # padding makes the outer blocks differ
      return self.stages(jnp.repeat(features, stands_for, axis=1))["tokens"]
    frames = KINDS[c.kind].stride[0] if KINDS[c.kind].stride else 1
    tokens = self.stages(features, min(frames, stands_for))["tokens"]
    count = scene_token_count(c, stands_for, round(features.shape[2] ** 0.5))
    return jnp.tile(tokens, (1, count // tokens.shape[1], 1))

  @nn.compact
  def stages(self, features: Float[Array, "B T N D"], repeats: int = 1) -> dict[str, jax.Array]:
    """What each part makes: "s1", "sampler", "s2" [B,t,h,w,C] where it has them, and "tokens".

    The sampler sees each frame `repeats` times.
    """
    c, kind = self.cfg, KINDS[self.cfg.kind]
    T, N, D = features.shape[1:]
    x, out = features.astype(c.dtype), {}
    if kind.stride is None:
      x = x.mean(1, dtype=jnp.float32).astype(c.dtype)
    else:
      if not kind.stage_depth and c.width != D:
        raise InputError(
          f"connector kind {c.kind} keeps the tower's width {D}, so the decoder's width must be "
          f"the same; it is {c.width}"
        )
      side = round(N**0.5)
      if not scene_token_count(c, T * repeats, side):
        raise InputError(
          f"connector kind {c.kind} makes no scene token of {T * repeats} frames with "
          f"{side}x{side} patches; it joins blocks of {kind.stride} (frames, rows, columns)"
        )
      x = rearrange(x, "B T (h w) D -> B T h w D", h=side)
      x = out["s1"] = Stage(c, kind.stage_depth, self.rules, name="s1")(x)
      x = out["sampler"] = Sampler(c, self.rules, name="sampler")(jnp.repeat(x, repeats, axis=1))
      x = out["s2"] = Stage(c, kind.stage_depth, self.rules, name="s2")(x)
      x = rearrange(x, "B t h w C -> B (t h w) C")
    out["tokens"] = Mlp(c.width, kind.readout_depth, c.dtype, self.rules, name="readout")(x)
    return out
