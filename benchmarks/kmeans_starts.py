"""How much answers move with the cells that k-means starts from.

    python benchmarks/kmeans_starts.py --checkpoint W/stage2    # minutes on two cores

The published code draws the start at random, so that its answer to one question may change from run
to run; ours begins with evenly spaced cells. Questions of the embedded Bench-Q, single-frame, are
answered from the even start and from random ones, greedily. Printed are the share of answers that
move, of questions with more than one answer, and what that does to the accuracy. Objects of no more
cells than tokens are not clustered: questions about them alone are left out.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path

import numpy as np

import vr_jax
from data_pipes.embedded.make_set import make_set
from data_pipes.errors import InputError
from data_pipes.navit_rows import Sample
from data_pipes.navit_samples import question_sample
from data_pipes.video import open_video
from vr_jax.evaluation.answers import grade
from vr_jax.evaluation.benchmarks.registry import benchmark, read
from vr_jax.inference.options import Options
from vr_jax.inference.picture_reading import started
from vr_jax.inference.pictures import PictureModel

CLIPS, MODE = 12, "single"


def from_random_starts(sample: Sample, tokens: int, rng: np.random.Generator) -> Sample:
  """The sample with other cells for k-means to start from, drawn as published."""
  starts = [
    rng.permutation(crop.cells)[:tokens].tolist() if crop.cells > tokens else []
    for crop in sample.objects
  ]
  return dataclasses.replace(sample, objects=started(sample.objects, starts))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--checkpoint", required=True, help="a model of PixelRefer's kind")
  parser.add_argument("--questions", type=int, default=60)
  parser.add_argument("--starts", type=int, default=5, help="random ones beside the even start")
  args = parser.parse_args()
  model = vr_jax.load(args.checkpoint)
  if not isinstance(model, PictureModel):
    raise InputError(f"{args.checkpoint}: {model.cfg.name} joins no cells; accepted: PixelRefer")
  rules, tokens = model.rules(Options()), model.cfg.region.tokens
  rng = np.random.default_rng(0)
  with tempfile.TemporaryDirectory() as folder:
    data = make_set(Path(folder), 0, CLIPS, args.questions, 0)
    items = read(benchmark("bench-q"), data, region=model.cfg.region.kind).items
    samples = []
    for item in items:
      request = item.request(data, MODE, 0)
      video = open_video(request.video)
      objects = request.annotation
      samples.append(question_sample(video, request.question, model.tokenizer, rules, objects)[1])
  clustered = np.array([any(c.cells > tokens for c in s.objects) for s in samples])
  asked = [
    [sample, *(from_random_starts(sample, tokens, rng) for _ in range(args.starts))]
    for sample, counts in zip(samples, clustered, strict=True)
    if counts
  ]
  ids = model.answer_samples([s for some in asked for s in some], max_new_tokens=24)
  texts = [model.tokenizer.decode(answer, skip_special=True).strip() for answer in ids]
  answers = np.array(texts).reshape(len(asked), 1 + args.starts)
  of_items = [item for item, counts in zip(items, clustered, strict=True) if counts]
  correct = np.array(
    [
      [grade(text, str(item.truth), item.options).correct for text in some]
      for item, some in zip(of_items, answers, strict=True)
    ]
  )
  shares = correct.mean(0)
  lines = (
    f"{len(items)} questions, of {clustered.sum()} an object is clustered to {tokens} tokens",
    f"answers unlike that of the even start: {(answers != answers[:, :1])[:, 1:].mean():.1%}",
    f"questions with more than one answer: {(answers != answers[:, :1]).any(1).mean():.1%}",
    f"different answers of one question: up to {max(len(set(some)) for some in answers)}",
    f"accuracy: {shares[0]:.1%} from the even start, {shares[1:].min():.1%} to "
    f"{shares[1:].max():.1%} from random ones",
  )
  print("\n".join(lines))


if __name__ == "__main__":
  main()
