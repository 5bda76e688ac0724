"""Published VideoRefer folders (Hugging Face layout): configuration and parameters, both ways.

Source: DAMO-NLP-SG/VideoRefer checkpoints, `model_type` videorefer_qwen2; SigLIP towers as on the
Hub (SiglipModel or SiglipVisionModel).
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from data_pipes.errors import InputError
from vr_jax.interop.table import (
  CONV1X1,
  CONV2D,
  CONV3D,
  DENSE,
  DEPTHWISE,
  FLAT,
  HEADS_FIRST,
  HEADS_IN,
  HEADS_OUT,
  POSITIONS,
  SAME,
  Row,
  Shapes,
  Slot,
  Tensors,
  Transform,
  collect,
  fill,
  nested,
  read_json,
  shapes_of,
  slots,
)
from vr_jax.models.connector import KINDS, Connector, ConnectorConfig
from vr_jax.models.decoder import DecoderConfig
from vr_jax.models.region import RegionConfig
from vr_jax.models.siglip import Siglip, SiglipConfig
from vr_jax.models.videorefer import VideoReferConfig, init_params

MODEL_TYPES = ("videorefer_qwen2", "videorefer")
REGION_TOKENS = 4  # a default of the published code (`layer.py`), not part of its config.json


def _attention(ours: str, theirs: str) -> list[Row]:
  return [
    row
    for a, b in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"))
    for row in (
      Row(f"{ours}/{a}/kernel", f"{theirs}.{b}.weight", HEADS_OUT),
      Row(f"{ours}/{a}/bias", f"{theirs}.{b}.bias", FLAT),
    )
  ]


def _dense(ours: str, theirs: str, kernel: Transform = DENSE) -> list[Row]:
  return [
    Row(f"{ours}/kernel", f"{theirs}weight", kernel),
    Row(f"{ours}/bias", f"{theirs}bias", SAME),
  ]


def _norm(ours: str, theirs: str) -> list[Row]:
  return [
    Row(f"{ours}/scale", f"{theirs}.weight", SAME),
    Row(f"{ours}/bias", f"{theirs}.bias", SAME),
  ]


_BLOCK, _LAYER = "Transformer/encoderblock", "encoder.layers.{l}"
_MHA = "MultiHeadDotProductAttention_0"

TOWER = [
  *_dense("embedding", "embeddings.patch_embedding.", CONV2D),
  Row("pos_embedding", "embeddings.position_embedding.weight", POSITIONS),
  *_norm(f"{_BLOCK}/LayerNorm_0", f"{_LAYER}.layer_norm1"),
  *_attention(f"{_BLOCK}/{_MHA}", f"{_LAYER}.self_attn"),
  *_dense(f"{_BLOCK}/{_MHA}/out", f"{_LAYER}.self_attn.out_proj.", HEADS_IN),
  *_norm(f"{_BLOCK}/LayerNorm_1", f"{_LAYER}.layer_norm2"),
  *_dense(f"{_BLOCK}/MlpBlock_0/Dense_0", f"{_LAYER}.mlp.fc1."),
  *_dense(f"{_BLOCK}/MlpBlock_0/Dense_1", f"{_LAYER}.mlp.fc2."),
  *_norm("Transformer/encoder_norm", "post_layernorm"),
  Row("MAPHead_0/probe", "head.probe", SAME),
  *(
    row
    for part, name in enumerate(("query", "key", "value"))
    for row in (
      Row(f"MAPHead_0/{_MHA}/{name}/kernel", "head.attention.in_proj_weight", HEADS_OUT, part),
      Row(f"MAPHead_0/{_MHA}/{name}/bias", "head.attention.in_proj_bias", FLAT, part),
    )
  ),
  *_dense(f"MAPHead_0/{_MHA}/out", "head.attention.out_proj.", HEADS_IN),
  *_norm("MAPHead_0/LayerNorm_0", "head.layernorm"),
  *_dense("MAPHead_0/MlpBlock_0/Dense_0", "head.mlp.fc1."),
  *_dense("MAPHead_0/MlpBlock_0/Dense_1", "head.mlp.fc2."),
]

_STAGE = r"(s\d)/(b\d)"

CONNECTOR = [
  Row(rf"{_STAGE}/conv([13])/kernel", r"\1.\2.conv\3.conv.weight", CONV1X1),
  Row(rf"{_STAGE}/conv2/kernel", r"\1.\2.conv2.conv.weight", DEPTHWISE),
  *_norm(rf"{_STAGE}/norm(\d)", r"\1.\2.conv\3.bn"),
  *_dense(rf"{_STAGE}/se/fc(\d)", r"\1.\2.se.fc\3.", CONV1X1),
  Row(rf"{_STAGE}/downsample/kernel", r"\1.\2.downsample.conv.weight", CONV1X1),
  *_norm(rf"{_STAGE}/downsample_norm", r"\1.\2.downsample.bn"),
  *_dense("sampler", "sampler.0.", CONV3D),
]


def readout_names(kind: str) -> list[str]:
  """Published names of the linear layers at a connector's end, up to `weight` and `bias`."""
  return {"linear": [""], "mlp2x_gelu": ["0.", "2."]}.get(kind, ["readout.0.", "readout.2."])


def connector_rows(kind: str) -> list[Row]:
  """The rows of one connector kind."""
  readout = enumerate(readout_names(kind), start=1)
  return CONNECTOR + [row for i, name in readout for row in _dense(f"readout/fc{i}", name)]


REGION = [*_dense("fc1", "feat_linear.0."), *_dense("fc2", "feat_linear.2.")]

_QKV = tuple(f"model.layers.{{l}}.self_attn.{x}_proj" for x in "qkv")
_MLP = "model.layers.{l}.mlp"


def _suffixed(names: tuple[str, ...], suffix: str) -> tuple[str, ...]:
  return tuple(f"{name}.{suffix}" for name in names)


DECODER = [
  Row("embedder/input_embedding", "model.embed_tokens.weight", SAME),
  Row("embedder/output_embedding", "lm_head.weight", SAME),
  Row("layers/attn/q_einsum/w", _QKV[0] + ".weight", HEADS_FIRST),
  Row("layers/attn/q_einsum/b", _QKV[0] + ".bias", FLAT),
  Row("layers/attn/kv_einsum/w", _suffixed(_QKV[1:], "weight"), HEADS_FIRST),
  Row("layers/attn/kv_einsum/b", _suffixed(_QKV[1:], "bias"), FLAT),
  Row("layers/attn/qkv_einsum/w", _suffixed(_QKV, "weight"), HEADS_FIRST),
  Row("layers/attn/qkv_einsum/b", _suffixed(_QKV, "bias"), FLAT),
  Row("layers/attn/attn_vec_einsum/w", "model.layers.{l}.self_attn.o_proj.weight", HEADS_IN),
  Row("layers/mlp/gating_einsum", (f"{_MLP}.gate_proj.weight", f"{_MLP}.up_proj.weight"), DENSE),
  Row("layers/mlp/linear", f"{_MLP}.down_proj.weight", DENSE),
  Row("layers/pre_attention_norm/scale", "model.layers.{l}.input_layernorm.weight", SAME),
  Row("layers/pre_ffw_norm/scale", "model.layers.{l}.post_attention_layernorm.weight", SAME),
  Row("final_norm/scale", "model.norm.weight", SAME),
]

_SHARD_TOWER = "model.vision_tower.vision_tower.vision_model."
_CONNECTOR = "model.mm_projector."


def model_slots(cfg: VideoReferConfig, shapes: Shapes) -> list[Slot]:
  """The slots of the whole model, with the names of a published folder."""
  return [
    *slots(shapes, TOWER, "img/", _SHARD_TOWER),
    *slots(shapes, connector_rows(cfg.connector.kind), "connector/", _CONNECTOR),
    *slots(shapes, REGION, "region/", "model.region_encoder."),
    *slots(shapes, DECODER, "llm/"),
  ]


def to_published(cfg: VideoReferConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Parameters (or gradients) under their published names; contiguous, dtype unchanged."""
  flat = flax.traverse_util.flatten_dict(params, sep="/")
  return collect(params, model_slots(cfg, {path: array.shape for path, array in flat.items()}))


# --- Configuration ----------------------------------------------------------------------------


def _get(fields: Mapping[str, Any], where: Path, key: str, kind: type, default: Any = None) -> Any:
  """`fields[key]` checked to be a `kind`, or the default; without a default it must be there."""
  value = fields.get(key)
  value = default if value is None else value
  if kind is float and type(value) is int:
    value = float(value)
  if type(value) is not kind:
    raise InputError(f"{where}: {key}={value!r}, expected {kind.__name__}")
  return value


def _require(fields: Mapping[str, Any], where: Path, key: str, accepted: tuple, default: Any):
  if fields.get(key, default) not in accepted:
    names = ", ".join(repr(a) for a in accepted)
    raise InputError(f"{where}: {key}={fields.get(key)!r} is not supported; accepted: {names}")


def is_published(folder: Path | str) -> bool:
  """Whether a folder holds a published VideoRefer checkpoint, by what its config.json says."""
  file = Path(folder) / "config.json"
  return file.is_file() and read_json(file).get("model_type") in MODEL_TYPES


def decoder_config(fields: Mapping[str, Any], where: Path) -> DecoderConfig:
  """The Qwen2 fields of a config.json."""
  rope = fields.get("rope_parameters") or {}  # where newer transformers keep rope_theta
  _require(rope, where, "rope_type", ("default",), "default")
  fields = {**fields, **rope}
  _require(fields, where, "hidden_act", ("silu",), "silu")
  _require(fields, where, "rope_scaling", (None,), None)
  _require(fields, where, "use_sliding_window", (False,), False)
  width, heads = (_get(fields, where, key, int) for key in ("hidden_size", "num_attention_heads"))
  return DecoderConfig(
    width=width,
    depth=_get(fields, where, "num_hidden_layers", int),
    heads=heads,
    kv_heads=_get(fields, where, "num_key_value_heads", int, heads),
    head_dim=_get(fields, where, "head_dim", int, width // heads),
    mlp_dim=_get(fields, where, "intermediate_size", int),
    vocab_size=_get(fields, where, "vocab_size", int),
    activation="silu",
    norm_eps=_get(fields, where, "rms_norm_eps", float, 1e-6),
    norm_plus_one=False,
    scale_embedding=False,
    tied_head=_get(fields, where, "tie_word_embeddings", bool, False),
    qkv_bias=True,
    rope_base=_get(fields, where, "rope_theta", float, 10_000.0),
  )


def tower_config(folder: Path, select_layer: int | None, *, pool: bool = False) -> SiglipConfig:
  """The tower's sizes from its own config.json (SiglipModel's or SiglipVisionModel's)."""
  where = folder / "config.json"
  fields = read_json(where)
  _require(fields, where, "model_type", ("siglip", "siglip_vision_model"), None)
  fields = fields.get("vision_config", fields)
  _require(fields, where, "hidden_act", ("gelu_pytorch_tanh",), "gelu_pytorch_tanh")
  _require(fields, where, "layer_norm_eps", (1e-6,), 1e-6)
  _require(fields, where, "num_channels", (3,), 3)
  return SiglipConfig(  # defaults: those of transformers' SiglipVisionConfig
    image_size=_get(fields, where, "image_size", int, 224),
    patch_size=_get(fields, where, "patch_size", int, 16),
    width=_get(fields, where, "hidden_size", int, 768),
    depth=_get(fields, where, "num_hidden_layers", int, 12),
    heads=_get(fields, where, "num_attention_heads", int, 12),
    mlp_dim=_get(fields, where, "intermediate_size", int, 3072),
    select_layer=select_layer,
    pool=pool,
  )


def guess_tower_config(
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
  grid = round(positions**0.5)
  heads = 16 if width == 1152 else width // 64  # so400m has heads of 72, all others of 64
  named = re.search(r"patch(\d+)-(\d+)$", name)
  if named and int(named[1]) == patch and int(named[2]) // patch == grid:
    image_size, source = int(named[2]), "from its name"
  else:
    image_size, source = grid * patch, "assumed: whole patches"
  if not heads or width % heads:
    raise InputError(
      f"{tensors.path}: cannot tell the heads of a tower of width {width}; put the tower's folder "
      f"(config key mm_vision_tower={name!r}) beside the checkpoint"
    )
  cfg = SiglipConfig(
    image_size=image_size,
    patch_size=patch,
    width=width,
    depth=depth,
    heads=heads,
    mlp_dim=mlp_dim,
    select_layer=select_layer,
  )
  return cfg, f"tower: image size {image_size} ({source}), {heads} heads (assumed from its width)"


@dataclasses.dataclass(frozen=True)
class Generation:
  """What generation_config.json asks of decoding: it holds for greedy decoding too.

  The repetition penalty falls on generated tokens only, never on the prompt.
  """

  eos_ids: tuple[int, ...]
  pad_id: int | None = None
  repetition_penalty: float = 1.0


def generation(folder: Path | str) -> Generation:
  """From generation_config.json, where it is silent or absent from config.json."""
  folder = Path(folder)
  fields = read_json(folder / "config.json")
  if (folder / "generation_config.json").is_file():
    fields |= read_json(folder / "generation_config.json")
  eos = fields.get("eos_token_id")
  eos_ids = (eos,) if isinstance(eos, int) else tuple(eos or ())
  penalty = _get(fields, folder / "generation_config.json", "repetition_penalty", float, 1.0)
  return Generation(eos_ids, fields.get("pad_token_id"), penalty)


# --- Loading ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Published:
  """A published folder, read: host arrays under our names.

  `notes` say where the tower came from, what was assumed and what agreed; `skipped` are the
  tensors that no part of this model uses (the tower's last layer and head, a tied head's copy).
  """

  config: VideoReferConfig
  params: dict[str, Any]
  generation: Generation
  notes: tuple[str, ...]
  skipped: tuple[str, ...]


def load(folder: Path | str, *, dtype: str = "float32") -> Published:
  """Reads a published folder; float16 and bfloat16 weights are exact in float32.

  The tower is the one that `mm_vision_tower` names, relative to the folder, as the published code
  reads it; without it, the copy in the shards. Raises InputError on anything that does not fit.
  """
  folder = Path(folder)
  where = folder / "config.json"
  fields = read_json(where)
  _require(fields, where, "model_type", MODEL_TYPES, None)
  _require(fields, where, "mm_region_encoder_type", ("pooling",), "pooling")
  _require(fields, where, "mm_vision_select_feature", ("patch",), "patch")
  _require(fields, where, "mm_projector_type", tuple(KINDS), "linear")
  _require(fields, where, "image_aspect_ratio", ("square", "pad", None), None)
  tensors = Tensors(folder)

  tower_name = _get(fields, where, "mm_vision_tower", str, "")
  select_layer = _get(fields, where, "mm_vision_select_layer", int, -2)
  tower_folder = _tower_folder(folder, tower_name)
  in_shards = any(name.startswith(_SHARD_TOWER) for name in tensors)
  notes = []
  if tower_folder is not None:
    img = tower_config(tower_folder, select_layer)
  elif in_shards:
    img, assumed = guess_tower_config(tensors, _SHARD_TOWER, tower_name, select_layer)
    notes += ["tower: from the shards, with no folder to compare it with", assumed]
  else:
    raise InputError(
      f"{folder}: no vision tower: there are no tensors {_SHARD_TOWER}* and no folder "
      f"mm_vision_tower={tower_name!r}"
    )
  _require(fields, where, "mm_hidden_size", (img.width,), img.width)

  llm = decoder_config(fields, where)
  kind = _get(fields, where, "mm_projector_type", str, "linear")
  cfg = VideoReferConfig(
    name=folder.resolve().name,
    img=img,
    connector=ConnectorConfig(kind=kind, width=llm.width),
    region=RegionConfig(width=llm.width, tokens=REGION_TOKENS),
    llm=llm,
    num_frames=_get(fields, where, "num_frames", int, 16),
    image_aspect_ratio=fields.get("image_aspect_ratio") or "square",
    max_text_ids=_get(fields, where, "tokenizer_model_max_length", int, 2048),
  )
  shapes = shapes_of(lambda key: init_params(cfg, key), jax.random.key(0))
  wanted = model_slots(cfg, shapes)
  if tower_folder is None:
    arrays, skipped = fill(tensors, wanted, shapes, unused=_unused(cfg), dtype=dtype)
  else:
    tower, skipped_there = _read_tower(tower_folder, img, dtype)
    tower = {f"img/{path}": array for path, array in tower.items()}
    in_tower = [slot for slot in wanted if slot.ours in tower]
    copies = {slot.theirs for slot in in_tower}
    arrays, skipped = fill(
      tensors,
      [slot for slot in wanted if slot.ours not in tower],
      shapes,
      unused=lambda name: name in copies or _unused(cfg)(name),
      dtype=dtype,
    )
    arrays |= tower
    skipped = tuple(name for name in skipped if name not in copies)
    skipped += tuple(f"{tower_folder.name}: {name}" for name in skipped_there)
    copy = _agreement(tensors, in_tower, tower) if in_shards else "no copy of it"
    notes.append(f"tower: from {tower_folder}, as published; the shards hold {copy}")
  return Published(cfg, nested(arrays), generation(folder), tuple(notes), skipped)


def load_tower(
  folder: Path | str,
  select_layer: int | None = -2,
  *,
  pool: bool = False,
  dtype: str = "float32",
) -> tuple[SiglipConfig, dict[str, Any]]:
  """A stand-alone SigLIP folder, a whole SiglipModel or its vision half: (config, parameters)."""
  cfg = tower_config(Path(folder), select_layer, pool=pool)
  arrays, _ = _read_tower(Path(folder), cfg, dtype)
  return cfg, nested(arrays)


def _read_tower(
  folder: Path, cfg: SiglipConfig, dtype: str
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
  """Arrays by our path, and the tensors that `cfg` does not use."""
  tensors = Tensors(folder)
  prefix = "vision_model." if any(name.startswith("vision_model.") for name in tensors) else ""
  pixels = jax.ShapeDtypeStruct((1, cfg.image_size, cfg.image_size, 3), jnp.float32)
  shapes = shapes_of(lambda x: Siglip(cfg).init(jax.random.key(0), x)["params"], pixels)
  wanted = list(slots(shapes, TOWER, theirs=prefix))
  return fill(
    tensors,
    wanted,
    shapes,
    unused=lambda name: _unused_of_tower(name.removeprefix(prefix), cfg),
    dtype=dtype,
  )


def load_connector(
  path: Path | str, kind: str, *, dtype: str = "float32"
) -> tuple[ConnectorConfig, dict[str, Any]]:
  """The connector in a file of its own or in a whole checkpoint: (config, parameters).

  Widths come from its tensors, which are named as in `model.mm_projector` or without that prefix.
  """
  if kind not in KINDS:
    raise InputError(f"{path}: connector kind {kind!r} is not one of {', '.join(KINDS)}")
  tensors = Tensors(path)
  prefix = _CONNECTOR if any(name.startswith(_CONNECTOR) for name in tensors) else ""
  readout = [prefix + name + "weight" for name in readout_names(kind)]
  first = prefix + "s1.b1.conv1.conv.weight" if KINDS[kind].stage_depth else readout[0]
  for name in (first, readout[-1]):
    if name not in tensors:
      raise InputError(f"{path}: a connector of kind {kind} needs the tensor {name}")
  cfg = ConnectorConfig(kind=kind, width=tensors.shape(readout[-1])[0])
  features = jax.ShapeDtypeStruct((1, 2, 4, tensors.shape(first)[1]), jnp.float32)
  shapes = shapes_of(lambda x: Connector(cfg).init(jax.random.key(0), x)["params"], features)
  arrays, _ = fill(
    tensors,
    list(slots(shapes, connector_rows(kind), theirs=prefix)),
    shapes,
    unused=lambda name: not name.startswith(prefix),
    dtype=dtype,
  )
  return cfg, nested(arrays)


def _unused_of_tower(name: str, cfg: SiglipConfig) -> bool:
  """What a hidden state does not need; whole SigLIP models hold a text half as well."""
  layer = re.match(r"encoder\.layers\.(\d+)\.", name)
  if layer:
    return int(layer[1]) < cfg.depth
  parts = r"post_layernorm\.|head\.|embeddings\.position_ids$|text_model\.|logit_(scale|bias)$"
  return re.match(parts, name) is not None


def _unused(cfg: VideoReferConfig) -> Callable[[str], bool]:
  """Tells the names that a published folder may hold and this model does not use."""

  def unused(name: str) -> bool:
    if name.startswith(_SHARD_TOWER):
      return _unused_of_tower(name.removeprefix(_SHARD_TOWER), cfg.img)
    if name == "lm_head.weight":
      return cfg.llm.tied_head
    return name.endswith(".rotary_emb.inv_freq")

  return unused


def _tower_folder(folder: Path, name: str) -> Path | None:
  """The folder `mm_vision_tower` names, relative to the checkpoint or to where we are."""
  for candidate in (folder / name, Path(name)):
    if name and (candidate / "config.json").is_file():
      return candidate
  return None


def _agreement(tensors: Tensors, wanted: list[Slot], tower: Mapping[str, np.ndarray]) -> str:
  """How the shards' copy of the tower compares with the one that was loaded."""
  absent = {slot.theirs for slot in wanted if slot.theirs not in tensors}
  if absent:
    return f"an incomplete copy ({len(absent)} tensors missing, such as {min(absent)})"
  loaded = collect(nested(tower), wanted)

  def same(name: str) -> bool:
    copy = tensors.read(name)
    return np.array_equal(copy, loaded[name].astype(copy.dtype))

  differ = [name for name in loaded if not same(name)]
  if differ:
    return f"a copy that differs in {len(differ)} tensors, such as {differ[0]}"
  return "the same weights"
