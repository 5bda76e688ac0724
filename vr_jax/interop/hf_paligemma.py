"""PaliGemma and PaliGemma 2 folders of the Hugging Face Hub, both ways.

A PaliGemma is three of our parts: a whole tower, the `linear` connector and a prefix-LM decoder.

Source: `transformers` module paligemma (PaliGemmaForConditionalGeneration).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipes.errors import InputError
from vr_jax.checkpoint import find_tokenizer_files
from vr_jax.interop import hf_decoder, hf_tower
from vr_jax.interop.fields import read_config, section
from vr_jax.interop.source import Source
from vr_jax.interop.table import (
  Joined,
  Mapped,
  Part,
  Safetensors,
  Shapes,
  Slot,
  slots,
)
from vr_jax.models.connector import ConnectorConfig
from vr_jax.models.decoder import DecoderConfig
from vr_jax.models.siglip import SiglipConfig

MODEL_TYPE = "paligemma"
PROJECTOR = hf_tower.dense("connector/readout/fc1", "multi_modal_projector.linear.")


def open_paligemma(folder: Path) -> Source:
  """Opens a PaliGemma folder.

  Raises:
    InputError: a config or tensors that do not fit.
  """
  where = folder / "config.json"
  fields = read_config(where)
  vision = {"model_type": "siglip_vision_model"} | section(fields, where, "vision_config")
  img = hf_tower.tower_config(vision, where, None)
  text = section(fields, where, "text_config")
  text.setdefault("vocab_size", fields.get("vocab_size"))
  text["tie_word_embeddings"] = True  # whatever the file says: a head apart shows in the tensors
  text.pop("use_bidirectional_attention", None)  # of the prefix alone, which prefix_lm is
  llm = hf_decoder.decoder_config(text, where)
  llm = DecoderConfig(**{**vars(llm), "prefix_lm": True})
  tensors = Safetensors(folder)
  llm, notes = hf_decoder.with_head(llm, tensors)
  connector = ConnectorConfig(kind="linear", width=llm.width)
  end = "multi_modal_projector.linear.weight"
  before = min((n[: -len(end)] for n in tensors if n.endswith(end)), default=None)
  if before is None:
    raise InputError(f"{folder}: no {end}")
  shapes = {
    "connector/readout/fc1/kernel": (img.width, llm.width),
    "connector/readout/fc1/bias": (llm.width,),
  }
  tower = hf_tower.open_tower(tensors, img, alone=False)
  decoder = hf_decoder.open_decoder(tensors, llm, alone=False)
  projector = Mapped(
    tensors, list(slots(shapes, PROJECTOR, theirs=before)), shapes, unused=lambda name: True
  )
  used = {
    name
    for part in (tower, decoder, projector)
    for path in part.shapes
    for name in part.sources(path)
  }
  left = tuple(name for name in tensors if name not in used)
  strange = [name for name in left if not name.endswith(("lm_head.weight", "position_ids"))]
  if strange:
    raise InputError(
      f"{folder}: tensors do not fit the config: {len(strange)} unexpected ({', '.join(strange)})"
    )
  return Source(
    kind="PaliGemma folder",
    path=folder,
    parts={"img": img, "connector": connector, "llm": llm},
    params=Joined(Part(tower, "", "img/"), projector, Part(decoder, "", "llm/")),
    tokenizer_files=find_tokenizer_files(folder),
    notes=notes,
    skipped=left,
    origin={"format": "paligemma", "config.json": fields},
  )


def hf_config(img: SiglipConfig, llm: DecoderConfig) -> dict[str, Any]:
  """The fields of config.json; those that are not about sizes are the released ones."""
  text = hf_decoder.hf_config(llm)
  vision = hf_tower.hf_config(img)
  for fields in (text, vision):
    fields.pop("architectures")
  return {
    "model_type": MODEL_TYPE,
    "architectures": ["PaliGemmaForConditionalGeneration"],
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "hidden_size": llm.width,
    "projection_dim": llm.width,
    "image_token_index": min(257152, llm.vocab_size) - 1 if llm.vocab_size < 257152 else 257152,
    "text_config": text | {"num_image_tokens": img.grid**2},
    "vision_config": vision | {"projection_dim": llm.width, "num_image_tokens": img.grid**2},
  }


def output_slots(parts: Mapping[str, Any], shapes: Shapes) -> list[Slot]:
  """The slots of a folder, under the names of the released ones."""
  return [
    *slots(shapes, hf_tower.ROWS, "img/", "vision_tower.vision_model."),
    *slots({k: v for k, v in shapes.items() if k.startswith("connector/")}, PROJECTOR),
    *hf_decoder.decoder_slots(
      parts["llm"], shapes, "llm/", body="language_model.model.", head="language_model."
    ),
  ]
