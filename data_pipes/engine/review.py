"""A sample of the Reviewer's decisions for people: out as a page, Label Studio or CVAT; back again.

W/review/sample.json        what was drawn, and what the Reviewer decided (not shown to people)
W/review/review.html        self-contained page: overlays, both texts, keys y and n
W/review/label_studio.json  tasks to import; export as JSON
W/review/cvat.xml           CVAT-for-images 1.1 with the drawn frames in W/review/frames
"""

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_pipes import page
from data_pipes.drawing import FOR_MODELS, data_uri, outline
from data_pipes.engine.agents.objects import masks_of
from data_pipes.engine.graph import KEPT, REJECTED, digest
from data_pipes.engine.stages import REVIEW, SEGMENT, UNIQUE, warning
from data_pipes.engine.store import Store
from data_pipes.errors import InputError
from data_pipes.video import open_video

FRAMES, SIZE = 4, 480  # pictures of an item and their longer side


def write_sample(workdir: str | Path, n: int = 100, seed: int = 0) -> list[Path]:
  """Draws n kept and n dropped items (all, if there are fewer) and writes them in all formats.

  The order is shuffled and the Reviewer's decision is not shown, so that it does not lead people.

  Raises:
    InputError: the run has no reviewed items, or n < 1.
  """
  if n < 1:
    raise InputError(f"--n {n}; accepted: 1 or more")
  store = Store(workdir)
  decided = _decisions(store)
  drawn = [
    key
    for kept in (True, False)
    for key in sorted((k for k in decided if decided[k]["kept"] == kept), key=_draw(seed))[:n]
  ]
  if not drawn:
    raise InputError(f"{workdir}: no reviewed items yet; accepted: a run of the detailed path")
  items = _with_pictures(store, [decided[key] for key in sorted(drawn, key=_draw(seed + 1))])
  kept = sum(d["kept"] for d in decided.values())
  sample = {
    "seed": seed,
    "reviewed": len(decided),
    "accept_rate": kept / len(decided),
    "items": [{k: item[k] for k in ("key", "kept", "noun", "reason")} for item in items],
  }
  folder = store.folder / "review"
  tasks = [_label_studio(item) for item in items]
  return [
    store.write("review/sample.json", json.dumps(sample, indent=1)),
    store.write("review/review.html", _page(items, warning(store.settings()["config"]))),
    store.write("review/label_studio.json", json.dumps(tasks, indent=1)),
    _write_cvat(store, folder, items),
  ]


def _draw(seed: int):
  return lambda key: digest([seed, key])


def _decisions(store: Store) -> dict[str, dict[str, Any]]:
  out = {}
  for shard in range(store.shards):
    if store.path(REVIEW, shard).is_file():
      for record in store.records(REVIEW, shard):
        if record.status in (KEPT, REJECTED) and record.row:
          out[record.key] = {**record.row, "kept": record.status == KEPT}
  return out


def _with_pictures(store: Store, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
  keys = {item["key"] for item in items}
  objects = {row["key"]: row for row in store.rows(SEGMENT) if row["key"] in keys}
  clips = {row["key"]: row for row in store.rows(UNIQUE)}
  out = []
  for item in items:
    row, clip = objects[item["key"]], clips[item["clip_id"]]
    masks = masks_of(row)
    seen = [n for n in sorted(masks) if masks[n].any()]
    places = np.linspace(0, len(seen) - 1, min(FRAMES, len(seen))).round().astype(int)
    numbers = sorted({seen[i] for i in places})
    frames = open_video(store.folder / "media" / clip["video"]).frames(numbers)
    images = [outline(f, masks[n], SIZE) for n, f in zip(numbers, frames, strict=True)]
    out.append({**item, "images": images, "numbers": numbers, "masks": masks, "clip": clip})
  return out


def _page(items: list[dict[str, Any]], warning: str) -> str:
  """One file without outside parts; verdicts stay in the browser until they are saved as a file."""
  cards = [
    {
      "key": item["key"],
      "noun": item["noun"],
      "text": item["annotator_text"],
      "pictures": [data_uri(image, FOR_MODELS) for image in item["images"]],
    }
    for item in items
  ]
  return page.render("engine_review.html.j2", items=cards, warning=warning)


def _label_studio(item: Mapping[str, Any]) -> dict[str, Any]:
  """A task for a labelling config with <Choices name="verdict" toName="image">: good, bad."""
  data = {"key": item["key"], "noun": item["noun"], "text": item["annotator_text"]}
  for number, image in enumerate(item["images"]):
    data[f"image{number}"] = data_uri(image, FOR_MODELS)
  return {"data": data}


def _write_cvat(store: Store, folder: Path, items: Iterable[Mapping[str, Any]]) -> Path:
  """CVAT-for-images: a picture an item with its mask and an attribute `verdict` to fill in."""
  root = ET.Element("annotations")
  ET.SubElement(root, "version").text = "1.1"
  (folder / "frames").mkdir(parents=True, exist_ok=True)
  for i, item in enumerate(items):
    best = max(item["numbers"], key=lambda n: int(item["masks"][n].sum()))
    frame = open_video(store.folder / "media" / item["clip"]["video"]).frames([best])[0]
    name = f"{i:04d}.jpg"
    outline(frame, item["masks"][best], max(frame.shape[:2])).save(folder / "frames" / name)
    height, width = frame.shape[:2]
    image = ET.SubElement(root, "image", id=str(i), name=name, width=str(width), height=str(height))
    mask = ET.SubElement(image, "mask", {"label": "object", **_cvat_rle(item["masks"][best])})
    for attribute, value in (
      ("key", item["key"]), ("text", item["annotator_text"]), ("verdict", "unset")
    ):  # fmt: skip
      ET.SubElement(mask, "attribute", name=attribute).text = value
  ET.indent(root)
  return store.write("review/cvat.xml", ET.tostring(root, encoding="utf-8", xml_declaration=True))


def _cvat_rle(mask: np.ndarray) -> dict[str, str]:
  """CVAT's run lengths: row by row inside the bounding box, zeros first."""
  ys, xs = np.nonzero(mask)
  top, left, bottom, right = ys.min(), xs.min(), ys.max() + 1, xs.max() + 1
  flat = mask[top:bottom, left:right].astype(np.int8).reshape(-1)
  edges = np.flatnonzero(np.diff(flat)) + 1
  runs = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
  if flat[0]:
    runs = [0, *runs]
  box = {"left": left, "top": top, "width": right - left, "height": bottom - top}
  return {"rle": ", ".join(map(str, runs)), "z_order": "0"} | {k: str(v) for k, v in box.items()}


def read_verdicts(workdir: str | Path, path: str | Path) -> tuple[list[tuple[bool, bool]], float]:
  """(kept by the Reviewer, good to people) of each judged item, and the true accept rate.

  Reads what the page saved (JSON lines), Label Studio's JSON export, or CVAT's XML.

  Raises:
    InputError: no such file or sample, a key that was not drawn, a word that is no verdict, or two
      verdicts that contradict each other.
  """
  drawn = Path(workdir) / "review" / "sample.json"
  if not drawn.is_file():
    raise InputError(f"{drawn}: no sample; draw one with vr engine review {workdir}")
  sample = json.loads(drawn.read_text(encoding="utf-8"))
  kept = {item["key"]: item["kept"] for item in sample["items"]}
  path = Path(path)
  if not path.is_file():
    raise InputError(f"{path}: no such file; accepted: .jsonl of the page, .json, .xml")
  decisions: dict[str, bool] = {}
  for where, key, word in _entries(path):
    if key not in kept:
      raise InputError(f"{where}: key {str(key)[:80]!r} was not drawn; another run or sample?")
    if word in (None, "", "unset"):
      continue  # not judged
    if word not in _WORDS:
      raise InputError(f"{where}: verdict {word!r}; accepted: good, bad")
    if decisions.setdefault(key, _WORDS[word]) != _WORDS[word]:
      raise InputError(f"{where}: {key!r} has two verdicts that contradict each other")
  return [(kept[key], good) for key, good in decisions.items()], sample["accept_rate"]


_WORDS = {"good": True, "accept": True, "bad": False, "reject": False}


def _entries(path: Path) -> Iterable[tuple[str, Any, Any]]:
  """(where, key, word) of each entry of a verdict file."""
  text = path.read_text(encoding="utf-8")
  try:
    if path.suffix == ".xml":
      for mask in ET.fromstring(text).iter("mask"):
        values = {a.get("name"): a.text for a in mask.iter("attribute")}
        yield str(path), values.get("key"), values.get("verdict")
    elif path.suffix == ".jsonl":
      for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
          entry = json.loads(line)
          yield f"{path}:{number}", entry["key"], entry["verdict"]
    else:
      for number, task in enumerate(json.loads(text)):
        results = [r for a in task.get("annotations", []) for r in a.get("result", [])]
        for word in [c for r in results for c in r["value"].get("choices", [])]:
          yield f"{path}: task {number}", task["data"]["key"], word.lower()
  except (ValueError, KeyError, TypeError, AttributeError, ET.ParseError) as error:
    line = re.sub(r"\s+", " ", str(error))
    raise InputError(
      f"{path}: found {type(error).__name__}: {line}; accepted: verdicts of the page (.jsonl), "
      "Label Studio (.json) or CVAT (.xml)"
    ) from None
