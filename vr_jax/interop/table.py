"""Mapping tables between our parameters and the tensors of foreign formats, read both ways.

A foreign format is a list of `Row`s. `slots` lays it over the parameters of a model, one `Slot` for
each foreign tensor and the place in our stacked array that it fills:

    Row       layers/mlp/linear         model.layers.{l}.mlp.down_proj.weight    DENSE
    Slots     layers/mlp/linear [0]     model.layers.0.mlp.down_proj.weight      o i <-> i o
              layers/mlp/linear [1]     model.layers.1.mlp.down_proj.weight      o i <-> i o

`Mapped` reads our parameters out of the foreign tensors, piece by piece; `outputs` makes the
foreign tensors of our parameters. Both follow the same rows, so a way out is a way back.
"""

import difflib
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import flax
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from einops import rearrange
from safetensors import SafetensorError, safe_open

from data_pipes.errors import InputError
from data_pipes.lfs import refuse_pointer
from vr_jax.interop.fields import read_json, shown
from vr_jax.params import Parameters, Shapes, Tree


class Transform(NamedTuple):
  """`load(theirs, our shape)` and `save(ours)`; linear, so gradients may be exported as well."""

  load: Callable[[Any, tuple[int, ...]], Any]
  save: Callable[[Any], Any]


def axes(theirs: str, ours: str) -> Transform:
  """The transform between two layouts in einops's words; `ours` has no axes in brackets."""
  names = ours.split()

  def load(x: Any, shape: tuple[int, ...]) -> Any:
    sizes = {name: n for name, n in zip(names, shape, strict=True) if name != "1"}
    return rearrange(x, f"{theirs} -> {ours}", **sizes)

  return Transform(load, lambda y: rearrange(y, f"{ours} -> {theirs}"))


# i, o: width in and out; d: width of the stream; n: heads; h: width of a head; t, y, x: taps of a
# kernel in time, height and width; p: positions.
SAME = Transform(lambda x, shape: x.reshape(shape), lambda y: y)
FLAT = axes("(n h)", "n h")
DENSE = axes("o i", "i o")
HEADS_OUT = axes("(n h) d", "d n h")
HEADS_IN = axes("d (n h)", "n h d")
HEADS_FIRST = axes("(n h) d", "n d h")
CONV1X1 = axes("o i 1 1", "i o")
DEPTHWISE = axes("d 1 y x", "y x d")
CONV2D = axes("o i y x", "y x i o")
CONV3D = axes("o i t y x", "t y x i o")
POSITIONS = axes("p d", "1 p d")


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
  """Where one of their tensors (or a third of it) lies in ours: at which leading indices."""

  theirs: str
  part: int | None
  ours: str
  at: tuple[int, ...]
  transform: Transform


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


class Tensors(Protocol):
  """Named tensors in files: shapes and dtypes at once, values when they are asked for."""

  path: Path

  def __iter__(self) -> Iterator[str]: ...

  def __contains__(self, name: object) -> bool: ...

  def shape(self, name: str) -> tuple[int, ...]: ...

  def dtype(self, name: str) -> np.dtype: ...

  def read(self, name: str, index: tuple[int, ...] = ()) -> np.ndarray:
    """The tensor at `index` of its leading axes, in the dtype of the file."""
    ...


DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "I64": np.dtype(np.int64),
  "I32": np.dtype(np.int32),
  "I16": np.dtype(np.int16),
  "I8": np.dtype(np.int8),
  "U8": np.dtype(np.uint8),
  "BOOL": np.dtype(bool),
}
WEIGHTS = ("F32", "F16", "BF16")  # the dtypes that parameters may have
# How the tensors beside quantised weights end: bitsandbytes, GPTQ and AWQ, compressed-tensors, FP8.
QUANTISED = (".absmax", ".quant_map", ".SCB", ".qweight", ".qzeros", ".weight_packed",
             ".weight_scale", ".weight_scale_inv")  # fmt: skip


class Safetensors:
  """The tensors of a safetensors file, or of a folder of them (sharded or not).

  A file is mapped only while a tensor is read from it, so that it does not count as memory.

  Raises:
    InputError: no such file, a damaged one or a Git LFS pointer; an index that names files or
      tensors that are not there; a tensor in two files of which no index chooses one.
  """

  def __init__(self, path: Path | str):
    self.path = Path(path)
    self._header: dict[str, tuple[Path, tuple[int, ...], np.dtype]] = {}
    index, chosen = self._index()
    for file in self._files(index, chosen):
      refuse_pointer(file)
      try:
        with safe_open(file, framework="np") as handle:
          for name in handle.keys():  # noqa: SIM118 (a handle is no mapping)
            tensor = handle.get_slice(name)
            dtype = DTYPES.get(tensor.get_dtype(), np.dtype(object))
            if self._takes(name, file, chosen):
              self._header[name] = (file, tuple(tensor.get_shape()), dtype)
      except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: not a complete safetensors file ({error})") from None
    if lost := [name for name in chosen if name not in self._header]:
      raise InputError(
        f"{index}: names {len(lost)} tensors that their shards do not hold, such as {lost[0]} in "
        f"{chosen[lost[0]]}"
      )

  def _index(self) -> tuple[Path | None, dict[str, str]]:
    """The index of a folder, if it has one, and the file of each tensor that it names."""
    indices = sorted(self.path.glob("*.safetensors.index.json")) if self.path.is_dir() else []
    if not indices:
      return None, {}
    usual = self.path / "model.safetensors.index.json"
    if len(indices) > 1 and usual not in indices:
      raise InputError(
        f"{self.path}: {len(indices)} indices ({', '.join(f.name for f in indices)})"
      )
    index = usual if usual in indices else indices[0]
    return index, _weight_map(index)

  def _files(self, index: Path | None, chosen: Mapping[str, str]) -> list[Path]:
    if self.path.is_file():
      return [self.path]
    single = self.path / "model.safetensors"
    if index is not None:
      files = sorted({self.path / name for name in chosen.values()})
      absent = [file.name for file in files if not file.is_file()]
      if absent:
        raise InputError(f"{index}: names shards that are not there: {', '.join(absent)}")
      if single.is_file() and single not in files:  # the index or the file is of an earlier save
        raise InputError(
          f"{single}: and {index.name} beside it, which names {files[0].name} and not this file; "
          "remove what is old"
        )
      return files
    files = sorted(self.path.glob("*.safetensors"))
    if not files:
      torch_files = sorted(self.path.glob("*.bin")) if self.path.is_dir() else []
      for file in torch_files:
        refuse_pointer(file)
      names = ", ".join(file.name for file in torch_files)
      others = f"found {names}, " if torch_files else ""
      raise InputError(f"{self.path}: {others}expected a .safetensors file or shards of it")
    return files

  def _takes(self, name: str, file: Path, chosen: Mapping[str, str]) -> bool:
    """Whether a tensor is taken from this file: from the one that the index names, if it does."""
    if name in chosen:
      return chosen[name] == file.name
    if name in self._header:
      raise InputError(
        f"{self.path}: {name} is in {self._header[name][0].name} and in {file.name}; "
        "accepted: each tensor in one file"
      )
    return True

  def __iter__(self) -> Iterator[str]:
    return iter(sorted(self._header))

  def __contains__(self, name: object) -> bool:
    return name in self._header

  def shape(self, name: str) -> tuple[int, ...]:
    return self._header[name][1]

  def dtype(self, name: str) -> np.dtype:
    return self._header[name][2]

  def read(self, name: str, index: tuple[int, ...] = ()) -> np.ndarray:
    with safe_open(self._header[name][0], framework="np") as handle:
      if not index:
        return handle.get_tensor(name)
      return np.asarray(handle.get_slice(name)[index[0]])[index[1:]]


_SHOWN = 20


def _some(names: list[str]) -> str:
  more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
  return ", ".join(names[:_SHOWN]) + more


def _weight_map(index: Path) -> dict[str, str]:
  """Tensor -> the file beside the index that holds it."""
  weight_map = read_json(index).get("weight_map")
  if not isinstance(weight_map, dict):
    raise InputError(f"{index}: no weight_map")
  for name, file in weight_map.items():
    if not isinstance(file, str) or Path(file).name != file:
      raise InputError(f"{index}: {name}: {shown(file)}; accepted: the name of a file beside it")
  return weight_map


def their_shape(slot: Slot, shape: tuple[int, ...]) -> tuple[int, ...]:
  """The shape their tensor must have to fill a slot of an array of ours."""
  theirs = _saved_shape(slot.transform, tuple(shape[len(slot.at) :]))
  return theirs if slot.part is None else (3 * theirs[0], *theirs[1:])


@functools.cache
def _saved_shape(transform: Transform, shape: tuple[int, ...]) -> tuple[int, ...]:
  return jax.eval_shape(transform.save, jax.ShapeDtypeStruct(shape, jnp.float32)).shape


class Mapped:
  """Parameters as the tensors of a foreign format, through a table.

  `skipped` are the tensors that were left out because `unused` knows them.

  Raises:
    InputError: missing, unexpected and mis-shaped tensors, all in one line, each missing one with
      the nearest of the unexpected names.
  """

  def __init__(
    self,
    tensors: Tensors,
    table: Iterable[Slot],
    shapes: Shapes,
    *,
    unused: Callable[[str], bool] = lambda name: False,
  ):
    self.tensors, self.shapes = tensors, dict(shapes)
    self._slots: dict[str, dict[tuple[int, ...], Slot]] = {}
    for slot in table:
      self._slots.setdefault(slot.ours, {})[slot.at] = slot
    self.shapes = {path: self.shapes[path] for path in self._slots}
    self.skipped = self._check(unused)

  def _check(self, unused: Callable[[str], bool]) -> tuple[str, ...]:
    tensors = self.tensors
    expected = {
      slot.theirs: their_shape(slot, self.shapes[path])
      for path, by_index in self._slots.items()
      for slot in by_index.values()
    }
    left = [name for name in tensors if name not in expected]
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in left if not unused(name)]
    there = [name for name in expected if name in tensors]

    def hint(name: str) -> str:
      near = difflib.get_close_matches(name, unexpected, 1, 0.8)
      return f"{name}, nearest {near[0]}" if near else name

    problems = {
      "missing": [hint(name) for name in missing[:_SHOWN]] + missing[_SHOWN:],
      "unexpected": unexpected,
      "mis-shaped": [
        f"{name} {list(tensors.shape(name))} instead of {list(expected[name])}"
        for name in there
        if tensors.shape(name) != expected[name]
      ],
      f"not of dtype {', '.join(WEIGHTS[:-1])} or {WEIGHTS[-1]}": [
        f"{name} {dtype_name(tensors.dtype(name))}"
        for name in there
        if dtype_name(tensors.dtype(name)) not in WEIGHTS
      ],
    }
    if packed := [name for name in unexpected if name.endswith(QUANTISED)]:
      raise InputError(
        f"{tensors.path}: quantised weights, such as {packed[0]}; accepted: float32, float16 or "
        "bfloat16, as the release that they were made from has them"
      )
    if any(problems.values()):
      lists = (f"{len(v)} {k} ({_some(v)})" for k, v in problems.items() if v)
      raise InputError(f"{tensors.path}: tensors do not fit the config: {'; '.join(lists)}")
    return tuple(name for name in left if unused(name))

  def dtype(self, path: str) -> np.dtype:
    kinds = {self.tensors.dtype(slot.theirs) for slot in self._slots[path].values()}
    return kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)

  def read(self, path: str, index: tuple[int, ...] = ()) -> np.ndarray:
    by_index = self._slots[path]
    for length in range(len(index) + 1):  # a slot, or a piece of one
      if index[:length] in by_index:
        return self._slot(by_index[index[:length]], self.shapes[path][length:], index[length:])
    rest = len(index)
    into = np.empty(self.shapes[path][rest:], self.dtype(path))
    for at, slot in by_index.items():
      if at[:rest] == index:
        into[at[rest:]] = self._slot(slot, self.shapes[path][len(at) :], ())
    return into

  def _slot(self, slot: Slot, shape: tuple[int, ...], index: tuple[int, ...]) -> np.ndarray:
    if slot.transform is SAME and slot.part is None and self.tensors.shape(slot.theirs) == shape:
      return self.tensors.read(slot.theirs, index)
    theirs = self.tensors.read(slot.theirs)
    if slot.part is not None:
      theirs = np.split(theirs, 3)[slot.part]
    return slot.transform.load(theirs, shape)[index]

  def sources(self, path: str) -> list[str]:
    """The tensors that a parameter is made of."""
    return sorted({slot.theirs for slot in self._slots[path].values()})


class Joined:
  """Parameters of several sources side by side."""

  def __init__(self, *parts: Parameters):
    self._parts = {path: part for part in parts for path in part.shapes}
    self.shapes = {path: part.shapes[path] for path, part in self._parts.items()}

  def dtype(self, path: str) -> np.dtype:
    return self._parts[path].dtype(path)

  def read(self, path: str, index: tuple[int, ...] = ()) -> np.ndarray:
    return self._parts[path].read(path, index)


class Part:
  """The parameters under a prefix, with that prefix taken away, or another put in its place."""

  def __init__(self, params: Parameters, prefix: str, new: str = ""):
    self._params, self._prefix, self._new = params, prefix, new
    self.shapes = {
      new + path[len(prefix) :]: shape
      for path, shape in params.shapes.items()
      if path.startswith(prefix)
    }

  def dtype(self, path: str) -> np.dtype:
    return self._params.dtype(self._prefix + path[len(self._new) :])

  def read(self, path: str, index: tuple[int, ...] = ()) -> np.ndarray:
    return self._params.read(self._prefix + path[len(self._new) :], index)


def arrays(params: Parameters, dtype: str | None = None) -> dict[str, np.ndarray]:
  """All of them, read; in their own dtype or the given one."""
  out = {}
  for path, shape in params.shapes.items():
    into = np.empty(shape, jnp.dtype(dtype) if dtype else params.dtype(path))
    for index in pieces(path, shape):  # a large stack is cast layer by layer
      into[index] = params.read(path, index)
    out[path] = into
  return out


_STACKED = re.compile(r"(^|/)(layers|encoderblock)/")


def pieces(path: str, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
  """Leading indices that cut a parameter into its layers; [()] where it has none."""
  return [(i,) for i in range(shape[0])] if _STACKED.search(path) else [()]


def dtype_name(dtype: np.dtype) -> str:
  """F32, BF16, …"""
  return next((name for name, known in DTYPES.items() if known == dtype), str(dtype))


class Output(NamedTuple):
  """One tensor of a foreign format, as the slots of ours that it is made of."""

  name: str
  shape: tuple[int, ...]
  slots: tuple[Slot, ...]

  def make(self, params: Parameters) -> np.ndarray:
    """Its value; contiguous, dtype unchanged."""
    blocks = [
      slot.transform.save(params.read(slot.ours, slot.at))
      for slot in sorted(self.slots, key=lambda slot: slot.part or 0)
    ]
    # Contiguous, as safetensors writes a transposed view wrongly and says nothing.
    return np.ascontiguousarray(np.concatenate(blocks) if len(blocks) > 1 else blocks[0])

  def dtype(self, params: Parameters) -> np.dtype:
    """That of the parameters; float32 where they differ."""
    kinds = {params.dtype(slot.ours) for slot in self.slots}
    return kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)


def outputs(table: Iterable[Slot], shapes: Shapes) -> list[Output]:
  """The foreign tensors that slots make."""
  by_name: dict[str, list[Slot]] = {}
  for slot in table:
    by_name.setdefault(slot.theirs, []).append(slot)
  return [
    Output(name, their_shape(parts[0], shapes[parts[0].ours]), tuple(parts))
    for name, parts in by_name.items()
  ]


def collect(params: Mapping[str, Any], table: Iterable[Slot]) -> dict[str, np.ndarray]:
  """The foreign tensors that the slots make of a parameter tree; contiguous, dtype unchanged."""
  tree = Tree(params)
  return {output.name: output.make(tree) for output in outputs(table, tree.shapes)}


def shapes_of(init: Callable[..., Any], *args: Any) -> dict[str, tuple[int, ...]]:
  """Path -> shape of the parameters that `init(*args)` would make, without making them."""
  tree = jax.eval_shape(init, *args)
  return {k: v.shape for k, v in flax.traverse_util.flatten_dict(tree, sep="/").items()}


def nested(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Path -> array as a parameter tree."""
  return flax.traverse_util.unflatten_dict(dict(arrays), sep="/")
