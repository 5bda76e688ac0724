"""The formats of `vr data import`, and the import itself."""

import collections
import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from data_pipes.errors import Defect, InputError, reading
from data_pipes.files import replaced
from data_pipes.importers import coco, cvat, davis, label_studio, mevis, sav, ytvis
from data_pipes.importers.captions import Captions
from data_pipes.importers.marked import Left, Media, items_of
from data_pipes.importers.parts import Source
from data_pipes.records import parse_item

# To add one: a file with such a function, and a line here.
FORMATS: Mapping[str, Callable[[Source, Left], Iterator[Media]]] = {
  "coco": coco.read,
  "ytvis": ytvis.read,
  "davis": davis.read,
  "mevis": mevis.read,
  "cvat": cvat.read,
  "label-studio": label_studio.read,
  "sav": sav.read,
}


def import_items(
  path: Path, kind: str, out: Path, captions: Path | None = None, media: Path | None = None
) -> dict[str, Any]:
  """Writes the items of a foreign file or folder to a JSON array; memory holds one source file.

  Args:
    path: the file or folder.
    kind: its format, one of FORMATS.
    out: the annotation file.
    captions: a file of texts, see data_pipes.importers.captions.
    media: where the media lie, by default the folder of `path`; what is there is looked up (the
      numbers of frames, sizes that the format does not hold), nothing is decoded.

  Returns {media, items, objects, left: {what: {count, first}}}.

  Raises InputError: the source is not in the format, or nothing of it can be carried over.
  """
  if not path.exists():
    raise InputError(f"{path}: no such file or folder")
  if media is not None and not media.is_dir():
    raise InputError(f"--media {media}: no such folder")
  source = Source(path, media or (path if path.is_dir() else path.parent))
  left, texts = Left(), Captions(captions)
  counts = {"media": 0, "items": 0, "objects": 0}
  numbers: collections.Counter[str] = collections.Counter()
  unwritable = f"--out {out}: cannot be written"
  with contextlib.ExitStack() as stack:
    with reading(unwritable):
      part = stack.enter_context(replaced(out))
      file = stack.enter_context(part.open("w", encoding="utf-8"))
    between = "[\n"
    for marked in FORMATS[kind](source, left):
      marked.texts = [*marked.texts, *texts.take(marked)]
      items = list(items_of(marked, f"{path}: {marked.path}", left))
      for item in items:
        item = {"id": f"{marked.path}#{numbers[marked.path]}", **item}
        try:
          parse_item(item, str(path))
        except Defect as error:
          left.add("items that our format cannot hold", str(error))
          continue
        numbers[marked.path] += 1
        with reading(unwritable):
          file.write(between + json.dumps(item, ensure_ascii=False))
        between = ",\n"
        counts["items"] += 1
        counts["objects"] += len(item.get("annotation", ()))
      counts["media"] += bool(items)
    texts.count_unused(left)
    file.write("\n]\n")
    if not counts["items"]:
      reasons = ", ".join(f"{c['count']} {what}" for what, c in left.counts().items())
      raise InputError(f"{path}: nothing to carry over ({reasons or 'no objects and no texts'})")
  return {**counts, "left": left.counts()}
