"""What the package carries: the finished vr-mini and the decoder it was trained from."""

from pathlib import Path

ASSETS = Path(__file__).parent
VR_MINI = ASSETS / "vr-mini"  # a checkpoint with its tokenizer files beside it
MINI_DECODER = VR_MINI / "pretrained_decoder"  # the pre-trained decoder alone


def packaged() -> list[str]:
  """Names of the packaged models."""
  return sorted(path.parent.name for path in ASSETS.glob("*/tokenizer.json"))
