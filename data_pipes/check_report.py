"""Annotation files checked as a whole: counts by class, the report, the table, cleaned copies."""

import contextlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TextIO

from data_pipes.check import DEFECTS, KINDS, Checked, Checks, Finding, Seen, check_file
from data_pipes.errors import InputError
from data_pipes.files import replaced, write_text
from data_pipes.json_items import scan_items

PAGE = "docs/format.md"  # has a paragraph for each class, at an anchor of its name
SHOWN_IDS = 100  # in the summary; the full list is in the file of findings


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
      reasons = [f.reason for f in checked.findings if f.kind == kind]
      counts = self._classes.setdefault(kind, _Class())
      counts.count += len(reasons)
      counts.items += 1
      counts.reason = counts.reason or reasons[0]
      if len(counts.ids) < SHOWN_IDS:
        counts.ids.append(f"(item {checked.index})" if checked.id is None else checked.id)

  def classes(self, defects: bool) -> dict[str, dict[str, Any]]:
    """{class: count, items, what it means, where that is explained, the first reason and ids}.

    Most items first.
    """
    kept = {k: c for k, c in self._classes.items() if (k in DEFECTS) == defects}
    return {
      kind: {
        "count": c.count,
        "items": c.items,
        "what": KINDS[kind],
        "see": f"{PAGE}#{kind}",
        "reason": c.reason,
        "ids": c.ids,
      }
      for kind, c in sorted(kept.items(), key=lambda pair: (-pair[1].items, pair[0]))
    }


@dataclass(frozen=True)
class Outputs:
  """What `check` writes, and how many threads it takes.

  Attributes:
    report: a JSON file for the summary; beside it, `<report>.items.jsonl` lists every finding.
    fix: a folder for cleaned copies, `<name>` and `<name>.changes.jsonl` for each file: items with
      defects are mended where that loses no object (see `mend`) and left out otherwise.
  """

  report: Path | None = field(
    default=None, metadata={"help": "and every finding in R.json.items.jsonl", "metavar": "R.json"}
  )
  fix: Path | None = field(
    default=None,
    metadata={"help": "write cleaned copies and lists of changes there", "metavar": "DIR"},
  )
  jobs: int = field(default=2, metadata={"help": "threads (default: %(default)s)", "metavar": "N"})


def check(
  files: Sequence[Path | str],
  checks: Checks,
  outputs: Outputs | None = None,
  progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
  """Checks annotation files; returns the summary that `vr data check --json` prints.

  Raises:
    InputError: a file that is not there, or a copy that would overwrite a source.
  """
  paths, outputs = [Path(f) for f in files], outputs or Outputs()
  _check_paths(paths, checks.media, outputs.fix)
  tally, done = Tally(), []
  findings_path = None if outputs.report is None else Path(f"{outputs.report}.items.jsonl")
  with open(findings_path or os.devnull, "w", encoding="utf-8") as findings:
    for path in paths:
      done.append(_check_one(path, checks, outputs, tally, findings, progress))
  summary = {
    "files": done,
    "items": sum(f["items"] for f in done),
    "good": sum(f["good"] for f in done),
    "defects": tally.classes(True),
    "notices": tally.classes(False),
    "rejected_notices": list(checks.reject),
    "media_checked": checks.media is not None,
  }
  if outputs.report is not None:
    summary["findings"] = str(findings_path)
    write_text(outputs.report, json.dumps(summary, indent=2) + "\n")
  return summary


def _check_paths(files: Sequence[Path], media: Path | None, fix: Path | None) -> None:
  """Raises InputError for paths that cannot be read, or not be written without a loss."""
  for file in files:
    if not file.is_file():
      raise InputError(f"{file}: found no such file; accepted: a JSON array of items")
  if media is not None and not media.is_dir():
    raise InputError(f"{media}: no such folder of media")
  if fix is not None and any((fix / f.name).resolve() == f.resolve() for f in files):
    raise InputError(f"--fix {fix}: would write over a source; give another folder")
  if fix is not None and len({f.name for f in files}) < len(files):
    raise InputError(f"--fix {fix}: two of the files have one name; check them one by one")


def _check_one(
  file: Path,
  checks: Checks,
  outputs: Outputs,
  tally: Tally,
  findings: TextIO,
  progress: Callable[[str], None],
) -> dict[str, Any]:
  """Checks one file, tallies and writes what comes of it; returns its line of the summary."""
  items = good = kept = mended = 0
  with Cleaned(file, outputs.fix) as cleaned:
    for checked in check_file(file, checks, outputs.jobs):
      tally.add(checked)
      for finding in checked.findings:
        line = {"file": str(file), "item": checked.index, "id": checked.id}
        line |= {"class": finding.kind, "defect": checks.rejects(finding), "reason": finding.reason}
        findings.write(json.dumps(line) + "\n")
      if checked.span is None:
        continue
      items += 1
      good += not any(checks.rejects(f) for f in checked.findings)
      if outputs.fix is not None:
        outcome = cleaned.add(checked, checks)
        kept, mended = kept + (outcome != "dropped"), mended + (outcome == "mended")
      if items % 10_000 == 0:
        progress(f"{file}: {items} items, {items - good} with defects")
  progress(f"{file}: {items} items, {items - good} with defects")
  result = {"file": str(file), "items": items, "good": good, "defective": items - good}
  if outputs.fix is not None:
    result |= {"fixed": str(outputs.fix / file.name), "kept": kept, "mended": mended}
  return result


def has_defects(summary: Mapping[str, Any]) -> bool:
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
    self._between = b"[\n"
    self._ids: Seen | None = None  # of the whole file, and new ones; read when one is to be made
    self._files = contextlib.ExitStack()

  def __enter__(self) -> Self:
    if self._folder is not None:
      part = self._files.enter_context(replaced(self._folder / self._source.name))
      self._file = self._files.enter_context(open(part, "wb"))
      changes = self._folder / f"{self._source.name}.changes.jsonl"
      self._changes = self._files.enter_context(open(changes, "w", encoding="utf-8"))
    return self

  def add(self, checked: Checked, checks: Checks) -> str:
    """Writes an item or leaves it out: "kept", "mended" or "dropped"."""
    bad = [f for f in checked.findings if checks.rejects(f)]
    assert checked.span is not None  # the file's own defects belong to no item
    raw: bytes | None = checked.span.raw
    changes: list[dict[str, str]] = []
    if bad:
      raw, changes = mend(checked, bad, self._new_id)
    for change in changes:
      line = {"item": checked.index, "id": checked.id, **change}
      self._changes.write(json.dumps(line) + "\n")
    if raw is None:
      return "dropped"
    self._file.write(self._between + raw)
    self._between = b",\n"
    return "mended" if bad else "kept"

  def _new_id(self, checked: Checked) -> str:
    """The item's id with its number behind it, and more where another item has that one."""
    if self._ids is None:
      self._ids = Seen()
      for span in scan_items(self._source):
        if isinstance(span.item, dict):
          self._ids.add(span.item.get("id"))
    name = f"{checked.id}#{checked.index}"
    names = itertools.chain([name], (f"{name}.{k}" for k in itertools.count(2)))
    return next(filter(self._ids.add, names))

  def __exit__(self, *error: Any) -> None:
    if self._folder is not None:
      self._file.write(b"\n]\n" if self._between != b"[\n" else b"[]\n")
    self._files.__exit__(*error)  # the copy takes its place unless there is an error


def mend(
  checked: Checked, bad: Sequence[Finding], new_id: Callable[[Checked], str]
) -> tuple[bytes | None, list[dict[str, str]]]:
  """An item's bytes with its defects taken out, and the changes; None where it must go.

  A frame past the end is left out, and a mask that cannot be used becomes null, where the object
  is still seen in another frame. A repeated id is changed into a `new_id`. Anything else would be
  guessing.
  """
  record, span, changes = checked.record, checked.span, []
  curable = all(f.kind == "duplicate-id" or f.at is not None for f in bad)
  curable &= not any(f.kind == "vanishing" for f in bad)
  if record is None or span is None or not curable:
    return None, [{"class": f.kind, "change": "item left out", "reason": f.reason} for f in bad]
  objects = [dict(by_frame) for by_frame in record.objects]
  item = dict(span.item)
  for f in bad:
    if f.at is None:
      item["id"] = new_id(checked)
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
    for kind, counts in summary[name].items():
      ids = ", ".join(_printable(i) for i in itertools.islice(counts["ids"], 5))
      more = ", ..." if counts["items"] > 5 else ""
      yield f"{name[:-1]:<7} {kind:<17} {counts['items']:>7} items  {counts['what']}"
      yield f"{'':<7} ids {ids}{more}; first: {counts['reason']}"
      yield f"{'':<7} see {counts['see']}"
  if not summary["media_checked"]:
    yield "media were not opened; give --media DIR to check them"
