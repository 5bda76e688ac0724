"""What a user chooses for `vr eval` and `vr score`; without jax, for their --help."""

import dataclasses
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipes.errors import InputError
from vr_jax.evaluation.items import MODES
from vr_jax.inference.options import BATCH_SIZE, MASK_RULE, NEW_TOKENS, SCENE_FRAMES

if TYPE_CHECKING:
  from vr_jax.evaluation.benchmark import Benchmark
  from vr_jax.inference.model import Model

PUBLISHED_FRAMES = 8  # of the scene, on region tasks (B1)
PUBLISHED_TOKENS = 2048
TOKENIZERS = ("ptb-py", "ptb-jar")
FILTERS = ("none", "artemis")
WAYS = ("generation", "likelihood")


@dataclasses.dataclass(frozen=True)
class Settings:
  """How the questions are asked; with what is None left to `resolve`.

  Attributes:
    mode: "single" or "multi" mask frames; no difference where no objects are named.
    scene_frames: frames of the scene; None for as many as in training.
    mask_rule: of `inference.options.Options`.
    by: "generation", or "likelihood": no text, but the option whose letter is the likeliest answer.
    published: the choices of the published scripts: 8 scene frames on region tasks, up to 2048
      new tokens, their mask rule.
  """

  mode: str = field(default="multi", metadata={"help": "mask frames", "choices": MODES})
  scene_frames: int | None = field(default=None, metadata=SCENE_FRAMES)
  max_new_tokens: int | None = field(default=None, metadata=NEW_TOKENS)
  batch_size: int = field(default=8, metadata=BATCH_SIZE)
  mask_rule: str | None = field(default=None, metadata=MASK_RULE)
  by: str = field(
    default="generation",
    metadata={
      "help": "multiple choice: what the model writes (default), or its likeliest option",
      "choices": WAYS,
    },
  )
  published: bool = field(
    default=False,
    metadata={"help": "as the published scripts: 8 scene frames, 2048 tokens, their mask rule"},
  )
  subtitles: bool = field(default=False, metadata={"help": "videomme: with subtitles"})

  def resolve(self, benchmark: "Benchmark", model: "Model") -> "Settings":
    if self.mode not in MODES:
      raise InputError(f"mode {self.mode!r}; accepted: {', '.join(MODES)}")
    if self.by not in WAYS:
      raise InputError(f"--by {self.by!r}; accepted: {', '.join(WAYS)}")
    if self.by == "likelihood" and not benchmark.kind.graded:
      raise InputError(f"--by likelihood: {benchmark.title} has no options to choose from")
    frames, tokens = self.scene_frames, self.max_new_tokens
    rule = self.mask_rule or ("published" if self.published else "keep")
    if frames is None:
      frames = PUBLISHED_FRAMES if self.published and benchmark.regions else model.cfg.num_frames
    if tokens is None:
      tokens = PUBLISHED_TOKENS if self.published else benchmark.new_tokens
    for name, value, least in (
      ("scene_frames", frames, 2),
      ("max_new_tokens", tokens, 1),
      ("batch_size", self.batch_size, 1),
    ):
      if value < least:
        raise InputError(f"{name}={value}; accepted: {least} or more")
    return dataclasses.replace(self, scene_frames=frames, max_new_tokens=tokens, mask_rule=rule)


@dataclasses.dataclass(frozen=True)
class ReportOptions:
  """What a report shows besides the results.

  Attributes:
    data, media: where the benchmark lies now; by default where `vr eval` read it. Without it the
      gallery has no pictures.
    examples: items in the gallery.
    common: compare items that both results have, where they differ.
    format: "html" (the page and its tables in Markdown), or every table as "latex" or "csv".
  """

  data: str | None = field(
    default=None, metadata={"help": "the benchmark's folder, for the frames of the gallery"}
  )
  media: str | None = field(default=None, metadata={"help": "folder that video paths start from"})
  examples: int = field(default=24, metadata={"help": "in the gallery", "metavar": "N"})
  common: bool = field(default=False, metadata={"help": "compare the items that both have"})
  format: str = field(
    default="html",
    metadata={"help": "a page (default), or its tables", "choices": ("html", "latex", "csv")},
  )


@dataclasses.dataclass(frozen=True)
class JudgeSettings:
  """How Bench-D is judged; see `judge.open_judge` and `judge.Judge`.

  `max_failed`: the share of descriptions without scores above which the result is no result.
  """

  spec: str = field(
    default="",
    metadata={"flag": "--judge", "help": "bench-d", "metavar": "URL|replay:FILE|rule"},
  )
  model: str = field(
    default="",
    metadata={"flag": "--judge-model", "help": "as the endpoint names it", "metavar": "NAME"},
  )
  key_variable: str = field(
    default="OPENAI_API_KEY",
    metadata={
      "flag": "--judge-key-env",
      "help": "of the environment, with the key (default: %(default)s)",
      "metavar": "VARIABLE",
    },
  )
  prompt: Path | None = field(
    default=None,
    metadata={
      "flag": "--judge-prompt",
      "help": "a system prompt of your own",
      "metavar": "FILE",
    },
  )
  temperature: float | None = field(
    default=None,
    metadata={
      "flag": "--judge-temperature",
      "help": "default: 0, or 0.7 with --parser published",
      "metavar": "T",
    },
  )
  allow_alias: bool = field(default=False, metadata={"help": "a judge's name without a date"})
  repeats: int = field(default=1, metadata={"help": "judge each K times", "metavar": "K"})
  budget: int | None = field(
    default=None, metadata={"help": "of the judge; stop after them", "metavar": "TOKENS"}
  )
  concurrency: int = field(
    default=8, metadata={"help": "requests at a time (default: %(default)s)", "metavar": "N"}
  )
  tries: int = 5
  timeout: float = 120.0
  first_pause: float = 1.0
  max_failed: float = field(
    default=0.05,
    metadata={
      "help": "of descriptions without scores, above which the command fails "
      "(default: %(default)s)",
      "metavar": "SHARE",
    },
  )


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

  tokenizer: str = field(
    default="ptb-py",
    metadata={
      "help": "captions: ours (default), or Stanford's, which needs Java",
      "choices": TOKENIZERS,
    },
  )
  meteor: bool = field(
    default=True, metadata={"flag": "--no-meteor", "help": "captions without Java"}
  )
  spice_home: Path | None = field(
    default=None, metadata={"help": "CoreNLP 3.6.0, which SPICE needs", "metavar": "DIR"}
  )
  length_filter: str = field(
    default="none",
    metadata={
      "help": "artemis: captions of at most 5 or at least 300 characters are left out",
      "choices": FILTERS,
    },
  )
