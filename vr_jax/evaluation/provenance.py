"""What a result rests on: hashes, versions, the machine."""

import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vr_jax.checkpoint import checkpoint_sha256
from vr_jax.weights import locate

if TYPE_CHECKING:
  from vr_jax.inference.model import Model


_ME = "vr_jax/evaluation/provenance.py"  # in our own checkout, and tracked there


def model_facts(model: "Model", checkpoint: Path | str | None) -> dict[str, Any]:
  """Name, hash, size and configuration of a model; `checkpoint` is what it was loaded from."""
  import dataclasses

  import jax

  leaves = jax.tree.leaves(model.params)
  return {
    "name": locate(checkpoint).name,
    "checkpoint_sha256": checkpoint_sha256(checkpoint),
    "params": sum(leaf.size for leaf in leaves),
    "dtype": str(leaves[0].dtype),
    "config": _plain(dataclasses.asdict(model.cfg)),
  }


def _plain(value: Any) -> Any:
  """JSON-ready: what JSON has no word for becomes text."""
  if isinstance(value, dict):
    return {str(k): _plain(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(v) for v in value]
  return value if isinstance(value, str | int | float | bool | None) else str(value)


def code_version() -> dict[str, Any]:
  """The package's version, the commit of its checkout and whether that was changed since.

  The commit is "unknown" where the package does not lie in a checkout of its own: the repository
  around an environment that it was installed into says nothing of it.
  """
  root = Path(__file__).resolve().parents[2]

  def git(*arguments: str) -> str | None:
    try:
      done = subprocess.run(
        ["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10
      )
    except (OSError, subprocess.TimeoutExpired):
      return None
    return done.stdout.strip() if done.returncode == 0 else None

  top = git("rev-parse", "--show-toplevel")
  ours = top is not None and Path(top).resolve() == root and git("ls-files", "--error-unmatch", _ME)
  commit = ours and git("rev-parse", "HEAD")
  dirty = bool(git("status", "--porcelain", "--untracked-files=no")) if commit else None
  return {"version": metadata.version("vr-jax"), "git": commit or "unknown", "dirty": dirty}


def environment() -> dict[str, Any]:
  """Versions and devices."""
  import jax
  import jaxlib

  return {
    "python": platform.python_version(),
    "jax": jax.__version__,
    "jaxlib": jaxlib.__version__,
    "backend": jax.default_backend(),
    "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    "java": None,
  }


def java_version() -> str | None:
  """First line of `java -version`; None without Java."""
  if not shutil.which("java"):
    return None
  done = subprocess.run(["java", "-version"], capture_output=True, text=True)
  return done.stderr.splitlines()[0] if done.returncode == 0 and done.stderr else None
