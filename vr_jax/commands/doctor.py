"""`vr doctor`: what this installation can do, where it keeps things, what each extra would add."""

import json
import os
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGE = "vr-jax"
_REQUIREMENT = re.compile(r"""([\w.-]+)(?:\[([\w,-]+)\])?.*?;.*extra == ['\"]([\w-]+)['\"]""")
_CACHES = {  # the variable that moves each, and where it is without
  "programs": ("JAX_COMPILATION_CACHE_DIR", "vr_jax/programs"),
  "video indexes": ("", "vr_jax/videos"),
  "weights of the Hub": ("HF_HUB_CACHE", "huggingface/hub"),
}


@dataclass(frozen=True)
class Doctor:
  json: bool = field(default=False, metadata={"help": "print the facts as JSON"})


def run(options: Doctor) -> int:
  """Returns 2 where JAX starts no device."""
  facts = {
    "versions": versions(),
    "devices": devices(),
    "caches": caches(),
    "missing": missing_of_extras(),
  }
  print(json.dumps(facts, indent=2) if options.json else "\n".join(_lines(facts)))
  return 0 if facts["devices"]["kinds"] else 2


def versions() -> dict[str, str]:
  """Of the package, Python, what computes and what decodes."""
  import av

  names = (PACKAGE, "jax", "jaxlib", "flax", "orbax-checkpoint", "grain", "av")
  codec = ".".join(map(str, av.library_versions["libavcodec"]))
  installed = {name: metadata.version(name) for name in names}
  return installed | {"python": platform.python_version(), "ffmpeg (libavcodec)": codec}


def devices() -> dict[str, Any]:
  """What JAX runs on: kinds with their number, or why there is none."""
  import jax

  try:
    kinds = [f"{device.platform}: {device.device_kind}" for device in jax.devices()]
  except Exception as error:  # a plug-in may fail in any way
    return {"kinds": {}, "reason": " ".join(str(error).split())[:200]}
  return {"kinds": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}}


def caches() -> dict[str, dict[str, Any]]:
  """Each cache: its folder, and the bytes in it."""
  home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
  result = {}
  for name, (variable, place) in _CACHES.items():
    folder = Path(os.environ.get(variable) or home / place)
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    result[name] = {"folder": str(folder), "bytes": sum(path.stat().st_size for path in files)}
  return result


def missing_of_extras() -> dict[str, list[str]]:
  """The packages of each extra that are not here."""
  extras = metadata.metadata(PACKAGE).get_all("Provides-Extra") or []
  return {
    extra: sorted({p for p in _packages(PACKAGE, extra) if not _is_here(p)}) for extra in extras
  }


def _packages(package: str, extra: str) -> Iterator[str]:
  """What an extra of an installed package asks for, extras of other packages followed."""
  for requirement in metadata.requires(package) or ():
    match = _REQUIREMENT.match(requirement)
    if match is None or match[3] != extra:
      continue
    yield match[1]
    for other in match[2].split(",") if match[2] and _is_here(match[1]) else ():
      yield from _packages(match[1], other)


def _is_here(package: str) -> bool:
  try:
    metadata.distribution(package)
  except metadata.PackageNotFoundError:
    return False
  return True


def _lines(facts: Mapping[str, Any]) -> Iterator[str]:
  yield "versions: " + ", ".join(f"{name} {text}" for name, text in facts["versions"].items())
  kinds = ", ".join(f"{count} x {kind}" for kind, count in facts["devices"]["kinds"].items())
  yield f"devices:  {kinds or 'none: ' + facts['devices']['reason']}"
  for name, cache in facts["caches"].items():
    yield f"cache of {name}: {cache['folder']} ({cache['bytes'] / 1e6:.0f} MB)"
  for extra, packages in facts["missing"].items():
    state = "here" if not packages else f"lacks {', '.join(packages)}: pip install '.[{extra}]'"
    yield f"extra [{extra}]: {state}"
