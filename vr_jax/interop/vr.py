"""Our own checkpoints as a source of weights."""

from pathlib import Path

from vr_jax.interop.source import Kept, Source
from vr_jax.interop.table import Safetensors
from vr_jax.models.videorefer import PARTS, part_config
from vr_jax.training.checkpoint import (
  StoredParams,
  find_checkpoint,
  load_meta,
  tokenizer_files_of,
)

KEPT = "kept"  # folder of the tensors that a foreign folder held and the model does not use


def open_checkpoint(path: str | Path) -> Source:
  """Opens a checkpoint of `vr train` or of `vr convert`.

  Raises:
    InputError: no checkpoint, a damaged one, or none of ours.
  """
  folder = find_checkpoint(path)
  meta = load_meta(folder)
  model = meta["model"]
  params = StoredParams(folder)
  held = {path.split("/")[0] for path in params.shapes} & set(model)
  kept = Safetensors(folder / KEPT) if (folder / KEPT).is_dir() else None
  return Source(
    kind="checkpoint of vr_jax",
    path=Path(path),
    parts={
      part: part_config(part, model[part]) for part in PARTS if part in model and part in held
    },
    params=params,
    settings={key: value for key, value in model.items() if key not in PARTS},
    tokenizer_files=tokenizer_files_of(meta),
    generation=meta.get("generation", {}),
    config=meta.get("config", {}),
    kept=None if kept is None else Kept(kept, kept),
    origin=meta.get("origin", {}),
  )
