"""Programs compiled ahead of time, counted and measured."""

import contextlib
import ctypes
import math
import threading
from collections.abc import Callable, Hashable
from typing import Any

import jax
from jax.sharding import Mesh


class Programs:
  """Compiled functions by name. One is compiled when it is first asked for, and never again.

  Threads may ask at once: the first compiles, the others wait for it.
  """

  def __init__(self, mesh: Mesh | None = None):
    """`mesh`: what the arguments are placed on, which kernels must know; None: one device."""
    self._mesh = mesh
    self._compiled: dict[Hashable, Any] = {}
    self._locks: dict[Hashable, threading.Lock] = {}

  def __call__(
    self, name: Hashable, function: Callable, *arguments: Any, donate: tuple = (), out: Any = None
  ) -> Callable:
    """`function` compiled for arguments of these shapes (arrays or ShapeDtypeStructs).

    Args:
      name: stands for the function and the shapes.
      donate: places of the arguments that the call consumes.
      out: shardings of the result; None leaves them to the compiler.
    """
    with self._locks.setdefault(name, threading.Lock()):  # one for all, in one step of Python
      if name not in self._compiled:
        shardings = {} if out is None else {"out_shardings": out}
        jitted = jax.jit(function, donate_argnums=donate, **shardings)
        with contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh):
          lowered = jitted.lower(*jax.tree.map(shape_of, arguments))
        self._compiled[name] = self._compile(name, lowered)
        _give_back()
    return self._compiled[name]

  def _compile(self, name: Hashable, lowered: Any) -> Any:
    return lowered.compile()

  def scratch(self) -> int:
    """Bytes on a device that the greediest program needs beside its arguments and results."""
    analyses = [program.memory_analysis() for program in self._compiled.values()]
    return max((a.temp_size_in_bytes for a in analyses if a is not None), default=0)


def _give_back() -> None:
  """Returns to the system what the compiler has freed: glibc keeps it, up to 60 MB a program."""
  with contextlib.suppress(OSError, AttributeError):  # another C library
    ctypes.CDLL(None).malloc_trim(0)


def shape_of(x: Any) -> jax.ShapeDtypeStruct:
  """Shape, dtype and, where it is placed on purpose, sharding of an array."""
  placed = x.sharding if getattr(x, "committed", True) and hasattr(x, "sharding") else None
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed)


def bytes_of(tree: Any) -> int:
  """Bytes of a tree of arrays or shapes on the device that holds most of them."""

  def on_a_device(x) -> int:
    sharding = getattr(x, "sharding", None)
    shape = x.shape if sharding is None else sharding.shard_shape(x.shape)
    return math.prod(shape) * x.dtype.itemsize

  return sum(on_a_device(x) for x in jax.tree.leaves(tree))
