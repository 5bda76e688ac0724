"""FLOPs of a program, from its jaxpr: what it executes, remat and padding included.

`compiled.cost_analysis()` counts the body of a scan once, whatever its length; here every trip
counts. A multiply-add is 2, as in the needed FLOPs of `models.variants`; matmuls and convolutions
count, element-wise work does not, and a kernel counts what it declares.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from data_pipes.errors import InputError


def count_flops(function: Callable, *args: Any, while_trips: int | None = None) -> int:
  """FLOPs of `function(*args)`; arrays or jax.ShapeDtypeStructs, nothing is computed.

  Of branches (`lax.cond`, `lax.switch`) the dearest counts. `while_trips` is declared for loops
  whose trips only run time knows.

  Raises:
    InputError: such a loop holds FLOPs and `while_trips` is None; a kernel declares no cost.
  """
  return jaxpr_flops(jax.make_jaxpr(function)(*args), while_trips)


def jaxpr_flops(jaxpr: ClosedJaxpr | Jaxpr, while_trips: int | None = None) -> int:
  """FLOPs of a jaxpr; see `count_flops`."""
  jaxpr = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
  return sum(_equation(eqn, while_trips) for eqn in jaxpr.eqns)


def _equation(eqn: Any, while_trips: int | None) -> int:
  name, params = eqn.primitive.name, eqn.params
  if name == "dot_general":
    return _dot(eqn)
  if name == "conv_general_dilated":
    return _convolution(eqn)
  if name == "pallas_call":
    if params.get("cost_estimate") is None:
      raise InputError(f"kernel {params.get('name', name)!r} declares no cost_estimate")
    return int(params["cost_estimate"].flops)
  inner = [jaxpr_flops(jaxpr, while_trips) for jaxpr in _inner(params)]
  if name == "scan":
    return params["length"] * sum(inner)
  if name == "cond":
    return max(inner)
  if name == "while" and sum(inner):
    if while_trips is None:
      raise InputError("a while loop with FLOPs: say how often it runs (while_trips)")
    return while_trips * sum(inner)
  return sum(inner)


def _inner(params: dict[str, Any]) -> list[ClosedJaxpr | Jaxpr]:
  """The jaxprs among an equation's parameters: bodies, branches, what is called or rematerialised.

  (The derivative rules of custom_jvp and custom_vjp are functions, not jaxprs: they count where
  they have been applied.)
  """
  lists = (v if isinstance(v, tuple | list) else (v,) for v in params.values())
  return [v for values in lists for v in values if isinstance(v, ClosedJaxpr | Jaxpr)]


def _dot(eqn: Any) -> int:
  """2 x the output's size x the size of what is summed over."""
  ((contracted, _), _) = eqn.params["dimension_numbers"]
  summed = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
  return 2 * math.prod(eqn.outvars[0].aval.shape) * summed


def _convolution(eqn: Any) -> int:
  """2 x the output's size x taps x input channels of a group; padding counts as computed."""
  kernel = eqn.invars[1].aval.shape
  out_axis = eqn.params["dimension_numbers"].rhs_spec[0]
  taps = math.prod(size for axis, size in enumerate(kernel) if axis != out_axis)
  flops = 2 * math.prod(eqn.outvars[0].aval.shape) * taps
  return flops // eqn.params["batch_group_count"]
