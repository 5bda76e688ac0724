"""The choices of a user for `vr score`."""

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class JudgeSettings:
  """How Bench-D is judged; see `judge.open_judge` and `judge.Judge`.

  `max_failed`: the share of descriptions without scores above which the result is no result.
  """

  spec: str = ""
  model: str = ""
  key_variable: str = "OPENAI_API_KEY"
  allow_alias: bool = False
  prompt: Path | None = None
  temperature: float | None = None
  repeats: int = 1
  budget: int | None = None
  concurrency: int = 8
  tries: int = 5
  timeout: float = 120.0
  first_pause: float = 1.0
  max_failed: float = 0.05


@dataclasses.dataclass(frozen=True)
class CaptionSettings:
  """How captions are scored.

  Attributes:
    tokenizer: "ptb-py" (ours) or "ptb-jar" (Stanford's, extra [java]).
    meteor: computed where Java and the extra are there.
    length_filter: "artemis" leaves out predictions of at most 5 or at least 300 characters before
      scoring, as the source of the paper's baseline rows does.
    spice_home: a folder with the two CoreNLP files of SPICE; None leaves SPICE out.
  """

  tokenizer: str = "ptb-py"
  meteor: bool = True
  length_filter: str = "none"
  spice_home: Path | None = None
