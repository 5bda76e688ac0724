"""Configs: a Python file with `get_config(arg)` becomes a locked, checked, storable ConfigDict.

    load_config("stage2_region")                                # a packaged one, by name
    load_config("my/run.py:frames=8,debug", ["config.lr=1e-4"]) # a file, its arguments, overrides

The words are big_vision's (`schedule`, `mesh`, `sharding_strategy`, `model_init`, …); differences
are noted beside the field in `_fields`. A config file starts from `base_config()`, which is
locked: an unknown field is an error that names the nearest one.
"""

import functools
import importlib.util
import inspect
import json
import re
import sys
import traceback
from ast import literal_eval
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from data_pipes.buckets import here
from data_pipes.errors import InputError, nearest
from vr_jax.addresses import local, local_or_bucket
from vr_jax.config_values import (
  ABOVE_0,
  AT_LEAST_0,
  AT_LEAST_1,
  BELOW_1,
  OPTIMIZERS,
  SEED,
  SHARE,
  TEXTS,
  Accepted,
  Field,
  check_values,
  defaults,
  is_axis,
  is_best,
  is_factor,
  is_mesh,
  is_pattern,
  is_rising,
  is_text,
  is_whole,
  is_window,
  leaves,
  one_of,
  optional_types,
  rows,
)
from vr_jax.sharding import FSDP_RULES, FSDP_STRATEGY

# The arguments that every stage of the recipe takes.
RECIPE = {
  "data": "data",  # folder of the annotation files, which media paths are relative to
  "model": "videorefer-7b",
  "rows": 1,  # that a device works on at a time
  "slices": 1,  # of TPUs, joined by the data center network
  "tensor": 1,  # devices that share the decoder's heads and hidden units
  "sequence": False,  # they share the slots of a row too, for long videos
}
EVAL_PATHS = ("files", "data", "media")
OPEN = ("evals",)  # groups whose names the config chooses
PATHS = ("tokenizer", "model_init", "input.files", "input.media", "input.features")
_SCALARS = (bool, int, float, str, type(None))


def base_config() -> ConfigDict:
  """Every field that training reads, with its default; locked. `None` means not set."""
  return defaults(_fields()).lock()


def check_config(config: ConfigDict) -> None:
  """Refuses values that the fields do not accept, before anything is read or written.

  Raises:
    InputError: naming the key, the value and what is accepted.
  """
  check_values(config, _fields())


@functools.cache
def _optional() -> dict[str, type]:
  return optional_types(base_config())


@functools.cache
def _fields() -> ConfigDict:
  """Every field that training reads; those with a range of values as a `Field`."""
  config = ConfigDict()
  config.seed = Field(42, SEED)
  # What is trained: "videorefer", or "module:function" (training/task.py).
  config.task = Field("videorefer", Accepted("a name, or module:function", is_text))

  # The model: a variant by name, dotted changes to it, and what it starts from.
  config.model_name = placeholder(str)  # default: the model of the first checkpoint in model_init
  # (("llm.remat", "dots"), …): fields of VideoReferConfig
  config.model = Field((), rows("((field, value), …)", lambda name, value: is_text(name)))
  # Weights to start from: ((part such as "img", or "" for all, path), …), later ones over earlier
  # ones; training/start.py lists what a path may be. Parameters whose names match `dont_load`, and
  # those of parts not named, are initialised.
  config.model_init = Field(
    (),
    rows("((part or '', path), …)", lambda part, path: isinstance(part, str) and is_text(path)),
  )
  config.dont_load = Field(
    (), Accepted("a tuple of regexes such as ('region/.*',)", lambda v: all(map(is_pattern, v)))
  )
  config.tokenizer = placeholder(str)  # folder of tokenizer files; default: that of model_init
  # Frozen parameters in memory: "float32", "bfloat16", or "int8": the decoder's matrices with a
  # scale for each column, the others in bfloat16 (QLoRA; extra [int8]).
  config.frozen_dtype = Field("float32", one_of("float32", "bfloat16", "int8"))

  config.input = _input_fields()

  # How long: one of these; a fraction of an epoch is fine.
  config.total_steps = Field(None, AT_LEAST_1, int)
  config.total_examples = Field(None, AT_LEAST_1, int)
  config.total_epochs = Field(None, ABOVE_0, float)

  # Loss: supervised tokens a row can hold (0: as many as its slots), vocabulary entries in a piece
  # of logits.
  config.loss_budget = Field(0, AT_LEAST_0)
  config.loss_chunk = Field(16_384, AT_LEAST_1)
  # "tokens": the mean over all supervised tokens of the step, whatever accum_steps is.
  # "published": the mean over parts of their means (transformers 4.40).
  config.accum_mean = Field("tokens", one_of("tokens", "published"))

  # Optimizer: "adamw", "lion", "adafactor" (big_vision's), or "muon" (matrices; the rest AdamW).
  config.optimizer = Field("adamw", one_of(*OPTIMIZERS))
  # `schedule`: (path regex, None | options), first match wins, None is frozen; options:
  # peak (times lr), warmup_{steps,examples,epochs,percent}, decay ("cosine"|"linear"|"constant"),
  # and in the place of those of all groups: optimizer, wd, and the optimizer's own settings (b1,
  # b2, eps of AdamW; b1, b2 of Lion; b1, decay_rate, b2_cap, min_dim, eps of Adafactor; b1, rms
  # of Muon, whose step is as large as AdamW's at rms 0.2).
  # Unlike big_vision's, warmup_percent is rounded up and starts from lr 0, as transformers does.
  config.lr = Field(1e-3, AT_LEAST_0)
  config.schedule = ((".*", {"warmup_percent": 0.03, "decay": "cosine"}),)
  config.wd = Field(0.0, AT_LEAST_0)
  # (path regex, factor on wd), first match wins
  config.wd_mults = Field(
    ((".*", 1.0),), rows("((regex, factor of at least 0), …)", lambda p, f: is_factor(f))
  )
  config.b1 = Field(0.9, BELOW_1)  # of AdamW, as b2 and eps
  config.b2 = Field(0.999, BELOW_1)
  config.eps = Field(1e-8, ABOVE_0)
  # Of moments in memory (Adafactor's second one is factored and float32). What bfloat16 drops is
  # made up for over the steps, see `training/optimizers.py`.
  config.moments_dtype = Field("float32", one_of("float32", "bfloat16"))
  config.grad_clip_norm = Field(1.0, AT_LEAST_0)  # 0: no clipping
  # Such as 0.9999: a running mean of the trained parameters, in the end written to W/ema; 0: none.
  # It warms up, so that the first parameters have no weight of their own: after step t (from 0)
  # the decay is at most (1 + t) / (10 + t).
  config.ema_decay = Field(0.0, BELOW_1)
  # A step whose gradient is not finite, or whose batch has no supervised token, changes nothing and
  # is counted; so many in a row end the run.
  config.max_skipped = Field(10, AT_LEAST_1)

  # Devices. Outermost axis first; one size may be -1.
  config.mesh = Field(
    (("data", -1), ("fsdp", 1)),
    Accepted("((axis, size of at least 1), …), one size may be -1", lambda v: v and is_mesh(v)),
  )
  # Of parameters; sharding.py has tables to choose from.
  config.sharding_strategy = Field(
    FSDP_STRATEGY, rows("((regex, rule), …)", lambda pattern, rule: is_text(rule))
  )
  config.sharding_rules = Field(FSDP_RULES, rows("((name, mesh axes), …)", is_axis))

  # How good the run is while it trains: {name: {every: steps, and
  #   files: annotation files whose loss is measured; or benchmark, data: as of vr eval}}, with
  # limit (items), media, rows (at a time); of a benchmark also mode, by, split, parser, new_tokens.
  # Evaluated every so many steps and after the last; reported as eval/<name>/<metric>.
  config.evals = ConfigDict()
  # Ends the run when a metric has not become better in `patience` evaluations in a row.
  config.early_stop = ConfigDict()
  config.early_stop.metric = placeholder(str)  # such as "eval/held_out/loss"
  config.early_stop.patience = Field(3, AT_LEAST_1)

  # Of `vr sweep`: after each of these numbers of steps the best share of the members by a metric
  # goes on, the others are dropped; (): all members are trained to their end.
  config.sweep_budget = ConfigDict()
  config.sweep_budget.metric = placeholder(str)  # such as "eval/held_out/loss"
  config.sweep_budget.steps = Field(
    (), Accepted("steps that grow", lambda v: all(is_whole(n, 1) for n in v) and is_rising(v))
  )
  config.sweep_budget.keep = Field(0.5, SHARE)

  # What is written, and when. Losses and norms in the log are means over the steps since its last
  # line.
  config.log_steps = Field(10, AT_LEAST_1)
  config.wandb = ""  # project of Weights & Biases that the metrics go to as well; extra [wandb]
  # Steps that are traced to W/profile, for XProf or Perfetto.
  config.profile_steps = Field((), Accepted("(first, last), from 1, or ()", is_window))
  # Without progress, after which the process at fault is named.
  config.stall_seconds = Field(600.0, ABOVE_0)
  config.ckpt_steps = Field(1000, AT_LEAST_1)
  config.keep_ckpts = Field(1, AT_LEAST_1)
  config.keep_ckpt_steps = Field(None, AT_LEAST_1, int)  # every so-many-th step's for good
  # (metric, "min" or "max"), such as ("loss", "min"): the checkpoint of the best value stays too.
  # Any number of metrics.jsonl; it counts where it was measured at the step that is saved.
  config.keep_best = Field((), Accepted("(metric, 'min' or 'max'), or ()", is_best))
  return config


def _input_fields() -> ConfigDict:
  """The fields of `config.input`: what is read, and how it becomes rows of a batch."""
  config = ConfigDict()
  # Annotation files in the published JSON format, or folders of shards (vr data prepare).
  config.files = Field((), TEXTS)
  config.media = "."  # folder that the videos and images of the files are relative to
  config.features = Field((), TEXTS)  # caches of features, one for each of files (vr data features)
  config.batch_size = Field(8, AT_LEAST_1)  # examples of one optimizer step, over all devices
  config.accum_steps = Field(1, AT_LEAST_0)  # the step works through the batch in so many equal
  config.device_rows = Field(1, AT_LEAST_1)  # parts; 0: as many as leave each device these rows
  # Shares in which to draw from the files; default: joined and shuffled.
  config.weights = Field(
    (),
    Accepted("() or a share of more than 0 for each file", lambda v: all(map(ABOVE_0.holds, v))),
  )
  config.shuffle = True
  # How the seeds of epochs follow from `seed`; a run that goes on keeps the rule it began with:
  # "consecutive" (epoch 1 of seed 42 is epoch 0 of seed 43) before there was this field.
  config.epoch_seeds = Field("spread", one_of("spread", "consecutive"))
  config.threads = Field(4, AT_LEAST_1)  # that decode
  config.max_unreadable = Field(0.01, SHARE)  # of the samples, above which the run fails
  config.max_empty = Field(0.1, SHARE)  # of the batches without a supervised token, likewise
  config.templated = True  # chat template, answers supervised; False: plain text (stage 1)
  # Frames of an object; "half": of the rows each.
  config.masks = Field("multi", one_of("single", "multi", "half"))
  config.single_frame = Field("first", one_of("first", "random"))  # which frame in single mode
  config.max_mask_frames = Field(32, AT_LEAST_1)
  # Masks on the tower's grid: "published", by which small objects vanish, or "keep": those keep the
  # cells they cover most.
  config.mask_rule = Field("keep", one_of("published", "keep"))
  # A row is one sample, all rows of one shape; or several samples, packed into so many slots, such
  # as 8192; or one sample in the shortest of up to three lengths that holds it. batch_size and
  # "examples" count rows.
  config.pack = Field(0, AT_LEAST_0)
  config.buckets = Field(
    (),
    Accepted(
      "up to three lengths of at least 1", lambda v: len(v) <= 3 and all(is_whole(n, 1) for n in v)
    ),
  )
  # Static sizes of a row; 0: what the largest record needs, or nine of ten packed rows (reads the
  # text of all records once).
  config.row_frames = Field(0, AT_LEAST_0)
  config.row_clips = Field(0, AT_LEAST_0)  # of packed rows
  config.row_objects = Field(0, AT_LEAST_0)
  config.row_object_frames = Field(0, AT_LEAST_0)
  config.row_length = Field(0, AT_LEAST_0)
  return config


def load_config(spec: str, overrides: Iterable[str] = ()) -> ConfigDict:
  """Runs a config file and returns its locked config.

  Args:
    spec: `path/to/file.py`, or the name of a packaged config (`stage2_region`, with or without
      `configs/` and `.py`), then optionally `:key=value,flag` for its `get_config(arg)`.
    overrides: `config.key=value` (or `key=value`); nested fields with dots, items of a table by
      number (`schedule.1.1.peak=0.5`). The value must be of the field's type; `None` unsets a field
      that may be None.

  Raises:
    InputError: no such config, an error in the file, an unknown key or argument (the nearest one
      is named), a value of the wrong type or out of range, an address that is not read.
  """
  name, arg = split_spec(spec)
  path = find_config(name)
  try:
    config = _call(path, arg)
  except InputError as error:
    raise InputError(f"{path.name}: {error}") from error
  except Exception as error:
    raise fault_in(path, error) from error
  if not isinstance(config, ConfigDict):
    raise InputError(f"{path}: get_config returned {type(config).__name__}, not a ConfigDict")
  config = normalized(config, "config")
  for override in overrides:
    _override(config, override)
  check_config(config)
  _localize(config)
  return config.lock()


def _localize(config: ConfigDict) -> None:
  """Expands `~` in the paths of a config; refuses addresses that are not read."""

  def expanded(value: Any, where: str) -> Any:
    if isinstance(value, tuple):
      return tuple(expanded(item, where) for item in value)
    accepted = local if where == "config.input.media" else local_or_bucket
    return accepted(value, where) if isinstance(value, str) else value

  evals = [f"evals.{name}.{key}" for name in config.get("evals", ()) for key in EVAL_PATHS]
  for key in (*PATHS, *evals):
    *groups, name = key.split(".")
    node = config
    for group in groups:
      node = node.get(group, ConfigDict())
    if name in node:
      node[name] = expanded(node[name], f"config.{key}")


def packaged_configs() -> dict[str, Path]:
  """The configs that come with vr_jax, by name: of the checkout, or of the installed package."""
  package = Path(__file__).parent
  for folder in (package / "configs", package.parent / "configs"):
    if folder.is_dir():
      return {path.stem: path for path in sorted(folder.glob("*.py")) if path.stem != "__init__"}
  return {}


def find_config(name: str) -> Path:
  """The file of a config given by path or by the name of a packaged one."""
  path = here(local_or_bucket(name, "config"))
  if path.suffix == ".py" and path.is_file():
    return path
  packaged = packaged_configs()
  if path.parent in (Path(), Path("configs")) and path.suffix in ("", ".py"):
    if path.stem in packaged:
      return packaged[path.stem]
    hint = nearest(path.stem, packaged)
  else:
    hint = ""
  raise InputError(
    f"config {name!r}: no such file and no packaged config of that name{hint}; "
    f"packaged: {', '.join(packaged) or 'none'}"
  )


def parse_arg(arg: str | None, **defaults: Any) -> ConfigDict:
  """Reads the argument string of `get_config`: `key=value,flag` over the given defaults.

  A bare `flag` is `flag=true`. Values take the type of their default (one that is None takes a
  number if it reads as one, else the text).

  Raises:
    InputError: an argument that has no default here, or a value of another type.
  """
  values = dict(defaults)
  for item in filter(None, (arg or "").split(",")):
    key, equals, text = item.partition("=")
    if key not in defaults:
      raise InputError(
        f"argument {key!r} is not known{nearest(key, defaults)}; "
        f"accepted: {', '.join(defaults) or 'none'}"
      )
    values[key] = _parse(text if equals else "true", defaults[key], f"argument {key}")
  return ConfigDict(values)


def arg(**values: Any) -> dict[str, str]:
  """Arguments of `get_config`, for `add` of a sweep: `add(lr=1e-5, **arg(tokens=4))`."""
  return {"config_arg": as_arg(ConfigDict(values), values)}


def as_arg(arg: ConfigDict, names: Iterable[str]) -> str:
  """The argument string with which `parse_arg` reads those values again."""
  return ",".join(f"{name}={arg[name]}" for name in names)


def to_json(config: ConfigDict) -> str:
  """The resolved config as JSON; `from_json` gives an equal config back."""

  def plain(value):
    if isinstance(value, ConfigDict | Mapping):
      return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, tuple | list) else value

  return json.dumps(plain(config), indent=2)


def from_json(text: str) -> ConfigDict:
  """Reads what `to_json` wrote (lists come back as tuples); locked."""
  return normalized(ConfigDict(json.loads(text)), "config").lock()


def diff(a: ConfigDict, b: ConfigDict) -> dict[str, tuple[Any, Any]]:
  """The fields in which two configs differ: {dotted key: (value in a, value in b)}.

  A field that one of them lacks has the value `MISSING` there.
  """
  left, right = leaves(a), leaves(b)
  keys = list(left) + [key for key in right if key not in left]
  pairs = {key: (left.get(key, MISSING), right.get(key, MISSING)) for key in keys}
  return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


class _Missing:
  def __repr__(self) -> str:
    return "(not there)"


MISSING = _Missing()


def check_keys(given: Mapping, known: Iterable[str], where: str) -> None:
  """Refuses keys that nobody reads.

  Raises:
    InputError: naming the key and the nearest known one.
  """
  known = list(known)
  for key in given:
    if key not in known:
      raise InputError(f"{where}.{key} is not known{nearest(key, known)}")


def split_spec(spec: str) -> tuple[str, str | None]:
  """The file and the argument string of a spec; see `load_config`."""
  match = re.fullmatch(r"(.+?\.py|[^:]+)(?::(.*))?", spec, re.DOTALL)
  if not match:
    raise InputError(f"config {spec!r}: expected FILE.py, NAME or either with :key=value,flag")
  return match[1], match[2]


def load_module(path: Path) -> ModuleType:
  """The module of a config file.

  Raises:
    InputError: it defines no `get_config`.
  """
  # The module's name must not shadow anything a config imports.
  module_spec = importlib.util.spec_from_file_location(f"_vr_config_{path.stem}", path)
  assert module_spec is not None  # the file is there
  assert module_spec.loader is not None  # and ends in .py
  module = importlib.util.module_from_spec(module_spec)
  # A config that was only read leaves no files behind.
  before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
  try:
    module_spec.loader.exec_module(module)
  finally:
    sys.dont_write_bytecode = before
  if not callable(getattr(module, "get_config", None)):
    raise InputError("the file defines no get_config()")
  return module


def _call(path: Path, arg: str | None) -> Any:
  module = load_module(path)
  if inspect.signature(module.get_config).parameters:
    return module.get_config(arg)
  if arg:
    raise InputError(f"get_config() takes no argument, got {arg!r}")
  return module.get_config()


def fault_in(path: Path, error: Exception) -> InputError:
  """One line about an error in the code of a config file: file, line number, what happened."""
  return InputError(f"{path}{_line(error, path)}: {_one_line(error)}")


def _line(error: Exception, path: Path) -> str:
  if isinstance(error, SyntaxError):
    return f":{error.lineno}"
  lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
  return f":{lines[-1]}" if lines else ""


def _one_line(error: Exception) -> str:
  unknown = re.match(r"'?\"?Key \"(.+?)\" does not exist", str(error))
  if unknown and isinstance(error, AttributeError | KeyError):
    return f"config has no field {unknown[1]!r}{nearest(unknown[1], leaves(base_config()))}"
  text = re.search(
    r"(\S+) is of original type <class 'str'> and .* type <class 'tuple'>", str(error)
  )
  if text and isinstance(error, TypeError):
    return f"{text[1]!r} is no tuple; write ({text[1]!r},)"
  return f"{type(error).__name__}: {' '.join(str(error).split())}"


def normalized(value: Any, where: str) -> Any:
  """Nested mappings to ConfigDicts, lists to tuples, so that JSON and back changes nothing."""
  if isinstance(value, ConfigDict):
    out = ConfigDict()
    for key in value:
      child = normalized(value[key], f"{where}.{key}")
      # Keep the type of a field that is not set yet, so that an override is checked against it.
      out[key] = placeholder(value.get_type(key)) if child is None else child
    return out
  if isinstance(value, Mapping):
    return {str(k): normalized(v, f"{where}.{k}") for k, v in value.items()}
  if isinstance(value, tuple | list):
    return tuple(normalized(v, f"{where}.{i}") for i, v in enumerate(value))
  if isinstance(value, np.generic):
    value = value.item()
  if isinstance(value, _SCALARS):
    return value
  raise InputError(
    f"{where} is a {type(value).__name__}; a config holds numbers, strings, None, tuples, dicts"
  )


def _override(config: ConfigDict, text: str) -> None:
  key, equals, value = text.removeprefix("--").partition("=")
  if not equals:
    raise InputError(f"override {text!r}: expected config.key=value; write --{key}=VALUE")
  key = key.removeprefix("config.")

  def replaced(node: Any, names: list[str]) -> Any:
    """`node` with the item at `names` set; tables (tuples, dicts) are rebuilt."""
    name, *rest = names
    if isinstance(node, tuple):
      if not name.isdigit() or int(name) >= len(node):
        raise InputError(f"config.{key}: expected an item from 0 to {len(node) - 1}, got {name!r}")
      index = int(name)
      return (*node[:index], item(node[index], rest, None), *node[index + 1 :])
    if isinstance(node, ConfigDict) and name not in node and key.split(".")[0] in OPEN:
      node[name] = replaced(ConfigDict(), rest) if rest else _literal(value, f"config.{key}")
      return node
    if not isinstance(node, ConfigDict | dict) or name not in node:
      raise InputError(f"config.{key} is not known{nearest(key, leaves(config))}")
    if isinstance(node, ConfigDict):
      node[name] = item(node[name], rest, node.get_type(name))
      return node
    return {**node, name: item(node[name], rest, None)}

  def item(old: Any, rest: list[str], kind: type | None) -> Any:
    if rest:
      return replaced(old, rest)
    if isinstance(old, ConfigDict) and key.split(".")[0] in OPEN:
      return ConfigDict(_parse(value, dict, f"config.{key}"))
    if isinstance(old, ConfigDict):
      raise InputError(f"config.{key} is a group; set one of its fields: {', '.join(old)}")
    unset = _optional().get(key)
    if unset and value.lower() == "none":
      return None
    return _parse(value, unset or (kind if old is None and kind else old), f"config.{key}")

  replaced(config, key.split("."))


def _as_tuple(text: str) -> tuple[Any]:
  """The tuple that was meant by `('a.json')` or `a.json`."""
  try:
    return (literal_eval(text),)
  except (ValueError, SyntaxError):
    return (text,)


def _parse(text: str, like: Any, where: str) -> Any:
  """The value of `text` in the type of `like` (a value, or a type for a field that is not set)."""
  kind = like if isinstance(like, type) else type(like)
  try:
    if kind is bool:
      return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
    if kind in (int, float):
      return None if like is kind and text.lower() == "none" else kind(text)
    if kind is str:
      return text
    if kind in (tuple, list, dict):
      value = literal_eval(text)
      if not isinstance(value, dict if kind is dict else tuple | list):
        raise ValueError
      return normalized(value, where)
  except (ValueError, KeyError, SyntaxError):
    shown = "tuple such as (1, 2)" if kind is tuple else kind.__name__
    if kind is tuple and text:
      shown = f"tuple; one of a single item is written {_as_tuple(text)}"
    raise InputError(f"{where}={text!r}: expected {shown}") from None
  return _literal(text, where)  # the default is None and has no type


def _literal(text: str, where: str) -> Any:
  """The literal that a text reads as, else the text."""
  try:
    return normalized(literal_eval(text), where)
  except (ValueError, SyntaxError):
    return text
