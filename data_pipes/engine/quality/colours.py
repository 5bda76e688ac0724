"""Colours by name, as the embedded backends measure them."""

import numpy as np

from data_pipes.embedded.scenes import COLOURS

# Centres in RGB; grey tones are told by their lightness.
_NAMED = {**COLOURS, "brown": (120, 75, 40)}
NAMES = (*_NAMED, "white", "grey", "black")
_SYNONYMS = {"gray": "grey", "violet": "purple", "golden": "yellow", "turquoise": "cyan"}


def colour_word(text: str) -> str | None:
  """The first colour that a phrase names."""
  words = (_SYNONYMS.get(word, word) for word in text.lower().replace(",", " ").split())
  return next((word for word in words if word in NAMES), None)


def name_pixels(pixels: np.ndarray) -> np.ndarray:
  """RGB uint8 [..., 3] to indices into NAMES, by hue where there is colour."""
  rgb = pixels.astype(np.float32)
  high, low = rgb.max(-1), rgb.min(-1)
  chroma = high - low
  flat = chroma < np.maximum(28.0, 0.22 * high)
  direction = _direction(rgb)
  centres = _direction(np.array(list(_NAMED.values()), np.float32))
  near = (direction @ centres.T).argmax(-1)
  names = list(_NAMED)
  orange, brown = names.index("orange"), names.index("brown")
  dim = np.isin(near, [orange, brown])
  near = np.where(dim, np.where(high < 165, brown, orange), near)
  # Pink is red or purple made pale.
  pale = (near == names.index("red")) & (low > 90)
  near = np.where(pale, names.index("pink"), near)
  tone = np.where(high > 200, len(names), np.where(high > 65, len(names) + 1, len(names) + 2))
  dark = high < 45
  return np.where(flat | dark, tone, near)


def _direction(rgb: np.ndarray) -> np.ndarray:
  """Hue and purity: the offset from grey, of unit length."""
  offset = rgb - rgb.mean(-1, keepdims=True)
  return offset / np.maximum(np.linalg.norm(offset, axis=-1, keepdims=True), 1e-6)


def dominant(pixels: np.ndarray) -> tuple[str, float]:
  """The commonest colour of pixels [N, 3], dark marks aside, and its share."""
  counts = np.bincount(name_pixels(pixels), minlength=len(NAMES)).astype(float)
  bright = counts.copy()
  bright[NAMES.index("black")] *= 0.5
  best = int(bright.argmax())
  return NAMES[best], float(counts[best] / max(1.0, counts.sum()))
