"""Annotation files and their media checked item by item: what is wrong, by class and with a reason.

A *defect* makes an item unusable: `vr data prepare` rejects it with the same reason. A *notice* is
something that is handled, by the rule its description states, and that a user may want to know of.
"""

import functools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from data_pipes import isolation
from data_pipes.clips import media_path
from data_pipes.errors import Defect, InputError
from data_pipes.images import open_image, read_image
from data_pipes.json_items import Span, scan_items
from data_pipes.masks import check_segmentation, mask_to_grid, segmentation_to_mask, vanished
from data_pipes.records import Record, parse_item
from data_pipes.video import open_video, scene_ids

DEFECTS = {
  "json": "the file is no JSON array, or breaks off; items behind the place are not seen",
  "utf-8": "the item's text is not UTF-8",
  "item": "the item is no JSON object, or lacks a key of its format",
  "media-key": "video and image both given, or no path in them",
  "path": "the media path leads out of the media folder",
  "conversations": "no dialogue of human and gpt in turn",
  "media-tag": "not exactly one <video> or <image> for the media, or a tag without media",
  "stream": "a streaming sample, which no published trainer of these formats can read",
  "region-count": "as many <region> as objects are needed",
  "object": "an object that is not {frame: segmentation, ...}",
  "never-seen": "an object without a mask in any frame",
  "frame-key": "a frame that is no number",
  "frame-range": "a frame past the end of the media",
  "segmentation": "a mask that cannot be drawn",
  "mask-size": "a mask of another size than its frame",
  "size": "height and width that are no sizes",
  "duplicate-id": "an id that an earlier item of the file has",
  "media-absent": "no such media file",
  "media-empty": "a media file of zero bytes",
  "media-unreadable": "media that cannot be opened",
  "media-damaged": "a frame that is needed cannot be decoded",
  "too-large": "frames of so many pixels that they could fill the memory",
  "bench": "an answer, option or frame of VideoRefer-Bench that does not fit the item",
}
NOTICES = {
  "null-mask": "annotated frames without a mask: the object counts as not seen there",
  "vanishing": "masks in no cell of the grid by the published rule: the default keeps one",
  "presented-count": "the container claims another number of frames than a player shows; frame "
  "numbers count presented frames here, and masks made with other readers may be shifted",
  "variable-rate": "frames at unequal times: rules that go by seconds use the average rate",
  "rotated": "a player turns the frames: so do we, and masks must be of the turned size",
  "odd-size": "a side of an odd number of pixels: used as it is",
  "orientation": "an image's orientation tag is ignored, as published: masks must be as stored",
  "alpha": "transparency is dropped",
  "greyscale": "grey becomes equal red, green and blue",
  "frame-list": "the video is a list of pictures: for VideoRefer's successors, from the annotation "
  "file alone",
  "size-differs": "height and width are not those of the media, whose own are used",
}
KINDS = {**DEFECTS, **NOTICES}
_MEDIA_HELD = 4096  # results of media files kept, as neighbouring items share them


@dataclass(frozen=True)
class Finding:
  """One defect or notice. `at` is (object, frame number) where it concerns one mask."""

  kind: str
  reason: str
  at: tuple[int, int] | None = None

  @property
  def is_defect(self) -> bool:
    return self.kind in DEFECTS


@dataclass(frozen=True)
class Media:
  """What the checks need to know of a media file; `size` is (height, width) in pixels."""

  frames: int
  size: tuple[int, int]
  findings: tuple[Finding, ...]


@dataclass(frozen=True)
class Checks:
  """What is checked besides the item itself.

  Attributes:
    media: the folder of the media; None leaves them unopened.
    decode: also decode the frames that training needs: `scene` uniform ones and those of masks.
    grid: cells a side on which masks are drawn to find those that vanish; 0 leaves that out.
    reject: notices that count as defects.
    item_seconds: that the media of an item may take.
  """

  media: Path | None = field(
    default=None, metadata={"help": "also open the media, relative to DIR", "metavar": "DIR"}
  )
  decode: bool = field(default=False, metadata={"help": "also decode the frames that are needed"})
  scene: int = field(
    default=16, metadata={"flag": "--scene-frames", "help": "of --decode", "metavar": "N"}
  )
  grid: int = field(default=0, metadata={"help": "count masks that vanish on it", "metavar": "G"})
  reject: tuple[str, ...] = field(
    default=(), metadata={"help": "count as defects", "metavar": "NOTICE"}
  )
  item_seconds: float = isolation.item_seconds()

  def __post_init__(self):
    isolation.check_seconds(self.item_seconds)
    for kind in self.reject:
      if kind not in NOTICES:
        raise InputError(f"reject {kind!r}; accepted: {', '.join(NOTICES)}")

  def rejects(self, finding: Finding) -> bool:
    """Whether an item with this finding is not used."""
    return finding.is_defect or finding.kind in self.reject


# One item


def check_masks(record: Record, size: tuple[int, int] | None, grid: int = 0) -> Iterator[Finding]:
  """Findings of a record's masks; `size` (height, width) is the media's, None if not known."""
  for i, by_frame in enumerate(record.objects):
    empty = broken = 0
    lost = []
    for number, segmentation in by_frame.items():
      spot = f"object {i}, frame {number}"
      try:
        stated, area = check_segmentation(segmentation, record.size or size)
      except InputError as error:
        yield Finding("segmentation", f"{spot}: {error}", (i, number))
        broken += 1
        continue
      empty += area == 0
      if stated is None and area is None:  # polygons are drawn on the item's size, or the media's
        stated = record.size or size
      if stated and size and tuple(stated) != tuple(size):
        yield Finding(
          "mask-size",
          f"{spot}: found a mask of {stated[0]}x{stated[1]}; accepted: the size of the frame, "
          f"{size[0]}x{size[1]} (height x width)",
          (i, number),
        )
        broken += 1
      elif grid and area != 0 and stated:
        mask = segmentation_to_mask(segmentation, *stated)
        if vanished(mask, mask_to_grid(mask, grid, rule="published")):
          lost.append(number)
    if empty + broken == len(by_frame):
      if not broken:
        reason = f"object {i}: found no mask in {len(by_frame)} frames; accepted: at least one"
        yield Finding("never-seen", reason)
    elif empty:
      yield Finding("null-mask", f"object {i}: {empty} of {len(by_frame)} frames have no mask")
    if lost:
      yield Finding(
        "vanishing", f"object {i}: vanishes on a grid of {grid} in {len(lost)} frames", (i, lost[0])
      )


def check_frames(record: Record, media: Media) -> Iterator[Finding]:
  """Frames that the media lacks, and a size that differs from the media's."""
  for i, by_frame in enumerate(record.objects):
    past = [n for n in by_frame if n >= media.frames]
    for number in past:
      yield Finding(
        "frame-range",
        f"object {i}: found frame {number}; accepted: 0 to {media.frames - 1}",
        (i, number),
      )
  if record.size and record.size != media.size:
    given, real = (f"{h}x{w}" for h, w in (record.size, media.size))
    yield Finding("size-differs", f"found height x width {given}; the media has {real}")


# Media


def inspect_media(path: Path, kind: str) -> Media:
  """Opens a media file; `kind` is "video" or "image". Decodes no more than one frame of a video.

  Raises Defect: absent, empty, unreadable or too large.
  """
  try:
    if not path.exists():
      raise Defect("media-absent", f"{path}: no such file")
  except OSError as error:  # a name too long, a folder that may not be read
    raise Defect("media-absent", f"{path}: {error.strerror}") from None
  if path.is_file() and path.stat().st_size == 0:
    raise Defect("media-empty", f"{path}: the file is empty")
  try:
    return _image(path) if kind == "image" else _video(path)
  except Defect:
    raise
  except (InputError, OSError) as error:
    raise Defect("media-unreadable", str(error)) from error


def isolated(kind: str, path: Path, seconds: float, function: Callable, *args: Any) -> Any:
  """A call that decodes the media at `path`, apart; a crash or a hang is a Defect of this kind."""
  try:
    return isolation.call(function, *args, seconds=seconds)
  except isolation.Ended as error:
    raise Defect(kind, f"{path}: the decoder {error}") from None


def _image(path: Path) -> Media:
  height, width = read_image(path).shape[:2]  # decodes all, as a broken end shows only then
  with open_image(path) as image:
    findings = tuple(_mode_findings(image))
  return Media(1, (height, width), findings)


def _mode_findings(image: Image.Image) -> Iterator[Finding]:
  if image.mode in ("LA", "PA", "RGBA", "RGBa", "La") or "transparency" in image.info:
    yield Finding("alpha", f"mode {image.mode}")
  if image.mode in ("1", "L", "LA", "La"):
    yield Finding("greyscale", f"mode {image.mode}")
  if (tag := image.getexif().get(ExifTags.Base.Orientation, 1)) != 1:
    yield Finding("orientation", f"tag {tag}")


def _video(path: Path) -> Media:
  video = open_video(path)
  findings = []
  if video.claimed is not None and video.claimed != len(video):
    reason = f"the container claims {video.claimed} frames, a player shows {len(video)}"
    findings.append(Finding("presented-count", reason))
  if video.variable_rate():
    findings.append(Finding("variable-rate", f"{video.fps:.6g} frames per second on average"))
  if video.rotation:
    findings.append(Finding("rotated", f"by {video.rotation} degrees"))
  height, width = video.size
  if video.kind == "video" and (height % 2 or width % 2):
    findings.append(Finding("odd-size", f"{height}x{width} (height x width)"))
  if video.alpha:
    findings.append(Finding("alpha", "a video with transparency"))
  if video.grey:
    findings.append(Finding("greyscale", "a video without colour"))
  return Media(len(video), (int(height), int(width)), tuple(findings))


def decode_needed(path: Path, record: Record, scene: int) -> None:
  """Decodes the frames that training takes of a video. Raises Defect."""
  try:
    video = open_video(path)
    masked = {n for by_frame in record.objects for n in by_frame}
    video.frames({n for n in scene_ids(video, scene) if n >= 0} | masked, lambda frame: frame[:1])
  except Defect:
    raise
  except (InputError, OSError) as error:
    raise Defect("media-damaged", str(error)) from error


# A file


class Seen:
  """Values met before, 8 bytes each; finds repeats without holding the values."""

  def __init__(self):
    self._sorted = np.zeros(0, np.uint64)
    self._new: set[int] = set()

  def add(self, value: Any) -> bool:
    """Whether `value` is new."""
    import hashlib

    text = repr(value).encode("utf-8", "surrogatepass")
    code = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
    at = np.searchsorted(self._sorted, np.uint64(code))
    if code in self._new or (at < len(self._sorted) and int(self._sorted[at]) == code):
      return False
    self._new.add(code)
    if len(self._new) > 1 << 16:
      new = np.array(sorted(self._new), np.uint64)
      self._sorted = np.sort(np.concatenate([self._sorted, new]), kind="stable")
      self._new.clear()
    return True


@dataclass(frozen=True)
class Checked:
  """An item with its findings; `id` is None where it has none, `record` where it has no format."""

  index: int
  span: Span | None
  id: Any
  record: Record | None
  findings: tuple[Finding, ...]


def check_file(path: Path | str, checks: Checks, jobs: int = 1) -> Iterator[Checked]:
  """The items of a file in order, each with its findings; memory does not grow with the file.

  A file that is no JSON array, or that breaks off, ends with one Checked without a span.
  """
  path = Path(path)
  seen = Seen()
  inspect = _cached_inspect(checks.item_seconds)

  def check(numbered: tuple[int, Span]) -> Checked:
    return check_item(path, *numbered, checks, inspect)

  spans = enumerate(scan_items(path))
  with ThreadPoolExecutor(jobs) as pool:
    results = map(check, spans) if jobs == 1 else _in_order(pool, check, spans, 8 * jobs)
    count = 0
    while True:
      try:
        done = next(results, None)
      except InputError as error:
        reason = str(error).removeprefix(f"{path}: ")
        yield Checked(count, None, None, None, (Finding("json", reason),))
        return
      if done is None:
        return
      count += 1
      item = done.span.item if done.span else None
      if isinstance(item, dict) and "id" in item and not seen.add(item["id"]):
        reason = f"found id {item['id']!r} again; accepted: an id of its own"
        done = Checked(
          done.index,
          done.span,
          done.id,
          done.record,
          (*done.findings, Finding("duplicate-id", reason)),
        )
      yield done


def _cached_inspect(seconds: float) -> Callable[[Path, str], Media | Defect]:
  @functools.lru_cache(_MEDIA_HELD)
  def inspect(path: Path, kind: str) -> Media | Defect:
    try:
      return isolated("media-unreadable", path, seconds, inspect_media, path, kind)
    except Defect as error:
      return error

  return inspect


def _in_order(pool: ThreadPoolExecutor, call: Callable, items: Iterable, ahead: int) -> Iterator:
  """Results of `call` in the order of the items, at most `ahead` of them under way."""
  running: deque = deque()
  items = iter(items)
  broken = None
  while True:
    while broken is None and len(running) < ahead:
      try:
        item = next(items, None)
      except InputError as error:
        broken = error
        break
      if item is None:
        break
      running.append(pool.submit(call, item))
    if not running:
      if broken is not None:
        raise broken
      return
    yield running.popleft().result()


def check_item(
  path: Path,
  index: int,
  span: Span,
  checks: Checks,
  inspect: Callable[[Path, str], Media | Defect],
) -> Checked:
  """Everything about one item but its id."""
  item = span.item
  identity = item.get("id") if isinstance(item, dict) else None
  where = f"{path}: item {index}"
  prefixes = (f"{where} (id {identity!r}): ", f"{where}: ")

  def finding(error: Defect) -> Finding:
    text = str(error)
    for prefix in prefixes:
      text = text.removeprefix(prefix)
    return Finding(error.kind, text)

  if isinstance(item, Defect):
    return Checked(index, span, identity, None, (finding(item),))
  try:
    record = parse_item(item, where)
  except Defect as error:
    return Checked(index, span, identity, None, (finding(error),))
  findings: list[Finding] = []
  media = None
  if record.media is not None:
    try:
      media = _inspected(record, checks, inspect)
      findings += media.findings if media else ()
    except Defect as error:
      findings.append(finding(error))
  if record.frames:
    findings.append(Finding("frame-list", f"{len(record.frames.files)} pictures"))
  findings += check_masks(record, media.size if media else None, checks.grid)
  if media is not None:
    findings += check_frames(record, media)
    one_file = record.media == "video" and not record.frames  # pictures are decoded already
    if checks.decode and one_file and not any(f.is_defect for f in findings):
      try:
        file = _place(checks, record.path)
        needed = (file, record, checks.scene)
        isolated("media-damaged", file, checks.item_seconds, decode_needed, *needed)
      except Defect as error:
        findings.append(finding(error))
  return Checked(index, span, identity, record, tuple(findings))


def _place(checks: Checks, path: str) -> Path:
  """Where a media path leads. Raises Defect where it leads out of the media folder."""
  # Without a folder of media nothing says where an absolute path should lie.
  return media_path(checks.media or ("/" if os.path.isabs(path) else ""), path)


def _inspected(
  record: Record, checks: Checks, inspect: Callable[[Path, str], Media | Defect]
) -> Media | None:
  """What a record's media is, None where it is not opened. Raises Defect."""
  frames = record.frames
  files = (*frames.files, *frames.masked) if frames else (record.path,)
  paths = [_place(checks, file) for file in files]
  if checks.media is None:
    return None
  kind = "image" if frames else record.media
  assert kind is not None
  results = []
  for path in paths:
    result = inspect(path, kind)
    if isinstance(result, Defect):
      raise result
    results.append(result)
  if len({result.size for result in results}) > 1:
    raise Defect("media-unreadable", f"{paths[0]}: found pictures of several sizes; accepted: one")
  return results[0] if not frames else Media(len(files), results[0].size, results[0].findings)
