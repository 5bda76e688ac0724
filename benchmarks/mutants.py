"""Changes of one place of the product that some test must notice.

    python benchmarks/mutants.py                  the list below: changes that once no test noticed
    python benchmarks/mutants.py --draw 200       as many drawn over all product lines; the seed is
                                                  the commit's hash, so anyone draws the same

Each change is made in a copy of the checkout, and the tests that should notice run there: those
listed, else every test file that names the module. Prints each mutant with its fate (killed, lived,
timed out, or equivalent, from EQUIVALENT), then the share killed. Takes a core; minutes for the
list, hours for 200.
"""

import argparse
import ast
import dataclasses
import functools
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("vr_jax", "data_pipes")
TIMEOUT = 600  # seconds for the tests of one mutant


@dataclasses.dataclass(frozen=True)
class Mutant:
  """`old` becomes `new` at `offset` of a file (its first place if None); `tests` must notice."""

  file: str
  old: str
  new: str
  tests: tuple[str, ...] = ()
  offset: int | None = None

  def __str__(self) -> str:
    text = (ROOT / self.file).read_text(encoding="utf-8")
    line = text[: self.place(text)].count("\n") + 1
    return f"{self.file}:{line}: {self.old!r} -> {self.new!r}"

  def place(self, text: str) -> int:
    if self.offset is not None:
      return self.offset
    if text.count(self.old) != 1:
      raise SystemExit(f"{self.file}: {self.old!r} stands there {text.count(self.old)} times")
    return text.index(self.old)

  def apply(self, root: Path) -> None:
    path = root / self.file
    text = path.read_text(encoding="utf-8")
    at = self.place(text)
    path.write_text(text[:at] + self.new + text[at + len(self.old) :], encoding="utf-8")


NOTICED = ("tests/test_noticed.py",)  # what the list's mutants gave rise to
LISTED = (
  Mutant(
    "data_pipes/engine/calls.py",
    "self._reserved[cursor.lastrowid] = most_usd",
    "self._reserved[cursor.lastrowid] = 0.0",
  ),
  Mutant(
    "data_pipes/engine/stages.py",
    'keys=("drop_static", "language")',
    'keys=("language",)',
  ),
  Mutant(
    "data_pipes/engine/backends/chat_agents.py",
    'decides = ("extra", "frames"',
    'decides = ("frames"',
  ),
  Mutant(
    "data_pipes/engine/agents/texts.py",
    "if not question.answer.strip():",
    "if False:",
  ),
  Mutant(
    "data_pipes/feature_shards.py",
    "text = json.dumps([source, order, masks, record.size])",
    "text = json.dumps([source, order, record.size])",
  ),
  Mutant(
    "data_pipes/files.py",
    "if len(kept) != len(before) or _is_torn(self.path):",
    "if len(kept) != len(before):",
    ("tests/test_files.py",),
  ),
  Mutant(
    "vr_jax/evaluation/scoring/statistics.py",
    "drawn = times @ count\n",
    "drawn = np.full(len(times), count.sum())\n",
  ),
  Mutant(
    "vr_jax/evaluation/scoring/descriptions.py",
    "read = [s for s in verdict.scores if s.error is None]",
    "read = [s for s in verdict.scores if s.error is None][:1]",
  ),
  Mutant(
    "vr_jax/evaluation/scoring/comparison.py",
    "return (low > 0 or high < 0) and (p is None or p < 0.05)",
    "return low > 0 or high < 0",
  ),
  Mutant(
    "data_pipes/engine/review.py",
    "runs = [0, *runs]",
    "runs = [*runs]",
  ),
)
# Drawn mutants that change nothing that anyone can see: "file:line: old -> new" and why.
EQUIVALENT: dict[str, str] = {}

_SWAPS = {
  ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"),
  ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.In: (" in ", " not in "),
  ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "+"), ast.FloorDiv: ("//", "*"),
  ast.And: (" and ", " or "), ast.Or: (" or ", " and "),
}  # fmt: skip


def places(file: str) -> Iterator[Mutant]:
  """Every change of one operator, constant or condition of a file."""
  text = (ROOT / file).read_text(encoding="utf-8")
  starts = [0]
  for line in text.splitlines(keepends=True):
    starts.append(starts[-1] + len(line))

  def offset(line: int, column: int) -> int:  # columns of ast count bytes
    row = text[starts[line - 1] : starts[line]]
    return starts[line - 1] + len(row.encode()[:column].decode())

  def swap(left: ast.AST, right: ast.AST, operator: type) -> Iterator[Mutant]:
    if operator in _SWAPS:
      old, new = _SWAPS[operator]
      first = offset(left.end_lineno, left.end_col_offset)
      between = text[first : offset(right.lineno, right.col_offset)]
      if between.count(old) == 1:
        yield Mutant(file, old, new, offset=first + between.index(old))

  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
      yield from swap(node.left, node.comparators[0], type(node.ops[0]))
    elif isinstance(node, ast.BinOp):
      yield from swap(node.left, node.right, type(node.op))
    elif isinstance(node, ast.BoolOp):
      yield from swap(node.values[0], node.values[1], type(node.op))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
      at = offset(node.lineno, node.col_offset)
      if text.startswith("not ", at):
        yield Mutant(file, "not ", "", offset=at)
    elif isinstance(node, ast.Constant) and type(node.value) in (bool, int):
      at = offset(node.lineno, node.col_offset)
      old = text[at : offset(node.end_lineno, node.end_col_offset)]
      new = str(not node.value) if isinstance(node.value, bool) else str(node.value + 1)
      yield Mutant(file, old, new, offset=at)


def draw(count: int) -> list[Mutant]:
  """Mutants of all product files, the same for everyone who has this commit."""
  commit = subprocess.run(
    ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
  ).stdout.strip()
  files = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))
  every = [m for path in files for m in places(path.relative_to(ROOT).as_posix())]
  print(f"{count} of {len(every)} places, seed {commit}", flush=True)
  return random.Random(commit).sample(every, min(count, len(every)))


def tests_of(mutant: Mutant) -> tuple[str, ...]:
  """The tests that should notice: those listed, else the files that name the module or its room."""
  if mutant in LISTED:
    return mutant.tests or NOTICED
  module = mutant.file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
  tests = {p: p.read_text(encoding="utf-8") for p in sorted((ROOT / "tests").glob("test_*.py"))}
  while module:
    named = [p for p, text in tests.items() if module in text]
    if named:
      return tuple(p.relative_to(ROOT).as_posix() for p in named)
    module = module.rpartition(".")[0]
  return ("tests",)


def passes(tests: tuple[str, ...], copy: Path) -> bool:
  """Runs tests in the copy. Raises subprocess.TimeoutExpired."""
  command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
  environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
  done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, timeout=TIMEOUT)
  return done.returncode == 0


@functools.cache
def pass_unchanged(tests: tuple[str, ...], copy: Path) -> bool:
  return passes(tests, copy)


def fate(mutant: Mutant, copy: Path) -> str:
  """Runs the tests on the mutant in a copy of the checkout, which is as it was afterwards."""
  if str(mutant) in EQUIVALENT:
    return "equivalent"
  path, tests = copy / mutant.file, tests_of(mutant)
  before = path.read_bytes()
  try:
    if not pass_unchanged(tests, copy):
      raise SystemExit(f"{' '.join(tests)}: fails without any change")
    mutant.apply(copy)
    return "lived" if passes(tests, copy) else "killed"
  except subprocess.TimeoutExpired:
    return "timed out"
  finally:
    path.write_bytes(before)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--draw", type=int, metavar="N", help="N drawn mutants instead of the list")
  options = parser.parse_args()
  mutants = draw(options.draw) if options.draw else list(LISTED)
  fates: Counter[str] = Counter()
  with tempfile.TemporaryDirectory() as folder:
    copy = Path(folder) / "checkout"
    ignored = shutil.ignore_patterns(".venv*", ".git", "__pycache__", ".mypy_cache", ".ruff_cache")
    shutil.copytree(ROOT, copy, ignore=ignored, symlinks=True)
    for mutant in mutants:
      result = fate(mutant, copy)
      fates[result] += 1
      print(f"{result:10} {mutant}", flush=True)
  judged = sum(fates.values()) - fates["equivalent"]
  share = fates["killed"] / max(judged, 1)
  print(f"{dict(fates)}: {share:.0%} of {judged} killed")
  return 0 if fates["killed"] == judged else 1


if __name__ == "__main__":
  sys.exit(main())
