"""Scores of captions against one reference each (HC-STVG, Table 3 of the paper; values times 100).

BLEU, ROUGE-L and CIDEr need nothing but this package. METEOR and the tokenizer that the published
numbers were made with are Java programs of the extra [java]; SPICE needs a CoreNLP besides, which
is in no package. A metric that cannot be computed says why and is never 0.
"""

import json
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np

from data_pipes.errors import InputError
from vr_jax.evaluation.benchmark import Benchmark, Kind
from vr_jax.evaluation.items import Prediction, counts, item_record
from vr_jax.evaluation.metrics import BY_VIDEO, Interval, Metric
from vr_jax.evaluation.provenance import java_version
from vr_jax.evaluation.results import Result
from vr_jax.evaluation.scoring.caption_metrics import (
  ORDERS,
  Scored,
  bleu,
  bleu_counts,
  bleu_from_counts,
  cider_d,
  rouge_l,
)
from vr_jax.evaluation.scoring.ptb import one_line, tokenize, without_punctuation
from vr_jax.evaluation.scoring.statistics import cluster_bootstrap, resampled
from vr_jax.evaluation.settings import FILTERS, TOKENIZERS, CaptionSettings

BLEU_DRAWS = 1000
CORENLP = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
# SPICE's serialisation looks into these packages, which Java 16 and later close.
_OPENED = ("lang", "math", "util", "util.concurrent", "net", "text")


def score(
  benchmark: Benchmark,
  predictions: Sequence[Prediction],
  run: Mapping[str, Any],
  parser: str,
  settings: CaptionSettings,
) -> Result:
  """Scores the answered items; those without an answer are counted, an empty answer scores 0."""
  for name, value, accepted in (
    ("--tokenizer", settings.tokenizer, TOKENIZERS),
    ("--length-filter", settings.length_filter, FILTERS),
  ):
    if value not in accepted:
      raise InputError(f"{name} {value!r}; accepted: {', '.join(accepted)}")
  answered = [p for p in predictions if p.pred is not None]
  kept = answered
  if settings.length_filter == "artemis":
    kept = [p for p in answered if 5 < len(p.pred or "") < 300]
  if not kept:
    raise InputError("no captions to score; at least one is needed")
  cut = jar_tokenize if settings.tokenizer == "ptb-jar" else ours
  references = [[text] for text in cut([p.truth or "" for p in kept])]
  captions = cut([p.pred or "" for p in kept])
  scored = _all_metrics(references, captions, settings)
  videos, left_out = [p.video for p in kept], len(predictions) - len(kept)
  metrics = []
  for name, corpus in scored.items():
    if isinstance(corpus, str):
      note = f"n/a ({corpus})"
      metrics.append(Metric(name, "All", None, "score", 0, len(predictions), note=note))
      continue
    if name.startswith("BLEU"):
      interval = _bleu_interval(references, captions, videos, int(name[-1]))
    else:
      interval = cluster_bootstrap(corpus.items, videos)
    fields = {"name": name, "slice": "All", "value": corpus.corpus, "unit": "score"}
    metrics.append(
      Metric.with_interval(interval, BY_VIDEO, n=len(kept), n_failed=left_out, **fields)
    )
  numbers = {"total": 0, "answered": 0, "kept": len(kept)} | counts(predictions)
  extra = {
    "tokenizer": settings.tokenizer,
    "length_filter": f"{settings.length_filter}: {len(kept)} of {len(answered)} kept",
    "java": java_version(),
  }
  place = {p.id: i for i, p in enumerate(kept)}
  items = [_record(p, place.get(p.id), captions, scored) for p in predictions]
  return Result(benchmark.name, run, parser, metrics, numbers, items, extra=extra)


def _all_metrics(
  references: Sequence[Sequence[str]], captions: Sequence[str], settings: CaptionSettings
) -> dict[str, Scored | str]:
  """Every metric by name; a text says why one cannot be computed."""
  scored: dict[str, Scored | str] = {}
  scored |= {f"BLEU-{n}": corpus for n, corpus in enumerate(bleu(references, captions), 1)}
  scored["METEOR"] = _meteor(references, captions) if settings.meteor else "left out"
  scored["ROUGE_L"] = rouge_l(references, captions)
  scored["CIDEr"] = cider_d(references, captions)
  scored["SPICE"] = _spice(references, captions, settings.spice_home)
  return scored


def ours(texts: Sequence[str]) -> list[str]:
  """Tokens of each text, joined by spaces, without punctuation."""
  return [" ".join(without_punctuation(tokenize(text))) for text in texts]


def jar_tokenize(texts: Sequence[str]) -> list[str]:
  """The same by Stanford's PTBTokenizer.

  pycocoevalcap's own wrapper writes into its installation, and a U+2028 in a caption shifts all
  later ones; here the text goes through a pipe, one clean line each.
  """
  jar = _java_home() / "tokenizer" / "stanford-corenlp-3.4.1.jar"
  command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
  lines = "".join(f"{one_line(text)}\n" for text in texts)
  done = subprocess.run(
    [*command, "-preserveLines", "-lowerCase", "-encoding", "UTF-8"],
    input=lines.encode(),
    capture_output=True,
    check=True,
  )
  out = done.stdout.decode().split("\n")[: len(texts)]
  return [" ".join(without_punctuation(line.rstrip().split(" "))) for line in out]


def _java_home() -> Path:
  """The folder of pycocoevalcap, whose wheel holds the Java programs."""
  package = util.find_spec("pycocoevalcap")
  if package is None or not package.submodule_search_locations:
    raise InputError("pycocoevalcap is not installed; accepted: pip install 'vr-jax[java]'")
  if not shutil.which("java"):
    raise InputError("no java on the path; accepted: a Java 8 or later")
  return Path(package.submodule_search_locations[0])


def _meteor(references: Sequence[Sequence[str]], captions: Sequence[str]) -> Scored | str:
  """METEOR 1.5, or why there is none."""
  try:
    _java_home()
  except InputError as error:
    return str(error)
  from pycocoevalcap.meteor.meteor import Meteor

  def clean(text: str) -> str:
    return " ".join(text.replace("|||", " ").split())

  corpus, items = Meteor().compute_score(
    {i: [clean(text) for text in texts] for i, texts in enumerate(references)},
    {i: [clean(text)] for i, text in enumerate(captions)},
  )
  return Scored(float(corpus), tuple(float(v) for v in items))


def _spice(
  references: Sequence[Sequence[str]], captions: Sequence[str], home: Path | None
) -> Scored | str:
  """SPICE 1.0 with the user's CoreNLP, or why there is none.

  pycocoevalcap's own wrapper downloads CoreNLP, and writes into its installation.

  Raises:
    InputError: the folder is not one with both files.
  """
  if home is None:
    return f"its CoreNLP 3.6.0 is in no package; --spice-home takes a folder with {CORENLP[0]}"
  for name in CORENLP:
    if not (home / name).is_file():
      raise InputError(
        f"--spice-home {home}: no {name}; accepted: the unpacked stanford-corenlp-full-2015-12-09"
      )
  try:
    spice = _java_home() / "spice"
  except InputError as error:
    return str(error)
  jars = [spice / "spice-1.0.jar", spice / "lib" / "*", *(home.resolve() / n for n in CORENLP)]
  opens = " ".join(f"--add-opens=java.base/java.{name}=ALL-UNNAMED" for name in _OPENED)
  records = [
    {"image_id": i, "test": text, "refs": list(texts)}
    for i, (texts, text) in enumerate(zip(references, captions, strict=True))
  ]
  with tempfile.TemporaryDirectory() as folder:
    source, scores = Path(folder, "captions.json"), Path(folder, "scores.json")
    source.write_text(json.dumps(records), encoding="utf-8")
    command = [
      "java",
      "-Xmx8G",
      "-cp",
      os.pathsep.join(map(str, jars)),
      "edu.anu.spice.SpiceScorer",
    ]
    done = subprocess.run(
      [*command, str(source), "-out", str(scores), "-subset", "-silent"],
      capture_output=True,
      text=True,
      cwd=folder,
      env={**os.environ, "JDK_JAVA_OPTIONS": opens},  # Java 8, which knows no opens, ignores it
    )
    if done.returncode or not scores.is_file():
      lines = [line for line in done.stderr.splitlines() if "JDK_JAVA_OPTIONS" not in line]
      return f"SPICE's program failed: {lines[0] if lines else f'exit code {done.returncode}'}"
    return spice_scores(scores.read_text(encoding="utf-8"), len(captions))


def spice_scores(text: str, count: int) -> Scored | str:
  """The scores in what SPICE's program writes, in the order of the captions."""
  by_id = {record["image_id"]: float(record["scores"]["All"]["f"]) for record in json.loads(text)}
  lost = [i for i in range(count) if not math.isfinite(by_id.get(i, math.nan))]
  if lost:
    return f"SPICE's program gave no score for {len(lost)} of {count} captions"
  items = tuple(by_id[i] for i in range(count))
  return Scored(sum(items) / count, items)


def _bleu_interval(
  references: Sequence[Sequence[str]], captions: Sequence[str], videos: Sequence[str], order: int
) -> Interval:
  """Cluster bootstrap of the corpus score: the counts of the drawn videos, added up."""
  names = {v: i for i, v in enumerate(dict.fromkeys(videos))}
  sums = np.zeros((len(names), 2 * ORDERS + 2))
  for texts, caption, video in zip(references, captions, videos, strict=True):
    matches, guesses, length, closest = bleu_counts(texts, caption)
    sums[names[video]] += [*matches, *guesses, length, closest]
  drawn = [
    bleu_from_counts(row[:ORDERS], row[ORDERS : 2 * ORDERS], row[-2], row[-1])[order - 1]
    for times in resampled(len(names), BLEU_DRAWS)
    for row in times @ sums
  ]
  low, high = np.quantile(drawn, [0.025, 0.975])
  return Interval(float(low), float(high))


def _record(
  p: Prediction,
  place: int | None,
  captions: Sequence[str],
  scored: Mapping[str, Scored | str],
) -> dict[str, Any]:
  """A prediction's record; `place` is its own among the captions, None where it is left out."""
  if place is None:
    problem = None if p.error else "left out by the length filter"
    return item_record(p, gt=p.truth, problem=problem, scores={})
  scores = {name: s.items[place] for name, s in scored.items() if isinstance(s, Scored)}
  return item_record(p, parsed=captions[place], gt=p.truth, score=scores["CIDEr"], scores=scores)


CAPTION = Kind(
  name="caption",
  score=lambda benchmark, predictions, run, settings: score(
    benchmark, predictions, run, settings.parser, settings.captions
  ),
  headline=("CIDEr", "All"),
  columns="",
  unit="Times 100",
  axis=("0", "20", "40", "60", "80", "100"),
  bars_title="Metrics",
  bars_text="Times 100; CIDEr may exceed 100 and is then cut off here.",
  item_scores=lambda record: [(n, f"{100 * v:.1f}") for n, v in (record["scores"] or {}).items()],
  item_mark=lambda score: f"CIDEr {100 * score:.1f}",
)
