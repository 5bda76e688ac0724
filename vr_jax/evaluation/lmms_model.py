"""The model class that lmms-eval makes; only lmms-eval imports this file."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from loguru import logger

from data_pipes.errors import InputError
from data_pipes.tokenizer import REGION
from vr_jax.inference.requests import Request
from vr_jax.loading import load


class VRJax(lmms):
  """`--model vr_jax --model_args checkpoint=C,scene_frames=16,mask_rule=keep --batch_size 8`."""

  def __init__(
    self,
    checkpoint: str | None = None,
    scene_frames: int | str | None = None,
    mask_rule: str = "keep",
    weights: str | None = None,
    batch_size: int | str = 8,
    device: str | None = None,
    max_batch_size: int | None = None,
  ):
    """`device` and `max_batch_size` are lmms-eval's; JAX chooses the device itself."""
    super().__init__()
    self.model = load(checkpoint, weights=weights)
    self.mask_rule = mask_rule
    self.scene_frames = None if scene_frames is None else int(scene_frames)
    self.batch_size = int(batch_size)

  def generate_until(self, requests: Sequence[Instance]) -> list[str]:
    """Greedy answers, cut at the task's stop words; "" and a line in the log for the unusable."""
    answers: list[str] = []
    refused = 0
    for (tokens, stops), group in itertools.groupby(requests, lambda r: _settings(r.args[1])):
      questions = [self._request(*r.args) for r in group]
      texts = [""] * len(questions)
      for i, answer in self.model.answer_each(
        questions,
        max_new_tokens=tokens,
        scene_frames=self.scene_frames,
        mask_rule=self.mask_rule,
        batch_size=self.batch_size,
      ):
        if isinstance(answer, InputError):
          refused += 1
          logger.warning(f"vr_jax: {answer}")
          continue
        texts[i] = answer.text
        for stop in stops:
          texts[i] = texts[i].split(stop)[0]
      answers += texts
    if refused:
      logger.warning(f"vr_jax: {refused} of {len(answers)} could not be asked; their answer is ''")
    return answers

  def _request(self, context: str, _, doc_to_visual, doc_id, task, split) -> Request:
    visuals = doc_to_visual(self.task_dict[task][split][doc_id])
    if len(visuals) != 1:
      raise InputError(f"{task}: {len(visuals)} visuals for one question; accepted: one")
    visual = visuals[0]
    if isinstance(visual, dict):  # ours, see `lmms.doc_to_visual`
      return Request(visual["video"], context, annotation=visual["annotation"])
    if REGION in context:
      raise InputError(f"{task}: a question with {REGION} but no masks")
    if hasattr(visual, "convert"):  # an image
      visual = np.asarray(visual.convert("RGB"))[None]
    return Request(visual, context)

  def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
    raise InputError("vr_jax answers in text; accepted: tasks of output_type generate_until")

  def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
    raise InputError("vr_jax answers one turn; accepted: tasks of output_type generate_until")


def _settings(arguments: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
  stops = arguments.get("until") or ()
  stops = (stops,) if isinstance(stops, str) else tuple(s for s in stops if s.strip())
  return int(arguments.get("max_new_tokens") or 256), stops
