"""Where weights, caches and rows live: on one device, or on a mesh of the axes `data` and `tensor`.

Rows (answers under way) are split over `data`, frames over all devices; attention heads, MLP
columns and the vocabulary over `tensor`. Everything else is whole on every device.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from data_pipes.errors import InputError
from vr_jax.inference.generate import Decoding
from vr_jax.inference.sampling import RowSampling
from vr_jax.models.decoder import DecoderConfig, KVCache
from vr_jax.params import path_names
from vr_jax.sharding import make_mesh

AXES = ("data", "tensor")
Axes = str | tuple[str, ...] | None
FRAME_AXES = AXES  # the tower's weights are whole on every device
# The dim of a fused decoder's weights that is split over `tensor`. Where it does not divide it the
# next match is tried, and the array stays whole if none does.
TENSOR_DIMS = (
  (r"llm/layers_\d+/attn/qkv/.*", -1),
  (r"llm/layers_\d+/attn/attn_vec_einsum/.*", 0),
  (r"llm/layers_\d+/mlp/gate_up.*", -1),
  (r"llm/layers_\d+/mlp/linear.*", 0),
  (r"llm/embedder/.*", 0),
  (r"llm/embedder/.*", 1),
)


def mesh_axes(text: str) -> dict[str, int]:
  """The axes of "data=2,tensor=4" and their sizes. Raises InputError: others."""
  sizes: dict[str, int] = {}
  for part in text.split(","):
    axis, _, size = part.strip().partition("=")
    if axis not in AXES or axis in sizes or not size.isdecimal() or int(size) < 1:
      raise InputError(
        f"--mesh {text!r}; accepted: data=N, tensor=N or both, as in data=2,tensor=4"
      )
    sizes[axis] = int(size)
  return sizes


def parse_mesh(text: str) -> Mesh:
  """The mesh of "data=2,tensor=4", over the first devices.

  Raises:
    InputError: other axes, or more devices than there are.
  """
  sizes = mesh_axes(text)
  devices = jax.devices()
  count = math.prod(sizes.values())
  if count > len(devices):
    raise InputError(f"--mesh {text!r} is of {count} devices; here are {len(devices)}")
  return make_mesh(sizes.items(), devices[:count])


@dataclasses.dataclass(frozen=True)
class Placement:
  """A mesh, or None for one device, where all shardings are None: the compiler's choice."""

  mesh: Mesh | None = None

  def __post_init__(self):
    if self.mesh is not None and not set(self.mesh.axis_names) <= set(AXES):
      raise InputError(
        f"mesh axes {', '.join(self.mesh.axis_names)}; accepted for inference: {', '.join(AXES)}"
      )

  def size(self, axis: str) -> int:
    return 1 if self.mesh is None else self.mesh.shape.get(axis, 1)

  def check(self, cfg: DecoderConfig) -> None:
    """Raises InputError where `tensor` does not divide the decoder's heads and MLP."""
    n = self.size("tensor")
    if math.gcd(cfg.heads, cfg.kv_heads, cfg.mlp_dim) % n:
      raise InputError(
        f"mesh axis tensor={n}: the decoder has {cfg.heads} heads, {cfg.kv_heads} key heads and "
        f"{cfg.mlp_dim} MLP columns; accepted: a number that divides all of them"
      )

  def whole_rows(self, count: int, axes: Sequence[str] = ("data",)) -> int:
    """`count` rounded up to rows that these axes divide, together."""
    n = math.prod(map(self.size, axes))
    return -(-count // n) * n

  @property
  def whole(self) -> NamedSharding | None:
    """Sharding of an array that every device has whole."""
    return self.split()

  def split(self, *axes: Axes) -> NamedSharding | None:
    """Sharding of an array whose first dims are split over these axes, as far as there are such."""
    if self.mesh is None:
      return None
    names = self.mesh.axis_names
    several = [(axis,) if isinstance(axis, str) else axis or () for axis in axes]
    present = [tuple(a for a in group if a in names) or None for group in several]
    return NamedSharding(self.mesh, PartitionSpec(*present))

  def array(self, shape: tuple[int, ...], dtype: Any, *axes: Axes) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding of an argument."""
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=self.split(*axes))

  def rows(self, count: int) -> str | None:
    """The axis that so many rows are split over: a few rows stay whole."""
    return None if count % self.size("data") else "data"

  def prefix(self, cfg: DecoderConfig) -> KVCache | None:
    """Shardings of a fused decoder's cache of one row, whose `end` is []."""
    if self.mesh is None:
      return None
    heads = (self.split(None, "tensor"),) * cfg.depth
    return KVCache(k=heads, v=heads, positions=self.whole, end=self.whole)

  def cache(self, cfg: DecoderConfig, rows: int) -> KVCache | None:
    """Shardings of a cache whose rows have each their own `end`."""
    if self.mesh is None:
      return None
    heads = (self.split(self.rows(rows), "tensor"),) * cfg.depth
    row = self.split(self.rows(rows))
    return KVCache(k=heads, v=heads, positions=row, end=row)

  def state(self, cfg: DecoderConfig, rows: int) -> Decoding | None:
    """Shardings of rows that are being answered."""
    if self.mesh is None:
      return None
    row = self.split(self.rows(rows))
    sampling = RowSampling(row, row, row, row, row)
    return Decoding(self.cache(cfg, rows), row, row, row, row, row, row, row, sampling, row, row)

  def put(self, params: Any) -> Any:
    """Parameters, the decoder's in the fused layout, on their devices."""
    if self.mesh is None:
      return jax.device_put(params)  # jnp.asarray would compile a program for each shape
    return jax.tree.map(
      lambda path, x: jax.device_put(x, self._weight(path, x.shape)), path_names(params), params
    )

  def shapes(self, params: Any) -> Any:
    """As `put`, of shapes: where each parameter would lie."""
    if self.mesh is None:
      return params
    return jax.tree.map(
      lambda path, x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._weight(path, x.shape)),
      path_names(params),
      params,
    )

  @property
  def platform(self) -> str:
    """Of the devices: "cpu", "gpu", "cuda" or "tpu"."""
    return jax.default_backend() if self.mesh is None else self.mesh.devices.flat[0].platform

  def _weight(self, path: str, shape: tuple[int, ...]) -> NamedSharding:
    for pattern, dim in TENSOR_DIMS:
      fits = -len(shape) <= dim < len(shape) and shape[dim] % self.size("tensor") == 0
      if fits and re.fullmatch(pattern, path):
        return self.split(*(None,) * (dim % len(shape)), "tensor")
    return self.whole
