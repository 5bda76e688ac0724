"""`vr eval` over a synthetic VideoRefer-Bench against the published loop, fp32, CPU.

    VIDEOREFER_DIR=VideoRefer python benchmarks/bench_loop.py    # [torch] and pip install timm

8 descriptions of 24 tokens and 30 questions of 4 about 6 videos of 16 frames, an object with a mask
each; no two neighbours are about one video. The published loop encodes the video and generates for
every item by itself. Ours is what `vr eval` runs, from annotation files and folders of frames to
the files of the answers, and says how many frames it encoded; the published side is given frames in
memory. First every text must be the same.
"""

import argparse
import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# isort: split  (rows chooses the processors)
import numpy as np
import rows
from PIL import Image
from published_model import SCENE, make_published, pixels
from rows import NAN, alternate, ratio, row, typical

from data_pipes.masks import encode_mask
from data_pipes.prompts import DESCRIBE, bench_q_prompt, question_prompt
from data_pipes.tokenizer import REGION, Tokenizer
from vr_jax.assets import VR_MINI
from vr_jax.evaluation.results import read_predictions
from vr_jax.evaluation.run import Settings, evaluate
from vr_jax.inference.model import Model
from vr_jax.interop import videorefer as published

GOAL, VIDEOS, DESCRIPTIONS, QUESTIONS = 4.0, 6, 8, 30
SIZE, PATCH = 96, 8
TOKENS = {"d": 24, "q": 4}


@dataclasses.dataclass(frozen=True)
class Question:
  """One item: its prompt as the model gets it, and its object's mask on one frame."""

  video: int
  prompt: str
  mask: np.ndarray
  frame: int


def make_bench(folder: Path, seed: int = 0) -> tuple[np.ndarray, dict[str, list[Question]]]:
  """Writes Bench-D and Bench-Q with their videos; gives the videos and the items of both.

  Masks follow the patches, so that every grid rule agrees.
  """
  rng = np.random.default_rng(seed)
  videos = rng.integers(0, 256, (VIDEOS, SCENE, SIZE, SIZE, 3), np.uint8)
  for i, video in enumerate(videos):
    (folder / str(i)).mkdir()
    for n, frame in enumerate(video):
      Image.fromarray(frame).save(folder / str(i) / f"{n:03}.png")
  options = [
    f"({letter}) {text}" for letter, text in zip("ABCD", ("red", "up", "a ball", "no"), strict=True)
  ]
  asks = [f"What is true of <object{i % 3}>{REGION}?" for i in range(QUESTIONS)]
  texts = {"d": [DESCRIBE] * DESCRIPTIONS, "q": [bench_q_prompt(text, options) for text in asks]}
  questions: dict[str, list[Question]] = {}
  for kind, prompts in texts.items():
    questions[kind], items = [], []
    for i, prompt in enumerate(prompts):
      grid = rng.random((SIZE // PATCH, SIZE // PATCH)) < 0.2
      mask = np.kron(grid, np.ones((PATCH, PATCH), np.uint8))
      question = Question(i % VIDEOS, prompt, mask, int(rng.integers(SCENE)))
      questions[kind].append(question)
      annotation = [{str(question.frame): {"segmentation": encode_mask(mask)}}]
      item = {"id": i, "video": str(question.video), "frame_idx": question.frame}
      item |= {"annotation": annotation, "caption": ""}
      if kind == "q":
        item |= {"Question": asks[i], "options": options, "Answer": options[0]}
      items.append(item)
    (folder / f"bench_{kind}.json").write_text(json.dumps(items))
  return videos, questions


def theirs(
  model, tokenizer: Tokenizer, videos: np.ndarray, questions: dict[str, list[Question]]
) -> list[str]:
  """Texts by the published loop: one item after the other."""
  import torch

  texts = []
  for kind, items in questions.items():
    for item in items:
      ids = question_prompt(item.prompt, tokenizer, "video")[1].ids
      ids = torch.from_numpy(np.asarray(ids, np.int64))[None]
      grid = torch.from_numpy(item.mask[::PATCH, ::PATCH].astype(np.float32))[None]
      video = videos[item.video]
      with torch.inference_mode():
        new = model.generate(
          ids,
          attention_mask=torch.ones_like(ids),
          images=[(pixels(video), "video")],
          masks=[grid],
          frame=[pixels(video[item.frame][None])],
          ann_indices=[[[0]]],
          frame_nums=[1],
          do_sample=False,
          max_new_tokens=TOKENS[kind],
          use_cache=True,
          pad_token_id=2,
        )
      texts.append(tokenizer.decode(new[0].tolist(), skip_special=True).strip())
  return texts


def ours(model: Model, folder: Path) -> list[str]:
  """Texts by `vr eval`; `model.visual.counts` then says what was encoded for them."""
  model.visual.forget()
  texts = []
  for kind, tokens in TOKENS.items():
    with tempfile.TemporaryDirectory() as out:
      settings = Settings(scene_frames=SCENE, max_new_tokens=tokens, batch_size=8)
      evaluate(model, f"bench-{kind}", folder, Path(out) / "run", settings)
      _, predictions = read_predictions(Path(out) / "run")
    texts += [prediction.pred or "" for prediction in predictions]
  return texts


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
  tokenizer = Tokenizer.from_folder(VR_MINI)
  with tempfile.TemporaryDirectory() as weights, tempfile.TemporaryDirectory() as bench:
    their_model = make_published(Path(checkout), Path(weights), args.width, tokenizer.region_id)
    their_model.eval()
    loaded = published.load(weights)
    model = Model(loaded.config, loaded.params, tokenizer, {"eos_ids": (2,), "pad_id": 2})
    videos, questions = make_bench(Path(bench))
    compare(
      args.pairs,
      sum(map(len, questions.values())),
      lambda: ours(model, Path(bench)),
      lambda: theirs(their_model, tokenizer, videos, questions),
      lambda: model.visual.counts["frames"],
    )


def compare(
  pairs: int,
  count: int,
  ours: Callable[[], list[str]],
  theirs: Callable[[], list[str]],
  encoded: Callable[[], int],
) -> None:
  """Prints whether both sides give the same texts, the frames encoded, and the row."""

  def timed(run) -> dict[str, float]:
    start = time.perf_counter()
    run()
    return {"items": count / (time.perf_counter() - start)}

  equal = ours() == theirs()
  print(
    f"{count} items: texts equal to theirs {equal}; frames encoded {encoded()} (they encode "
    f"{count * (SCENE + 1)})",
    flush=True,
  )
  value, detail = NAN, "the sides do not agree"
  if equal:
    reached = alternate({"ours": lambda: timed(ours), "torch": lambda: timed(theirs)}, pairs)
    speeds = [typical(reached, side, "items") for side in ("ours", "torch")]
    value, detail = ratio(reached, "items"), f"{speeds[0]:.2f} against {speeds[1]:.2f} items/s"
  row("cpu.bench_x", value, f">= {GOAL}", detail=detail)


if __name__ == "__main__":
  main()
