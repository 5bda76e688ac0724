"""Digests of the weights that a run starts from; those of its data are data_pipes.content's."""

import hashlib
from pathlib import Path

import jax
import numpy as np

from data_pipes.buckets import files_below
from data_pipes.content import summary
from vr_jax.checkpoint import find_checkpoint, is_checkpoint
from vr_jax.params import Params, by_path
from vr_jax.training.processes import gather
from vr_jax.weights import weights_path


def digest_of_weights(name: Path | str) -> str:
  """ "size digest" of weights by name; of a work directory its newest checkpoint."""
  path = weights_path(name)
  if is_checkpoint(path):
    path = find_checkpoint(path)
  files = files_below(path) if path.exists() else []
  return summary(files, whole=False) if files else "nothing"


def digest_of_params(params: Params) -> str:
  """Hash of the names, types and values of parameters; of several processes, over all of them."""
  digest = hashlib.blake2b(digest_size=16)
  for path, leaf in by_path(params).items():
    digest.update(f"{path}\0{leaf.dtype}{leaf.shape}\n".encode())
    parts = [leaf]
    if not leaf.is_fully_addressable:  # each piece once, by the process that has its first copy
      shards = sorted(leaf.addressable_shards, key=lambda shard: str(shard.index))
      parts = [shard.data for shard in shards if shard.replica_id == 0]
    for part in parts:
      digest.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8))
  if jax.process_count() > 1:
    digest = hashlib.blake2b("".join(gather(digest.hexdigest())).encode(), digest_size=16)
  return digest.hexdigest()
