"""Share of colour and shape questions answered rightly, by the size of the object at 480p.

    python benchmarks/small_objects.py [--checkpoint W/stage2]    # minutes on two cores

The embedded set's world at 640x480, in which all things of a scene have one size, 6 to 120 pixels
across (they are 75 to 120 in the set itself, which is 128x96, at this scale). Each thing whose
colour stays is asked about twice, with four options and one mask where it is seen best: chance is a
quarter. Posed are vr-mini with masks on its grid as published, vr-mini with "keep", which leaves
every object a cell, and with --checkpoint a model whose crops show objects larger.
"""

import argparse
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

import vr_jax
from data_pipes.embedded.dialogues import question_text
from data_pipes.embedded.make_set import TEST_SEED
from data_pipes.embedded.questions import BASIC, Balance, Choice, candidates
from data_pipes.embedded.render import render, write_video
from data_pipes.embedded.scenes import make_scene
from data_pipes.masks import encode_mask
from vr_jax.evaluation.answers import grade
from vr_jax.evaluation.benchmarks.registry import benchmark
from vr_jax.inference.model import Model

SCALE = 5  # 640x480
SIZES = (6, 8, 12, 18, 27, 40, 60, 120)  # pixels across
USUAL = 19.5  # units across of the set's things on average, for which stripes and dots are drawn
FIRST = TEST_SEED + 10_000_000
KINDS = ("colour", "shape")


class Posed(NamedTuple):
  """A question, its video, and the mask {frame: COCO segmentation} of its object."""

  size: int
  choice: Choice
  video: Path
  mask: dict[int, dict]


def ask_about(seed: int, size: int, balance: Balance, folder: Path) -> list[Posed]:
  """Writes the video of a scene whose things are `size` pixels across; the questions about it."""
  scene = make_scene(seed)
  for thing in scene.things:
    thing.radii[:] = size / 2 / SCALE
  frames, masks = render(scene, SCALE, marking=size / SCALE / USUAL)
  video = folder / f"{seed}.mp4"
  write_video(video, frames)
  best = masks.sum((2, 3)).argmax(1)
  questions = [q for q in candidates(scene) if q.kind == BASIC and q.template in KINDS]
  changing = {i for i, t in enumerate(scene.things) if (t.change or "").startswith("turns")}
  posed = []
  for question in questions:
    (i,) = question.things
    frame = int(best[i])
    if i not in changing and masks[i, frame].any():
      mask = {frame: encode_mask(masks[i, frame].astype(np.uint8))}
      posed.append(Posed(size, balance.choose(question), video, mask))
  return posed


def right(model: Model, posed: list[Posed], **options) -> np.ndarray:
  """Which questions a model answers rightly."""
  bench = benchmark("bench-q")
  prompt = bench.prompts.get(model.cfg.region.kind, bench.prompt)
  requests = [
    vr_jax.Request(a.video, prompt(question_text(a.choice), a.choice.options), annotation=[a.mask])
    for a in posed
  ]
  answers = model.ask_many(requests, max_new_tokens=16, **options)
  return np.array(
    [
      grade(str(answer), f"({a.choice.letter})", a.choice.options).correct
      for answer, a in zip(answers, posed, strict=True)
    ]
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--checkpoint", help="a model of PixelRefer's kind")
  parser.add_argument("--videos", type=int, default=12, help="of each size")
  parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="pixels across")
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    balance, posed = Balance(0), []
    for n, size in enumerate(args.sizes):
      for k in range(args.videos):
        posed += ask_about(FIRST + n * args.videos + k, size, balance, Path(folder))
    small = vr_jax.load()
    columns = {
      "vr-mini": right(small, posed, mask_rule="published"),
      "vr-mini keep": right(small, posed),
    }
    if args.checkpoint:
      columns[args.checkpoint] = right(vr_jax.load(args.checkpoint), posed)
  print("| pixels | questions | " + " | ".join(f"{c}: {k}" for c in columns for k in KINDS) + " |")
  print("|---|---|" + "---|" * len(KINDS) * len(columns))
  sizes = np.array([a.size for a in posed])
  kinds = np.array([a.choice.question.template for a in posed])
  for size in args.sizes:
    cells = [
      f"{verdicts[(sizes == size) & (kinds == kind)].mean():.0%}"
      for verdicts in columns.values()
      for kind in KINDS
    ]
    print(f"| {size} | {(sizes == size).sum()} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
  main()
