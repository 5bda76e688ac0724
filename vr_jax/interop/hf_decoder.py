"""Decoders of the Hugging Face Hub (Qwen2, Gemma, Gemma 2, Gemma 3): configuration and parameters.

Both ways. Source: `transformers` modules of model types qwen2, gemma, gemma2, gemma3_text;
config.json as they write it today (`rope_parameters`) and as released checkpoints hold it
(`rope_theta`, …).
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from data_pipes.errors import InputError
from vr_jax.checkpoint import find_tokenizer_files
from vr_jax.interop.fields import (
  DEPTH,
  IDS,
  field,
  optional,
  positive,
  read_config,
  require,
  section,
  shown,
  size,
)
from vr_jax.interop.generation import generation
from vr_jax.interop.parts import checked
from vr_jax.interop.source import Source
from vr_jax.interop.table import (
  DENSE,
  FLAT,
  HEADS_FIRST,
  HEADS_IN,
  SAME,
  Mapped,
  Part,
  Row,
  Safetensors,
  Shapes,
  Slot,
  Tensors,
  arrays,
  collect,
  nested,
  shapes_of,
  slots,
)
from vr_jax.models.decoder import Decoder, DecoderConfig

_LAYER = "model.layers.{l}."
_QKV = tuple(f"{_LAYER}self_attn.{x}_proj" for x in "qkv")


def _suffixed(names: tuple[str, ...], suffix: str) -> tuple[str, ...]:
  return tuple(f"{name}.{suffix}" for name in names)


ROWS = [
  Row("embedder/input_embedding", "model.embed_tokens.weight", SAME),
  Row("embedder/output_embedding", "lm_head.weight", SAME),
  Row("layers/attn/q_einsum/w", f"{_QKV[0]}.weight", HEADS_FIRST),
  Row("layers/attn/q_einsum/b", f"{_QKV[0]}.bias", FLAT),
  Row("layers/attn/kv_einsum/w", _suffixed(_QKV[1:], "weight"), HEADS_FIRST),
  Row("layers/attn/kv_einsum/b", _suffixed(_QKV[1:], "bias"), FLAT),
  Row("layers/attn/qkv_einsum/w", _suffixed(_QKV, "weight"), HEADS_FIRST),
  Row("layers/attn/qkv_einsum/b", _suffixed(_QKV, "bias"), FLAT),
  Row("layers/attn/attn_vec_einsum/w", f"{_LAYER}self_attn.o_proj.weight", HEADS_IN),
  Row(r"layers/attn/([qk]_norm)/scale", rf"{_LAYER}self_attn.\1.weight", SAME),
  Row(
    "layers/mlp/gating_einsum",
    (f"{_LAYER}mlp.gate_proj.weight", f"{_LAYER}mlp.up_proj.weight"),
    DENSE,
  ),
  Row("layers/mlp/linear", f"{_LAYER}mlp.down_proj.weight", DENSE),
  Row("layers/pre_attention_norm/scale", f"{_LAYER}input_layernorm.weight", SAME),
  Row("final_norm/scale", "model.norm.weight", SAME),
]
# Gemma 2 moved a name: with norms after the sub-layers it is the attention's own.
PRE_NORMS = [Row("layers/pre_ffw_norm/scale", f"{_LAYER}post_attention_layernorm.weight", SAME)]
POST_NORMS = [
  Row("layers/post_attention_norm/scale", f"{_LAYER}post_attention_layernorm.weight", SAME),
  Row("layers/pre_ffw_norm/scale", f"{_LAYER}pre_feedforward_layernorm.weight", SAME),
  Row("layers/post_ffw_norm/scale", f"{_LAYER}post_feedforward_layernorm.weight", SAME),
]

# What a family fixes, and the config.json fields that it may leave out.
_QWEN2 = {
  "activation": "silu",
  "norm_plus_one": False,
  "scale_embedding": False,
  "qkv_bias": True,
}
_NORMS = {"post_norms": True}
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
  "qwen2": (_QWEN2, {"tie_word_embeddings": False}),
  "gemma": ({}, {"head_dim": 256}),
  "gemma2": (
    _NORMS,
    {
      "head_dim": 256,
      "sliding_window": 4096,
      "sliding_window_pattern": 2,
      "query_pre_attn_scalar": 256,
      "attn_logit_softcapping": 50.0,
      "final_logit_softcapping": 30.0,
    },
  ),
  "gemma3_text": (
    _NORMS | {"qk_norm": True},
    {
      "vocab_size": 262_208,
      "num_attention_heads": 8,
      "num_key_value_heads": 4,
      "head_dim": 256,
      "sliding_window": 4096,
      "sliding_window_pattern": 6,
      "query_pre_attn_scalar": 256,
      "rope_theta": 1e6,
      "rope_local_base_freq": 1e4,
    },
  ),
}
MODEL_TYPES = (*FAMILIES, "gemma3")  # gemma3: a multimodal one, of which the decoder is taken


def rows(cfg: DecoderConfig) -> list[Row]:
  """The mapping table of a decoder."""
  return ROWS + (POST_NORMS if cfg.post_norms else PRE_NORMS)


def decoder_slots(
  cfg: DecoderConfig, shapes: Shapes, ours: str = "", body: str = "model.", head: str = ""
) -> list[Slot]:
  """The slots of a decoder; multimodal folders put `body` and `head` before its names."""
  return [
    slot._replace(
      theirs=body + slot.theirs.removeprefix("model.")
      if slot.theirs.startswith("model.")
      else head + slot.theirs
    )
    for slot in slots(shapes, rows(cfg), ours)
  ]


def decoder_config(fields: Mapping[str, Any], where: Path | str) -> DecoderConfig:
  """The decoder that the fields of a config.json describe.

  Three places say what a decoder is; the first that speaks of a thing decides it:

      FAMILIES, fixed      switches that no file states (activation, qkv_bias, post_norms, …)
      config.json          sizes, in the words of today or in those of released checkpoints
      FAMILIES, defaults   what a file may leave out because the family's class fills it in

  `where` is named in errors. Raises InputError on a family or a feature that we do not have.
  """
  fields = section(fields, where, "text_config") or fields  # the decoder of a multimodal model
  fixed, defaults = FAMILIES[_family(fields, where)]
  fields = defaults | {key: value for key, value in fields.items() if value is not None}
  _check_features(fields, where, silu=fixed.get("activation") == "silu")

  number = functools.partial(size, fields, where)
  maybe = functools.partial(optional, fields=fields, where=where)
  depth = number("num_hidden_layers", most=DEPTH)
  heads, width = number("num_attention_heads"), number("hidden_size")
  pattern = _pattern(fields, depth, where)
  local = "local" in pattern  # else a window is there and no layer uses it, as in Qwen2's files
  base, local_base, scale = _rotary(fields, where)
  scalar = maybe(positive, key="query_pre_attn_scalar")
  cfg = DecoderConfig(
    width=width,
    depth=depth,
    heads=heads,
    kv_heads=number("num_key_value_heads", heads),
    head_dim=number("head_dim", width // heads),
    mlp_dim=number("intermediate_size"),
    vocab_size=number("vocab_size", most=IDS),
    norm_eps=positive(fields, where, "rms_norm_eps", 1e-6),
    tied_head=field(fields, where, "tie_word_embeddings", bool, True),
    attn_soft_cap=maybe(positive, key="attn_logit_softcapping"),
    final_soft_cap=maybe(positive, key="final_logit_softcapping"),
    query_scale=None if scalar is None else scalar**-0.5,
    pattern=pattern,
    window=maybe(size, key="sliding_window", most=IDS) if local else None,
    rope_base=base,
    local_rope_base=local_base if local else None,
    rope_scale=scale,
    **fixed,
  )
  return checked(cfg, where)


def _family(fields: Mapping[str, Any], where: Path | str) -> str:
  """The key of FAMILIES; the published VideoRefer is a Qwen2 under two names of its own."""
  family = str(fields.get("model_type")).removeprefix("videorefer_")
  family = "qwen2" if family == "videorefer" else family
  if family not in FAMILIES:
    known = ", ".join(FAMILIES)
    raise InputError(f"{where}: model_type={shown(fields.get('model_type'))} is not one of {known}")
  return family


def _check_features(fields: Mapping[str, Any], where: Path | str, *, silu: bool) -> None:
  """Refuses what our decoder does not compute; a field that is not there is at its first value."""
  # Gemma's first release said "gelu" where it meant the tanh form.
  activations = ("silu",) if silu else ("gelu_pytorch_tanh", "gelu")
  for key in ("hidden_act", "hidden_activation"):
    require(fields, where, key, activations, activations[0])
  for key in ("attention_bias", "use_sliding_window", "use_bidirectional_attention"):
    require(fields, where, key, (False,), False)
  require(fields, where, "partial_rotary_factor", (1, 1.0), 1)


def _pattern(fields: Mapping[str, Any], depth: int, where: Path | str) -> tuple[str, ...]:
  """Which layers are local: as the list of today says, else by the period of released files."""
  if "layer_types" in fields:
    types = field(fields, where, "layer_types", list)
    if any(word not in _LAYER_TYPES.values() for word in types) or len(types) != depth:
      words = " or ".join(_LAYER_TYPES.values())
      raise InputError(
        f"{where}: layer_types must name {depth} layers, each {words}; found {shown(types)}"
      )
    kinds = {word: kind for kind, word in _LAYER_TYPES.items()}
    return tuple(kinds[word] for word in types)
  period = size(fields, where, "sliding_window_pattern", 1, most=DEPTH)
  return ("local",) * (period - 1) + ("global",)


def _rotary(fields: Mapping[str, Any], where: Path | str) -> tuple[float, float | None, float]:
  """(base, base of local layers, factor by which positions are divided).

  Today one `rope_parameters`, or one for each kind of layer, holds base and scaling; released files
  have `rope_theta`, `rope_local_base_freq` and `rope_scaling` side by side. Where a file has both,
  transformers lets `rope_scaling` count, with the `rope_theta` beside it; a file whose bases then
  differ is refused, since nobody meant that.
  """
  parameters = section(fields, where, "rope_parameters")
  scaling = section(fields, where, "rope_scaling")
  by_kind = set(parameters) & set(_LAYER_TYPES.values())
  full = section(parameters, where, "full_attention") if by_kind else parameters
  local = section(parameters, where, "sliding_attention")
  named = ("rope_scaling", scaling) if scaling else ("rope_parameters", full)
  factor = _factor(named[1], where, named[0])
  if _factor(local, where, "rope_parameters of sliding_attention") != 1:
    raise InputError(f"{where}: rope_parameters of sliding_attention are scaled; accepted: default")
  base = positive({**fields, **(scaling or full)}, where, "rope_theta", 10_000.0)
  if scaling and positive(full, where, "rope_theta", base) != base:
    raise InputError(
      f"{where}: rope_scaling beside rope_parameters, which have another rope_theta "
      f"({full['rope_theta']}, not {base}); accepted: one of the two"
    )
  if scaling and _factor(full, where, "rope_parameters") not in (1, factor):
    raise InputError(
      f"{where}: rope_scaling beside rope_parameters of another factor; accepted: one of the two"
    )
  local_fields = {"rope_theta": fields.get("rope_local_base_freq")} | local
  return base, optional(positive, local_fields, where, "rope_theta"), factor


def _factor(rope: Mapping[str, Any], where: Path | str, key: str) -> float:
  """By what a scaling divides positions; refuses the kinds that do something else."""
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind not in ("default", "linear"):
    raise InputError(
      f"{where}: {key} of type {shown(kind)} is not supported; accepted: default, linear"
    )
  require(rope, where, "partial_rotary_factor", (None, 1, 1.0), None)
  return positive(rope, where, "factor") if kind == "linear" else 1.0


def hf_config(cfg: DecoderConfig, where: str = "decoder") -> dict[str, Any]:
  """The fields of config.json that describe a decoder; `decoder_config` reads them back.

  Raises:
    InputError: its switches are those of no family of `transformers`.
  """
  family = _family_of_switches(cfg, where)
  fields: dict[str, Any] = {
    "model_type": family,
    "architectures": [_ARCHITECTURES[family]],
    "hidden_size": cfg.width,
    "num_hidden_layers": cfg.depth,
    "num_attention_heads": cfg.heads,
    "num_key_value_heads": cfg.kv_heads,
    "head_dim": cfg.head_dim,
    "intermediate_size": cfg.mlp_dim,
    "vocab_size": cfg.vocab_size,
    "rms_norm_eps": cfg.norm_eps,
    "tie_word_embeddings": cfg.tied_head,
    "rope_theta": cfg.rope_base,
  }
  if cfg.rope_scale != 1:
    fields["rope_scaling"] = {"rope_type": "linear", "factor": cfg.rope_scale}
  if family == "qwen2":
    return fields | {"hidden_act": "silu", "use_sliding_window": False}
  fields["hidden_activation"] = fields["hidden_act"] = "gelu_pytorch_tanh"
  if family == "gemma":
    return fields
  scalar = (cfg.head_dim**-0.5 if cfg.query_scale is None else cfg.query_scale) ** -2
  if abs(scalar - round(scalar)) > 1e-6 * scalar:
    raise InputError(
      f"{where}: query_scale={cfg.query_scale}: transformers needs 1/sqrt of a whole"
    )
  fields |= {
    "query_pre_attn_scalar": round(scalar),
    "attn_logit_softcapping": cfg.attn_soft_cap,
    "final_logit_softcapping": cfg.final_soft_cap,
    "sliding_window": cfg.window,
    "layer_types": [_LAYER_TYPES[kind] for kind in cfg.layer_kinds()],
  }
  if family == "gemma3_text":
    fields["rope_local_base_freq"] = cfg.local_rope_base or cfg.rope_base
  return fields


def _family_of_switches(cfg: DecoderConfig, where: str) -> str:
  """The family whose switches a decoder has; InputError where one switch is another family's."""
  family = "gemma" if cfg.activation == "gelu_tanh" else "qwen2"
  if cfg.post_norms:
    family = "gemma3_text" if cfg.qk_norm else "gemma2"
  switches = {
    "activation": "gelu_tanh",
    "norm_plus_one": True,
    "scale_embedding": True,
    "qkv_bias": False,
    "post_norms": False,
    "qk_norm": False,
  } | FAMILIES[family][0]
  odd = [name for name, value in switches.items() if getattr(cfg, name) != value]
  if family in ("gemma", "qwen2"):
    names = ("attn_soft_cap", "final_soft_cap", "query_scale", "window")
    odd += [name for name in names if getattr(cfg, name) is not None]
  if odd:
    named = ", ".join(f"{name}={getattr(cfg, name)!r}" for name in odd)
    raise InputError(f"{where}: no model of transformers has {named} in a decoder like {family}")
  return family


_LAYER_TYPES = {"global": "full_attention", "local": "sliding_attention"}
_ARCHITECTURES = {
  "qwen2": "Qwen2ForCausalLM",
  "gemma": "GemmaForCausalLM",
  "gemma2": "Gemma2ForCausalLM",
  "gemma3_text": "Gemma3ForCausalLM",
}


_TABLE, _HEAD = "embed_tokens.weight", "lm_head.weight"


def _before(tensors: Tensors, end: str, default: str) -> str:
  """What stands before a name that ends so; the first of several."""
  return min((name[: -len(end)] for name in tensors if name.endswith(end)), default=default)


def with_head(cfg: DecoderConfig, tensors: Tensors) -> tuple[DecoderConfig, tuple[str, ...]]:
  """The config with the head apart where the file holds one that differs, and a note that says so.

  A flag that says "tied" is then wrong: transformers keeps such a head apart too.
  """
  table = _before(tensors, _TABLE, "model.") + _TABLE
  head = _before(tensors, _HEAD, "") + _HEAD
  if not cfg.tied_head or table not in tensors or head not in tensors:
    return cfg, ()
  alike = tensors.shape(table) == tensors.shape(head)
  if alike and np.array_equal(tensors.read(table), tensors.read(head), equal_nan=True):
    return cfg, ()
  note = f"{head} differs from {table}, although tie_word_embeddings is true: it is kept apart"
  return dataclasses.replace(cfg, tied_head=False), (note,)


def open_decoder(tensors: Tensors, cfg: DecoderConfig, *, alone: bool = True) -> Mapped:
  """The decoder's parameters in the tensors of a folder.

  Multimodal folders hold other parts beside it, under other names.
  """
  body = _before(tensors, _TABLE, "model.")
  head = _before(tensors, _HEAD, "")

  def unused(name: str) -> bool:
    tied_copy = name == f"{head}lm_head.weight" and cfg.tied_head
    others = body not in ("", "model.") or not alone
    return (others and not name.startswith(body)) or tied_copy or name.endswith("inv_freq")

  shapes = decoder_shapes(cfg)
  table = decoder_slots(cfg, shapes, body=body, head=head)
  return Mapped(tensors, table, shapes, unused=unused)


def open_folder(folder: Path) -> Source:
  """Opens a decoder folder: config.json, safetensors, and whatever tokenizer lies there.

  Raises:
    InputError: a config or tensors that do not fit.
  """
  where = folder / "config.json"
  fields = read_config(where)
  tensors = Safetensors(folder)
  cfg, notes = with_head(decoder_config(fields, where), tensors)
  params = open_decoder(tensors, cfg)
  return Source(
    kind="decoder folder",
    path=folder,
    parts={"llm": cfg},
    params=Part(params, "", "llm/"),
    tokenizer_files=find_tokenizer_files(folder),
    generation=vars(generation(folder)),
    notes=notes,
    skipped=params.skipped,
    origin={"format": "decoder", "config.json": fields},
  )


def load(folder: Path | str, *, dtype: str = "float32") -> tuple[DecoderConfig, dict[str, Any]]:
  """Reads a decoder folder (config.json and safetensors): (config, parameters).

  Of a multimodal Gemma 3 folder it takes the language model.
  """
  folder = Path(folder)
  cfg = decoder_config(read_config(folder / "config.json"), folder / "config.json")
  tensors = Safetensors(folder)
  cfg, _ = with_head(cfg, tensors)
  return cfg, nested(arrays(open_decoder(tensors, cfg), dtype))


def to_hf(cfg: DecoderConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Parameters under the names of `transformers`; contiguous, dtype unchanged."""
  flat = flax.traverse_util.flatten_dict(params, sep="/")
  return collect(params, slots({path: w.shape for path, w in flat.items()}, rows(cfg)))


@functools.cache
def decoder_shapes(cfg: DecoderConfig) -> dict[str, tuple[int, ...]]:
  """Path -> shape of a decoder's parameters."""

  def init(key):
    tokens = jnp.zeros((1, 1), jnp.int32)
    return Decoder(cfg).init(key, tokens, method=lambda m, t: m(m.embed(t), t))["params"]

  return shapes_of(init, jax.random.key(0))
