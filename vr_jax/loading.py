"""Opens a model by name or folder, whatever wrote its weights.

The file is not called load.py: `vr_jax.load` is the function.
"""

from pathlib import Path
from typing import Any

from data_pipes.errors import InputError
from vr_jax.assets import ASSETS, packaged
from vr_jax.inference.model import Model
from vr_jax.inference.pictures import PictureModel
from vr_jax.interop.sources import open_source
from vr_jax.weights import locate

KINDS: dict[str, type[Model]] = {"siglip": Model, "navit": PictureModel}  # by the kind of tower
MODELS = (
  "a work directory or checkpoint of vr train, a folder of the published VideoRefer or of "
  "vr convert --to torch, its address on the Hub (OWNER/NAME[@REVISION]), or a packaged model"
)


def load(source: str | Path | None = None, **options: Any) -> Model:
  """Loads a model.

  Args:
    source: any weights that hold a whole model and its tokenizer (`interop.sources.open_source`): a
      work directory of `vr train` or one of its checkpoints, a folder of the published VideoRefer
      or of `vr convert --to torch`; its address on the Hub, `OWNER/NAME[@REVISION]`; or the name
      of a packaged model. None is the packaged `vr-mini`.
    **options: weights, mesh and memory_limit of `Model`.

  Raises:
    InputError: nothing there that is a model, parts of one alone, or no tokenizer.
  """
  path, name = locate(source)
  notice = ""
  if path.parent == ASSETS:
    notice = (
      f"{name} is a demonstration model, trained on small synthetic videos of moving shapes; "
      "its answers about other videos mean nothing"
    )
  if not path.exists():
    raise InputError(
      f"checkpoint {name!r}: no such folder; accepted: {MODELS} ({', '.join(packaged())})"
    )
  opened = open_source(path)
  cfg = opened.model_config()
  if not opened.tokenizer_files:
    raise InputError(f"{path}: {opened.kind} without tokenizer files; accepted: {MODELS}")
  tokenizer = opened.tokenizer()
  kind = KINDS[cfg.img.kind]
  return kind(cfg, opened.params, tokenizer, opened.generation, notice, **options)
