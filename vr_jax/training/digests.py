"""Digests of the weights that a run starts from; those of its data are data_pipes.content's."""

from pathlib import Path

from data_pipes.content import summary
from vr_jax.checkpoint import find_checkpoint, is_checkpoint
from vr_jax.weights import weights_path


def digest_of_weights(name: Path | str) -> str:
  """ "size digest" of weights by name; of a work directory its newest checkpoint."""
  path = weights_path(name)
  if is_checkpoint(path):
    path = find_checkpoint(path)
  if path.is_dir():
    files = [(p.relative_to(path).as_posix(), p) for p in sorted(path.rglob("*")) if p.is_file()]
  else:
    files = [("", path)] if path.is_file() else []
  return summary(files, whole=False) if files else "nothing"
