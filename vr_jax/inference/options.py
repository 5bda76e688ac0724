"""What a user chooses for an answer; without jax, for the --help of `vr ask`."""

import dataclasses
import math
from dataclasses import field
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from data_pipes.errors import InputError, shown
from data_pipes.masks import GRID_RULES

if TYPE_CHECKING:
  from vr_jax.inference.sampling import Sampling

WEIGHTS = ("float32", "bfloat16", "int8")
STOPS = 4  # the most stop strings of a request
ALTERNATIVES = 5  # the most alternatives of a token that log-probabilities are given of
# The whole numbers among the options, with the least and the greatest value.
WHOLE = {
  "max_new_tokens": (1, 1 << 20),
  "top_k": (0, (1 << 31) - 1),
  "seed": (0, (1 << 32) - 1),
  "scene_frames": (1, 1 << 20),
  "batch_size": (1, 1 << 20),
  "logprobs": (0, ALTERNATIVES),
}
# What `vr ask` and `vr eval` have in common, as their --help prints it.
NEW_TOKENS = {"help": "the most tokens of an answer", "metavar": "N"}
SCENE_FRAMES = {"help": "default: as many as in training", "metavar": "N"}
BATCH_SIZE = {"help": "answers at once", "metavar": "N"}
MASK_RULE = {
  "help": "masks on the tower's grid: keep (default) leaves every object a cell, published may not",
  "choices": GRID_RULES,
}


@dataclasses.dataclass(frozen=True)
class Options:
  """How to answer; the keywords of `ask`, `ask_many`, `answer_each`, `stream` and `warm_up`.

  Attributes:
    max_new_tokens: the most tokens of an answer.
    temperature, top_k, top_p: of `Sampling`; temperature 0 is greedy.
    seed: sampled answers are a function of it and of the request's place in the list.
    scene_frames: frames of the scene; None is as many as in training.
    batch_size: answers under way at once. Greedy answers do not depend on what else is asked, nor
      on how many requests there are; with 1 a single answer comes soonest.
    repetition_penalty: of `Sampling`; None is the checkpoint's.
    stop: texts that end an answer, at most four; the answer ends before the first.
    logprobs: give the log-probability of each token, and of so many of the likeliest in its place
      (0 to 5); None: none.
    literal: control tokens in questions, such as <|im_end|> or <video>, are ordinary text; else
      they mean what they mean in the model's own prompts.
    share: questions about one video share what is computed of it. Off, each is computed by itself;
      the answers are the same.
    mask_rule: how masks come onto the tower's grid, as `input.mask_rule` in training: "keep"
      (default) leaves every object at least one cell, "published" may lose small ones, "area".

  Raises:
    InputError: a value that is none of the accepted ones.
  """

  max_new_tokens: int = field(default=256, metadata=NEW_TOKENS)
  temperature: float = field(default=0.0, metadata={"help": "0 (default) is greedy"})
  top_k: int = field(
    default=0,
    metadata={"help": "sample from the K likeliest tokens; 0 (default): from all", "metavar": "K"},
  )
  top_p: float = field(
    default=1.0,
    metadata={"help": "sample from the likeliest tokens that hold this share", "metavar": "P"},
  )
  seed: int = field(default=0, metadata={"help": "of the sampling"})
  scene_frames: int | None = field(default=None, metadata=SCENE_FRAMES)
  batch_size: int = field(default=8, metadata=BATCH_SIZE)
  repetition_penalty: float | None = field(
    default=None,
    metadata={"help": "of generated tokens (default: the checkpoint's; 1: off)", "metavar": "X"},
  )
  stop: tuple[str, ...] = ()
  logprobs: int | None = None
  literal: bool = field(
    default=False,
    metadata={"help": "control tokens in the question, such as <|im_end|>, are ordinary text"},
  )
  share: bool = True
  mask_rule: str = field(default="keep", metadata=MASK_RULE)

  def __post_init__(self):
    if not isinstance(self.mask_rule, str) or self.mask_rule not in GRID_RULES:
      raise InputError(f"mask_rule={shown(self.mask_rule)}; accepted: {', '.join(GRID_RULES)}")
    for name in ("share", "literal"):
      if not isinstance(getattr(self, name), bool):
        raise InputError(f"{name}={shown(getattr(self, name))}; accepted: True, False")
    for name, (low, high) in WHOLE.items():
      value = getattr(self, name)
      if name in ("scene_frames", "logprobs") and value is None:
        continue
      if not _is_number(value, Integral) or not low <= value <= high:
        raise InputError(f"{name}={shown(value)}; accepted: a whole number from {low} to {high}")
    if not _is_number(self.temperature, Real) or not 0 <= self.temperature < math.inf:
      raise InputError(f"temperature={shown(self.temperature)}; accepted: 0 (greedy) or more")
    if not _is_number(self.top_p, Real) or not 0 < self.top_p <= 1:
      raise InputError(f"top_p={shown(self.top_p)}; accepted: above 0, up to 1 (off)")
    penalty = self.repetition_penalty
    if penalty is not None and not (_is_number(penalty, Real) and 0 < penalty < math.inf):
      raise InputError(f"repetition_penalty={shown(penalty)}; accepted: above 0; 1 is off")
    stop = (self.stop,) if isinstance(self.stop, str) else self.stop
    texts = isinstance(stop, list | tuple) and all(isinstance(s, str) and s for s in stop)
    if not texts or len(stop) > STOPS:
      raise InputError(
        f"stop={shown(self.stop)}; accepted: up to {STOPS} texts, none of them empty"
      )
    object.__setattr__(self, "stop", tuple(stop))

  @property
  def row_tokens(self) -> int:
    """New tokens that a row has room for: a power of two, so that few programs are needed."""
    return max(16, 1 << (self.max_new_tokens - 1).bit_length())

  def sampling(self, default: "Sampling") -> "Sampling":
    penalty = self.repetition_penalty
    return dataclasses.replace(
      default,
      temperature=self.temperature,
      top_k=self.top_k,
      top_p=self.top_p,
      repetition_penalty=default.repetition_penalty if penalty is None else penalty,
      scored=self.logprobs is not None,
    )


def _is_number(value: Any, kind: type) -> bool:
  return isinstance(value, kind) and not isinstance(value, bool)
