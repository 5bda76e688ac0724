"""Stages before the agents: readable videos, one shot a clip, no duplicates."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from data_pipes import isolation
from data_pipes.engine.agents.sources import belongs_to, lies_in, path_of, videos_below
from data_pipes.engine.graph import Item, Outcome, Process, Rejected
from data_pipes.engine.quality import duplicates
from data_pipes.engine.quality.shots import Shot, find_shots, perceptual_hash, split_long
from data_pipes.engine.rows import ClipRow, VideoRow
from data_pipes.engine.store import stop_if_full
from data_pipes.errors import InputError
from data_pipes.files import replaced
from data_pipes.video import Video, open_video
from data_pipes.video_index import VIDEO_SUFFIXES

INDEXED = 8  # frames of a benchmark's video that are hashed, a second


def make_ingest(settings: Mapping[str, Any]) -> Process:
  """Source row -> VideoRow; a video that cannot be read is quarantined."""

  def process(item: Item) -> Outcome:
    source = item.row
    video = open_video(source["path"])
    video.frames([0, len(video) - 1])  # the ends can be decoded
    height, width = video.size
    return Outcome([
      VideoRow(
        key=content_hash(Path(source["path"])),
        name=source["key"],
        caption=" ".join(source["caption"].split()),
        frames=len(video),
        fps=video.fps,
        height=height,
        width=width,
        given=source["given"],
      )
    ])  # fmt: skip

  return process


def content_hash(path: Path) -> str:
  """Of a file's bytes, or of all frames of a folder."""
  hasher = hashlib.blake2b(digest_size=12)
  files = sorted(path.iterdir()) if path.is_dir() else [path]
  for file in files:
    if file.is_file():
      with open(file, "rb") as opened:
        while block := opened.read(1 << 20):
          hasher.update(block)
  return hasher.hexdigest()


def make_shots(settings: Mapping[str, Any], media: Path) -> Process:
  """VideoRow -> a ClipRow for each shot; still and short ones are rejected.

  A video of several shots is cut into files of its own, so that nothing after this stage can look
  across a cut and a sample shows what its text is about. Annotated videos stay whole.
  """
  rules = settings["shots"]

  def process(item: Item) -> Outcome:
    row = item.row
    source = path_of(settings["input"]["videos"], row["name"])
    video = open_video(source)
    shots = find_shots(video, rules["adaptive_threshold"], rules["min_content"])
    fps = video.fps or 25.0
    if row["given"]:
      shots = [Shot(0, len(video), float(np.mean([s.motion for s in shots])))]
    else:
      shots = split_long(shots, max(2, int(rules["max_seconds"] * fps)))
    rows, rejected = [], []
    for shot in shots:
      key = f"{row['key']}:{shot.start:06d}-{shot.end:06d}"
      if reason := _too_dull(shot, fps, rules):
        rejected.append(Rejected(key, reason))
        continue
      whole = len(shots) == 1
      name = _link(media, row, source) if whole else _cut(media, video, row["key"], shot)
      rows.append(_clip_row(key, row, shot, media / name, name))
    return Outcome(rows, rejected)

  return process


def _too_dull(shot: Shot, fps: float, rules: Mapping[str, Any]) -> str | None:
  seconds = (shot.end - shot.start) / fps
  if seconds < rules["min_seconds"]:
    return f"shot too short: {seconds:.2f} s, at least {rules['min_seconds']:g}"
  if shot.motion < rules["min_motion"]:
    return f"shot near-static: change {shot.motion:.3f} of 255, at least {rules['min_motion']:g}"
  return None


def _clip_row(key: str, row: Mapping[str, Any], shot: Shot, path: Path, name: str) -> ClipRow:
  clip = open_video(path)
  frames = clip.frames(duplicates.spread(len(clip)))
  height, width = clip.size
  return ClipRow(
    key=key,
    video_id=row["key"],
    source=row["name"],
    video=name,
    caption=row["caption"],
    start=shot.start,
    end=shot.end,
    frames=len(clip),
    fps=clip.fps,
    height=height,
    width=width,
    motion=round(shot.motion, 3),
    hashes=[f"{perceptual_hash(f):016x}" for f in frames],
    mirrored=[f"{perceptual_hash(f[:, ::-1]):016x}" for f in frames],
    given=row["given"],
  )


def _link(media: Path, row: Mapping[str, Any], source: Path) -> str:
  """A link to a video that is used whole; its name in published samples.

  Links lie flat, by the hash of the bytes: below a link to a folder would be the user's own files.
  """
  suffix = source.suffix.lower()
  name = f"videos/{row['key']}{suffix if suffix in VIDEO_SUFFIXES and source.is_file() else ''}"
  link, target = _place(media, name), os.path.realpath(source)
  if lies_in(target, media):
    raise InputError(f"{source}: is one of the run's own files, {target}")
  if not link.is_symlink() or os.readlink(link) != target:
    with replaced(link, durable=False, alone=False) as part:
      part.symlink_to(target)
  return name


def _place(media: Path, name: str) -> Path:
  """Where a file of W/media goes. Raises InputError: a link leads out of the work directory."""
  path = media / name
  if not lies_in(path.parent, media.parent):
    raise InputError(f"{path.parent}: leads out of the work directory; nothing is written there")
  path.parent.mkdir(parents=True, exist_ok=True)
  return path


def check_media(workdir: Path | str) -> None:
  """Raises InputError if the folders of W/media lead out of the work directory W."""
  for folder in ("videos", "clips"):
    _place(Path(workdir) / "media", f"{folder}/video")


def _cut(media: Path, video: Video, video_id: str, shot: Shot) -> str:
  """Writes frames [start, end) as a file of its own; the same bytes each time."""
  name = f"clips/{video_id}_{shot.start:06d}_{shot.end:06d}.mp4"
  path = _place(media, name)
  if not path.is_file():
    with stop_if_full(path), replaced(path, alone=False) as part:
      write_clip(part, video, shot.start, shot.end)
  return name


def write_clip(path: Path, video: Video, start: int, end: int, block: int = 128) -> None:
  """Encodes frames [start, end) as H.264 in an mp4; an odd last row or column is cut off."""
  import av

  height, width = (n - n % 2 for n in video.size)
  with av.open(str(path), "w", format="mp4") as container:
    rate = Fraction(video.fps or 25.0).limit_denominator(1001)
    stream = container.add_stream("libx264", rate=rate)
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    stream.options = {"crf": "17", "preset": "veryfast", "threads": "1", "g": "50"}
    for first in range(start, end, block):
      for frame in video.frames(range(first, min(first + block, end))):
        image = np.ascontiguousarray(frame[:height, :width])
        container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
    container.mux(stream.encode())


def survey_duplicates(settings: Mapping[str, Any]):
  """The survey of 06_unique: what is too like a benchmark's video or another clip."""

  def survey(clips: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    rules, work = settings["duplicates"], settings["workdir"]
    videos = [p for p in benchmark_videos(rules["benchmark"], work) if not belongs_to(work, p)]
    benchmark = {str(path): _apart(look_over, path) for path in videos}
    same = {content_hash(path): str(path) for path in videos}
    names: dict[str, str] = {}

    def named() -> Iterator[Mapping[str, Any]]:
      for clip in clips:
        names[clip["key"]] = clip["video"]
        yield clip

    @cache
    def looks(name: str) -> list[np.ndarray] | None:
      if name in benchmark:
        return benchmark[name][1]
      try:
        return isolation.call(look_at, Path(work, "media", names[name]), seconds=None)
      except (isolation.Ended, InputError):
        return None

    hashes = {name: hashes for name, (hashes, _) in benchmark.items()}
    return duplicates.survey(named(), hashes, rules["distance"], same, looks)

  return survey


def benchmark_videos(names: Iterable[str], work: Path | str) -> list[Path]:
  """Videos and folders of frames at or below the given paths.

  Raises:
    InputError: a path that does not exist or holds no videos: a check against nothing is none.
  """
  out: list[Path] = []
  for name in names:
    root = Path(name)
    if root.is_file():
      out.append(root)
      continue
    videos = videos_below(root, work) if root.is_dir() else []
    if not videos:
      raise InputError(f"duplicates.benchmark: {root}: found no videos; accepted: files or folders")
    out += videos
  return out


def _apart(function: Callable[[Path], Any], path: Path) -> Any:
  try:
    return isolation.call(function, path, seconds=None)
  except isolation.Ended as error:
    raise InputError(f"duplicates.benchmark: {path}: the decoder {error}") from None


def look_over(path: Path) -> tuple[list[int], list[np.ndarray]]:
  """Hashes and small pictures of frames all over a video, INDEXED of a second: a cut of it may
  show any of them. Of frames with one hash there is one."""
  video = open_video(path)
  step = max(1, int((video.fps or 25.0) / INDEXED))
  pictures: dict[int, np.ndarray] = {}
  for first in range(0, len(video), 64 * step):
    for frame in video.frames(range(first, min(first + 64 * step, len(video)), step)):
      pictures.setdefault(perceptual_hash(frame), duplicates.small_picture(frame))
  return list(pictures), list(pictures.values())


def look_at(path: Path) -> list[np.ndarray]:
  """Small pictures of the frames of a clip that are hashed."""
  clip = open_video(path)
  return [duplicates.small_picture(f) for f in clip.frames(duplicates.spread(len(clip)))]


def make_unique(settings: Mapping[str, Any]) -> Process:
  """ClipRow -> the same, unless the survey drops it."""

  def process(item: Item) -> Outcome:
    if item.note:
      return Outcome(rejected=[Rejected(item.key, item.note)])
    return Outcome([ClipRow(**item.row)])

  return process
