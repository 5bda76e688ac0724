"""The commit that a result names is that of this package, or unknown."""

import importlib.util
import shutil
import subprocess
from pathlib import Path

FILE = Path("vr_jax/evaluation/provenance.py")


def git(folder: Path, *words: str) -> str:
  identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
  done = subprocess.run(["git", *identity, *words], cwd=folder, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return done.stdout.strip()


def test_the_repository_around_an_installed_package_is_not_ours(tmp_path):
  """As in a project with its environment inside: the package below a repository of the user's."""
  site = tmp_path / "env" / "site-packages"
  (site / FILE).parent.mkdir(parents=True)
  shutil.copy(Path(__file__).parent.parent / FILE, site / FILE)
  spec = importlib.util.spec_from_file_location("provenance_elsewhere", site / FILE)
  provenance = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(provenance)
  git(tmp_path, "init", "-q")
  git(tmp_path, "commit", "-qm", "theirs", "--allow-empty")
  assert provenance.code_version()["git"] == "unknown"
  git(site, "init", "-q")  # even one that lies where ours would
  git(site, "commit", "-qm", "theirs", "--allow-empty")
  assert provenance.code_version()["git"] == "unknown"
  git(site, "add", str(FILE))
  git(site, "commit", "-qm", "a checkout")
  assert provenance.code_version()["git"] == git(site, "rev-parse", "HEAD")
