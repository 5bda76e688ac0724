"""What weights of any format are, once opened: parts with their configs, parameters, files."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from data_pipes.errors import InputError
from data_pipes.tokenizer import Tokenizer
from vr_jax.checkpoint import make_tokenizer
from vr_jax.interop.adapter import Adapter, Merged
from vr_jax.interop.table import Joined, Parameters, Part, Tensors
from vr_jax.models.videorefer import PARTS, VideoReferConfig


class Kept:
  """Tensors that our model does not use but that belong to the folder: carried for the way back."""

  def __init__(self, tensors: Tensors, names: Iterable[str]):
    self.tensors, self.names = tensors, tuple(names)

  def __bool__(self) -> bool:
    return bool(self.names)


@dataclasses.dataclass(frozen=True)
class Source:
  """Weights that were opened, and all that came with them; no tensor is read yet.

  Attributes:
    kind: what it is, for messages.
    parts: config of each part it holds (img, connector, region, llm).
    params: the parameters, by paths that begin with the part.
    settings: name, num_frames, image_aspect_ratio, max_text_ids, as far as they are known.
    tokenizer_files: name -> content. generation: eos_ids, pad_id, repetition_penalty.
    config: the resolved training config, where it was trained here.
    notes: what was assumed, what agrees with what.
    skipped: tensors that no part of this model uses.
    kept: those of them that belong to a published folder.
    origin: JSON of the foreign folder that the way back needs (its config files).
    adapter: what is merged into the decoder, if anything is (`params` are then `adapter.Merged`).
    adapter_note: the one of the notes that says so.
  """

  kind: str
  path: Path
  parts: Mapping[str, Any]
  params: Parameters
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  tokenizer_files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
  generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  notes: tuple[str, ...] = ()
  skipped: tuple[str, ...] = ()
  kept: Kept | None = None
  origin: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  adapter: Adapter | None = None
  adapter_note: str = ""

  @property
  def whole(self) -> bool:
    """Whether it is a whole VideoRefer."""
    return set(self.parts) == set(PARTS)

  def with_adapter(self, adapter: Adapter, where: str | Path) -> "Source":
    """The same with an adapter, which is from `where`, merged into the decoder."""
    note = f"adapter: {where}, rank {adapter.rank}, merged"
    return dataclasses.replace(
      self,
      params=Merged(self.params, adapter),
      adapter=adapter,
      adapter_note=note,
      notes=(*self.notes, note),
    )

  def unmerged(self) -> "Source":
    """The same with its adapter's factors beside the matrices, not added to them."""
    if self.adapter is None or not isinstance(self.params, Merged):
      return self
    factors = Part(self.adapter.params, "", "llm/")
    return dataclasses.replace(
      self,
      params=Joined(self.params.base, factors),
      adapter_note="",
      notes=tuple(note for note in self.notes if note != self.adapter_note),
    )

  def tokenizer(self) -> Tokenizer:
    """The tokenizer of a source with a decoder.

    Raises:
      InputError: its files are not complete, or an id of it or of the generation settings is beyond
        the decoder's table (which a gather on the device would take for the last row).
    """
    tokenizer = make_tokenizer(self.tokenizer_files)
    rows = self.parts["llm"].vocab_size
    ids = {"tokenizer": tokenizer.last_id, "pad_token_id": self.generation.get("pad_id") or 0}
    ids["eos_token_id"] = max(self.generation.get("eos_ids") or (), default=0)
    for name, number in ids.items():
      if number >= rows:
        raise InputError(
          f"{self.path}: {name} has the id {number}, and the table of embeddings {rows} rows; "
          f"accepted: ids below {rows}"
        )
    return tokenizer

  def model(self) -> dict[str, Any]:
    """The `model` of a checkpoint's meta: settings and the configs of the parts, as JSON."""
    configs = {part: dataclasses.asdict(cfg) for part, cfg in self.parts.items()}
    return {"name": self.path.resolve().name, **self.settings, **configs}

  def model_config(self) -> VideoReferConfig:
    """The config of the whole model.

    Raises:
      InputError: a part is missing.
    """
    if not self.whole:
      missing = ", ".join(part for part in PARTS if part not in self.parts)
      raise InputError(
        f"{self.path}: holds {', '.join(self.parts)} and no {missing}: not a whole model; "
        "config.model_init puts one together from parts"
      )
    return VideoReferConfig(
      **{"name": self.path.resolve().name, **self.settings}, **dict(self.parts)
    )
