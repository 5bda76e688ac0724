"""Published VideoRefer folders (Hugging Face layout): configuration and parameters, both ways.

Source: DAMO-NLP-SG/VideoRefer checkpoints, `model_type` videorefer_qwen2; SigLIP towers as on the
Hub (SiglipModel or SiglipVisionModel).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from data_pipes.errors import InputError
from vr_jax.checkpoint import find_tokenizer_files
from vr_jax.interop import hf_decoder, hf_tower
from vr_jax.interop.fields import IDS, field, read_config, read_json, require, size
from vr_jax.interop.generation import Generation, generation
from vr_jax.interop.hf_tower import dense, norm
from vr_jax.interop.source import Kept, Source
from vr_jax.interop.table import (
  CONV1X1,
  CONV3D,
  DEPTHWISE,
  Joined,
  Mapped,
  Parameters,
  Part,
  Row,
  Safetensors,
  Shapes,
  Slot,
  Tensors,
  arrays,
  collect,
  dtype_name,
  nested,
  pieces,
  shapes_of,
  slots,
)
from vr_jax.models import connector
from vr_jax.models.connector import Connector, ConnectorConfig
from vr_jax.models.region import KINDS, RegionConfig
from vr_jax.models.videorefer import PARTS, VideoReferConfig

MODEL_TYPES = ("videorefer_qwen2", "videorefer")
REGION_TOKENS = 4  # a default of the published code (`layer.py`), not part of its config.json
_TOKENS_FIELD = "mm_region_tokens"  # ours, written where the number is another


_STAGE = r"(s\d)/(b\d)"

CONNECTOR = [
  Row(rf"{_STAGE}/conv([13])/kernel", r"\1.\2.conv\3.conv.weight", CONV1X1),
  Row(rf"{_STAGE}/conv2/kernel", r"\1.\2.conv2.conv.weight", DEPTHWISE),
  *norm(rf"{_STAGE}/norm(\d)", r"\1.\2.conv\3.bn"),
  *dense(rf"{_STAGE}/se/fc(\d)", r"\1.\2.se.fc\3.", CONV1X1),
  Row(rf"{_STAGE}/downsample/kernel", r"\1.\2.downsample.conv.weight", CONV1X1),
  *norm(rf"{_STAGE}/downsample_norm", r"\1.\2.downsample.bn"),
  *dense("sampler", "sampler.0.", CONV3D),
]


def readout_names(kind: str) -> list[str]:
  """Published names of the linear layers at a connector's end, up to `weight` and `bias`."""
  return {"linear": [""], "mlp2x_gelu": ["0.", "2."]}.get(kind, ["readout.0.", "readout.2."])


def connector_rows(kind: str) -> list[Row]:
  """The rows of one connector kind."""
  readout = enumerate(readout_names(kind), start=1)
  return CONNECTOR + [row for i, name in readout for row in dense(f"readout/fc{i}", name)]


REGION = [*dense("fc1", "feat_linear.0."), *dense("fc2", "feat_linear.2.")]

SHARD_TOWER = "model.vision_tower.vision_tower.vision_model."
_CONNECTOR = "model.mm_projector."


def model_slots(cfg: VideoReferConfig, shapes: Shapes) -> list[Slot]:
  """The slots of the whole model, with the names of a published folder."""
  return [
    *slots(shapes, hf_tower.ROWS, "img/", SHARD_TOWER),
    *slots(shapes, connector_rows(cfg.connector.kind), "connector/", _CONNECTOR),
    *slots(shapes, REGION, "region/", "model.region_encoder."),
    *hf_decoder.decoder_slots(cfg.llm, shapes, "llm/"),
  ]


def to_published(cfg: VideoReferConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Parameters (or gradients) under their published names; contiguous, dtype unchanged."""
  flat = flax.traverse_util.flatten_dict(params, sep="/")
  return collect(params, model_slots(cfg, {path: array.shape for path, array in flat.items()}))


# --- Configuration ----------------------------------------------------------------------------


def is_published(folder: Path | str) -> bool:
  """Whether a folder holds a published VideoRefer checkpoint, by what its config.json says."""
  file = Path(folder) / "config.json"
  return file.is_file() and read_config(file).get("model_type") in MODEL_TYPES


def config_json(
  cfg: VideoReferConfig, old: Mapping[str, Any], settings: Mapping[str, Any], dtype: str
) -> dict[str, Any]:
  """The fields of a published config.json; `open_published` reads them back.

  `old` are those of the folder that the weights came from: what the model does not decide stays.
  """
  llm = hf_decoder.hf_config(cfg.llm)
  sizes = {
    **{key: llm[key] for key in DECODER_FIELDS},
    "image_aspect_ratio": cfg.image_aspect_ratio,
    "mm_hidden_size": cfg.img.width,
    "mm_projector_type": cfg.connector.kind,
    "mm_region_encoder_type": "pooling",
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": cfg.img.select_layer,
    "num_frames": cfg.num_frames,
    "tokenizer_model_max_length": cfg.max_text_ids,
    "torch_dtype": dtype,
  }
  if cfg.llm.head_dim * cfg.llm.heads != cfg.llm.width:
    sizes["head_dim"] = cfg.llm.head_dim
  if cfg.region.tokens != REGION_TOKENS:
    sizes[_TOKENS_FIELD] = cfg.region.tokens
  if "rope_parameters" in old:
    sizes.pop("rope_theta")
  if old:
    return {**old, **sizes}
  eos = list(settings.get("eos_ids") or ())
  return {
    "architectures": ["VideoReferQwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": settings.get("pad_id"),
    "eos_token_id": eos[0] if eos else None,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": MODEL_TYPES[0],
    "sliding_window": 4096,
    "tokenizer_padding_side": "right",
    "transformers_version": "4.40.0",
    "use_cache": True,
    "use_mm_proj": True,
    "use_sliding_window": False,
    **sizes,
  }


DECODER_FIELDS = (
  "hidden_size",
  "intermediate_size",
  "num_attention_heads",
  "num_hidden_layers",
  "num_key_value_heads",
  "rms_norm_eps",
  "rope_theta",
  "tie_word_embeddings",
  "vocab_size",
)


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

  See `open_published` for where the tower comes from and what is refused.
  """
  source = open_published(folder)
  return Published(
    source.model_config(),
    nested(arrays(source.params, dtype)),
    Generation(**source.generation),
    source.notes,
    source.skipped,
  )


def open_published(folder: Path | str) -> Source:
  """Opens a published folder.

  The tower is the copy in the shards; where there is none, the folder that `mm_vision_tower` names,
  relative to the checkpoint or to where we are. Where there are both (the published code reads the
  folder), the notes say whether they agree.

  Raises:
    InputError: anything that does not fit.
  """
  folder = Path(folder)
  where = folder / "config.json"
  fields = read_config(where)
  tensors = Safetensors(folder)
  tower_folder = _tower_folder(folder, field(fields, where, "mm_vision_tower", str, ""))
  notes: list[str] = []
  cfg = _model_config(folder, fields, tensors, tower_folder, notes)
  shapes = model_shapes(cfg)
  table = model_slots(cfg, shapes)
  unused = _unused(cfg)
  params: Parameters
  complete = all(slot.theirs in tensors for slot in table if slot.ours.startswith("img/"))
  if complete or tower_folder is None:
    params = mapped = Mapped(tensors, table, shapes, unused=unused)
    skipped = kept = mapped.skipped
    if tower_folder is not None:
      beside = hf_tower.open_tower(Safetensors(tower_folder), cfg.img)
      comparison = _agreement(Part(params, "img/"), beside)
      notes.append(f"tower: from the shards; {tower_folder} holds {comparison}")
  else:
    rest = Mapped(
      tensors,
      [slot for slot in table if not slot.ours.startswith("img/")],
      shapes,
      unused=lambda name: name.startswith(SHARD_TOWER) or unused(name),
    )
    tower = hf_tower.open_tower(Safetensors(tower_folder), cfg.img)
    params = Joined(Part(tower, "", "img/"), rest)
    kept = rest.skipped
    skipped = kept + tuple(f"{tower_folder.name}: {name}" for name in tower.skipped)
    in_shards = any(name.startswith(SHARD_TOWER) for name in tensors)
    copy = "an incomplete copy" if in_shards else "no copy of it"
    notes.append(f"tower: from {tower_folder}; the shards hold {copy}")
  return Source(
    kind="published VideoRefer folder",
    path=folder,
    parts={part: getattr(cfg, part) for part in PARTS},
    params=params,
    settings=cfg.settings(),
    tokenizer_files=find_tokenizer_files(folder),
    generation=dataclasses.asdict(generation(folder)),
    notes=tuple(notes),
    skipped=skipped,
    kept=Kept(tensors, kept),
    origin=_origin(folder, fields, tower_folder),
  )


def _model_config(
  folder: Path,
  fields: Mapping[str, Any],
  tensors: Tensors,
  tower_folder: Path | None,
  notes: list[str],
) -> VideoReferConfig:
  """The config of the model in a published folder; what is assumed goes to `notes`."""
  where = folder / "config.json"
  require(fields, where, "model_type", MODEL_TYPES, None)
  require(fields, where, "mm_region_encoder_type", ("pooling",), "pooling")
  require(fields, where, "mm_vision_select_feature", ("patch",), "patch")
  require(fields, where, "mm_projector_type", tuple(connector.KINDS), "linear")
  require(fields, where, "image_aspect_ratio", ("square", "pad", None), None)
  tower_name = field(fields, where, "mm_vision_tower", str, "")
  select_layer = field(fields, where, "mm_vision_select_layer", int, -2)
  if tower_folder is not None:
    file = tower_folder / "config.json"
    img = hf_tower.tower_config(read_config(file), file, select_layer)
  elif any(name.startswith(SHARD_TOWER) for name in tensors):
    img, assumed = hf_tower.guess_config(tensors, SHARD_TOWER, tower_name, select_layer)
    notes += ["tower: from the shards, with no folder to compare it with", assumed]
  else:
    raise InputError(
      f"{folder}: no vision tower: there are no tensors {SHARD_TOWER}* and no folder "
      f"mm_vision_tower={tower_name!r}"
    )
  require(fields, where, "mm_hidden_size", (img.width,), img.width)
  llm, head = hf_decoder.with_head(hf_decoder.decoder_config(fields, where), tensors)
  notes += head
  tokens = size(fields, where, _TOKENS_FIELD, REGION_TOKENS)
  kind = field(fields, where, "mm_projector_type", str, "linear")
  return VideoReferConfig(
    name=folder.resolve().name,
    img=img,
    connector=ConnectorConfig(kind=kind, width=llm.width),
    region=RegionConfig(width=llm.width, tokens=tokens),
    llm=llm,
    num_frames=size(fields, where, "num_frames", 16),
    image_aspect_ratio=fields.get("image_aspect_ratio") or "square",
    max_text_ids=size(fields, where, "tokenizer_model_max_length", 2048, most=IDS),
  )


@functools.cache
def model_shapes(cfg: VideoReferConfig) -> dict[str, tuple[int, ...]]:
  """Path -> shape of the whole model's parameters."""
  parts = {
    "connector": _connector_shapes(cfg.connector, cfg.img.width),
    "img": hf_tower.tower_shapes(cfg.img),
    "llm": hf_decoder.decoder_shapes(cfg.llm),
    "region": _region_shapes(cfg.region, cfg.img.width),
  }
  return {
    f"{part}/{path}": shape for part, shapes in parts.items() for path, shape in shapes.items()
  }


# Part by part, since tracing the modules is what opening a folder takes time for.
@functools.cache
def _connector_shapes(cfg: ConnectorConfig, width: int) -> Shapes:
  """Path -> shape of a connector over a tower of that width."""
  features = jax.ShapeDtypeStruct((1, 2, 4, width), jnp.float32)
  return shapes_of(lambda x: Connector(cfg).init(jax.random.key(0), x)["params"], features)


@functools.cache
def _region_shapes(cfg: RegionConfig, width: int) -> Shapes:
  """Path -> shape of a region encoder over a tower of that width."""
  seen = (
    jax.ShapeDtypeStruct((1, 1, 1, width), jnp.float32),
    jax.ShapeDtypeStruct((1, 1, 1, 1), jnp.uint8),
    jax.ShapeDtypeStruct((1, 1, 1), jnp.int32),
  )
  encoder = KINDS[cfg.kind](cfg)
  return shapes_of(lambda *x: encoder.init(jax.random.key(0), *x)["params"], *seen)


def _origin(folder: Path, fields: dict[str, Any], tower: Path | None) -> dict[str, Any]:
  """What the way back to a published folder takes from this one."""
  origin: dict[str, Any] = {"format": "videorefer", "config.json": fields}
  file = folder / "generation_config.json"
  if file.is_file():
    origin[file.name] = read_json(file)
  if tower is not None and folder.resolve() in tower.resolve().parents:
    weights = Safetensors(tower)
    (dtype, *more) = {dtype_name(weights.dtype(name)) for name in weights}
    origin["tower"] = {
      "folder": tower.relative_to(folder).as_posix(),
      "dtype": None if more else dtype,
      **{f.name: read_json(f) for f in sorted(tower.glob("*config.json"))},
    }
  return origin


def load_connector(
  path: Path | str, kind: str, *, dtype: str = "float32"
) -> tuple[ConnectorConfig, dict[str, Any]]:
  """The connector in a file of its own or in a whole checkpoint: (config, parameters).

  Widths come from its tensors, which are named as in `model.mm_projector` or without that prefix.
  """
  tensors = Safetensors(path)
  prefix = _CONNECTOR if any(name.startswith(_CONNECTOR) for name in tensors) else ""
  cfg, mapped = open_connector(tensors, kind, prefix)
  return cfg, nested(arrays(mapped, dtype))


def open_connector(tensors: Tensors, kind: str, prefix: str) -> tuple[ConnectorConfig, Mapped]:
  """The connector among tensors whose names begin with `prefix`."""
  if kind not in connector.KINDS:
    known = ", ".join(connector.KINDS)
    raise InputError(f"{tensors.path}: connector kind {kind!r} is not one of {known}")
  readout = [prefix + name + "weight" for name in readout_names(kind)]
  first = prefix + "s1.b1.conv1.conv.weight" if connector.KINDS[kind].stage_depth else readout[0]
  for name in (first, readout[-1]):
    if name not in tensors:
      raise InputError(f"{tensors.path}: a connector of kind {kind} needs the tensor {name}")
  cfg = ConnectorConfig(kind=kind, width=tensors.shape(readout[-1])[0])
  shapes = _connector_shapes(cfg, tensors.shape(first)[1])
  table = list(slots(shapes, connector_rows(kind), theirs=prefix))
  return cfg, Mapped(tensors, table, shapes, unused=lambda name: not name.startswith(prefix))


def _unused(cfg: VideoReferConfig) -> Callable[[str], bool]:
  """Tells the names that a published folder may hold and this model does not use."""

  def unused(name: str) -> bool:
    if name.startswith(SHARD_TOWER):
      return hf_tower.unused(name.removeprefix(SHARD_TOWER), cfg.img)
    if name == "lm_head.weight":
      return cfg.llm.tied_head
    return name.endswith(".rotary_emb.inv_freq")

  return unused


def _tower_folder(folder: Path, name: str) -> Path | None:
  """The folder `mm_vision_tower` names, relative to the checkpoint or to where we are."""
  for candidate in (folder / name, Path(name)):
    try:
      if name and (candidate / "config.json").is_file():
        return candidate
    except (OSError, ValueError):  # too long a name, or one with a NUL
      continue
  return None


def _agreement(tower: Parameters, other: Parameters) -> str:
  """How another copy of the tower compares with the one that is taken."""
  differ = []
  for path, shape in tower.shapes.items():
    for index in pieces(path, shape):
      a, b = tower.read(path, index), other.read(path, index)
      if not np.array_equal(a.astype(np.float32), b.astype(np.float32)):
        differ.append(path)
        break
  if differ:
    return f"a copy that differs in {len(differ)} parameters, such as {differ[0]}"
  return "the same weights"
