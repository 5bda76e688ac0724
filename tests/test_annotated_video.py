"""`vr ask --save-video`: every frame at its time, objects in their colours, text that fits."""

from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image, ImageFont

from data_pipes.drawing import colour_of, shortened
from data_pipes.video import open_video
from vr_jax import cli
from vr_jax.inference import annotated_video
from vr_jax.inference.regions import Region
from vr_jax.inference.requests import Answer, Request

QUESTION = "What is <region> doing?"
FONT = ImageFont.load_default(16)


def answer(text="It rolls.", **tokens):
  objects = tuple({"name": name, "tokens": frames} for name, frames in tokens.items())
  return Answer(text, (), (), objects, ())


def decoded(path):
  """(frames, their times in seconds)."""
  with av.open(str(path)) as container:
    frames = [(f.to_ndarray(format="rgb24"), f.time) for f in container.decode(video=0)]
  return [image for image, _ in frames], [time for _, time in frames]


def colour(index):
  return np.array([int(colour_of(index)[i : i + 2], 16) for i in (1, 3, 5)])


def share(image, index):
  """How much of an image has the colour of an object."""
  return (np.abs(image.astype(int) - colour(index)).max(-1) < 40).mean()


@pytest.fixture
def clip(tmp_path):
  """Frames of 96 x 64 at uneven times, turned by a quarter."""
  path, times = tmp_path / "clip.mp4", [0, 40, 80, 1000, 1040, 3000]
  with av.open(str(path), "w") as container:
    stream = container.add_stream("libx264", rate=25)
    stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
    stream.set_display_rotation(90)
    stream.codec_context.time_base = Fraction(1, 1000)
    for i, time in enumerate(times):
      frame = av.VideoFrame.from_ndarray(np.full((64, 96, 3), 40 * i, np.uint8), format="rgb24")
      frame.pts, frame.time_base = time, Fraction(1, 1000)
      container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
  return path


def test_every_frame_is_shown_at_its_time_and_turned(clip, tmp_path):
  path = tmp_path / "shown.mp4"
  region = Region(box=(8, 8, 50, 80), frame=1, name="ball")
  annotated_video.write(path, Request(clip, QUESTION, [region]), answer(ball=[[1]]))
  frames, times = decoded(path)
  assert times == pytest.approx([0, 0.04, 0.08, 1, 1.04, 3], abs=1e-3)
  height, width = open_video(clip).size
  assert (height, width) == (96, 64)
  picture = round(height * frames[0].shape[1] / width)
  assert frames[0].shape[0] > picture + 40
  grey = [int(np.median(frame[picture // 2 : picture])) for frame in frames]
  assert np.allclose(grey, 40 * np.arange(6), atol=6)
  # The mask stays for half a second.
  outlined = [share(frame[:picture], 0) > 0.005 for frame in frames]
  assert outlined == [False, True, True, False, False, False]


def test_each_object_has_its_colour_and_its_track(tmp_path):
  """Blocks lie where the frames are, in the picture and below it."""
  path, frames = tmp_path / "shown.mp4", [np.full((75, 101, 3), 90, np.uint8)] * 20
  regions = [
    Region(box=(5, 5, 30, 30), frame=2, name="left"),
    Region(box=(60, 40, 90, 70), frame=2, name="right"),
    Region(box=(60, 40, 90, 70), frame=18, name="right"),
  ]
  told = answer(left=[[2]], right=[[2], [18]])
  annotated_video.write(path, Request(frames, "<region> or <region>?", regions), told)
  shown, times = decoded(path)
  assert len(shown) == 20
  assert times[1] == pytest.approx(1 / 3, abs=1e-3)
  assert shown[0].shape[0] % 2 == shown[0].shape[1] % 2 == 0
  width, picture = shown[0].shape[1], round(75 * shown[0].shape[1] / 101) // 2 * 2
  first = shown[2][:picture]
  assert share(first[:, : width // 2], 0) > 0.01 > share(first[:, width // 2 :], 0)
  assert share(first[:, width // 2 :], 1) > 0.01 > share(first[:, : width // 2], 1)
  assert share(shown[10][:picture], 1) == 0
  below = shown[10][picture:].astype(int)
  columns = [np.flatnonzero((np.abs(below - colour(i)).max(-1) < 40).any(0)) for i in (0, 1)]
  assert np.ptp(columns[0]) < width / 8  # one block
  assert np.ptp(columns[1]) > width / 2  # two, far apart
  assert columns[0].min() == pytest.approx(columns[1].min(), abs=4)


@pytest.mark.parametrize("size", [(37, 53), (641, 359), (101, 1999), (333, 221)])
def test_any_size_and_a_still(tmp_path, size):
  path, image = tmp_path / "shown.mp4", tmp_path / "image.png"
  Image.fromarray(np.full((*size, 3), 90, np.uint8)).save(image)
  request = Request(image, QUESTION, [Region(box=(3, 3, size[1] // 2, size[0] // 2))])
  annotated_video.write(path, request, answer("", **{"object 0": [[0]]}))
  frames, times = decoded(path)
  assert times[-1] + times[1] == pytest.approx(annotated_video.STILL, abs=0.01)
  width = frames[0].shape[1]
  assert annotated_video.WIDTHS[0] <= width <= annotated_video.WIDTHS[1]
  assert share(frames[0][: size[0] * width // size[1]], 0) > 0.002


def test_long_answers_are_wrapped_and_cut():
  words = ["WIDE" * 3, "thin", "iii", "a" * 70, "Ünïcode,"] * 30
  lines = annotated_video._wrapped(" ".join(words) + "\n\n1. next\u2028last", 300, FONT)
  assert max(FONT.getlength(line) for line in lines) <= 300
  assert lines[-2:] == ["1. next", "last"]
  assert "".join(lines[:-2]).replace(" ", "") == "".join(words)
  assert annotated_video._wrapped(" \n", 300, FONT) == []
  assert annotated_video._wrapped("WW", 3, FONT) == ["W", "W"]
  short, long, longer = (
    annotated_video._Panel(480, 270, QUESTION, answer("word " * n), [0.0]).below(
      Image.new("RGB", (480, 270)), 0
    )
    for n in (5, 2000, 4000)
  )
  assert short.height < long.height == longer.height < 3 * 270
  assert FONT.getlength(shortened("a very long name indeed", 90, FONT)) <= 90
  assert shortened("name", 90, FONT) == "name"


def test_names_stand_in_the_question_and_segments_are_told():
  asked = annotated_video._question("Is <region> near <region>?", ["dog", r"a\1"])
  assert asked == r"Is <dog> near <a\1>?"
  told = answer(dog=[[0, 1, 3], [4]], cat=[[7]])
  assert annotated_video.segments(told) == [
    "dog: frames of its tokens: 1: 0-3, 2: 4",
    "cat: frames of its tokens: 1: 7",
  ]


def test_the_command_writes_the_file_and_tells_the_segments(golden, tmp_path, capsys):
  source, path = golden / "media" / "clip_mp4.mp4", tmp_path / "shown.mp4"
  command = ["ask", "--checkpoint", str(golden / "tiny_videorefer_qwen2"), "--video", str(source)]
  command += ["--region", "cat=box:10,10,60,50@3", "--question", QUESTION, "--max-new-tokens", "4"]
  command += ["--scene-frames", "4"]
  assert cli.main([*command, "--save-video", str(path)]) == 0
  assert capsys.readouterr().err == f"{path}\ncat: frames of its tokens: 1: 3\n"
  with av.open(str(path)) as made, av.open(str(source)) as held:
    assert made.streams.video[0].codec_context.name == "h264"
    times = [[f.time for f in c.decode(video=0)] for c in (made, held)]
  assert times[0] == pytest.approx(times[1], abs=1e-3)
  assert cli.main([*command, "--save-video", str(tmp_path / "shown.avi")]) == 2
  assert "ends in .mp4" in capsys.readouterr().err
  assert cli.main([*command, "--save-video", str(tmp_path / "absent" / "shown.mp4")]) == 2
  assert "cannot be written" in capsys.readouterr().err
  assert list(tmp_path.iterdir()) == [path]
