"""Exact frames from every kind of source, and scenes as the published code samples them."""

import dataclasses
import hashlib
import json
import pickle
import threading
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from data_pipes import video as video_module
from data_pipes.errors import InputError
from data_pipes.frame_rules import frame_range
from data_pipes.images import normalise, to_model
from data_pipes.video import (
  BLACK,
  BLACK_SWAPPED,
  Video,
  open_video,
  read_scene,
  sample_scene,
  scene_ids,
)
from data_pipes.video_index import Entry

CASES = [
  *("dir_default", "dir_pad", "dir_n16", "dir_fps_mode", "dir_s_e", "dir_s_gt_e", "dir_s_eq_e"),
  *("dir_neg", "gif", "gif_more", "gif_pad_more", "mp4_8", "mp4_40", "mp4_s_e"),
  *("ndarray_noframe", "ndarray_list_noframe", "pil_list", "path_list"),
]
REAL_CASES = [  # real_1 is the same clip under another name
  *("real_dog_8_56", "real_dog_16_56", "real_dog_16_384", "real_dog_pad_384"),
  *("real_1_fps_56", "real_1_s_e_56"),
]


@pytest.fixture(scope="module")
def arrays(golden):
  return np.load(golden / "arrays/08_preprocess.npz")


@pytest.fixture(scope="module")
def cases(golden):
  stages = json.loads((golden / "cases.json").read_text())["stages"]
  stage = next(s for s in stages if s["stage"] == "08_preprocess")
  return {case["id"]: case for case in stage["cases"]}


@pytest.fixture(scope="module")
def sources(golden):
  clip = np.load(golden / "arrays/ndarray_clip.npz")
  clip = clip[clip.files[0]]
  return {
    "ndarray_noframe": clip,
    "ndarray_list_noframe": list(clip[:3]),
    "pil_list": [Image.fromarray(f) for f in clip[:5]],
    "path_list": [str(golden / f"media/clip_dir/0000{i}.png") for i in (0, 2, 4)],
  }


def process_video(video, meta):
  """The published function of that name in our parts: scene and mask frames [T, S, S, 3]."""
  args = {"num_frames": 8, "s": None, "e": None, "frame_idx": None} | meta["args"]
  scene = sample_scene(video, args["num_frames"], args["s"], args["e"], published=True)
  marked = None if args["frame_idx"] is None else video.frames(args["frame_idx"])
  size, aspect_ratio = meta["size"], meta["aspect_ratio"]
  return [
    None if frames is None else np.stack([to_model(f, size, aspect_ratio) for f in frames])
    for frames in (scene, marked)
  ]


@pytest.mark.parametrize("name", CASES)
def test_published_cases(golden, arrays, cases, sources, name):
  meta, tolerance = cases[name]["meta"], cases[name]["tol"]["u8_abs"]
  video = open_video(sources[name] if name in sources else golden / meta["file"])
  if "sampled_within_range" in meta:
    args = meta["args"]
    candidates = frame_range(len(video), video.fps, args.get("s"), args.get("e"))
    assert len(candidates) == meta["duration_in_range"]
  for key, ours in zip(("pixels_u8", "frame_u8"), process_video(video, meta), strict=True):
    if ours is None:
      assert f"{name}/{key}" not in arrays
      continue
    published = arrays[f"{name}/{key}"].transpose(0, 2, 3, 1)
    assert ours.shape == published.shape
    assert np.abs(ours.astype(int) - published).max() <= tolerance


@pytest.mark.parametrize("name", REAL_CASES)
def test_published_cases_on_a_real_clip(media_dir, arrays, cases, name):
  case = cases[name]
  meta = case["meta"]
  clip = media_dir / "dog.mp4"
  if not clip.exists() or hashlib.sha256(clip.read_bytes()).hexdigest() != meta["sha256"]:
    pytest.skip("the media folder has another dog.mp4, or none")
  scene, marked = process_video(open_video(clip), meta)
  compared = 0
  for frames, u8, means in (
    (scene, "pixels_u8", "patch_means"),
    (marked, "frame_u8", "frame_patch_means"),
  ):
    if f"{name}/{u8}" in arrays:
      published = arrays[f"{name}/{u8}"].transpose(0, 2, 3, 1)
      assert np.abs(frames.astype(int) - published).max() <= case["tol"]["u8_abs"]
      compared += 1
    if f"{name}/{means}" in arrays:
      patches = normalise(frames)[:, :378, :378].reshape(-1, 27, 14, 27, 14, 3).mean((2, 4))
      np.testing.assert_allclose(patches, arrays[f"{name}/{means}"], atol=case["tol"]["atol"])
      compared += 1
  assert compared


@pytest.mark.parametrize(("clip", "count"), [("dog", 150), ("2", 503), ("4", 224)])
def test_real_clips_equal_a_full_decode(media_dir, clip, count):
  path = media_dir / f"{clip}.mp4"
  video = open_video(path)
  assert len(video) == count
  rng = np.random.default_rng(3)
  ids = [*rng.integers(0, count, 5), count - 1, 0]
  wanted = decode_all(path)
  assert len(wanted) == count
  for i, frame in zip(ids, video.frames(ids), strict=True):
    np.testing.assert_array_equal(frame, wanted[i])


# Generated clips


def picture(i: int, height: int, width: int) -> np.ndarray:
  """A frame that shows its number: a moving bar on a slanted ground."""
  y, x = np.mgrid[:height, :width]
  ground = ((x * 2 + y + 5 * i) % 256).astype(np.uint8)
  frame = np.stack([ground, 255 - ground, np.full_like(ground, 40)], -1)
  at = 3 * i % width
  frame[:, at : at + 6] = (255, (37 * i) % 256, 200)
  return frame


def write_clip(
  path: Path,
  count=40,
  codec="libx264",
  rate=25,
  size=(48, 64),
  options=None,
  rotate=None,
  **context,
) -> Path:
  height, width = size
  with av.open(str(path), "w") as container:
    stream = container.add_stream(codec, rate=rate, options=options or {})
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    for key, value in context.items():
      setattr(stream.codec_context, key, value)
    if rotate is not None:
      stream.set_display_rotation(rotate)
    for i in range(count):
      frame = av.VideoFrame.from_ndarray(picture(i, height, width), format="rgb24")
      frame.pts, frame.time_base = i, Fraction(1, rate)
      container.mux(stream.encode(frame))
    container.mux(stream.encode())
  return path


def decode_all(path: Path) -> list[np.ndarray]:
  with av.open(str(path)) as container:
    container.streams.video[0].codec_context.thread_count = 1
    return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


X264 = {
  "one_keyframe": {"g": "1000", "bf": "0"},
  "b_frames": {"g": "1000", "bf": "3", "b_strategy": "0"},
  "short_gops": {"g": "4", "bf": "2", "b_strategy": "0", "sc_threshold": "0"},
  "open_gops": {"x264-params": "open-gop=1:keyint=9:min-keyint=9:bframes=3:b-adapt=0:scenecut=0"},
  "only_keyframes": {"g": "1"},
}
CLIPS = {
  **{f"{name}.mp4": {"options": options} for name, options in X264.items()},
  "short_gops.mkv": {"options": X264["short_gops"]},
  "open_gops.ts": {"options": X264["open_gops"]},
  "mpeg4.mp4": {"codec": "mpeg4", "gop_size": 12, "max_b_frames": 2},
  "mpeg4.avi": {"codec": "mpeg4", "gop_size": 12},
  "vp9.webm": {"codec": "libvpx-vp9", "options": {"g": "8", "deadline": "realtime"}},
  "vp9_alt_ref.webm": {
    "codec": "libvpx-vp9",
    "options": {"auto-alt-ref": "1", "lag-in-frames": "16"},
  },
  "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "keyint=10:log-level=none"}},
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
  folder = tmp_path_factory.mktemp("clips")
  return {name: write_clip(folder / name, **kwargs) for name, kwargs in CLIPS.items()}


@pytest.mark.parametrize("seek_packets", [0, 10_000])
@pytest.mark.parametrize("name", CLIPS)
def test_any_order_equals_sequential(clips, name, seek_packets, monkeypatch):
  monkeypatch.setattr(video_module, "_SEEK_PACKETS", seek_packets)
  video, wanted = open_video(clips[name]), decode_all(clips[name])
  assert (len(video), len(wanted)) == (40, 40)
  assert video.size == (48, 64)
  assert video.fps == 25
  rng = np.random.default_rng(0)
  asked = [range(40), [39], [0], [12, 3, 3, 39, 12], [37, 38, 39]]
  asked += [rng.integers(0, 40, rng.integers(1, 7)) for _ in range(12)]
  for ids in asked:
    frames = video.frames(ids)
    assert len(frames) == len(ids)
    for i, frame in zip(ids, frames, strict=True):
      assert frame.dtype == np.uint8
      np.testing.assert_array_equal(frame, wanted[i], err_msg=f"frame {i} of {list(ids)}")


@pytest.mark.parametrize("name", ["short_gops.mp4", "open_gops.mp4", "vp9.webm"])
def test_groups_that_nobody_wants_are_not_decoded(clips, name, monkeypatch):
  fed = []
  take = video_module._Packets.take
  monkeypatch.setattr(
    video_module._Packets, "take", lambda self: fed.append(self.next) or take(self)
  )
  open_video(clips[name]).frames([0, 38])
  assert 0 in fed
  assert len(fed) <= 20
  assert len(fed) == len(set(fed))


class Counted:
  """A packet that notes how many frames come out of it."""

  def __init__(self, packet, decoded):
    self.packet, self.decoded, self.pts = packet, decoded, packet.pts

  def decode(self):
    frames = self.packet.decode()
    self.decoded += frames
    return frames


@pytest.mark.parametrize("name", ["b_frames.mp4", "mpeg4.mp4", "hevc.mp4"])
def test_frames_that_no_other_needs_are_not_decoded(clips, name, monkeypatch):
  decoded = []
  take = video_module._Packets.take
  monkeypatch.setattr(video_module._Packets, "take", lambda self: Counted(take(self), decoded))
  video, wanted = open_video(clips[name]), decode_all(clips[name])
  for i, frame in zip([0, 7, 38], video.frames([0, 7, 38]), strict=True):
    np.testing.assert_array_equal(frame, wanted[i])
  assert len(decoded) <= 30  # of 40


def cut_by_edit_list(source: Path, path: Path, frames: int) -> Path:
  """The clip with its first frames hidden: the edit list's media time is moved."""
  data = bytearray(source.read_bytes())
  with av.open(str(source)) as container:
    stream = container.streams.video[0]
    packets = [p for p in container.demux(stream) if p.size]
    step = sorted(p.pts for p in packets)[1] - sorted(p.pts for p in packets)[0]
  at = data.index(b"elst") + 12  # version and flags, count, then duration and media time
  duration, media_time = (int.from_bytes(data[at + k : at + k + 4], "big") for k in (0, 4))
  data[at + 4 : at + 8] = (media_time + frames * step).to_bytes(4, "big")
  data[at : at + 4] = (duration * (40 - frames) // 40).to_bytes(4, "big")
  path.write_bytes(data)
  return path


@pytest.mark.parametrize(
  "name", ["one_keyframe.mp4", "b_frames.mp4", "short_gops.mp4", "open_gops.mp4"]
)
@pytest.mark.parametrize("hidden", [1, 6])
def test_edit_list(clips, tmp_path, name, hidden):
  path = cut_by_edit_list(clips[name], tmp_path / "cut.mp4", hidden)
  everything = decode_all(clips[name])
  video = open_video(path)
  with av.open(str(path)) as container:
    assert container.streams.video[0].frames == 40  # what the container claims
  assert len(video) == 40 - hidden
  for ids in ([30, 0, 7, 7, 39 - hidden], [20], [39 - hidden]):
    for i, frame in zip(ids, video.frames(ids), strict=True):
      np.testing.assert_array_equal(frame, everything[i + hidden])


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotation(tmp_path, degrees):
  flat = write_clip(tmp_path / "flat.mp4", count=3)
  video = open_video(write_clip(tmp_path / "turned.mp4", count=3, rotate=degrees))
  assert video.size == ((48, 64) if degrees % 180 == 0 else (64, 48))
  frame, upright = video.frames([1])[0], decode_all(flat)[1]
  with av.open(str(tmp_path / "turned.mp4")) as container:
    counterclockwise = next(container.decode(video=0)).rotation
  assert counterclockwise % 360 in (degrees, 360 - degrees, 0 if degrees == 0 else degrees)
  np.testing.assert_array_equal(frame, np.rot90(upright, counterclockwise // 90))


def with_index(video: Video, **fields) -> Video:
  video._index = dataclasses.replace(video._index, **fields)
  return video


def test_frames_of_times_that_say_nothing_are_counted(clips):
  video, wanted = open_video(clips["b_frames.mp4"]), decode_all(clips["b_frames.mp4"])
  with_index(video, trusted=False)
  for i, frame in zip([9, 2], video.frames([9, 2]), strict=True):
    np.testing.assert_array_equal(frame, wanted[i])
  assert video.time_to_frame(0.1) == 2


def test_a_stream_that_breaks_off(clips):
  video = open_video(clips["b_frames.mp4"])
  with_index(video, trusted=False, ticks=np.arange(45))
  with pytest.raises(InputError, match=r"b_frames\.mp4: frame 42 is damaged"):
    video.frames([3, 42])


def test_keyframe_that_is_no_entry_point(clips):
  """Frames are right, or decoding starts over from the beginning; never a wrong frame."""
  video, wanted = open_video(clips["one_keyframe.mp4"]), decode_all(clips["one_keyframe.mp4"])
  index = video._index
  with_index(video, entries=(*index.entries, Entry(int(index.ticks[20]), 0, 20)))
  for i, frame in zip([2, 30], video.frames([2, 30]), strict=True):
    np.testing.assert_array_equal(frame, wanted[i])


def test_threads_and_processes_share_a_video(clips):
  video = open_video(clips["b_frames.mp4"])
  wanted = decode_all(clips["b_frames.mp4"])
  copy = pickle.loads(pickle.dumps(video))
  np.testing.assert_array_equal(copy.frames([5])[0], wanted[5])
  results = {}
  threads = [
    threading.Thread(target=lambda i=i: results.__setitem__(i, video.frames([i])[0]))
    for i in (3, 19, 33)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  for i, frame in results.items():
    np.testing.assert_array_equal(frame, wanted[i])
  assert len(results) == 3


# Other sources, times, scenes


def test_folder_is_sorted_and_holds_only_images(tmp_path):
  for name in ("b.png", "a.PNG", "c.jpg"):
    Image.new("RGB", (6, 4), {"b": "blue", "a": "red", "c": "lime"}[name[0]]).save(tmp_path / name)
  (tmp_path / "notes.txt").write_text("not a frame")
  video = open_video(tmp_path)
  assert (len(video), video.kind, video.fps, video.size) == (3, "folder", 3, (4, 6))
  colours = [frame[0, 0].tolist() for frame in video.frames([0, 1])]
  assert colours == [[255, 0, 0], [0, 0, 255]]


def test_gif_mask_frames_come_in_the_order_asked(golden):
  video = open_video(golden / "media/clip_gif.gif")
  assert (video.kind, video.fps, len(video)) == ("gif", 25, 9)
  ascending = video.frames(range(9))
  for i, frame in zip([7, 2, 2, 0], video.frames([7, 2, 2, 0]), strict=True):
    np.testing.assert_array_equal(frame, ascending[i])
  assert not np.array_equal(ascending[7], ascending[2])


def test_image_is_one_frame(golden):
  video = open_video(golden / "media/img_b.jpg")
  assert (len(video), video.kind, video.size) == (1, "image", (90, 61))
  assert scene_ids(video, 16) == [0] * 16
  assert scene_ids(video, None) == [0]


def test_time_to_frame(clips, golden):
  video = open_video(clips["b_frames.mp4"])
  assert [video.time_to_frame(t) for t in (0, 0.039, 0.04, 0.1, 1.0, 1.599)] == [0, 0, 1, 2, 25, 39]
  assert open_video(golden / "media/clip_dir").time_to_frame(1) == 3
  assert open_video(golden / "media/clip_gif.gif").time_to_frame(0.04) == 1
  for seconds in (1.6, -0.1, float("nan")):
    with pytest.raises(InputError, match=r"the video lasts from 0 to 1\.6 s"):
      video.time_to_frame(seconds)
  with pytest.raises(InputError, match="the image has none"):
    open_video(golden / "media/img_a.png").time_to_frame(0)


def test_scene_and_mask_frames_in_one_read(golden):
  video = open_video(golden / "media/clip_gif.gif")
  ids = scene_ids(video, 13)
  assert ids == [0, 1, 2, 3, 4, 5, 6, 7, 8, BLACK_SWAPPED, BLACK, BLACK_SWAPPED, BLACK]
  frames = read_scene(video, [*ids, 4, 2])
  assert [f.shape[:2] for f in frames[9:11]] == [(56, 40), (40, 56)]
  assert not np.any(frames[9])
  np.testing.assert_array_equal(frames[-2], frames[4])
  assert len(sample_scene(video, 40)) == 40
  assert len(sample_scene(video, 40, published=True)) == 32


def test_the_scene_of_frames_in_memory():
  """A long list has the scene of a video of as many frames; a short one is taken whole."""
  frames = np.zeros((100, 4, 4, 3), np.uint8)
  ids = scene_ids(open_video(frames), 16)
  assert ids == [3, 9, 15, 22, 28, 34, 40, 46, 53, 59, 65, 71, 77, 84, 90, 96]
  assert scene_ids(open_video(frames), 16, published=True) == list(range(32))
  assert scene_ids(open_video(frames[:3]), 4) == [0, 1, 2, BLACK_SWAPPED]


def test_frames_are_converted_as_they_come(clips, golden):
  video = open_video(clips["short_gops.mp4"])
  small = video.frames([30, 2, 30], lambda frame: to_model(frame, 8))
  for i, frame in zip([30, 2, 30], small, strict=True):
    np.testing.assert_array_equal(frame, to_model(video.frames([i])[0], 8))
  gif = open_video(golden / "media/clip_gif.gif")
  shapes = [f.shape for f in read_scene(gif, [0, BLACK, BLACK_SWAPPED], lambda f: to_model(f, 8))]
  assert shapes == [(8, 8, 3)] * 3


# Wrong input: one line that names the file and what is accepted


BLACK_PAIR = np.zeros((2, 4, 4, 3), np.uint8)


def broken(tmp_path: Path, clips: dict, kind: str) -> Path:
  path = tmp_path / f"{kind}.mp4"
  whole = clips["b_frames.mp4"].read_bytes()
  if kind == "text":
    path.write_text("not a video\n" * 50)
  elif kind == "empty":
    path.write_bytes(b"")
  elif kind == "truncated":
    path.write_bytes(whole[: len(whole) // 3])
  elif kind == "zeroed":
    at = whole.index(b"mdat")
    path.write_bytes(whole[: at + 4] + bytes(len(whole) - at - 4))
  elif kind == "no_frames":
    write_clip(path, count=0)
  elif kind == "sound_only":
    path = path.with_suffix(".mka")
    with av.open(str(path), "w") as container:
      stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
      sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
      sound.rate = 8000
      container.mux(stream.encode(sound))
  return path


@pytest.mark.parametrize(
  "kind", ["text", "empty", "truncated", "zeroed", "no_frames", "sound_only"]
)
def test_unreadable_video(tmp_path, clips, kind):
  path = broken(tmp_path, clips, kind)
  with pytest.raises(InputError, match=path.name) as error:
    open_video(path).frames([0])
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("call", "words"),
  [
    (lambda v, t: v.frames([0, 40]), "frame 40 asked for; the video has frames 0 to 39"),
    (lambda v, t: v.frames([-1]), "frame -1"),
    (lambda v, t: open_video(t / "absent.mp4"), "absent.mp4: no such video"),
    (lambda v, t: open_video(t), "holds no frames"),
    (lambda v, t: open_video([]), "empty list"),
    (lambda v, t: open_video(np.zeros((2, 4, 4), np.uint8)), r"uint8 \[4, 4\]; uint8 \[H, W, 3\]"),
    (lambda v, t: open_video(np.zeros((2, 4, 4, 3), np.float32)), "frame 0 is float32"),
    (lambda v, t: sample_scene(v, 8, 60.0, 61.0), "no frame lies between 60 s and 61 s"),
    (
      lambda v, t: sample_scene(open_video(np.zeros((2, 4, 4, 3), np.uint8)), 8, 0.0, 1.0),
      "no times",
    ),
  ],
)
def test_wrong_requests(clips, tmp_path, call, words):
  with pytest.raises(InputError, match=words) as error:
    call(open_video(clips["short_gops.mp4"]), tmp_path)
  assert "\n" not in str(error.value)


def test_damaged_gif(tmp_path, golden):
  whole = (golden / "media/clip_gif.gif").read_bytes()
  (tmp_path / "cut.gif").write_bytes(whole[: len(whole) // 2])
  (tmp_path / "text.gif").write_text("no gif")
  for name in ("cut.gif", "text.gif"):
    with pytest.raises(InputError, match=name):
      open_video(tmp_path / name).frames([8])


def test_nothing_is_asked_for(clips):
  video: Video = open_video(clips["short_gops.mp4"])
  assert video.frames([]) == []
