"""Weights by name: a path, a packaged model, or an address of the Hugging Face Hub."""

from pathlib import Path
from typing import NamedTuple

from data_pipes import hub
from vr_jax.assets import ASSETS, VR_MINI, packaged


class Weights(NamedTuple):
  """Where weights lie, and the name by which a result records them: a Hub's holds its commit."""

  path: Path
  name: str


def locate(name: str | Path | None) -> Weights:
  """Finds weights by name, wherever weights are named; None is the packaged vr-mini.

  An existing path comes first, then a packaged model, then OWNER/NAME[@REVISION] of the Hub, which
  is fetched. A name that is none of them stays the path that it is; whoever opens it says so.

  Raises:
    InputError: an address whose folder cannot be had (`data_pipes.hub.fetch`).
  """
  name = VR_MINI.name if name is None else str(name)
  path = Path(name).expanduser()
  if not path.exists() and name in packaged():
    return Weights(ASSETS / name, name)
  if hub.parse_address(name) is not None:
    return Weights(*hub.fetch(name))
  return Weights(path, name)
