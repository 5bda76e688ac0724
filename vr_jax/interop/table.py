"""Mapping tables between our parameters and tensors in safetensors files, read both ways.

A foreign format is a list of `Row`s. `slots` lays it over the parameters of a model, `fill` reads
files into them and `collect` gives the foreign tensors back.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from data_pipes.errors import InputError


class Transform(NamedTuple):
  """`load(theirs, our shape)` and `save(ours)`; linear, so gradients may be exported as well."""

  load: Callable[[Any, tuple[int, ...]], Any]
  save: Callable[[Any], Any]


SAME = Transform(lambda x, shape: x.reshape(shape), lambda y: y)
FLAT = Transform(lambda x, shape: x.reshape(shape), lambda y: y.reshape(-1))
DENSE = Transform(lambda x, shape: x.T, lambda y: y.T)
HEADS_OUT = Transform(  # [A*H out, D in] <-> [D, A, H]
  lambda x, shape: x.T.reshape(shape), lambda y: y.reshape(y.shape[0], -1).T
)
HEADS_IN = Transform(  # [D out, A*H in] <-> [A, H, D]
  lambda x, shape: x.T.reshape(shape), lambda y: y.reshape(-1, y.shape[-1]).T
)
HEADS_FIRST = Transform(  # [N*H out, D in] <-> [N, D, H]
  lambda x, shape: x.reshape(shape[0], shape[2], shape[1]).swapaxes(1, 2),
  lambda y: y.swapaxes(1, 2).reshape(-1, y.shape[1]),
)
CONV1X1 = Transform(lambda x, shape: x[:, :, 0, 0].T, lambda y: y.T[:, :, None, None])
DEPTHWISE = Transform(
  lambda x, shape: x[:, 0].transpose(1, 2, 0), lambda y: y.transpose(2, 0, 1)[:, None]
)
CONV2D = Transform(lambda x, shape: x.transpose(2, 3, 1, 0), lambda y: y.transpose(3, 2, 0, 1))
CONV3D = Transform(
  lambda x, shape: x.transpose(2, 3, 4, 1, 0), lambda y: y.transpose(4, 3, 0, 1, 2)
)
POSITIONS = Transform(lambda x, shape: x[None], lambda y: y[0])


class Row(NamedTuple):
  """One line of the table.

  `ours` is a regular expression on our path, `theirs` their name, in which `{l}` is the layer
  (our leading axis) and `\\1` a group of `ours`. Several names are stacked along our next axis.
  `part`, of three, is the block of rows of a fused tensor that is ours.
  """

  ours: str
  theirs: str | tuple[str, ...]
  transform: Transform
  part: int | None = None


class Slot(NamedTuple):
  """Where one of their tensors (or a third of it) lies in ours."""

  theirs: str
  part: int | None
  ours: str
  index: tuple[int, ...]
  transform: Transform


Shapes = Mapping[str, tuple[int, ...]]


def slots(shapes: Shapes, rows: list[Row], ours: str = "", theirs: str = "") -> Iterator[Slot]:
  """Every slot of the parameters whose path begins with the prefix `ours`."""
  for path, shape in shapes.items():
    if not path.startswith(ours):
      continue
    for row in rows:
      match = re.fullmatch(row.ours, path[len(ours) :])
      if not match:
        continue
      names = (row.theirs,) if isinstance(row.theirs, str) else row.theirs
      layers = range(shape[0]) if "{l}" in names[0] else [None]
      for layer in layers:
        for i, name in enumerate(names):
          index = (() if layer is None else (layer,)) + ((i,) if len(names) > 1 else ())
          full = theirs + match.expand(name).replace("{l}", str(layer))
          yield Slot(full, row.part, path, index, row.transform)
      break
    else:
      raise AssertionError(f"the table has no row for {path} {shape}")


class Tensors:
  """The tensors of a safetensors file, or of a folder of them (sharded or not)."""

  def __init__(self, path: Path | str):
    self.path = Path(path)
    self._file = {}
    for file in self._files():
      try:
        handle = safe_open(file, framework="np")
      except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: not a complete safetensors file ({error})") from None
      for name in handle.keys():  # noqa: SIM118 (a handle is no mapping)
        self._file[name] = handle

  def _files(self) -> list[Path]:
    if self.path.is_file():
      return [self.path]
    index = sorted(self.path.glob("*.safetensors.index.json"))
    if index:
      weight_map = read_json(index[0]).get("weight_map")
      if not isinstance(weight_map, dict):
        raise InputError(f"{index[0]}: no weight_map")
      files = sorted({self.path / name for name in weight_map.values()})
      absent = [file.name for file in files if not file.is_file()]
      if absent:
        raise InputError(f"{index[0]}: names shards that are not there: {', '.join(absent)}")
      return files
    files = sorted(self.path.glob("*.safetensors"))
    if not files:
      torch_files = sorted(f.name for f in self.path.glob("*.bin")) if self.path.is_dir() else []
      found = f"found {', '.join(torch_files)}, " if torch_files else ""
      raise InputError(f"{self.path}: {found}expected a .safetensors file or shards of it")
    return files

  def __iter__(self) -> Iterator[str]:
    return iter(sorted(self._file))

  def __contains__(self, name: str) -> bool:
    return name in self._file

  def shape(self, name: str) -> tuple[int, ...]:
    """Shape of a tensor, from the file's header alone."""
    return tuple(self._file[name].get_slice(name).get_shape())

  def dtype(self, name: str) -> str:
    """F32, BF16, ..., from the file's header alone."""
    return self._file[name].get_slice(name).get_dtype()

  def read(self, name: str) -> np.ndarray:
    """The tensor, in the dtype of the file."""
    return self._file[name].get_tensor(name)


def read_json(file: Path) -> dict[str, Any]:
  try:
    fields = json.loads(file.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise InputError(f"{file}: no such file") from None
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise InputError(f"{file}: not JSON ({error})") from None
  if not isinstance(fields, dict):
    raise InputError(f"{file}: expected a JSON object, found {type(fields).__name__}")
  return fields


def _their_shape(slot: Slot, shape: tuple[int, ...]) -> tuple[int, ...]:
  """The shape their tensor must have to fill a slot of an array of ours."""
  own = jax.ShapeDtypeStruct(shape[len(slot.index) :], jnp.float32)
  theirs = jax.eval_shape(slot.transform.save, own).shape
  return theirs if slot.part is None else (3 * theirs[0], *theirs[1:])


def fill(
  tensors: Tensors,
  wanted: list[Slot],
  shapes: Shapes,
  *,
  unused: Callable[[str], bool] = lambda name: False,
  dtype: str = "float32",
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
  """Reads `tensors` into arrays of the given shapes, keyed by our path.

  Returns the arrays and the names of the tensors that were skipped because `unused` knows them.
  Raises InputError with every missing, unexpected and mis-shaped tensor in one line.
  """
  expected = {slot.theirs: _their_shape(slot, shapes[slot.ours]) for slot in wanted}
  left = [name for name in tensors if name not in expected]
  skipped = tuple(name for name in left if unused(name))
  problems = {
    "missing": [name for name in expected if name not in tensors],
    "unexpected": [name for name in left if not unused(name)],
    "mis-shaped": [
      f"{name} {list(tensors.shape(name))} instead of {list(shape)}"
      for name, shape in expected.items()
      if name in tensors and tensors.shape(name) != shape
    ],
    "not of dtype F32, F16 or BF16": [
      f"{name} {tensors.dtype(name)}"
      for name in expected
      if name in tensors and tensors.dtype(name) not in ("F32", "F16", "BF16")
    ],
  }
  if any(problems.values()):
    lists = (f"{len(v)} {k} ({', '.join(v)})" for k, v in problems.items() if v)
    raise InputError(f"{tensors.path}: tensors do not fit the config: {'; '.join(lists)}")

  arrays = {slot.ours: np.empty(shapes[slot.ours], jnp.dtype(dtype)) for slot in wanted}
  for slot in wanted:
    theirs = tensors.read(slot.theirs)
    if slot.part is not None:
      theirs = np.split(theirs, 3)[slot.part]
    into = arrays[slot.ours]
    into[slot.index] = slot.transform.load(theirs, into.shape[len(slot.index) :])
  return arrays, skipped


def collect(params: Mapping[str, Any], wanted: Iterable[Slot]) -> dict[str, np.ndarray]:
  """The foreign tensors that the slots make of a parameter tree; contiguous, dtype unchanged."""
  flat = flax.traverse_util.flatten_dict(params, sep="/")
  blocks: dict[str, dict[int, np.ndarray]] = {}
  for slot in wanted:
    ours = np.asarray(flat[slot.ours])[slot.index]
    blocks.setdefault(slot.theirs, {})[slot.part or 0] = slot.transform.save(ours)
  return {  # contiguous, as safetensors writes a transposed view wrongly and says nothing
    name: np.ascontiguousarray(np.concatenate([of[part] for part in sorted(of)]))
    for name, of in blocks.items()
  }


def shapes_of(init: Callable[..., Any], *args: Any) -> dict[str, tuple[int, ...]]:
  """Path -> shape of the parameters that `init(*args)` would make, without making them."""
  tree = jax.eval_shape(init, *args)
  return {k: v.shape for k, v in flax.traverse_util.flatten_dict(tree, sep="/").items()}


def nested(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Path -> array as a parameter tree."""
  return flax.traverse_util.unflatten_dict(dict(arrays), sep="/")
