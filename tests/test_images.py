"""Images at model resolution against the published processor."""

import json
import math

import numpy as np
import pytest
from PIL import Image
from test_data_check import png_of_size

from data_pipes.errors import InputError
from data_pipes.images import (
  normalise,
  pad_square,
  photo_grid,
  read_image,
  resize_square,
  to_model,
)


@pytest.fixture(scope="module")
def arrays(golden):
  return np.load(golden / "arrays/08_preprocess.npz")


@pytest.fixture(scope="module")
def cases(golden):
  stages = json.loads((golden / "cases.json").read_text())["stages"]
  stage = next(s for s in stages if s["stage"] == "08_preprocess")
  return {case["id"]: case["meta"] for case in stage["cases"]}


@pytest.mark.parametrize("name", ["4x4", "2x3", "7x200", "20x20", "56x56", "101x57"])
def test_resize_is_the_published_one(arrays, name):
  image = arrays[f"resize_{name}/image"]
  resized = resize_square(image, 56)
  np.testing.assert_array_equal(resized, arrays[f"resize_{name}/pixels_u8"][0].transpose(1, 2, 0))


def test_normalise_is_the_published_one(arrays):
  pixels = normalise(arrays["resize_2x3/pixels_u8"])
  assert pixels.dtype == np.float32
  np.testing.assert_array_equal(pixels, arrays["resize_2x3/pixel_values"])
  every = normalise(np.arange(256, dtype=np.uint8))
  assert (every[0], every[255]) == (-1, 1)


@pytest.mark.parametrize("name", ["10x4", "4x10", "7x7", "5x2"])
def test_pad_square_is_the_published_one(arrays, name):
  np.testing.assert_array_equal(
    pad_square(arrays[f"square_{name}/image"]), arrays[f"square_{name}/out"]
  )


@pytest.mark.parametrize(
  ("case", "levels"),
  [("img_png_square", 0), ("img_png_pad", 0), ("img_jpg_square", 1), ("img_jpg_pad", 1)],
)
def test_image_files(golden, arrays, cases, case, levels):
  meta = cases[case]
  image = read_image(golden / meta["file"])
  assert image.shape == (meta["height"], meta["width"], 3)
  ours = to_model(image, meta["size"], meta["aspect_ratio"]).astype(int)
  published = arrays[f"{case}/pixels_u8"][0].transpose(1, 2, 0).astype(int)
  assert np.abs(ours - published).max() <= levels


def test_patch_means_at_384(golden, arrays):
  pixels = normalise(to_model(read_image(golden / "media/img_a.png"), 384))
  means = pixels[:378, :378].reshape(27, 14, 27, 14, 3).mean((1, 3))
  np.testing.assert_allclose(means, arrays["img_png_384/patch_means"][0], atol=1e-5)
  np.testing.assert_allclose(
    pixels.mean((0, 1), np.float64), arrays["img_png_384/channel_mean"][0], atol=1e-5
  )
  np.testing.assert_allclose(
    pixels.std((0, 1), np.float64), arrays["img_png_384/channel_std"][0], atol=1e-4
  )


def test_photo_grid(golden, arrays):
  clip = np.load(golden / "arrays/ndarray_clip.npz")
  frames = clip[clip.files[0]][:5]
  np.testing.assert_array_equal(photo_grid(frames), arrays["photo_grid/grid"])
  assert photo_grid(frames, rows=1).shape == (33, 5 * 47, 3)
  assert photo_grid(frames, cols=4).shape == (2 * 33, 4 * 47, 3)
  with pytest.raises(InputError, match="5 frames do not fit"):
    photo_grid(frames, rows=2, cols=2)


def test_image_grid(golden, arrays, cases):
  image = read_image(golden / "media/img_a.png")
  count = cases["img_grid"]["num_frames"]
  side = math.ceil(math.sqrt(count))
  ours = [to_model(i, 56) for i in (photo_grid([image] * count, side, side), image)]
  np.testing.assert_array_equal(np.stack(ours), arrays["img_grid/pixels_u8"].transpose(0, 2, 3, 1))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path, mode):
  suffix = "tif" if mode == "CMYK" else "png"
  Image.new(mode, (5, 4)).save(tmp_path / f"image.{suffix}")
  image = read_image(tmp_path / f"image.{suffix}")
  assert image.shape == (4, 5, 3)
  assert image.dtype == np.uint8


def test_bad_input(tmp_path):
  (tmp_path / "text.png").write_text("no image")
  with pytest.raises(InputError, match=r"text\.png: cannot be read as an image \(unknown format\)"):
    read_image(tmp_path / "text.png")
  Image.new("RGB", (64, 64)).save(tmp_path / "cut.png")
  whole = (tmp_path / "cut.png").read_bytes()
  (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
  with pytest.raises(InputError, match=r"cut\.png"):
    read_image(tmp_path / "cut.png")
  with pytest.raises(InputError, match="no such image"):
    read_image(tmp_path / "absent.png")
  with pytest.raises(InputError, match="accepted: square, pad"):
    to_model(np.zeros((4, 4, 3), np.uint8), 8, "crop")


@pytest.mark.torch
@pytest.mark.parametrize("shape", [(720, 1280), (31, 17), (384, 384), (1, 900)])
def test_equal_to_the_siglip_processor(shape):
  from transformers import SiglipImageProcessorPil

  image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
  processor = SiglipImageProcessorPil(size={"height": 384, "width": 384})
  pixels = processor(images=Image.fromarray(image), return_tensors="np")["pixel_values"][0]
  np.testing.assert_allclose(
    normalise(to_model(image, 384)), np.transpose(pixels, (1, 2, 0)), atol=1e-6
  )


def test_pictures_that_would_fill_the_memory_are_refused_before_decoding(tmp_path):
  for size in (20_000, 11_586):  # above Pillow's limit as well; above ours alone
    (tmp_path / "over.png").write_bytes(png_of_size(size, size))
    with pytest.raises(InputError, match=r"over\.png: ") as caught:
      read_image(tmp_path / "over.png")
    assert caught.value.kind == "too-large"
  with pytest.raises(InputError, match=r"found 11586x11586 pixels .* accepted: up to 134217728"):
    read_image(tmp_path / "over.png")
