"""big_vision checkpoints (.npz), both ways, and the two functions by which it loads a model.

Names are ours already; only layers that are not scanned, the projector of PaliGemma (their
`img/head`, our `connector/readout/fc1`) and spare rows of the vocabulary need a rule.

Source: google-research/big_vision at 0127fb6, `models/vit.py`, `models/ppp/gemma.py`, `utils.py`.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np

from data_pipes.errors import InputError
from vr_jax.interop import hf_decoder, hf_tower
from vr_jax.interop.npz import Npz
from vr_jax.interop.parts import read_part
from vr_jax.interop.source import Source
from vr_jax.interop.table import (
  SAME,
  Mapped,
  Row,
  Shapes,
  Slot,
  Tensors,
  arrays,
  nested,
  shapes_of,
  slots,
)
from vr_jax.models.connector import ConnectorConfig
from vr_jax.models.decoder import DecoderConfig
from vr_jax.models.siglip import SiglipConfig, resample_posemb
from vr_jax.models.variants import DECODERS
from vr_jax.models.videorefer import PARTS, VideoRefer, VideoReferConfig, init_params

SPARE_ROWS = {256_128: 256_000}  # rows of Gemma's table in some files -> those of its vocabulary

SCANNED = [
  Row(r"connector/readout/fc1/(kernel|bias)", r"img/head/\1", SAME),
  Row(r"(.*)", r"\1", SAME),
]
UNSCANNED = [
  Row(r"img/Transformer/encoderblock/(.*)", r"img/Transformer/encoderblock_{l}/\1", SAME),
  Row(r"llm/layers/(.*)", r"llm/layers/{l}/\1", SAME),
  *SCANNED,
]


def rows(parts: Mapping[str, Any], *, scanned: bool = True) -> list[Row]:
  """The table for a model of these parts."""
  table = SCANNED if scanned else UNSCANNED
  return table if is_paligemma(parts) else [row for row in table if "head" not in row.theirs]


def is_paligemma(parts: Mapping[str, Any]) -> bool:
  """Whether the parts are a PaliGemma: a whole tower, one linear layer, a prefix-LM decoder."""
  connector, llm = parts.get("connector"), parts.get("llm")
  return bool(connector and llm and connector.kind == "linear" and llm.prefix_lm)


class _Under:
  """Tensors with a part's name put in front (`file.npz:img`); tables cut to their vocabulary."""

  def __init__(self, tensors: Tensors, prefix: str):
    self.path, self._tensors, self._prefix = tensors.path, tensors, prefix

  def __iter__(self) -> Iterator[str]:
    return (self._prefix + name for name in self._tensors)

  def __contains__(self, name: object) -> bool:
    text = str(name)
    return text.startswith(self._prefix) and text[len(self._prefix) :] in self._tensors

  def _bare(self, name: str) -> str:
    return name[len(self._prefix) :]

  def shape(self, name: str) -> tuple[int, ...]:
    shape = self._tensors.shape(self._bare(name))
    if name.endswith("embedder/input_embedding"):
      shape = (SPARE_ROWS.get(shape[0], shape[0]), *shape[1:])
    return shape

  def dtype(self, name: str) -> np.dtype:
    return self._tensors.dtype(self._bare(name))

  def read(self, name: str, index: tuple[int, ...] = ()) -> np.ndarray:
    array = self._tensors.read(self._bare(name), index)
    return array if index else array[: self.shape(name)[0]] if array.ndim else array


def open_npz(path: str | Path) -> Source:
  """Opens an npz of SigLIP, PaliGemma, a Gemma decoder, or one that `vr convert` wrote.

  Raises:
    InputError: no such file, or none of these; tensors that do not fit together.
  """
  file = Npz(path)
  tensors = _Under(file, _prefix(file))
  notes: list[str] = []
  if file.config is not None and not tensors._prefix:
    config = file.config
    parts = {part: read_part(part, config[part], path) for part in PARTS if part in config}
    settings = {k: v for k, v in config.items() if k not in PARTS}
  else:
    parts, settings = _guess(tensors, notes), {}
  if not parts:
    names = ", ".join(list(tensors)[:3])
    raise InputError(
      f"{path}: neither a SigLIP tower (embedding/kernel) nor a decoder "
      f"(embedder/input_embedding); it holds {names}, …"
    )
  shapes = part_shapes(parts)
  scanned = not any(re.search(r"encoderblock_0/|llm/layers/0/", name) for name in tensors)
  table = list(slots(shapes, rows(parts, scanned=scanned)))
  text = ("txt/", "t", "b")  # the text half of a whole SigLIP

  def unused(name: str) -> bool:
    return name.startswith(("txt/", "img/head/")) or name in text

  params = Mapped(tensors, table, shapes, unused=unused)
  return Source(
    kind="big_vision npz",
    path=file.path,
    parts=parts,
    params=params,
    settings=settings,
    notes=tuple(notes),
    skipped=params.skipped,
  )


def _prefix(file: Npz) -> str:
  """What must stand before the names to make them ours: "" for a whole model, else the part."""
  if any(name.startswith(("img/", "llm/")) for name in file):
    return ""
  return "llm/" if "embedder/input_embedding" in file else "img/"


def part_shapes(parts: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
  """Path -> shape of the parameters of the given parts."""
  shapes: dict[str, tuple[int, ...]] = {}
  if "img" in parts:
    shapes |= {f"img/{k}": v for k, v in hf_tower.tower_shapes(parts["img"]).items()}
  if "llm" in parts:
    shapes |= {f"llm/{k}": v for k, v in hf_decoder.decoder_shapes(parts["llm"]).items()}
  for name in ("connector", "region"):
    if name in parts:
      whole = _with_stand_ins(parts["img"], name, parts[name])
      made = shapes_of(functools.partial(init_params, whole), jax.random.key(0))
      shapes |= {k: v for k, v in made.items() if k.split("/")[0] == name}
  return shapes


def _with_stand_ins(img: Any, name: str, part: Any) -> VideoReferConfig:
  """A model with this part; its shapes depend on the tower's width and on its own alone."""
  E = part.width
  parts = {
    "connector": ConnectorConfig(width=E),
    "region": PARTS["region"](width=E),
    "llm": DecoderConfig(E, 1, 1, 1, 8, 8, 8),
  }
  return VideoReferConfig("", img, **{**parts, name: part})


def _guess(tensors: Tensors, notes: list[str]) -> dict[str, Any]:
  """The configs of the parts, from names and shapes; what those do not tell is noted."""
  parts: dict[str, Any] = {}
  block = "img/Transformer/encoderblock"
  if "img/embedding/kernel" in tensors:
    patch, _, _, width = tensors.shape("img/embedding/kernel")
    grid = round(tensors.shape("img/pos_embedding")[1] ** 0.5)
    depth, layer = _layers(tensors, block, f"{block}_", "LayerNorm_0/scale")
    query = tensors.shape(f"{layer}/MultiHeadDotProductAttention_0/query/kernel")
    size, reason = hf_tower.guess_image_size(grid, patch, "")
    notes.append(f"tower: image size {size} ({reason})")
    parts["img"] = SiglipConfig(
      image_size=size,
      patch_size=patch,
      width=width,
      depth=depth,
      heads=query[-2],
      mlp_dim=tensors.shape(f"{layer}/MlpBlock_0/Dense_0/kernel")[-1],
      select_layer=None if "img/Transformer/encoder_norm/scale" in tensors else -1,
      pool="img/MAPHead_0/probe" in tensors,
    )
  if "llm/embedder/input_embedding" in tensors:
    parts["llm"] = guess_decoder(tensors, notes)
    if "img/head/kernel" in tensors and "img" in parts:
      parts["connector"] = ConnectorConfig(kind="linear", width=parts["llm"].width)
      parts["llm"] = dataclasses.replace(parts["llm"], prefix_lm=True)
  return parts


def _layers(tensors: Tensors, stacked: str, single: str, probe: str) -> tuple[int, str]:
  """(number of layers, the path of one or of the stack)."""
  if f"{stacked}/{probe}" in tensors:
    return tensors.shape(f"{stacked}/{probe}")[0], stacked
  depth = 0
  while f"{single}{depth}/{probe}" in tensors:
    depth += 1
  if not depth:
    raise InputError(f"{tensors.path}: no layers ({stacked}/{probe} or {single}0/{probe})")
  return depth, f"{single}0"


def guess_decoder(tensors: Tensors, notes: list[str], ours: str = "llm/") -> DecoderConfig:
  """A Gemma by the shapes of its tensors; switches that they do not tell are its family's."""
  vocab, width = tensors.shape(f"{ours}embedder/input_embedding")
  stack = f"{ours}layers"
  depth, layer = _layers(tensors, stack, f"{stack}/", "pre_attention_norm/scale")
  if f"{layer}/attn/qkv_einsum/w" in tensors:
    *_, _, heads, _, head_dim = tensors.shape(f"{layer}/attn/qkv_einsum/w")
    kv_heads = heads
  else:
    *_, heads, _, head_dim = tensors.shape(f"{layer}/attn/q_einsum/w")
    kv_heads = tensors.shape(f"{layer}/attn/kv_einsum/w")[-3]
  sizes: dict[str, Any] = {
    "width": width,
    "depth": depth,
    "heads": heads,
    "kv_heads": kv_heads,
    "head_dim": head_dim,
    "mlp_dim": tensors.shape(f"{layer}/mlp/linear")[-2],
    "vocab_size": vocab,
  }
  post_norms = f"{layer}/post_attention_norm/scale" in tensors
  qk_norm = f"{layer}/attn/q_norm/scale" in tensors
  family = "gemma3" if qk_norm else "gemma2" if post_norms else "gemma"
  like = next(cfg for name, cfg in DECODERS.items() if name.startswith(f"{family}-"))
  more: dict[str, Any] = {}
  if family == "gemma2" and heads == 32:  # 27B scales by the width of a head of the stream
    more["query_scale"] = (width // heads) ** -0.5
  if family == "gemma3" and width < 2560:  # 270M and 1B: a smaller window, no scaled positions
    more |= {"window": 512, "rope_scale": 1.0}
  if family == "gemma3" and heads == 32:  # 27B
    more["query_scale"] = (width // heads) ** -0.5
  notes.append(f"decoder: the soft caps, windows and rotary bases of {family} (assumed)")
  return dataclasses.replace(like, **sizes, **more)


def output_slots(parts: Mapping[str, Any], shapes: Shapes) -> list[Slot]:
  """The slots of an npz that `vr convert` writes: scanned, under `params/`."""
  table = slots(shapes, rows(parts))
  return [slot._replace(theirs=f"params/{slot.theirs}") for slot in table]


# --- big_vision's own way of loading a model --------------------------------------------------


def Model(**cfg: Any) -> VideoRefer:
  """The model of a config as `VideoReferConfig.to_dict` writes it."""
  return VideoRefer(VideoReferConfig.from_dict(cfg))


def load(
  init_params: Mapping[str, Any] | None,
  init_file: str | Mapping[str, str],
  model_cfg: Any = None,
  dont_load: Iterable[str] = (),
) -> dict[str, Any]:
  """Parameters from a file (or one per part) merged into `init_params`, as big_vision's `load`.

  Position embeddings of another grid are resampled. `dont_load` are regexes of names that keep
  their initial value. With `init_params` None nothing is checked against.

  Raises:
    InputError: names or shapes that do not fit, all at once.
  """
  del model_cfg  # sizes are those of the file; big_vision passes it by position
  files = {"": init_file} if isinstance(init_file, str) else dict(init_file)
  loaded: dict[str, np.ndarray] = {}
  for part, file in files.items():
    source = open_npz(file)
    loaded |= {k: v for k, v in arrays(source.params).items() if k.startswith(part)}
  if init_params is None:
    return nested(loaded)
  target = flax.traverse_util.flatten_dict(dict(init_params), sep="/")
  fresh = {k for k in target if any(re.fullmatch(p, k) for p in dont_load)}
  fit_positions(loaded, target)
  problems = [f"{k} is missing" for k in target if k not in loaded and k not in fresh]
  problems += [f"{k} is not expected" for k in loaded if k not in target]
  problems += [
    f"{k} has shape {list(loaded[k].shape)} instead of {list(target[k].shape)}"
    for k in target
    if k in loaded and k not in fresh and loaded[k].shape != tuple(target[k].shape)
  ]
  if problems:
    raise InputError(f"{init_file}: {'; '.join(problems)}")
  return nested({k: target[k] if k in fresh else loaded[k] for k in target})


def fit_positions(loaded: dict[str, Any], target: Mapping[str, Any]) -> bool:
  """Resamples the tower's position embeddings to the model's grid, in place; whether it did."""
  name = "img/pos_embedding"
  if name not in loaded or name not in target or loaded[name].shape == tuple(target[name].shape):
    return False
  if loaded[name].shape[2] != target[name].shape[2]:
    return False
  grid = round(target[name].shape[1] ** 0.5)
  if grid * grid != target[name].shape[1]:
    return False
  loaded[name] = np.asarray(resample_posemb(loaded[name], grid))
  return True
