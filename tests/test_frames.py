"""Which frame has which number, and what was pointed at: `vr frames`, open_video, read_regions."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_video_index import number

import vr_jax
from data_pipes.drawing import with_rulers
from data_pipes.errors import InputError
from vr_jax import cli

CASES = Path(__file__).parent / "cases/media"
CLIP = CASES / "cat.ts"  # 80 frames at 25 a second: 0..39, then 100..139


def frames(*words: str) -> int:
  return cli.main(["frames", *map(str, words)])


def test_a_picture_a_frame_by_number_and_time(tmp_path, capsys):
  assert frames(CLIP, "--at", "45, 3,1.02s,0:00.5", "--out", tmp_path / "new/out") == 0
  files = sorted((tmp_path / "new/out").iterdir())
  assert [file.name for file in files] == ["000003.png", "000012.png", "000025.png", "000045.png"]
  shown = [np.asarray(Image.open(file))[-96:, -128:] for file in files]  # the rest is rulers
  assert [number(picture) for picture in shown] == [3, 12, 25, 105]
  assert np.array_equal(shown[0], vr_jax.open_video(CLIP).frames([3])[0])
  assert "4 of the frames of" in (text := capsys.readouterr().out)
  assert "80 frames, 128x96 (width x height), 25 a second, 0.000 to 3.160 s" in text


@pytest.mark.parametrize(
  ("words", "expected"),
  [
    (["--every", "0.5s"], [0, 12, 25, 37, 50, 62, 75]),
    (["--every", "30", "--at", "79"], [0, 30, 60, 79]),
    (["--region", "box:20,20,60,60@7"], [7]),
    ([], [2, 7, 12, 17, 22, 27, 32, 37, 42, 47, 52, 57, 62, 67, 72, 77]),  # the scene
  ],
)
def test_which_frames(tmp_path, words, expected):
  assert frames(CLIP, *words, "--out", tmp_path / "out") == 0
  assert [int(file.stem) for file in sorted((tmp_path / "out").iterdir())] == expected


def test_a_contact_sheet(tmp_path):
  assert frames(CLIP, "--at", "3,45,46", "--out", tmp_path / "sheet.png") == 0
  sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
  height, width = sheet.shape[0] // 2, sheet.shape[1] // 2
  cells = [sheet[:height, :width], sheet[:height, width:], sheet[height:, :width]]
  assert [number(cell[-96:, -128:]) for cell in cells] == [3, 105, 106]
  assert (sheet[height:, width:] == 255).all()


def test_an_image_has_one_frame_as_a_viewer_shows_it(tmp_path):
  assert frames(CASES / "exif.jpg", "--out", tmp_path / "out.d/sheet.png") == 0
  with Image.open(tmp_path / "out.d/sheet.png") as sheet:
    assert sheet.height > 128


def test_rulers_count_in_pixels_of_the_source():
  blank = Image.new("RGB", (240, 180), "gray")
  ruled = np.asarray(with_rulers(blank, (1080, 1440), "frame 5").convert("L"))
  top, left = ruled.shape[0] - 180, ruled.shape[1] - 240
  assert (ruled[top:, left:] == 128).all()
  dark = np.flatnonzero(ruled[top - 5, left:] < 64)  # the long ticks, each 500 pixels
  assert dark.tolist() == [0, 83, 166]


@pytest.mark.parametrize(
  ("words", "reason"),
  [
    (["--at", "3,80"], "--at 3,80: frame 80"),
    (["--at", "soon"], "--at soon: frame 'soon'"),
    (["--every", "0s"], "--every 0s: accepted: a time such as 1s"),
    (["--every", "-3"], "--every -3: accepted: a time such as 1s"),
    (["--out", "file/a"], "--out file/a: cannot be written ("),
    (["--out", "file/a.png"], "--out file/a.png: cannot be written ("),
    (["--out", "sheet.pdf"], "--out sheet.pdf: accepted: a folder, or a sheet (.png"),
  ],
)
def test_what_is_refused_in_one_line(tmp_path, capsys, monkeypatch, words, reason):
  monkeypatch.chdir(tmp_path)
  Path("file").touch()
  assert frames(CLIP, "--out", "out", *words) == 2
  assert reason in capsys.readouterr().err


def test_an_open_video():
  video = vr_jax.open_video(CLIP)
  assert (len(video), video.size, video.fps) == (80, (96, 128), 25)
  assert np.allclose(video.times, np.arange(80) / 25)
  assert [number(frame) for frame in video.frames([50, 2])] == [110, 2]
  assert vr_jax.open_video(CASES / "exif.jpg").times is None


def test_regions_as_the_model_gets_them():
  video = vr_jax.open_video(CLIP)
  box = vr_jax.Region(box=(10, 20, 30, 50), frame=3)
  masks = vr_jax.read_regions(CLIP, [box, "cat=box:0%,0%,50%,50%@0.5s", "cat=point:64,48@40"])
  assert {name: list(by_frame) for name, by_frame in masks.items()} == {
    "object 0": [3],
    "cat": [12, 40],
  }
  mask = masks["object 0"][3]
  assert (mask.dtype, mask.shape, mask.sum()) == (bool, (96, 128), 600)
  assert mask[20:50, 10:30].all()
  assert np.array_equal(vr_jax.read_regions(video, box)["object 0"][3], mask)
  with pytest.raises(InputError, match="region box:10,20,30,50@90: frame 90"):
    vr_jax.read_regions(video, "box:10,20,30,50@90")
  for odd in (None, 5, [None], [{"box": [1, 1, 9, 9]}]):
    with pytest.raises(InputError, match="accepted: "):
      vr_jax.read_regions(video, odd)
  with pytest.raises(InputError, match="have one name"):
    vr_jax.read_regions(video, ["box:1,1,9,9@0", "object_0=box:1,1,9,9@0", box_of_name("object 0")])


def box_of_name(name: str) -> vr_jax.Region:
  return vr_jax.Region(box=(1, 1, 9, 9), frame=2, name=name)
