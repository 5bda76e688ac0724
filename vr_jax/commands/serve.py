"""`vr serve`: the model over HTTP, in OpenAI's shapes."""

import importlib.util

from data_pipes.errors import InputError
from vr_jax.commands.loading import Loading, load_model
from vr_jax.serving.media import MediaOptions
from vr_jax.serving.settings import Capacity, Listening

PACKAGES = ("fastapi", "uvicorn", "python_multipart", "prometheus_client")  # of the extra [serve]


def run(listening: Listening, capacity: Capacity, media: MediaOptions, loading: Loading) -> None:
  from vr_jax.checkpoint import checkpoint_sha256
  from vr_jax.weights import locate

  check_installed()
  from vr_jax.serving.engine import model_name
  from vr_jax.serving.server import serve

  name = listening.model_name or model_name(locate(loading.checkpoint).name)
  serve(
    lambda: load_model(loading),
    lambda: checkpoint_sha256(loading.checkpoint),
    name,
    listening,
    capacity,
    media,
  )


def check_installed() -> None:
  """Raises InputError where a package of the extra is not there."""
  missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
  if missing:
    raise InputError(f"{missing[0]} is not installed (pip install 'vr-jax[serve]')")
