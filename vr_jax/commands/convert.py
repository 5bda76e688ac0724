"""`vr convert`: weights of one format into another, with proof."""

import json
import sys
from dataclasses import asdict, dataclass, field

from vr_jax.interop.options import ConvertOptions


@dataclass(frozen=True)
class Convert:
  source: str = field(
    metadata={
      "positional": True,
      "help": "weights of any known format; see docs",
      "metavar": "SRC",
    }
  )
  result: str = field(
    metadata={
      "positional": True,
      "help": "a folder (big_vision: a file) to write",
      "metavar": "DST",
    }
  )
  to: str = field(
    metadata={"help": "vr, videorefer, hf, torch, big_vision or peft", "metavar": "FORMAT"}
  )
  json: bool = field(default=False, metadata={"help": "print parity.json"})


def run(weights: Convert, options: ConvertOptions) -> int:
  from vr_jax.interop.convert import convert, summary

  parity = convert(
    weights.source,
    weights.result,
    weights.to,
    report=lambda line: print(line, file=sys.stderr),
    **asdict(options),
  )
  print(json.dumps(parity, indent=2) if weights.json else summary(parity, weights.result))
  return int(not parity["passed"])
