"""Crops of objects: OpenCV's bytes, torch's mask cells, and masks that cannot be cut out."""

import cv2
import numpy as np
import pytest

from data_pipes.errors import InputError
from data_pipes.navit_images import smart_resize, to_patches
from data_pipes.object_crops import (
  LITE,
  PIXELREFER,
  VL3,
  crop_objects,
  crop_patches,
  resize_cells,
)
from data_pipes.opencv_resize import resize_area, resize_linear

RANDOM = np.random.default_rng(0)
IMAGE = RANDOM.integers(0, 256, (60, 84, 3), dtype=np.uint8)


def sizes(count):
  """Pairs of sizes: arbitrary, shrinking by whole numbers, by exactly two, and growing."""
  for k in range(count):
    new = RANDOM.integers(1, 60, 2)
    others = RANDOM.integers(1, 80, 2), new * RANDOM.integers(1, 5, 2), new * 2, (new + 1) // 2
    yield others[k % 4].tolist(), new.tolist()


@pytest.mark.parametrize("resize", [resize_linear, resize_area])
def test_bytes_are_those_of_opencv(resize):
  flag = cv2.INTER_LINEAR if resize is resize_linear else cv2.INTER_AREA
  for old, (height, width) in sizes(200):
    image = RANDOM.integers(0, 256, (*old, 3), dtype=np.uint8)
    theirs = cv2.resize(image, (width, height), interpolation=flag)
    np.testing.assert_array_equal(resize(image, height, width), theirs, f"{old} {height} {width}")


def test_float_masks_are_those_of_opencv():
  for old, (height, width) in sizes(100):
    mask = RANDOM.integers(0, 2, old).astype(np.float32)
    theirs = cv2.resize(mask, (width, height))
    np.testing.assert_allclose(resize_linear(mask, height, width), theirs, atol=1e-5)


def disk(row, column, radius, size=(60, 84)):
  rows, columns = np.ogrid[: size[0], : size[1]]
  return ((rows - row) ** 2 + (columns - column) ** 2 <= radius**2).astype(np.uint8)


def cut(mask, rule=PIXELREFER, image=IMAGE, **kwargs):
  return crop_objects([image], [mask], [0], rule, 12, **kwargs)[0]


def test_cells_round_half_up_axis_by_axis():
  # Between pixels 0 and 1 there is a half along each axis, but a quarter in two dimensions.
  mask = np.array([[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]], np.uint8)
  np.testing.assert_array_equal(resize_cells(mask, 2, 2), [[1, 0], [0, 1]])


@pytest.mark.parametrize("rule", [VL3, PIXELREFER, LITE])
def test_an_object_that_vanishes_keeps_the_cells_it_covers_most(rule):
  mask = np.zeros((603, 843), np.uint8)
  mask[::28] = 1  # lines between the rows 6, 7, 20, 21, ... that the published filter looks at
  image = np.zeros((603, 843, 3), np.uint8)
  crop = cut(mask, rule, image)
  assert (crop.mask > 0).any()
  assert crop.tokens > 0
  if rule is not LITE:
    assert cut(mask, rule, image, published=True).tokens == 0


def test_an_object_on_the_last_row_alone_is_not_lost():
  mask = np.zeros((60, 84), np.uint8)
  mask[59, 30:40] = 1
  assert cut(mask, published=True).tokens == 0  # the published crop ends before that row
  assert cut(mask).tokens > 0


@pytest.mark.parametrize(
  ("mask", "image", "says"),
  [
    (np.zeros((60, 84), np.uint8), IMAGE, "mask 0 is empty"),
    (np.ones((60, 80), np.uint8), IMAGE, "60x80, its picture 60x84"),
    (np.ones((1, 84), np.uint8), IMAGE[:1], "1x84 leaves no crop"),
  ],
)
def test_masks_that_cannot_be_cut_are_refused(mask, image, says):
  with pytest.raises(InputError, match=says):
    cut(mask, image=image)


def test_two_stray_pixels_do_not_fill_the_memory():
  mask = np.zeros((1080, 1920), np.uint8)
  mask[0, 0] = mask[-1, -1] = 1
  with pytest.raises(InputError, match=r"its 2 pixels .* without stray pixels"):
    cut(mask, image=np.zeros((1080, 1920, 3), np.uint8))


def test_masks_of_0_and_255_are_masks():
  mask = disk(30, 40, 9)
  np.testing.assert_array_equal(cut(mask * 255).mask, cut(mask).mask)


def test_the_first_object_of_a_picture_lends_lite_its_local_picture():
  masks = [disk(20, 20, 8), disk(40, 60, 8)]
  first, second = crop_objects([IMAGE], masks, [0, 0], LITE, 8)
  assert second.local is first.local
  _, true = crop_objects([IMAGE], masks, [0, 0], LITE, 8, true_local=True)
  assert (true.local != first.local).any()
  np.testing.assert_array_equal(true.whole, first.whole)
  patches = crop_patches([first, second], LITE, max_length=400)
  assert patches[0].local is patches[1].local
  assert patches[0].whole.grid == (14, 14)  # 200 of its 24 x 24 patches: half of the budget


def test_crops_share_the_patch_budget_only_where_published():
  crops = [cut(disk(30, 40, 20)) for _ in range(4)]
  shared = crop_patches(crops, PIXELREFER, 120)
  alone = crop_patches(crops, PIXELREFER, 120, pictures=1)
  assert len(shared[0].picture.patches) <= 30 < len(alone[0].picture.patches) <= 120


def test_patches_of_stride_2_come_in_blocks():
  image = np.zeros((56, 84, 3), np.uint8)
  image[0:14, 14:28] = 1  # second patch of the first block
  image[14:28, 0:14] = 2  # third patch of the first block
  patches = to_patches(image, 100, stride=2)
  assert (patches.grid, patches.tokens) == ((4, 6), 6)
  assert [int(row.max()) for row in patches.patches[:4]] == [0, 1, 2, 0]


@pytest.mark.parametrize(
  ("size", "pixels", "says"),
  [((28, 28 * 201), 10**7, "too long"), ((14, 2800), 14 * 14, "1 tokens"), ((0, 5), 99, "no pix")],
)
def test_pictures_without_a_size_are_refused(size, pixels, says):
  with pytest.raises(InputError, match=says):
    smart_resize(*size, factor=14, max_pixels=pixels)
