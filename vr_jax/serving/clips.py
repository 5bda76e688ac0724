"""What the server does with other people's clips: each function is called in a worker process.

Decoders are C code that the file drives; by `data_pipes.isolation` a crash or an endless loop costs
one request. Nothing here imports jax, so that a worker starts at once.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from data_pipes.errors import Defect, InputError
from data_pipes.files import replaced
from data_pipes.images import open_image
from data_pipes.video import Video, open_video
from data_pipes.video_index import opened

# What browsers play by themselves: containers by codec. The pixels must be yuv420p in all.
PLAYABLE = {
  "h264": ("mp4", "mov"),
  "vp8": ("webm", "matroska"),
  "vp9": ("webm", "matroska", "mp4"),
  "av1": ("webm", "matroska", "mp4"),
}
MEDIA_TYPES = {"mp4": "video/mp4", "webm": "video/webm"}
# How picture files are named, by Pillow's name of the format: `open_video` goes by the name.
SUFFIXES = {
  **{"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "WEBP": ".webp", "BMP": ".bmp"},
  **{"GIF": ".gif", "TIFF": ".tif", "PPM": ".ppm", "AVIF": ".avif"},
}
PICTURE_FORMATS = {"jpeg": "JPEG", "webp": "WEBP"}
QUALITY = 90
DEFAULT_FPS = 3.0  # of a clip without times
TICK = Fraction(1, 1000)  # seconds, of animations, whose delays are in milliseconds


@dataclass(frozen=True)
class Limits:
  """Of a clip: pixels of a frame, frames, seconds."""

  pixels: int
  frames: int
  seconds: float


@dataclass(frozen=True)
class ClipInfo:
  """What is known of a clip without its pixels.

  Attributes:
    times: when each frame appears, float64 [frames] seconds; None where it has none.
    size: (height, width) as shown.
    claimed: frames that the container claims, None where it tells none.
    playable: the media type by which a browser plays the file itself; "" where it needs a proxy.
    marked: of a picture, some of its pixels are transparent and some are not.
  """

  kind: str
  frames: int
  fps: float | None
  size: tuple[int, int]
  times: np.ndarray | None = None
  claimed: int | None = None
  rotation: int = 0
  mirrored: bool = False
  playable: str = ""
  marked: bool = False

  @property
  def duration(self) -> float | None:
    """Seconds, the last frame's among them."""
    if self.times is None or self.fps is None:
      return None
    return float(self.times[-1]) + 1 / self.fps

  def warnings(self) -> Iterator[str]:
    """What a user should know of the file, a line each."""
    if self.claimed is not None and self.claimed != self.frames:
      yield (
        f"the file claims {self.claimed} frames and shows {self.frames}; numbers are those of the "
        "frames shown"
      )

  def video(self, name: str) -> "KnownVideo":
    return KnownVideo(name, self)


class KnownVideo(Video):
  """A clip of which all but the pixels is known: regions can be checked against it."""

  def __init__(self, name: str, info: ClipInfo):
    self.name, self.kind, self.fps, self.size = name, info.kind, info.fps, info.size
    self._info = info

  def __len__(self) -> int:
    return self._info.frames

  @property
  def times(self) -> np.ndarray | None:
    return self._info.times


def settle(path: Path, limits: "Limits") -> tuple[str, ClipInfo]:
  """Gives a new file the suffix that its content calls for, whatever its name; and describes it.

  `open_video` goes by the suffix: pictures have theirs, everything else is for FFmpeg. The clip's
  file is `path` with the suffix.

  Raises as `describe`; the file stays then.
  """
  Image.init()  # else Pillow's table of formats is not whole
  try:
    with Image.open(path, formats=[form for form in SUFFIXES if form in Image.OPEN]) as image:
      suffix = SUFFIXES[image.format or ""]
  except Image.DecompressionBombError as error:
    raise Defect("too-large", f"{path}: {error}") from None
  except Exception:  # what Pillow does not know by its head is a video, or nothing
    suffix = ".video"
  return suffix, describe(path.rename(path.with_name(path.name + suffix)), limits)


def describe(path: Path, limits: Limits) -> ClipInfo:
  """What a clip is.

  Raises:
    Defect: of kind "too-large", beyond the limits. InputError: nothing that can be read.
  """
  video = open_video(path, upright=True)
  height, width = video.size
  for value, limit, noun in (
    (height * width, limits.pixels, f"pixels a frame ({width}x{height})"),
    (len(video), limits.frames, "frames"),
  ):
    if value > limit:
      raise Defect("too-large", f"{path}: {value} {noun}; accepted: up to {limit}")
  info = ClipInfo(
    video.kind,
    len(video),
    video.fps,
    (int(height), int(width)),
    None if video.times is None else np.asarray(video.times, np.float64),
    video.claimed,
    video.rotation,
    video.mirrored,
  )
  if info.duration is not None and info.duration > limits.seconds:
    raise Defect(
      "too-large", f"{path}: {info.duration:.0f} s; accepted: up to {limits.seconds:g} s"
    )
  if video.kind == "image":
    video.frames([0])  # a broken picture is refused when it comes
    return ClipInfo(**{**vars(info), "marked": _is_marked(path)})
  return ClipInfo(**{**vars(info), "playable": _playable(path, video)})


def _is_marked(path: Path) -> bool:
  with open_image(path) as image:
    if image.format != "PNG" or not ("A" in image.getbands() or "transparency" in image.info):
      return False
    low, high = image.convert("RGBA").getchannel("A").getextrema()
  return low == 0 and high > 0


def _playable(path: Path, video: Video) -> str:
  if video.kind != "video" or video.pts([0]) is None:
    return ""
  with opened(path) as (container, stream):
    context = stream.codec_context
    form = container.format.name
    containers = PLAYABLE.get(context.name, ())
    if context.pix_fmt != "yuv420p" or not any(name in form.split(",") for name in containers):
      return ""
    return MEDIA_TYPES["mp4" if "mp4" in form else "webm"]


def transparency(path: Path) -> tuple[np.ndarray, np.ndarray]:
  """A picture as RGB uint8 [H, W, 3], and where it is not transparent, uint8 [H, W] of 0 and 1."""
  with open_image(path) as image:
    pixels = np.asarray(image.convert("RGBA"))
  return np.ascontiguousarray(pixels[..., :3]), (pixels[..., 3] > 0).astype(np.uint8)


def encode_frame(path: Path, number: int, width: int | None, form: str) -> bytes:
  """Frame `number` as a JPEG or WebP file, at most `width` pixels wide."""
  (frame,) = open_video(path, upright=True).frames([number])
  image = Image.fromarray(frame)
  if width is not None and width < image.width:
    height = max(1, round(image.height * width / image.width))
    image = image.resize((width, height), Image.Resampling.LANCZOS)
  content = io.BytesIO()
  image.save(content, PICTURE_FORMATS[form], quality=QUALITY)
  return content.getvalue()


def write_proxy(path: Path, out: Path) -> None:
  """An H.264 file of the same presented frames at the same times, which browsers play."""
  video = open_video(path, upright=True)
  height, width = (side + side % 2 for side in video.size)  # yuv420p has no odd sides
  rate = Fraction(video.fps or DEFAULT_FPS).limit_denominator(60_000)
  numbers = range(len(video))
  ticks, unit = video.pts(numbers) or _ticks(video, rate)
  options = {"movflags": "faststart"}
  with replaced(out) as part, av.open(str(part), "w", "mp4", options=options) as container:
    stream = container.add_stream("libx264", rate=rate)
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    stream.options = {"crf": "20", "preset": "veryfast"}
    stream.codec_context.time_base = unit
    remaining = iter(ticks)

    def add(pixels: np.ndarray) -> np.ndarray:
      rows, columns = height - pixels.shape[0], width - pixels.shape[1]
      padded = np.pad(pixels, ((0, rows), (0, columns), (0, 0)), "edge")
      frame = av.VideoFrame.from_ndarray(padded, format="rgb24")
      frame.pts, frame.time_base = next(remaining) - ticks[0], unit
      container.mux(stream.encode(frame))
      return np.empty(0, np.uint8)  # the frames are not kept

    video.frames(numbers, add)
    container.mux(stream.encode(None))


def _ticks(video: Video, rate: Fraction) -> tuple[list[int], Fraction]:
  """Times of the frames of an animation, or of a folder, and their unit in seconds."""
  if video.times is None:
    return list(range(len(video))), 1 / rate
  return [round(float(time) / TICK) for time in video.times], TICK


def unreadable(error: InputError) -> bool:
  """Whether a clip is refused for what it is, not for its size."""
  return not (isinstance(error, Defect) and error.kind == "too-large")
