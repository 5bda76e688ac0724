"""Our model as an agent of the data engine."""

import functools
import math
import threading
from collections.abc import Mapping
from typing import Any

from data_pipes.engine import prompts
from data_pipes.engine.quality import text as quality
from data_pipes.engine.roles import (
  Claim,
  Clip,
  Context,
  Description,
  Masks,
  Verdict,
  model_version,
)
from data_pipes.errors import InputError
from vr_jax.assets import VR_MINI


class VideoReferAgent:
  """A VideoRefer model as Annotator, region describer or judge.

  In an engine config: {"kind": "python", "target": "vr_jax.agent:VideoReferAgent",
  "checkpoint": folder}; without a checkpoint the packaged vr-mini, which knows its own little world
  only.
  """

  needs_masks = True
  hub_models = ("checkpoint",)

  def __init__(self, context: Context, checkpoint: str | None = None, max_new_tokens: int = 128):
    with _loading:
      self.model, self.turn = _load(checkpoint)
    self.language, self.max_new_tokens = context.language, max_new_tokens

  @staticmethod
  def identity(options: Mapping[str, Any], context: Context) -> dict[str, Any]:
    return {
      "backend": f"videorefer {options.get('checkpoint') or 'vr-mini'}",
      "prompts": {name: prompts.prompt_hash(name) for name in _PROMPTS},
      "options": dict(options),
      "verdict": "likelihood",
      "version": model_version(options.get("checkpoint") or VR_MINI),
    }

  def _request(self, clip: Clip, masks: Masks, prompt: str, **values: str) -> Any:
    from vr_jax.inference.model import Request

    seen = {n: m.astype("uint8") for n, m in masks.items() if m.any()}
    return Request(clip.path, prompts.render(prompt, **values).strip(), annotation=[seen])

  def _ask(self, clip: Clip, masks: Masks, prompt: str, **values: str) -> str:
    request = self._request(clip, masks, prompt, **values)
    with self.turn:
      (answer,) = self.model.ask_many([request], max_new_tokens=self.max_new_tokens)
    fault = quality.fault(answer.text, self.language, least=1)
    if fault:
      raise InputError(f"videorefer: {fault}")
    return answer.text

  def describe(self, clip: Clip, noun: str, masks: Masks | None) -> Description:
    """Both texts from one object, asked for one after the other."""
    if not masks:
      raise InputError("VideoRefer describes marked objects: use order 'mask_first'")
    motion, looks = (self._ask(clip, masks, prompt) for prompt in _PROMPTS[:2])
    return Description(motion, looks, static=False)

  def region(self, clip: Clip, masks: Masks, frame: int) -> str:
    return self._ask(clip, {frame: masks[frame]}, _PROMPTS[2])

  def compare(self, claim: Claim) -> Verdict:
    """Looks at the object itself and not at the region's text.

    Nothing is written: the verdict is the likelier of yes and no, and the confidence its share of
    the likelihood of both.
    """
    annotated = prompts.as_data(claim.annotated)
    request = self._request(claim.clip, claim.masks, _PROMPTS[3], annotated=annotated)
    with self.turn:
      (scores,) = self.model.choices([request], [_ANSWERS])
    likelihoods = [math.exp(score - max(scores)) for score in scores]
    yes = sum(likelihoods[:2]) / sum(likelihoods)
    return Verdict(yes >= 0.5, f"the model holds yes for {yes:.0%} likely", max(yes, 1 - yes))


_loading = threading.Lock()


@functools.cache
def _load(checkpoint: str | None) -> tuple[Any, threading.Lock]:
  """A model and whose turn it is: all roles of a process share one."""
  from vr_jax.loading import load

  return load(checkpoint), threading.Lock()


_ANSWERS = ("yes", "Yes", "no", "No")  # a model may write either
_PROMPTS = (
  "videorefer/motion@v1",
  "videorefer/appearance@v1",
  "videorefer/region@v1",
  "videorefer/same_object@v1",
)
