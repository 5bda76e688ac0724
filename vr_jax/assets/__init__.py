"""What the package carries: finished small models, and what vr-mini was trained from."""

from pathlib import Path

ASSETS = Path(__file__).parent
VR_MINI = ASSETS / "vr-mini"  # a checkpoint with its tokenizer files beside it
MINI_PARTS = VR_MINI / "pretrained"  # pre-trained tower and decoder alone
VR_MINI_NAVIT = ASSETS / "vr-mini-navit"


def packaged() -> list[str]:
  """Names of the packaged models."""
  return sorted(path.parent.name for path in ASSETS.glob("*/params"))
