"""Parts that the published trainer saves alone: `mm_projector.bin`, `region_encoder.bin`.

They are PyTorch pickles (extra [torch]); the same tensors as safetensors are read as well.
"""

from pathlib import Path
from typing import Any

from data_pipes.errors import InputError
from vr_jax.interop import peft, videorefer
from vr_jax.interop.fields import read_json
from vr_jax.interop.npz import is_npz
from vr_jax.interop.source import Source
from vr_jax.interop.table import (
  Joined,
  Mapped,
  Parameters,
  Part,
  Tensors,
  slots,
)
from vr_jax.interop.torch_file import open_tensors
from vr_jax.models.region import RegionConfig

FILES = ("mm_projector.bin", "region_encoder.bin", "mm_projector.safetensors",
         "region_encoder.safetensors")  # fmt: skip


def is_partial(path: Path) -> bool:
  """Whether it is a file (but no npz), or a folder of parts without config.json or adapter."""
  if path.is_file():
    return not is_npz(path)
  configured = (path / "config.json").is_file() or peft.is_adapter(path)
  return not configured and _holds_parts(path)


def open_stage(folder: Path) -> Source:
  """Opens the folder of a published stage: the whole model, or else the parts that it trained."""
  weights = any(folder.glob("*.safetensors")) or any(folder.glob("*.safetensors.index.json"))
  parts = not weights and _holds_parts(folder)
  return open_partial(folder) if parts else videorefer.open_published(folder)


def _holds_parts(folder: Path) -> bool:
  return any((folder / name).is_file() for name in FILES)


def open_partial(path: Path) -> Source:
  """Opens one such file, or the folder of a published stage that holds them.

  The kind of a connector is what the config.json beside it says, else what its tensors show.

  Raises:
    InputError: neither a connector nor a region encoder in it.
  """
  files = [path] if path.is_file() else [f for n in FILES if (f := path / n).is_file()]
  home = path.parent if path.is_file() else path
  parts: dict[str, Any] = {}
  params: list[Parameters] = []
  notes: list[str] = []
  for file in files:
    tensors = open_tensors(file)
    if (prefix := _prefix(tensors, "mm_projector.", ("readout.", "s1.", "0."))) is not None:
      kind = _kind(tensors, prefix, home, notes)
      parts["connector"], mapped = videorefer.open_connector(tensors, kind, prefix)
      params.append(Part(mapped, "", "connector/"))
    if (prefix := _prefix(tensors, "region_encoder.", ("feat_linear.",))) is not None:
      parts["region"], mapped = open_region(tensors, prefix)
      params.append(Part(mapped, "", "region/"))
  if not parts:
    held = ", ".join(list(tensors)[:3]) if files else "no such file"
    raise InputError(
      f"{path}: neither a connector (mm_projector.*) nor a region encoder (region_encoder.*); "
      f"it holds {held}"
    )
  return Source(
    kind="parts of a published stage", path=path, parts=parts, params=Joined(*params),
    notes=tuple(notes),
  )  # fmt: skip


def open_region(tensors: Tensors, prefix: str) -> tuple[RegionConfig, Mapped]:
  """The region encoder among tensors whose names begin with `prefix`."""
  first = f"{prefix}feat_linear.0.weight"
  if first not in tensors:
    raise InputError(f"{tensors.path}: a region encoder needs the tensor {first}")
  width, tower = tensors.shape(first)
  shapes = {
    "fc1/kernel": (tower, width),
    "fc1/bias": (width,),
    "fc2/kernel": (width, width),
    "fc2/bias": (width,),
  }
  table = list(slots(shapes, videorefer.REGION, theirs=prefix))
  mapped = Mapped(tensors, table, shapes, unused=lambda name: not name.startswith(prefix))
  return RegionConfig(width=width), mapped


def _prefix(tensors: Tensors, word: str, starts: tuple[str, ...]) -> str | None:
  """What stands before a part's names: up to `word`, or nothing in a file of that part alone."""
  for name in tensors:
    before, match, _ = name.partition(word)
    if match:
      return before + match
  if any(name.startswith(starts) for name in tensors):
    return ""
  return None


def _kind(tensors: Tensors, prefix: str, home: Path, notes: list[str]) -> str:
  config = home / "config.json"
  if config.is_file() and (kind := read_json(config).get("mm_projector_type")):
    return str(kind)
  if f"{prefix}weight" in tensors:
    return "linear"
  if f"{prefix}0.weight" in tensors:
    return "mlp2x_gelu"
  staged = f"{prefix}s1.b1.conv1.conv.weight" in tensors
  sampled = f"{prefix}sampler.0.weight" in tensors
  if staged:
    kind = "stc_connector_v35" if sampled else "stp_connector"
  else:
    kind = "spatial_conv" if sampled else "spatial_pool"
  if kind == "stc_connector_v35":
    notes.append("connector: stc_connector_v35 (assumed: stc_connector has the same tensors)")
  return kind
