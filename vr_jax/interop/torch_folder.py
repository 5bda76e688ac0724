"""Folders of our own PyTorch model, for people without JAX: written by `--to torch`, read back.

Tensors carry the published names, config.json the whole config of the model, and the code comes
along: the model (`torch_model/`) and the modules of data_pipes that read videos, masks and text.
"""

import re
from pathlib import Path
from typing import Any

import data_pipes
import vr_jax
from data_pipes.errors import InputError
from vr_jax.checkpoint import find_tokenizer_files
from vr_jax.interop import navit, videorefer
from vr_jax.interop.fields import read_config
from vr_jax.interop.generation import generation
from vr_jax.interop.parts import read_part, read_settings
from vr_jax.interop.source import Source
from vr_jax.interop.table import Mapped, Safetensors, Shapes, Slot
from vr_jax.models.videorefer import PARTS, VideoReferConfig

MODEL_TYPE = "videorefer_torch"
CODE = Path(__file__).parent / "torch_model"
CLASSES = {  # model and processor, by the kind of tower
  "siglip": (
    "modeling_videorefer.VideoReferForCausalLM",
    "processing_videorefer.VideoReferProcessor",
  ),
  "navit": (
    "modeling_pictures_videorefer.PictureForCausalLM",
    "processing_pictures_videorefer.PictureProcessor",
  ),
}
_IMPORT = re.compile(r"^from (data_pipes|vr_jax\.inference)\.(\w+) import", re.MULTILINE)


def open_torch(folder: Path) -> Source:
  """Opens a folder of `--to torch`.

  Raises:
    InputError: a config or tensors that do not fit.
  """
  where = folder / "config.json"
  fields = read_config(where)
  model = fields.get("videorefer")
  if not isinstance(model, dict) or not set(PARTS) <= set(model):
    raise InputError(f"{where}: no videorefer with {', '.join(PARTS)}")
  parts = {part: read_part(part, model[part], where) for part in PARTS}
  settings = read_settings({k: v for k, v in model.items() if k not in PARTS}, where)
  widths = {parts[name].width for name in ("connector", "region", "llm")}
  if len(widths) > 1:
    raise InputError(f"{where}: connector, region and llm have {len(widths)} widths; accepted: one")
  cfg = VideoReferConfig(**settings, **parts)
  shapes = (navit if cfg.img.kind == "navit" else videorefer).model_shapes(cfg)
  params = Mapped(Safetensors(folder), output_slots(cfg, shapes), shapes)
  return Source(
    kind="PyTorch folder of vr_jax",
    path=folder,
    parts=parts,
    params=params,
    settings=settings,
    tokenizer_files=find_tokenizer_files(folder),
    generation=vars(generation(folder)),
  )


def config_json(cfg: VideoReferConfig, dtype: str) -> dict[str, Any]:
  """The fields of config.json."""
  name, processor = CLASSES[cfg.img.kind]
  return {
    "architectures": [name.split(".")[1]],
    "auto_map": {
      "AutoConfig": "configuration_videorefer.VideoReferConfig",
      "AutoModel": name,
      "AutoModelForCausalLM": name,
      "AutoProcessor": processor,
    },
    "model_type": MODEL_TYPE,
    "torch_dtype": dtype,
    "videorefer": cfg.to_dict(),
  }


def code(kind: str) -> dict[str, bytes]:
  """The Python files of the folder: our model, and what its processor imports, side by side.

  `kind` is that of the tower.
  """
  package = {"data_pipes": Path(data_pipes.__file__).parent}
  package["vr_jax.inference"] = Path(vr_jax.__file__).parent / "inference"
  files = {path.name: path for path in sorted(CODE.glob("*_videorefer.py"))}
  if kind != "navit":
    files = {name: path for name, path in files.items() if "_pictures_" not in name}
  contents: dict[str, bytes] = {}
  while files:
    name, path = files.popitem()
    text = path.read_text(encoding="utf-8")
    for room, module in _IMPORT.findall(text):
      if f"{module}.py" not in contents:
        files[f"{module}.py"] = package[room] / f"{module}.py"
    contents[name] = _IMPORT.sub(r"from .\2 import", text).encode()
  return contents


def output_slots(cfg: VideoReferConfig, shapes: Shapes) -> list[Slot]:
  """The slots of a folder: the published names, whatever the decoder."""
  if cfg.img.kind == "navit":
    return navit.model_slots(shapes, cfg, navit.tower_prefix(cfg.region.kind))
  return videorefer.model_slots(cfg, shapes)
