"""DAVIS and YouTube-VOS: folders of frames beside folders of pictures that number objects."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_pipes.errors import InputError, reading
from data_pipes.images import open_image
from data_pipes.importers.captions import expressions, read_davis_texts
from data_pipes.importers.marked import Left, Marked, Media, Text
from data_pipes.importers.parts import Source, checked, load_json, part
from data_pipes.masks import encode_mask

VOID = 255  # borders that belong to no object


def read(source: Source, left: Left) -> Iterator[Media]:
  """A folder of frames each, JPEGImages/[480p/]NAME; its objects in Annotations/[480p/]NAME.

  Names come from `meta.json` (YouTube-VOS) or `davis_semantics.json`; an object that is alone takes
  its sequence's. Texts come from `meta_expressions.json` (Ref-YouTube-VOS) or `Davis17_annot*.txt`.
  """
  root = source.path / "Annotations"
  if not root.is_dir():
    raise InputError(f"{source.path}: no folder Annotations; accepted: JPEGImages and Annotations")
  names, texts = _names(source.path), _texts(source.path)
  done: set[str] = set()
  for folder in [root, *sorted(p for p in root.rglob("*") if p.is_dir())]:
    pictures = sorted(p for p in folder.iterdir() if p.suffix == ".png" and p.name[0] != ".")
    if not pictures:
      continue
    sequence = folder.name
    if sequence in done:
      left.add("further resolutions of a sequence", str(folder))
      continue
    done.add(sequence)
    path = (Path("JPEGImages") / folder.relative_to(root)).as_posix()
    path = source.located(path)
    media = Media("video", path, None, [], texts.get(sequence, []), (sequence,))
    objects: dict[int, Marked] = {}
    for number, picture in zip(
      source.numbers(path, [p.name for p in pictures]), pictures, strict=True
    ):
      if number is None:
        left.add("masks without a frame of their name", str(picture))
        continue
      values = read_ids(picture, left)
      if values is None:
        continue
      if media.size not in (None, values.shape):
        left.add("masks of another size than the first of their sequence", str(picture))
        continue
      media.size = values.shape
      for key in _ids(values):
        name = names.get(sequence, {}).get(str(key), "")
        marked = objects.setdefault(key, Marked(name, (str(key),)))
        marked.masks[number] = encode_mask(values == key)
    media.objects = [objects[key] for key in sorted(objects)]
    if len(objects) == 1 and not media.objects[0].name:
      media.objects[0].name = sequence.replace("-", " ")
    yield media


def read_ids(path: Path, left: Left) -> np.ndarray | None:
  """A picture's palette indices or grey values [H, W]; None where it numbers nothing."""
  try:
    with reading(f"{path}: cannot be read as an image"), open_image(path) as image:
      mode, values = image.mode, np.asarray(image)
  except InputError as error:
    left.add("pictures that cannot be read", str(error))
    return None
  if mode not in ("P", "L", "1") and not mode.startswith("I"):
    left.add("pictures in colours, whose values number nothing", f"{path}: mode {mode}")
    return None
  return values.astype(np.int64)


def _ids(values: np.ndarray) -> list[int]:
  ids = np.unique(values).tolist()
  ids = [key for key in ids if key > 0]
  return ids if ids == [VOID] else [key for key in ids if key != VOID]  # DAVIS 2016: 0 and 255


def _names(root: Path) -> dict[str, dict[str, str]]:
  """{sequence: {object: name}}."""
  names: dict[str, dict[str, str]] = {}
  if (meta := root / "meta.json").is_file():
    for name, video in part(load_json(meta), "videos", dict, str(meta)).items():
      objects = part(video, "objects", dict, f"{meta}: {name}", {})
      names[name] = {
        key: part(entry, "category", str, f"{meta}: {name}: {key}", "")
        for key, entry in objects.items()
      }
  if (file := root / "davis_semantics.json").is_file():
    for name, objects in checked(load_json(file), dict, str(file)).items():
      checked(objects, dict, f"{file}: {name}")
      names[name] = {key: part(objects, key, str, f"{file}: {name}") for key in objects}
  return names


def _texts(root: Path) -> dict[str, list[Text]]:
  texts: dict[str, list[Text]] = {}
  for file in sorted(root.rglob("meta_expressions.json")):
    for name, text in expressions(load_json(file), str(file), ("obj_id",)):
      texts.setdefault(name, []).append(text)
  for file in sorted(root.rglob("Davis1*_annot*.txt")):
    for name, text in read_davis_texts(file):
      texts.setdefault(name, []).append(text)
  return texts
