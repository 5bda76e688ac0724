"""Which parameters train, by which optimizer, at what learning rate, with what decay: tables.

    schedule = [("img/.*", None), ("connector/.*", dict(peak=0.2)), (".*", dict(decay="linear"))]

First match wins; a table must cover every parameter and use every rule; `None` is frozen. AdamW's
arithmetic is that of torch.optim.AdamW, `clip_grad_norm_` and transformers' cosine schedule, with
which the published model was trained.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from ml_collections import ConfigDict

from data_pipes.errors import InputError
from vr_jax.arrays import Array
from vr_jax.config_values import OPTIMIZERS, UNITS, check_schedule
from vr_jax.configs import check_config
from vr_jax.params import Params, by_path, match_table, merge, shared, sub_tree
from vr_jax.training.optimizers import ROUNDED, Direction, Slots, direction, is_matrix, rounded

ScheduleTable = Iterable[tuple[str, Mapping[str, Any] | None]]
# What the published trainer decays: all but biases and the scales of layer norms (those of RMS
# norms decay). Source: transformers 4.40 Trainer.get_decay_parameter_names.
PUBLISHED_WD_MULTS = (
  (".*/(bias|b)", 0.0),
  ("(img|connector)/.*[nN]orm(_?[0-9])?/scale", 0.0),
  (".*", 1.0),
)


class Optimizer(NamedTuple):
  """The optimizers of all groups over the trained parameters.

  `init(params_train)` gives the state, trees of paths of the trained parameters: the optimizers'
  slots (of AdamW "mu" and "nu", see optimizers.py), zeros, `moments_dtype` where they are moments;
  the arithmetic is float32 whatever it is. With `ema_decay` it has "ema" too, the running mean of
  the parameters, which starts as they do.
  `update(grads, state, params_train, step)` gives (params_train, state, metrics) after optimizer
  step `step` (i32, 0-based); metrics: `grad_norm` before clipping and `update_norm`, of all and of
  each part of the model (`grad_norm/<part>`), and `lr` (with several groups also `lr/<regex>`, `lr`
  being the first group's). `lrs(step)` gives the latter alone.
  """

  init: Callable[[Params], Params]
  update: Callable[[Params, Params, Params, Int[Array, ""]], tuple[Params, Params, dict]]
  lrs: Callable[[Int[Array, ""]], dict[str, Float[Array, ""]]]


def split_by_table(params: Params, table: ScheduleTable) -> tuple[Params, Params]:
  """(trained, frozen): nested dicts that share no leaf and merge back to `params`.

  Works on arrays, shapes and shardings alike.

  Raises:
    InputError: the table does not cover a parameter, has an unused rule, or trains nothing.
  """
  table = list(table)
  rules = _rule_indices(params, table)
  trained = jax.tree.map(lambda index: table[index][1] is not None, rules)
  if not any(jax.tree.leaves(trained)):
    raise InputError("config.schedule: every parameter is frozen (None); nothing would be trained")
  return _pick(params, trained, True), _pick(params, trained, False)


def make_optimizer(
  config: ConfigDict, params: Params, *, total_steps: int, data_size: int = 0
) -> Optimizer:
  """The optimizer that a config describes.

  Args:
    config: reads schedule, optimizer, lr, wd, wd_mults, b1, b2, eps, grad_clip_norm, ema_decay,
      moments_dtype, input.batch_size.
    params: all parameters (or their shapes), frozen ones too: the tables are checked against them.
    total_steps: optimizer steps of the whole run.
    data_size: examples in an epoch; only `warmup_epochs` needs it.

  Raises:
    InputError: a table that is not total and tight, an unknown option.
  """
  check_config(config)
  table = list(config.schedule)
  rules = _rule_indices(params, table)
  schedules = {}
  for index, (pattern, options) in enumerate(table):
    if options is not None:
      where = f"config.schedule.{index}.1"
      lr = config.lr * options.get("peak", 1.0)
      warmup = count_steps(
        "warmup", options, where, total_steps, config.input.batch_size, data_size
      )
      schedules[index] = (pattern, _learning_rate(lr, warmup or 0, total_steps, options))

  # By path, because the trained parameters are a sub-tree.
  group_of, decay_of = by_path(rules), by_path(match_table(params, config.wd_mults, "wd_mults"))
  wd_of = {i: (table[i][1] or {}).get("wd", config.wd) for i in schedules}
  groups = _groups(config, rules)

  def lrs(step):
    named = [(pattern, fn(step)) for pattern, fn in schedules.values()]
    groups = {f"lr/{pattern}": value for pattern, value in named} if len(named) > 1 else {}
    return {"lr": named[0][1], **groups}

  def init(params_train):
    slots: Slots = {}
    for like, rule in groups:
      for name, tree in rule.init(sub_tree(params_train, like)).items():
        slots[name] = merge(slots.get(name, {}), tree)
    mean = {"ema": jax.tree.map(jnp.copy, params_train)} if config.ema_decay else {}
    kept = {name: kept_slot(name, tree, jnp.zeros((), jnp.int32)) for name, tree in slots.items()}
    return {**kept, **mean}

  def kept_slot(name, tree, step):
    """A slot as it is kept in memory."""
    dtype = config.moments_dtype if name in ROUNDED else jnp.float32
    return jax.tree.map(lambda x: rounded(x, dtype, step, name), tree)

  def update(grads, state, params_train, step):
    before, norms = params_train, norms_by_part("grad_norm", grads)
    norm = norms["grad_norm"]
    if config.grad_clip_norm:
      factor = jnp.minimum(1.0, config.grad_clip_norm / (norm + 1e-6))
      grads = jax.tree.map(lambda g: g * factor, grads)
    step = jnp.asarray(step, jnp.int32)
    directions: Params = {}
    slots: Slots = {}
    for like, rule in groups:
      held = {
        name: jax.tree.map(lambda x: x.astype(jnp.float32), part)
        for name, tree in state.items()
        if name != "ema" and (part := shared(tree, like))
      }
      here = (sub_tree(grads, like), held, sub_tree(params_train, like))
      some, held = rule.update(*here, step)
      directions = merge(directions, some)
      slots |= {name: merge(slots.get(name, {}), tree) for name, tree in held.items()}
    rate = {index: fn(step) for index, (_, fn) in schedules.items()}

    def stepped(path, p, direction):
      path = _key(path)
      wd = wd_of[group_of[path]] * decay_of[path]
      return p - rate[group_of[path]] * (direction + wd * p)

    params_train = jax.tree_util.tree_map_with_path(stepped, params_train, directions)
    new = {name: kept_slot(name, tree, step) for name, tree in slots.items()}
    if config.ema_decay:
      decay = jnp.minimum(config.ema_decay, (1.0 + step) / (10.0 + step))
      new["ema"] = jax.tree.map(
        lambda mean, p: mean + (1 - decay) * (p - mean), state["ema"], params_train
      )
    norms |= norms_by_part("update_norm", jax.tree.map(jnp.subtract, params_train, before))
    return params_train, new, {**norms, **lrs(step)}

  return Optimizer(init, update, lrs)


def _groups(config: ConfigDict, rules: Params) -> list[tuple[Params, Direction]]:
  """The trained parameters (a tree of their places alone) by optimizer, each with its own."""
  names: dict[str, tuple[int, str]] = {}
  for path, index in by_path(rules).items():
    options = config.schedule[index][1]
    if options is not None:
      name = options.get("optimizer", config.optimizer)
      names[path] = (index, "adamw" if name == "muon" and not is_matrix(path) else name)
  groups = []
  for index, name in dict.fromkeys(names.values()):
    options = config.schedule[index][1]
    settings = {key: options[key] for key in OPTIMIZERS[name].accepted if key in options}
    if name == "adamw":
      by_name = options.get("optimizer", config.optimizer) == name  # else Muon's b1, not this one's
      settings = {k: config[k] for k in ("b1", "b2", "eps")} | (settings if by_name else {})
    paths = {path: path for path, group in names.items() if group == (index, name)}
    like = flax.traverse_util.unflatten_dict(paths, sep="/")
    groups.append((like, direction(name, settings, like)))
  return groups


def norms_by_part(name: str, tree: Params) -> dict[str, Float[Array, ""]]:
  """`name`: the L2 norm of all leaves; `name/<part>`: of those under each top-level key."""
  squares = jax.tree.map(lambda x: jnp.sum(jnp.square(x)), tree)
  norm = lambda part: jnp.sqrt(sum(jax.tree.leaves(part)))  # noqa: E731
  return {name: norm(squares), **{f"{name}/{part}": norm(squares[part]) for part in squares}}


def count_steps(
  prefix: str,
  options: Mapping[str, Any] | ConfigDict,
  where: str,
  total_steps: int,
  batch_size: int,
  data_size: int,
) -> int | None:
  """Optimizer steps that `{prefix}_{steps,examples,epochs,percent}` asks for, rounded up.

  `_percent` is a fraction of total_steps, as in big_vision. None if no such option is set.

  Raises:
    InputError: more than one of them is set, or one that cannot be known here.
  """
  given: dict[str, float] = {
    unit: options[f"{prefix}_{unit}"]
    for unit in UNITS
    if options.get(f"{prefix}_{unit}") is not None
  }
  if not given:
    return None
  if len(given) > 1:
    raise InputError(f"{where}: set only one of {', '.join(f'{prefix}_{u}' for u in given)}")
  ((unit, value),) = given.items()
  if unit == "epochs" and not data_size:
    raise InputError(f"{where}.{prefix}_epochs: the size of the data is not known; use steps")
  per_step = {"examples": batch_size, "epochs": batch_size / data_size if data_size else 1}
  steps = value * total_steps if unit == "percent" else value / per_step.get(unit, 1)
  return math.ceil(steps)


def _learning_rate(
  peak: float, warmup: int, total: int, options: Mapping[str, Any] | ConfigDict
) -> Callable[[Int[Array, ""]], Float[Array, ""]]:
  """Linear from 0 over `warmup` steps, then the decay to 0 at `total`.

  Source: transformers 4.40 get_cosine_schedule_with_warmup; with a warm-up, step 0 has lr 0.
  """
  decays = {
    "cosine": lambda done: 0.5 * (1.0 + jnp.cos(np.pi * done)),
    "linear": lambda done: 1.0 - done,
    "constant": jnp.ones_like,
  }
  decay = decays[options.get("decay", "cosine")]

  def lr(step):
    step = jnp.asarray(step, jnp.float32)
    done = jnp.clip((step - warmup) / max(1, total - warmup), 0.0, 1.0)
    return peak * jnp.where(step < warmup, step / max(1, warmup), decay(done))

  return lr


def _rule_indices(params: Params, table: list) -> Params:
  check_schedule(table)
  return match_table(params, [(row[0], i) for i, row in enumerate(table)], "schedule")


def _pick(params: Mapping[str, Any], trained: Params, keep: bool) -> Params:
  """The leaves whose place in `trained` holds `keep`."""
  out: Params = {}
  for key, value in params.items():
    if isinstance(value, Mapping):
      if sub := _pick(value, trained[key], keep):
        out[key] = sub
    elif trained[key] == keep:
      out[key] = value
  return out


def _key(path: tuple) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")
