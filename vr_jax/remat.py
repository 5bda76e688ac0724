"""What a layer keeps for its backward pass, by name."""

import flax.linen as nn
import jax

from data_pipes.errors import InputError

POLICIES = {
  # keeps every weight matmul
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  # keeps only each layer's input
  "full": jax.checkpoint_policies.nothing_saveable,
  # keeps every weight matmul in the host's memory
  "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
}


def remat(layer: type[nn.Module], policy: str, *, scanned: bool = False) -> type[nn.Module]:
  """`layer` under a policy: "none" (keep everything), "dots", "full" or "offload".

  `scanned`: the layer is the body of a scan, which needs no barrier against reuse of its forward.
  """
  if policy == "none":
    return layer
  if policy not in POLICIES:
    raise InputError(f"remat={policy!r} is not one of none, {', '.join(POLICIES)}")
  return nn.remat(layer, policy=POLICIES[policy], prevent_cse=not scanned)
