"""Weights of any format: told apart by what is in the files, never by a name, and opened.

`FORMATS` is the table. A format to read is a file with a function that makes a `Source`, and a line
here (docs/architecture.md names the file to copy from).
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from data_pipes.errors import InputError
from vr_jax.checkpoint import is_checkpoint, is_orbax
from vr_jax.interop import (
  big_vision,
  gemma,
  hf_decoder,
  hf_paligemma,
  hf_tower,
  navit,
  partial,
  peft,
  torch_folder,
  videorefer,
  vr,
)
from vr_jax.interop.fields import read_config, shown
from vr_jax.interop.npz import is_npz
from vr_jax.interop.source import Source
from vr_jax.weights import locate


class Format(NamedTuple):
  """A format that is read.

  name: what users call it. open: makes the source; raises InputError on what is damaged. fits:
  whether a path holds it, or the values of model_type in config.json by which it is known.
  """

  name: str
  open: Callable[[Path], Source]
  fits: Callable[[Path], bool] | tuple[str, ...]

  def holds(self, path: Path) -> bool:
    if callable(self.fits):
      return self.fits(path)
    return _model_type(path) in self.fits


TRANSFORMERS = "a folder of transformers (SigLIP, Qwen2, Gemma 1 to 3, PaliGemma)"
FORMATS: tuple[Format, ...] = (  # the first that fits is taken
  Format("a checkpoint of vr_jax", vr.open_checkpoint, is_checkpoint),
  Format("a published VideoRefer folder", partial.open_stage, videorefer.MODEL_TYPES),
  Format(
    "a folder of VideoRefer-VideoLLaMA3, PixelRefer, PixelRefer-Lite or VideoLLaMA3",
    navit.open_published,
    navit.MODEL_TYPES,
  ),
  Format("VL3-SigLIP-NaViT", navit.open_tower_folder, (navit.TOWER_TYPE,)),
  Format(TRANSFORMERS, hf_tower.open_folder, hf_tower.MODEL_TYPES),
  Format(TRANSFORMERS, hf_decoder.open_folder, hf_decoder.MODEL_TYPES),
  Format(TRANSFORMERS, hf_paligemma.open_paligemma, (hf_paligemma.MODEL_TYPE,)),
  Format("a folder of vr convert --to torch", torch_folder.open_torch, (torch_folder.MODEL_TYPE,)),
  Format("mm_projector.bin or region_encoder.bin", partial.open_partial, partial.is_partial),
  Format("a big_vision npz (file.npz or file.npz:img)", big_vision.open_npz, is_npz),
  Format("a Gemma folder of Orbax", gemma.open_gemma, is_orbax),
)


def open_source(path: str | Path) -> Source:
  """Opens weights, by any name that `vr_jax.weights.locate` knows; no tensor is read yet.

  Raises:
    InputError: nothing there, or nothing that is known; what is known but damaged or incomplete.
  """
  path = locate(path).path
  for form in FORMATS:
    if form.holds(path):
      return form.open(path)
  accepted = ", ".join(dict.fromkeys(form.name for form in FORMATS))
  if not path.exists():
    raise InputError(f"{path}: no such file or folder; accepted: {accepted}")
  if (kind := _model_type(path)) is not None:
    known = ", ".join(name for form in FORMATS if not callable(form.fits) for name in form.fits)
    raise InputError(f"{path / 'config.json'}: model_type={shown(kind)} is not one of {known}")
  if peft.is_adapter(path):
    raise InputError(f"{path}: an adapter alone; convert its base with --adapter {path}")
  inside = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
  raise InputError(f"{path}: holds {inside}; accepted: {accepted}")


def _model_type(folder: Path) -> str | None:
  """What config.json says the folder is; None without a config.json."""
  where = folder / "config.json"
  return str(read_config(where).get("model_type")) if where.is_file() else None
