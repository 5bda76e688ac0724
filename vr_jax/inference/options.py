"""What a user chooses for an answer; without jax, for the --help of `vr ask`."""

import dataclasses
from typing import TYPE_CHECKING

from data_pipes.errors import InputError
from data_pipes.masks import GRID_RULES

if TYPE_CHECKING:
  from vr_jax.inference.sampling import Sampling

WEIGHTS = ("float32", "bfloat16", "int8")


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
    share: questions about one video share what is computed of it. Off, each is computed by itself;
      the answers are the same.
    mask_rule: how masks come onto the tower's grid, as `input.mask_rule` in training: "keep"
      (default) leaves every object at least one cell, "published" may lose small ones, "area".
  """

  max_new_tokens: int = 256
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  seed: int = 0
  scene_frames: int | None = None
  batch_size: int = 8
  share: bool = True
  mask_rule: str = "keep"

  def __post_init__(self):
    if self.mask_rule not in GRID_RULES:
      raise InputError(f"mask_rule={self.mask_rule!r}; accepted: {', '.join(GRID_RULES)}")
    for name in ("max_new_tokens", "batch_size"):
      if getattr(self, name) < 1:
        raise InputError(f"{name}={getattr(self, name)}; accepted: 1 or more")

  def sampling(self, default: "Sampling") -> "Sampling":
    try:
      return dataclasses.replace(
        default, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p
      )
    except ValueError as error:
      raise InputError(str(error)) from None
