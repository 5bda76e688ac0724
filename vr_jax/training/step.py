"""One optimizer step: micro-batches, gradients of the trained part, AdamW.

Letters: A micro-batch of the step, B row.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, no_type_check

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from data_pipes.errors import InputError
from vr_jax.arrays import Array
from vr_jax.models.quantize import quantized
from vr_jax.params import Params, merge, path_names
from vr_jax.training.loss import LossSums
from vr_jax.training.schedule import Optimizer, ScheduleTable, split_by_table

Metrics = dict[str, Array]


@no_type_check  # JAX rebuilds it with leaves of any kind
@flax.struct.dataclass
class TrainState:
  """All that a step reads and writes. `step` i32 [] counts finished optimizer steps.

  The trained and the frozen parameters are apart, so that the frozen ones get neither gradients
  nor optimizer slots; `params()` puts them together.
  """

  step: Int[Array, ""]
  params_train: Params
  params_frozen: Params
  opt_state: Params

  @classmethod
  def create(
    cls,
    params: Params,
    table: ScheduleTable,
    optimizer: Optimizer,
    frozen_dtype: str = "float32",
  ) -> "TrainState":
    """The state before the first step (also under `jax.eval_shape`)."""
    train, frozen = split_by_table(params, table)
    frozen = jax.tree.map(lambda path, p: stored(path, p, frozen_dtype), path_names(frozen), frozen)
    return cls(jnp.zeros((), jnp.int32), train, frozen, optimizer.init(train))

  def params(self) -> Params:
    """The whole parameter tree."""
    return merge(self.params_train, self.params_frozen)


def stored(path: str, p: Array, dtype: str) -> Any:
  """A frozen parameter as it is kept: "float32", "bfloat16", or "int8": the matrices of the decoder
  as `quantize.quantized`, all others in bfloat16."""
  if dtype != "int8":
    return p.astype(dtype)
  matrix = quantized(path, p)
  return p.astype("bfloat16") if matrix is p else matrix


class Cuts(NamedTuple):
  """Smaller shapes that the rows of a micro-batch may be cut to where they need no more.

  `sizes(rows)`, from shapes alone, ascend, the last is the rows' own; `needed(rows)` gives i32 [],
  the least size that loses nothing; `cut(rows, size)` the smaller rows, with the same loss.
  """

  sizes: Callable[[Any], tuple[int, ...]]
  needed: Callable[[Any], Int[Array, ""]]
  cut: Callable[[Any, int], Any]


def make_step(
  loss: Callable[[Params, Any], LossSums],
  optimizer: Optimizer,
  *,
  accum_mean: str = "tokens",
  shardings: TrainState | None = None,
  cuts: Cuts | None = None,
  kinds: Callable[[Any], Mapping[str, Array]] | None = None,
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
  """The jitted step `(state, rows) -> (state, metrics)`; the state is donated.

  Args:
    loss: (params, rows of one micro-batch) -> LossSums.
    optimizer: see `schedule.make_optimizer`.
    accum_mean: "tokens": gradient of the mean over all supervised tokens of the step, the same for
      any number of micro-batches. "published": the mean over micro-batches of their means, as in
      transformers 4.40, which the published model was trained with.
    shardings: of the state, kept over the step; None leaves placement to the compiler.
    kinds: rows of a micro-batch -> slots of each kind, i32 [], in the metrics `tokens/<kind>`.
    cuts: a program for each of these sizes is compiled, and the least that holds a micro-batch is
      run. The choice lies around the gradient, so that nothing is saved for the others.

  `rows` has a leading axis A (see `micro_batches`). Metrics: `loss` (nats, by accum_mean),
  `micro_loss` [A], `supervised_tokens`, `overflow` (tokens beyond the loss budget), those of the
  optimizer (see `schedule.Optimizer`), `skipped` (bool): the state is as it was but for `step`,
  because no token was supervised or loss or gradient were not finite.

  Raises:
    InputError: an unknown accum_mean.
  """
  if accum_mean not in ("tokens", "published"):
    raise InputError(f"config.accum_mean={accum_mean!r}: accepted: tokens, published")

  def step(state: TrainState, rows: Any) -> tuple[TrainState, Metrics]:
    def micro_loss(params_train, micro):
      sums = loss(merge(params_train, state.params_frozen), micro)
      mean = sums.sum / jnp.maximum(sums.weight, 1.0)
      # What is added up over micro-batches, and what the total is divided by in the end.
      part = (sums.sum, sums.weight) if accum_mean == "tokens" else (mean, jnp.ones(()))
      return part[0], (part, mean, sums)

    def one(totals, micro):
      def gradient(micro, size=None):
        micro = micro if size is None else cuts.cut(micro, size)
        return jax.value_and_grad(micro_loss, has_aux=True)(state.params_train, micro)

      sizes = () if cuts is None else cuts.sizes(micro)
      if len(sizes) < 2:
        (_, aux), grads = gradient(micro)
      else:
        index = jnp.searchsorted(jnp.asarray(sizes), cuts.needed(micro))
        programs = [functools.partial(gradient, size=size) for size in sizes]
        (_, aux), grads = jax.lax.switch(index, programs, micro)
      part, mean, sums = aux
      counted = {} if kinds is None else kinds(micro)
      new = (grads, part, sums.weight, sums.overflow, counted)
      return jax.tree.map(jnp.add, totals, new), mean

    zeros = jax.tree.map(jnp.zeros_like, state.params_train)
    counts = (
      {}
      if kinds is None
      else jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype),
        jax.eval_shape(kinds, jax.tree.map(lambda array: array[0], rows)),
      )
    )
    totals = (
      zeros,
      (jnp.zeros(()), jnp.zeros(())),
      jnp.zeros(()),
      jnp.zeros((), jnp.int32),
      counts,
    )
    totals, micro_losses = jax.lax.scan(one, totals, rows)
    grads, (total, divisor), tokens, overflow, counts = totals

    divisor = jnp.maximum(divisor, 1.0)
    grads = jax.tree.map(lambda g: g / divisor, grads)
    params_train, opt_state, metrics = optimizer.update(
      grads, state.opt_state, state.params_train, state.step
    )
    # A step that has nothing to learn from, or whose gradient is not finite, changes nothing.
    learned = (tokens > 0) & jnp.isfinite(total) & jnp.isfinite(metrics["grad_norm"])
    params_train, opt_state = jax.tree.map(
      lambda new, old: jnp.where(learned, new, old),
      (params_train, opt_state),
      (state.params_train, state.opt_state),
    )
    state = dataclasses.replace(
      state, step=state.step + 1, params_train=params_train, opt_state=opt_state
    )
    return state, {
      "loss": total / divisor,
      "micro_loss": micro_losses,
      "supervised_tokens": tokens,
      "overflow": overflow,
      "skipped": ~learned,
      **{f"tokens/{kind}": count for kind, count in counts.items()},
      **metrics,
    }

  outputs = None if shardings is None else (shardings, None)
  return jax.jit(step, donate_argnums=0, out_shardings=outputs)


def micro_batches(rows: Mapping[str, np.ndarray], parts: int) -> dict[str, np.ndarray]:
  """Host rows [B, ...] as [A, B/A, ...], in order.

  Raises:
    InputError: B is not divisible by the number of parts.
  """
  B = len(next(iter(rows.values())))
  if B % parts:
    raise InputError(
      f"input.batch_size={B} is not divisible by input.accum_steps={parts}; "
      f"use {-(-B // parts) * parts}"
    )
  return {k: np.asarray(v).reshape(parts, B // parts, *v.shape[1:]) for k, v in rows.items()}


def check_metrics(step: int, metrics: Mapping[str, Any]) -> None:
  """Refuses a step whose loss is not that of its batch; `step` counts from 1.

  Raises:
    InputError: more supervised tokens in a row than the loss has room for.
  """
  if metrics["overflow"]:
    raise InputError(
      f"step {step}: {int(metrics['overflow'])} supervised tokens do not fit "
      "config.loss_budget tokens a row; raise it (0 takes the row's length)"
    )
