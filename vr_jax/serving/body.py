"""A JSON body as a tree whose every value knows its path, so that a refusal can name it."""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from data_pipes.errors import InputError, nearest, shown
from data_pipes.json_items import check_text
from vr_jax.serving.errors import ApiError

LONGEST = 1 << 20  # characters of a text; what is longer is no question


def parse(text: str) -> "Node":
  """The body of a request.

  Raises:
    ApiError: no JSON object; NaN and Infinity, which JSON does not have, are refused too.
  """
  try:
    value = json.loads(text, parse_constant=_refuse_constant)
  except (ValueError, RecursionError) as error:
    raise ApiError(400, f"the body cannot be read as JSON ({error})", code="invalid_json") from None
  if not isinstance(value, dict):
    raise ApiError(400, f"the body is {shown(value)}; accepted: a JSON object", code="invalid_json")
  return Node(value, "")


def _refuse_constant(name: str) -> NoReturn:
  raise ValueError(f"{name} is no JSON")


@dataclass(frozen=True)
class Node:
  """A value of the body and its path. Methods that read it raise ApiError where it is no such."""

  value: Any
  path: str

  def error(self, accepted: str, *, status: int = 400, code: str | None = None) -> ApiError:
    """The refusal of this value, which says what is accepted."""
    return ApiError(
      status, f"{self.path}: {shown(self.value)}; accepted: {accepted}", param=self.path, code=code
    )

  def refusal(self, message: object, *, status: int = 400, code: str | None = None) -> ApiError:
    """A refusal in other words."""
    return ApiError(status, f"{self.path}: {message}", param=self.path, code=code)

  def __contains__(self, key: str) -> bool:
    """Whether there is a field; one that is null is not."""
    return self.value.get(key) is not None

  def __getitem__(self, key: str) -> "Node":
    return Node(self.value.get(key), f"{self.path}.{key}" if self.path else key)

  def fields(self, known: Iterable[str]) -> "Node":
    """Itself, being an object without other fields than those."""
    if not isinstance(self.value, dict):
      raise self.error("an object")
    known = list(known)
    for key in self.value:
      if key not in known:
        hint = nearest(key, known) or f"; accepted: {', '.join(known)}"
        raise self[key].refusal(f"unknown field{hint}", code="unknown_parameter")
    return self

  def items(self, least: int = 0, most: int = 1 << 20) -> "Iterator[Node]":
    if not isinstance(self.value, list) or not least <= len(self.value) <= most:
      how_many = f"{least} to {most}" if least else f"up to {most}"
      raise self.error(f"a list of {how_many} entries")
    return (Node(value, f"{self.path}[{i}]") for i, value in enumerate(self.value))

  def text(self, longest: int = LONGEST, *, empty: bool = True) -> str:
    if not isinstance(self.value, str) or not (self.value or empty):
      raise self.error("text")
    if len(self.value) > longest:
      raise self.error(f"text of up to {longest} characters")
    try:
      check_text([self.value], self.path)
    except InputError as error:
      raise ApiError(400, str(error), param=self.path) from None
    return self.value

  def choice(self, accepted: Iterable[str]) -> str:
    accepted = tuple(accepted)
    if not isinstance(self.value, str) or self.value not in accepted:
      raise self.error(", ".join(accepted))
    return self.value

  def flag(self) -> bool:
    if not isinstance(self.value, bool):
      raise self.error("true, false")
    return self.value

  def whole(self, low: int, high: int) -> int:
    value = self.value
    is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not is_whole or not low <= value <= high:
      raise self.error(f"a whole number from {low} to {high}")
    return int(value)

  def number(self, low: float = -math.inf, high: float = math.inf) -> float:
    value = self.value
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
      span = f" from {low:g} to {high:g}" if math.isfinite(high - low) else ""
      raise self.error(f"a number{span}")
    if not math.isfinite(value) or abs(value) > 1e12:  # 1e999 is JSON, and too large for a float
      raise self.error("a number of everyday size")
    return value
