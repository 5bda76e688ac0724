"""Which frames a video file presents, in what order and when: found out once for each file.

Frame i is the i-th that a decoder puts out. Where the container's own times can be trusted, one
pass over the packets tells them all, and a reader may skip to a keyframe. Where they cannot, the
file is decoded through once and frames are counted from the beginning:

- a packet bears no time, or two bear the same;
- times run backwards in decode order, as in files that were joined (`cat a.ts b.ts`);
- the container holds no presentation times (AVI, ASF, MXF, elementary streams), so libavformat made
  them up from the decode order, and the codec may show frames in another.

Not every packet becomes a frame: a file that was cut by stream copy begins with pictures that refer
to what is gone, and a truncated one ends with a part of a packet. Both ends are decoded where there
is a sign of that, so that only frames which a player shows are counted.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import os
import re
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition

from data_pipes.errors import InputError, reading
from data_pipes.files import replaced
from data_pipes.images import check_pixels

# Containers whose packets bear the times at which frames are shown.
TIMED = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "flv", "live_flv", "mpegts", "ogg", "nut")
# The others that are read. Formats that only name other files or streams (concat, hls, dash, sdp,
# image2 …) are not: a video that somebody sends must not open another file.
UNTIMED = (
  *("avi", "asf", "asf_o", "mxf", "mxf_d10", "mxf_opatom", "mpeg", "mpegvideo", "ivf", "obu"),
  *("h264", "hevc", "vvc", "m4v", "vc1", "mjpeg", "cavsvideo", "dv", "gxf", "rm", "wtv", "swf"),
  *("gif", "apng", "webp", "yuv4mpegpipe", "smjpeg", "pdv", "mp3", "flac", "wav", "aiff", "av1"),
  *("mpegtsraw", "h263", "h261", "dirac", "roq", "avs2", "avs3", "aac"),
)
# How files in those containers are named, of which only sound is left out: what a folder of videos
# is searched for. A file of any other name is opened too, where it is named itself.
VIDEO_SUFFIXES = (
  *(".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".mj2", ".f4v", ".ism", ".ismv", ".psp"),
  *(".mkv", ".webm", ".mk3d", ".avi", ".divx", ".wmv", ".asf", ".flv", ".nut", ".ogg", ".ogv"),
  *(".ts", ".mts", ".m2ts", ".m2t", ".mpg", ".mpeg", ".mpe", ".m1v", ".m2v", ".mpv", ".vob"),
  *(".mxf", ".gxf", ".ivf", ".obu", ".h264", ".264", ".avc", ".h26l", ".hevc", ".h265", ".265"),
  *(".vvc", ".h266", ".266", ".vc1", ".vc2", ".drc", ".h263", ".h261", ".mjpeg", ".mjpg", ".rm"),
  *(".rmvb", ".wtv", ".dv", ".dif", ".swf", ".y4m", ".avs", ".avs2", ".avs3", ".cavs", ".roq"),
  *(".pdv", ".gif", ".apng", ".avif"),
)
STILL_CODECS = ("mjpeg", "png", "bmp", "gif", "webp", "tiff")
_INTRA_ONLY, _REORDERS = 1, 8  # AV_CODEC_PROP_INTRA_ONLY, AV_CODEC_PROP_REORDER
_PROBED = 64  # frames whose order is looked at where nothing says that it is that of the packets
REORDERED = 32  # frames by which a codec may put off showing one; more is another piece of video
_SLOW = 0.5  # seconds; an index that took longer is kept on disk
_VERSION = 1  # of an index on disk
_JUMP = 10.0  # seconds between frames; more is a break in the times, not a pause


@dataclasses.dataclass(frozen=True)
class Entry:
  """A packet flagged as a keyframe: decoding may begin there, if it is one."""

  pts: int
  dts: int
  packet: int  # its number in file order


@dataclasses.dataclass(frozen=True)
class Index:
  """What is known of a file without its pixels.

  Attributes:
    ticks: when each presented frame is shown, int64 [frames], ascending, in `unit` seconds.
    trusted: a frame's packet and the decoded frame bear that time; otherwise frames are counted.
    entries: where decoding may begin, by time.
    stream: number of the stream in the container.
    origin: seconds at which players begin to count, on the scale of `ticks`.
    claimed: frames that the container says it holds, or else its packets.
    size: (height, width) as stored, pixels.
    turn: how a player turns the frames, a key of `TURNS`.
    intra: every picture of this codec stands for itself.
  """

  ticks: np.ndarray
  unit: Fraction
  trusted: bool
  entries: tuple[Entry, ...]
  stream: int
  origin: float
  claimed: int
  fps: float
  size: tuple[int, int]
  turn: str
  alpha: bool
  grey: bool
  intra: bool

  def seconds(self) -> np.ndarray:
    """When each frame appears, float64 seconds after the container's start."""
    return self.ticks * float(self.unit) - self.origin


# How frames lie in the file and how they are shown: name -> what is done to [H, W, 3].
TURNS = {
  "": lambda a: a,
  "cclock": lambda a: np.rot90(a, 1),
  "half": lambda a: np.rot90(a, 2),
  "clock": lambda a: np.rot90(a, 3),
  "hflip": lambda a: a[:, ::-1],
  "vflip": lambda a: a[::-1],
  "transpose": lambda a: a.swapaxes(0, 1),
  "antitranspose": lambda a: np.rot90(a, 2).swapaxes(0, 1),
}
# The linear part (a, b, c, d) of a display matrix, as signs: x' = a·x + c·y, y' = b·x + d·y.
_MATRICES = {
  (1, 0, 0, 1): "",
  (0, -1, 1, 0): "cclock",
  (-1, 0, 0, -1): "half",
  (0, 1, -1, 0): "clock",
  (-1, 0, 0, 1): "hflip",
  (1, 0, 0, -1): "vflip",
  (0, 1, 1, 0): "transpose",
  (0, -1, -1, 0): "antitranspose",
}
ROTATION = {"cclock": 90, "half": 180, "clock": 270, "transpose": 90, "antitranspose": 270}


def index_of(path: Path) -> Index:
  """The index of a file; from disk where it took long to make before.

  Raises InputError where the file is no video or nothing in it can be decoded.
  """
  kept = _kept(path)
  if kept is not None and kept.is_file():
    with contextlib.suppress(InputError):
      return _read(kept)
  started = time.perf_counter()
  index = make_index(path)
  if kept is not None and time.perf_counter() - started > _SLOW:
    with contextlib.suppress(OSError):  # a full or read-only disk costs the next start, no more
      _write(kept, index)
  return index


def make_index(path: Path) -> Index:
  """As `index_of`, without the disk."""
  with opened(path) as (container, stream):
    scan = _Scan(path, container, stream)
    codec = stream.codec_context
    reorders = bool(codec.codec.properties & _REORDERS)
    doubtful, form = scan.doubtful(), container.format.name
    if not doubtful and reorders and form not in TIMED:
      doubtful = codec.has_b_frames or not _in_order(path, scan.shown()[:_PROBED])
    index = scan.index(container, stream)
  if doubtful:
    return counted(path, index)
  # A transport stream has no word for the length of a picture, so that any may be its last part.
  if scan.cut_off or form == "mpegts":
    return dataclasses.replace(index, ticks=_without_lost_end(path, index))
  return index


def counted(path: Path, index: Index) -> Index:
  """The index of a file whose times say nothing: its frames counted as the decoder gives them."""
  times: list[int | None] = []
  with opened(path) as (container, stream):
    for packet in packets_of(container, stream):
      times += [frame.pts for frame in decoded(packet, container)]
  if not times:
    raise InputError(f"{path}: no frame could be decoded")
  step = max(1, round(1 / (index.fps * index.unit)))
  ticks = _ascending(times, step, index.unit)
  origin = float(ticks[0] * index.unit)
  return dataclasses.replace(index, ticks=ticks, trusted=False, origin=origin)


@contextlib.contextmanager
def opened(path: Path, stream: int | None = None) -> Iterator[tuple]:
  """(container, its video stream) with one decoder thread, as samples are decoded in parallel.

  `stream` is that of the index; by default the one that a player shows: never a cover picture.
  Raises InputError for what FFmpeg cannot read.
  """
  # "file:" keeps a colon in a name from being read as a protocol.
  options = {
    "protocol_whitelist": "file",
    "format_whitelist": ",".join((*TIMED, *UNTIMED)),
  }
  with reading(f"{path}: cannot be read as a video"):
    try:  # titles in another alphabet's bytes are no reason to refuse a video
      container = av.open(f"file:{path}", options=options, metadata_errors="replace")
    except av.ArgumentError:
      raise InputError(f"{path}: not a video of a format that is read") from None
  with container:
    indexed = (one for one in container.streams.video if one.index == stream)
    chosen = next(indexed, None) or _shown_stream(path, container)
    if chosen.codec_context is None:
      raise InputError(f"{path}: its codec is not known")
    chosen.codec_context.thread_count = 1
    yield container, chosen


def packets_of(container, stream) -> Iterator:
  """The packets of a stream in file order, the empty one that ends it too.

  A file that breaks off ends there, as for a player.
  """
  packets = container.demux(stream)
  while True:
    # Not within `reading`, which costs a little, hundreds of thousands of times in a long video.
    try:
      packet = next(packets, None)
    # A player ends there too; PyAV does not know a stream that begins behind the head.
    except (av.FFmpegError, IndexError):
      return
    except Exception:
      with damage(container):
        raise
    if packet is None:
      return
    yield packet


def decoded(packet, container) -> list:
  """The frames that a packet brings out; none where it is damaged, as for a player."""
  try:
    return packet.decode()
  except av.FFmpegError:
    return []
  except Exception:
    with damage(container):
      raise


def damage(container) -> reading:
  """What stands around the calls of FFmpeg that read on in a file."""
  return reading(f"{container.name.removeprefix('file:')}: damaged video")


def _shown_stream(path: Path, container):
  """The default stream, or the largest; a picture that is attached to the file is none."""
  streams = [
    stream
    for stream in container.streams.video
    if not stream.disposition & (Disposition.attached_pic | Disposition.timed_thumbnails)
  ]
  if not streams:
    cover = ", only a cover picture" if container.streams.video else ""
    raise InputError(f"{path}: holds no video stream{cover}")

  def rank(stream) -> tuple:
    context = stream.codec_context
    pixels = 0 if context is None else context.width * context.height
    still = context is None or context.name in STILL_CODECS  # a cover that nothing marks as one
    moving = _pictures(stream) != 1
    return moving, not still, bool(stream.disposition & Disposition.default), pixels

  return max(streams, key=rank)


def _pictures(stream) -> int | None:
  """How many pictures a stream holds, where the container tells; None elsewhere."""
  if stream.frames:
    return stream.frames
  length = re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", ""))
  if length is None or not stream.average_rate:
    return None
  hours, minutes, seconds = map(float, length.groups())
  return round((hours * 3600 + minutes * 60 + seconds) * stream.average_rate)


class _Scan:
  """One pass over the packets of a file, in which only its head is decoded."""

  def __init__(self, path: Path, container, stream):
    context = stream.codec_context
    check_pixels(path, context.height, context.width)
    first: av.VideoFrame | None = None
    self._pts: list[int | None] = []  # of packets that a player does not discard
    self._dts: list[int] = []
    self._entries: list[Entry] = []
    self._head: list[int | None] = []  # times of the frames decoded
    self._claimed = stream.frames
    self._packets, self._corrupt = 0, False
    decoding = True
    for number, packet in enumerate(packets_of(container, stream)):
      if decoding:
        frames = decoded(packet, container)
        first = first or next(iter(frames), None)
        self._head += [frame.pts for frame in frames]
        decoding = not self._past_head()
      if packet.size:
        self._take(number, packet)
    if first is None:
      raise InputError(f"{path}: no frame could be decoded")
    self.first: av.VideoFrame = first  # tells how the frames lie

  def _take(self, number: int, packet) -> None:
    self._packets += 1
    self._corrupt = packet.is_corrupt
    if packet.dts is not None:
      self._dts.append(packet.dts)
    if packet.is_keyframe and packet.pts is not None:
      dts = packet.pts if packet.dts is None else packet.dts
      self._entries.append(Entry(packet.pts, dts, number))
    if not packet.is_discard:
      self._pts.append(packet.pts)

  def _past_head(self) -> bool:
    """Whether a frame is out that is shown no earlier than the first keyframe."""
    if not self._head or not self._entries:
      return bool(self._head) and not self._entries and self._packets > _PROBED
    return self._head[-1] is None or self._head[-1] >= self._entries[0].pts

  def doubtful(self) -> bool:
    """Whether these times cannot be the frames' own."""
    backwards = any(b < a for a, b in itertools.pairwise(self._dts))
    times = [pts for pts in self._pts if pts is not None]
    head = [pts for pts in self._head if pts is not None]
    return (
      backwards
      or len(set(times)) < len(self._pts)
      or len(head) < len(self._head)
      or head != sorted(set(head))
    )

  @property
  def cut_off(self) -> bool:
    """Whether the file seems to end before its time."""
    return self._corrupt or self._claimed > self._packets

  def shown(self) -> np.ndarray:
    """Times of the packets that become frames, as far as the head tells: int64, ascending."""
    times = np.unique(np.array([pts for pts in self._pts if pts is not None], np.int64))
    known = [pts for pts in self._head if pts is not None]
    if not known:
      return times
    # What precedes the last frame of the head and did not come out refers to what is gone.
    return times[(times > max(known)) | np.isin(times, known)]

  def index(self, container, stream) -> Index:
    ticks, unit = self.shown(), stream.time_base
    fps = stream.average_rate or stream.guessed_rate
    if not fps and len(ticks) > 1:
      fps = (len(ticks) - 1) / ((ticks[-1] - ticks[0]) * unit)
    start = container.start_time  # microseconds
    first = float(ticks[0] * unit) if len(ticks) else 0.0
    damaged = damage(container)
    with damaged:
      components = self.first.format.components
    colours = sum(not c.is_alpha for c in components)
    return Index(
      ticks=ticks,
      unit=unit,
      trusted=True,
      entries=tuple(sorted(self._entries, key=lambda entry: entry.pts)),
      stream=stream.index,
      origin=first if start is None else min(start / 1e6, first),
      claimed=self._claimed or self._packets,
      fps=float(fps or 1),
      size=(self.first.height, self.first.width),
      turn=_turn(self.first, damaged),
      alpha=any(c.is_alpha for c in components),
      grey=colours == 1 and not self.first.format.has_palette,
      intra=bool(stream.codec_context.codec.properties & _INTRA_ONLY),
    )


def _turn(frame: av.VideoFrame, damaged: reading) -> str:
  """How a player turns a frame, by its display matrix: the quarter turn or mirror next to it."""
  with damaged:
    matrix = frame.side_data.get("DISPLAYMATRIX")
    # A buffer, of which its stub knows nothing.
    content = b"" if matrix is None else bytes(matrix)  # type: ignore[call-overload]
  if len(content) < 36:
    return ""
  a, b, _, c, d, *_ = np.frombuffer(content[:36], np.int32).astype(np.float64)
  scale = max(abs(v) for v in (a, b, c, d)) or 1.0
  signs = (round(a / scale), round(b / scale), round(c / scale), round(d / scale))
  return _MATRICES.get(signs, "")


def _in_order(path: Path, shown: np.ndarray) -> bool:
  """Whether the first frames come out of the decoder with these times, one after the other."""
  times: list[int | None] = []
  with opened(path) as (container, stream):
    for packet in packets_of(container, stream):
      times += [frame.pts for frame in decoded(packet, container)]
      if len(times) >= len(shown):
        break
  return times[: len(shown)] == shown.tolist()


def _without_lost_end(path: Path, index: Index) -> np.ndarray:
  """The times of the frames that come out, decoded from the last keyframe on."""
  if not index.entries:
    return index.ticks
  last = index.entries[-1]
  times = []
  with opened(path, index.stream) as (container, stream):
    if last.packet:
      with damage(container):
        container.seek(last.dts, stream=stream, backward=True)
    for packet in packets_of(container, stream):
      times += [frame.pts for frame in decoded(packet, container) if frame.pts is not None]
  ticks = index.ticks
  return ticks[(ticks < min([last.pts, *times])) | np.isin(ticks, times)]


def _ascending(times: list[int | None], step: int, unit: Fraction) -> np.ndarray:
  """Times that follow each other, for frames in the order in which they come out.

  Times that are complete but in another order are those of the frames all the same; where they
  break off or start again, the next frame follows after one step.
  """
  if None not in times and len(set(times)) == len(times):
    places = np.argsort(np.array(times, np.int64), kind="stable")
    if np.abs(places - np.arange(len(places))).max() <= REORDERED:
      return np.array(times, np.int64)[places]
  ticks = [times[0] or 0]
  for before, after in itertools.pairwise(times):
    apart = 0 if before is None or after is None else after - before
    ticks.append(ticks[-1] + (apart if apart > 0 and apart * unit < _JUMP else step))
  return np.array(ticks, np.int64)


# --- On disk ------------------------------------------------------------------------------------


def _kept(path: Path) -> Path | None:
  """Where the index of a file is kept, by its content; None where there is no cache folder."""
  try:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "vr_jax" / "videos" / f"{_fingerprint(path)}.npz"
  except (OSError, RuntimeError):  # no home, or no file
    return None


def _fingerprint(path: Path) -> str:
  """Hash of a file's length and of 64 pieces of it: of any size in milliseconds."""
  digest = hashlib.blake2b(digest_size=16)
  size = path.stat().st_size
  digest.update(f"{_VERSION} {size}".encode())
  with path.open("rb") as file:
    for k in range(64):
      file.seek(k * max(0, size - 4096) // 63)
      digest.update(file.read(4096))
  return digest.hexdigest()


def _write(kept: Path, index: Index) -> None:
  fields = {f.name: getattr(index, f.name) for f in dataclasses.fields(index)}
  entries = np.array([dataclasses.astuple(e) for e in index.entries], np.int64).reshape(-1, 3)
  unit = np.array([index.unit.numerator, index.unit.denominator], np.int64)
  with replaced(kept, durable=False, alone=False) as part, part.open("wb") as file:
    np.savez(file, **(fields | {"entries": entries, "unit": unit}))


def _read(kept: Path) -> Index:
  with reading(f"{kept}: damaged"), np.load(kept) as held:
    fields = {name: held[name] for name in held.files}
  entries = tuple(Entry(*map(int, row)) for row in fields.pop("entries"))
  unit = Fraction(*map(int, fields.pop("unit")))
  height, width = map(int, fields.pop("size"))
  ticks = fields.pop("ticks")
  rest = {name: value.item() for name, value in fields.items()}
  return Index(ticks=ticks, unit=unit, entries=entries, size=(height, width), **rest)
