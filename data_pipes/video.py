"""Videos as presented frames: exact frame numbers, whatever the container.

`open_video` reads files that FFmpeg decodes (mp4, webm, …), animated pictures, folders of frames,
single images and frames already in memory. Frame i is the i-th frame that a player shows. A
container's own count may be larger: edit lists hide frames, and a file that was cut holds packets
that no player shows; some readers then shift every later frame.
"""

import bisect
import itertools
import math
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageSequence

from data_pipes.errors import InputError, reading, shown
from data_pipes.frame_rules import MAX_FRAMES, fps_frames, frame_range, uniform_frames
from data_pipes.images import (
  IMAGE_SUFFIXES,
  count_pictures,
  frame_files,
  is_animated,
  open_image,
  read_image,
  to_rgb,
)
from data_pipes.video_index import (
  REORDERED,
  ROTATION,
  TURNS,
  Entry,
  Index,
  counted,
  damage,
  decoded,
  index_of,
  opened,
  packets_of,
)

FOLDER_FPS = 3.0  # published: a folder of frames counts as 3 frames per second, a GIF as 25
GIF_FPS = 25.0
ANIMATED_SUFFIXES = (".gif", ".apng", ".avif")  # beside those of IMAGE_SUFFIXES, some of which move
BLACK_SWAPPED, BLACK = -1, -2  # scene ids of the black frames that fill up a scene, see scene_ids
EARLY = 0.5  # seconds before the first frame in which it already counts as on show

# A jump over at least this many packets seeks; a shorter one reads past them, which is cheaper.
_SEEK_PACKETS = 256
# Browsers show a picture whose delay is shorter than 20 ms for 100 ms.
_SHORTEST_DELAY, _USUAL_DELAY = 20, 100


Convert = Callable[[np.ndarray], np.ndarray]
Slots = Mapping[int, np.ndarray]


class Video:
  """Frames by presented number. `len(video)` is their count.

  Attributes:
    name: what errors call it, the path where there is one.
    kind: "video", "gif", "folder", "image" or "list" (frames in memory, or paths given one by one).
    fps: frames per second; the published fixed values for a GIF (25) and a folder (3); None for an
      image and a list, which have no times.
    size: (height, width) of the first frame, pixels, rotated as a player shows it.
    claimed: frames that the container claims to hold; other than len(video) where an edit list
      hides some or the file is cut off. Readers that go by it are off by the difference.
    rotation: degrees, counterclockwise, that a player turns the frames by; `mirrored` where it
      mirrors them too.
    alpha, grey: the frames have transparency, which is dropped; they have no colour.
  """

  name: str
  kind: str
  fps: float | None
  size: tuple[int, int]
  claimed: int | None = None
  rotation: int = 0
  mirrored: bool = False
  alpha: bool = False
  grey: bool = False

  def __len__(self) -> int:
    raise NotImplementedError

  def pts(self, ids: Iterable[int]) -> tuple[list[int], Fraction] | None:
    """Presentation times of frames and their unit in seconds; None where the file has none."""
    return None

  def variable_rate(self) -> bool:
    """Frames do not follow each other in equal steps of time."""
    return False

  def _read(self, numbers: list[int]) -> Iterator[np.ndarray]:
    """The frames of ascending, distinct, valid numbers, in that order; fewer if it breaks off."""
    raise NotImplementedError

  def frames(
    self, ids: Iterable[int], convert: Convert | None = None, into: Slots | None = None
  ) -> list[np.ndarray]:
    """RGB uint8 [H, W, 3] frames in the order asked; a repeated id gives the same array again.

    Ask for all frames of a video at once: each call decodes anew. `convert` is applied to each
    frame as it is decoded, so that not all of them are held at full size; then it is written to
    `into[id]`, where that is given. Raises InputError for an id that the video does not have and
    for frames that cannot be decoded.
    """
    with reading(f"{self.name}: frames {shown(ids)}", "whole numbers"):
      ids = [operator.index(i) for i in ids]
    for i in ids:
      if not 0 <= i < len(self):
        raise InputError(
          f"{self.name}: frame {i} asked for; the video has frames 0 to {len(self) - 1}"
        )
    numbers = sorted(set(ids))
    by_number = {}
    if numbers:
      for number, frame in zip(numbers, self._read(numbers), strict=False):
        by_number[number] = _taken(number, frame, convert, into)
    if len(by_number) < len(numbers):
      raise InputError(f"{self.name}: frame {numbers[len(by_number)]} is damaged")
    return [by_number[i] for i in ids]

  def time_to_frame(self, seconds: float) -> int:
    """Number of the frame on show at a time, in seconds from where players begin to count."""
    times = self.times
    if times is None:
      raise InputError(f"{self.name}: a time was given, but the {self.kind} has none; give a frame")
    with reading(f"{self.name}: time {shown(seconds)}", "seconds"):
      seconds = float(seconds)
    end = times[-1] + self._last_step(times)
    if not 0 <= seconds < end:
      raise InputError(f"{self.name}: time {seconds:g} s; the video lasts from 0 to {end:.6g} s")
    if seconds < times[0] - EARLY:
      raise InputError(
        f"{self.name}: time {seconds:g} s; the picture begins at {times[0]:.6g} s, behind the sound"
      )
    # A microsecond of slack, so that a time printed with six digits finds its own frame.
    return max(0, int(np.searchsorted(times, seconds + 1e-6, side="right")) - 1)

  @property
  def times(self) -> np.ndarray | None:
    """When each frame appears, float64 [frames] seconds; None for a list and an image."""
    return None if self.fps is None else np.arange(len(self)) / self.fps

  def _last_step(self, times: np.ndarray) -> float:
    """Seconds for which the last frame stays."""
    return 1 / (self.fps or 1.0)


def open_video(
  source: str | os.PathLike | np.ndarray | Sequence | Video,
  *,
  fps: float | None = None,
  upright: bool = False,
) -> Video:
  """Opens a video, animated picture, folder of frames or image by path; or frames in memory.

  Args:
    source: a path; or a uint8 array [T, H, W, 3]; or a list of frames, each a uint8 array
      [H, W, 3], a PIL image or the path of an image, all RGB; or a Video, which is given back.
    fps: frames a second of a folder of frames, for times that a user gives (published: 3).
    upright: a photo is turned as its EXIF orientation says, as viewers show it. The published code
      and so training sets take it as it is stored.

  Raises InputError where there is no such file, nothing can be decoded, or there are no frames.
  """
  if isinstance(source, Video):
    return source
  if fps is not None:
    fps = check_fps(fps)
  if not isinstance(source, str | os.PathLike):
    with reading("the video is neither a path nor frames"):
      frames = list(source)
    if not frames:
      raise InputError("an empty list of frames was given as the video")
    return _Stills("list of frames", "list", frames)
  with reading(f"{source}: no path of a video"):
    path = Path(source)
    folder, there = path.is_dir(), path.exists()
  if folder:
    return _Stills(str(path), "folder", frame_files(path), fps=fps)
  if not there:
    raise InputError(f"{path}: no such video, folder of frames or image")
  if path.suffix.lower() in (*IMAGE_SUFFIXES, *ANIMATED_SUFFIXES):
    if path.suffix.lower() == ".gif" or is_animated(path):
      return _Animation(path)
    return _Stills(str(path), "image", [path], upright)
  return _Stream(path)


def check_fps(fps: float) -> float:
  """Frames a second as a number; InputError where they are none."""
  with reading(f"fps={shown(fps)}", "a number above 0"):
    number = float(fps)
  if not 0 < number < math.inf:
    raise InputError(f"fps={shown(fps)}; accepted: a number above 0")
  return number


class _Stills(Video):
  """Frames that can be had one by one: files, or arrays in memory."""

  def __init__(
    self, name: str, kind: str, items: list, upright: bool = False, *, fps: float | None = None
  ):
    self.name, self.kind = name, kind
    self._items, self._upright = items, upright
    # What the user says of a folder is for times; the scene rule keeps the published rate.
    self.fps, self._shown_fps = (FOLDER_FPS, fps or FOLDER_FPS) if kind == "folder" else (None, 1.0)
    self.size = self._load(0).shape[:2]

  def __len__(self) -> int:
    return len(self._items)

  def _read(self, numbers: list[int]) -> Iterator[np.ndarray]:
    return (self._load(i) for i in numbers)

  @property
  def times(self) -> np.ndarray | None:
    return None if self.fps is None else np.arange(len(self)) / self._shown_fps

  def _last_step(self, times: np.ndarray) -> float:
    return 1 / self._shown_fps

  def _load(self, i: int) -> np.ndarray:
    item = self._items[i]
    if isinstance(item, str | os.PathLike):
      return read_image(item, upright=self._upright)
    if isinstance(item, Image.Image):
      return to_rgb(item, f"{self.name}: frame {i}")
    with reading(f"{self.name}: frame {i} is no picture"):
      item = np.asarray(item)
    if item.dtype != np.uint8 or item.ndim != 3 or item.shape[2] != 3 or not item.size:
      raise InputError(
        f"{self.name}: frame {i} is {item.dtype} {list(item.shape)}; uint8 [H, W, 3] is needed"
      )
    return item


class _Animation(Video):
  """An animated GIF, WebP, PNG or AVIF, its frames composed as a player shows them."""

  def __init__(self, path: Path):
    self.name = str(path)
    self._path = path
    self._shown_for: np.ndarray | None = None
    with open_image(path) as image:
      self.size = image.height, image.width
      self._count = count_pictures(image, path)
      self.kind = "gif" if image.format == "GIF" else "video"
    self.fps = GIF_FPS if self.kind == "gif" else float(self._count / self._delays().sum())

  def __len__(self) -> int:
    return self._count

  @property
  def times(self) -> np.ndarray:
    """When each frame appears, by the delays in the file; the published 25 frames a second of a GIF
    are for the scene rule alone."""
    return np.concatenate([[0.0], np.cumsum(self._delays())[:-1]])

  def _last_step(self, times: np.ndarray) -> float:
    return float(self._delays()[-1])

  def _delays(self) -> np.ndarray:
    """Seconds for which each frame is shown, float64 [frames]."""
    if self._shown_for is None:
      delays = [shown_for for _, _, shown_for in self._sequence()]
      delays += [0.0] * (self._count - len(delays))
      delays = [d if d >= _SHORTEST_DELAY else _USUAL_DELAY for d in delays]
      self._shown_for = np.array(delays, np.float64) / 1000
    return self._shown_for

  def _sequence(self) -> Iterator[tuple[int, Image.Image, float]]:
    """(number, frame, its delay in milliseconds or 0), each composed before it is given."""
    with open_image(self._path) as image:
      frames = iter(ImageSequence.Iterator(image))
      for number in itertools.count():
        with reading(f"{self.name}: damaged at frame {number}"):
          frame = next(frames, None)
          if frame is None:
            return
          frame.load()
          shown_for = float(frame.info.get("duration") or 0)
        yield number, frame, shown_for

  def _read(self, numbers: list[int]) -> Iterator[np.ndarray]:
    chosen = set(numbers)
    for number, frame, _ in self._sequence():
      if number in chosen:
        yield to_rgb(frame, self.name)
      if number == numbers[-1]:
        return


class _SkipFailed(Exception):
  """Decoding from a keyframe did not give the frame that was asked for."""


class _TimesFailed(Exception):
  """Frames do not come out in the order of their times."""


class _Stream(Video):
  """A file that FFmpeg decodes, through its index."""

  kind = "video"

  def __init__(self, path: Path):
    self.name = str(path)
    self._path = path
    self._use(index_of(path))

  def _use(self, index: Index) -> None:
    self._index = index
    self.claimed, self.fps = index.claimed, index.fps
    self.alpha, self.grey = index.alpha, index.grey
    self.rotation = ROTATION.get(index.turn, 0)
    self.mirrored = index.turn in ("hflip", "vflip", "transpose", "antitranspose")
    height, width = index.size
    self.size = (width, height) if self.rotation % 180 else (height, width)

  def __len__(self) -> int:
    return len(self._index.ticks)

  def pts(self, ids: Iterable[int]) -> tuple[list[int], Fraction] | None:
    return [int(self._index.ticks[i]) for i in ids], self._index.unit

  def variable_rate(self) -> bool:
    if len(self) < 3:
      return False
    steps = np.diff(self._index.ticks)
    # Containers round to ticks, so that equal steps may differ by one.
    return int(steps.max() - steps.min()) > max(1, int(np.median(steps)) // 50)

  @property
  def times(self) -> np.ndarray:
    return self._index.seconds()

  def _read(self, numbers: list[int]) -> Iterator[np.ndarray]:
    done = 0
    try:
      for frame in self._read_by_time(numbers):
        yield frame
        done += 1
    except _TimesFailed:  # found out late that they are not the frames' own
      self._use(counted(self._path, self._index))
      yield from self._count_through(numbers[done:])

  def _read_by_time(self, numbers: list[int]) -> Iterator[np.ndarray]:
    if not self._index.trusted:
      yield from self._count_through(numbers)
      return
    times = [int(self._index.ticks[number]) for number in numbers]
    done = 0
    try:
      for frame in self._decode(times, skip=True):
        yield frame
        done += 1
    except _SkipFailed:  # a keyframe that is no true entry point, or damage
      yield from self._decode(times[done:], skip=False)

  def _count_through(self, numbers: list[int]) -> Iterator[np.ndarray]:
    chosen, number = set(numbers), -1
    with opened(self._path, self._index.stream) as (container, stream):
      to_rgb_frame = _RgbFrames(self._index.turn, container)
      for packet in packets_of(container, stream):
        for frame in decoded(packet, container):
          number += 1
          if number in chosen:
            yield to_rgb_frame(frame)
          if number == numbers[-1]:
            return

  def _decode(self, times: list[int], skip: bool) -> Iterator[np.ndarray]:
    """The frames of these ascending times, until one cannot be had.

    Decodes onwards from one to the next. With `skip` it leaves out the groups of pictures between
    and the frames that no other needs, and raises _SkipFailed where that does not lead to it.
    """
    with opened(self._path, self._index.stream) as (container, stream):
      packets, needed = _Packets(container, stream), set(times)
      to_rgb_frame = _RgbFrames(self._index.turn, container)
      frames: Iterator[av.VideoFrame] = iter(())
      entry, last = None, None
      for time in times:
        if skip and (keyframe := self._entry(time)) and keyframe.packet > packets.next:
          # The decoder has not reached this keyframe, and no frame before it is needed any more.
          stream.codec_context.flush_buffers()
          packets.skip_to(keyframe)
          entry, last, frames = keyframe, None, iter(())
        frame = None
        while frame is None or frame.pts is None or frame.pts < time:
          frame = next(frames, None)
          if frame is None:
            packet = packets.take()
            if packet is None:
              break
            if skip:
              alone = packet.pts is None or packet.pts in needed
              stream.codec_context.skip_frame = "DEFAULT" if alone else "NONREF"
            frames = iter(decoded(packet, container))
            continue
          if frame.pts is not None and last is not None and frame.pts <= last:
            raise _TimesFailed()
          last = frame.pts
          if entry is not None and frame.pts == entry.pts and not self._is_entry(frame):
            raise _SkipFailed()
        if frame is None or frame.pts != time or (skip and frame.is_corrupt):
          if skip:
            raise _SkipFailed()
          if last is not None and _comes_later(last, frames, packets):
            raise _TimesFailed()
          return
        yield to_rgb_frame(frame)

  def _entry(self, time: int) -> Entry | None:
    """The last keyframe that is shown no later than a time."""
    entries = self._index.entries
    at = bisect.bisect_right(entries, time, key=lambda entry: entry.pts)
    return entries[at - 1] if at else None

  def _is_entry(self, frame: av.VideoFrame) -> bool:
    """Whether a frame stands for itself. Many a container flags pictures that do not: MPEG-4 and
    H.263 in AVI, an MP4 without its table of keyframes, streams whose intra blocks wander."""
    return self._index.intra or frame.pict_type == av.video.frame.PictureType.I


def _comes_later(last: int, frames: Iterator, packets: "_Packets") -> bool:
  """Whether a frame of an earlier time than `last` still comes out: times are not the frames' own.

  Otherwise what was looked for is lost.
  """
  for _ in range(REORDERED):
    frame = next(frames, None)
    while frame is None:
      packet = packets.take()
      if packet is None:
        return False
      frames = iter(decoded(packet, packets.container))
      frame = next(frames, None)
    if frame.pts is not None and frame.pts < last:
      return True
  return False


class _Packets:
  """The packets of one stream in file order, with a way to jump ahead."""

  def __init__(self, container, stream):
    self.container, self._stream = container, stream
    self._packets = packets_of(container, stream)
    self.next = 0  # number of the packet that `take` gives next

  def take(self):
    self.next += 1
    return next(self._packets, None)

  def skip_to(self, keyframe: Entry) -> None:
    """Makes `keyframe` the next packet."""
    if keyframe.packet - self.next >= _SEEK_PACKETS:
      try:
        self.container.seek(keyframe.dts, stream=self._stream, backward=True)
      except av.FFmpegError as error:
        raise _SkipFailed() from error
      self._packets = packets_of(self.container, self._stream)
    # Seeks often land a group of pictures early; what lies before the keyframe is not decoded.
    for packet in self._packets:
      if packet.is_keyframe and packet.pts == keyframe.pts:
        self._packets = _chain(packet, self._packets)
        self.next = keyframe.packet
        return
    raise _SkipFailed()


def _chain(first, rest: Iterator) -> Iterator:
  yield first
  yield from rest


class _RgbFrames:
  """YUV to RGB with one conversion context for all frames, turned as a player turns the first.

  Where an SEI message turns the picture, only some frames bear it, and it holds until the next.
  """

  def __init__(self, turn: str, container):
    self._reformatter = av.video.reformatter.VideoReformatter()
    self._turn, self._damaged = TURNS[turn], damage(container)

  def __call__(self, frame: av.VideoFrame) -> np.ndarray:
    with self._damaged:
      rgb = self._reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
    return np.ascontiguousarray(self._turn(rgb))


def scene_ids(
  video: Video,
  num_frames: int | None,
  start: float | None = None,
  end: float | None = None,
  published: bool = False,
) -> list[int]:
  """Frame numbers of the scene, as the published `process_video` picks them; for `read_scene`.

  Uniform rule, or one frame a second with num_frames=None, between `start` and `end` seconds. A
  GIF loses repeated frames. What then lacks to num_frames is filled up with black frames:
  BLACK_SWAPPED (height and width exchanged) and BLACK in turn.

  A list of frames with no more than num_frames is taken whole. Of a longer one the rule of videos
  holds; `published` takes that whole too, and cuts every scene to MAX_FRAMES, as the published
  script does (models of more scene frames can be trained and asked).
  """
  whole = video.kind == "list" and start is None and end is None
  if whole and (published or num_frames is None or len(video) <= num_frames):
    ids = list(range(len(video)))
  else:
    candidates = frame_range(len(video), video.fps, start, end)
    if num_frames is not None:
      positions = uniform_frames(len(candidates), num_frames)
    elif video.fps is not None:
      positions = fps_frames(len(candidates), video.fps)
    else:  # an image
      positions = np.zeros(1, np.int64)
    ids = [candidates[i] for i in positions]
    if video.kind == "gif":
      ids = list(dict.fromkeys(ids))
  missing = max((num_frames or 0) - len(ids), 0)
  ids += [(BLACK_SWAPPED, BLACK)[i % 2] for i in range(missing)]
  return ids[:MAX_FRAMES] if published or num_frames is None else ids


def _taken(
  number: int, frame: np.ndarray, convert: Convert | None, into: Slots | None
) -> np.ndarray:
  frame = frame if convert is None else convert(frame)
  if into is None:
    return frame
  into[number][...] = frame
  return into[number]


def read_scene(
  video: Video, ids: Sequence[int], convert: Convert | None = None, into: Slots | None = None
) -> list[np.ndarray]:
  """Frames of `scene_ids`: those of `video.frames`, and black ones [H, W, 3] where asked."""
  height, width = video.size
  sizes = {BLACK_SWAPPED: (width, height, 3), BLACK: (height, width, 3)}
  real = iter(video.frames((i for i in ids if i not in sizes), convert, into))
  black = {
    i: _taken(i, np.zeros(size, np.uint8), convert, into) for i, size in sizes.items() if i in ids
  }
  return [black[i] if i in black else next(real) for i in ids]


def sample_scene(
  video: Video,
  num_frames: int | None,
  start: float | None = None,
  end: float | None = None,
  published: bool = False,
) -> list[np.ndarray]:
  """The scene frames themselves, RGB uint8 [H, W, 3]: `read_scene` of `scene_ids`.

  Mask frames are read with `video.frames` in the order of the annotation, not cut and not filled.
  To decode only once, read `scene_ids(...) + mask frames` in one `read_scene`.
  """
  return read_scene(video, scene_ids(video, num_frames, start, end, published))
