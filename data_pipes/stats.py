"""`vr data stats`: what annotation files or prepared shards hold, as a table, JSON and a page.

Counts of items that can be read; those that cannot are counted by class of defect (check.py).
Frames and areas come from the annotation alone; no media are opened.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipes import page
from data_pipes.check import check_masks
from data_pipes.containers import scan_records
from data_pipes.errors import Defect
from data_pipes.files import write_text
from data_pipes.masks import check_segmentation, segmentation_to_mask
from data_pipes.prompts import from_human
from data_pipes.records import Record, bench_kind, parse_item

# Upper ends of the classes of each distribution; the last class is open.
CLASSES: dict[str, tuple[float, ...]] = {
  "objects": (0, 1, 2, 3, 4, 5),
  "frames": (1, 2, 4, 8, 16, 31, 32),  # annotated frames of an object
  "seen": (0, 1, 4, 8, 16, 24, 31),  # of which it is seen
  "area": (0.0001, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3),  # of a mask, share of the frame
  "question_words": (5, 10, 20, 40, 80, 160),
  "answer_words": (5, 10, 20, 40, 80, 160, 320),
  "rounds": (1, 2, 3, 4, 6, 8),
}
TITLES = {
  "objects": "Objects of an item",
  "frames": "Annotated frames of an object",
  "seen": "Frames in which it is seen",
  "area": "Area of a mask (share of the frame)",
  "question_words": "Words of a question",
  "answer_words": "Words of an answer",
  "rounds": "Rounds of a dialogue",
}


def kind_of(record: Record, item: Mapping[str, Any]) -> str:
  """The type of an item, as Fig. 8 of the paper counts them."""
  bench = bench_kind(item)
  if bench:
    return f"bench {bench}"
  if record.media is None:
    return "text"
  where = "region" if record.objects else "whole"
  answers = [t.text for t in from_human(record.turns)[1::2]]
  words = np.mean([len(a.split()) for a in answers])
  if len(answers) > 1 and not record.objects:
    form = "dialogue"
  else:
    form = "short" if words <= 10 else "long"
  return f"{record.media} {where} {form}"


class Stats:
  """Counts, added up item by item in constant memory."""

  def __init__(self):
    self.items = 0
    self.kinds: Counter[str] = Counter()
    self.sources: Counter[str] = Counter()
    self.types: Counter[str] = Counter()
    self.defects: Counter[str] = Counter()
    self.distributions = {name: np.zeros(len(c) + 1, np.int64) for name, c in CLASSES.items()}
    self.sums: defaultdict[str, float] = defaultdict(float)

  def add(self, item: Any, where: str) -> None:
    """Counts one item, or its defect."""
    self.items += 1
    try:
      record = parse_item(item, where)
    except Defect as error:
      self.defects[error.kind] += 1
      return
    if defect := next((f for f in check_masks(record, None) if f.is_defect), None):
      self.defects[defect.kind] += 1
      return
    self.kinds[kind_of(record, item)] += 1
    self.sources[record.path.partition("/")[0] if "/" in record.path else "(top folder)"] += 1
    if item.get("type"):
      self.types[str(item["type"])] += 1
    self._put("objects", len(record.objects))
    turns = from_human(record.turns) if record.turns else []
    if turns:
      self._put("rounds", len(turns) // 2)
    for i, turn in enumerate(turns):
      self._put("answer_words" if i % 2 else "question_words", len(turn.text.split()))
    for by_frame in record.objects:
      areas = [self._area(s, record) for s in by_frame.values()]
      self._put("frames", len(areas))
      self._put("seen", sum(a != 0 for a in areas))
      for area in filter(None, areas):
        self._put("area", area)

  def _put(self, name: str, value: float) -> None:
    self.distributions[name][np.searchsorted(CLASSES[name], value)] += 1
    self.sums[name] += value
    self.sums[f"{name} count"] += 1

  def _area(self, segmentation: Any, record: Record) -> float | None:
    """Share of the frame; None where it cannot be told (polygons without a size, broken masks)."""
    try:
      size, area = check_segmentation(segmentation)
      if size is None and area is None and record.size:
        size, area = record.size, int(segmentation_to_mask(segmentation, *record.size).sum())
    except ValueError:
      return None
    if area == 0:
      return 0.0
    return None if size is None or area is None else area / (size[0] * size[1])

  def result(self) -> dict[str, Any]:
    """The figures as `vr data stats --json` prints them."""
    means = {
      name: self.sums[name] / self.sums[f"{name} count"]
      for name in CLASSES
      if self.sums[f"{name} count"]
    }
    return {
      "items": self.items,
      "readable": sum(self.kinds.values()),
      "kinds": dict(self.kinds.most_common()),
      "sources": dict(self.sources.most_common(30)),
      "types": dict(self.types.most_common()),
      "defects": dict(self.defects.most_common()),
      "distributions": {
        name: dict(zip(labels(name), map(int, counts), strict=True))
        for name, counts in self.distributions.items()
      },
      "means": means,
    }


def labels(name: str) -> list[str]:
  """Names of the classes of a distribution."""
  ends = CLASSES[name]
  if name == "area":
    return [f"≤ {e:.2%}" for e in ends] + [f"> {ends[-1]:.0%}"]
  out, low = [], 0
  for end in (int(e) for e in ends):
    out.append(str(end) if end <= low else f"{low}–{end}")
    low = end + 1
  return [*out, f"> {int(ends[-1])}"]


def read_stats(
  files: Sequence[str | Path], progress: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
  """Counts what JSON files and folders of shards hold."""
  stats = Stats()
  for file in files:
    for item, where in scan_records(file):
      stats.add(item, where)
      if stats.items % 20_000 == 0:
        progress(f"{file}: {stats.items} items")
  return {"files": [str(f) for f in files], **stats.result()}


def table(result: Mapping[str, Any]) -> Iterator[str]:
  """The figures as lines for a terminal."""
  yield f"{result['items']} items, {result['readable']} of them readable"
  for name in ("kinds", "sources", "types", "defects"):
    for bar in page.count_bars(result[name], shares=True, total=result["items"]):
      yield f"  {name[:-1]:<7} {bar.name:<28} {bar.text:>18}"
  for name, counts in result["distributions"].items():
    if not sum(counts.values()):
      continue
    mean = result["means"][name]
    yield f"{TITLES[name]} (mean {mean:.4g})"
    most = max(counts.values())
    for key, count in counts.items():
      if count:
        yield f"  {key:>9} {count:>9}  {'█' * round(30 * count / most)}"


def write_page(path: Path | str, result: Mapping[str, Any]) -> Path:
  """One self-contained page: the composition (as Fig. 8) and the distributions (as Fig. 9)."""
  figures = []
  for name, title in (
    ("kinds", "Composition"),
    ("sources", "Sources"),
    ("types", "Question types"),
    ("defects", "Defects"),
  ):
    if result[name] or name == "kinds":
      bars = page.count_bars(result[name], shares=True, total=result["items"])
      figures.append((title, bars))
  for name, counts in result["distributions"].items():
    if sum(counts.values()):
      title = f"{TITLES[name]}, mean {result['means'][name]:.4g}"
      figures.append((title, page.count_bars(counts, shares=True)))
  text = page.render(
    "stats.html.j2",
    items=result["items"],
    readable=result["readable"],
    files=result["files"],
    figures=figures,
  )
  write_text(path, text)
  return Path(path)


def dumps(result: Mapping[str, Any]) -> str:
  return json.dumps(result, indent=2, ensure_ascii=False)
