"""VideoRefer in JAX: ask about objects in a video.

import vr_jax
model = vr_jax.load()  # or a checkpoint folder
answer = model.ask("clip.mp4", "What is <region> doing?",
                   [vr_jax.Region(box=(40, 60, 200, 220), frame=12)])

video = vr_jax.open_video("clip.mp4")  # len, size, fps, times, frames(numbers)
masks = vr_jax.read_regions(video, ["cat=mask.png@12"])  # {"cat": {12: bool [H, W]}}
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from data_pipes.video import open_video
  from vr_jax.inference.model import Model
  from vr_jax.inference.regions import Region, read_regions
  from vr_jax.inference.requests import Answer, Request
  from vr_jax.loading import load

__all__ = ["Answer", "Model", "Region", "Request", "load", "open_video", "read_regions"]

_HOMES = {
  "Answer": "vr_jax.inference.requests",
  "Model": "vr_jax.inference.model",
  "Region": "vr_jax.inference.regions",
  "Request": "vr_jax.inference.requests",
  "load": "vr_jax.loading",
  "open_video": "data_pipes.video",
  "read_regions": "vr_jax.inference.regions",
}


def __getattr__(name: str) -> Any:
  # Loaded on first use, so that `import vr_jax.configs` and `vr --help` need no model code.
  if name not in _HOMES:
    raise AttributeError(f"module 'vr_jax' has no attribute {name!r}")
  import importlib

  return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
  return sorted([*globals(), *__all__])
