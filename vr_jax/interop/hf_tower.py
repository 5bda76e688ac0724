"""SigLIP towers of the Hugging Face Hub: configuration and parameters, both ways.

Source: `transformers` module siglip (SiglipModel, SiglipVisionModel), which SigLIP 2 of fixed
resolution uses as well; PaliGemma holds the same tower.
"""

import functools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from data_pipes.errors import InputError
from vr_jax.interop.fields import DEPTH, read_config, require, section, shown, size
from vr_jax.interop.parts import checked
from vr_jax.interop.source import Source
from vr_jax.interop.table import (
  CONV2D,
  DENSE,
  FLAT,
  HEADS_IN,
  HEADS_OUT,
  POSITIONS,
  SAME,
  Mapped,
  Part,
  Row,
  Safetensors,
  Tensors,
  Transform,
  arrays,
  nested,
  shapes_of,
  slots,
)
from vr_jax.models.siglip import Siglip, SiglipConfig

MODEL_TYPES = ("siglip", "siglip_vision_model")


def dense(ours: str, theirs: str, kernel: Transform = DENSE) -> list[Row]:
  """The rows of a linear layer (or convolution) with bias."""
  return [
    Row(f"{ours}/kernel", f"{theirs}weight", kernel),
    Row(f"{ours}/bias", f"{theirs}bias", SAME),
  ]


def norm(ours: str, theirs: str) -> list[Row]:
  """The rows of a layer norm."""
  return [
    Row(f"{ours}/scale", f"{theirs}.weight", SAME),
    Row(f"{ours}/bias", f"{theirs}.bias", SAME),
  ]


def _attention(ours: str, theirs: str) -> list[Row]:
  return [
    row
    for a, b in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"))
    for row in (
      Row(f"{ours}/{a}/kernel", f"{theirs}.{b}.weight", HEADS_OUT),
      Row(f"{ours}/{a}/bias", f"{theirs}.{b}.bias", FLAT),
    )
  ]


_BLOCK, _LAYER = "Transformer/encoderblock", "encoder.layers.{l}"
_MHA = "MultiHeadDotProductAttention_0"

ROWS = [
  *dense("embedding", "embeddings.patch_embedding.", CONV2D),
  Row("pos_embedding", "embeddings.position_embedding.weight", POSITIONS),
  *norm(f"{_BLOCK}/LayerNorm_0", f"{_LAYER}.layer_norm1"),
  *_attention(f"{_BLOCK}/{_MHA}", f"{_LAYER}.self_attn"),
  *dense(f"{_BLOCK}/{_MHA}/out", f"{_LAYER}.self_attn.out_proj.", HEADS_IN),
  *norm(f"{_BLOCK}/LayerNorm_1", f"{_LAYER}.layer_norm2"),
  *dense(f"{_BLOCK}/MlpBlock_0/Dense_0", f"{_LAYER}.mlp.fc1."),
  *dense(f"{_BLOCK}/MlpBlock_0/Dense_1", f"{_LAYER}.mlp.fc2."),
  *norm("Transformer/encoder_norm", "post_layernorm"),
  Row("MAPHead_0/probe", "head.probe", SAME),
  *(
    row
    for part, name in enumerate(("query", "key", "value"))
    for row in (
      Row(f"MAPHead_0/{_MHA}/{name}/kernel", "head.attention.in_proj_weight", HEADS_OUT, part),
      Row(f"MAPHead_0/{_MHA}/{name}/bias", "head.attention.in_proj_bias", FLAT, part),
    )
  ),
  *dense(f"MAPHead_0/{_MHA}/out", "head.attention.out_proj.", HEADS_IN),
  *norm("MAPHead_0/LayerNorm_0", "head.layernorm"),
  *dense("MAPHead_0/MlpBlock_0/Dense_0", "head.mlp.fc1."),
  *dense("MAPHead_0/MlpBlock_0/Dense_1", "head.mlp.fc2."),
]


# --- Configuration ----------------------------------------------------------------------------


def tower_config(
  fields: Mapping[str, Any], where: Path | str, select_layer: int | None, *, pool: bool = False
) -> SiglipConfig:
  """The tower's sizes from the fields of a config.json (SiglipModel's or SiglipVisionModel's)."""
  require(fields, where, "model_type", MODEL_TYPES, None)
  fields = section(fields, where, "vision_config") or fields
  require(fields, where, "hidden_act", ("gelu_pytorch_tanh",), "gelu_pytorch_tanh")
  require(fields, where, "layer_norm_eps", (1e-6,), 1e-6)
  require(fields, where, "num_channels", (3,), 3)
  cfg = SiglipConfig(  # defaults: those of transformers' SiglipVisionConfig
    image_size=size(fields, where, "image_size", 224),
    patch_size=size(fields, where, "patch_size", 16),
    width=size(fields, where, "hidden_size", 768),
    depth=size(fields, where, "num_hidden_layers", 12, most=DEPTH),
    heads=size(fields, where, "num_attention_heads", 12),
    mlp_dim=size(fields, where, "intermediate_size", 3072),
    select_layer=select_layer,
    pool=pool,
  )
  return checked(cfg, where)


def hf_config(cfg: SiglipConfig, depth: int | None = None) -> dict[str, Any]:
  """The fields of a SiglipVisionModel's config.json; `depth`: layers that the folder holds."""
  return {
    "model_type": "siglip_vision_model",
    "architectures": ["SiglipVisionModel"],
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": cfg.width,
    "image_size": cfg.image_size,
    "intermediate_size": cfg.mlp_dim,
    "layer_norm_eps": 1e-06,
    "num_attention_heads": cfg.heads,
    "num_channels": 3,
    "num_hidden_layers": cfg.layers if depth is None else depth,
    "patch_size": cfg.patch_size,
    "vision_use_head": cfg.pool,
  }


def preprocessor_config(cfg: SiglipConfig) -> dict[str, Any]:
  """preprocessor_config.json of a tower: Pillow's bicubic resize to a square, pixels in [-1, 1]."""
  return {
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "SiglipImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": cfg.image_size, "width": cfg.image_size},
  }


def guess_config(
  tensors: Tensors, prefix: str, name: str, select_layer: int
) -> tuple[SiglipConfig, str]:
  """The tower's sizes from its tensors, where its own folder is absent; also what was assumed.

  `name` is the checkpoint's `mm_vision_tower`; names such as siglip-so400m-patch14-384 end in the
  image size, which tensors do not tell (pixels beyond the last whole patch have no weights).
  """
  try:
    width, _, _, patch = tensors.shape(f"{prefix}embeddings.patch_embedding.weight")
    positions = tensors.shape(f"{prefix}embeddings.position_embedding.weight")[0]
    mlp_dim = tensors.shape(f"{prefix}encoder.layers.0.mlp.fc1.weight")[0]
  except KeyError as error:
    raise InputError(f"{tensors.path}: the vision tower lacks {error}") from None
  layers = [re.match(re.escape(prefix) + r"encoder\.layers\.(\d+)\.", n) for n in tensors]
  depth = 1 + max(int(m[1]) for m in layers if m)
  image_size, sized = guess_image_size(round(positions**0.5), patch, name)
  cfg = SiglipConfig(
    image_size=image_size,
    patch_size=patch,
    width=width,
    depth=depth,
    heads=guess_heads(
      width,
      tensors.path,
      f"put the tower's folder (config key mm_vision_tower={shown(name)}) beside the checkpoint",
    ),
    mlp_dim=mlp_dim,
    select_layer=select_layer,
  )
  return (
    cfg,
    f"tower: image size {image_size} ({sized}), {cfg.heads} heads (assumed from its width)",
  )


def guess_image_size(grid: int, patch: int, name: str) -> tuple[int, str]:
  """(pixels, where the number is from): by the end of a name such as so400m-patch14-384."""
  named = re.search(r"patch(\d+)-(\d+)$", name)
  if named and int(named[1]) == patch and int(named[2]) // patch == grid:
    return int(named[2]), "from its name"
  return grid * patch, "assumed: whole patches"


def guess_heads(width: int, where: Any, fix: str) -> int:
  """The heads of a released tower: so400m has heads of 72, all others of 64."""
  heads = 16 if width == 1152 else width // 64
  if not heads or width % heads:
    raise InputError(f"{where}: cannot tell the heads of a tower of width {width}; {fix}")
  return heads


# --- Parameters -------------------------------------------------------------------------------


@functools.cache
def tower_shapes(cfg: SiglipConfig) -> dict[str, tuple[int, ...]]:
  """Path -> shape of a tower's parameters."""
  pixels = jax.ShapeDtypeStruct((1, cfg.image_size, cfg.image_size, 3), jnp.float32)
  return shapes_of(lambda x: Siglip(cfg).init(jax.random.key(0), x)["params"], pixels)


def prefix_of(names: Iterable[str]) -> str:
  """What stands before the names of a tower's tensors."""
  end = "embeddings.patch_embedding.weight"
  prefixes = [name[: -len(end)] for name in names if name.endswith(end)]
  return min(prefixes, key=len, default="vision_model.")


def open_tower(tensors: Tensors, cfg: SiglipConfig, *, alone: bool = True) -> Mapped:
  """The tower's parameters in the tensors of a folder; `alone`: nothing else belongs there."""
  prefix = prefix_of(tensors)

  def skipped(name: str) -> bool:
    inside = name.startswith(prefix) or (alone and not name.startswith(("model.", "language_")))
    return unused(name.removeprefix(prefix), cfg) if inside else not alone

  shapes = tower_shapes(cfg)
  return Mapped(tensors, list(slots(shapes, ROWS, theirs=prefix)), shapes, unused=skipped)


def unused(name: str, cfg: SiglipConfig) -> bool:
  """Whether a hidden state needs no such tensor: later layers, the head, a SigLIP's text half."""
  layer = re.match(r"encoder\.layers\.(\d+)\.", name)
  if layer:
    return cfg.layers <= int(layer[1]) < cfg.depth
  parts = r"post_layernorm\.|head\.|embeddings\.position_ids$|text_model\.|logit_(scale|bias)$"
  return re.match(parts, name) is not None


def load_tower(
  folder: Path | str,
  select_layer: int | None = -2,
  *,
  pool: bool = False,
  dtype: str = "float32",
) -> tuple[SiglipConfig, dict[str, Any]]:
  """A stand-alone SigLIP folder, a whole SiglipModel or its vision half: (config, parameters)."""
  where = Path(folder) / "config.json"
  cfg = tower_config(read_config(where), where, select_layer, pool=pool)
  return cfg, nested(arrays(open_tower(Safetensors(folder), cfg), dtype))


def open_folder(folder: Path) -> Source:
  """Opens a stand-alone tower, or the vision half of a whole SigLIP.

  Raises:
    InputError: a config or tensors that do not fit.
  """
  where = folder / "config.json"
  fields = read_config(where)
  tensors = Safetensors(folder)
  prefix = prefix_of(tensors)
  complete = f"{prefix}post_layernorm.weight" in tensors
  pool = complete and f"{prefix}head.probe" in tensors
  # A tower without its last norm is one whose last layer but one is the output.
  cfg = tower_config(fields, where, None if complete else -1, pool=pool)
  params = open_tower(tensors, cfg)
  return Source(
    kind="SigLIP folder",
    path=folder,
    parts={"img": cfg},
    params=Part(params, "", "img/"),
    skipped=params.skipped,
    origin={"format": "siglip", "config.json": fields},
  )
