"""The command line of the data engine, and our model as one of its agents."""

import argparse
import functools
import json
import re
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from data_pipes.engine import command, prompts
from data_pipes.engine.graph import StopRun
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
from vr_jax.configs import load_config

STOPPED = 3  # exit code: out of budget, endpoint down, disk full


def engine(args: argparse.Namespace) -> int:
  """Runs one step of `vr engine`; returns the exit code."""
  try:
    lines, values = _STEPS[args.step](args)
  except StopRun as stop:
    print(f"vr engine: stopped: {stop}", file=sys.stderr)
    return STOPPED
  print(json.dumps(values, indent=1) if args.json else "\n".join(lines))
  return STOPPED if args.step == "probe" and not all(one["usable"] for one in values) else 0


def _run(args: argparse.Namespace):
  config = load_config(args.config, args.overrides)
  with config.unlocked():
    if args.limit is not None:
      config.input.limit = args.limit
    if args.shards is not None:
      config.shards = args.shards
  show = sys.stderr.isatty() and not args.json

  def report(line: str) -> None:
    if show:
      print(f"\r\x1b[2K{line[:180]}", end="", file=sys.stderr, flush=True)

  summary = command.run(
    config,
    args.workdir,
    budget_usd=args.budget_usd,
    retry_quarantined=args.retry_quarantined,
    runner=args.runner,
    address=args.address,
    only=args.only,
    command=_array_command(args),
    report=report,
  )
  if show:
    print(file=sys.stderr)
  if "commands" in summary:
    return summary["commands"], summary
  return command.status_lines(summary), summary


def _probe(args: argparse.Namespace):
  from data_pipes.engine.backends.probe import lines

  probed = command.probe(load_config(args.config, args.overrides))
  return lines(probed), [asdict(one) for one in probed]


def _array_command(args: argparse.Namespace) -> str:
  import shlex

  words = ["vr", "engine", "run", "--config", args.config, "--workdir", args.workdir]
  for flag, value in (("--budget-usd", args.budget_usd), ("--limit", args.limit)):
    words += [flag, str(value)] if value is not None else []
  return shlex.join([*words, *(f"--{override}" for override in args.overrides)])


def _status(args: argparse.Namespace):
  found = command.status(args.workdir)
  return command.status_lines(found), found


def _report(args: argparse.Namespace):
  from data_pipes.engine import report

  path, numbers = report.write_report(args.workdir)
  return [str(path)], numbers


def _review(args: argparse.Namespace):
  from data_pipes.engine import review
  from vr_jax.evaluation.scoring import reviewer

  if args.verdicts is None:
    paths = review.write_sample(args.workdir, args.n, args.seed)
    return [str(p) for p in paths], {"files": [str(p) for p in paths]}
  judged, accepted = review.read_verdicts(args.workdir, args.verdicts)
  table = reviewer.review(judged, accepted)
  return reviewer.lines(table), table.to_dict()


_STEPS = {
  "probe": _probe,
  "run": _run,
  "status": _status,
  "report": _report,
  "review": _review,
}


class VideoReferAgent:
  """A VideoRefer model as Annotator, region describer or judge.

  In an engine config: {"kind": "python", "target": "vr_jax.agent:VideoReferAgent",
  "checkpoint": folder}; without a checkpoint the packaged vr-mini, which knows its own little world
  only.
  """

  needs_masks = True

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
      "version": model_version(options.get("checkpoint") or VR_MINI),
    }

  def _ask(self, clip: Clip, masks: Masks, prompt: str, **values: str) -> str:
    from vr_jax.inference.model import Request

    seen = {n: m.astype("uint8") for n, m in masks.items() if m.any()}
    request = Request(clip.path, prompts.render(prompt, **values).strip(), annotation=[seen])
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
    """Looks at the object itself and not at the region's text; says no more than yes or no."""
    said = self._ask(
      claim.clip, claim.masks, _PROMPTS[3], annotated=prompts.as_data(claim.annotated)
    )
    word = re.match(r"\W*(yes|no)\b", said.lower())
    if word is None:
      raise InputError(f"videorefer: found {said[:80]!r}; accepted: yes or no")
    return Verdict(word[1] == "yes", f"the model says {said.strip()[:120]!r}", 1.0)


_loading = threading.Lock()


@functools.cache
def _load(checkpoint: str | None) -> tuple[Any, threading.Lock]:
  """A model and whose turn it is: all roles of a process share one."""
  from vr_jax.loading import load

  return load(checkpoint), threading.Lock()


_PROMPTS = (
  "videorefer/motion@v1",
  "videorefer/appearance@v1",
  "videorefer/region@v1",
  "videorefer/same_object@v1",
)
