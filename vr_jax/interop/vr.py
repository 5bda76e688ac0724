"""Our own checkpoints as a source of weights."""

import dataclasses
from pathlib import Path

import numpy as np

from data_pipes.buckets import as_path, here
from vr_jax.checkpoint import (
  StoredParams,
  find_checkpoint,
  load_meta,
  tokenizer_files_of,
)
from vr_jax.interop.adapter import Adapter, factors_of
from vr_jax.interop.parts import read_part
from vr_jax.interop.source import Kept, Source
from vr_jax.interop.table import Parameters, Safetensors, Shapes
from vr_jax.models.lora import is_factor
from vr_jax.models.videorefer import PARTS

KEPT = "kept"  # folder of the tensors that a foreign folder held and the model does not use


class _Matrices:
  """A checkpoint's parameters without adapters, as if no matrix were stored in another way.

  What has an adapter, or is stored as int8 with scales, is float32.
  """

  def __init__(self, stored: Parameters):
    self._stored = stored
    self._int8 = {p.removesuffix("/qvalue") for p in stored.shapes if p.endswith("/qvalue")}
    self.shapes: Shapes = {
      path.removesuffix("/qvalue"): shape
      for path, shape in stored.shapes.items()
      if not is_factor(path) and path.removesuffix("/scale") not in self._int8
    }

  def dtype(self, path: str) -> np.dtype:
    if path in self._int8 or f"{path}_lora_a" in self._stored.shapes:
      return np.dtype(np.float32)
    return self._stored.dtype(path)

  def read(self, path: str, index: tuple[int, ...] = ()) -> np.ndarray:
    if path not in self._int8:
      return self._stored.read(path, index).astype(self.dtype(path), copy=False)
    values, scale = (self._stored.read(f"{path}/{name}", index) for name in ("qvalue", "scale"))
    return values * scale.astype(np.float32)


def open_checkpoint(path: str | Path) -> Source:
  """Opens a checkpoint of `vr train` or of `vr convert`; its adapters are merged.

  Raises:
    InputError: no checkpoint, a damaged one, or none of ours.
  """
  folder = find_checkpoint(path)
  meta = load_meta(folder)
  model = meta["model"]
  stored = StoredParams(folder)
  params: Parameters = stored
  held = {path.split("/")[0] for path in stored.shapes} & set(model)
  parts = {
    part: read_part(part, model[part], path, adapters=True) for part in PARTS if part in held
  }
  adapter = None
  if "llm" in parts and (rank := parts["llm"].lora_rank):
    adapter = Adapter(factors_of(stored), rank, parts["llm"].lora_alpha)
    parts["llm"] = dataclasses.replace(parts["llm"], lora_rank=0)
  if adapter or any(name.endswith("/qvalue") for name in stored.shapes):
    params = _Matrices(stored)
  kept = Safetensors(here(folder / KEPT)) if (folder / KEPT).is_dir() else None
  source = Source(
    kind="checkpoint of vr_jax",
    path=as_path(path),
    parts=parts,
    params=params,
    settings={key: value for key, value in model.items() if key not in PARTS},
    tokenizer_files=tokenizer_files_of(meta),
    generation=meta.get("generation", {}),
    config=meta.get("config", {}),
    kept=None if kept is None else Kept(kept, kept),
    origin=meta.get("origin", {}),
  )
  return source.with_adapter(adapter, path) if adapter else source
