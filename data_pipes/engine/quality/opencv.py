"""OpenCV as the engine uses it."""

from types import ModuleType


def opencv() -> ModuleType:
  """cv2 with one thread a call: clips go in parallel, not pixels."""
  import cv2

  cv2.setNumThreads(1)
  return cv2
