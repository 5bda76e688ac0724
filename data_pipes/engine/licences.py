"""What folders, and the Hub's pages, say of the licence of a model or of source data."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipes.engine.roles import UNPINNED, model_version

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


def of_run(config: Mapping[str, Any], known: Mapping[str, str] | None = None) -> dict[str, str]:
  """The licences of a run's sources and models by their names; nothing is asked over a network.

  `known`: what the Hub said of its models when the run began.
  """
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
    licences[name] = of_folder(folder) if path.exists() else (known or {}).get(name, UNKNOWN)
  return licences


def models_of_run(config: Mapping[str, Any]) -> list[dict[str, str]]:
  """The models that played the roles of a run: role, name, version (a commit of the Hub or a hash
  of the folder) and price in US dollars for a million tokens, each UNKNOWN where nothing says."""
  out = []
  for role, options in config.get("roles", {}).items():
    rates = options.get("usd_per_million") or (0, 0)
    price = f"{rates[0]:g} in, {rates[1]:g} out" if any(rates) else UNKNOWN
    for key in MODEL_OPTIONS:
      if isinstance(name := options.get(key), str):
        version = UNKNOWN if options.get("kind") == "openai" else model_version(name)
        version = UNKNOWN if version == UNPINNED else version
        paid = price if options.get("kind") == "openai" else "runs here"
        out.append({"role": role, "model": name, "version": version, "price": paid})
  return out
