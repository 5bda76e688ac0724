"""The dependencies that pyproject.toml names are those that the product imports."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = ("vr_jax", "data_pipes", "configs")
# What a package is called where it is imported, if that is not its name with underscores.
IMPORTED_AS = {
  "orbax_checkpoint": "orbax",
  "pillow": "PIL",
  "opencv_python_headless": "cv2",
}
# Imports of packages that come with one of ours, which cannot work without them.
BROUGHT_BY = {
  "jaxlib": "jax",
  "markupsafe": "jinja2",
  "ml_dtypes": "jax",
  "tensorstore": "orbax",
  "fsspec": "etils",
  "huggingface_hub": "transformers",
  "starlette": "fastapi",
}
# Not imported by the product.
NOT_IMPORTED: dict[str, str] = {}
# Imported, and in no list: the extra [lmms] says how it is installed.
NOT_LISTED = {"lmms_eval"}


def names(requirements: list[str]) -> set[str]:
  """The names under which requirements are imported; our own extras are left out."""
  heads = {re.split(r"[\s<>=!~;\[]", line, maxsplit=1)[0] for line in requirements}
  keys = {name.lower().replace("-", "_") for name in heads} - {"vr_jax"}
  return {IMPORTED_AS.get(key, key) for key in keys}


def imported() -> set[str]:
  """The packages of others that the product imports, at a file's top or in a function."""
  modules = set()
  for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Import):
        modules |= {alias.name for alias in node.names}
      elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        modules.add(node.module)
  return {m.partition(".")[0] for m in modules} - set(sys.stdlib_module_names) - set(PACKAGES)


IMPORTED = imported()
CORE = names(PROJECT["dependencies"])
EXTRAS = PROJECT["optional-dependencies"]


@pytest.mark.parametrize("name", sorted(CORE))
def test_a_core_dependency_is_imported(name):
  assert (name in IMPORTED) != (name in NOT_IMPORTED)


def test_an_import_is_in_a_list():
  listed = CORE.union(*map(names, EXTRAS.values()))
  lost = {m for m in IMPORTED - NOT_LISTED if BROUGHT_BY.get(m, m) not in listed}
  assert not lost


def test_the_lock_has_the_same_lists():
  lock = tomllib.loads((ROOT / "uv.lock").read_text())
  (entry,) = (p for p in lock["package"] if p["name"] == "vr-jax")
  for extra, lines in [(None, PROJECT["dependencies"]), *EXTRAS.items()]:
    if extra is None:
      locked = entry["dependencies"]
    else:
      locked = entry["optional-dependencies"].get(extra, [])
    assert names([line["name"] for line in locked]) >= names(lines), extra
  assert names([line["name"] for line in entry["dependencies"]]) == CORE
  addresses = {p["source"].get("registry") for p in lock["package"]}
  assert addresses == {"https://pypi.org/simple", None}
