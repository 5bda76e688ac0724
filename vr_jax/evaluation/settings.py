"""What a user chooses for `vr eval` and `vr score`; without jax, for their --help."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipes.errors import InputError
from vr_jax.evaluation.items import MODES

if TYPE_CHECKING:
  from vr_jax.evaluation.benchmarks.registry import Benchmark
  from vr_jax.inference.model import Model

PUBLISHED_FRAMES = 8  # of the scene, on region tasks (B1)
PUBLISHED_TOKENS = 2048
TOKENIZERS = ("ptb-py", "ptb-jar")
FILTERS = ("none", "artemis")


@dataclasses.dataclass(frozen=True)
class Settings:
  """How the questions are asked; with what is None left to `resolve`.

  Attributes:
    mode: "single" or "multi" mask frames; no difference where no objects are named.
    scene_frames: frames of the scene; None for as many as in training.
    mask_rule: of `inference.model.Options`.
    published: the choices of the published scripts: 8 scene frames on region tasks, up to 2048
      new tokens, their mask rule.
  """

  mode: str = "multi"
  scene_frames: int | None = None
  max_new_tokens: int | None = None
  batch_size: int = 8
  mask_rule: str | None = None
  published: bool = False
  subtitles: bool = False

  def resolve(self, of: "Benchmark", model: "Model") -> "Settings":
    if self.mode not in MODES:
      raise InputError(f"mode {self.mode!r}; accepted: {', '.join(MODES)}")
    frames, tokens = self.scene_frames, self.max_new_tokens
    rule = self.mask_rule or ("published" if self.published else "keep")
    if frames is None:
      frames = PUBLISHED_FRAMES if self.published and of.regions else model.cfg.num_frames
    if tokens is None:
      tokens = PUBLISHED_TOKENS if self.published else of.new_tokens
    for name, value, least in (
      ("scene_frames", frames, 2),
      ("max_new_tokens", tokens, 1),
      ("batch_size", self.batch_size, 1),
    ):
      if value < least:
        raise InputError(f"{name}={value}; accepted: {least} or more")
    return dataclasses.replace(self, scene_frames=frames, max_new_tokens=tokens, mask_rule=rule)


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
