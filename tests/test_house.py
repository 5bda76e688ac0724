"""The house: imports run down, no two files or folders import each other, no file is too long."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From top to bottom; a room imports rooms below it alone. Those of one line import none of each
# other. What is not named here is a base: it imports no room above the last line.
LAYERS = (
  ("__main__",),
  ("cli",),
  ("commands",),
  ("engine",),  # an older name of agent
  ("sweep_table",),
  ("mini", "serving", "parity", "agent", "sweep"),
  ("training",),
  ("evaluation",),
  ("retrieval", "grounding"),
  ("loading",),
  ("interop",),
  ("inference",),
  ("checkpoint",),
  ("params",),
  ("models",),
  ("attention", "configs"),
  ("sharding",),
)
PACKAGES = ("configs", "vr_jax", "data_pipes")  # from top to bottom
FACE = "vr_jax"  # `vr_jax/__init__.py` names what users import, and loads it on first use
LONGEST = 600  # lines of a file


def modules() -> dict[str, Path]:
  """Every module of the three packages by its dotted name."""
  paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
  names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths}
  return {name.removesuffix(".__init__"): path for path, name in names.items()}


MODULES = modules()


def imports(name: str) -> Iterator[str]:
  """The modules of this project that a module imports, at its top or inside a function."""
  for node in ast.walk(ast.parse(MODULES[name].read_text())):
    targets = []
    if isinstance(node, ast.Import):
      targets = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
      targets = [f"{node.module}.{alias.name}" for alias in node.names]
      targets = [t if t in MODULES else node.module for t in targets]
    yield from (t for t in targets if t in MODULES and t != name)


ARROWS = sorted({(a, b) for a in MODULES if a != FACE for b in imports(a)})


def room(module: str) -> str:
  """The room of `vr_jax` that a module stands in."""
  return module.split(".")[1] if "." in module else ""


def test_packages_import_downwards():
  place = {name: i for i, name in enumerate(PACKAGES)}
  up = [(a, b) for a, b in ARROWS if place[a.split(".")[0]] > place[b.split(".")[0]]]
  assert not up


def test_rooms_import_downwards():
  place = {name: i for i, line in enumerate(LAYERS) for name in line}
  base = len(LAYERS)
  up = []
  for a, b in ARROWS:
    if a.startswith("vr_jax.") and b.startswith("vr_jax.") and room(a) != room(b):
      above, below = place.get(room(a), base), place.get(room(b), base)
      if above > below or (above == below and above < base):
        up.append((a, b))
  assert not up


def siblings(a: str, b: str) -> tuple[str, str] | None:
  """The two files or folders of one folder by which an arrow leads from one module to another."""
  x, y = a.split("."), b.split(".")
  for i, (left, right) in enumerate(zip(x, y, strict=False)):
    if left != right:
      return ".".join(x[: i + 1]), ".".join(y[: i + 1])
  return None  # a package's own __init__


def test_no_circle_between_files_or_folders():
  below: dict[str, set[str]] = {}
  for a, b in ARROWS:
    if pair := siblings(a, b):
      below.setdefault(pair[0], set()).add(pair[1])

  circles = []

  def walk(name: str, path: tuple[str, ...]) -> None:
    if name in path:
      circles.append(" -> ".join([*path[path.index(name) :], name]))
    elif name not in done:
      for child in sorted(below.get(name, ())):
        walk(child, (*path, name))
      done.add(name)

  done: set[str] = set()
  for name in sorted(below):
    walk(name, ())
  assert not circles


@pytest.mark.parametrize("package", ["vr_jax", "data_pipes"])
def test_no_file_is_too_long(package):
  lines = {p: len(p.read_text().splitlines()) for n, p in MODULES.items() if n.startswith(package)}
  assert not {str(p.relative_to(ROOT)): n for p, n in lines.items() if n > LONGEST}


def test_few_files_stand_directly_in_evaluation():
  files = [p for p in (ROOT / "vr_jax/evaluation").glob("*.py") if p.name != "__init__.py"]
  assert len(files) <= 14


# Grammatical roles; a name says what the thing is. `Probed.found` is a key that `vr engine probe
# --json` prints.
ROLES = {"of", "own", "found", "wanted", "said", "asked", "told"}
PRINTED = {("data_pipes/engine/backends/probe.py", "found")}


def test_names_say_what_a_thing_is():
  named = set()
  paths = [*MODULES.values(), *(ROOT / "benchmarks").glob("*.py")]
  for path in paths:
    for node in ast.walk(ast.parse(path.read_text())):
      name = None
      if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        name = node.id
      elif isinstance(node, ast.arg):
        name = node.arg
      elif isinstance(node, ast.FunctionDef):
        name = node.name
      if name in ROLES:
        named.add((path.relative_to(ROOT).as_posix(), name))
  assert named == PRINTED


def test_data_pipes_imports_no_jax():
  for name, path in MODULES.items():
    if name.startswith("data_pipes"):
      for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {n.split(".")[0] for n in names} & {"jax", "flax", "optax", "orbax"}, path
