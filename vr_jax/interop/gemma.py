"""Gemma checkpoints in their own Flax layout, as Orbax folders: into our decoder.

Layers stand apart (`layer_0`, …), keys are nested or flat (`transformer/layer_0/attn/…`), the MLP's
tensors lie in a `w` of their own, and some releases transpose the gating matrices.

Source: google-deepmind/gemma, `gm/ckpts/_checkpoint.py`, `gm/nn/_modules.py`.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from einops import rearrange

from data_pipes.errors import InputError
from vr_jax.checkpoint import StoredParams
from vr_jax.interop import hf_decoder
from vr_jax.interop.big_vision import SPARE_ROWS, guess_decoder
from vr_jax.interop.source import Source
from vr_jax.interop.table import SAME, Mapped, Part, Row, slots

ROWS = [
  Row(r"layers/(.*)", r"layers/{l}/\1", SAME),
  Row(r"(.*)", r"\1", SAME),
]


class _Renamed:
  """The tensors of a Gemma folder under the names of big_vision's unscanned layout."""

  def __init__(self, path: Path):
    self.path = path
    self._params = StoredParams(path, "")
    self._theirs: dict[str, str] = {}
    self.others: list[str] = []  # the vision half of a multimodal Gemma 3
    for name in self._params.shapes:
      renamed = name
      for root in ("params/", "transformer/"):
        renamed = renamed.removeprefix(root)
      if renamed.startswith("layer_"):
        renamed = renamed.replace("layer_", "layers/", 1)
      for theirs, ours in (
        ("/_query_norm/", "/q_norm/"),
        ("/_key_norm/", "/k_norm/"),
        ("/gating_einsum/w", "/gating_einsum"),
        ("/mlp/linear/w", "/mlp/linear"),
      ):
        renamed = renamed.replace(theirs, ours)
      if renamed.startswith(("layers/", "embedder/input_embedding", "final_norm/")):
        self._theirs[renamed] = name
      else:
        self.others.append(name)

  def __iter__(self) -> Iterator[str]:
    return iter(sorted(self._theirs))

  def __contains__(self, name: object) -> bool:
    return name in self._theirs

  def _transposed(self, name: str) -> bool:
    # The MLP is wider than the stream in every Gemma.
    shape = self._params.shapes[self._theirs[name]]
    return name.endswith("gating_einsum") and shape[-2] > shape[-1]

  def shape(self, name: str) -> tuple[int, ...]:
    shape = self._params.shapes[self._theirs[name]]
    if self._transposed(name):
      return (*shape[:-2], shape[-1], shape[-2])
    if name == "embedder/input_embedding":
      return (SPARE_ROWS.get(shape[0], shape[0]), *shape[1:])
    return shape

  def dtype(self, name: str) -> np.dtype:
    return self._params.dtype(self._theirs[name])

  def read(self, name: str, index: tuple[int, ...] = ()) -> np.ndarray:
    array = self._params.read(self._theirs[name])
    if self._transposed(name):
      array = rearrange(array, "... o i -> ... i o")
    return array[: self.shape(name)[0]][index]


def open_gemma(path: str | Path) -> Source:
  """Opens a Gemma folder in Orbax/Flax layout; its config follows from the tensors' shapes.

  Raises:
    InputError: an Orbax folder that holds no Gemma.
  """
  tensors = _Renamed(Path(path))
  if "embedder/input_embedding" not in tensors:
    names = ", ".join(list(StoredParams(Path(path), "").shapes)[:3])
    raise InputError(
      f"{path}: an Orbax folder of neither vr_jax nor Gemma: no embedder/input_embedding; it holds "
      f"{names}, …"
    )
  notes: list[str] = []
  cfg = guess_decoder(tensors, notes, "")
  shapes = hf_decoder.decoder_shapes(cfg)
  mapped = Mapped(tensors, list(slots(shapes, ROWS)), shapes)
  return Source(
    kind="Gemma folder in Orbax layout",
    path=Path(path),
    parts={"llm": cfg},
    params=Part(mapped, "", "llm/"),
    notes=tuple(notes),
    skipped=tuple(tensors.others),
  )
