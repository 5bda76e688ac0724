"""Checkpoints: what a run needs to go on, and what an answer needs: read and written with Orbax.

    W/checkpoints/<step>/state    step, optimizer moments
                         params   the parameters that train, or all
                         data     {"next_index": global batches used so far}
                         meta     config, model, tokenizer files, generation settings, versions

    W/frozen/<hash>/params        the parameters that no step changes, written once; `meta` of each
                                  step holds the hash, and has none where its `params` are all

A step's folder appears under its name only when it is complete; a folder that `export` wrote holds
`params` and `meta`, and `kept` (safetensors) where `vr convert` keeps what a foreign folder held
besides.
"""

import base64
import hashlib
import importlib.metadata
import logging
import math
import platform
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from data_pipes.buckets import absolute, as_path, files_below, is_address
from data_pipes.errors import InputError, one_line
from data_pipes.lfs import refuse_pointer
from data_pipes.tokenizer import TOKENIZER_FILES, Tokenizer
from vr_jax.params import Params, merge, sub_tree
from vr_jax.weights import find_checkpoint, is_checkpoint, locate

# Orbax warns of a file that items inside a step's folder never have.
logging.getLogger("absl").addFilter(
  lambda record: "Metadata file does not exist" not in record.getMessage()
)


FROZEN = "frozen"  # in a work directory, beside `checkpoints`


class Damaged(InputError):
  """A checkpoint that cannot be read."""


class Inference(NamedTuple):
  """What `load_for_inference` reads.

  model: fields of the model's config (`VideoReferConfig.from_dict` takes them). params: nested
  dict of arrays. tokenizer_files: name -> content. generation: eos_ids, pad_id,
  repetition_penalty. config: the resolved training config, {} if the model was not trained here.
  """

  model: dict[str, Any]
  params: Params
  tokenizer_files: dict[str, bytes]
  generation: dict[str, Any]
  config: dict[str, Any]


def sha256_of(paths: Sequence[Path]) -> str:
  """Hash of the contents of files, one after another."""
  digest = hashlib.sha256()
  for path in paths:
    with path.open("rb") as file:
      while block := file.read(1 << 22):
        digest.update(block)
  return digest.hexdigest()


def sha256_of_folder(folder: Path) -> str:
  """Hash of the names and contents of all files below a folder, the same wherever it lies."""
  digest = hashlib.sha256()
  for name, path in files_below(folder):
    digest.update(f"{name}\0{sha256_of([path])}\n".encode())
  return digest.hexdigest()


def checkpoint_sha256(checkpoint: Path | str | None) -> str | None:
  """Hash of the checkpoint that a model was loaded from (None: the packaged vr-mini)."""
  path = locate(checkpoint).path
  if is_checkpoint(path):
    path = find_checkpoint(path)
  return sha256_of_folder(path) if path.is_dir() else None


def make_meta(
  model: Mapping[str, Any],
  tokenizer_files: Mapping[str, bytes] | None = None,
  generation: Mapping[str, Any] | None = None,
  config: Mapping[str, Any] | None = None,
  origin: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """The `meta` item: JSON that makes the parameters usable without anything else.

  `origin` is what a converted checkpoint needs for the way back (`interop.source.Source`).
  """
  return {
    "model": dict(model),
    "tokenizer": {name: _to_text(data) for name, data in (tokenizer_files or {}).items()},
    "generation": dict(generation or {}),
    "config": dict(config or {}),
    **({"origin": dict(origin)} if origin else {}),
    "layers": "stacked",  # scanned layers: one array with a leading layer axis
    "versions": package_versions(),
  }


def package_versions() -> dict[str, str]:
  """Versions of Python and of the packages that decide the numbers."""
  packages = ("vr-jax", "jax", "flax", "optax", "orbax-checkpoint")
  return {"python": platform.python_version(), **{p: _version(p) for p in packages}}


def read_tokenizer_files(folder: Path | str) -> dict[str, bytes]:
  """The tokenizer's files in a folder, by name.

  Raises:
    InputError: there are none.
  """
  files = find_tokenizer_files(folder)
  if not files:
    raise InputError(f"{folder}: no tokenizer files; expected tokenizer.json or vocab.json, …")
  return files


def find_tokenizer_files(folder: Path | str) -> dict[str, bytes]:
  """The tokenizer's files in a folder, by name; {} if there are none."""
  paths = [Path(folder) / name for name in TOKENIZER_FILES]
  for path in paths:
    refuse_pointer(path)
  return {path.name: path.read_bytes() for path in paths if path.is_file()}


def export(folder: Path | str, params: Params, meta: Mapping[str, Any]) -> None:
  """Writes a checkpoint for inference alone: `params` and `meta` (of `make_meta`)."""
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
    checkpointer.save(
      absolute(folder),
      args=ocp.args.Composite(
        params=ocp.args.StandardSave(params), meta=ocp.args.JsonSave(dict(meta))
      ),
    )


class ParamsWriter:
  """Writes a checkpoint for inference piece by piece, in any order; as `export` does, in the end.

  Orbax writes the tree with one element for each array; then the arrays, which Orbax keeps in
  tensorstore, take their true shape. A folder that a killed writer left is taken up again.
  """

  def __init__(
    self,
    folder: Path,
    arrays: Mapping[str, tuple[tuple[int, ...], Any]],
    meta: Mapping[str, Any],
  ):
    """`arrays`: path -> (shape, dtype)."""
    self.folder, self._arrays, self._open = folder, arrays, {}
    if not (folder / "params" / "commit_success.txt").exists():
      shutil.rmtree(folder, ignore_errors=True)  # what a kill left before anything was written
      placeholders = {path: np.zeros(1, dtype) for path, (_, dtype) in arrays.items()}
      export(folder, flax.traverse_util.unflatten_dict(placeholders, sep="/"), meta)

  def write(self, path: str, index: tuple[int, ...], value: np.ndarray) -> None:
    """Writes the parameter at `index` of its leading axes."""
    self._store(path, bool(index))[index].write(value).result()

  def _store(self, path: str, stacked: bool) -> Any:
    if path not in self._open:
      shape, dtype = self._arrays[path]
      spec = _array_spec(self.folder / "params", path.replace("/", "."))
      store = ts.open(spec, open=True).result()
      if store.shape != tuple(shape):  # the placeholder
        spec["metadata"] = {
          "shape": list(shape),
          "chunks": _chunks(shape, np.dtype(dtype).itemsize, stacked),
          "dtype": store.spec().to_json()["metadata"]["dtype"],
          "compressor": {"id": "zstd", "level": 1},
        }
        store = ts.open(spec, create=True, delete_existing=True).result()
      self._open = {path: store}  # one at a time: a store holds caches
    return self._open[path]


def _chunks(shape: tuple[int, ...], itemsize: int, stacked: bool, most: int = 1 << 27) -> list[int]:
  """Chunks of at most `most` bytes, a layer or less each: what a host of a pod reads of its own."""
  chunks = [1, *shape[1:]] if stacked else list(shape)
  while math.prod(chunks) * itemsize > most:
    at = max(range(len(chunks)), key=lambda i: chunks[i])
    chunks[at] = -(-chunks[at] // 2)
  return chunks


def _array_spec(params: Path, name: str) -> dict[str, Any]:
  """Where Orbax keeps an array: in one key-value store, or (older checkpoints) in its own folder.

  `name`: its keys, joined by dots.
  """
  if (params / "manifest.ocdbt").exists():
    base = f"{params}/" if is_address(params) else params.absolute().as_uri()
    store = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
  else:
    store = {"driver": "file", "path": str(params.absolute() / name)}
  # Without a sync after each write; what a killed process wrote is there all the same.
  return {"driver": "zarr", "kvstore": store, "context": {"file_io_sync": False}}


class StoredParams:
  """Parameters in an Orbax folder, read piece by piece; `vr_jax.interop.table.Parameters`.

  Where a chunk of an array holds several layers, the array read last stays in memory whole, and
  those before it as long as they are small.
  """

  def __init__(self, folder: Path, item: str = "params"):
    """`folder`: of one step; `item` "" where it is the parameters' own folder."""
    self._places: dict[str, tuple[Path, str]] = {}  # the Orbax folder, and the name there
    self._leaves: dict[str, jax.ShapeDtypeStruct] = {}
    for part in param_folders(folder) if item else [folder]:
      for path, leaf in jax.tree_util.tree_leaves_with_path(_saved_shapes(part, item)):
        keys = [str(key.key) for key in path]
        self._places["/".join(keys)] = (part / item if item else part, ".".join(keys))
        self._leaves["/".join(keys)] = leaf
    self.shapes = {path: tuple(leaf.shape) for path, leaf in self._leaves.items()}
    self._held: dict[str, tuple[Any, np.ndarray | None]] = {}  # the array read last is the last

  def dtype(self, path: str) -> np.dtype:
    return np.dtype(self._leaves[path].dtype)

  def read(self, path: str, index: tuple[int, ...] = ()) -> np.ndarray:
    folder, name = self._places[path]
    try:
      store, whole = self._held.pop(path, (None, None))
      if store is None:
        store = ts.open(_array_spec(folder, name)).result()
      if whole is None and index and store.chunk_layout.read_chunk.shape[0] != 1:
        self._make_room(math.prod(store.shape) * self.dtype(path).itemsize)
        whole = store.read().result()
      self._held[path] = (store, whole)
      return store[index].read().result() if whole is None else whole[index]
    except Exception as error:  # tensorstore raises all kinds on damaged files
      raise _damaged(folder, error) from error

  def _make_room(self, size: int, small: int = 1 << 28) -> None:
    """Lets go of arrays, the oldest first, until the others and one of `size` bytes are small."""
    for path in list(self._held):
      held = sum(whole.nbytes for _, whole in self._held.values() if whole is not None)
      if held + size <= small:
        return
      del self._held[path]


def load_for_inference(path: Path | str, shardings: Params | None = None) -> Inference:
  """Reads the parameters and all that decoding with them needs.

  Args:
    path: see `find_checkpoint`.
    shardings: a tree like the parameters; by default they go to the first device.

  Raises:
    InputError: no checkpoint, a damaged one, or none of ours.
  """
  path = find_checkpoint(path)
  meta = load_meta(path)
  return Inference(
    model=meta["model"],
    params=load_params(path, shardings),
    tokenizer_files=tokenizer_files_of(meta),
    generation=meta.get("generation", {}),
    config=meta.get("config", {}),
  )


def load_meta(path: Path | str) -> dict[str, Any]:
  """The `meta` item of a checkpoint, see `make_meta`; reads no arrays."""
  path = find_checkpoint(path)
  meta = restore_items(path, {}, ("meta",))["meta"]
  if not isinstance(meta, dict) or not {"model", "tokenizer"} <= set(meta):
    raise InputError(f"{path}: the checkpoint is not one of vr_jax (its meta holds no model)")
  return meta


def param_folders(path: Path) -> list[Path]:
  """The folders whose `params` are together those of a step: its own, and that of what is frozen.

  Raises:
    InputError: the frozen parameters are not where they were written.
  """
  if not (path / "meta").is_dir():
    return [path]
  name = restore_items(path, {}, ("meta",))["meta"].get(FROZEN)
  return [path] if name is None else [path, frozen_folder(path, name)]


def frozen_folder(path: Path, name: str) -> Path:
  """Where the frozen parameters of a step lie.

  Raises:
    InputError: not there.
  """
  folder = path.parent.parent / FROZEN / name
  if not (folder / "params").is_dir():
    raise InputError(
      f"{path}: its frozen weights are not here; accepted: a step in its work directory, which has "
      f"them in {FROZEN}/{name} (`vr convert STEP DST --to vr` writes one that stands alone)"
    )
  return folder


def tokenizer_files_of(meta: Mapping[str, Any]) -> dict[str, bytes]:
  """The tokenizer files that a `meta` item holds, by name."""
  return {name: _to_bytes(text) for name, text in meta["tokenizer"].items()}


def make_tokenizer(files: Mapping[str, bytes]) -> Tokenizer:
  """The tokenizer of files by name.

  Raises:
    InputError: they are not complete.
  """
  with tempfile.TemporaryDirectory() as folder:
    for name, content in files.items():
      Path(folder, name).write_bytes(content)
    try:
      return Tokenizer.from_folder(folder)
    except InputError as error:  # it names a folder that is gone when the user looks for it
      raise InputError(str(error).replace(folder, "tokenizer files")) from None


def load_params(path: Path | str, shardings: Params | None = None) -> Params:
  """The parameters of a checkpoint, in the dtypes they were saved in; see load_for_inference."""
  path = find_checkpoint(path)
  first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  params: Params = {}
  for folder in param_folders(path):
    saved = _saved_shapes(folder, "params")
    placed = jax.tree.map(lambda _: first, saved)
    target = jax.tree.map(
      lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
      saved,
      placed if shardings is None else sub_tree(shardings, saved),
    )
    params = merge(params, restore_items(folder, {"params": target}, ())["params"])
  return params


def restore_items(path: Path, trees: Mapping[str, Any], texts: tuple[str, ...]) -> dict[str, Any]:
  """Items of one step's folder: trees of arrays by their targets, and JSON items."""
  for item, target in trees.items():
    _check_tree(path / item, _saved_shapes(path, item), target)
  args = {item: ocp.args.StandardRestore(target) for item, target in trees.items()}
  args |= {item: ocp.args.JsonRestore() for item in texts}
  try:
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
      read = checkpointer.restore(path, args=ocp.args.Composite(**args))
    read = {item: read[item] for item in args}
    jax.block_until_ready([read[item] for item in trees])
  except Exception as error:  # orbax and tensorstore raise all kinds on damaged files
    raise _damaged(path, error) from error
  for item, target in trees.items():
    # Orbax casts silently, so look at what came back.
    _check_tree(path / item, read[item], target)
  return read


def is_orbax(path: Path | str) -> bool:
  """Whether a folder holds a tree of arrays that Orbax wrote, ours or another's."""
  path = as_path(path)
  return any((path / name).is_file() for name in ("_METADATA", "manifest.ocdbt"))


def _saved_shapes(path: Path, item: str) -> Any:
  """The tree of an item as jax.ShapeDtypeStructs."""
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      tree = checkpointer.metadata(path / item).item_metadata.tree
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
  except Exception as error:
    raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> Damaged:
  return Damaged(
    f"{path}: the checkpoint is truncated, damaged or not one of vr_jax "
    f"({type(error).__name__}: {one_line(error)})"
  )


def _check_tree(where: Path, saved: Any, target: Any) -> None:
  """Raises InputError with the first few leaves in which two trees differ."""

  def leaves(tree):
    return {
      jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
      for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }

  held, expected = leaves(saved), leaves(target)
  problems = [f"{k} is missing" for k in expected if k not in held]
  problems += [f"{k} is not expected" for k in held if k not in expected]
  problems += [
    f"{k} is {held[k]} instead of {expected[k]}"
    for k in expected
    if k in held and held[k] != expected[k]
  ]
  if problems:
    more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
    raise InputError(f"{where}: does not fit the config: {'; '.join(problems[:4])}{more}")


def _to_text(data: bytes) -> str | dict[str, str]:
  try:
    return data.decode("utf-8")
  except UnicodeDecodeError:
    return {"base64": base64.b64encode(data).decode("ascii")}


def _to_bytes(text: str | dict[str, str]) -> bytes:
  return text.encode("utf-8") if isinstance(text, str) else base64.b64decode(text["base64"])


def _version(package: str) -> str:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return "not installed"
