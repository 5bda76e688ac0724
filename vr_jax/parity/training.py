"""Golden stages 06 and 06b: gradients, and the recorded training runs of stages 1, 2 and 3."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from data_pipes.batch import Row, RowShape, collate, fit_shape
from data_pipes.errors import InputError
from data_pipes.records import RecordFile
from data_pipes.samples import RowRules, Samples, record_needs
from vr_jax.configs import base_config
from vr_jax.interop.videorefer import to_published
from vr_jax.models.connector import scene_token_count
from vr_jax.params import match_table
from vr_jax.parity.forward import Published, training_rows
from vr_jax.parity.golden import FAIL, PASS, REFUSED, Case, CaseResult, Golden
from vr_jax.training.loss import model_loss
from vr_jax.training.schedule import (
  PUBLISHED_WD_MULTS,
  Optimizer,
  ScheduleTable,
  make_optimizer,
  split_by_table,
)
from vr_jax.training.step import TrainState, check_metrics, make_step, micro_batches

ALL_BUT_TOWER: ScheduleTable = (("img/.*", None), (".*", {}))


class Differences:
  """Differences of one case, each held against its own limit; the largest one is reported."""

  def __init__(self) -> None:
    self.problems: list[str] = []
    self.worst: dict[str, float] = {}
    self.unknown: list[str] = []  # arrays that no code here compares

  def near(self, kind: str, name: str, ours: float, expected: float, limit: float) -> None:
    """`ours` is `expected` within `limit`."""
    self.error(kind, name, abs(ours - expected), limit, f"{ours:.6g} instead of {expected:.6g}")

  def error(self, kind: str, name: str, error: float, limit: float, text: str = "") -> None:
    """An error that must be at most `limit`. `worst` keeps the largest share of the limit."""
    self.worst[kind] = max(self.worst.get(kind, 0.0), error / limit)
    if not error <= limit:
      self.problems.append(f"{kind} {name}: {text or f'{error:.2e}, accepted {limit:.2e}'}")

  def equal(self, kind: str, ours: Any, expected: Any) -> None:
    if ours != expected:
      self.problems.append(f"{kind}: found {ours}, expected {expected}")

  def result(self, case: Case, max_error: float, tolerance: float, note: str = "") -> CaseResult:
    more = f"; and {len(self.problems) - 4} more" if len(self.problems) > 4 else ""
    shares = ", ".join(f"{kind} {share:.0%}" for kind, share in self.worst.items())
    return CaseResult(
      stage=case.stage,
      case=case.id,
      status=FAIL if self.problems else PASS,
      max_error=max_error,
      tolerance=tolerance,
      note="; ".join(self.problems[:4]) + more
      if self.problems
      else f"of the limits: {shares}{note}",
      unknown=tuple(self.unknown),
    )


# --- 06_gradients -----------------------------------------------------------------------------


def gradients(golden: Golden) -> Iterator[CaseResult]:
  """The gradient of every trainable parameter by its norm, some of them element by element."""
  published = Published(golden)
  # The step that users run, with an optimizer that leaves the gradients where parameters go.
  keep = Optimizer(
    init=lambda params: {},
    update=lambda grads, state, params, step: (grads, state, {}),
    lrs=lambda step: {},
  )
  step = make_step(model_loss(published.model), keep)
  batches = {case.id: case for case in golden.cases("05_forward")}
  for case in golden.cases("06_gradients"):
    try:
      rows = training_rows(published, batches[case.id])
    except InputError as error:
      yield CaseResult(case.stage, case.id, REFUSED, note=f"B10: {error}")
      continue
    params = jax.tree.map(jnp.array, published.params)  # the step donates them
    state = TrainState.create(params, ALL_BUT_TOWER, keep)
    state, metrics = jax.device_get(step(state, micro_batches(rows, 1)))
    grads = to_published(published.cfg, state.params_train)
    yield _compare_gradients(case, grads, metrics)


def _compare_gradients(
  case: Case, grads: Mapping[str, np.ndarray], metrics: Mapping[str, Any]
) -> CaseResult:
  differences, meta, tolerance = Differences(), case.meta, case.tolerance
  total = meta["global_norm"]
  differences.near("loss", "", float(metrics["loss"]), meta["loss"], 1e-4)
  differences.equal(
    "trained", sorted(grads), sorted([*meta["norms"], *meta["params_without_grad"]])
  )
  our_total = np.sqrt(sum(_norm(g) ** 2 for g in grads.values()))
  differences.near("norm", "global", our_total, total, tolerance["norm_rel"] * total)
  for name, norm in meta["norms"].items():
    if name in grads:
      limit = tolerance["norm_rel"] * norm + 1e-6 * total
      differences.near("norm", name, _norm(grads[name]), norm, limit)
  worst = 0.0
  for array in case.expected():
    kind, _, name = array.partition("/")
    if kind not in ("grad", "grad_rows16") or name not in grads:
      differences.unknown.append(array)
      continue
    ours = grads[name][::16] if kind == "grad_rows16" else grads[name]
    theirs = case.reference(array)
    error, size = _norm(ours - theirs), _norm(theirs)
    worst = max(worst, error / max(size, 1e-6 * total))
    differences.error("gradient", name, error, tolerance["grad_rel_l2"] * size + 1e-6 * total)
  return differences.result(case, worst, tolerance["grad_rel_l2"])


# --- 06b_training -----------------------------------------------------------------------------


def training(golden: Golden) -> Iterator[CaseResult]:
  """Runs of the published trainer: losses, gradient norms, learning rates, what changed."""
  published = Published(golden)
  for case in golden.cases("06b_training"):
    try:
      config = run_config(case.meta)
      ours = run(golden, published, config, case.meta["sample_order"])
      yield compare_run(case, config, published, ours)
    except InputError as error:
      yield CaseResult(case.stage, case.id, FAIL, note=str(error))


def run_config(meta: Mapping[str, Any]) -> ConfigDict:
  """Our config for a recorded run of the published trainer (transformers' TrainingArguments)."""
  arguments, config = meta["args"], base_config()
  config.b1, config.b2 = meta["optimizer"]["betas"]
  config.eps = meta["optimizer"]["eps"]
  config.lr = arguments["learning_rate"]
  config.wd = arguments["weight_decay"]
  config.wd_mults = PUBLISHED_WD_MULTS
  config.total_steps = arguments["max_steps"]
  config.accum_mean = "published"
  config.input.accum_steps = arguments["gradient_accumulation_steps"]
  config.input.batch_size = arguments["per_device_train_batch_size"] * config.input.accum_steps
  config.input.templated = not arguments.get("tune_mm_mlp_adapter", False)
  shape = {
    "decay": arguments["lr_scheduler_type"],
    "warmup_percent": arguments["warmup_ratio"],
  }
  projector_lr = arguments.get("mm_projector_lr") or config.lr
  if arguments.get("tune_region_encoder"):
    config.schedule = (("region/.*", shape), (".*", None))
  elif arguments.get("tune_mm_mlp_adapter"):
    config.schedule = (("connector/.*", shape), (".*", None))
  else:
    config.schedule = (
      ("img/.*", None),
      ("connector/.*", {**shape, "peak": projector_lr / config.lr}),
      (".*", shape),
    )
  return config


class Run(NamedTuple):
  """What a run of ours did: metrics of each step, trained parameters under published names."""

  metrics: list[dict[str, Any]]
  before: dict[str, np.ndarray]
  after: dict[str, np.ndarray]


def run(golden: Golden, published: Published, config: ConfigDict, order: list[int]) -> Run:
  """Trains the golden checkpoint on data/train.json, samples in the given order of ids."""
  optimizer = make_optimizer(config, published.params, total_steps=config.total_steps)
  step = make_step(model_loss(published.model), optimizer, accum_mean=config.accum_mean)
  params = jax.tree.map(jnp.array, published.params)  # the step donates them
  state = TrainState.create(params, config.schedule, optimizer)
  before = to_published(published.cfg, jax.device_get(state.params_train))
  history = []
  for rows in _batches(golden, published, config, order):
    state, metrics = step(state, micro_batches(rows, config.input.accum_steps))
    history.append(jax.device_get(metrics))
    check_metrics(len(history), history[-1])
  return Run(history, before, to_published(published.cfg, jax.device_get(state.params_train)))


def compare_run(case: Case, config: ConfigDict, published: Published, ours: Run) -> CaseResult:
  """A run of ours with the recorded one."""
  meta, tolerance, differences = case.meta, case.tolerance, Differences()
  _check_groups(differences, meta, config, published, ours.before)
  losses = np.concatenate([m["micro_loss"] for m in ours.metrics])
  differences.equal("micro-batches", len(losses), len(meta["micro_losses"]))
  worst = 0.0
  for k, (loss, expected) in enumerate(zip(losses, meta["micro_losses"], strict=False)):
    worst = max(worst, abs(float(loss) - expected))
    differences.near("loss", f"of micro-batch {k}", float(loss), expected, tolerance["loss_abs"])
  for k, (metrics, norm, lrs) in enumerate(
    zip(ours.metrics, meta["grad_norms_before_clip"], meta["lrs"], strict=True)
  ):
    # Later steps follow Adam's sign-like updates, which amplify rounding.
    limit = (1e-4 if k == 0 else 5e-3) * norm
    differences.near("gradient norm", f"of step {k}", float(metrics["grad_norm"]), norm, limit)
    rates = sorted({float(v) for name, v in metrics.items() if name.startswith("lr")})
    differences.equal(f"learning rates of step {k}", len(rates), len(set(lrs)))
    for rate, expected in zip(rates, sorted(set(lrs)), strict=False):
      differences.near("learning rate", f"of step {k}", rate, expected, 1e-6 * config.lr)

  differences.equal("changed", sorted(ours.after), sorted(meta["param_delta_norms"]))
  rel = tolerance["delta_norm_rel"]
  for name in ours.after.keys() & meta["param_delta_norms"].keys():
    change = _norm(ours.after[name].astype(np.float64) - ours.before[name])
    expected = meta["param_delta_norms"][name]
    differences.near("change", name, change, expected, rel * expected + 1e-9)
    expected = meta["param_norms_after"][name]
    differences.near("norm", name, _norm(ours.after[name]), expected, 1e-4 * expected + 1e-9)
  for array in case.expected():
    name = array.removeprefix("after/")
    if name == array or name not in ours.after:
      differences.unknown.append(array)
      continue
    theirs = case.reference(array).astype(np.float64)
    limit = rel * _norm(theirs - ours.before[name])
    differences.error("distance", name, _norm(ours.after[name] - theirs), limit)
  return differences.result(case, worst, tolerance["loss_abs"])


def _check_groups(
  differences: Differences,
  meta: Mapping[str, Any],
  config: ConfigDict,
  published: Published,
  trained: Mapping[str, np.ndarray],
) -> None:
  """Which parameters train, and which of them decay."""
  if isinstance(meta["trainable"], list):
    differences.equal("trainable", sorted(trained), sorted(meta["trainable"]))
  if meta["no_decay_names"] is not None:
    factors = match_table(published.params, config.wd_mults, "wd_mults")
    factors = jax.tree.map(lambda f, p: np.full(p.shape, f), factors, published.params)
    factors = to_published(published.cfg, split_by_table(factors, config.schedule)[0])
    spared = sorted(name for name, factor in factors.items() if not factor.any())
    differences.equal("without decay", spared, sorted(meta["no_decay_names"]))


def _batches(
  golden: Golden, published: Published, config: ConfigDict, order: list[int]
) -> Iterator[Row]:
  """The samples of data/train.json in the recorded order, read as a run reads them."""
  records = RecordFile(golden.path("data/train.json"))
  index = {records[i].id: i for i in range(len(records))}
  cfg, tokenizer = published.cfg, published.tokenizer
  rules = RowRules(
    templated=config.input.templated,
    max_text_ids=cfg.max_text_ids,
    aspect_ratio=cfg.image_aspect_ratio,
    masks="multi",
    mask_rule="published",
  )
  used = sorted({index[number] for number in order})
  shape: RowShape = fit_shape(
    [record_needs(records[i], i, tokenizer, cfg.num_frames, rules) for i in used],
    image_size=cfg.img.image_size,
    grid=cfg.img.grid,
    tokens_per_object=cfg.region.tokens,
    scene_tokens=scene_token_count(cfg.connector, cfg.num_frames, cfg.img.grid),
    scene=cfg.num_frames,
  )
  samples = Samples(records, tokenizer, shape, media_root=golden.path("media"), rules=rules)
  read = functools.cache(samples.__getitem__)
  size = config.input.batch_size
  for k in range(config.total_steps):  # what the recorded loader read ahead is not used
    yield collate([read(index[number]) for number in order[k * size : (k + 1) * size]])


def _norm(x: np.ndarray) -> float:
  return float(np.linalg.norm(np.asarray(x, np.float64).ravel()))
