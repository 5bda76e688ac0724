"""`vr data prepare`: annotation files and media to ArrayRecord shards (the format: shards.py).

Stage `index`, a task for each annotation file: checks every item and notes where it lies and which
shard it goes to (all items of one clip go to one). Stage `shards`: each task decodes its clips once
and writes its frames and samples. Stage `manifest` adds up.
"""

import functools
import hashlib
import io
import json
import os
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from data_pipes import isolation
from data_pipes.check import (
  Checks,
  Finding,
  check_file,
  check_frames,
  check_masks,
  inspect_media,
  isolated,
)
from data_pipes.clips import media_path
from data_pipes.errors import Defect, InputError
from data_pipes.files import is_unused, refused_if_full, replaced, write_text
from data_pipes.images import ASPECT_RATIOS, read_image, to_model
from data_pipes.jobs import Journal
from data_pipes.navit_frames import TRAINING_FRAMES, scene_frames
from data_pipes.records import Record, parse_item
from data_pipes.shards import FRAME_OPTIONS, MANIFEST, SAMPLE_OPTIONS, shard_name
from data_pipes.video import open_video, scene_ids

SETTINGS = "settings.json"
JOURNALS = "journals"  # of shards in work; NUMBER.source and .media: what files and shards were
REJECTS, NOTICES = "rejects.jsonl", "notices.jsonl"


@dataclass(frozen=True)
class Settings:
  """Everything that decides the bytes of the shards.

  Attributes:
    files: annotation files.
    media: the folder that their media are relative to.
    shards: how many.
    scene: numbers of scene frames that the shards must serve, by the uniform rule.
    scene_fps: frames a second of scenes that they must serve too, at most TRAINING_FRAMES, by the
      rule of VideoRefer's successors (`navit_frames`), which need size 0; 0 for none.
    size: side of the stored frames, pixels, resized as for the vision tower; 0: as in the source.
    aspect_ratio: "square" or "pad", before resizing.
    format: "jpeg" (`quality`, no chroma subsampling) or "png", which loses nothing.
    reject: classes of notices (data_pipes.check.NOTICES) whose items are left out too.
  """

  files: tuple[str, ...] = field(
    default=(),
    metadata={"positional": True, "help": "a JSON array of items", "metavar": "FILE"},
  )
  media: str = field(
    default=".", metadata={"help": "the media are relative to DIR", "metavar": "DIR"}
  )
  shards: int = field(default=16, metadata={"help": "default: %(default)s", "metavar": "N"})
  scene: tuple[int, ...] = field(
    default=(16,), metadata={"flag": "--scene-frames", "help": "default: 16", "metavar": "N"}
  )
  scene_fps: float = field(
    default=0.0, metadata={"help": "also frames of VideoRefer's successors", "metavar": "FPS"}
  )
  size: int = field(
    default=384, metadata={"help": "of stored frames, 0: the source's (default: %(default)s)"}
  )
  aspect_ratio: str = field(default="square", metadata={"help": "square (default) or pad"})
  format: str = field(default="jpeg", metadata={"help": "jpeg (default), or png, which is exact"})
  quality: int = field(default=95, metadata={"help": "of jpeg (default: %(default)s)"})
  reject: tuple[str, ...] = field(
    default=(), metadata={"help": "see vr data check", "metavar": "NOTICE"}
  )

  def __post_init__(self):
    for name, accepted in (("aspect_ratio", ASPECT_RATIOS), ("format", ("jpeg", "png"))):
      if getattr(self, name) not in accepted:
        raise InputError(f"{name}={getattr(self, name)!r}; accepted: {', '.join(accepted)}")
    if self.shards < 1 or self.size < 0 or not 1 <= self.quality <= 100 or min(self.scene) < 1:
      raise InputError(
        f"shards={self.shards}, size={self.size}, quality={self.quality}, scene={self.scene}; "
        "accepted: shards and scene of at least 1, size of at least 0, quality from 1 to 100"
      )
    if not 0 <= self.scene_fps < float("inf") or (self.scene_fps and self.size):
      raise InputError(
        f"scene_fps={self.scene_fps}, size={self.size}; accepted: scene_fps of 0, or more with "
        "size 0"
      )
    for file in self.files:
      if not Path(file).is_file():
        raise InputError(f"{file}: found no such file; accepted: a JSON array of items")
    if not Path(self.media).is_dir():
      raise InputError(f"{self.media}: no such folder of media")
    Checks(reject=self.reject)

  @property
  def rule(self) -> dict[str, Any]:
    """How frames were chosen and stored, written beside them."""
    more = {"scene_fps": self.scene_fps} if self.scene_fps else {}
    return more | {
      "scene": list(self.scene),
      "scene_rule": "uniform",
      "size": self.size,
      "aspect_ratio": self.aspect_ratio,
      "resize": "pillow bicubic",
      "format": self.format,
      "quality": self.quality if self.format == "jpeg" else None,
    }


@dataclass(frozen=True)
class Prepare:
  """The job (data_pipes.jobs.Job) that fills folder `out`.

  `item_seconds`: that the decoders may take for a clip, which is rejected then.
  """

  out: Path
  settings: Settings
  item_seconds: float = isolation.SECONDS
  stages: tuple[str, ...] = field(default=("index", "shards", "manifest"), init=False)

  def __post_init__(self):
    isolation.check_seconds(self.item_seconds)

  @classmethod
  def start(
    cls, out: Path | str, settings: Settings, item_seconds: float = isolation.SECONDS
  ) -> "Prepare":
    """Begins in an empty folder, or goes on in one that was begun with the same settings."""
    job = cls(Path(out), settings, item_seconds)
    fields = json.loads(json.dumps(asdict(settings)))
    path = job.out / SETTINGS
    if path.exists():
      # A folder of an earlier version lacks what came later, and had its default.
      before = json.loads(json.dumps(asdict(Settings()))) | json.loads(path.read_text())
      changed = [k for k in fields if before[k] != fields[k]]
      if changed:
        listed = "; ".join(f"{k} was {before.get(k)!r}, is {fields[k]!r}" for k in changed)
        raise InputError(f"{out} was begun with other settings: {listed}; use another folder")
    elif not is_unused(job.out):
      raise InputError(f"{out} is not empty and holds no {SETTINGS}; use another folder")
    else:
      with refused_if_full(path), replaced(path) as part:
        part.write_text(json.dumps(_fields(settings), indent=2) + "\n")
    return job

  @classmethod
  def resume(cls, out: Path | str, item_seconds: float = isolation.SECONDS) -> "Prepare":
    """The job that a folder was begun with."""
    path = Path(out) / SETTINGS
    if not path.is_file():
      raise InputError(f"{path}: no such file; begin with vr data prepare FILES --media DIR --out")
    fields = json.loads(path.read_text())
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    return cls(Path(out), Settings(**fields), item_seconds)

  def shards(self, stage: str) -> int:
    return {"index": len(self.settings.files), "shards": self.settings.shards, "manifest": 1}[stage]

  def output(self, stage: str, shard: int) -> Path:
    """The file whose presence says that a task is done."""
    names = {"index": f"index/{shard:05d}.jsonl", "shards": f"shards/{shard:05d}.json"}
    return self.out / names.get(stage, MANIFEST)

  def done(self, stage: str, shard: int) -> bool:
    return self.output(stage, shard).exists()

  def command(self, stage: str, shard: int) -> str:
    seconds = self.item_seconds
    more = f" --item-seconds {seconds:g}" if seconds != isolation.SECONDS else ""
    return f"vr data prepare --out {shlex.quote(str(self.out))}{more} --task {stage} {shard}"

  def split(self, workers: int) -> "list[Prepare]":
    return [self] * workers

  def run(self, stage: str, shard: int) -> None:
    if stage not in self.stages or not 0 <= shard < self.shards(stage):
      known = ", ".join(f"{s} 0..{self.shards(s) - 1}" for s in self.stages)
      raise InputError(f"task {stage} {shard}; accepted: {known}")
    if self.done(stage, shard):
      return
    before = self.stages[: self.stages.index(stage)]
    missing = [f"{s} {k}" for s in before for k in range(self.shards(s)) if not self.done(s, k)]
    if missing:
      raise InputError(f"task {stage} {shard}: {missing[0]} has to be done first")
    with refused_if_full(self.out):
      {"index": self._index, "shards": self._shard, "manifest": self._manifest}[stage](shard)

  # What lies outside may have changed while the job was stopped

  def check_sources(self) -> None:
    """Checks all that was read so far.

    Raises:
      InputError: an annotation file or a media file is not the one that was read.
    """
    self._check_annotations()
    for path in sorted((self.out / JOURNALS).glob("*.media")):
      self._check_media(json.loads(path.read_text()))

  def _check_annotations(self) -> None:
    for number, path in enumerate(self.settings.files):
      if not self.done("index", number):
        continue
      with open(self.output("index", number)) as lines:
        before = {"bytes": json.loads(next(lines))["bytes"]}
      if (more := self._source(number)).exists():  # not of an earlier version
        before |= json.loads(more.read_text())
      now = _identify_file(path)
      if any(now[key] != value for key, value in before.items()):
        raise InputError(
          f"{path}: was changed since its items were indexed in {self.out}; accepted: the file as "
          "it was, or another --out"
        )

  def _source(self, number: int) -> Path:
    """What tells later whether annotation file `number` is the same."""
    return self.out / JOURNALS / f"{number:05d}.source"

  def _check_media(self, before: Iterable[Mapping[str, Any]]) -> None:
    for media in before:
      file = Path(self.settings.media) / media["path"]
      if _stat(file) != media["stat"] and _hash_media(file) != media["hash"]:
        raise InputError(
          f"{file}: was changed since it was prepared in {self.out}; accepted: the file as it was, "
          "or another --out"
        )

  # Stage index

  def _index(self, number: int) -> None:
    """Lines: the file; then [shard, item, offset, length, media, path] or a reject."""
    path = self.settings.files[number]
    # Shards hold a clip a file.
    checks = Checks(reject=(*self.settings.reject, "frame-list"))
    source = _identify_file(path)
    write_text(self._source(number), json.dumps(source))
    with replaced(self.output("index", number)) as part, open(part, "w") as out:
      out.write(json.dumps({"file": path, "bytes": source["bytes"]}) + "\n")
      for checked in check_file(path, checks):
        i, span, record = checked.index, checked.span, checked.record
        if span is None:  # a broken download: its first half must not pass for the whole
          raise InputError(f"{path}: {checked.findings[0].reason}")
        if rejected := _rejected(checked.findings, checks):
          line = {"item": i, "id": checked.id, "media": record.path if record else None}
          out.write(json.dumps(line | rejected) + "\n")
          continue
        assert record is not None  # or there were a defect
        text = record.path or f"{number}:{i}"
        code = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        shard = int.from_bytes(code, "big") % self.settings.shards
        place = [shard, i, span.offset, len(span.raw), record.media, record.path]
        out.write(json.dumps(place) + "\n")

  def _entries(self, shard: int) -> dict[str, list[tuple[int, int, int, int]]]:
    """{media and path: [(file, item, offset, length)]} of a shard; each text by itself."""
    groups: dict[str, list] = {}
    for number in range(len(self.settings.files)):
      with open(self.output("index", number)) as lines:
        next(lines)
        for line in lines:
          if line[0] == "[" and (entry := json.loads(line))[0] == shard:
            _, item, offset, length, media, path = entry
            key = f"{media} {path}" if media else f"text {number}:{item}"
            groups.setdefault(key, []).append((number, item, offset, length))
    return groups

  # Stage shards

  def _shard(self, shard: int) -> None:
    self._check_annotations()
    groups = self._entries(shard)
    # No suffix that names a shard: what is not committed must not look like one.
    with Journal(self.out / JOURNALS / f"{shard:05d}") as journal:
      self._check_media(filter(None, (_head(journal[key]).get("media") for key in journal)))
      for key, entries in groups.items():
        if key not in journal:
          journal.add(key, self._clip(entries))
      self._commit(shard, groups, journal)
      journal.close(delete=True)

  def _clip(self, entries: list[tuple[int, int, int, int]]) -> bytes:
    """One clip with its samples: a line of JSON, then the frames."""
    media = self._identify(self._read(*entries[0])[1])
    if media is None:
      return self._decode_clip(entries, None)
    where = Path(self.settings.media) / media["path"]
    try:
      call = (self._decode_clip, entries, media)
      return isolated("media-damaged", where, self.item_seconds, *call)
    except Defect as error:
      findings = [[Finding(error.kind, str(error))]] * len(entries)
      return self._pack(self._items(entries), media, None, [], findings)
    except Exception:
      self._check_annotations()  # what was read may have been the middle of something else
      raise

  def _identify(self, record: Record) -> dict[str, Any] | None:
    """What tells later whether a record's media is the same; None for text."""
    try:
      file = media_path(self.settings.media, record.path)
    except Defect:
      return None
    if record.media is None:
      return None
    return {"path": record.path, "stat": _stat(file), "hash": _hash_media(file)}

  def _decode_clip(
    self, entries: list[tuple[int, int, int, int]], media: Mapping[str, Any] | None
  ) -> bytes:
    items = self._items(entries)
    checks = Checks(reject=self.settings.reject)
    try:
      clip, frames, findings = self._decode([record for *_, record in items], checks, media)
    except Defect as error:
      clip, frames, findings = None, [], [[Finding(error.kind, str(error))]] * len(entries)
    return self._pack(items, media, clip, frames, findings)

  def _pack(
    self,
    items: list[tuple[int, int, str, Record]],
    media: Mapping[str, Any] | None,
    clip: Mapping[str, Any] | None,
    frames: list[bytes],
    findings: list[list[Finding]],
  ) -> bytes:
    """The row of a clip: a line of JSON about it, its samples, rejects and notices; its frames."""
    samples: list[dict[str, Any]] = []
    rejects: list[dict[str, Any]] = []
    notices: list[dict[str, Any]] = []
    checks = Checks(reject=self.settings.reject)
    for (number, index, text, record), noted in zip(items, findings, strict=True):
      at = {"file": number, "item": index}
      named = {**at, "id": record.id, "media": record.path}
      if rejected := _rejected(noted, checks):
        rejects.append(named | rejected)
      else:
        samples.append({**at, "text": text})
        notices += [named | {"class": f.kind, "reason": f.reason} for f in noted]
    head = {"clip": clip, "sizes": [len(f) for f in frames], "samples": samples}
    head |= {"rejects": rejects, "notices": notices, "media": media}
    return json.dumps(head).encode() + b"\n" + b"".join(frames)

  def _items(self, entries: list[tuple[int, int, int, int]]) -> list[tuple[int, int, str, Record]]:
    """(file, item, text, record) of each entry."""
    return [(*entry[:2], *self._read(*entry)) for entry in entries]

  def _read(self, number: int, index: int, offset: int, length: int) -> tuple[str, Record]:
    path = self.settings.files[number]
    with open(path, "rb") as file:
      file.seek(offset)
      text = file.read(length).decode()
    return text, parse_item(json.loads(text), f"{path}: item {index}")

  def _decode(
    self, records: list[Record], checks: Checks, identity: Mapping[str, Any] | None
  ) -> tuple[dict[str, Any] | None, list[bytes], list[list[Finding]]]:
    """(clip, frames, the findings of each record). Raises Defect if the media is bad."""
    path, kind = records[0].path, records[0].media
    if kind is None:
      return None, [], [[] for _ in records]
    file = media_path(self.settings.media, path)
    assert identity is not None  # or the path were refused
    media = inspect_media(file, kind)
    findings = [
      [*media.findings, *check_masks(r, media.size), *check_frames(r, media)] for r in records
    ]
    good = [r for r, noted in zip(records, findings, strict=True) if not _rejected(noted, checks)]
    if not good:
      return None, [], findings
    clip: dict[str, Any] = {"path": path, "kind": "image", "frames": [0], "size": list(media.size)}
    try:
      if kind == "image":
        frames = [self._encode(read_image(file))]
      else:
        video = open_video(file)
        needed = {n for count in self.settings.scene for n in scene_ids(video, count) if n >= 0}
        if fps := self.settings.scene_fps:
          needed |= set(scene_frames(video, fps, TRAINING_FRAMES, rule="ids").ids)
        needed |= {n for r in good for by_frame in r.objects for n in by_frame}
        numbers = sorted(int(n) for n in needed)
        frames = video.frames(numbers, self._encode)  # type: ignore[arg-type, assignment]
        clip |= {"kind": video.kind, "frames": numbers, "count": len(video), "fps": video.fps}
        clip |= {"claimed": video.claimed, "rotation": video.rotation}
        if times := video.pts(numbers):
          clip |= {"pts": times[0], "time_base": str(times[1])}
    except (InputError, OSError) as error:
      raise Defect("media-damaged", str(error)) from error
    clip |= {"index_space": "presented", "rule": self.settings.rule, "source": identity["hash"]}
    return clip, frames, findings

  def _encode(self, frame) -> bytes:
    if self.settings.size:
      frame = to_model(frame, self.settings.size, self.settings.aspect_ratio)
    file = io.BytesIO()
    if self.settings.format == "jpeg":
      Image.fromarray(frame).save(file, "JPEG", quality=self.settings.quality, subsampling=0)
    else:
      Image.fromarray(frame).save(file, "PNG", compress_level=1)
    return file.getvalue()

  def _commit(self, shard: int, groups: Iterable[str], journal: Journal) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    self._check_annotations()
    names = {kind: shard_name(kind, shard, self.settings.shards) for kind in ("frames", "samples")}
    counts: Counter[str] = Counter()
    rejects, notices, media = [], [], []
    with replaced(self.out / names["frames"]) as a, replaced(self.out / names["samples"]) as b:
      frame_writer = ArrayRecordWriter(str(a), FRAME_OPTIONS)
      sample_writer = ArrayRecordWriter(str(b), SAMPLE_OPTIONS)
      for key in groups:
        line, _, blobs = journal[key].partition(b"\n")
        head = json.loads(line)
        media += [head["media"]] if head.get("media") else []
        rejects += head["rejects"]
        notices += head["notices"]
        clip = head["clip"] and {**head["clip"], "first": counts["frames"]}
        for sample in head["samples"]:
          # The item stands as it was written; text in front of it makes the whole one JSON object.
          front = {k: sample[k] for k in ("file", "item")} | {"clip": clip}
          text = json.dumps(front)[:-1] + ', "record": ' + sample["text"] + "}"
          sample_writer.write(text.encode())
        at = 0
        for size in head["sizes"]:
          frame_writer.write(blobs[at : at + size])
          at += size
        counts["frames"] += len(head["sizes"])
        counts["clips"] += bool(clip)
        counts["samples"] += len(head["samples"])
        counts["frame_bytes"] += at
      frame_writer.close()
      sample_writer.close()
    write_text(self.out / JOURNALS / f"{shard:05d}.media", json.dumps(media))
    files = {name: _hash_file(self.out / name) for name in names.values()}
    with replaced(self.output("shards", shard)) as part:
      lists = {"files": files, "rejects": rejects, "notices": notices}
      part.write_text(json.dumps({**counts, **lists}) + "\n")

  # Stage manifest

  def _manifest(self, _: int) -> None:
    """Counts and checksums of all shards; rejects and notices one by one in files of their own."""
    totals: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    notices: Counter[str] = Counter()
    checksums: dict[str, str] = {}
    samples_of_shards = []
    with (
      replaced(self.out / REJECTS) as rejects_part,
      replaced(self.out / NOTICES) as notices_part,
      open(rejects_part, "w") as out,
      open(notices_part, "w") as noted,
    ):

      def reject(line: Mapping[str, Any]) -> None:
        reasons[line["class"]] += 1
        out.write(json.dumps(line) + "\n")

      for number in range(len(self.settings.files)):
        with open(self.output("index", number)) as lines:
          next(lines)
          for line in lines:
            totals["items"] += 1
            if line[0] == "{":
              reject({"file": number} | json.loads(line))
      for shard in range(self.settings.shards):
        counts = json.loads(self.output("shards", shard).read_text())
        for line in counts.pop("rejects"):
          reject(line)
        for line in counts.pop("notices"):
          notices[line["class"]] += 1
          noted.write(json.dumps(line) + "\n")
        checksums |= counts.pop("files")
        samples_of_shards.append(counts.get("samples", 0))
        totals.update(counts)
    manifest = {
      "format": 1,
      "settings": _fields(self.settings),
      "items": totals["items"],
      "samples": totals["samples"],
      "clips": totals["clips"],
      "frames": totals["frames"],
      "frame_bytes": totals["frame_bytes"],
      "rejected": sum(reasons.values()),
      "rejects": dict(sorted(reasons.items())),
      "notices": dict(sorted(notices.items())),
      "samples_of_shards": samples_of_shards,
      "checksums": checksums,
    }
    for part in self.out.rglob("*.part"):
      part.unlink()  # a kill of an earlier version left it
    with replaced(self.output("manifest", 0)) as part:
      part.write_text(json.dumps(manifest, indent=2) + "\n")
    for path in (self.out / JOURNALS).glob("*.[ms]*"):
      path.unlink()  # the folder is complete: nothing is gone on with


def _fields(settings: Settings) -> dict[str, Any]:
  """The settings as a folder holds them.

  Without the successors' rate where it is not used: such folders are as they ever were.
  """
  return {k: v for k, v in asdict(settings).items() if k != "scene_fps" or v}


def summary(manifest: Mapping[str, Any], out: Path) -> str:
  """The manifest as lines for a terminal."""
  lines = [
    f"{out}: {manifest['samples']} samples of {manifest['clips']} clips, {manifest['frames']} "
    f"frames ({manifest['frame_bytes'] / 1e6:.1f} MB), {len(manifest['samples_of_shards'])} shards"
  ]
  if manifest["rejected"]:
    lines.append(f"{manifest['rejected']} of {manifest['items']} rejected, see {out / REJECTS}")
    lines += [f"  {kind:<17} {count:>7}" for kind, count in manifest["rejects"].items()]
  if manifest["notices"]:
    lines.append(f"{sum(manifest['notices'].values())} notices of samples, see {out / NOTICES}")
    lines += [f"  {kind:<17} {count:>7}" for kind, count in manifest["notices"].items()]
  return "\n".join(lines)


def _rejected(findings: Iterable[Finding], checks: Checks) -> dict[str, str] | None:
  """The class and reason of the first finding that rejects an item."""
  first = next((f for f in findings if checks.rejects(f)), None)
  return None if first is None else {"class": first.kind, "reason": first.reason}


def _head(row: bytes) -> dict[str, Any]:
  return json.loads(row.partition(b"\n")[0])


def _identify_file(path: Path | str) -> dict[str, Any]:
  """Size and digest of an annotation file's bytes. Raises InputError: it cannot be read."""
  try:
    stat = Path(path).stat()
    return {"bytes": stat.st_size, "digest": _digest(str(path), stat.st_size, stat.st_mtime_ns)}
  except OSError as error:
    raise InputError(f"{path}: cannot be read ({error.strerror})") from None


@functools.lru_cache
def _digest(path: str, size: int, time_ns: int) -> str:
  """Of a file of this size and time: read once."""
  return _hash_file(Path(path))


def _stat(path: Path) -> list[int] | None:
  """Files, bytes and latest change of a media file or folder; None where there is none."""
  try:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    stats = [file.stat() for file in files]
  except OSError:
    return None
  return [len(stats), sum(s.st_size for s in stats), max((s.st_mtime_ns for s in stats), default=0)]


def _hash_media(path: Path) -> str | None:
  """blake2b of a media file; of a folder, of its files' names and bytes in order; None: absent."""
  try:
    if not path.is_dir():
      return _hash_file(path)
    code = hashlib.blake2b(digest_size=16)
    for file in sorted(p for p in path.iterdir() if p.is_file()):
      code.update(os.fsencode(file.name) + f"\0{_hash_file(file)}\0".encode())
    return code.hexdigest()
  except OSError:
    return None


def _hash_file(path: Path) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
