"""Test-wide settings: eight simulated CPU devices, and absl flags parsed (Grain reads them)."""

import os
from pathlib import Path

import jax
import pytest
from absl import flags

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
  """Real clips for tests that want them: VR_MEDIA_DIR; such tests are skipped where it is unset."""
  folder = os.environ.get("VR_MEDIA_DIR")
  if not folder:
    pytest.skip("VR_MEDIA_DIR is not set")
  return Path(folder)
