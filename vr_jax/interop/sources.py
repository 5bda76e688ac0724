"""Weights of any format: told apart by what is in the files, never by a name, and opened."""

from pathlib import Path

from data_pipes.errors import InputError
from vr_jax.checkpoint import find_tokenizer_files, is_checkpoint, is_orbax
from vr_jax.interop import (
  big_vision,
  gemma,
  hf_decoder,
  hf_paligemma,
  hf_tower,
  partial,
  peft,
  torch_folder,
  videorefer,
  vr,
)
from vr_jax.interop.fields import read_json
from vr_jax.interop.generation import generation
from vr_jax.interop.npz import is_npz
from vr_jax.interop.source import Source
from vr_jax.interop.table import Part, Safetensors

ACCEPTED = (
  "a checkpoint of vr_jax, a published VideoRefer folder, a folder of transformers (SigLIP, Qwen2, "
  "Gemma 1 to 3, PaliGemma), a folder of vr convert --to torch, mm_projector.bin or "
  "region_encoder.bin, a big_vision npz (file.npz or file.npz:img), a Gemma folder of Orbax"
)


def open_source(path: str | Path) -> Source:
  """Opens weights; no tensor is read yet.

  Raises:
    InputError: nothing there, or nothing that is known; what is known but damaged or incomplete.
  """
  if is_npz(path):
    return big_vision.open_npz(path)
  folder = Path(path)
  if not folder.exists():
    raise InputError(f"{path}: no such file or folder; accepted: {ACCEPTED}")
  if folder.is_file():
    return partial.open_partial(folder)
  if is_checkpoint(folder):
    return vr.open_checkpoint(folder)
  if (folder / "config.json").is_file():
    return _open_configured(folder)
  if peft.is_adapter(folder):
    raise InputError(f"{path}: an adapter alone; convert its base with --adapter {path}")
  if any((folder / name).is_file() for name in partial.FILES):
    return partial.open_partial(folder)
  if is_orbax(folder):
    return gemma.open_gemma(folder)
  inside = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
  raise InputError(f"{path}: holds {inside}; accepted: {ACCEPTED}")


def _open_configured(folder: Path) -> Source:
  """A folder whose config.json names its architecture."""
  where = folder / "config.json"
  fields = read_json(where)
  kind = fields.get("model_type")
  if kind in videorefer.MODEL_TYPES:
    weights = any(folder.glob("*.safetensors")) or any(folder.glob("*.safetensors.index.json"))
    if not weights and any((folder / name).is_file() for name in partial.FILES):
      return partial.open_partial(folder)
    return videorefer.open_published(folder)
  if kind == torch_folder.MODEL_TYPE:
    return torch_folder.open_torch(folder)
  if kind == hf_paligemma.MODEL_TYPE:
    return hf_paligemma.open_paligemma(folder)
  if kind in hf_tower.MODEL_TYPES:
    return _open_tower(folder)
  if kind in hf_decoder.FAMILIES or (kind == "gemma3" and "text_config" in fields):
    return _open_decoder(folder)
  known = [*videorefer.MODEL_TYPES, torch_folder.MODEL_TYPE, hf_paligemma.MODEL_TYPE]
  known += [*hf_tower.MODEL_TYPES, *hf_decoder.FAMILIES, "gemma3"]
  raise InputError(f"{where}: model_type={kind!r} is not one of {', '.join(known)}")


def _open_tower(folder: Path) -> Source:
  where = folder / "config.json"
  fields = read_json(where)
  tensors = Safetensors(folder)
  prefix = hf_tower.prefix_of(tensors)
  complete = f"{prefix}post_layernorm.weight" in tensors
  pool = complete and f"{prefix}head.probe" in tensors
  # A tower without its last norm is one whose last layer but one is the output.
  cfg = hf_tower.tower_config(fields, where, None if complete else -1, pool=pool)
  params = hf_tower.open_tower(tensors, cfg)
  return Source(
    kind="SigLIP folder",
    path=folder,
    parts={"img": cfg},
    params=Part(params, "", "img/"),
    skipped=params.skipped,
    origin={"format": "siglip", "config.json": fields},
  )


def _open_decoder(folder: Path) -> Source:
  where = folder / "config.json"
  fields = read_json(where)
  cfg = hf_decoder.decoder_config(fields, where)
  params = hf_decoder.open_decoder(Safetensors(folder), cfg)
  return Source(
    kind="decoder folder",
    path=folder,
    parts={"llm": cfg},
    params=Part(params, "", "llm/"),
    tokenizer_files=find_tokenizer_files(folder),
    generation=vars(generation(folder)),
    skipped=params.skipped,
    origin={"format": "decoder", "config.json": fields},
  )
