"""Label Studio: the JSON export, with brushes, rectangles, polygons, ellipses, video rectangles."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipes.errors import InputError, reading
from data_pipes.importers.marked import (
  Left,
  Marked,
  Media,
  Text,
  box_segmentation,
  ellipse,
  turned,
  usable,
)
from data_pipes.importers.parts import Source, checked, number, part, size_of
from data_pipes.masks import encode_mask
from data_pipes.video import Video, open_video

MOST_FRAMES = 1_000_000  # of a video rectangle
_ORIGINAL = ("original_height", "original_width")


def read(source: Source, left: Left) -> Iterator[Media]:
  """A task each, its first annotation that was not cancelled.

  A text that belongs to a region is about that object, any other about the whole medium. Video
  rectangles go evenly from keyframe to keyframe, until one is switched off.
  """
  path = str(source.path)
  for i, task in enumerate(checked(source.json(), list, path)):
    where = f"{path}: task {task.get('id', i) if isinstance(task, dict) else i}"
    if isinstance(task, dict) and "annotations" not in task and "completions" in task:
      task = task | {"annotations": task["completions"]}
    annotations = part(task, "annotations", list, where)
    for one in annotations:
      checked(one, dict, f"{where}: key 'annotations'")
    valid = [one for one in annotations if not one.get("was_cancelled")]
    for _ in range(len(annotations) - len(valid)):
      left.add("cancelled annotations", where)
    for _ in valid[1:]:
      left.add("further annotations of a task", where)
    if valid:
      yield _media(task, part(valid[0], "result", list, where), source, where, left)


def _media(
  task: Mapping[str, Any], results: Sequence[Any], source: Source, where: str, left: Left
) -> Media:
  data = part(task, "data", dict, where)
  for result in results:
    checked(result, dict, where)
  video = any(result.get("type") == "videorectangle" for result in results)
  keys = [part(result, "to_name", str, where, "") for result in results]
  keys += ["video"] if video else ["image", "video"]
  name = next((key for key in (*keys, *data) if data.get(key) and isinstance(data[key], str)), None)
  if name is None:
    raise InputError(f"{where}: key 'data' names no media")
  kind = "video" if video or name.startswith("video") else "image"
  path = source.located(data[name])
  media = Media(kind, path, None, [], keys=(str(task.get("id")),))
  opened = None
  if kind == "video" and (source.media / path).exists():
    opened = open_video(source.media / path)
    media.size = opened.size
  _read_results(media, opened, results, where, left)
  return media


def _read_results(
  media: Media, video: Video | None, results: Sequence[Any], where: str, left: Left
) -> None:
  objects: dict[str, Marked] = {}
  texts: list[tuple[str, str]] = []
  for k, result in enumerate(results):
    place = f"{where}: result {k}"
    kind = part(result, "type", str, place, "")
    value = part(result, "value", dict, place, {})
    key = str(result.get("id", k))
    if kind == "textarea":
      entries = value.get("text")
      for text in entries if isinstance(entries, list) else [entries]:
        texts.append((key, checked(text, str, place)))
      continue
    marked = objects.setdefault(key, Marked("", (key,)))
    marked.name = marked.name or _label(value, kind, place)
    if kind in ("labels", "videolabels") and "labels" in value:
      continue  # the name of a shape with the same id
    if number(result, "image_rotation", place, 0.0) % 360:
      left.add("marks on turned pictures", place)
    elif kind == "videorectangle":
      marked.masks |= _track(value, video, place, left)
    elif (shape := kind.removesuffix("labels")) in _SHAPES:
      size = size_of(result, place, _ORIGINAL)
      media.size = media.size or size
      mask = usable(_SHAPES[shape](value, size, place, left), size, place, left)
      if mask is not None:
        marked.masks[0] = mask
    else:
      left.add(f"results of type {kind!r}", place)
      if not marked.masks:
        del objects[key]
  media.objects = list(objects.values())
  media.texts = [Text(text, (key,) if key in objects else ()) for key, text in texts]


def _label(value: Mapping[str, Any], kind: str, where: str) -> str:
  labels = part(value, kind, list, where, []) or part(value, "labels", list, where, [])
  return " ".join(label for label in labels if isinstance(label, str))


def _box(value: Any, size: tuple[int, int] | None, where: str, left: Left) -> Any:
  x, y, w, h = (number(value, key, where) for key in ("x", "y", "width", "height"))
  turn = number(value, "rotation", where, 0.0) % 360  # about the upper left corner
  if size is None:  # our boxes may be shares too
    corners = [min(100.0, max(0.0, v)) for v in (x, y, x + w, y + h)]
    if turn or corners[0] >= corners[2] or corners[1] >= corners[3]:
      left.add("turned and empty boxes on media of unknown size (give --media DIR)", where)
      return None
    return {"box": [f"{v:.6g}%" for v in corners]}
  x1, x2, y1, y2 = (v / 100 * side for side, v in
                    ((size[1], x), (size[1], x + w), (size[0], y), (size[0], y + h)))  # fmt: skip
  if turn:
    return [turned([(x1, y1), (x2, y1), (x2, y2), (x1, y2)], (x1, y1), turn)]
  return box_segmentation([round(v, 3) for v in (x1, y1, x2, y2)], size, where, left)


def _polygon(value: Any, size: tuple[int, int], where: str, left: Left) -> Any:
  corners: list[float] = []
  for point in part(value, "points", list, where):
    xy = dict(zip("xy", checked(point, list, where), strict=False))
    corners += [number(xy, "x", where) / 100 * size[1], number(xy, "y", where) / 100 * size[0]]
  return [corners]


def _ellipse(value: Any, size: tuple[int, int], where: str, left: Left) -> Any:
  x, rx = (number(value, key, where) / 100 * size[1] for key in ("x", "radiusX"))
  y, ry = (number(value, key, where) / 100 * size[0] for key in ("y", "radiusY"))
  return [ellipse((x, y), (rx, ry), number(value, "rotation", where, 0.0))]


def _brush(value: Any, size: tuple[int, int], where: str, left: Left) -> Any:
  codes = part(value, "rle", list, where)
  try:
    with reading(f"{where}: run lengths"):
      data = bytes(codes)
    pixels = decode_brush(data, 4 * size[0] * size[1])
  except InputError as error:
    left.add("brushes that cannot be drawn", f"{where}: {error}")
    return None
  return encode_mask(pixels.reshape(*size, 4)[..., 3] > 0)


_SHAPES = {"rectangle": _box, "polygon": _polygon, "ellipse": _ellipse, "brush": _brush}


def decode_brush(data: bytes, count: int) -> np.ndarray:
  """Label Studio's run lengths as uint8 [count], red, green, blue and alpha of each pixel in turn.

  A stream of bits: 32 for the count, 5 for the word size less 1, four times 4 for sizes of run
  lengths less 1; then runs: a bit that says whether all words are equal, 2 bits for which size, the
  length less 1, and the one word, or each. Source: rle-pack of thi.ng/umbrella.

  Raises InputError where the stream breaks off or is of another length.
  """
  bits = np.unpackbits(np.frombuffer(data, np.uint8))
  text = (bits + ord("0")).tobytes().decode("ascii")
  at = 0

  def take(length: int) -> int:
    nonlocal at
    at += length
    if at > len(text):
      raise InputError("run lengths that break off")
    return int(text[at - length : at], 2)

  stated, word = take(32), take(5) + 1
  sizes = [take(4) + 1 for _ in range(4)]
  if stated != count:
    raise InputError(f"run lengths of {stated} values; its picture has {count}")
  out = np.zeros(count, np.uint8)
  i = 0
  while i < count:
    equal = take(1)
    end = i + take(sizes[take(2)]) + 1
    if end > count:
      raise InputError("a run past the end")
    if equal:
      out[i:end] = min(255, take(word))
    else:
      out[i:end] = [min(255, take(word)) for _ in range(end - i)]
    i = end
  return out


def _track(value: Any, video: Video | None, where: str, left: Left) -> dict[int, Any]:
  """The boxes of a video rectangle by frame; shares of its size where the video is not there."""
  keyframes = _keyframes(value, where)
  ordered = sorted(keyframes)
  size, frames = (None, MOST_FRAMES) if video is None else (video.size, len(video))
  count = number(value, "framesCount", where, 0.0)
  rate = 1.0 if video is None else _rate(video, count, number(value, "duration", where, 0.0))
  length = min(MOST_FRAMES, math.ceil(count or (0 if video is None else frames)))
  masks = {}
  for frame, end in itertools.pairwise([*ordered, max([*ordered, length - 1]) + 1]):
    box, goes_on = keyframes[frame]
    following = keyframes[end][0] if end in keyframes else box
    for n in range(frame, end if goes_on else frame + 1):
      share = (n - frame) / (end - frame)
      between = {key: box[key] + share * (following[key] - box[key]) for key in box}
      at = n if rate == 1 else int((n + 0.5) * rate)
      if at >= frames:
        break
      place = f"{where}, frame {at}"
      mask = usable(_box(between, size, place, left), size, place, left)
      if mask is not None:
        masks[at] = mask
  return masks


def _keyframes(value: Any, where: str) -> dict[int, tuple[dict[str, float], bool]]:
  """{frame: (box, whether it goes on)}; Label Studio counts frames from 1."""
  keyframes = {}
  for k, entry in enumerate(part(value, "sequence", list, where)):
    place = f"{where}, keyframe {k}"
    box = {key: number(entry, key, place) for key in ("x", "y", "width", "height")}
    box["rotation"] = number(entry, "rotation", place, 0.0)
    frame = int(number(entry, "frame", place))
    if not 1 <= frame <= MOST_FRAMES:
      raise InputError(f"{place}: frame {frame}; accepted: 1 to {MOST_FRAMES}")
    keyframes[frame - 1] = box, part(entry, "enabled", bool, place, True)
  return keyframes


def _rate(video: Video, count: float, seconds: float) -> float:
  """The file's frames for each that Label Studio counted, which does not know the file's rate."""
  if not video.fps or min(count, seconds) <= 0 or abs(count - seconds * video.fps) <= 1:
    return 1.0
  return min(100.0, max(0.01, video.fps * seconds / count))
