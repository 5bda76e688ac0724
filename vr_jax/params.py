"""Parameter trees: nested dicts of arrays, whose leaves are known by their paths."""

from collections.abc import Mapping
from typing import Any

import jax

Params = dict[str, Any]


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
