"""Test-wide settings: eight simulated CPU devices, absl flags parsed (Grain reads them), and shapes
and dtypes in signatures checked whenever a function is called."""

import os
from pathlib import Path

import jax
import pytest
from absl import flags
from jaxtyping import install_import_hook

# Before anything imports these modules.
CHECKED = ("vr_jax.models", "vr_jax.attention")
install_import_hook(CHECKED, "typechecker.check")

from vr_jax.program_cache import keep_on_disk  # noqa: E402

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the real Hub; read when its library is imported
jax.config.update("jax_num_cpu_devices", 8)
if not flags.FLAGS.is_parsed():
  flags.FLAGS(["pytest"])

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
  """The golden-case folder in the checkout (see tests/golden/README.md)."""
  return GOLDEN


@pytest.fixture(scope="session")
def media_dir() -> Path:
  """Real clips (dog.mp4, 2.mp4, 4.mp4) in VR_MEDIA_DIR; tests that use it have the marker media."""
  folder = os.environ.get("VR_MEDIA_DIR")
  if not folder:
    pytest.fail("set VR_MEDIA_DIR to the folder of the real clips to run tests marked media")
  return Path(folder)


@pytest.fixture(scope="session", autouse=True)
def programs_on_disk(tmp_path_factory) -> Path:
  """A folder where the programs of all tests are kept, so that none is compiled twice.

  By the environment too: commands and processes that tests start use it, not the user's cache.
  """
  folder = tmp_path_factory.getbasetemp()
  if "PYTEST_XDIST_WORKER" in os.environ:
    folder = folder.parent  # of all workers: each would compile the small models anew
  folder = folder / "programs"
  os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))  # needs, plans, indices
  os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
  return keep_on_disk(folder)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
  for item in items:
    if "media_dir" in item.fixturenames:
      item.add_marker(pytest.mark.media)
