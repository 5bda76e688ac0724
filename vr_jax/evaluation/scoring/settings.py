"""The settings that every kind of scoring is given."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from vr_jax.evaluation.settings import CaptionSettings, JudgeSettings


@dataclasses.dataclass(frozen=True)
class ScoreSettings:
  """All that the kinds of benchmarks take.

  Attributes:
    source: the run folder or the file of predictions.
    home: the folder that results and logs of replies go to.
    progress: called with a line of text now and then.
  """

  parser: str
  source: Path
  home: Path
  judge: JudgeSettings
  captions: CaptionSettings
  progress: Callable[[str], None]
