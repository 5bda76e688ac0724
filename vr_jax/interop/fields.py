"""The fields of a JSON config, read and checked."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipes.errors import InputError


def read_json(file: Path) -> dict[str, Any]:
  """The fields of a JSON file; InputError where it is absent or holds no object."""
  try:
    fields = json.loads(file.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise InputError(f"{file}: no such file") from None
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise InputError(f"{file}: not JSON ({error})") from None
  if not isinstance(fields, dict):
    raise InputError(f"{file}: expected a JSON object, found {type(fields).__name__}")
  return fields


def field(fields: Mapping[str, Any], where: Any, key: str, kind: type, default: Any = None) -> Any:
  """`fields[key]` checked to be a `kind`, or the default; without a default it must be there."""
  value = fields.get(key)
  value = default if value is None else value
  if kind is float and type(value) is int:
    value = float(value)
  if type(value) is not kind:
    raise InputError(f"{where}: {key}={value!r}, expected {kind.__name__}")
  return value


def require(fields: Mapping[str, Any], where: Any, key: str, accepted: tuple, default: Any) -> None:
  """Refuses a value that is not one of the accepted ones."""
  if fields.get(key, default) not in accepted:
    names = ", ".join(repr(a) for a in accepted)
    raise InputError(f"{where}: {key}={fields.get(key)!r} is not supported; accepted: {names}")
