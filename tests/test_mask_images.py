"""Masks as pictures and arrays: what is the object, and what is refused for meaning two things."""

import numpy as np
import pytest
from PIL import Image

from data_pipes.errors import InputError
from data_pipes.mask_images import mask_of_array, read_mask_picture

TRUTH = np.zeros((24, 32), np.uint8)
TRUTH[4:16, 8:20] = 1
IDS = TRUTH.copy()
IDS[18:22, 2:30] = 2


@pytest.mark.parametrize(
  "values",
  [
    TRUTH == 1,
    TRUTH,
    TRUTH * 255,
    TRUTH.astype(np.float32),
    TRUTH.astype(np.float64) * 255,
    TRUTH.astype(np.int64),
  ],
)
def test_arrays_that_are_masks(values):
  np.testing.assert_array_equal(mask_of_array(values), TRUTH)


@pytest.mark.parametrize(
  ("values", "words"),
  [
    (TRUTH * 12.5 - 8, r"from -8 to 4\.5; accepted: bool, 0/1 or 0/255, such as of logits"),
    (TRUTH * 0.8 + 0.1, "of probabilities: `array > 0.5`"),
    (TRUTH.astype(np.int8) * 2 - 1, "from -1 to 1"),
    (np.where(TRUTH, np.nan, 0), "NaN"),
    (np.where(TRUTH, np.inf, 0), "NaN"),
    (IDS, "values 1, 2, which may number objects"),
    (TRUTH * 7, "values 7, which may number objects"),
    (TRUTH.astype(str), "a mask array of <U"),
    (TRUTH + 1j, "a mask array of complex128"),
    (TRUTH[None], r"a mask array is \[H, W\]; found \[1, 24, 32\]"),
  ],
)
def test_arrays_that_may_mean_something_else(values, words):
  with pytest.raises(InputError, match=words):
    mask_of_array(values)


def palette(indices: np.ndarray, colours: list[tuple[int, int, int]]) -> Image.Image:
  image = Image.fromarray(indices.astype(np.uint8), "P")
  image.putpalette([channel for colour in colours for channel in colour])
  return image


def with_alpha(colours: np.ndarray, alpha: np.ndarray) -> Image.Image:
  return Image.fromarray(np.dstack([colours, alpha[..., None]]).astype(np.uint8), "RGBA")


WHITE = np.full((24, 32, 3), 255)
PHOTO = np.random.default_rng(0).integers(0, 255, (24, 32, 3))
SOFT = np.clip(TRUTH * 255.0 + np.random.default_rng(1).integers(-100, 100, TRUTH.shape), 0, 255)
SOFT[0, 0], SOFT[5, 9] = 0, 255
DAVIS = [(0, 0, 0), (128, 0, 0), (0, 128, 0)]
MASKS = {
  "bilevel.png": Image.fromarray(TRUTH == 1),
  "grey.png": Image.fromarray(TRUTH * 255),
  "ones.png": Image.fromarray(TRUTH),
  "one_id.png": Image.fromarray(TRUTH * 38),
  "deep.png": Image.fromarray(TRUTH.astype(np.uint16) * 65535),
  "colour_on_black.png": Image.fromarray(TRUTH[..., None] * np.array([200, 30, 30], np.uint8)),
  "alpha_on_white.png": with_alpha(WHITE, TRUTH * 255),
  "cut_out.png": with_alpha(PHOTO, TRUTH * 255),
  "opaque.png": with_alpha(WHITE * TRUTH[..., None], TRUTH * 0 + 255),
  "both_alike.png": with_alpha(WHITE * TRUTH[..., None], TRUTH * 255),
  "white_first.png": palette(1 - TRUTH, [(255, 255, 255), (0, 0, 0)]),
  "one_object.png": palette(TRUTH, DAVIS),
  "soft.png": Image.fromarray(SOFT.astype(np.uint8)),
}


@pytest.mark.parametrize("name", MASKS)
def test_pictures_that_are_masks(tmp_path, name):
  MASKS[name].save(tmp_path / name)
  mask, note = read_mask_picture(tmp_path / name)
  np.testing.assert_array_equal(mask, TRUTH)
  assert ("cut at half" in note) == (name == "soft.png")


def test_a_lossy_mask_is_cut_at_half(tmp_path):
  smooth = np.roll(np.kron(TRUTH, np.ones((8, 8), np.uint8)), (3, 5), (0, 1))
  for name in ("a.jpg", "a.webp"):
    Image.fromarray(smooth * 255).convert("RGB").save(tmp_path / name, quality=60)
    mask, note = read_mask_picture(tmp_path / name)
    assert "cut at half" in note
    # JPEG moves an edge by less than a pixel; anything not black would be a fifth too large.
    assert abs(int(mask.sum()) - int(smooth.sum())) <= 0.01 * smooth.sum()


@pytest.mark.parametrize(
  ("image", "words"),
  [
    (palette(IDS, DAVIS), "palette indices 1, 2, which number objects; choose one"),
    (Image.fromarray(IDS), "grey values 1, 2, which number objects"),
    (Image.fromarray(IDS * 60), "grey values 60, 120"),
    (Image.fromarray(np.where(IDS == 0, 255, IDS)), "grey values 1, 2"),  # with borders
    (Image.fromarray(IDS.astype(np.uint16) * 1000), "grey values 1000, 2000"),
    (Image.fromarray(PHOTO.astype(np.uint8)), "found the colours"),
    (Image.fromarray(np.arange(768).reshape(24, 32).astype(np.uint8) % 200), "199 grey values"),
    (with_alpha(WHITE * TRUTH[..., None], 255 - TRUTH * 255), "mark different pixels"),
  ],
)
def test_pictures_that_may_mean_something_else(tmp_path, image, words):
  image.save(tmp_path / "a.png")
  with pytest.raises(InputError, match=words) as error:
    read_mask_picture(tmp_path / "a.png")
  assert "a.png" in str(error.value)


def test_one_object_of_several_is_chosen(tmp_path):
  for image in (palette(IDS, DAVIS), Image.fromarray(IDS)):
    image.save(tmp_path / "a.png")
    for number in (1, 2):
      np.testing.assert_array_equal(
        read_mask_picture(tmp_path / "a.png", number).mask, number == IDS
      )
    with pytest.raises(InputError, match=r"no object 3; found the .* 1, 2"):
      read_mask_picture(tmp_path / "a.png", 3)


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n"])
def test_files_that_are_no_pictures(tmp_path, content):
  (tmp_path / "a.png").write_bytes(content)
  with pytest.raises(InputError, match=r"a\.png: cannot be read as an image"):
    read_mask_picture(tmp_path / "a.png")
  with pytest.raises(InputError, match="no such image"):
    read_mask_picture(tmp_path / "absent.png")
