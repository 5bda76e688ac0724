"""`vr batch`: a file of chat requests in OpenAI's batch form, answered as by `vr serve`."""

from dataclasses import dataclass, field

from vr_jax.commands.loading import Loading, load_model
from vr_jax.serving.media import MediaOptions
from vr_jax.serving.settings import Capacity


@dataclass(frozen=True)
class Batch:
  requests: str = field(
    metadata={"positional": True, "metavar": "IN.jsonl", "help": "custom_id, url and body a line"}
  )
  out: str = field(metadata={"metavar": "OUT.jsonl", "help": "a response a line; resumable"})


def run(files: Batch, capacity: Capacity, media: MediaOptions, loading: Loading) -> int:
  """Returns 2 where a request was refused."""
  from vr_jax.checkpoint import checkpoint_sha256
  from vr_jax.commands.serve import check_installed
  from vr_jax.weights import locate

  check_installed()
  from vr_jax.serving import batch
  from vr_jax.serving.engine import model_name

  name = model_name(locate(loading.checkpoint).name)
  sha256 = checkpoint_sha256(loading.checkpoint)
  summary = batch.run(
    lambda: load_model(loading), sha256, name, files.requests, files.out, capacity, media
  )
  print(f"{summary}: {files.out}")
  return 2 if summary.refused else 0
