"""The model that a command loads, as options."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vr_jax.inference.options import WEIGHTS

if TYPE_CHECKING:
  from vr_jax.inference.model import Model


@dataclass(frozen=True)
class Loading:
  checkpoint: str | None = field(
    default=None,
    metadata={
      "help": "a checkpoint folder or an address on the Hub, OWNER/NAME[@REVISION] "
      "(default: the packaged vr-mini)"
    },
  )
  weights: str | None = field(
    default=None, metadata={"help": "default: as stored", "choices": WEIGHTS}
  )
  mesh: str | None = field(
    default=None,
    metadata={"help": "split rows and weights over devices", "metavar": "data=N,tensor=M"},
  )


def load_model(options: Loading) -> "Model":
  """The model; its compiled programs are kept for the next process."""
  from vr_jax.inference.placement import parse_mesh
  from vr_jax.loading import load
  from vr_jax.program_cache import keep_on_disk

  keep_on_disk()
  mesh = parse_mesh(options.mesh) if options.mesh else None
  return load(options.checkpoint, weights=options.weights, mesh=mesh)
