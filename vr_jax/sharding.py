"""Where arrays live: the mesh, the tactics that place parameters, the names that place activations.

Meshes are made here and have Auto axes (Linen does not work under Explicit ones); run under
`jax.set_mesh(mesh)`. `vr_jax.params.param_shardings` lays the tactics over parameters.
"""

import ast
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from data_pipes.errors import InputError

# Names of activation axes and the mesh axes they are split over; hashable, so that a jitted
# function can take it as a static field. () switches the constraints off.
ActivationRules = tuple[tuple[str, str | tuple[str, ...] | None], ...]

# --- Tables -----------------------------------------------------------------------------------
# Every axis name that the model asks for:
#   batch   rows                          len      slots of the residual stream
#   frame   images of all rows, joined    heads    query heads        kv_heads  key/value heads
#   object  objects of a row              mlp      hidden units of the decoder's MLP
#   table   width of a piece of the token table before it is gathered: as the table itself lies
FSDP_RULES: ActivationRules = (
  ("batch", ("data", "fsdp")),
  ("frame", ("data", "fsdp")),
  ("object", None),
  ("len", None),
  ("heads", None),
  ("kv_heads", None),
  ("mlp", None),
  ("table", "fsdp"),
)
# The decoder's heads and hidden units over "tensor"; tower and region encoder, whose weights are
# whole, share their frames and objects out over it.
TENSOR_RULES: ActivationRules = (
  ("batch", ("data", "fsdp")),
  ("frame", ("data", "fsdp", "tensor")),
  ("object", "tensor"),
  ("len", None),
  ("heads", "tensor"),
  ("kv_heads", "tensor"),
  ("mlp", "tensor"),
  ("table", ("fsdp", "tensor")),
)
# As TENSOR_RULES, and between the matmuls each device holds a part of the slots only: for long
# videos (Megatron's sequence parallelism, arXiv 2205.05198).
SEQUENCE_RULES: ActivationRules = tuple(
  (name, "tensor" if name == "len" else axes) for name, axes in TENSOR_RULES
)
FSDP_STRATEGY = ((".*", "fsdp(axis='fsdp')"),)
TENSOR_STRATEGY = (
  ("llm/layers/attn/(q|attn_vec)_einsum/[wb]", "shard_dim('tensor', 1)|fsdp('fsdp')"),
  # Too few key heads are in whole on every device.
  ("llm/layers/attn/q?kv_einsum/[wb]", "shard_dim('tensor', 2, required=False)|fsdp('fsdp')"),
  ("llm/layers/mlp/gating_einsum", "shard_dim('tensor', -1)|fsdp('fsdp')"),
  ("llm/layers/mlp/linear", "shard_dim('tensor', -2)|fsdp('fsdp')"),
  # The others, adapters among them: gathered whole before their matmuls.
  (".*", "fsdp(('fsdp', 'tensor'))"),
)

# --- Meshes -----------------------------------------------------------------------------------


def mesh_sizes(
  axes: Iterable[tuple[str, int]], devices: int
) -> tuple[tuple[str, ...], tuple[int, ...]]:
  """Names and sizes of a mesh's axes over so many devices, the -1 worked out.

  Raises:
    InputError: the sizes do not multiply to the number of devices.
  """
  names, sizes = zip(*((str(name), int(size)) for name, size in axes), strict=True)
  try:
    return names, np.empty(devices).reshape(sizes).shape
  except ValueError:
    shape = " x ".join(f"{n}={s}" for n, s in zip(names, sizes, strict=True))
    raise InputError(
      f"config.mesh: {shape} does not fit {devices} devices; the sizes must multiply to {devices} "
      "(one of them may be -1)"
    ) from None


def make_mesh(axes: Iterable[tuple[str, int]], devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh such as `[("data", -1), ("fsdp", 4)]`; one size may be -1, which takes the rest.

  Args:
    axes: names and sizes, outermost (slowest links) first. Where the devices form several slices,
      the first axis runs over them (and goes on within them): only its collectives cross the data
      center network.
    devices: default all devices.

  Raises:
    InputError: the sizes do not multiply to the number of devices, or the first is no multiple of
      the number of slices.
  """
  devices = jax.devices() if devices is None else devices
  names, sizes = mesh_sizes(axes, len(devices))
  slices = len({getattr(device, "slice_index", None) for device in devices})
  if sizes[0] % slices:
    raise InputError(
      f"config.mesh: the first axis, {names[0]}={sizes[0]}, runs over the {slices} slices; make it "
      f"a multiple of {slices}"
    )
  if slices > 1:
    within, across = (sizes[0] // slices, *sizes[1:]), (slices, *[1] * len(sizes[1:]))
    grid = mesh_utils.create_hybrid_device_mesh(
      within, across, devices, allow_split_physical_axes=True
    )
  else:
    grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
  return Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names))


# --- Activations ------------------------------------------------------------------------------


def check_rules(rules: ActivationRules, mesh: Mesh) -> None:
  """Refuses rules that the model or the mesh does not know, before anything is traced.

  Raises:
    InputError: a name that no activation has or that is missing, an axis that the mesh has not.
  """
  known = [name for name, _ in FSDP_RULES]
  for name, _ in rules:
    if name not in known:
      raise InputError(
        f"config.sharding_rules: no activation has an axis {name!r}; accepted: {', '.join(known)}"
      )
  for name in known:
    _lookup(rules, name, mesh.axis_names)


def batch_sharding(mesh: Mesh, rules: ActivationRules, leading: int = 0) -> NamedSharding:
  """Of batch arrays: `leading` whole axes, then the axis "batch", split as the rules say."""
  return NamedSharding(mesh, P(*[None] * leading, _lookup(rules, "batch", mesh.axis_names)))


def shard_act(x: Array, rules: ActivationRules, *names: str | None) -> Array:
  """Constrains an activation: one name (or None) per axis of x, looked up strictly in the rules.

  Under `jax.set_mesh`. Rules `()` leave x as it is. An axis is split over as many of its mesh axes
  as divide it, from the first on.

  Raises:
    ValueError: a name without a rule, the wrong number of names, two axes on one mesh axis.
  """
  if not rules:
    return x
  return jax.lax.with_sharding_constraint(x, act_spec(x.shape, rules, *names))


def act_spec(shape: Sequence[int], rules: ActivationRules, *names: str | None) -> P:
  """The partition of an activation of that shape under the current mesh; see `shard_act`."""
  if len(names) != len(shape):
    raise ValueError(f"shard_act: {len(names)} names {names} for an array of shape {shape}")
  sizes = jax.sharding.get_abstract_mesh().shape
  axes = [None if name is None else _lookup(rules, name) for name in names]
  spec = [_dividing(part, length, sizes) for part, length in zip(axes, shape, strict=True)]
  flat = [axis for part in spec for axis in _axes(part)]
  if len(set(flat)) < len(flat):
    raise ValueError(f"shard_act: {names} puts two axes of {shape} on one mesh axis: {spec}")
  return P(*spec)


def _dividing(axis: str | tuple[str, ...] | None, length: int, sizes: Mapping[str, int]) -> Any:
  """The first of the mesh axes that together divide `length`, None if there is none."""
  axes = _axes(axis)
  while axes and length % math.prod(sizes[name] for name in axes):
    axes = axes[:-1]
  return axes if len(axes) > 1 else axes[0] if axes else None


def _axes(axis: str | tuple[str, ...] | None) -> tuple[str, ...]:
  return () if axis is None else (axis,) if isinstance(axis, str) else tuple(axis)


def _lookup(rules: ActivationRules, name: str, mesh_axes: Sequence[str] | None = None) -> Any:
  table = dict(rules)
  if name not in table:
    raise InputError(f"config.sharding_rules has no {name!r}; it has {', '.join(table)}")
  unknown = set(_axes(table[name])) - set(mesh_axes or ())
  if mesh_axes is not None and unknown:
    raise InputError(
      f"config.sharding_rules: {name!r} is on mesh axes {sorted(unknown)}, "
      f"which config.mesh has not; it has {', '.join(mesh_axes)}"
    )
  return table[name]


Tactic = Callable[[list[Any], str, Any, Mesh], None]


def tactic(text: str) -> Tactic:
  """The function of one rule: it enters mesh axes in a partition spec, in place."""
  try:
    node = ast.parse(text.strip(), mode="eval").body
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    args = [ast.literal_eval(arg) for arg in call.args]
    kwargs = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    return _TACTICS[ast.unparse(call.func)](*args, **kwargs)
  except (SyntaxError, ValueError, KeyError, TypeError):
    raise InputError(
      f"config.sharding_strategy: {text!r} is not a rule; accepted: replicate, "
      "fsdp(axis='fsdp', min_size_to_shard_mb=4), "
      "shard_dim(axis='tensor', dim=-1, required=True), joined by |"
    ) from None


def _replicate() -> Tactic:
  return lambda spec, path, leaf, mesh: None


def _fsdp(axis: str | tuple[str, ...], min_size_to_shard_mb: float = 4) -> Tactic:
  def place(spec, path, leaf, mesh):
    _axis_size(mesh, axis)
    if math.prod(leaf.shape) * leaf.dtype.itemsize < min_size_to_shard_mb * 2**20:
      return
    axes = _axes(axis)
    while (size := _axis_size(mesh, axes)) > 1:
      free = [
        (length, -dim)
        for dim, length in enumerate(leaf.shape)
        if spec[dim] is None and length % size == 0
      ]
      if free:
        spec[-max(free)[1]] = axes if len(axes) > 1 else axes[0]
        return
      axes = axes[:-1]

  return place


def _shard_dim(axis: str | tuple[str, ...], dim: int, required: bool = True) -> Tactic:
  def place(spec, path, leaf, mesh):
    size = _axis_size(mesh, axis)
    if not -len(leaf.shape) <= dim < len(leaf.shape) or leaf.shape[dim] % size:
      if not required:
        return
      raise InputError(
        f"config.sharding_strategy: {path!r} of shape {tuple(leaf.shape)} cannot be split over "
        f"{axis!r} (size {size}) at dim {dim}"
      )
    if spec[dim] is not None:
      raise InputError(f"config.sharding_strategy: {path!r}: dim {dim} is split twice")
    spec[dim] = axis

  return place


def _axis_size(mesh: Mesh | AbstractMesh, axis: str | tuple[str, ...]) -> int:
  for name in _axes(axis):
    if name not in mesh.shape:
      raise InputError(
        f"config.sharding_strategy: axis {name!r} is not in config.mesh; it has "
        f"{', '.join(mesh.axis_names)}"
      )
  return math.prod(mesh.shape[name] for name in _axes(axis))


_TACTICS: Mapping[str, Callable[..., Tactic]] = {
  "replicate": _replicate,
  "fsdp": _fsdp,
  "shard_dim": _shard_dim,
}
