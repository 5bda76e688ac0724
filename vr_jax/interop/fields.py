"""The fields of a JSON config, read and checked.

Configs are other people's: any field may be absent, of another type, zero, negative or huge. What
is read here has its type and a range, so that what follows neither fails nor runs for ever.
"""

import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipes.errors import InputError
from data_pipes.lfs import refuse_pointer

WIDTH = 1 << 20  # the most that a width or a number of heads may be
DEPTH = 1 << 10  # layers
IDS = 1 << 24  # ids of a vocabulary, positions of a text


def read_json(file: Path) -> dict[str, Any]:
  """The fields of a JSON file; InputError where it is absent or holds no object."""
  refuse_pointer(file)
  try:
    fields = json.loads(file.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise InputError(f"{file}: no such file") from None
  except OSError as error:
    raise InputError(f"{file}: cannot be read ({error.strerror})") from None
  except (ValueError, RecursionError) as error:  # no JSON, no UTF-8; too long a number, too deep
    raise InputError(f"{file}: not JSON ({error})") from None
  if not isinstance(fields, dict):
    raise InputError(f"{file}: expected a JSON object, found {type(fields).__name__}")
  return fields


def read_config(file: Path) -> dict[str, Any]:
  """The fields of a model's config.json; InputError where its weights are quantised."""
  fields = read_json(file)
  for part in (fields, *(fields.get(name) for name in ("text_config", "vision_config"))):
    if isinstance(part, Mapping) and (how := part.get("quantization_config")):
      method = how.get("quant_method", "bitsandbytes") if isinstance(how, Mapping) else how
      raise InputError(
        f"{file}: quantization_config: the weights are quantised ({shown(method)}); accepted: "
        "float32, float16 or bfloat16, as the release that they were made from has them"
      )
  return fields


def shown(value: Any) -> str:
  """A value in an error: cut where it is long."""
  return reprlib.repr(value)


def field(fields: Mapping[str, Any], where: Any, key: str, kind: type, default: Any = None) -> Any:
  """`fields[key]` checked to be a `kind`, or the default; without a default it must be there."""
  value = fields.get(key)
  value = default if value is None else value
  if kind is float and type(value) is int and abs(value) < 1 << 60:
    value = float(value)
  if type(value) is not kind:
    raise InputError(f"{where}: {key}={shown(value)}, expected {kind.__name__}")
  return value


def size(
  fields: Mapping[str, Any],
  where: Any,
  key: str,
  default: int | None = None,
  *,
  least: int = 1,
  most: int = WIDTH,
) -> int:
  """A whole number from `least` to `most`."""
  value = field(fields, where, key, int, default)
  if not least <= value <= most:
    raise InputError(f"{where}: {key}={shown(value)}; accepted: {least} to {most}")
  return value


def positive(
  fields: Mapping[str, Any], where: Any, key: str, default: float | None = None
) -> float:
  """A number above 0 that float32 holds."""
  value = field(fields, where, key, float, default)
  if not 1e-37 < value < 3e38:
    raise InputError(f"{where}: {key}={value!r}; accepted: a number above 0 that float32 holds")
  return value


def optional(read: Any, fields: Mapping[str, Any], where: Any, key: str, **options: Any) -> Any:
  """What `read` (`size` or `positive`) makes of a field; None where it is null or absent."""
  return None if fields.get(key) is None else read(fields, where, key, **options)


def section(fields: Mapping[str, Any], where: Any, key: str) -> dict[str, Any]:
  """The fields of an object in a config, {} where it is null or absent."""
  return field(fields, where, key, dict, {})


def require(fields: Mapping[str, Any], where: Any, key: str, accepted: tuple, default: Any) -> None:
  """Refuses a value that is not one of the accepted ones."""
  value = fields.get(key, default)
  if value not in accepted:
    names = ", ".join(repr(a) for a in accepted)
    raise InputError(f"{where}: {key}={shown(value)} is not supported; accepted: {names}")
