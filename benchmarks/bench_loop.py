"""Our run over a synthetic VideoRefer-Bench against the published loop, fp32, CPU.

    VIDEOREFER_DIR=VideoRefer python benchmarks/bench_loop.py    # [torch] and pip install timm

8 descriptions of 24 tokens and 30 questions of 4 about 6 videos of 16 frames, an object with a mask
each. The published loop encodes the video and generates for every item by itself; ours shares what
items of a video have in common and answers in rows. Reading videos is left out on both sides. First
every token must be the same, with sharing on and off.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

# isort: split  (rows chooses the processors)
import numpy as np
import rows
from published_model import SCENE, make_published, pixels
from rows import NAN, alternate, ratio, row, typical

import vr_jax
from data_pipes.prompts import DESCRIBE, bench_q_prompt, question_prompt
from data_pipes.tokenizer import REGION, Tokenizer
from vr_jax.assets import VR_MINI
from vr_jax.inference.model import Model
from vr_jax.interop import videorefer as published

GOAL, VIDEOS, DESCRIPTIONS, QUESTIONS = 4.0, 6, 8, 30
SIZE, PATCH = 96, 8
TOKENS = {"d": 24, "q": 4}


def make_items(seed: int = 0) -> dict[str, list[vr_jax.Request]]:
  """The items of Bench-D and Bench-Q; masks follow the patches, so that every grid rule agrees."""
  rng = np.random.default_rng(seed)
  videos = rng.integers(0, 256, (VIDEOS, SCENE, SIZE, SIZE, 3), np.uint8)
  options = [
    f"({letter}) {text}" for letter, text in zip("ABCD", ("red", "up", "a ball", "no"), strict=True)
  ]
  asked = {
    "d": [DESCRIBE] * DESCRIPTIONS,
    "q": [
      bench_q_prompt(f"What is true of <object{i % 3}>{REGION}?", options) for i in range(QUESTIONS)
    ],
  }
  items: dict[str, list[vr_jax.Request]] = {}
  for kind, texts in asked.items():
    items[kind] = []
    for i, text in enumerate(texts):
      grid = rng.random((SIZE // PATCH, SIZE // PATCH)) < 0.2
      mask = np.kron(grid, np.ones((PATCH, PATCH), bool))
      region = vr_jax.Region(mask=mask, frame=int(rng.integers(SCENE)))
      items[kind].append(vr_jax.Request(videos[i % VIDEOS], text, [region]))
  return items


def theirs(model, tokenizer: Tokenizer, items: dict[str, list]) -> list[tuple[int, ...]]:
  """Token ids by the published loop: one item after the other."""
  import torch

  said = []
  for kind, requests in items.items():
    for request in requests:
      (region,) = request.regions
      ids = question_prompt(request.question, tokenizer, "video")[1].ids
      ids = torch.from_numpy(np.asarray(ids, np.int64))[None]
      grid = torch.from_numpy(region.mask[::PATCH, ::PATCH].astype(np.float32))[None]
      with torch.inference_mode():
        new = model.generate(
          ids,
          attention_mask=torch.ones_like(ids),
          images=[(pixels(request.video), "video")],
          masks=[grid],
          frame=[pixels(request.video[region.frame][None])],
          ann_indices=[[[0]]],
          frame_nums=[1],
          do_sample=False,
          max_new_tokens=TOKENS[kind],
          use_cache=True,
          pad_token_id=2,
        )
      said.append(tuple(new[0].tolist()))
  return said


def ours(model: Model, items: dict[str, list], **options) -> list[tuple[int, ...]]:
  model.visual.forget()
  said = []
  for kind, requests in items.items():
    answers = model.ask_many(requests, max_new_tokens=TOKENS[kind], batch_size=8, **options)
    said += [answer.token_ids for answer in answers]
  return said


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--width", type=int, default=128, help="of the decoder")
  parser.add_argument("--pairs", type=int, default=rows.PAIRS)
  args = parser.parse_args()
  checkout = os.environ.get("VIDEOREFER_DIR")
  if not checkout:
    print("cpu.bench_x  skipped (no reference): VIDEOREFER_DIR is not set")
    return
  import torch

  torch.set_num_threads(rows.THREADS)
  tokenizer, items = Tokenizer.from_folder(VR_MINI), make_items()
  with tempfile.TemporaryDirectory() as folder:
    their_model = make_published(Path(checkout), Path(folder), args.width, tokenizer.region_id)
    their_model.eval()
    loaded = published.load(folder)
  our_model = Model(loaded.config, loaded.params, tokenizer, {"eos_ids": (2,), "pad_id": 2})
  count = sum(map(len, items.values()))

  def timed(run) -> dict[str, float]:
    start = time.perf_counter()
    run()
    return {"items": count / (time.perf_counter() - start)}

  a, b = ours(our_model, items), theirs(their_model, tokenizer, items)
  alone = ours(our_model, items, share=False)
  print(
    f"{count} items: tokens equal to theirs {a == b}, sharing on and off {a == alone}", flush=True
  )
  value, detail = NAN, "the sides do not agree"
  if a == b == alone:
    sides = {
      "ours": lambda: timed(lambda: ours(our_model, items)),
      "torch": lambda: timed(lambda: theirs(their_model, tokenizer, items)),
    }
    reached = alternate(sides, args.pairs)
    speeds = [typical(reached, side, "items") for side in ("ours", "torch")]
    value, detail = ratio(reached, "items"), f"{speeds[0]:.2f} against {speeds[1]:.2f} items/s"
  row("cpu.bench_x", value, f">= {GOAL}", detail=detail)


if __name__ == "__main__":
  main()
