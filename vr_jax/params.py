"""Parameter trees: nested dicts of arrays, the paths of their leaves, tables of rules over paths.

Tables are ordered `(path regex, rule)` pairs: the first match wins, and a table must be total
(every parameter covered) and tight (every rule used).
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, TypeVar

import flax
import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from data_pipes.errors import InputError
from vr_jax.sharding import tactic

Params = dict[str, Any]
Rule = TypeVar("Rule")
Shapes = Mapping[str, tuple[int, ...]]


class Parameters(Protocol):
  """Our parameters by path, wherever they lie; values are read when they are asked for."""

  @property
  def shapes(self) -> Shapes: ...

  def dtype(self, path: str) -> np.dtype: ...

  def read(self, path: str, index: tuple[int, ...] = ()) -> np.ndarray:
    """The parameter at `index` of its leading axes."""
    ...


class Tree:
  """Parameters in memory: a nested dict of arrays."""

  def __init__(self, params: Mapping[str, Any]):
    self._flat = flax.traverse_util.flatten_dict(params, sep="/")
    self.shapes = {path: tuple(array.shape) for path, array in self._flat.items()}

  def dtype(self, path: str) -> np.dtype:
    return np.dtype(self._flat[path].dtype)

  def read(self, path: str, index: tuple[int, ...] = ()) -> np.ndarray:
    return np.asarray(self._flat[path])[index]


def path_names(tree: Any) -> Any:
  """The tree with each leaf replaced by its path, keys joined by "/" (`llm/layers/attn/…`)."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: jax.tree_util.keystr(path, simple=True, separator="/"), tree
  )


def by_path(tree: Any) -> dict[str, Any]:
  """The leaves of a tree by their paths, in the tree's order."""
  return dict(zip(jax.tree.leaves(path_names(tree)), jax.tree.leaves(tree), strict=True))


def merge(a: Params, b: Params) -> Params:
  """The union of two nested dicts without a common leaf."""
  out = dict(a)
  for key, value in b.items():
    out[key] = merge(a[key], value) if key in a else value
  return out


def sub_tree(tree: Mapping[str, Any], like: Mapping[str, Any]) -> Params:
  """The leaves of a nested dict at the places where `like` has leaves."""
  return {
    key: sub_tree(tree[key], value) if isinstance(value, Mapping) else tree[key]
    for key, value in like.items()
  }


def shared(tree: Mapping[str, Any], like: Mapping[str, Any]) -> Params:
  """The leaves of a nested dict at those places of `like` that it has."""
  out: Params = {}
  for key in like:
    if key not in tree:
      continue
    if not isinstance(like[key], Mapping):
      out[key] = tree[key]
    elif part := shared(tree[key], like[key]):
      out[key] = part
  return out


def match_table(tree: Any, table: Iterable[tuple[str, Rule]], field: str) -> Any:
  """The tree with each leaf replaced by the rule of the first regex that matches its whole path.

  Args:
    tree: parameters, or their shapes.
    table: ordered `(regex, rule)`.
    field: the config's name for the table, used in errors.

  Raises:
    InputError: a path that nothing matches, a rule that no path uses, a broken regex.
  """
  table = list(table)
  used: set[int] = set()
  try:
    patterns = [re.compile(pattern) for pattern, _ in table]
  except (re.error, TypeError, ValueError) as error:
    raise InputError(f"config.{field}: {error}") from error

  def rule_of(path: str) -> int:
    for index, pattern in enumerate(patterns):
      if pattern.fullmatch(path):
        used.add(index)
        return index
    raise InputError(
      f"config.{field}: no rule covers parameter {path!r}; end the table with ('.*', …)"
    )

  indices = jax.tree.map(rule_of, path_names(tree))
  for index, (pattern, _) in enumerate(table):
    if index not in used:
      raise InputError(
        f"config.{field}: rule {pattern!r} matches no parameter that an earlier rule left; "
        f"remove or correct it{nearest_rule(pattern, by_path(path_names(tree)))}"
      )
  return jax.tree.map(lambda index: table[index][1], indices)


def nearest_rule(rule: str, paths: Iterable[str]) -> str:
  """`; did you mean x?` for a rule that matches nothing: with the nearest beginning of a path.

  Only the plain words before its first regex sign are looked at.
  """
  head, plain = "", re.match(r"[\w/.-]*(?=/)", rule)
  words = (plain[0] if plain else rule).split("/")
  names = [path.split("/") for path in paths]
  for depth, word in enumerate(words, 1):
    here = {parts[depth - 1] for parts in names if len(parts) >= depth}
    if not (close := difflib.get_close_matches(word, here, 1, 0.6)):
      return ""
    names = [parts for parts in names if len(parts) >= depth and parts[depth - 1] == close[0]]
    head = f"{head}{close[0]}/" if depth <= len(words) else head
  meant = head + rule[len("/".join(words)) + 1 :]
  return f"; did you mean {meant}?" if meant != rule else ""


def param_shardings(
  shapes: Any, mesh: Mesh | AbstractMesh, strategy: Iterable[tuple[str, str]]
) -> Any:
  """Places parameters by an ordered table; the tree of `shapes` with a NamedSharding per leaf.

  A rule is one of, or several joined by `|` (each acts on the dims that are still free):
    `replicate`
    `fsdp(axis='fsdp', min_size_to_shard_mb=4)`: the largest dim that the axis divides, of arrays
      of at least that size; smaller ones, and those it divides nowhere, stay whole
    `shard_dim(axis='tensor', dim=-1, required=True)`: that dim; the axis must divide it, or with
      required=False it stays whole

  `axis` may be a tuple of mesh axes; `fsdp` leaves out the last ones where all divide nothing.

  Raises:
    InputError: a table that is not total and tight, an unknown rule, a dim that is not divisible.
  """
  rules = match_table(shapes, strategy, "sharding_strategy")

  def place(path: str, leaf: Any, rule: str) -> NamedSharding:
    spec: list[Any] = [None] * len(leaf.shape)
    for part in rule.split("|"):
      tactic(part)(spec, path, leaf, mesh)
    return NamedSharding(mesh, P(*spec))

  return jax.tree.map(place, path_names(shapes), shapes, rules)
