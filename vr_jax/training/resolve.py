"""What a config allocates and where, resolved without running it: `vr config shapes|shardings`."""

from collections.abc import Mapping

import jax
from jax.sharding import AbstractMesh, AxisType
from ml_collections import ConfigDict

from vr_jax.models.videorefer import init_params
from vr_jax.params import Params, by_path, param_shardings
from vr_jax.sharding import mesh_sizes
from vr_jax.training.schedule import split_by_table
from vr_jax.training.start import model_config


def param_shapes(config: ConfigDict) -> Params:
  """The parameters of a config's model as shapes."""
  cfg = model_config(config)
  return jax.eval_shape(lambda key: init_params(cfg, key), jax.random.key(0))


def shapes(config: ConfigDict) -> dict[str, str]:
  """{parameter: dtype, shape and whether it trains}, in the state that training keeps."""
  params = param_shapes(config)
  trained, frozen = split_by_table(params, config.schedule)
  lines = {}
  for tree, dtype, word in ((trained, None, "trained"), (frozen, config.frozen_dtype, "frozen")):
    for path, leaf in by_path(tree).items():
      lines[path] = f"{dtype or leaf.dtype.name}{list(leaf.shape)} {word}"
  return {path: lines[path] for path in by_path(params)}


def shardings(config: ConfigDict, devices: int | None = None) -> dict[str, str]:
  """{parameter: its PartitionSpec} on the config's mesh over so many devices (default: those here).

  Raises:
    InputError: the mesh does not fit them, or the table does not fit the model.
  """
  count = len(jax.devices()) if devices is None else devices
  names, sizes = mesh_sizes(config.mesh, count)
  mesh = AbstractMesh(sizes, names, axis_types=(AxisType.Auto,) * len(names))
  placed = param_shardings(param_shapes(config), mesh, config.sharding_strategy)
  return {path: spec_text(sharding.spec) for path, sharding in by_path(placed).items()}


def spec_text(spec: jax.P) -> str:
  """Such as `(-, fsdp, -, tensor)`; the mesh axes of one dim joined by +."""
  parts = ("-" if a is None else a if isinstance(a, str) else "+".join(a) for a in spec)
  return f"({', '.join(parts)})"


def table(lines: Mapping[str, str]) -> str:
  """Two columns."""
  width = max(map(len, lines))
  return "\n".join(f"{path:{width}}  {text}" for path, text in lines.items())
