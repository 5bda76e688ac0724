"""Every marker stands in docs/testing.md, and .ci/all runs it with an extra that exists."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MARKERS = {m.split(":")[0] for m in PROJECT["tool"]["pytest"]["ini_options"]["markers"]}


def test_the_page_lists_every_marker():
  rows = re.findall(r"(?m)^\| `(\w+)` \|", (ROOT / "docs" / "testing.md").read_text())
  assert sorted(rows) == sorted(MARKERS)


def test_ci_all_runs_every_marker():
  text = (ROOT / ".ci" / "all").read_text()
  table = text[text.index('table="') : text.index('"\nfailed')]
  rows = dict(re.findall(r"(?m)^(\w+) +([\w,]+)  +\w", table))
  assert set(rows) == MARKERS
  extras = {extra for row in rows.values() for extra in row.split(",")}
  assert extras <= set(PROJECT["project"]["optional-dependencies"])


def test_shellcheck():
  shellcheck = Path(sys.executable).parent / "shellcheck"
  subprocess.run([shellcheck, ROOT / ".ci" / "all", ROOT / ".ci" / "run"], check=True)
