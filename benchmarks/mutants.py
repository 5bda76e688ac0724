"""Changes of one place of the product that some test must notice.

    python benchmarks/mutants.py                  the list below: changes that once no test noticed
    python benchmarks/mutants.py --draw 200 --map MAP [--within PATHS --] [TESTS …]
                                                  as many drawn over all product lines; the seed is
                                                  the commit's hash, so anyone draws the same

Each change is made in a copy of the checkout, and the tests that should notice run there until one
fails: those listed; else the quickest that run the changed line, for a minute in all. Which those
are stands in MAP. Where there is no such file it is made first by one pass over TESTS (default: all
of the default run) with the lines that each test runs, which needs the package `coverage`. Prints
each mutant with its fate: killed, lived, timed out, equivalent (from EQUIVALENT), or unseen (no
test of the map runs the line), then the share killed. The list takes minutes, a drawn one some
seconds.
"""

import argparse
import ast
import dataclasses
import functools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("vr_jax", "data_pipes")
TIMEOUT = 600  # seconds for the tests of a listed mutant
MOST_SECONDS = 60.0  # that the tests of a drawn one took without a change
MOST_OF_A_FILE = 20  # tests of a line that runs at import

Map = Mapping[str, Mapping[str, Mapping[str, float]]]  # file -> line -> test -> seconds


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
    "data_pipes/engine/job.py",
    "spent.get(name, 0.0) + left / workers",
    "spent.get(name, 0.0) + left",
  ),
  Mutant(
    "data_pipes/engine/quality/duplicates.py",
    "if 2 * len(places) > len(hashes)",
    "if places",
  ),
  Mutant(
    "data_pipes/engine/quality/duplicates.py",
    "for hashes, step in zip(both, (1, -1), strict=True):",
    "for hashes, step in zip(both[:1], (1,), strict=True):",
  ),
  Mutant(
    "data_pipes/engine/quality/duplicates.py",
    "if 2 * sum(are_alike(*pair) for pair in pairs) > len(hashes):",
    "if any(are_alike(*pair) for pair in pairs):",
  ),
  Mutant(
    "data_pipes/engine/review.py",
    "runs = [0, *runs]",
    "runs = [*runs]",
  ),
)
# Drawn mutants that change nothing that anyone can see: "file:line: old -> new" and why.
EQUIVALENT = {
  "vr_jax/evaluation/reading/strict.py:162: '0' -> '1'": "the first group is all of the match",
  "data_pipes/masks.py:62: '0' -> '1'": "the line below drops zeros",
}

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


def draw(count: int, within: Sequence[str]) -> list[Mutant]:
  """Mutants of the product's files at or below `within`, the same for who has this commit."""
  commit = subprocess.run(
    ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
  ).stdout.strip()
  files = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))
  names = [path.relative_to(ROOT).as_posix() for path in files]
  every = [m for name in names if name.startswith(tuple(within)) for m in places(name)]
  print(f"{count} of {len(every)} places, seed {commit}", flush=True)
  return random.Random(commit).sample(every, min(count, len(every)))


def make_map(tests: Sequence[str], copy: Path) -> Map:
  """Which tests run which lines, and how long each takes; tests that fail are left out."""
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    packages = ",".join(PACKAGES)
    settings = f"[run]\ndynamic_context = test_function\nsource = {packages}\n"
    (folder / "settings").write_text(settings + f"data_file = {folder / 'data'}\n")
    options = [f"--rcfile={folder / 'settings'}"]
    run = [*options, "-m", "pytest", "-n0", "-p", "no:cacheprovider", f"--junitxml={folder / 'x'}"]
    for command in (["run", *run, *tests], ["json", "--show-contexts", *options]):
      command += [] if command[0] == "run" else ["-q", "-o", str(folder / "json")]
      subprocess.run([sys.executable, "-m", "coverage", *command], cwd=copy, env=_environment(copy))
    seconds: dict[str, float] = defaultdict(float)
    failed = set()
    for case in ElementTree.parse(folder / "x").iter("testcase"):
      name = f"{case.get('classname', '').removeprefix('tests.')}.{case.get('name')}".split("[")[0]
      seconds[name] += float(case.get("time", 0))
      if len(case):
        failed.add(name)
    files = json.loads((folder / "json").read_text())["files"]
  return {
    file: {
      line: {test: seconds[test] for test in tests if test in seconds and test not in failed}
      for line, tests in entry["contexts"].items()
    }
    for file, entry in files.items()
  }


def _node(test: str) -> str:
  """A test's name for pytest, from its module, class and function."""
  module, *rest = test.split(".")
  return "::".join([f"tests/{module}.py", *rest])


def tests_of(mutant: Mutant, seen: Map) -> tuple[tuple[str, ...], float]:
  """The tests that should notice, the quickest first, and their time-out in seconds."""
  if mutant in LISTED:
    return mutant.tests or NOTICED, TIMEOUT
  lines = seen.get(mutant.file, {})
  text = (ROOT / mutant.file).read_text(encoding="utf-8")
  at = str(text[: mutant.place(text)].count("\n") + 1)
  tests, most = lines.get(at, {}), None
  if not tests and at in lines:  # it runs at import
    tests, most = {test: s for some in lines.values() for test, s in some.items()}, MOST_OF_A_FILE
  chosen, total = [], 0.0
  for test in sorted(tests, key=tests.__getitem__)[:most]:
    if chosen and total + tests[test] > MOST_SECONDS:
      break
    chosen.append(_node(test))
    total += tests[test]
  return tuple(chosen), 60 + 5 * total


def _environment(copy: Path) -> dict[str, str]:
  paths = [str(copy), *filter(None, [os.environ.get("PYTHONPATH")])]
  return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"}


def passes(tests: tuple[str, ...], copy: Path, seconds: float = TIMEOUT) -> bool:
  """Runs tests in the copy. Raises subprocess.TimeoutExpired."""
  command = [sys.executable, "-m", "pytest", "-n0", "-x", "-q", "-p", "no:cacheprovider", *tests]
  options = {"cwd": copy, "env": _environment(copy), "capture_output": True, "timeout": seconds}
  return subprocess.run(command, **options).returncode == 0


@functools.cache
def pass_unchanged(tests: tuple[str, ...], copy: Path) -> bool:
  return passes(tests, copy)


def fate(mutant: Mutant, copy: Path, seen: Map) -> str:
  """Runs the tests on the mutant in a copy of the checkout, which is as it was afterwards."""
  if str(mutant) in EQUIVALENT:
    return "equivalent"
  path, (tests, seconds) = copy / mutant.file, tests_of(mutant, seen)
  if not tests:
    return "unseen"
  before = path.read_bytes()
  try:
    if mutant in LISTED and not pass_unchanged(tests, copy):
      raise SystemExit(f"{' '.join(tests)}: fails without any change")
    mutant.apply(copy)
    return "lived" if passes(tests, copy, seconds) else "killed"
  except subprocess.TimeoutExpired:
    return "timed out"
  finally:
    path.write_bytes(before)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--draw", type=int, metavar="N", help="N drawn mutants instead of the list")
  parser.add_argument("--within", nargs="+", default=PACKAGES, help="files or folders drawn from")
  parser.add_argument("--map", type=Path, help="which tests run which lines; made if absent")
  parser.add_argument("tests", nargs="*", help="of a map that is made; default: the default run")
  options = parser.parse_args()
  if options.draw and not options.map:
    parser.error("--draw needs --map FILE")
  mutants = draw(options.draw, options.within) if options.draw else list(LISTED)
  fates: Counter[str] = Counter()
  with tempfile.TemporaryDirectory() as folder:
    copy = Path(folder) / "checkout"
    ignored = shutil.ignore_patterns(".venv*", ".git", "__pycache__", ".mypy_cache", ".ruff_cache")
    shutil.copytree(ROOT, copy, ignore=ignored, symlinks=True)
    seen: Map = {}
    if options.map and options.map.is_file():
      seen = json.loads(options.map.read_text())
    elif options.map:
      seen = make_map(options.tests or ["tests"], copy)
      options.map.write_text(json.dumps(seen))
    for mutant in mutants:
      result = fate(mutant, copy, seen)
      fates[result] += 1
      print(f"{result:10} {mutant}", flush=True)
  judged = sum(fates.values()) - fates["equivalent"]
  share = fates["killed"] / max(judged, 1)
  print(f"{dict(fates)}: {share:.0%} of {judged} killed")
  return 0 if fates["killed"] == judged else 1


if __name__ == "__main__":
  sys.exit(main())
