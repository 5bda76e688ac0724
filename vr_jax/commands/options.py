"""The options of a command, made from the dataclasses that its function takes.

A field with `help` in its metadata is an option: its name the option's, its annotation the type,
its default the default. A field without a default must be given.

    batch_size: int = field(default=8, metadata={"help": "answers at once", "metavar": "N"})

Annotations: int, float, str, Path, Literal[...]; `X | None`; bool, a flag that turns the default
round; tuple[X, ...], one value or more; tuple[X, Y], two. Further keys of the metadata:

    metavar     what stands for the value in the help
    choices     the accepted values, or a function that gives them
    flag        the option's name, where it is not the field's ("--judge"; "--no-meteor" of a bool
                that is True by default)
    positional  True: the value is given by its place
    repeat      True: the option is given once for each value of a tuple
"""

import argparse
import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
# What several commands have in common.
CONFIG = {"help": "a config file or a packaged name", "metavar": "F.py[:ARGS]"}
RECORDS = {
  "positional": True,
  "help": "a JSON array, or a folder of shards",
  "metavar": "FILE",
}
MEDIA = {"help": "the media are relative to DIR", "metavar": "DIR"}

OVERRIDES = "overrides"  # the argument of a function that takes `--config.key=value`


def options_of(function: Callable) -> dict[str, type]:
  """The dataclasses among a function's arguments, by the argument's name."""
  hints = typing.get_type_hints(function)
  names = [name for name in inspect.signature(function).parameters if name in hints]
  return {name: hints[name] for name in names if dataclasses.is_dataclass(hints[name])}


def takes_overrides(function: Callable) -> bool:
  return OVERRIDES in inspect.signature(function).parameters


def add_options(parser: argparse.ArgumentParser, kind: type) -> list[str]:
  """Adds the options of a dataclass to a parser; returns their names as one types them."""
  hints = typing.get_type_hints(kind)
  names: list[str] = []
  for field in _fields(kind):
    words = _argument(field, hints[field.name])
    if field.metadata.get("positional"):
      parser.add_argument(field.name, **words)
    else:
      flag = field.metadata.get("flag") or f"--{field.name.replace('_', '-')}"
      required = field.default is dataclasses.MISSING
      parser.add_argument(flag, dest=field.name, required=required, **words)
      names.append(flag)
  return names


def read_options(args: argparse.Namespace, kind: type[T]) -> T:
  """The dataclass with what was given; InputError where it refuses a value."""
  values = {field.name: getattr(args, field.name) for field in _fields(kind)}
  return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def unknown_option(words: Sequence[str], names: Iterable[str]) -> str | None:
  """The first word that looks like an option and is neither one of `names` nor the start of one.

  argparse reports it too, but only when nothing else is amiss.
  """
  for word in words:
    if word == "--":
      return None
    name = word.partition("=")[0]
    if name.startswith("--") and " " not in name and not any(n.startswith(name) for n in names):
      return name
  return None


def _fields(kind: type) -> list[dataclasses.Field]:
  return [f for f in dataclasses.fields(kind) if "help" in f.metadata]  # type: ignore[arg-type]


def _argument(field: dataclasses.Field, hint: Any) -> dict[str, Any]:
  """The keywords of `add_argument` for a field with this annotation."""
  words = {k: field.metadata[k] for k in ("help", "metavar", "choices") if k in field.metadata}
  if callable(words.get("choices")):
    words["choices"] = words["choices"]()
  if field.default is not dataclasses.MISSING:
    words["default"] = field.default
  hint = _without_none(hint)
  items = typing.get_args(hint)
  if hint is bool:
    words["action"] = "store_false" if field.default is True else "store_true"
  elif typing.get_origin(hint) is typing.Literal:
    words["choices"] = items
  elif typing.get_origin(hint) is not tuple:
    words["type"] = hint
    if field.metadata.get("positional") and "default" in words:
      words["nargs"] = "?"
  elif field.metadata.get("repeat"):
    words |= {"type": items[0], "action": "append", "default": list(field.default)}
  else:
    least = "*" if field.metadata.get("positional") and field.default == () else "+"
    words |= {"type": items[0], "nargs": least if items[1] is ... else len(items)}
  return words


def _without_none(hint: Any) -> Any:
  """X of `X | None`."""
  if typing.get_origin(hint) in (typing.Union, types.UnionType):
    (hint,) = (item for item in typing.get_args(hint) if item is not type(None))
  return hint
