"""Weights by name: a path, a packaged model, or an address of the Hugging Face Hub."""

from pathlib import Path
from typing import NamedTuple

from data_pipes import hub
from vr_jax.assets import ASSETS, VR_MINI, packaged


class Weights(NamedTuple):
  """Where weights lie, and the name by which a result records them: a Hub's holds its commit."""

  path: Path
  name: str


def weights_path(name: str | Path | None) -> Path:
  """The path of weights by name; None is the packaged vr-mini.

  An existing path comes first, then a packaged model. The Hub is asked only where the name begins
  with `hf:`, so that a recipe can be looked at before its weights are there. A name that is none of
  them stays the path that it is; whoever opens it says so.

  Raises:
    InputError: an address whose folder cannot be had (`data_pipes.hub.fetch`).
  """
  name = VR_MINI.name if name is None else str(name)
  if name.startswith(hub.PREFIX):
    return hub.fetch(name).path
  path = Path(name).expanduser()
  return ASSETS / name if not path.exists() and name in packaged() else path


def locate(name: str | Path | None) -> Weights:
  """Finds weights that are opened: as `weights_path`, and OWNER/NAME[@REVISION] is an address.

  Raises:
    InputError: an address whose folder cannot be had (`data_pipes.hub.fetch`).
  """
  text = VR_MINI.name if name is None else str(name)
  if hub.parse_address(text) is None:
    return Weights(weights_path(text), text)
  return Weights(*hub.fetch(text))
