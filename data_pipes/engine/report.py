"""The data card of a run, and plots: amounts (as the paper's Fig. 8) and statistics (Fig. 9)."""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from data_pipes import page
from data_pipes.engine import licences
from data_pipes.engine.agents.assemble import FILES
from data_pipes.engine.command import status
from data_pipes.engine.export import file_paths
from data_pipes.engine.stages import ASSEMBLE, warning
from data_pipes.engine.store import Store
from data_pipes.errors import InputError


def write_report(workdir: str | Path) -> tuple[Path, dict[str, Any]]:
  """Writes W/out/card.md and W/out/report.html; returns the page's path and the numbers.

  Raises:
    InputError: the run has no samples yet.
  """
  store = Store(workdir)
  numbers = measure(store)
  if not numbers["samples"]:
    raise InputError(f"{workdir}: no samples yet; accepted: a run that has finished")
  numbers["status"] = status(workdir)
  settings = store.settings()
  numbers["config"] = settings["config"]
  numbers["warning"] = warning(numbers["config"])
  numbers["licences"] = licences.of_run(numbers["config"], settings.get("licences"))
  numbers["models"] = licences.models_of_run(numbers["config"])
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True
  )
  store.write("out/card.md", environment.get_template("card.md.j2").render(**numbers))
  plots = {title: page.count_bars(counts) for title, counts in _plots(numbers)}
  path = store.write(
    "out/report.html", page.render("engine_report.html.j2", plots=plots, **numbers)
  )
  return path, numbers


def measure(store: Store) -> dict[str, Any]:
  """Counts over the samples of a run, in constant memory but for the names that occur."""
  files: Counter[str] = Counter()
  types: Counter[str] = Counter()
  words: dict[str, Counter[int]] = {name: Counter() for name in FILES}
  rounds: Counter[int] = Counter()
  objects: Counter[int] = Counter()
  nouns: Counter[str] = Counter()
  areas: Counter[float] = Counter()
  frames: Counter[int] = Counter()
  agents: dict[str, set[str]] = {}
  videos: set[str] = set()
  for row in store.rows(ASSEMBLE):
    item, source = row["item"], row["provenance"]
    files[row["file"]] += 1
    types.update(source.get("types", ()))
    answers = [t["value"] for t in item["conversations"] if t["from"] == "gpt"]
    for answer in answers:
      words[row["file"]][len(re.findall(r"\w+", answer))] += 1
    rounds[len(answers)] += 1
    objects[len(item["annotation"])] += 1
    for annotation in item["annotation"]:
      frames[sum(m["segmentation"] is not None for m in annotation.values())] += 1
    if "noun" in source:
      nouns[source["noun"].split()[-1]] += 1
    for scores in source["scores"]:
      if scores.get("area_ratio"):
        areas[float(f"{scores['area_ratio']:.1g}")] += 1
    videos.add(source["video_hash"])
    for stage, agent in source["agents"].items():
      prompts = " ".join(f"{k}#{v}" for k, v in agent.get("prompts", {}).items())
      agents.setdefault(stage, set()).add(f"{agent.get('backend', '')} {prompts}".strip())
  return {
    "samples": sum(files.values()),
    "videos": len(videos),
    "files": dict(files),
    "types": dict(types),
    "words": {name: _summary(counts) for name, counts in words.items() if counts},
    "word_counts": {name: dict(sorted(c.items())) for name, c in words.items() if c},
    "rounds": dict(sorted(rounds.items())),
    "objects": dict(sorted(objects.items())),
    "nouns": dict(nouns.most_common(20)),
    "areas": dict(sorted(areas.items())),
    "frames": dict(sorted(frames.items())),
    "agents": {stage: sorted(who) for stage, who in sorted(agents.items())},
    "paths": {name: file_paths(Path("out"), name)[0].name for name in files},
  }


def _summary(counts: Mapping[int, int]) -> dict[str, float]:
  values = np.repeat(list(counts), list(counts.values()))
  return {
    "mean": round(float(values.mean()), 1),
    "median": float(np.median(values)),
    "longest": int(values.max()),
  }


def _plots(numbers: Mapping[str, Any]) -> list[tuple[str, dict[Any, int]]]:
  out = [("Samples of each kind", numbers["files"]), ("Questions of each type", numbers["types"])]
  for name, counts in numbers["word_counts"].items():
    out.append((f"Words of an answer, {name}", _binned(counts)))
  out += [
    ("Commonest nouns", numbers["nouns"]),
    ("Objects of a sample", numbers["objects"]),
    ("Frames with a mask", _binned(numbers["frames"])),
    ("Share of the frame that an object covers", numbers["areas"]),
    ("Rounds of a dialogue", numbers["rounds"]),
  ]
  return [(title, counts) for title, counts in out if counts]


def _binned(counts: Mapping[int, int], bins: int = 12) -> dict[str, int]:
  """Counts of whole numbers in at most `bins` equal ranges."""
  low, high = min(counts), max(counts)
  step = max(1, -(-(high - low + 1) // bins))
  out: Counter[int] = Counter()
  for value, count in counts.items():
    out[(value - low) // step] += count
  names = {b: (low + b * step, low + (b + 1) * step - 1) for b in sorted(out)}
  return {(f"{a}" if a == b else f"{a} to {b}"): out[k] for k, (a, b) in names.items()}
