"""How much answers about objects move with the cells that k-means starts from.

    python benchmarks/start_spread.py --checkpoint PixelRefer-7B --jsonl requests.jsonl [--starts 6]

The published code draws these cells at random for every answer; ours are evenly spaced. Each
request of the file (as of `vr ask --jsonl`) is answered with the default and with as many random
starts, by the same weights, greedily. Prints for each request how many different answers came, how
many of the random ones equal the default's, and the share of tokens before the first that differs;
then the means.
"""

import argparse
import dataclasses

import numpy as np

import vr_jax
from data_pipes.errors import InputError
from vr_jax.inference.bulk import read_requests
from vr_jax.inference.options import Options
from vr_jax.inference.pictures import PictureModel
from vr_jax.inference.requests import Request


def random_starts(model: PictureModel, request: Request, options: Options, rng) -> list[list[int]]:
  """Cells of each crop as the published code draws them; [] where it runs no k-means."""
  (group,) = model.reader(options).read([(0, request)])
  if isinstance(group, tuple):
    raise group[1]
  K = model.cfg.region.tokens
  counts = [crop.cells for crop in group.questions[0].sample.objects]
  return [rng.permutation(n)[:K].tolist() if n > K else [] for n in counts]


def common(a: tuple[int, ...], b: tuple[int, ...]) -> float:
  """The share of the longer answer before the first token that differs."""
  same = np.cumprod([x == y for x, y in zip(a, b, strict=False)]).sum()
  return same / max(len(a), len(b), 1)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--checkpoint", required=True)
  parser.add_argument("--jsonl", required=True)
  parser.add_argument("--starts", type=int, default=6)
  parser.add_argument("--max-new-tokens", type=int, default=64)
  parser.add_argument("--scene-frames", type=int)
  args = parser.parse_args()
  model = vr_jax.load(args.checkpoint)
  if not isinstance(model, PictureModel):
    raise SystemExit(f"{args.checkpoint}: joins no cells by k-means")
  settings = {"max_new_tokens": args.max_new_tokens, "scene_frames": args.scene_frames}
  rng, figures = np.random.default_rng(0), []
  for line in read_requests(args.jsonl)[0]:
    request = dataclasses.replace(line.request(), starts=())
    try:
      drawn = [random_starts(model, request, Options(**settings), rng) for _ in range(args.starts)]
      requests = [request, *(dataclasses.replace(request, starts=starts) for starts in drawn)]
      default, *others = [a.token_ids for a in model.ask_many(requests, **settings)]
    except InputError as error:
      print(f"{line.id}: {error}")
      continue
    equal = sum(other == default for other in others)
    share = float(np.mean([common(default, other) for other in others]))
    figures.append((len(set(others)), equal, share))
    print(
      f"{line.id}: {figures[-1][0]} answers of {len(others)}, {equal} the default's, {share:.2f}"
    )
  if figures:
    different, equal, share = np.mean(figures, axis=0)
    print(f"starts.different  {different:.2f} answers of {args.starts} random starts")
    print(f"starts.default    {equal:.2f} of them equal the default's")
    print(f"starts.common     {share:.2f} of the tokens before the first that differs")


if __name__ == "__main__":
  main()
