"""Folders of VideoRefer-VideoLLaMA3, PixelRefer and PixelRefer-Lite, and of their parts: both ways.

What a folder is shows in its region encoder's tensors: plain VideoLLaMA3 (a part to start training
from) has the same model_type as VideoRefer-VideoLLaMA3 and no region encoder.

Source: `videollama3_qwen2`, `pixelrefer_qwen2`, `pixelreferlite_qwen2` checkpoints as their
published code writes and reads them; the tower's folder VL3-SigLIP-NaViT.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from data_pipes.errors import InputError
from vr_jax.checkpoint import find_tokenizer_files
from vr_jax.interop import hf_decoder, hf_tower, videorefer
from vr_jax.interop.fields import DEPTH, IDS, field, read_config, read_json, require, section, size
from vr_jax.interop.generation import generation
from vr_jax.interop.hf_tower import dense, norm
from vr_jax.interop.source import Kept, Source
from vr_jax.interop.table import (
  FLAT,
  HEADS_IN,
  HEADS_OUT,
  Mapped,
  Row,
  Shapes,
  Slot,
  Tensors,
  Tree,
  collect,
  shapes_of,
  slots,
)
from vr_jax.interop.torch_file import open_shards
from vr_jax.models.connector import ConnectorConfig
from vr_jax.models.navit import NavitConfig
from vr_jax.models.region import RegionConfig
from vr_jax.models.videorefer import PARTS, VideoReferConfig, init_params

TOWER = "DAMO-NLP-SG/VL3-SigLIP-NaViT"
TOWER_TYPE = "videollama3_vision_encoder"
MODEL_TYPES = ("videollama3_qwen2", "pixelrefer_qwen2", "pixelreferlite_qwen2")
FORMAT = "navit"  # of a Source's origin


class Generation(NamedTuple):
  """A region encoder of the published code: the model_type it is released with, and K.

  `sign`: a tensor that only it has. `tokens`: K where the code fixes it, else config.json does.
  """

  model_type: str
  sign: str
  tokens: int | None = None


REGION = "model.region_encoder."
GENERATIONS: dict[str, Generation] = {  # by the kind of region encoder; the first that fits
  "cells_in_context": Generation(MODEL_TYPES[2], "fusion_attention_local.in_proj_weight"),
  "placed_cells": Generation(MODEL_TYPES[1], "pos_linear.weight"),
  "cells": Generation(MODEL_TYPES[0], "feat_linear.0.weight", 10),
}

_THEIRS = {"local": "local", "whole": "global"}
REGION_ROWS = [
  *videorefer.REGION,
  *dense("position", "pos_linear."),
  *(
    row
    for ours, theirs in _THEIRS.items()
    for row in (
      *norm(f"{ours}_norm", f"ln_{theirs}"),
      *(
        row
        for part, name in enumerate(("query", "key", "value"))
        for row in (
          Row(
            f"{ours}_attention/{name}/kernel",
            f"fusion_attention_{theirs}.in_proj_weight",
            HEADS_OUT,
            part,
          ),
          Row(
            f"{ours}_attention/{name}/bias",
            f"fusion_attention_{theirs}.in_proj_bias",
            FLAT,
            part,
          ),
        )
      ),
      *dense(f"{ours}_attention/out", f"fusion_attention_{theirs}.out_proj.", HEADS_IN),
    )
  ),
]
CONNECTOR_ROWS = [*dense("readout/fc1", "readout.0."), *dense("readout/fc2", "readout.2.")]


def model_slots(shapes: Shapes, cfg: VideoReferConfig, tower: str) -> list[Slot]:
  """The slots of the parts in `shapes`; `tower` is what stands before the tower's names."""
  return [
    *slots(shapes, hf_tower.ROWS, "img/", tower),
    *slots(shapes, CONNECTOR_ROWS, "connector/", "model.mm_projector."),
    *slots(shapes, REGION_ROWS, "region/", REGION),
    *hf_decoder.decoder_slots(cfg.llm, shapes, "llm/"),
  ]


@functools.cache
def model_shapes(cfg: VideoReferConfig) -> dict[str, tuple[int, ...]]:
  """Path -> shape of the whole model's parameters."""
  return shapes_of(lambda key: init_params(cfg, key), jax.random.key(0))


def tower_prefix(kind: str) -> str:
  """What stands before the tower's names in a folder with a region encoder of this kind."""
  return "model.vision_encoder.vision_encoder." + ("vision_model." if kind == "cells" else "")


def to_published(cfg: VideoReferConfig, params: Mapping[str, Any]) -> dict[str, Any]:
  """Parameters (or gradients) under their published names; contiguous, dtype unchanged."""
  table = model_slots(Tree(params).shapes, cfg, tower_prefix(cfg.region.kind))
  return collect(params, table)


# --- Reading ----------------------------------------------------------------------------------


def open_published(folder: Path) -> Source:
  """Opens a published folder, or plain VideoLLaMA3 as the parts img, connector and llm.

  The tower that runs is the one in the shards; of the folder that `mm_vision_encoder` names only
  the sizes are read.

  Raises:
    InputError: anything that does not fit.
  """
  where = folder / "config.json"
  fields = read_config(where)
  require(fields, where, "model_type", MODEL_TYPES, None)
  tensors = open_shards(folder)
  kind = next((k for k, g in GENERATIONS.items() if REGION + g.sign in tensors), None)
  notes: list[str] = []
  tower_files = _tower_files(folder, fields, where)
  prefix = _tower_prefix(tensors)
  parts: dict[str, Any] = {"img": _tower(tensors, prefix, fields, where, tower_files, notes)}
  decoder = hf_decoder.decoder_config(fields | {"model_type": "qwen2"}, where)
  llm, head = hf_decoder.with_head(decoder, tensors)
  notes += head
  parts["connector"] = ConnectorConfig(kind="mlp2x_gelu", width=llm.width)
  if kind is not None:
    parts["region"] = _region(kind, llm.width, fields, where)
  elif fields["model_type"] != MODEL_TYPES[0]:
    raise InputError(f"{folder}: no region encoder ({REGION}*); accepted: {MODEL_TYPES[0]} alone")
  else:
    notes.append("plain VideoLLaMA3: no region encoder; its parts can start a training run")
  parts["llm"] = llm
  require(fields, where, "mm_projector_type", ("mlp2x_gelu",), "mlp2x_gelu")
  require(fields, where, "use_token_compression", (True,), True)
  require(fields, where, "mm_hidden_size", (parts["img"].width,), parts["img"].width)
  cfg = _config(folder, parts, fields, where)
  shapes = {path: shape for path, shape in model_shapes(cfg).items() if path.split("/")[0] in parts}

  def unused(name: str) -> bool:
    tied = name == "lm_head.weight" and llm.tied_head
    return tied or name.startswith(f"{REGION}mask_embedding.") or name.endswith("inv_freq")

  params = Mapped(tensors, model_slots(shapes, cfg, prefix), shapes, unused=unused)
  return Source(
    kind="published folder of a VideoRefer successor" if kind else "VideoLLaMA3 folder",
    path=folder,
    parts={part: parts[part] for part in PARTS if part in parts},
    params=params,
    settings=cfg.settings(),
    tokenizer_files=find_tokenizer_files(folder),
    generation=dataclasses.asdict(generation(folder)),
    notes=tuple(notes),
    skipped=params.skipped,
    kept=Kept(tensors, params.skipped),
    origin={"format": FORMAT, "config.json": fields, "tower": tower_files, **_beside(folder)},
  )


def _config(folder: Path, parts: dict[str, Any], fields, where) -> VideoReferConfig:
  region = parts.get("region", RegionConfig(width=parts["llm"].width, kind="cells", tokens=1))
  return VideoReferConfig(
    name=folder.resolve().name,
    **{**parts, "region": region},
    num_frames=size(fields, where, "max_frames", 180),
    image_aspect_ratio="any",
    max_text_ids=size(fields, where, "tokenizer_model_max_length", 16384, most=IDS),
  )


def _region(kind: str, width: int, fields: Mapping[str, Any], where: Path) -> RegionConfig:
  made = GENERATIONS[kind]
  if fields["model_type"] != made.model_type:
    raise InputError(
      f"{where}: model_type={fields['model_type']!r}, but the tensors hold {REGION}{made.sign}, as "
      f"{made.model_type} has; accepted: the two of one model"
    )
  tokens = made.tokens or size(fields, where, "mask_num")
  return RegionConfig(width=width, tokens=tokens, kind=kind)


def _tower_prefix(tensors: Tensors) -> str:
  if not any(name.endswith("embeddings.patch_embedding.weight") for name in tensors):
    raise InputError(f"{tensors.path}: no vision tower (…embeddings.patch_embedding.weight)")
  return hf_tower.prefix_of(tensors)


def _tower_files(folder: Path, fields: Mapping[str, Any], where: Path) -> dict[str, Any]:
  """{"name": mm_vision_encoder, file: its JSON}: of that folder beside the checkpoint, if any."""
  name = field(fields, where, "mm_vision_encoder", str, "")
  for home in (folder / name, folder.parent / name, Path(name)):
    if name and (home / "config.json").is_file():
      return {"name": name, **{f.name: read_json(f) for f in sorted(home.glob("*config.json"))}}
  return {"name": name}


def tower_config(fields: Mapping[str, Any], where: Any, **settings: Any) -> NavitConfig:
  """The tower's sizes from the fields of its config.json."""
  require(fields, where, "model_type", (TOWER_TYPE,), TOWER_TYPE)
  require(fields, where, "hidden_act", ("gelu_pytorch_tanh",), "gelu_pytorch_tanh")
  require(fields, where, "layer_norm_eps", (1e-6,), 1e-6)
  require(fields, where, "num_channels", (3,), 3)
  return NavitConfig(  # defaults: those of VL3-SigLIP-NaViT
    patch_size=size(fields, where, "patch_size", 14),
    width=size(fields, where, "hidden_size", 1152),
    depth=size(fields, where, "num_hidden_layers", 27, most=DEPTH),
    heads=size(fields, where, "num_attention_heads", 16),
    mlp_dim=size(fields, where, "intermediate_size", 4304),
    **settings,
  )


def _tower(tensors, prefix, fields, where, files, notes: list[str]) -> NavitConfig:
  """The tower's sizes: of its own folder, of plain VideoLLaMA3's config, else of the tensors."""
  merge = size(fields, where, "spatial_merge_size", 2)
  most = size(fields, where, "mm_max_length", 9477 // merge**2)
  settings: dict[str, Any] = {"merge": merge, "max_tokens": most}
  if "config.json" in files:
    return tower_config(files["config.json"], f"{files['name']}/config.json", **settings)
  if inside := section(fields, where, "vision_encoder_config"):
    return tower_config(inside, f"{where}: vision_encoder_config", **settings)
  width, _, _, patch = tensors.shape(f"{prefix}embeddings.patch_embedding.weight")
  start = f"{prefix}encoder.layers."
  layers = {int(n[len(start) :].split(".")[0]) for n in tensors if n.startswith(start)}
  fix = f"put the folder mm_vision_encoder={files['name']!r} beside the checkpoint"
  heads = hf_tower.guess_heads(width, tensors.path, fix)
  notes.append(f"tower: {heads} heads (assumed from its width)")
  return NavitConfig(
    patch_size=patch,
    width=width,
    depth=1 + max(layers, default=-1),
    heads=heads,
    mlp_dim=tensors.shape(f"{start}0.mlp.fc1.weight")[0],
    **settings,
  )


def _beside(folder: Path) -> dict[str, Any]:
  """generation_config.json, which the way back writes again."""
  file = folder / "generation_config.json"
  return {file.name: read_json(file)} if file.is_file() else {}


def open_tower_folder(folder: Path) -> Source:
  """Opens VL3-SigLIP-NaViT alone: a part to start training from."""
  where = folder / "config.json"
  fields = read_config(where)
  cfg = tower_config(fields, where)
  tensors = open_shards(folder)
  alone = hf_tower.prefix_of(tensors)
  whole = VideoReferConfig(
    "tower", cfg, ConnectorConfig("mlp2x_gelu", 8), RegionConfig(8, 1, kind="cells"), _SMALLEST
  )
  shapes = {k: v for k, v in model_shapes(whole).items() if k.startswith("img/")}
  params = Mapped(tensors, list(slots(shapes, hf_tower.ROWS, "img/", alone)), shapes)
  return Source(
    kind="SigLIP-NaViT folder",
    path=folder,
    parts={"img": cfg},
    params=params,
    origin={"format": TOWER_TYPE, "config.json": fields},
  )


_SMALLEST = hf_decoder.DecoderConfig(8, 1, 1, 1, 8, 8, 8)


# --- Writing ----------------------------------------------------------------------------------


def config_json(
  cfg: VideoReferConfig, old: Mapping[str, Any], settings: Mapping[str, Any], dtype: str
) -> dict[str, Any]:
  """The fields of a published config.json; `open_published` reads them back.

  `old` are those of the folder that the weights came from: what the model does not decide stays.
  """
  made = GENERATIONS[cfg.region.kind]
  llm = hf_decoder.hf_config(cfg.llm)
  sizes = {
    **{key: llm[key] for key in videorefer.DECODER_FIELDS},
    "max_frames": cfg.num_frames,
    "mm_hidden_size": cfg.img.width,
    "mm_max_length": cfg.img.max_tokens,
    "mm_projector_type": "mlp2x_gelu",
    "spatial_merge_size": cfg.img.merge,
    "tokenizer_model_max_length": cfg.max_text_ids,
  }
  if cfg.llm.head_dim * cfg.llm.heads != cfg.llm.width:
    sizes["head_dim"] = cfg.llm.head_dim
  if made.tokens is None:
    sizes["mask_num"] = cfg.region.tokens
  elif made.tokens != cfg.region.tokens:
    raise InputError(
      f"region.tokens={cfg.region.tokens}: the published code of {made.model_type} has "
      f"{made.tokens} and no field for another number"
    )
  if old:
    return {**old, **sizes}
  eos = list(settings.get("eos_ids") or ())
  classes = dict(zip(MODEL_TYPES, ("Videollama3", "Pixelrefer", "Pixelreferlite"), strict=True))
  return {
    "architectures": [f"{classes[made.model_type]}Qwen2ForCausalLM"],
    "bos_token_id": settings.get("pad_id"),
    "eos_token_id": eos[0] if eos else None,
    "hidden_act": "silu",
    "image_aspect_ratio": "qwen2vl",
    "max_position_embeddings": 32768,
    "mm_vision_encoder": TOWER,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "model_type": made.model_type,
    "tokenizer_padding_side": "right",
    "torch_dtype": dtype,
    "transformers_version": "4.46.3",
    "use_cache": True,
    "use_mm_proj": True,
    "use_sliding_window": False,
    "use_token_compression": True,
    **sizes,
  }


def tower_json(cfg: NavitConfig) -> dict[str, dict[str, Any]]:
  """config.json and preprocessor_config.json of the tower's folder."""
  return {
    "config.json": {
      "architectures": ["Videollama3VisionEncoderModel"],
      "attention_dropout": 0.0,
      "hidden_act": "gelu_pytorch_tanh",
      "hidden_size": cfg.width,
      "intermediate_size": cfg.mlp_dim,
      "layer_norm_eps": 1e-06,
      "model_type": TOWER_TYPE,
      "num_attention_heads": cfg.heads,
      "num_channels": 3,
      "num_hidden_layers": cfg.depth,
      "patch_size": cfg.patch_size,
    },
    "preprocessor_config.json": {
      "do_convert_rgb": True,
      "do_normalize": True,
      "do_rescale": True,
      "do_resize": True,
      "image_mean": [0.5, 0.5, 0.5],
      "image_std": [0.5, 0.5, 0.5],
      "image_processor_type": "Videollama3ImageProcessor",
      "max_tokens": 16384,
      "min_tokens": 16,
      "patch_size": cfg.patch_size,
      "resample": 3,
      "rescale_factor": 0.00392156862745098,
    },
  }
