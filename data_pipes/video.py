"""Videos as presented frames: exact frame numbers, whatever the container.

`open_video` reads files that FFmpeg decodes (mp4, webm, ...), GIFs, folders of frames, single
images and frames already in memory. Frame i is the i-th frame that a player shows. A container's
own count may be larger: edit lists hide frames, and some readers then shift every later frame.
"""

import bisect
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageSequence

from data_pipes.errors import InputError
from data_pipes.frame_rules import MAX_FRAMES, fps_frames, frame_range, uniform_frames
from data_pipes.images import IMAGE_SUFFIXES, check_pixels, open_image, read_image, to_rgb

FOLDER_FPS = 3.0  # published: a folder of frames counts as 3 frames per second, a GIF as 25
GIF_FPS = 25.0
BLACK_SWAPPED, BLACK = -1, -2  # scene ids of the black frames that fill up a scene, see scene_ids

# A jump over at least this many packets seeks; a shorter one reads past them, which is cheaper.
_SEEK_PACKETS = 256


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
    rotation: degrees that a player turns the frames by.
    alpha, grey: the frames have transparency, which is dropped; they have no colour.
  """

  name: str
  kind: str
  fps: float | None
  size: tuple[int, int]
  claimed: int | None = None
  rotation: int = 0
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
    ids = [int(i) for i in ids]
    for i in ids:
      if not 0 <= i < len(self):
        raise InputError(
          f"{self.name}: frame {i} asked for; the video has frames 0 to {len(self) - 1}"
        )
    numbers = sorted(set(ids))
    frames = {}
    if numbers:
      for number, frame in zip(numbers, self._read(numbers), strict=False):
        frames[number] = _taken(number, frame, convert, into)
    if len(frames) < len(numbers):
      raise InputError(f"{self.name}: frame {numbers[len(frames)]} is damaged")
    return [frames[i] for i in ids]

  def time_to_frame(self, seconds: float) -> int:
    """Number of the frame on show `seconds` after the first one appeared."""
    if self.fps is None:
      raise InputError(f"{self.name}: a time was given, but the {self.kind} has none; give a frame")
    times = self._times(self.fps)
    end = times[-1] + 1 / self.fps
    if not 0 <= seconds < end:
      raise InputError(f"{self.name}: time {seconds:g} s; the video lasts from 0 to {end:.6g} s")
    # A microsecond of slack, so that a time printed with six digits finds its own frame.
    return int(np.searchsorted(times, seconds + 1e-6, side="right")) - 1

  def _times(self, fps: float) -> np.ndarray:
    """When each frame appears, float64 seconds after the first."""
    return np.arange(len(self)) / fps


def open_video(source: str | os.PathLike | np.ndarray | Sequence | Video) -> Video:
  """Opens a video, GIF, folder of frames or image by path; or frames in memory.

  Args:
    source: a path; or a uint8 array [T, H, W, 3]; or a list of frames, each a uint8 array
      [H, W, 3], a PIL image or the path of an image, all RGB; or a Video, which is given back.

  Raises InputError where there is no such file, nothing can be decoded, or there are no frames.
  """
  if isinstance(source, Video):
    return source
  if not isinstance(source, str | os.PathLike):
    frames = list(source)
    if not frames:
      raise InputError("an empty list of frames was given as the video")
    return _Stills("list of frames", "list", frames, None)
  path = Path(source)
  if path.is_dir():
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
      raise InputError(f"{path}: the folder holds no frames ({', '.join(IMAGE_SUFFIXES)})")
    return _Stills(str(path), "folder", files, FOLDER_FPS)
  if not path.exists():
    raise InputError(f"{path}: no such video, folder of frames or image")
  if path.suffix.lower() == ".gif":
    return _Gif(path)
  if path.suffix.lower() in IMAGE_SUFFIXES:
    return _Stills(str(path), "image", [path], None)
  return _Stream(path)


class _Stills(Video):
  """Frames that can be had one by one: files, or arrays in memory."""

  def __init__(self, name: str, kind: str, items: list, fps: float | None):
    self.name, self.kind, self.fps = name, kind, fps
    self._items = items
    self.size = self._load(0).shape[:2]

  def __len__(self) -> int:
    return len(self._items)

  def _read(self, numbers: list[int]) -> Iterator[np.ndarray]:
    return (self._load(i) for i in numbers)

  def _load(self, i: int) -> np.ndarray:
    item = self._items[i]
    if isinstance(item, str | os.PathLike):
      return read_image(item)
    if isinstance(item, Image.Image):
      return to_rgb(item)
    item = np.asarray(item)
    if item.dtype != np.uint8 or item.ndim != 3 or item.shape[2] != 3 or not item.size:
      raise InputError(
        f"{self.name}: frame {i} is {item.dtype} {list(item.shape)}; uint8 [H, W, 3] is needed"
      )
    return item


class _Gif(Video):
  """An animated GIF, its frames composed as a player shows them."""

  kind, fps = "gif", GIF_FPS

  def __init__(self, path: Path):
    self.name = str(path)
    self._path = path
    with self._open() as image:
      self.size = image.height, image.width
      self._count = getattr(image, "n_frames", 1)

  def __len__(self) -> int:
    return self._count

  def _open(self) -> Image.Image:
    try:
      return open_image(self._path)
    except OSError as error:
      raise InputError(f"{self.name}: cannot be read as an image ({error})") from error

  def _read(self, numbers: list[int]) -> Iterator[np.ndarray]:
    needed = set(numbers)
    with self._open() as image:
      try:
        for i, frame in enumerate(ImageSequence.Iterator(image)):
          if i in needed:
            yield to_rgb(frame)
          if i == numbers[-1]:
            return
      except (OSError, EOFError, SyntaxError) as error:
        raise InputError(f"{self.name}: damaged at frame {i} ({error})") from error


@dataclasses.dataclass(frozen=True)
class _Keyframe:
  """A packet that decoding can begin with."""

  pts: int
  dts: int
  packet: int  # its number in file order


class _SkipFailed(Exception):
  """Decoding from a keyframe did not give the frame wanted."""


class _Stream(Video):
  """A file that FFmpeg decodes, through an index made by one pass over its packets."""

  kind = "video"

  def __init__(self, path: Path):
    self.name = str(path)
    self._path = path
    pts: list[int | None] = []
    keyframes = []
    first = None
    with self._open() as container:
      stream = container.streams.video[0]
      check_pixels(path, stream.codec_context.height, stream.codec_context.width)
      packets = 0
      for number, packet in enumerate(container.demux(stream)):
        if first is None:  # decoded only to learn how the frames lie
          first = next(iter(packet.decode()), None)
        if not packet.size:
          continue
        packets += 1
        if packet.is_keyframe and packet.pts is not None:
          dts = packet.pts if packet.dts is None else packet.dts
          keyframes.append(_Keyframe(packet.pts, dts, number))
        if not packet.is_discard:
          pts.append(packet.pts)
      if first is None:
        raise InputError(f"{self.name}: no frame could be decoded")
      self._time_base = stream.time_base
      fps = stream.average_rate or stream.guessed_rate
      self.claimed = stream.frames or packets
      self.rotation = first.rotation % 360
      components = first.format.components
      self.alpha = any(c.is_alpha for c in components)
      self.grey = sum(not c.is_alpha for c in components) == 1 and not first.format.has_palette
      turned = first.rotation % 180 != 0
      self.size = (first.width, first.height) if turned else (first.height, first.width)
    self._keyframes = sorted(keyframes, key=lambda k: k.pts)
    if None in pts:  # some AVI files give no times: frames can only be counted
      self._pts = None
      with self._open() as container:
        self._count = sum(1 for _ in container.decode(video=0))
    else:
      self._pts = np.unique(np.array(pts, np.int64))
      self._count = len(self._pts)
    if not fps and self._pts is not None and len(self._pts) > 1:
      fps = (len(self._pts) - 1) / ((self._pts[-1] - self._pts[0]) * self._time_base)
    self.fps = float(fps or 1)

  def __len__(self) -> int:
    return self._count

  def pts(self, ids: Iterable[int]) -> tuple[list[int], Fraction] | None:
    return None if self._pts is None else ([int(self._pts[i]) for i in ids], self._time_base)

  def variable_rate(self) -> bool:
    if self._pts is None or len(self._pts) < 3:
      return False
    steps = np.diff(self._pts)
    # Containers round to ticks, so that equal steps may differ by one.
    return int(steps.max() - steps.min()) > max(1, int(np.median(steps)) // 50)

  def _open(self) -> "_Container":
    return _Container(self._path)

  def _times(self, fps: float) -> np.ndarray:
    if self._pts is None:
      return super()._times(fps)
    return (self._pts - self._pts[0]) * float(self._time_base)

  def _read(self, numbers: list[int]) -> Iterator[np.ndarray]:
    if self._pts is None:
      yield from self._count_through(numbers)
      return
    times = [int(self._pts[number]) for number in numbers]
    done = 0
    try:
      for frame in self._decode(times, skip=True):
        yield frame
        done += 1
    except _SkipFailed:  # a keyframe that is no true entry point, or damage
      yield from self._decode(times[done:], skip=False)

  def _count_through(self, numbers: list[int]) -> Iterator[np.ndarray]:
    needed = set(numbers)
    with self._open() as container:
      to_rgb_frame = _RgbFrames()
      for i, frame in enumerate(container.decode(video=0)):
        if i in needed:
          yield to_rgb_frame(frame)
        if i == numbers[-1]:
          return

  def _decode(self, times: list[int], skip: bool) -> Iterator[np.ndarray]:
    """The frames of these ascending times, until one cannot be had.

    Decodes onwards from one to the next. With `skip` it leaves out the groups of pictures between
    and the frames that no other needs, and raises _SkipFailed where that does not lead to it.
    """
    with self._open() as container:
      stream = container.streams.video[0]
      packets, targets = _Packets(container, stream), set(times)
      to_rgb_frame = _RgbFrames()
      decoded: Iterator[av.VideoFrame] = iter(())
      for pts in times:
        if skip and (keyframe := self._keyframe(pts)) and keyframe.packet > packets.next:
          # The decoder has not reached this keyframe, and no frame before it is wanted any more.
          stream.codec_context.flush_buffers()
          packets.skip_to(keyframe)
        frame = None
        while frame is None or frame.pts is None or frame.pts < pts:
          frame = next(decoded, None)
          if frame is None:
            packet = packets.take()
            if packet is None:
              break
            if skip:
              needed = packet.pts is None or packet.pts in targets
              stream.codec_context.skip_frame = "DEFAULT" if needed else "NONREF"
            decoded = iter(packet.decode())
        if frame is None or frame.pts != pts or (skip and frame.is_corrupt):
          if skip:
            raise _SkipFailed()
          return
        yield to_rgb_frame(frame)

  def _keyframe(self, pts: int) -> _Keyframe | None:
    at = bisect.bisect_right(self._keyframes, pts, key=lambda k: k.pts)
    return self._keyframes[at - 1] if at else None


class _Container:
  """`av.open` with one decoder thread (samples are decoded in parallel) and readable errors."""

  def __init__(self, path: Path):
    self._path = path

  def __enter__(self):
    try:
      self._container = av.open(str(self._path))
    except (av.FFmpegError, OSError, ValueError) as error:
      raise InputError(f"{self._path}: cannot be read as a video ({_reason(error)})") from error
    if not self._container.streams.video:
      self._container.close()
      raise InputError(f"{self._path}: holds no video stream")
    self._container.streams.video[0].codec_context.thread_count = 1
    return self._container

  def __exit__(self, kind, error, traceback) -> None:
    self._container.close()
    if isinstance(error, av.FFmpegError):
      raise InputError(f"{self._path}: damaged video ({_reason(error)})") from error


def _reason(error: Exception) -> str:
  return getattr(error, "strerror", None) or str(error).splitlines()[0]


class _Packets:
  """The packets of one stream in file order, with a way to jump ahead."""

  def __init__(self, container, stream):
    self._container, self._stream = container, stream
    self._packets = container.demux(stream)
    self.next = 0  # number of the packet that `take` gives next

  def take(self):
    self.next += 1
    return next(self._packets, None)

  def skip_to(self, keyframe: _Keyframe) -> None:
    """Makes `keyframe` the next packet."""
    if keyframe.packet - self.next >= _SEEK_PACKETS:
      try:
        self._container.seek(keyframe.dts, stream=self._stream, backward=True)
      except av.FFmpegError as error:
        raise _SkipFailed() from error
      self._packets = self._container.demux(self._stream)
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
  """YUV to RGB with one conversion context for all frames, turned as a player turns them."""

  def __init__(self):
    self._reformatter = av.video.reformatter.VideoReformatter()

  def __call__(self, frame: av.VideoFrame) -> np.ndarray:
    rgb = self._reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(rgb, turns)) if turns else rgb


def scene_ids(
  video: Video,
  num_frames: int | None,
  start: float | None = None,
  end: float | None = None,
  max_frames: int = MAX_FRAMES,
) -> list[int]:
  """Frame numbers of the scene, as the published `process_video` picks them; for `read_scene`.

  Uniform rule, or one frame a second with num_frames=None, between `start` and `end` seconds. A
  list of frames is taken whole. A GIF loses repeated frames. What then lacks to num_frames is
  filled up with black frames: BLACK_SWAPPED (height and width exchanged) and BLACK in turn. Last,
  the scene is cut to max_frames.
  """
  if video.kind == "list" and start is None and end is None:
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
  return ids[:max_frames]


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
  max_frames: int = MAX_FRAMES,
) -> list[np.ndarray]:
  """The scene frames themselves, RGB uint8 [H, W, 3]: `read_scene` of `scene_ids`.

  Mask frames are read with `video.frames` in the order of the annotation, not cut and not filled.
  To decode only once, read `scene_ids(...) + mask frames` in one `read_scene`.
  """
  return read_scene(video, scene_ids(video, num_frames, start, end, max_frames))
