"""Annotation files and their media checked item by item: what is wrong, by class and with a reason.

A *defect* makes an item unusable: `vr data prepare` rejects it with the same reason. A *notice* is
something that is handled, by the rule its description states, and that a user may want to know of.
"""

import functools
import itertools
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from data_pipes.clips import media_path
from data_pipes.errors import Defect, InputError
from data_pipes.images import open_image, read_image
from data_pipes.masks import check_segmentation, mask_to_grid, segmentation_to_mask, vanished
from data_pipes.records import (
  Record,
  Span,
  check_text,
  parse_objects,
  parse_record,
  scan_items,
)
from data_pipes.video import open_video, scene_ids

DEFECTS = {
  "json": "the file is no JSON array, or breaks off; items behind the place are not seen",
  "utf-8": "the item's text is not UTF-8",
  "item": "the item is no JSON object, or lacks a key of its format",
  "media-key": "video and image both given, or no path in them",
  "path": "the media path leads out of the media folder",
  "conversations": "no dialogue of human and gpt in turn",
  "media-tag": "not exactly one <video> or <image> for the media, or a tag without media",
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
  "size-differs": "height and width are not those of the media, whose own are used",
}
KINDS = {**DEFECTS, **NOTICES}
BENCH_KEYS = {
  "D": ("video", "caption", "frame_idx", "annotation"),
  "Q": ("video", "Question", "options", "Answer", "frame_idx", "annotation"),
}
SHOWN_IDS = 100  # in the summary; the full list is in the file of findings
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

  def __post_init__(self):
    for kind in self.reject:
      if kind not in NOTICES:
        raise InputError(f"reject {kind!r}; accepted: {', '.join(NOTICES)}")

  def rejects(self, finding: Finding) -> bool:
    """Whether an item with this finding is not used."""
    return finding.is_defect or finding.kind in self.reject


# One item


def parse_item(item: Any, where: str) -> Record:
  """An item of a training file, or of VideoRefer-Bench D or Q (a record without turns).

  Raises Defect.
  """
  if not isinstance(item, dict):
    return parse_record(item, where)
  kind = bench_kind(item)
  if kind is None:
    return parse_record(item, where)
  where = f"{where} (id {item['id']!r})" if "id" in item else where
  missing = [key for key in BENCH_KEYS[kind] if key not in item]
  if missing:
    raise Defect(
      "item",
      f"{where}: no key {missing[0]!r}; accepted: VideoRefer-Bench-{kind}, whose items have "
      f"{', '.join(BENCH_KEYS[kind])}",
    )
  path = item["video"]
  if not isinstance(path, str) or not path:
    raise Defect("media-key", f"{where}: key 'video': found {path!r}; accepted: one path")
  objects = parse_objects(item, where)
  _check_bench(item, kind, objects, where)
  check_text((item.get("id"), path, item.get("caption"), item.get("Question")), where)
  return Record(item.get("id", where), where, "video", path, (), objects, None)


def bench_kind(item: Mapping[str, Any]) -> str | None:
  """ "Q" or "D" for an item of VideoRefer-Bench, None for one of a training file."""
  if "conversations" in item:
    return None
  return "Q" if "Question" in item else "D" if "caption" in item and "frame_idx" in item else None


def _check_bench(item: Mapping[str, Any], kind: str, objects: Sequence, where: str) -> None:
  try:
    frame = int(item["frame_idx"])
  except (TypeError, ValueError):
    raise Defect(
      "bench",
      f"{where}: key 'frame_idx': found {item['frame_idx']!r}; accepted: a frame number",
    ) from None
  for i, by_frame in enumerate(objects):
    if frame not in by_frame:
      raise Defect(
        "bench",
        f"{where}: object {i} has no annotation on frame_idx {frame}; accepted: one of "
        f"{', '.join(map(str, by_frame))}",
      )
  if kind == "D":
    if not isinstance(item["caption"], str) or len(objects) != 1:
      raise Defect(
        "bench",
        f"{where}: found {len(objects)} objects; accepted: a caption of one object",
      )
    return
  regions = str(item["Question"]).count("<region>")
  if regions != len(objects):
    raise Defect(
      "region-count",
      f"{where}: found {regions} <region> in the question but {len(objects)} annotated objects; "
      "accepted: equal numbers, the i-th tag takes the i-th object",
    )
  options, answer = item["options"], item["Answer"]
  if not isinstance(options, list) or answer not in options:
    raise Defect("bench", f"{where}: Answer {answer!r} is none of the options {options!r}")


def check_masks(record: Record, size: tuple[int, int] | None, grid: int = 0) -> Iterator[Finding]:
  """Findings of a record's masks; `size` (height, width) is the media's, None if not known."""
  for i, by_frame in enumerate(record.objects):
    empty = broken = 0
    lost = []
    for number, segmentation in by_frame.items():
      spot = f"object {i}, frame {number}"
      try:
        stated, area = check_segmentation(segmentation)
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
    found, real = (f"{h}x{w}" for h, w in (record.size, media.size))
    yield Finding("size-differs", f"found height x width {found}; the media has {real}")


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


def _image(path: Path) -> Media:
  height, width = read_image(path).shape[:2]  # decodes all, as a broken end shows only then
  with open_image(path) as image:
    found = tuple(_of_mode(image))
  return Media(1, (height, width), found)


def _of_mode(image: Image.Image) -> Iterator[Finding]:
  if image.mode in ("LA", "PA", "RGBA", "RGBa", "La") or "transparency" in image.info:
    yield Finding("alpha", f"mode {image.mode}")
  if image.mode in ("1", "L", "LA", "La"):
    yield Finding("greyscale", f"mode {image.mode}")
  if (tag := image.getexif().get(ExifTags.Base.Orientation, 1)) != 1:
    yield Finding("orientation", f"tag {tag}")


def _video(path: Path) -> Media:
  video = open_video(path)
  found = []
  if video.claimed is not None and video.claimed != len(video):
    reason = f"the container claims {video.claimed} frames, a player shows {len(video)}"
    found.append(Finding("presented-count", reason))
  if video.variable_rate():
    found.append(Finding("variable-rate", f"{video.fps:.6g} frames per second on average"))
  if video.rotation:
    found.append(Finding("rotated", f"by {video.rotation} degrees"))
  height, width = video.size
  if video.kind == "video" and (height % 2 or width % 2):
    found.append(Finding("odd-size", f"{height}x{width} (height x width)"))
  if video.alpha:
    found.append(Finding("alpha", "a video with transparency"))
  if video.grey:
    found.append(Finding("greyscale", "a video without colour"))
  return Media(len(video), (int(height), int(width)), tuple(found))


def decode_needed(path: Path, record: Record, scene: int) -> None:
  """Decodes the frames that training takes of a video. Raises Defect."""
  try:
    video = open_video(path)
    of_masks = {n for by_frame in record.objects for n in by_frame}
    video.frames({n for n in scene_ids(video, scene) if n >= 0} | of_masks, lambda frame: frame[:1])
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
  """An item with what was found; `record` is None where it could not be parsed."""

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
  inspect = _cached_inspect()

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


def _cached_inspect() -> Callable[[Path, str], Media | Defect]:
  @functools.lru_cache(_MEDIA_HELD)
  def inspect(path: Path, kind: str) -> Media | Defect:
    try:
      return inspect_media(path, kind)
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
  identity = item.get("id", index) if isinstance(item, dict) else index
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
  found: list[Finding] = []
  media = None
  if record.media is not None:
    try:
      file = media_path(checks.media or "", record.path)
      if checks.media is not None:
        result = inspect(file, record.media)
        if isinstance(result, Defect):
          raise result
        media = result
        found += media.findings
    except Defect as error:
      found.append(finding(error))
  found += check_masks(record, media.size if media else None, checks.grid)
  if media is not None:
    found += check_frames(record, media)
    if checks.decode and record.media == "video" and not any(f.is_defect for f in found):
      try:
        decode_needed(media_path(checks.media, record.path), record, checks.scene)
      except Defect as error:
        found.append(finding(error))
  return Checked(index, span, identity, record, tuple(found))


# The report


@dataclass
class _Class:
  count: int = 0
  items: int = 0
  reason: str = ""
  ids: list = field(default_factory=list)


class Tally:
  """Counts of findings by class, with the first ids and the first reason of each."""

  def __init__(self):
    self._classes: dict[str, _Class] = {}

  def add(self, checked: Checked) -> None:
    """Counts the findings of one item."""
    for kind in dict.fromkeys(f.kind for f in checked.findings):
      own = self._classes.setdefault(kind, _Class())
      of_kind = [f for f in checked.findings if f.kind == kind]
      own.count += len(of_kind)
      own.items += 1
      own.reason = own.reason or of_kind[0].reason
      if len(own.ids) < SHOWN_IDS:
        own.ids.append(checked.id)

  def classes(self, defects: bool) -> dict[str, dict[str, Any]]:
    """{class: count, items, what it means, the first reason, the first ids}, most items first."""
    mine = {k: c for k, c in self._classes.items() if (k in DEFECTS) == defects}
    return {
      kind: {
        "count": c.count,
        "items": c.items,
        "what": KINDS[kind],
        "reason": c.reason,
        "ids": c.ids,
      }
      for kind, c in sorted(mine.items(), key=lambda pair: (-pair[1].items, pair[0]))
    }


def check(
  files: Sequence[Path | str],
  checks: Checks,
  *,
  jobs: int = 1,
  report: Path | str | None = None,
  fix: Path | str | None = None,
  progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
  """Checks annotation files; returns the summary that `vr data check --json` prints.

  Args:
    jobs: threads.
    report: a JSON file for the summary; beside it, `<report>.items.jsonl` lists every finding.
    fix: a folder for cleaned copies, `<name>` and `<name>.changes.jsonl` for each file: items with
      defects are mended where that loses no object (see `mend`) and left out otherwise.

  Raises:
    InputError: a file that is not there, or a copy that would overwrite a source.
  """
  files = [Path(f) for f in files]
  for file in files:
    if not file.is_file():
      raise InputError(f"{file}: found no such file; accepted: a JSON array of items")
  if checks.media is not None and not checks.media.is_dir():
    raise InputError(f"{checks.media}: no such folder of media")
  fix = None if fix is None else Path(fix)
  if fix is not None and any((fix / f.name).resolve() == f.resolve() for f in files):
    raise InputError(f"--fix {fix}: would write over a source; give another folder")
  if fix is not None and len({f.name for f in files}) < len(files):
    raise InputError(f"--fix {fix}: two of the files have one name; check them one by one")
  tally, done = Tally(), []
  findings_path = None if report is None else Path(f"{report}.items.jsonl")
  with open(findings_path or os.devnull, "w", encoding="utf-8") as findings:
    for file in files:
      items = good = kept = changed = 0
      with Cleaned(file, fix) as cleaned:
        for checked in check_file(file, checks, jobs):
          tally.add(checked)
          for found in checked.findings:
            line = {"file": str(file), "item": checked.index, "id": checked.id}
            line |= {"class": found.kind, "defect": checks.rejects(found), "reason": found.reason}
            findings.write(json.dumps(line) + "\n")
          if checked.span is None:
            continue
          items += 1
          good += not any(checks.rejects(f) for f in checked.findings)
          if fix is not None:
            outcome = cleaned.add(checked, checks)
            kept, changed = kept + (outcome != "dropped"), changed + (outcome == "mended")
          if items % 10_000 == 0:
            progress(f"{file}: {items} items, {items - good} with defects")
      line = {"file": str(file), "items": items, "good": good, "defective": items - good}
      if fix is not None:
        line |= {"fixed": str(fix / file.name), "kept": kept, "mended": changed}
      done.append(line)
      progress(f"{file}: {items} items, {items - good} with defects")
  summary = {
    "files": done,
    "items": sum(f["items"] for f in done),
    "good": sum(f["good"] for f in done),
    "defects": tally.classes(True),
    "notices": tally.classes(False),
    "rejected_notices": list(checks.reject),
    "media_checked": checks.media is not None,
  }
  if report is not None:
    summary["findings"] = str(findings_path)
    Path(report).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
  return summary


def found_defects(summary: Mapping[str, Any]) -> bool:
  """Whether `vr data check` exits with 2."""
  return bool(summary["defects"]) or any(
    k in summary["notices"] for k in summary["rejected_notices"]
  )


# Cleaned copies


class Cleaned:
  """Writes a file's cleaned copy and its list of changes; writes nothing where `folder` is None.

  Items without defects are copied byte for byte.
  """

  def __init__(self, source: Path, folder: Path | None):
    self._source, self._folder = source, folder
    self._between = "[\n"

  def __enter__(self) -> "Cleaned":
    if self._folder is not None:
      self._folder.mkdir(parents=True, exist_ok=True)
      self._part = self._folder / f"{self._source.name}.part"
      self._file = open(self._part, "wb")
      changes = self._folder / f"{self._source.name}.changes.jsonl"
      self._changes = open(changes, "w", encoding="utf-8")
    return self

  def add(self, checked: Checked, checks: Checks) -> str:
    """Writes an item or leaves it out: "kept", "mended" or "dropped"."""
    bad = [f for f in checked.findings if checks.rejects(f)]
    raw, changes = checked.span.raw, []
    if bad:
      raw, changes = mend(checked, bad)
    for change in changes:
      line = {"item": checked.index, "id": checked.id, **change}
      self._changes.write(json.dumps(line) + "\n")
    if raw is None:
      return "dropped"
    self._file.write(self._between.encode() + raw)
    self._between = ",\n"
    return "mended" if bad else "kept"

  def __exit__(self, kind, error, traceback) -> None:
    if self._folder is None:
      return
    self._file.write(b"\n]\n" if self._between != "[\n" else b"[]\n")
    self._file.close()
    self._changes.close()
    if kind is None:
      self._part.replace(self._folder / self._source.name)


def mend(checked: Checked, bad: Sequence[Finding]) -> tuple[bytes | None, list[dict[str, str]]]:
  """An item's bytes with its defects taken out, and the changes; None where it must go.

  A frame past the end is left out, and a mask that cannot be used becomes null, where the object
  is still seen in another frame. A repeated id gets the item's number behind it. Anything else
  would be guessing.
  """
  record, changes = checked.record, []
  curable = all(f.kind == "duplicate-id" or f.at is not None for f in bad)
  curable &= not any(f.kind == "vanishing" for f in bad)
  if record is None or not curable:
    return None, [{"class": f.kind, "change": "item left out", "reason": f.reason} for f in bad]
  objects = [dict(by_frame) for by_frame in record.objects]
  item = dict(checked.span.item)
  for f in bad:
    if f.at is None:
      item["id"] = f"{checked.id}#{checked.index}"
      change = f"id is now {item['id']!r}"
    elif f.kind == "frame-range":
      objects[f.at[0]].pop(f.at[1], None)
      change = "frame left out"
    else:
      if f.at[1] in objects[f.at[0]]:
        objects[f.at[0]][f.at[1]] = None
      change = "mask is now null"
    changes.append({"class": f.kind, "change": change, "reason": f.reason})
  if any(all(mask is None for mask in by_frame.values()) for by_frame in objects):
    reason = "an object would be left without a mask"
    return None, [
      {"class": f.kind, "change": f"item left out: {reason}", "reason": f.reason} for f in bad
    ]
  if any(f.at is not None for f in bad):
    item.pop("masks", None)
    item["annotation"] = [
      {str(number): {"segmentation": mask} for number, mask in by_frame.items()}
      for by_frame in objects
    ]
  return json.dumps(item, ensure_ascii=False).encode(), changes


def _printable(value: Any) -> str:
  return str(value).encode("utf-8", "backslashreplace").decode()


def table(summary: Mapping[str, Any]) -> Iterator[str]:
  """The summary as lines for a terminal."""
  for file in summary["files"]:
    yield f"{file['file']}: {file['items']} items, {file['defective']} with defects"
    if "fixed" in file:
      yield f"  -> {file['fixed']}: {file['kept']} items, {file['mended']} of them mended"
  for name in ("defects", "notices"):
    for kind, own in summary[name].items():
      ids = ", ".join(_printable(i) for i in itertools.islice(own["ids"], 5))
      more = ", ..." if own["items"] > 5 else ""
      yield f"{name[:-1]:<7} {kind:<17} {own['items']:>7} items  {own['what']}"
      yield f"{'':<7} ids {ids}{more}; first: {own['reason']}"
  if not summary["media_checked"]:
    yield "media were not opened; give --media DIR to check them"
