"""What the fields of a config accept: ranges and forms of values, and their check.

The fields themselves stand in configs.py; one whose type does not say all about it is a `Field`
there, with what it accepts beside its default.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from data_pipes.errors import InputError, nearest


class Accepted(NamedTuple):
  """The values that a field takes: in words, and as a test of one of its type."""

  words: str
  holds: Callable[[Any], bool]


@dataclasses.dataclass(frozen=True)
class Field:
  """A default and what is accepted in its place; a field that may be None says its `kind`."""

  default: Any
  accepted: Accepted
  kind: type | None = None


def number(words: str, holds: Callable[[float], bool]) -> Accepted:
  return Accepted(words, lambda value: math.isfinite(value) and holds(value))


def one_of(*names: str) -> Accepted:
  return Accepted(", ".join(names), lambda value: value in names)


def rows(words: str, holds: Callable[..., bool]) -> Accepted:
  """A table: a tuple of tuples, of which `holds` takes the items of each."""
  return Accepted(
    words, lambda table: all(isinstance(r, tuple | list) and holds(*r) for r in table)
  )


def is_whole(value: Any, least: int) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_rising(values: Any) -> bool:
  return all(a < b for a, b in itertools.pairwise(values))


def is_text(value: Any) -> bool:
  return isinstance(value, str) and value != ""


def is_pattern(value: Any) -> bool:
  return isinstance(value, str) and re.compile(value) is not None


def is_factor(value: Any) -> bool:
  return isinstance(value, int | float) and math.isfinite(value) and value >= 0


def is_mesh(axes: Any) -> bool:
  names, sizes = zip(*axes, strict=True)
  fits = all(is_whole(size, 1) or size == -1 for size in sizes) and sizes.count(-1) <= 1
  return fits and all(map(is_text, names)) and len(set(names)) == len(names)


def is_window(steps: Any) -> bool:
  return not steps or (len(steps) == 2 and is_whole(steps[0], 1) and is_whole(*steps[::-1]))


def is_best(value: Any) -> bool:
  """() or (metric, "min" or "max")."""
  return not value or (len(value) == 2 and is_text(value[0]) and value[1] in ("min", "max"))


def is_axis(name: Any, axes: Any) -> bool:
  return is_text(name) and (axes is None or is_text(axes) or all(map(is_text, axes)))


AT_LEAST_0 = number("at least 0", lambda n: n >= 0)
AT_LEAST_1 = number("at least 1", lambda n: n >= 1)
ABOVE_0 = number("more than 0", lambda n: n > 0)
SHARE = number("from 0 to 1", lambda n: 0 <= n <= 1)
BELOW_1 = number("from 0 to less than 1", lambda n: 0 <= n < 1)
SEED = number("from 0 to 4294967295", lambda n: 0 <= n < 2**32)
TEXTS = Accepted("a tuple of texts such as ('a.json',)", lambda items: all(map(is_text, items)))


class OptimizerSettings(NamedTuple):
  """What a group of `config.schedule` may set of its optimizer, and the defaults."""

  accepted: Mapping[str, Accepted]
  defaults: Mapping[str, float]


_B1 = {"b1": BELOW_1}
# AdamW's defaults are config.b1, b2 and eps.
OPTIMIZERS: Mapping[str, OptimizerSettings] = {
  "adamw": OptimizerSettings({**_B1, "b2": BELOW_1, "eps": ABOVE_0}, {}),
  "lion": OptimizerSettings({**_B1, "b2": BELOW_1}, {"b1": 0.9, "b2": 0.99}),
  "adafactor": OptimizerSettings(
    {**_B1, "decay_rate": ABOVE_0, "b2_cap": BELOW_1, "min_dim": AT_LEAST_1, "eps": ABOVE_0},
    {"b1": 0.9, "decay_rate": 0.8, "b2_cap": 0.999, "min_dim": 32, "eps": 1e-30},
  ),
  "muon": OptimizerSettings({**_B1, "rms": ABOVE_0}, {"b1": 0.95, "rms": 0.2}),
}

UNITS = ("steps", "examples", "epochs", "percent")
# The options of a rule of `config.schedule`.
SCHEDULE_OPTIONS: Mapping[str, Accepted] = {
  "peak": AT_LEAST_0,
  "decay": one_of("cosine", "linear", "constant"),
  "optimizer": one_of(*OPTIMIZERS),
  "wd": AT_LEAST_0,
  **{f"warmup_{unit}": SHARE if unit == "percent" else AT_LEAST_0 for unit in UNITS},
}


# The options of an entry of `config.evals`; `files` or `benchmark` says which of the others it has.
_EVAL_OF_BOTH: Mapping[str, Accepted] = {
  "every": Accepted("a number of steps", lambda value: is_whole(value, 1)),
  "limit": Accepted("a whole number of at least 1", lambda value: is_whole(value, 1)),
  "rows": Accepted("a whole number of at least 1", lambda value: is_whole(value, 1)),
  "media": Accepted("a folder", is_text),
}
EVAL_OPTIONS: Mapping[str, Mapping[str, Accepted]] = {
  "files": {"files": TEXTS, **_EVAL_OF_BOTH},
  "benchmark": {
    "benchmark": Accepted("a benchmark of vr eval", is_text),
    "data": Accepted("the benchmark's folder or file", is_text),
    **_EVAL_OF_BOTH,
    "split": Accepted("a split of the benchmark", is_text),
    "mode": one_of("single", "multi"),
    "by": one_of("generation", "likelihood"),
    "parser": one_of("strict", "published"),
    "new_tokens": Accepted("a whole number of at least 1", lambda value: is_whole(value, 1)),
  },
}


def defaults(fields: ConfigDict) -> ConfigDict:
  """The config that has the default of each field."""
  config = ConfigDict()
  for name in fields:
    value, kind = fields[name], fields.get_type(name)
    if isinstance(value, Field):
      value, kind = value.default, value.kind
    if isinstance(value, ConfigDict):
      config[name] = defaults(value)
    else:
      config[name] = placeholder(kind) if value is None else value
  return config


def optional_types(config: ConfigDict) -> dict[str, type]:
  """The type of each field that is not set, by its dotted key."""
  kinds = {key: _type(config, key) for key, value in leaves(config).items() if value is None}
  return {key: kind for key, kind in kinds.items() if kind is not None}


def check_values(config: ConfigDict, fields: ConfigDict) -> None:
  """Refuses values outside of what their fields accept; others than those `fields` pass.

  Raises:
    InputError: naming the key, the value and what is accepted.
  """
  values = leaves(config)
  for key, field in leaves(fields).items():
    value = values.get(key)
    if isinstance(field, Field) and value is not None and not _takes(field.accepted, value):
      raise InputError(f"config.{key}={value!r}: accepted: {field.accepted.words}")
  weights, files = values.get("input.weights"), values.get("input.files", ())
  if weights and len(weights) != len(files):
    raise InputError(
      f"config.input.weights={weights!r}: accepted: a share for each of the {len(files)} of "
      "config.input.files, or ()"
    )
  check_schedule(values.get("schedule", ()), values.get("optimizer", "adamw"))
  check_evals(config.get("evals", ConfigDict()))
  names = config.get("evals", ConfigDict())
  for key in ("early_stop.metric", "sweep_budget.metric"):
    metric = values.get(key)
    if metric is not None and metric.split("/")[1:2] not in [[name] for name in names]:
      raise InputError(
        f"config.{key}={metric!r}: accepted: eval/NAME/METRIC, of one of config.evals "
        f"({', '.join(names) or 'there are none'})"
      )
  if values.get("sweep_budget.steps") and values["sweep_budget.metric"] is None:
    raise InputError(
      f"config.sweep_budget.steps={values['sweep_budget.steps']!r}: no sweep_budget.metric; "
      "accepted: () or, beside it, metric=eval/NAME/METRIC"
    )


def check_schedule(table: Any, optimizer: str = "adamw") -> None:
  """Refuses a `config.schedule` whose rules are not (regex, None) or (regex, options).

  Raises:
    InputError: naming the rule, and the option with what it accepts.
  """
  for index, rule in enumerate(table):
    pattern, options = rule if isinstance(rule, tuple | list) and len(rule) == 2 else (None, None)
    if not isinstance(pattern, str) or not (options is None or isinstance(options, Mapping)):
      raise InputError(f"config.schedule: {rule!r}: expected (regex, None) or (regex, options)")
    where = f"config.schedule.{index}.1"
    named = (options or {}).get("optimizer", optimizer)
    settings = OPTIMIZERS[named].accepted if named in list(OPTIMIZERS) else {}
    known = {**SCHEDULE_OPTIONS, **settings}
    for name, value in (options or {}).items():
      if name not in known:
        raise InputError(f"{where}.{name} is not known{nearest(name, known)}")
      unset = value is None and name.startswith("warmup_")
      if not unset and not _takes(known[name], value):
        raise InputError(f"{where}.{name}={value!r}: accepted: {known[name].words}")


def check_evals(evals: Any) -> None:
  """Refuses entries of `config.evals` that are not {name: {every, files or benchmark, …}}.

  Raises:
    InputError: naming the entry, and the option with what it accepts.
  """
  for name in evals:
    where, options = f"config.evals.{name}", evals[name]
    if not re.fullmatch(r"[\w.-]+", name) or not isinstance(options, Mapping | ConfigDict):
      raise InputError(f"{where}: expected a name of letters and {{option: value}}")
    given = {key: options[key] for key in options if options[key] is not None}
    kinds = [kind for kind in EVAL_OPTIONS if given.get(kind)]
    if len(kinds) != 1:
      raise InputError(f"{where}: expected one of files (for their loss) and benchmark")
    accepted = EVAL_OPTIONS[kinds[0]]
    for key in [kinds[0], "every", *(["data"] if kinds == ["benchmark"] else []), *given]:
      if key not in accepted:
        raise InputError(f"{where}.{key} is not known{nearest(key, accepted)}")
      if key not in given or not _takes(accepted[key], given[key]):
        raise InputError(f"{where}.{key}={given.get(key)!r}: accepted: {accepted[key].words}")


def _takes(accepted: Accepted, value: Any) -> bool:
  """Whether a value holds; one that the test cannot even read does not."""
  try:
    return bool(accepted.holds(value))
  except Exception:  # the value is anything: what no test foresees is refused, not our fault
    return False


def leaves(value: Any, prefix: str = "") -> dict[str, Any]:
  """The fields of a config by their dotted keys."""
  if isinstance(value, ConfigDict):
    return {k: v for key in value for k, v in leaves(value[key], f"{prefix}{key}.").items()}
  return {prefix.rstrip("."): value}


def _type(config: ConfigDict, key: str) -> type | None:
  """The type of the field at a dotted key."""
  *groups, name = key.split(".")
  for group in groups:
    config = config[group]
  return config.get_type(name)
