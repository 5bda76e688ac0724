"""Frames are numbered as a player shows them, whatever a container says of its packets.

In the numbered clips frame k bears k in eight blocks along the top, bit 0 left, white = 1.
"""

import contextlib
import itertools
import random
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from data_pipes import video_index
from data_pipes.errors import InputError
from data_pipes.images import read_image
from data_pipes.video import open_video
from data_pipes.video_index import index_of, make_index

CASES = Path(__file__).parent / "cases/media"
NUMBERED = {
  "av_x264bf1.avi": range(100),  # B-frames, and decode times alone
  "k_h263.avi": range(100),  # every packet flagged as a keyframe
  "oh_c1.ts": range(24, 60),  # cut at a picture whose leading pictures refer to what is gone
  "late.mp4": range(40),
  "mpeg1.m1v": range(60),  # an elementary stream
  "cover_first.mkv": range(40),
  "fs_cut.mp4": range(60),  # 60 % of a download
  "cat.ts": (*range(40), *range(100, 140)),  # times that start again
  "an.webp": range(12),
}


def number(frame: np.ndarray) -> int:
  """The number that a frame bears."""
  grey = frame.mean(-1)
  block = grey.shape[1] // 8
  return sum(int(grey[4, block * i + block // 2] > 127) << i for i in range(8))


def picture(k: int) -> np.ndarray:
  """A frame [96, 128, 3] that bears its number."""
  y, x = np.mgrid[:96, :128]
  frame = np.stack([(2 * x + 3 * k) % 200, (2 * y + k) % 200, np.full_like(x, 90)], -1)
  frame = frame.astype(np.uint8)
  for i in range(8):
    frame[:12, 16 * i : 16 * i + 16] = 255 * (k >> i & 1)
  return frame


def write(path: Path, codec: str, b_frames: int = 0, first: int = 0, **options: str) -> Path:
  """A clip of 48 numbered frames in groups of 12."""
  with av.open(str(path), "w") as container:
    stream = container.add_stream(codec, rate=25, options=options)
    stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
    context = stream.codec_context
    context.gop_size, context.bit_rate, context.max_b_frames = 12, 2_000_000, b_frames
    for k in range(48):
      frame = av.VideoFrame.from_ndarray(picture(first + k), format="rgb24")
      frame.pts, frame.time_base = k, Fraction(1, 25)
      container.mux(stream.encode(frame))
    container.mux(stream.encode())
  return path


def copied(source: Path, path: Path, first: int = 0, flagged: bool = False, **options) -> Path:
  """The packets from the `first` on, as `ffmpeg -c copy` does; all flagged as keyframes."""
  with av.open(str(source)) as reading, av.open(str(path), "w", options=options) as writing:
    stream = writing.add_stream_from_template(reading.streams.video[0])
    for k, packet in enumerate(reading.demux(video=0)):
      if packet.dts is not None and k >= first:
        packet.stream = stream
        if flagged:
          packet.is_keyframe = True
        writing.mux(packet)
  return path


def played(path: Path) -> list[int]:
  """The numbers of all frames that FFmpeg's decoder puts out, one packet after the other."""
  numbers = []
  with av.open(str(path)) as container:
    container.streams.video[0].codec_context.thread_count = 1
    packets = container.demux(video=0)
    while True:
      try:
        packet = next(packets, None)
      except av.FFmpegError:
        return numbers
      if packet is None:
        return numbers
      try:
        numbers += [number(frame.to_ndarray(format="rgb24")) for frame in packet.decode()]
      except av.FFmpegError:
        continue


def check(path: Path, expected: list[int]) -> None:
  """All frames at once, some of them, and each alone bear the numbers expected."""
  video = open_video(path)
  assert len(video) == len(expected)
  assert [number(frame) for frame in video.frames(range(len(video)))] == expected
  ids = random.Random(0).sample(range(len(video)), min(9, len(video)))
  for some in ([i] for i in ids):
    assert [number(frame) for frame in video.frames(some)] == [expected[i] for i in some]
  assert [number(frame) for frame in video.frames(ids)] == [expected[i] for i in ids]
  times = video.times
  assert (np.diff(times) > 0).all()
  for i in ids:
    assert video.time_to_frame(float(times[i])) == i


@pytest.mark.parametrize("name", NUMBERED)
def test_frames_bear_their_numbers(name):
  check(CASES / name, list(NUMBERED[name]))


KINDS = {
  **{f"b264.{ext}": ("libx264", 2) for ext in ("avi", "asf", "mxf", "h264", "mpg", "ts", "mkv")},
  **{f"p264.{ext}": ("libx264", 0) for ext in ("avi", "asf", "mxf")},
  **{f"xvid.{ext}": ("mpeg4", 2) for ext in ("avi", "asf", "m4v", "mpg", "mp4")},
  **{f"mpeg2.{ext}": ("mpeg2video", 2) for ext in ("mxf", "m2v", "mpg", "vob", "ts")},
  "wmv.wmv": ("wmv2", 0),
  "msmpeg4.avi": ("msmpeg4", 0),
  "vp8.webm": ("libvpx", 0),
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
  folder = tmp_path_factory.mktemp("clips")
  return {name: write(folder / name, *kind) for name, kind in KINDS.items()}


@pytest.mark.parametrize("name", KINDS)
def test_containers_with_and_without_times(clips, name):
  check(clips[name], list(range(48)))


@pytest.mark.parametrize("name", ["xvid.avi", "wmv.wmv", "msmpeg4.avi", "p264.avi"])
def test_keyframe_flags_that_are_false(clips, tmp_path, name):
  path = copied(clips[name], tmp_path / f"flagged{Path(name).suffix}", flagged=True)
  check(path, list(range(48)))


def test_an_mp4_without_its_table_of_keyframes(clips, tmp_path):
  path = tmp_path / "no_stss.mp4"
  path.write_bytes(clips["xvid.mp4"].read_bytes().replace(b"stss", b"free"))
  check(path, list(range(48)))


@pytest.mark.parametrize("name", ["b264.ts", "mpeg2.mpg", "mpeg2.vob", "xvid.avi"])
def test_joined_and_truncated_files(clips, tmp_path, name):
  data, suffix = clips[name].read_bytes(), Path(name).suffix
  if suffix != ".avi":
    joined = tmp_path / f"joined{suffix}"
    joined.write_bytes(data + data)
    check(joined, [*range(48), *range(48)])
  for share in (0.4, 0.7, 0.93):
    part = tmp_path / f"part{suffix}"
    part.write_bytes(data[: int(share * len(data))])
    check(part, played(part))


@pytest.mark.parametrize("first", [3, 12, 20])
@pytest.mark.parametrize("name", ["b264.ts", "b264.mkv", "mpeg2.ts", "xvid.avi"])
def test_recordings_that_begin_inside_a_group(clips, tmp_path, name, first):
  path = copied(clips[name], tmp_path / f"cut{Path(name).suffix}", first)
  expected = played(path)
  assert expected[-1] == 47
  check(path, expected)


def test_wrong_times_in_a_container_that_has_times(clips, tmp_path):
  """Decode times of an AVI that were copied into an MKV as if they were presentation times."""
  path = copied(clips["b264.avi"], tmp_path / "wrong.mkv")
  video = open_video(path)
  assert [number(frame) for frame in video.frames(range(48))] == list(range(48))
  assert [number(frame) for frame in video.frames([5, 20])] == [5, 20]


def test_the_picture_begins_after_the_sound():
  video = open_video(CASES / "late.mp4")
  assert video.time_to_frame(2.5) == 12
  with pytest.raises(InputError, match="the picture begins at 2 s"):
    video.time_to_frame(0.5)


def test_a_mirrored_picture():
  video = open_video(CASES / "hflip.mp4")
  assert (video.rotation, video.mirrored) == (0, True)
  with av.open(str(CASES / "hflip.mp4")) as container:
    stored = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
  np.testing.assert_array_equal(video.frames([2])[0], stored[2][:, ::-1])


# The display matrix (a, b, c, d) puts the pixel (x, y) at (a·x + c·y, b·x + d·y), y downwards.
@pytest.mark.parametrize("matrix", list(video_index._MATRICES))
def test_turns_put_pixels_where_the_matrix_says(matrix):
  a, b, c, d = matrix
  stored = np.arange(6).reshape(2, 3)
  corners = [(a * x + c * y, b * x + d * y) for x in range(3) for y in range(2)]
  left, top = min(x for x, _ in corners), min(y for _, y in corners)
  shown = video_index.TURNS[video_index._MATRICES[matrix]](stored[..., None])[..., 0]
  for x in range(3):
    for y in range(2):
      assert shown[b * x + d * y - top, a * x + c * y - left] == stored[y, x]


def test_a_text_that_names_another_file_is_not_opened(clips, tmp_path):
  path = tmp_path / "a.mp4"
  path.write_text(f"ffconcat version 1.0\nfile '{clips['b264.ts']}'\n")
  with pytest.raises(InputError, match=r"a\.mp4: "):
    open_video(path)


def test_a_name_with_a_colon(clips, tmp_path, monkeypatch):
  (tmp_path / "2024-05-01T12:30:10.mp4").write_bytes(clips["xvid.mp4"].read_bytes())
  monkeypatch.chdir(tmp_path)
  for name in ("2024-05-01T12:30:10.mp4", "./2024-05-01T12:30:10.mp4"):
    assert len(open_video(name)) == 48


def test_the_index_is_kept_by_content(clips, tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  monkeypatch.setattr(video_index, "_SLOW", 0.0)
  first = index_of(clips["b264.ts"])
  assert len(list((tmp_path / "cache/vr_jax/videos").glob("*.npz"))) == 1
  monkeypatch.setattr(video_index, "make_index", lambda path: pytest.fail("made again"))
  moved = tmp_path / "moved.ts"
  moved.write_bytes(clips["b264.ts"].read_bytes())
  again = index_of(moved)
  np.testing.assert_array_equal(again.ticks, first.ticks)
  for field in ("unit", "trusted", "entries", "stream", "origin", "claimed", "fps", "size", "turn"):
    assert getattr(again, field) == getattr(first, field), field
  monkeypatch.undo()
  moved.write_bytes(clips["b264.mkv"].read_bytes())
  assert make_index(moved).unit != first.unit


def test_no_cache_folder_is_no_fault(clips, monkeypatch):
  monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
  monkeypatch.setenv("HOME", "/dev/null")
  monkeypatch.setattr(video_index, "_SLOW", 0.0)
  assert len(index_of(clips["b264.ts"]).ticks) == 48


# --- Pictures that move, photos, folders ---------------------------------------------------------


def animation(path: Path, delays: list[int], **options) -> Path:
  frames = [Image.fromarray(picture(k)) for k in range(len(delays))]
  frames[0].save(path, save_all=True, append_images=frames[1:], duration=delays, **options)
  return path


@pytest.mark.parametrize(
  ("name", "options"),
  [
    ("a.webp", {"lossless": True}),
    ("a.png", {}),
    ("a.apng", {"format": "PNG"}),
    ("a.avif", {"quality": 95}),
  ],
)
def test_pictures_that_move_are_videos(tmp_path, name, options):
  video = open_video(animation(tmp_path / name, [100, 200, 100, 400], **options))
  assert (video.kind, len(video)) == ("video", 4)
  assert [number(frame) for frame in video.frames([3, 0, 1])] == [3, 0, 1]
  assert [video.time_to_frame(t) for t in (0, 0.15, 0.35, 0.79)] == [0, 1, 2, 3]
  with pytest.raises(InputError, match=r"lasts from 0 to 0\.8 s"):
    video.time_to_frame(0.81)


def test_times_of_a_gif_are_its_own_and_its_rate_the_published_one(tmp_path):
  video = open_video(animation(tmp_path / "a.gif", [500, 10, 200]))
  assert (video.kind, video.fps) == ("gif", 25)
  # Browsers show a frame of 10 ms for 100 ms.
  assert [video.time_to_frame(t) for t in (0.49, 0.51, 0.59, 0.61, 0.79)] == [0, 1, 1, 2, 2]


def test_pages_of_a_tiff_have_no_times(tmp_path):
  path = tmp_path / "a.tiff"
  pages = [Image.fromarray(picture(k)) for k in range(3)]
  pages[0].save(path, save_all=True, append_images=pages[1:])
  with pytest.raises(InputError, match="found 3 pages, which have no times"):
    open_video(path)
  pages[0].save(path)
  assert open_video(path).kind == "image"


def test_a_photo_is_upright_on_request():
  stored, upright = (open_video(CASES / "exif.jpg", upright=u) for u in (False, True))
  assert (stored.size, upright.size) == ((96, 128), (128, 96))
  np.testing.assert_array_equal(stored.frames([0])[0], read_image(CASES / "exif.jpg"))


def folder_of(path: Path, names: list[str]) -> Path:
  path.mkdir()
  for k, name in enumerate(names):
    if not name.startswith("._"):
      Image.fromarray(picture(k)).save(path / name)
    else:
      (path / name).write_bytes(b"Mac OS X")
  return path


def test_frames_of_a_folder_are_in_natural_order(tmp_path):
  names = [f"{k}.png" for k in range(12)]
  video = open_video(folder_of(tmp_path / "a", names))
  assert [number(frame) for frame in video.frames(range(12))] == list(range(12))
  padded = folder_of(tmp_path / "b", ["f_0001.jpg", "f_0002.jpg", "f_0010.jpg", "g1.jpg"])
  assert [number(frame) for frame in open_video(padded).frames(range(4))] == list(range(4))
  mac = folder_of(tmp_path / "c", ["0.png", "1.png", "._0.png", "._1.png"])
  assert len(open_video(mac)) == 2
  assert open_video(mac, fps=10).time_to_frame(0.1) == 1


@pytest.mark.parametrize("beside", ["0.jpg", "0_mask.png", "0.mask.png", "1-seg.png"])
def test_a_mask_beside_its_frame_is_named(tmp_path, beside):
  folder = folder_of(tmp_path / "a", ["0.png", "1.png", beside])
  with pytest.raises(InputError, match="could both be one frame"):
    open_video(folder)


def test_a_folder_is_searched_for_every_name_of_the_formats_that_are_read():
  sound = {".m4a", ".m4b", ".isma", ".mka", ".mks", ".wma", ".ra"}
  pictures = {".heic", ".heif", ".webp", ".mpo"}
  names = set()
  forms = {*video_index.TIMED, *video_index.UNTIMED} - {"mp3", "flac", "wav", "aiff", "aac"}
  for form, mode in itertools.product(forms, "rw"):
    with contextlib.suppress(ValueError):  # one that is only read, or only written
      names |= {f".{e}" for e in av.format.ContainerFormat(form.split(",")[0], mode).extensions}
  assert {".mp4", ".ts", ".mpg"} <= names
  assert not names - sound - pictures - set(video_index.VIDEO_SUFFIXES)
