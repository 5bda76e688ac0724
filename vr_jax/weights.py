"""Weights by name: a path, a packaged model, an address of a bucket or of the Hugging Face Hub."""

from pathlib import Path
from typing import NamedTuple

from data_pipes import hub
from data_pipes.buckets import absolute, as_path, here, is_address, reached
from data_pipes.errors import InputError
from vr_jax.assets import ASSETS, VR_MINI, packaged


class Weights(NamedTuple):
  """Where weights lie, and the name by which a result records them: a Hub's holds its commit."""

  path: Path
  name: str


def weights_path(name: str | Path | None) -> Path:
  """The path of weights by name; None is the packaged vr-mini.

  An existing path comes first, then a packaged model. Of an address gs://BUCKET/… a checkpoint of
  ours stays where it is, and other weights are copied to the user's cache. The Hub is asked only
  where the name begins with `hf:`, so that a recipe can be looked at before its weights are there.
  A name that is none of them stays the path that it is; whoever opens it says so.

  Raises:
    InputError: an address whose folder cannot be had (`data_pipes.hub.fetch`, `buckets.here`).
  """
  name = VR_MINI.name if name is None else str(name)
  if is_address(name):
    with reached(name):
      return as_path(name) if is_checkpoint(name) else here(name)
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
  if is_address(text) or hub.parse_address(text) is None:
    return Weights(weights_path(text), text)
  return Weights(*hub.fetch(text))


def find_checkpoint(path: Path | str) -> Path:
  """The folder of one step for a path to it, to `checkpoints`, or to a work directory (newest).

  Raises:
    InputError: none there.
  """
  path = absolute(path)
  if (path / "params").is_dir() and (path / "meta").is_dir():
    return path
  for folder in (path / "checkpoints", path):
    if steps := complete_steps(folder):
      return max(steps, key=lambda child: int(child.name))
  raise InputError(
    f"{path}: no checkpoint here; expected a work directory of vr train, its checkpoints folder, "
    "or one step's folder with params/ and meta/"
  )


def complete_steps(checkpoints: Path) -> list[Path]:
  """The folders of steps in a folder of checkpoints.

  A bucket cannot give a folder its name when it is complete, so there a file says so.
  """
  steps = [child for child in checkpoints.glob("*") if child.name.isdigit()]
  if is_address(checkpoints):
    steps = [step for step in steps if (step / "commit_success.txt").exists()]
  return steps


def is_checkpoint(path: Path | str) -> bool:
  """Whether `find_checkpoint` finds one of ours."""
  try:
    return bool(find_checkpoint(path))
  except InputError:
    return False
