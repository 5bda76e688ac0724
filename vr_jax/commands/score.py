"""`vr score`: predictions to scores, and one result against another."""

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from vr_jax.evaluation.answers import PARSERS
from vr_jax.evaluation.benchmarks import registry
from vr_jax.evaluation.settings import CaptionSettings, JudgeSettings

REVIEWER = "reviewer"  # in a benchmark's place: the reviewer agent against people (Table 8)


def subjects() -> tuple[str, ...]:
  """What can be scored."""
  return (*registry.names(), REVIEWER)


@dataclass(frozen=True)
class Scoring:
  benchmark: str = field(
    metadata={
      "positional": True,
      "help": "what was asked; reviewer: records with reviewer and manual, true or false",
      "choices": subjects,
    }
  )
  predictions: str = field(
    metadata={"positional": True, "help": "of vr eval, or a published-shape file", "metavar": "O"}
  )
  parser: str = field(
    default="strict",
    metadata={"help": "how answers are read (default: %(default)s)", "choices": PARSERS},
  )
  out: str | None = field(default=None, metadata={"help": "folder of the result (default: in O)"})
  against: str | None = field(
    default=None,
    metadata={"help": "a result folder to compare with, item by item", "metavar": "R"},
  )
  common: bool = field(default=False, metadata={"help": "compare the items that both have"})
  accept_rate: float | None = field(
    default=None, metadata={"help": "reviewer: re-weight to it", "metavar": "SHARE"}
  )
  json: bool = field(default=False, metadata={"help": "print result.json"})


def run(options: Scoring, judge: JudgeSettings, captions: CaptionSettings) -> None:
  if options.benchmark == REVIEWER:
    return _score_reviewer(options)
  from vr_jax.evaluation.pages.terminal import comparison_table, headline, table
  from vr_jax.evaluation.results import load, to_dict
  from vr_jax.evaluation.score import score
  from vr_jax.evaluation.scoring.comparison import compare

  result, folder = score(
    options.benchmark,
    options.predictions,
    options.parser,
    out=options.out,
    judge=judge,
    captions_by=captions,
    progress=lambda text: print(text, file=sys.stderr, flush=True),
  )
  against = compare(result, load(options.against), options.common) if options.against else []
  if options.json:
    content = to_dict(result)
    if against:
      content["against"] = [dataclasses.asdict(c) for c in against]
    print(json.dumps(content, indent=2, ensure_ascii=False))
    return None
  if result.printed:
    print(result.printed)
  print("\n".join(table(result)))
  if against:
    print("\n".join(comparison_table(against, headline(result).unit)))
  print(f"{folder / 'result.json'}")
  return None


def _score_reviewer(options: Scoring) -> None:
  from vr_jax.evaluation.scoring.reviewer import reviewer_table, score_reviewer

  counts = score_reviewer(Path(options.predictions), options.accept_rate)
  text = json.dumps(dataclasses.asdict(counts), indent=2)
  print(text if options.json else "\n".join(reviewer_table(counts)))
