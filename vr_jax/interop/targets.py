"""What `vr convert` writes, format by format: tensors piece by piece, and the files beside them."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipes.errors import InputError
from vr_jax.checkpoint import ParamsWriter, make_meta
from vr_jax.interop import (
  big_vision,
  hf_decoder,
  hf_paligemma,
  hf_tower,
  navit,
  peft,
  torch_folder,
  videorefer,
  vr,
)
from vr_jax.interop.generation import generation_json
from vr_jax.interop.npz import CONFIG
from vr_jax.interop.source import Kept, Source
from vr_jax.interop.table import DTYPES, Output, Parameters, Row, dtype_name, outputs, pieces, slots
from vr_jax.interop.writers import SHARD_BYTES, NpzWriter, ShardWriter, size_of
from vr_jax.models.siglip import SiglipConfig
from vr_jax.models.videorefer import VideoReferConfig

TORCH_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
Cast = Callable[[np.dtype], np.dtype]


class Item(NamedTuple):
  """One tensor, or one layer of a stacked one, from reading to writing.

  `make` gives it in the dtype of the source, `write` takes it in `dtype`; `sources` names what it
  is made of; items are worked through in the order of `order`, which keeps reads together.
  """

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  make: Callable[[], np.ndarray]
  write: Callable[[np.ndarray], None]
  sources: tuple[str, ...]
  order: tuple[Any, ...]

  @property
  def bytes(self) -> int:
    return size_of(self.shape, self.dtype)


@dataclasses.dataclass
class Target:
  """A format laid out in a folder: what to write, then what to finish.

  `weights`: path of what holds the result, relative to the folder ("" for the folder itself);
  `twice`: the format needs its size on disk twice while it is put together.
  """

  items: list[Item] = dataclasses.field(default_factory=list)
  files: dict[str, bytes] = dataclasses.field(default_factory=dict)
  closing: list[Callable[[], None]] = dataclasses.field(default_factory=list)
  weights: str = ""
  twice: bool = False
  notes: list[str] = dataclasses.field(default_factory=list)

  def finish(self, folder: Path) -> None:
    """Writes what is left when every item is written."""
    for close in self.closing:
      close()
    for name, content in self.files.items():
      (folder / name).parent.mkdir(parents=True, exist_ok=True)
      (folder / name).write_bytes(content)


def lay_out(
  to: str, source: Source, folder: Path, cast: Cast, shard_bytes: int = SHARD_BYTES
) -> Target:
  """The target of a format in `FORMATS`.

  Raises:
    InputError: the source cannot be said in that format.
  """
  navit_formats = ("vr", "videorefer", "torch", "peft")
  if "img" in source.parts and source.parts["img"].kind == "navit" and to not in navit_formats:
    raise InputError(
      f"{source.path}: --to {to} does not know towers that read pictures of any size; accepted: "
      + ", ".join(navit_formats)
    )
  return FORMATS[to](source, folder, cast, shard_bytes)


def to_vr(source: Source, folder: Path, cast: Cast, shard_bytes: int) -> Target:
  """A checkpoint of ours."""
  target, params = Target(), source.params
  entries = {p: (shape, cast(params.dtype(p))) for p, shape in params.shapes.items()}
  meta = make_meta(
    source.model(), source.tokenizer_files, source.generation, source.config, source.origin
  )
  writer = ParamsWriter(folder, entries, meta)
  for path, shape in params.shapes.items():
    for index in pieces(path, shape):
      target.items.append(
        Item(
          name=path + "".join(f"[{i}]" for i in index),
          shape=shape[len(index) :],
          dtype=entries[path][1],
          make=functools.partial(params.read, path, index),
          write=functools.partial(writer.write, path, index),
          sources=(path,),
          order=(path, index),
        )
      )
  if source.kept:
    _shards(target, folder / vr.KEPT, [], params, cast, shard_bytes, kept=source.kept)
  return target


def to_videorefer(source: Source, folder: Path, cast: Cast, shard_bytes: int) -> Target:
  """The published folder, for decoders of the Qwen2 family."""
  cfg = source.model_config()
  if hf_decoder.hf_config(cfg.llm)["model_type"] != "qwen2":
    raise InputError(
      f"{source.path}: the published code has only Qwen2 decoders; --to torch takes this one"
    )
  if cfg.img.kind == "navit":
    return _to_successor(source, cfg, folder, cast, shard_bytes)
  if cfg.img.select_layer is None:
    raise InputError(
      f"{source.path}: the published code takes a hidden state of the tower (select_layer), not "
      "its normed output; --to torch takes this one"
    )
  target, kept = Target(), _published_kept(source)
  img = _as_held(cfg.img, kept, videorefer.SHARD_TOWER)
  cfg = dataclasses.replace(cfg, img=img)
  slots_of_model = videorefer.model_slots(cfg, source.params.shapes)
  _shards(
    target, folder, outputs(slots_of_model, source.params.shapes), source.params, cast, shard_bytes,
    kept=kept,
  )  # fmt: skip
  dtype = _main_dtype(target.items)
  origin = source.origin if source.origin.get("format") == "videorefer" else {}
  old = origin.get("config.json", {})
  fields = videorefer.config_json(cfg, old, source.generation, dtype)
  if old.get("mm_vision_tower") and "tower" not in origin:
    target.notes.append(f"tower: the published code reads it from {old['mm_vision_tower']}")
  else:
    tower = origin.get("tower", {"folder": "siglip_vision_tower", "dtype": None})
    _tower_folder(target, folder, source, img, tower, kept, cast)
    fields["mm_vision_tower"] = tower["folder"]
  target.files["config.json"] = _json(fields)
  old_generation = origin.get("generation_config.json")
  generation = generation_json(source.generation)
  target.files["generation_config.json"] = _json(old_generation or generation)
  target.files |= source.tokenizer_files
  return target


def _to_successor(
  source: Source, cfg: VideoReferConfig, folder: Path, cast: Cast, shard_bytes: int
) -> Target:
  """The published folder of VideoRefer-VideoLLaMA3, PixelRefer or PixelRefer-Lite.

  Of the tower's folder, which holds other weights, it writes the sizes.
  """
  origin = source.origin if source.origin.get("format") == navit.FORMAT else {}
  target, shapes = Target(), source.params.shapes
  old = origin.get("config.json", {})
  made = outputs(navit.model_slots(shapes, cfg, navit.tower_prefix(cfg.region.kind)), shapes)
  kept = source.kept if origin else None
  _shards(target, folder, made, source.params, cast, shard_bytes, kept=kept)
  fields = navit.config_json(cfg, old, source.generation, _main_dtype(target.items))
  tower = {"name": fields.get("mm_vision_encoder") or navit.TOWER, **origin.get("tower", {})}
  files = {name: content for name, content in tower.items() if name != "name"}
  fields["mm_vision_encoder"] = home = tower["name"]
  target.files |= {f"{home}/{n}": _json(v) for n, v in (files or navit.tower_json(cfg.img)).items()}
  generation = origin.get("generation_config.json") or generation_json(source.generation)
  target.files["config.json"] = _json(fields)
  target.files["generation_config.json"] = _json(generation)
  target.files |= source.tokenizer_files
  return target


def to_torch(source: Source, folder: Path, cast: Cast, shard_bytes: int) -> Target:
  """A folder with our own PyTorch model, its processor and its weights."""
  cfg = source.model_config()
  if getattr(cfg.img, "pool", False):
    raise InputError(f"{source.path}: the tower has a pooling head, which VideoRefer does not use")
  target = Target()
  made = outputs(torch_folder.output_slots(cfg, source.params.shapes), source.params.shapes)
  _shards(target, folder, made, source.params, cast, shard_bytes)
  fields = torch_folder.config_json(cfg, _main_dtype(target.items))
  target.files["config.json"] = _json(fields)
  target.files["generation_config.json"] = _json(generation_json(source.generation))
  processor = {"auto_map": {"AutoProcessor": fields["auto_map"]["AutoProcessor"]}}
  target.files["processor_config.json"] = _json(processor)
  target.files |= torch_folder.code(cfg.img.kind)
  target.files |= source.tokenizer_files
  return target


def to_hf(source: Source, folder: Path, cast: Cast, shard_bytes: int) -> Target:
  """Folders of transformers: `tower/`, `decoder/` and the published parts beside them.

  A source of one part, or a PaliGemma, becomes one folder.
  """
  target, parts = Target(), source.parts
  if big_vision.is_paligemma(parts):
    return _to_paligemma(source, folder, cast, shard_bytes)
  alone = len(parts) == 1
  if "img" in parts:
    home = "" if alone else "tower"
    kept = _published_kept(source)
    img = _as_held(parts["img"], kept, videorefer.SHARD_TOWER)
    _tower_folder(target, folder, source, img, {"folder": home, "dtype": None}, kept, cast)
    if img.select_layer == -1 and not kept:
      target.notes.append(
        "tower: the norm behind its last layer is not part of this model; the hidden state of the "
        "last layer is its output (transformers says that post_layernorm is new)"
      )
  if "llm" in parts:
    home = "" if alone else "decoder/"
    llm = hf_decoder.hf_config(parts["llm"]) | _length(source)
    table = hf_decoder.decoder_slots(parts["llm"], source.params.shapes, "llm/")
    before = len(target.items)
    made = outputs(table, source.params.shapes)
    _shards(target, folder / home, made, source.params, cast, shard_bytes, home)
    dtype = {"torch_dtype": _main_dtype(target.items[before:])}
    target.files[f"{home}config.json"] = _json(llm | _special_ids(source.generation) | dtype)
    generation = generation_json(source.generation)
    target.files[f"{home}generation_config.json"] = _json(generation)
    target.files |= {home + name: data for name, data in source.tokenizer_files.items()}
  tables: dict[tuple[str, str], list[Row]] = {}
  if "connector" in parts:
    tables["connector", "mm_projector"] = videorefer.connector_rows(parts["connector"].kind)
  if "region" in parts:
    tables["region", "region_encoder"] = videorefer.REGION
  for (part, stem), rows in tables.items():
    shapes = {k: v for k, v in source.params.shapes.items() if k.startswith(f"{part}/")}
    made = outputs(slots(shapes, rows, f"{part}/", f"model.{stem}."), shapes)
    _shards(target, folder, made, source.params, cast, 1 << 60, stem=stem)
  return target


def _to_paligemma(source: Source, folder: Path, cast: Cast, shard_bytes: int) -> Target:
  """One folder of transformers for the three parts of a PaliGemma."""
  target, parts = Target(), source.parts
  made = outputs(hf_paligemma.output_slots(parts, source.params.shapes), source.params.shapes)
  _shards(target, folder, made, source.params, cast, shard_bytes)
  fields = hf_paligemma.hf_config(parts["img"], parts["llm"])
  fields["text_config"] |= _length(source)
  target.files["config.json"] = _json(fields | {"torch_dtype": _main_dtype(target.items)})
  target.files["preprocessor_config.json"] = _json(hf_tower.preprocessor_config(parts["img"]))
  target.files |= source.tokenizer_files
  return target


def to_big_vision(source: Source, folder: Path, cast: Cast, shard_bytes: int) -> Target:
  """One npz, its layers scanned."""
  target = Target(weights="weights.npz", twice=True)
  params = source.params
  made = outputs(big_vision.output_slots(source.parts, params.shapes), params.shapes)
  config = np.frombuffer(json.dumps(source.model()).encode(), np.uint8)
  entries = {o.name: (o.shape, cast(o.dtype(params))) for o in made}
  writer = NpzWriter(folder / target.weights, {CONFIG: (config.shape, config.dtype), **entries})
  _items(target, made, params, entries, writer.write, "")
  target.closing += [lambda: writer.write(CONFIG, config), writer.finish]
  return target


def to_peft(source: Source, folder: Path, cast: Cast, shard_bytes: int) -> Target:
  """An adapter (of a source that is one alone), as the library peft writes it."""
  adapter, target = source.adapter, Target()
  assert adapter is not None
  shapes = source.params.shapes
  made = outputs(slots(shapes, peft.rows(source.parts["llm"])), shapes)
  _shards(target, folder, made, source.params, cast, 1 << 60, stem="adapter_model")
  fields = peft.config_json([output.name for output in made], adapter.rank, adapter.alpha)
  target.files["adapter_config.json"] = _json(fields)
  return target


FORMATS: Mapping[str, Callable[[Source, Path, Cast, int], Target]] = {
  "vr": to_vr,
  "videorefer": to_videorefer,
  "hf": to_hf,
  "torch": to_torch,
  "big_vision": to_big_vision,
  "peft": to_peft,
}


# --- Pieces of the above ----------------------------------------------------------------------


def _shards(
  target: Target,
  folder: Path,
  made: list[Output],
  params: Parameters,
  cast: Cast,
  shard_bytes: int,
  home: str = "",
  *,
  kept: Kept | None = None,
  stem: str = "model",
) -> None:
  """Adds a folder of safetensors shards to a target."""
  entries = {o.name: (o.shape, cast(o.dtype(params))) for o in made}
  others = {name: name for name in kept.names} if kept else {}
  entries |= _kept_entries(kept, others, cast)
  writer = ShardWriter(folder, dict(sorted(entries.items())), shard_bytes, stem)
  _items(target, made, params, entries, writer.write, home)
  _kept_items(target, kept, others, entries, writer.write, home)
  target.closing.append(writer.finish)


def _items(
  target: Target,
  made: list[Output],
  params: Parameters,
  entries: Mapping[str, tuple[tuple[int, ...], np.dtype]],
  write: Callable[[str, np.ndarray], None],
  home: str,
) -> None:
  for output in made:
    first = output.slots[0]
    target.items.append(
      Item(
        name=home + output.name,
        shape=output.shape,
        dtype=entries[output.name][1],
        make=functools.partial(output.make, params),
        write=functools.partial(write, output.name),
        sources=tuple(dict.fromkeys(slot.ours for slot in output.slots)),
        order=(first.ours, first.at),
      )
    )


def _kept_entries(
  kept: Kept | None, names: Mapping[str, str], cast: Cast
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
  """New name -> shape and dtype of tensors that were kept; `names`: old name -> new name."""
  if kept is None:
    return {}
  tensors = kept.tensors
  return {new: (tensors.shape(old), cast(tensors.dtype(old))) for old, new in names.items()}


def _kept_items(
  target: Target,
  kept: Kept | None,
  names: Mapping[str, str],
  entries: Mapping[str, tuple[tuple[int, ...], np.dtype]],
  write: Callable[[str, np.ndarray], None],
  home: str,
) -> None:
  """Adds tensors that were kept to a target."""
  if kept is None:
    return
  for old, new in names.items():
    target.items.append(
      Item(
        name=home + new,
        shape=entries[new][0],
        dtype=entries[new][1],
        make=functools.partial(kept.tensors.read, old),
        write=functools.partial(write, new),
        sources=(old,),
        order=("~", old),
      )
    )


def _published_kept(source: Source) -> Kept | None:
  """What the published folder that the weights come from held besides the model."""
  return source.kept if source.origin.get("format") == "videorefer" else None


def _as_held(cfg: SiglipConfig, kept: Kept | None, prefix: str) -> SiglipConfig:
  """The tower as a folder can hold it: with all its layers if the others were kept.

  Otherwise its depth is that of the layers that run, and the last one's output is taken.
  """
  if cfg.select_layer is None:
    return cfg
  start = f"{prefix}encoder.layers."
  names = kept.names if kept else ()
  held = {name[len(start) :].split(".")[0] for name in names if name.startswith(start)}
  if len(held) == cfg.depth - cfg.layers:
    return cfg
  return dataclasses.replace(cfg, depth=cfg.layers, select_layer=-1)


def _tower_folder(
  target: Target,
  folder: Path,
  source: Source,
  img: SiglipConfig,
  tower: Mapping[str, Any],
  kept: Kept | None,
  cast: Cast,
) -> None:
  """Adds a SiglipVisionModel folder: the tower's tensors, and those that were kept of it."""
  home = tower["folder"]
  shapes = {k: v for k, v in source.params.shapes.items() if k.startswith("img/")}
  made = outputs(slots(shapes, hf_tower.ROWS, "img/", "vision_model."), shapes)
  dtype = DTYPES.get(tower.get("dtype") or "")

  def cast_tower(old: np.dtype) -> np.dtype:
    return cast(old) if dtype is None else dtype  # the dtype that the folder had

  entries = {o.name: (o.shape, cast_tower(o.dtype(source.params))) for o in made}
  prefix = videorefer.SHARD_TOWER.removesuffix("vision_model.")
  kept_names = kept.names if kept else ()
  names = {name: name[len(prefix) :] for name in kept_names if name.startswith(prefix)}
  entries |= _kept_entries(kept, names, cast_tower)
  writer = ShardWriter(folder / home, dict(sorted(entries.items())), 1 << 60)
  label = f"{home}/" if home else ""
  _items(target, made, source.params, entries, writer.write, label)
  _kept_items(target, kept, names, entries, writer.write, label)
  depth = img.depth if names or img.select_layer is None else img.layers
  written = [item for item in target.items if item.name.startswith(f"{label}vision_model.")]
  config = hf_tower.hf_config(img, depth) | {"torch_dtype": _main_dtype(written)}
  config["vision_use_head"] = img.pool or any(".head." in name for name in names)
  if old := dict(tower.get("config.json") or {}):
    old.get("vision_config", old)["num_hidden_layers"] = depth
    config = old
  target.files[f"{label}config.json"] = _json(config)
  target.files[f"{label}preprocessor_config.json"] = _json(
    tower.get("preprocessor_config.json") or hf_tower.preprocessor_config(img)
  )


def _main_dtype(items: list[Item]) -> str:
  """The dtype that most of the bytes have, in PyTorch's words."""
  sizes: dict[str, int] = {}
  for item in items:
    sizes[dtype_name(item.dtype)] = sizes.get(dtype_name(item.dtype), 0) + item.bytes
  return TORCH_DTYPES.get(max(sizes, key=lambda name: sizes[name], default="F32"), "float32")


def _length(source: Source) -> dict[str, int]:
  """The number of positions that the folder of a decoder named, if it did."""
  fields = source.origin.get("config.json", {})
  length = {**fields, **(fields.get("text_config") or {})}.get("max_position_embeddings")
  return {"max_position_embeddings": length} if type(length) is int and length > 0 else {}


def _special_ids(generation: Mapping[str, Any]) -> dict[str, Any]:
  eos = list(generation.get("eos_ids") or ())
  ids = {"eos_token_id": eos[0] if len(eos) == 1 else eos or None}
  return ids | {"pad_token_id": generation.get("pad_id"), "bos_token_id": None}


def _json(fields: Mapping[str, Any]) -> bytes:
  return (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode()
