"""What folders, and the Hub's pages, say of the licence of a model or of source data."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

UNKNOWN = "unknown"
# Options of a role that name a model: its folder or its name on the Hub.
MODEL_OPTIONS = ("detector", "tracker", "model", "checkpoint")


def of_folder(folder: Path) -> str:
  """The licence that a folder's README or licence file names; UNKNOWN if none does."""
  card = folder / "README.md"
  for line in card.read_text("utf-8", "replace").splitlines() if card.is_file() else ():
    if line.startswith("license:"):
      return line.partition(":")[2].strip() or UNKNOWN
  texts = sorted(p for p in folder.iterdir() if p.name.upper().startswith(("LICENSE", "LICENCE")))
  return f"see {texts[0]}" if texts else UNKNOWN


def of_run(config: Mapping[str, Any]) -> dict[str, str]:
  """The licences of a run's sources and models by their names; nothing is asked over a network."""
  given = config.get("input", {})
  sources = [given.get("videos"), *given.get("files", ())]
  models = [
    options[key]
    for options in config.get("roles", {}).values()
    for key in MODEL_OPTIONS
    if isinstance(options.get(key), str)
  ]
  licences = {}
  for name in dict.fromkeys(str(name) for name in (*sources, *models) if name):
    path = Path(name)
    folder = path if path.is_dir() else path.parent
    licences[name] = of_folder(folder) if path.exists() else UNKNOWN
  return licences
