"""Training samples in the published VideoRefer-700K JSON and the variants of it that are about.

The SFT format of VideoRefer's successors is one of them: `masks`, `video` as a list, and a media
tag that may be left out.

One file is one JSON array of items (up to 5.6 GB), so items are read through an index of byte
ranges; nothing here ever holds a whole file.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipes.content import digest_of, digest_of_data, kept, kept_path
from data_pipes.errors import Defect, InputError, reading
from data_pipes.images import MAX_PIXELS
from data_pipes.json_items import check_text, parse_json, places, read_items, scan_items
from data_pipes.prompts import MEDIA_TAGS, ROLES, Turn, from_human, tag_to_head
from data_pipes.tokenizer import REGION
from data_pipes.video import Video

FRAME_DIGITS = 9  # of a frame number
INDEXED = 1 << 26  # bytes of a file from which on its index is kept on disk
# What COCO's tools put beside a mask; alone they would not say where the object is.
_BESIDE_A_MASK = ("size", "bbox", "area", "iscrowd", "score", "id", "image_id", "category_id")

BENCH_KEYS = {
  "D": ("video", "caption", "frame_idx", "annotation"),
  "Q": ("video", "Question", "options", "Answer", "frame_idx", "annotation"),
}


@dataclass(frozen=True)
class FrameList:
  """A scene given as picture files, as the SFT format of VideoRefer's successors allows.

  Attributes:
    files: the scene, relative to the media root.
    times: seconds, one a file.
    masked: pictures that masks lie on; as frames of the item they count on behind `files`.
  """

  files: tuple[str, ...]
  times: tuple[float, ...]
  masked: tuple[str, ...]


@dataclass(frozen=True)
class Record:
  """One dialogue about one video, one image or nothing.

  Attributes:
    where: file and item, for messages.
    media: "video", "image" or None (text only).
    path: the media file or folder as the item names it, relative to the media root; "" if none.
    turns: the dialogue as written.
    objects: per object {frame number: segmentation}, in the item's order of frames. Frames count in
      the source video; an image has frame 0 only. A segmentation is COCO RLE (compressed or not), a
      list of polygons, {"box": [x1, y1, x2, y2]}, or None for an object that is listed but not seen
      (an empty mask).
    size: (height, width) in pixels where the item gives both.
    stored: the media, where prepared shards hold it.
    frames: the media, where it is a list of pictures; `path` is the first of them.
  """

  id: str | int
  where: str
  media: str | None
  path: str
  turns: tuple[Turn, ...]
  objects: tuple[Mapping[int, Any], ...]
  size: tuple[int, int] | None
  stored: Video | None = None
  frames: FrameList | None = None

  @property
  def tag(self) -> str | None:
    """The media tag of the dialogue's text."""
    return MEDIA_TAGS[self.media] if self.media else None


def parse_record(item: Any, where: str) -> Record:
  """Reads one item of the JSON array.

  Args:
    item: the parsed JSON object.
    where: file and item number, put in front of messages.

  Raises:
    InputError: the item is not in the format; names the key, what was found and what is accepted.
  """
  if not isinstance(item, dict):
    raise Defect("item", f"{where}: found {_kind(item)}; accepted: an object with 'conversations'")
  where = f"{where} (id {item['id']!r})" if "id" in item else where
  if item.get("stream"):
    raise Defect("stream", f"{where}: found a streaming sample; accepted: key 'stream' unset")
  media, path, frames = _parse_media(item, where)
  turns = _parse_turns(item.get("conversations"), where)
  objects = parse_objects(item, where, media)
  if media and (item.get("masks") is not None or isinstance(item[media], list)):
    turns = _with_tag(turns, MEDIA_TAGS[media])
    objects = _one_each(objects, sum(turn.text.count(REGION) for turn in turns))
  if frames is not None:
    objects = _on_masked(objects, frames, where)
  _check_tag(turns, media, len(objects), where)
  size = _parse_size(item, where)
  check_text((item.get("id"), path, *(turn.text for turn in turns)), where)
  return Record(item.get("id", where), where, media, path, turns, objects, size, frames=frames)


@dataclass(frozen=True)
class BenchItem:
  """An item of VideoRefer-Bench: D asks for a description of one object, Q has options.

  Attributes:
    kind: "D" or "Q".
    video: the path of the file or folder, relative to the media root.
    objects: as in Record.
    frame: `frame_idx`, the frame of single-frame mode, counted in the source video.
    question, options: of Q; "" and () for D.
    truth: the right option of Q, the caption of D.
  """

  kind: str
  video: str
  objects: tuple[Mapping[int, Any], ...]
  frame: int
  question: str
  options: tuple[str, ...]
  truth: str


def parse_item(item: Any, where: str) -> Record:
  """An item of a training file, or of VideoRefer-Bench D or Q (a record without turns).

  Raises Defect.
  """
  kind = bench_kind(item) if isinstance(item, dict) else None
  if kind is None:
    return parse_record(item, where)
  where = f"{where} (id {item['id']!r})" if "id" in item else where
  bench = parse_bench(item, where, kind)
  _check_bench(bench, where)
  check_text((item.get("id"), bench.video, bench.truth, bench.question), where)
  return Record(item.get("id", where), where, "video", bench.video, (), bench.objects, None)


def bench_kind(item: Mapping[str, Any]) -> str | None:
  """ "Q" or "D" for an item of VideoRefer-Bench, None for one of a training file."""
  if "conversations" in item:
    return None
  return "Q" if "Question" in item else "D" if "caption" in item and "frame_idx" in item else None


def parse_bench(item: Mapping[str, Any], where: str, kind: str) -> BenchItem:
  """Reads an item of VideoRefer-Bench-`kind`; whether its parts fit together is not looked at.

  Raises Defect: a key is absent, or its value is of another type.
  """
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
  number = item["frame_idx"]
  with reading(f"{where}: key 'frame_idx': found {number!r}", "a frame number", "bench"):
    frame = int(number)
  if kind == "D":
    return BenchItem(kind, path, objects, frame, "", (), item["caption"])
  options, answer = item["options"], item["Answer"]
  if not isinstance(options, list):
    raise Defect("bench", f"{where}: Answer {answer!r} is none of the options {options!r}")
  return BenchItem(kind, path, objects, frame, str(item["Question"]), tuple(options), answer)


def _check_bench(bench: BenchItem, where: str) -> None:
  """Raises Defect where the parts of an item contradict each other."""
  for i, by_frame in enumerate(bench.objects):
    if bench.frame not in by_frame:
      raise Defect(
        "bench",
        f"{where}: object {i} has no annotation on frame_idx {bench.frame}; accepted: one of "
        f"{', '.join(map(str, by_frame))}",
      )
  count = len(bench.objects)
  if bench.kind == "D":
    if not isinstance(bench.truth, str) or count != 1:
      raise Defect("bench", f"{where}: found {count} objects; accepted: a caption of one object")
    return
  regions = bench.question.count(REGION)
  if regions != count:
    raise Defect(
      "region-count",
      f"{where}: found {regions} {REGION} in the question but {count} annotated objects; "
      "accepted: equal numbers, the i-th tag takes the i-th object",
    )
  if bench.truth not in bench.options:
    options = list(bench.options)
    raise Defect("bench", f"{where}: Answer {bench.truth!r} is none of the options {options!r}")


def parse_objects(item: Mapping[str, Any], where: str, media: str | None = "video") -> tuple:
  """The annotated objects of an item: a tuple of {frame number: segmentation or None}.

  Reads key `annotation` (`{frame: {"segmentation": S}}`, VideoRefer-700K and VideoRefer-Bench) or
  `masks` (`{frame: S}`, of an image S alone: the later trainers); either nesting under either key.
  A list nested one deeper is flattened, and
  `{frame_idx: {frame: ...}}`, as in the Ref-YouTube-VOS items, unwrapped.
  """
  keys = [key for key in ("annotation", "masks") if item.get(key) is not None]
  if len(keys) == 2:
    raise Defect("object", f"{where}: found keys 'annotation' and 'masks'; accepted: one of them")
  if not keys:
    return ()
  key = keys[0]
  entries = item[key]
  if media == "image" and key == "masks" and isinstance(entries, list):
    entries = [{"0": e} if _is_segmentation(e) else e for e in entries]
  if isinstance(entries, list) and entries and all(isinstance(e, list) for e in entries):
    entries = [e for inner in entries for e in inner]
  if not isinstance(entries, list):
    raise Defect(
      "object", f"{where}: key '{key}': found {_kind(entries)}; accepted: a list of objects"
    )
  return tuple(
    _parse_object(entry, f"{where}: key '{key}', object {i}", media)
    for i, entry in enumerate(entries)
  )


class Container(Sequence[Record]):
  """Samples in one file or folder, read at random: `container[i]` parses sample i alone.

  A new kind of container is a subclass in a file, and a line of data_pipes.containers.CONTAINERS.
  All methods may be called by several threads.
  """

  path: Path

  @classmethod
  @abstractmethod
  def reads(cls, path: Path) -> bool:
    """Whether `path` is such a container, by its name or what it is."""

  @abstractmethod
  def item(self, index: int) -> Any:
    """The parsed JSON of one sample, unchecked. Raises InputError: it is damaged."""

  def where(self, index: int) -> str:
    """How messages name a sample."""
    return f"{self.path}: item {index}"

  def __getitem__(self, index: int) -> Record:  # type: ignore[override]
    """Raises InputError: the sample is not in the format."""
    return parse_item(self.item(index), self.where(index))

  @classmethod
  def scan(cls, path: Path) -> Iterator[tuple[Any, str]]:
    """Each sample's parsed JSON and its name for messages, in order and in constant memory."""
    container = cls(path)  # type: ignore[call-arg]
    yield from ((container.item(i), container.where(i)) for i in range(len(container)))

  def check_model(self, image_size: int, aspect_ratio: str, scene: int) -> None:
    """Raises InputError if the samples hold frames that a model cannot use."""
    return


class RecordFile(Container):
  """Random access to the items of one JSON array; holds 16 bytes an item.

  Making one scans the file once; the index of a large file is kept, by its content.

  Raises:
    InputError: the file is absent, not JSON, no array, or ends early.
  """

  def __init__(self, path: str | Path):
    self.path = Path(path)
    large = self.path.is_file() and self.path.stat().st_size > INDEXED
    place = kept_path(f"index-{digest_of(digest_of_data(self.path))}.npz") if large else None
    self._spans = kept(place, self._index)["spans"]

  def _index(self) -> dict[str, np.ndarray]:
    spans = [(start, len(raw)) for start, raw, _ in places(self.path)]
    return {"spans": np.array(spans, np.int64).reshape(-1, 2)}

  @classmethod
  def reads(cls, path: Path) -> bool:
    return not path.is_dir()

  def __len__(self) -> int:
    return len(self._spans)

  def item(self, index: int) -> Any:
    start, length = (int(n) for n in self._spans[index])
    with open(self.path, "rb") as file:
      file.seek(start)
      return parse_json(file.read(length), self.where(index))

  @classmethod
  def scan(cls, path: Path) -> Iterator[tuple[Any, str]]:
    # In one pass, where the index of byte ranges would take one of its own.
    yield from ((span.item, f"{path}: item {i}") for i, span in enumerate(scan_items(path)))


def read_records(path: str | Path) -> Iterator[Record]:
  """As read_items, each item checked and made a Record."""
  for i, item in enumerate(read_items(path)):
    yield parse_record(item, f"{path}: item {i}")


def _parse_media(item: Mapping[str, Any], where: str) -> tuple[str | None, str, FrameList | None]:
  named = [kind for kind in MEDIA_TAGS if item.get(kind) is not None]
  if len(named) == 2:
    raise Defect(
      "media-key", f"{where}: found keys 'video' and 'image'; accepted: one of them, or neither"
    )
  if not named:
    return None, "", None
  path, frames = item[named[0]], None
  if named[0] == "video" and isinstance(path, list) and len(path) > 1:
    frames = _parse_frames(item, where)
    path = frames.files[0]
  if isinstance(path, list) and len(path) == 1:  # as VideoLLaMA 3 writes it
    (path,) = path
  if not isinstance(path, str) or not path:
    raise Defect("media-key", f"{where}: key '{named[0]}': found {_kind(path)}; accepted: one path")
  return named[0], path, frames


def _parse_frames(item: Mapping[str, Any], where: str) -> FrameList:
  """Keys `video`, `timestamps` and `masked_video` of a scene given as picture files."""
  lists: list[tuple] = []
  accepted = {"video": str, "timestamps": int | float, "masked_video": str}
  for key, type_ in accepted.items():
    value = [] if key == "masked_video" and item.get(key) is None else item.get(key)
    if not isinstance(value, list) or not all(isinstance(v, type_) and v != "" for v in value):
      kind = "times in seconds" if key == "timestamps" else "paths"
      raise Defect(
        "media-key",
        f"{where}: key '{key}': found {_kind(value)}; accepted: a list of {kind}, as "
        "'video' is a list of pictures",
      )
    lists.append(tuple(value))
  frames = FrameList(*lists)
  if len(frames.times) != len(frames.files):
    raise Defect(
      "media-key",
      f"{where}: key 'timestamps': found {len(frames.times)} for {len(frames.files)} pictures; "
      "accepted: equal numbers",
    )
  return frames


def _with_tag(turns: tuple[Turn, ...], tag: str) -> tuple[Turn, ...]:
  """The dialogue with the media tag in front, where it lacks one, as the later trainers do."""
  if any(tag in turn.text for turn in turns):
    return turns
  first = next(i for i, turn in enumerate(turns) if turn.role == "human")
  return (*turns[:first], Turn("human", f"{tag}\n{turns[first].text}"), *turns[first + 1 :])


def _one_each(objects: tuple, regions: int) -> tuple:
  """Objects with one frame each, where the text has a `<region>` for every (object, frame)."""
  pairs = tuple({number: mask} for by_frame in objects for number, mask in by_frame.items())
  return pairs if regions == len(pairs) != len(objects) else objects


def _on_masked(objects: tuple, frames: FrameList, where: str) -> tuple:
  """Frame numbers of masks, which stand for the masked pictures in order of their appearance."""
  numbers = list(dict.fromkeys(number for by_frame in objects for number in by_frame))
  if len(numbers) > len(frames.masked):
    raise Defect(
      "frame-range",
      f"{where}: key 'masked_video': found {len(frames.masked)} pictures for masks on "
      f"{len(numbers)} frames; accepted: one for each",
    )
  place = {number: len(frames.files) + i for i, number in enumerate(numbers)}
  return tuple({place[number]: mask for number, mask in o.items()} for o in objects)


def _parse_size(item: Mapping[str, Any], where: str) -> tuple[int, int] | None:
  height: Any = item.get("height")
  width: Any = item.get("width")
  if height is None and width is None:
    return None
  whole = type(height) is int and type(width) is int and min(height, width) > 0
  if not whole or height * width > MAX_PIXELS:
    raise Defect(
      "size",
      f"{where}: keys 'height', 'width': found {height!r}, {width!r}; accepted: two positive whole "
      f"numbers, at most {MAX_PIXELS} pixels, or neither key",
    )
  return height, width


def _parse_turns(value: Any, where: str) -> tuple[Turn, ...]:
  if not isinstance(value, list) or not value:
    kind = "nothing" if value is None else _kind(value)
    raise Defect(
      "conversations", f"{where}: key 'conversations': found {kind}; accepted: a list of messages"
    )
  for i, turn in enumerate(value):
    spot = f"{where}: key 'conversations', message {i}"
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
      raise Defect(
        "conversations", f"{spot}: found {_kind(turn)}; accepted: {{'from': ..., 'value': text}}"
      )
    if turn.get("from") not in list(ROLES):  # a list: what cannot be hashed is none of them
      raise Defect(
        "conversations", f"{spot}: key 'from': found {turn.get('from')!r}; accepted: human, gpt"
      )
  turns = tuple(Turn(turn["from"], turn["value"]) for turn in value)
  try:
    from_human(turns)
  except InputError as error:
    raise Defect("conversations", f"{where}: {error}") from None
  return turns


def _parse_object(entry: Any, where: str, media: str | None) -> Mapping[int, Any]:
  frames = object_frames(entry, where, media)
  for number, segmentation in frames.items():
    _check_form(segmentation, f"{where}, frame {number}")
  return frames


def object_frames(entry: Any, where: str, media: str | None) -> dict[int, Any]:
  """The frames of one annotated object: {frame number: segmentation}, as `Record.objects` has them.

  This is how training, checks and `vr ask` read an object. What the masks hold is not looked at.
  Raises Defect.
  """
  if isinstance(entry, dict) and len(entry) == 1:
    (inner,) = entry.values()
    if isinstance(inner, dict) and inner and all(str(key).isdecimal() for key in inner):
      entry = inner
  if not isinstance(entry, dict) or not entry:
    kind = "an object without frames" if entry == {} else _kind(entry)
    raise Defect("object", f"{where}: found {kind}; accepted: {{frame number: segmentation, ...}}")
  frames: dict[int, Any] = {}
  for key, value in entry.items():
    if not str(key).isdecimal() or len(str(key)) > FRAME_DIGITS:
      raise Defect(
        "frame-key", f'{where}: frame key: found {key!r}; accepted: a frame number such as "36"'
      )
    if int(key) in frames:
      raise Defect(
        "frame-key", f"{where}: two keys name one frame, {int(key)}; accepted: one for each frame"
      )
    frames[int(key)] = frame_segmentation(value, f"{where}, frame {key}")
  if media == "image":
    if len(frames) > 1:
      raise Defect(
        "frame-key", f"{where}: found {len(frames)} frames; accepted: one, as it is an image"
      )
    frames = {0: next(iter(frames.values()))}  # any key is a dummy
  return frames


def frame_segmentation(entry: Any, where: str) -> Any:
  """The segmentation in one frame's entry: S of {"segmentation": S}, or S itself.

  S may be {"box": [x1, y1, x2, y2]}. It is None where the object is not seen: null, {}, or run
  lengths with null counts. Raises Defect for a key that is not known: a misspelt one would read as
  "not seen".
  """
  for inside in (False, True):
    if not isinstance(entry, dict):
      return entry
    if "counts" in entry:
      return None if entry["counts"] is None else entry
    named = [key for key in ("segmentation", "box")[inside:] if key in entry]
    known = (*named, *_BESIDE_A_MASK) if named else ()
    unknown = sorted(str(key) for key in entry if key not in known)
    if unknown:
      raise Defect(
        "segmentation",
        f"{where}: key {unknown[0]!r}; accepted: segmentation, box, or size and counts",
      )
    if entry.get("segmentation") is None:
      return None if entry.get("box") is None else {"box": entry["box"]}
    entry = entry["segmentation"]
  return entry


def _check_form(segmentation: Any, where: str) -> None:
  if isinstance(segmentation, dict):
    rle = "size" in segmentation and isinstance(segmentation.get("counts"), str | list)
    known = rle or "box" in segmentation
  elif isinstance(segmentation, list):
    known = all(isinstance(polygon, list) for polygon in segmentation)
  else:
    known = segmentation is None
  if not known:
    keys = f" with keys {sorted(segmentation)}" if isinstance(segmentation, dict) else ""
    raise Defect(
      "segmentation",
      f"{where}: segmentation: found {_kind(segmentation)}{keys}; accepted: RLE {{'size': [height, "
      "width], 'counts': text or list}, a list of polygons [[x, y, ...], ...], or null",
    )


def _is_segmentation(value: Any) -> bool:
  """Whether an entry of an image's masks is run lengths or polygons by itself."""
  if isinstance(value, dict):
    return not {"counts", "box", "segmentation"}.isdisjoint(value)
  return (
    isinstance(value, list)
    and bool(value)
    and all(
      isinstance(polygon, list) and all(isinstance(n, int | float) for n in polygon)
      for polygon in value
    )
  )


def _check_tag(turns: tuple[Turn, ...], media: str | None, objects: int, where: str) -> None:
  """One tag for the media, and as many `<region>` after it as objects."""
  tag = MEDIA_TAGS[media] if media else None
  texts = [t.text for t in from_human(tag_to_head(turns, tag))]
  if tag is None:
    stray = next((t for t in MEDIA_TAGS.values() for text in texts if t in text), None)
    if stray or objects:
      content = f"{stray} in the text" if stray else f"{objects} annotated objects"
      raise Defect(
        "media-tag", f"{where}: found {content} but no media; accepted: a key 'video' or 'image'"
      )
    return
  tags = sum(text.count(tag) for text in texts)
  if tags != 1:
    raise Defect(
      "media-tag",
      f"{where}: key 'conversations': found {tags or 'no'} messages with {tag} although key "
      f"'{media}' is given; accepted: exactly one",
    )
  # A <region> before the tag stays an ordinary word (model_spec section 7).
  regions = "\n".join(texts).partition(tag)[2].count(REGION)
  if regions != objects:
    raise Defect(
      "region-count",
      f"{where}: found {regions} {REGION} after {tag} but {objects} annotated objects; accepted: "
      "equal numbers, the i-th tag takes the i-th object",
    )


def _kind(value: Any) -> str:
  names = {dict: "an object", list: "a list", str: "text", type(None): "null", bool: "a boolean"}
  return names.get(type(value), "a number")
