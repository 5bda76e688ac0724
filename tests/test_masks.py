"""Masks: COCO's formats to the bit, the published grid rule to the last rounding."""

import itertools
import json
import tracemalloc

import numpy as np
import pytest

from data_pipes import masks as masks_module
from data_pipes.errors import InputError
from data_pipes.masks import (
  annotation_to_mask,
  counts_to_mask,
  counts_to_string,
  encode_mask,
  mask_from_box,
  mask_from_point,
  mask_to_counts,
  mask_to_grid,
  resize_mask,
  segmentation_to_mask,
  string_to_counts,
  vanished,
)


def stage(golden, name: str) -> dict:
  stages = json.loads((golden / "cases.json").read_text())["stages"]
  return {c["id"]: c["meta"] for s in stages if s["stage"] == name for c in s["cases"]}


# Run lengths and polygons


def test_published_segmentations(golden):
  arrays = np.load(golden / "arrays/08_preprocess.npz")
  cases = {k: m for k, m in stage(golden, "08_preprocess").items() if k.startswith("annToMask")}
  assert len(cases) == 21
  for name, meta in cases.items():
    segmentation, height, width = meta["segmentation"], meta["h"], meta["w"]
    if "error" not in meta:
      mask = segmentation_to_mask(segmentation, height, width)
      np.testing.assert_array_equal(mask, arrays[f"{name}/mask"], err_msg=name)
      assert mask.dtype == np.uint8
    elif isinstance(segmentation, list):
      with pytest.raises(InputError, match="height and width"):
        segmentation_to_mask(segmentation)
    else:  # run lengths know their size: upstream asks for another one that it does not use
      mask = segmentation_to_mask(segmentation)
      np.testing.assert_array_equal(mask, arrays["annToMask_rle_uncompressed_23/mask"])


@pytest.mark.parametrize("density", [0, 0.01, 0.5, 0.97, 1])
@pytest.mark.parametrize("shape", [(1, 1), (7, 1), (1, 9), (23, 31), (480, 854)])
def test_round_trip(shape, density):
  rng = np.random.default_rng(0)
  mask = (rng.random(shape) < density).astype(np.uint8)
  encoded = encode_mask(mask)
  assert encoded["size"] == list(shape)
  np.testing.assert_array_equal(segmentation_to_mask(encoded), mask)
  counts = string_to_counts(encoded["counts"].encode())
  assert counts_to_string(counts) == encoded["counts"]
  np.testing.assert_array_equal(counts, mask_to_counts(mask))
  plain = {"size": list(shape), "counts": counts.tolist()}
  np.testing.assert_array_equal(segmentation_to_mask(plain), mask)


def test_strings_are_the_ones_coco_writes():
  # From the COCO API for these counts; the second has differences below zero and long numbers.
  assert counts_to_string([713]) == "Yf0"
  assert counts_to_string([0, 713]) == "0Yf0"
  counts = [531, 13, 10, 13, 10, 13, 10, 13, 10, 13, 10, 13, 10, 13, 10, 13, 8]
  assert counts_to_string(counts) == "c`0=:0000000000000N"
  assert string_to_counts("c`0=:0000000000000N").tolist() == counts
  assert counts_to_string([]) == ""
  long = [10**9, 3, 10**9, 10**9, 0, 1, 2]
  assert string_to_counts(counts_to_string(long)).tolist() == long


def test_columns_come_first():
  assert counts_to_mask([1, 2, 3], 2, 3).tolist() == [[0, 1, 0], [1, 0, 0]]


def rasterise(points: list[tuple[float, float]], height: int, width: int) -> np.ndarray:
  """COCO's polygon rule, one point after the other, as its definition goes."""
  fine = [(int(5 * x + 0.5), int(5 * y + 0.5)) for x, y in points]
  path = []
  for (x0, y0), (x1, y1) in zip(fine, fine[1:] + fine[:1], strict=True):
    wide = abs(x1 - x0) >= abs(y1 - y0)
    length = max(abs(x1 - x0), abs(y1 - y0))
    backwards = (x0 > x1) if wide else (y0 > y1)
    (ax, ay), (bx, by) = ((x1, y1), (x0, y0)) if backwards else ((x0, y0), (x1, y1))
    slope = ((by - ay) if wide else (bx - ax)) / max(length, 1)
    for d in range(length + 1):
      t = length - d if backwards else d
      path.append(
        (ax + t, int(ay + slope * t + 0.5)) if wide else (int(ax + slope * t + 0.5), ay + t)
      )
  mask = np.zeros((width, height + 1), int)
  for (u0, v0), (u1, v1) in itertools.pairwise(path):
    column = (min(u0, u1) + 0.5) / 5 - 0.5
    if u0 != u1 and column == int(column) and 0 <= column < width:
      row = np.ceil(np.clip((min(v0, v1) + 0.5) / 5 - 0.5, 0, height))
      mask[int(column), int(row)] += 1
  # Column after column in one line: what is below the last row goes on in the next column.
  line = np.zeros(width * height + 1, int)
  for x, y in np.argwhere(mask):
    line[x * height + y] += mask[x, y]
  return (np.cumsum(line[:-1]) % 2).reshape(width, height).T


def test_polygons_by_the_definition():
  rng = np.random.default_rng(5)
  for _ in range(200):
    height, width = rng.integers(1, 40, 2).tolist()
    points = rng.uniform(-15, 50, (rng.integers(3, 8), 2))
    points = [points, points.round(), points.round(1)][rng.integers(3)]
    expected = rasterise([tuple(p) for p in points.tolist()], height, width)
    mask = segmentation_to_mask([points.ravel().tolist()], height, width)
    np.testing.assert_array_equal(mask, expected, err_msg=f"{points.tolist()} {height} {width}")


def test_polygons_are_cut_to_the_frame():
  rng = np.random.default_rng(6)
  for scale in (100, 300, 1000, 3000):
    height, width = rng.integers(5, 60, 2).tolist()
    points = rng.normal(20, scale, (6, 2))
    points[:3, rng.integers(2)] = rng.uniform(0, 40, 3)  # long edges that stay in a row or column
    expected = rasterise([tuple(p) for p in points.tolist()], height, width)
    mask = segmentation_to_mask([points.ravel().tolist()], height, width)
    np.testing.assert_array_equal(mask, expected, err_msg=f"{points.tolist()} {height} {width}")
  far = [[1e6, -1e6, -1e6, 1e6, 1e6, 1e6, -1e6, -1e6] * 2]  # drawn to the end, they took gigabytes
  tracemalloc.start()
  mask = segmentation_to_mask(far, 1080, 1920)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert mask.shape == (1080, 1920)
  assert peak < 5 * mask.nbytes  # the frame, its run lengths and its crossings


def test_many_edges_are_worked_out_in_blocks(monkeypatch):
  points = np.random.default_rng(7).uniform(-50, 250, (40, 2)).ravel().tolist()
  whole = segmentation_to_mask([points], 150, 200)
  monkeypatch.setattr(masks_module, "_CROSSINGS", 64)
  np.testing.assert_array_equal(segmentation_to_mask([points], 150, 200), whole)


def test_polygon_against_the_coco_api():
  # Areas and pixels that pycocotools 2.0.11 gives.
  segmentation = [[16.5, 39.4, 33.7, 9.0, 26.0, 40.2]]
  mask = segmentation_to_mask(segmentation, 58, 60)
  assert mask.sum() == 150
  assert encode_mask(mask)["counts"] == "PP11g13M2N2O1N2N2N2O1N00N2N3M2N2N2N2No^1"


def test_polygons_are_united():
  square, inside = [2, 2, 12, 2, 12, 12, 2, 12], [4, 4, 8, 4, 8, 8, 4, 8]
  one = segmentation_to_mask([square], 20, 20)
  assert one.sum() == 100
  np.testing.assert_array_equal(segmentation_to_mask([square, inside], 20, 20), one)


def test_null_and_empty_segmentations():
  for annotation in ({"segmentation": None}, {"segmentation": []}, None):
    mask = annotation_to_mask(annotation, 5, 7)
    assert (mask.shape, mask.sum(), mask.dtype) == ((5, 7), 0, np.uint8)


RLE = {"size": [23, 31], "counts": "c`0=:0000000000000N"}


@pytest.mark.parametrize(
  ("segmentation", "words"),
  [
    (RLE | {"size": [31, 31]}, r"cover 713 pixels; its size 31x31 has 961"),
    (RLE | {"size": [31, 23]}, r"the mask is 31x23 \(height x width\), the video 23x31"),
    (RLE | {"size": [23]}, r"mask size is \[23\]"),
    (RLE | {"size": ["23", 31]}, "mask size"),
    (RLE | {"counts": "c`0="}, "cover"),
    (RLE | {"counts": "c`"}, "break off"),
    (RLE | {"counts": "c `0"}, "no compressed COCO run lengths"),
    (RLE | {"counts": "¼½"}, "no compressed COCO run lengths"),
    (RLE | {"counts": ""}, "no compressed COCO run lengths"),
    (RLE | {"counts": "oooooooooooo0"}, "too large"),
    (RLE | {"counts": "I" + counts_to_string([720])}, "negative run length"),
    (RLE | {"counts": [700, 12, -1, 2]}, "negative run length -1"),
    (RLE | {"counts": [700, 13.0]}, "whole numbers"),
    (RLE | {"counts": [700, [13]]}, "whole numbers"),
    (RLE | {"counts": None}, "counts are None"),
    ({"size": [23, 31]}, "counts are None"),
    ("c`0=", "accepted: run lengths, polygons, null"),
    ([[1, 1, 5, 5]], "three points"),
    ([[1, 1, 5, 5, 3]], "three points"),
    ([1, 1, 5, 5, 3, 3], "three points"),
    ([[1, 1, "x", 5, 3, 3]], "three points"),
    ([[1, 1, float("nan"), 5, 3, 3]], "no video has"),
    ([[1, 1, 1e9, 5, 3, 3]], "no video has"),
  ],
)
def test_bad_segmentations(segmentation, words):
  with pytest.raises(InputError, match=words) as error:
    annotation_to_mask({"segmentation": segmentation}, 23, 31)
  assert "\n" not in str(error.value)
  assert len(str(error.value)) < 200


def test_bad_annotations():
  for annotation in ([], {}, {"counts": "0"}):
    with pytest.raises(InputError, match="'segmentation' key"):
      annotation_to_mask(annotation, 23, 31)


# The patch grid


def test_published_grids(golden):
  arrays = np.load(golden / "arrays/03_region.npz")
  compared = 0
  for name, meta in stage(golden, "03_region").items():
    if meta.get("fragile_mask") or name == "zero_masks_tensor":
      continue
    for i in range(len(meta.get("mask_shapes", []))):
      masks, cells = arrays[f"{name}/masks_{i}"], arrays[f"{name}/mask_bin_{i}"]
      grid, aspect_ratio = cells.shape[-1], meta["image_aspect_ratio"]
      ours = mask_to_grid(masks, grid, aspect_ratio, "published")
      assert ours.dtype == np.uint8
      np.testing.assert_array_equal(ours, cells, err_msg=name)
      if f"{name}/mask_resized_{i}" in arrays and aspect_ratio == "square":
        resized = arrays[f"{name}/mask_resized_{i}"]
        np.testing.assert_allclose(resize_mask(masks, grid), resized, atol=1e-6 * masks.max())
      compared += 1
  assert compared > 30


def hinges(n, grid):
  """Cells along a side of `n` pixels whose source changes where scale * (i + 0.5) is rounded before
  0.5 is taken off, as PyTorch does without fused multiply-add."""
  scale, middles = np.float32(n) / np.float32(grid), np.arange(grid, dtype=np.float32) + 0.5
  once = (np.float64(scale) * middles - 0.5).astype(np.float32)
  twice = scale * middles - np.float32(0.5)
  return (np.floor(once) != np.floor(twice)) | ((once % 1 > 0) != (twice % 1 > 0))


@pytest.mark.torch
def test_grid_equals_torch():
  """Every size of a side: the cells that each pixel reaches are PyTorch's, and the values too.

  Ours are those of PyTorch with fused multiply-add; without it, cells that hinge on that are left
  out.
  """
  import torch
  from torch.nn import functional as F

  fused = torch.backends.cpu.get_cpu_capability() != "DEFAULT"
  assert sum(hinges(n, 27).sum() for n in range(1, 90)) == 4  # few are left out
  rng = np.random.default_rng(0)
  for n in [*range(1, 90), *rng.integers(90, 2200, 20), 405, 411, 543, 549, 795, 1005, 1080]:
    for grid in (4, 16, 27):
      # One mask per source row; a grid row is reached by the row or not.
      masks = np.zeros((n, n, 2), np.uint8)
      masks[np.arange(n), np.arange(n)] = 1
      if n > 200:  # the middle, where rounding decides, and others
        masks = masks[[*range(n // 2 - 20, n // 2 + 20), *rng.choice(n, 60)]]
      theirs = F.interpolate(
        torch.from_numpy(masks[:, None]).float(), size=(grid, grid), mode="bilinear"
      )[:, 0].numpy()
      sure = np.full(grid, True) if fused else ~hinges(n, grid)
      cells, ours = theirs > 0, mask_to_grid(masks, grid, rule="published")
      np.testing.assert_array_equal(ours[:, sure], cells[:, sure], err_msg=f"{n} {grid}")
      turned = mask_to_grid(masks.swapaxes(1, 2), grid, rule="published").swapaxes(1, 2)
      np.testing.assert_array_equal(turned[:, sure], cells[:, sure])
  for _ in range(60):
    height, width = rng.integers(1, 300, 2)
    masks = rng.random((3, height, width)).astype(np.float32) * 255
    theirs = F.interpolate(torch.from_numpy(masks[None]), size=(27, 27), mode="bilinear")[0].numpy()
    # Weights and sums; without fused multiply-add also a coordinate below 300, on both axes.
    roundings = 16 if fused else 16 + 4 * 300
    np.testing.assert_allclose(
      resize_mask(masks, 27), theirs, rtol=0, atol=roundings * 2**-24 * 255
    )


def test_a_cell_is_set_by_its_source_pixels():
  # 8 pixels to 4 cells: cell i lies between the pixels 2i and 2i+1.
  for pixel in range(8):
    mask = np.zeros((8, 8), np.uint8)
    mask[pixel, :] = 1
    assert mask_to_grid(mask, 4, rule="published")[:, 0].tolist() == [
      int(i == pixel // 2) for i in range(4)
    ]
  # 12 pixels to 4 cells: the middle one of each three, with no weight on its neighbour.
  for pixel in range(12):
    mask = np.zeros((12, 12), np.uint8)
    mask[:, pixel] = 1
    expected = [int(pixel == 3 * i + 1) for i in range(4)]
    assert mask_to_grid(mask, 4, rule="published")[0].tolist() == expected
    assert vanished(mask, mask_to_grid(mask, 4, rule="published")) == (sum(expected) == 0)


def test_vanishing_rates_are_the_published_table():
  """Share of square objects at random places that leave no cell (one row of the table)."""
  rng = np.random.default_rng(0)
  for side, share in ((8, 0.84), (16, 0.47), (24, 0.18), (32, 0.0)):
    gone = 0
    for trial in range(400):
      y, x = rng.integers(0, 480 - side + 1), rng.integers(0, 854 - side + 1)
      mask = mask_from_box((x, y, x + side, y + side), 480, 854)
      gone += bool(vanished(mask, mask_to_grid(mask, 27, rule="published")))
      assert trial > 20 or mask_to_grid(mask, 27, rule="area").any()
    assert gone / 400 == pytest.approx(share, abs=0.08)


def test_pad():
  mask = np.ones((10, 31), np.uint8)
  cells = mask_to_grid(mask, 31, "pad")
  assert cells.sum() == 310
  assert cells[10:20].all()  # (31 - 10) // 2 rows of padding above
  np.testing.assert_array_equal(mask_to_grid(mask.T, 31, "pad"), cells.T)
  assert mask_to_grid(mask, 31).all()


def test_area_rule():
  rng = np.random.default_rng(1)
  for shape in ((480, 854), (37, 53), (3, 2), (27, 27)):
    mask = np.zeros(shape, np.uint8)
    assert not mask_to_grid(mask, 27, rule="area").any()
    mask[rng.integers(shape[0]), rng.integers(shape[1])] = 1
    cells = mask_to_grid(mask, 27, rule="area")
    assert cells.any()
    assert not vanished(mask, cells)
    assert mask_to_grid(np.ones(shape, np.uint8), 27, rule="area").all()
  half = np.zeros((16, 16), np.uint8)
  half[:, :6] = 1  # of the cells four pixels wide, the second is half covered
  assert mask_to_grid(half, 4, rule="area")[0].tolist() == [1, 1, 0, 0]
  half[:, 5] = 0
  assert mask_to_grid(half, 4, rule="area")[0].tolist() == [1, 0, 0, 0]
  with pytest.raises(InputError, match="accepted: keep, published, area"):
    mask_to_grid(half, 4, rule="max")


def test_keep_rule_is_the_published_one_but_for_what_vanishes():
  rng = np.random.default_rng(5)
  lost = 0
  for size in (2, 4, 9, 40, 200):
    for _ in range(20):
      y, x = rng.integers(0, 480 - size), rng.integers(0, 854 - size)
      mask = np.zeros((480, 854), np.uint8)
      mask[y : y + size, x : x + size] = 1
      published, kept = (mask_to_grid(mask, 27, rule=rule) for rule in ("published", "keep"))
      if published.any():
        np.testing.assert_array_equal(kept, published)
      else:
        lost += 1
        np.testing.assert_array_equal(kept, mask_to_grid(mask, 27, rule="area"))
        # Every kept cell holds a part of the object.
        ys, xs = np.nonzero(kept)
        assert len(ys)
        for i, j in zip(ys, xs, strict=True):
          assert (i + 1) * 480 / 27 > y
          assert i * 480 / 27 < y + size
          assert (j + 1) * 854 / 27 > x
          assert j * 854 / 27 < x + size
  assert 20 < lost < 80
  assert not mask_to_grid(np.zeros((480, 854), np.uint8), 27).any()  # an absent object stays absent
  both = np.stack([mask, np.zeros_like(mask)])
  np.testing.assert_array_equal(mask_to_grid(both, 27)[0], mask_to_grid(mask, 27))


def test_leading_axes():
  masks = (np.random.default_rng(0).random((2, 3, 20, 30)) < 0.02).astype(np.uint8)
  cells = mask_to_grid(masks, 5)
  assert cells.shape == (2, 3, 5, 5)
  np.testing.assert_array_equal(cells[1, 2], mask_to_grid(masks[1, 2], 5))
  assert vanished(masks, cells).shape == (2, 3)


# Boxes, points, mask images


@pytest.mark.parametrize(
  ("box", "rows", "columns"),
  [
    (("25%", 3, "50%", "100%"), (3, 9), (3, 6)),
    ((2, 3, 5, 7), (3, 7), (2, 5)),
    ((2.2, 3.9, 2.4, 4.1), (3, 5), (2, 3)),
    ((-5, -5, 100, 2), (0, 2), (0, 12)),
  ],
)
def test_box(box, rows, columns):
  expected = np.zeros((9, 12), np.uint8)
  expected[slice(*rows), slice(*columns)] = 1
  np.testing.assert_array_equal(mask_from_box(box, 9, 12), expected)
  np.testing.assert_array_equal(segmentation_to_mask({"box": list(box)}, 9, 12), expected)


@pytest.mark.parametrize("shape", [(480, 854), (1080, 1920), (720, 404), (240, 320)])
def test_a_point_leaves_a_cell_wherever_it_is(shape):
  height, width = shape
  rng = np.random.default_rng(0)
  corners = [(0, 0), (width - 1, 0), (0, height - 1), (width - 1, height - 1)]
  inside = [(rng.uniform(0, width - 0.01), rng.uniform(0, height - 0.01)) for _ in range(60)]
  radius = np.hypot(height, width) / 40
  for x, y in [*corners, *inside]:
    mask = mask_from_point((x, y), height, width)
    assert mask[int(y), int(x)]
    assert mask.sum() <= 3.3 * (radius + 1) ** 2
    for grid in (20, 27):
      assert not vanished(mask, mask_to_grid(mask, grid)), (x, y, grid)


def test_point_radius():
  assert mask_from_point((4, 5), 20, 20, radius=0).sum() == 1
  assert mask_from_point((4, 5), 20, 20, radius=1).sum() == 5


@pytest.mark.parametrize(
  ("call", "words"),
  [
    (lambda: mask_from_box((5, 1, 5, 4), 9, 12), "box 5,1,5,4 is empty"),
    (lambda: mask_from_box((12, 1, 15, 4), 9, 12), "outside the video of 12x9"),
    (lambda: mask_from_box((1, 2, 3), 9, 12), "x1,y1,x2,y2 in pixels"),
    (lambda: mask_from_box((1, 2, 3, float("inf")), 9, 12), "x1,y1,x2,y2 in pixels"),
    (lambda: mask_from_point((12, 3), 9, 12), "point 12,3 lies outside"),
    (lambda: mask_from_point(("a", 3), 9, 12), "x,y in pixels"),
  ],
)
def test_bad_boxes_and_points(call, words):
  with pytest.raises(InputError, match=words):
    call()
