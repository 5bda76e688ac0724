"""Weights from wherever they lie straight into their final place, dtype and layout.

    read one parameter, or one layer of it ─► fuse ─► cast, or int8 ─► its devices

Nothing else of the model is in memory meanwhile, so a machine needs room for the result and for a
few of its largest arrays. What does not fit is refused before anything is read.
"""

import dataclasses
import functools
import math
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from data_pipes.errors import InputError
from vr_jax.inference.options import WEIGHTS
from vr_jax.inference.placement import Placement
from vr_jax.models.fused import fused_config, fused_leaves
from vr_jax.models.quantize import is_matrix, quantized
from vr_jax.models.videorefer import PARTS, VideoReferConfig, init_params
from vr_jax.params import Parameters, path_names

PIECE = 1 << 24  # weights that are quantised at a time


def open_weights(
  cfg: VideoReferConfig,
  params: Parameters,
  weights: str | None,
  placement: Placement,
  memory_limit: int | None = None,
) -> tuple[VideoReferConfig, dict[str, Any]]:
  """Config and parameters as they are run: fused, in the dtype of the matmuls, on their devices.

  Raises:
    InputError: unknown `weights`, or more than the memory has room for (`memory_limit` bytes a
      device, by default what is free).
  """
  if weights is not None and weights not in WEIGHTS:
    raise InputError(f"weights={weights!r}; accepted: {', '.join(WEIGHTS)}")
  parts, final = _computing(cfg, weights)
  int8 = weights == "int8"

  _refuse_too_much(params, final, int8, placement, memory_limit)
  ready: dict[str, Any] = {}
  for path, array in _leaves(parts["llm"], params, placement.size("tensor")):
    dtype = final(path, array.dtype)
    if int8 and is_matrix(path):
      leaf = _quantized(path, array, dtype)
    else:
      leaf = np.asarray(array, dtype)
    # Each before the next is read: what waits to be copied, or has a name, is in memory too.
    ready[path] = jax.block_until_ready(placement.put({path: leaf})[path])
    del array, leaf
  parts["llm"] = fused_config(parts["llm"], placement.size("tensor"))
  return dataclasses.replace(cfg, **parts), flax.traverse_util.unflatten_dict(ready, sep="/")


def weight_shapes(
  cfg: VideoReferConfig, weights: str, placement: Placement
) -> tuple[VideoReferConfig, dict[str, Any]]:
  """As `open_weights`, of a model that is not there: shapes with dtype and sharding.

  Its files are taken to be in bfloat16, as the published ones are.
  """
  parts, final = _computing(cfg, weights)
  parts["llm"] = fused_config(parts["llm"], placement.size("tensor"))
  cfg = dataclasses.replace(cfg, **parts)
  shapes = jax.eval_shape(lambda key: init_params(cfg, key), jax.random.key(0))

  def held(path: str, leaf: Any) -> Any:
    leaf = jax.ShapeDtypeStruct(leaf.shape, final(path, np.dtype(jnp.bfloat16)))
    if weights == "int8" and is_matrix(path):
      leaf = jax.eval_shape(functools.partial(quantized, path), leaf)
    return placement.shapes({path: leaf})[path]

  return cfg, jax.tree.map(held, path_names(shapes), shapes)


def _computing(
  cfg: VideoReferConfig, weights: str | None
) -> tuple[dict[str, Any], Callable[[str, np.dtype], np.dtype]]:
  """The parts' configs with the dtype of their matmuls; and the dtype that a parameter is held in.

  Matrices that become int8 are in that dtype before.
  """
  parts = {name: getattr(cfg, name) for name in PARTS}
  if weights in ("float32", "bfloat16"):
    parts = {name: dataclasses.replace(part, dtype=weights) for name, part in parts.items()}

  def final(path: str, dtype: np.dtype) -> np.dtype:
    if not _computes_in_dtype(path):
      return np.dtype(np.float32)
    computed = np.dtype(jnp.dtype(parts[path.split("/")[0]].dtype))
    # Beside int8, what its file has in half precision stays so: each use widens it, exactly.
    narrow = weights == "int8" and not is_matrix(path) and dtype.itemsize < computed.itemsize
    return dtype if narrow else computed

  return parts, final


def _quantized(path: str, w: np.ndarray, dtype: np.dtype) -> Any:
  """An int8 matrix with the scales of its columns, which are its last axis.

  Some columns at a time, since a matrix and what it is made of take four times its place in the
  file; each column has its own scale, so pieces give the same.
  """
  width = max(1, PIECE // (w.size // w.shape[-1]))
  pieces = [
    jax.device_get(quantized(path, jnp.asarray(w[..., i : i + width], dtype)))
    for i in range(0, w.shape[-1], width)
  ]
  return jax.tree.map(lambda *parts: np.concatenate(parts, axis=-1), *pieces)


def _computes_in_dtype(path: str) -> bool:
  """Whether a parameter is of a matmul; what else there is computes in float32."""
  if path.startswith("llm/"):
    return not path.endswith("/scale")
  return path.endswith("/kernel") and not path.endswith("conv2/kernel")


def _leaves(llm: Any, params: Parameters, shards: int) -> Iterator[tuple[str, np.ndarray]]:
  """The parameters in the layout for inference, one after another."""
  inside = [path.removeprefix("llm/") for path in params.shapes if path.startswith("llm/")]
  read = lambda path, index: params.read(f"llm/{path}", index)  # noqa: E731
  for path, array in fused_leaves(llm, inside, read, shards):
    yield f"llm/{path}", array
  for path in params.shapes:
    if not path.startswith("llm/"):
      yield path, params.read(path)


def _refuse_too_much(
  params: Parameters, final: Any, int8: bool, placement: Placement, memory_limit: int | None
) -> None:
  """Refuses weights that the devices, or the one memory of all CPU devices, have no room for."""
  split, whole = 0, 0
  for path, shape in params.shapes.items():
    held = 1 if int8 and is_matrix(path) else final(path, params.dtype(path)).itemsize
    size = math.prod(shape) * held
    if re.match(r"llm/(layers|embedder)/", path) and len(shape) > 1:
      split += size
    else:
      whole += size
  need = split // placement.size("tensor") + whole
  limit = free_memory() if memory_limit is None else memory_limit
  if memory_limit is None and jax.default_backend() == "cpu":
    devices = 1 if placement.mesh is None else placement.mesh.size
    need *= devices
  if need > limit:
    raise InputError(
      f"the weights take {need / 2**30:.2f} GiB and {limit / 2**30:.2f} GiB are free; accepted: "
      "weights='bfloat16' or 'int8', a mesh with a larger axis tensor, or more memory"
    )


def free_memory() -> int:
  """Bytes that one device has left; of a CPU, what the machine can give without swapping."""
  stats = jax.local_devices()[0].memory_stats() or {}
  if "bytes_limit" in stats:
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
  free = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
  for file, pattern, unit in (
    ("/proc/meminfo", r"MemAvailable:\s+(\d+) kB", 1024),
    ("/sys/fs/cgroup/memory.max", r"(\d+)", 1),
  ):
    try:
      with open(file, encoding="ascii") as text:
        match = re.search(pattern, text.read())
    except OSError:
      continue
    free += [int(match[1]) * unit] if match else []
  return min(free)
