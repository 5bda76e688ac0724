"""What the order of a question file costs `vr eval`: shuffled against sorted by clip, CPU.

    python benchmarks/eval_order.py    # a few minutes on two cores

144 questions of the embedded Bench-Q about 12 clips, asked of vr-mini in rows of 8. In the shuffled
file no two neighbours are about one clip. First the answers must be equal, and every frame must be
encoded once in either order. Reported is the processor time of the whole run, reading included.
"""

import argparse
import json
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

# isort: split  (rows chooses the processors)
import numpy as np
import rows
from rows import NAN, alternate, ratio, row, typical

import vr_jax
from data_pipes.embedded.make_set import make_set
from vr_jax.evaluation.results import read_predictions
from vr_jax.evaluation.run import Settings, evaluate
from vr_jax.inference.model import Model

GOAL, CLIPS, QUESTIONS, BATCH = 1.05, 12, 144, 8
MODE = "multi"


def make_files(folder: Path) -> dict[str, Path]:
  """The set, and a folder with its questions in each order."""
  data = make_set(folder / "set", 1, CLIPS, QUESTIONS, 1)
  by_clip: dict[str, list] = defaultdict(list)
  for item in json.loads((data / "bench_q.json").read_text()):
    by_clip[item["video"]].append(item)
  rng = np.random.default_rng(0)
  orders: dict[str, list] = {"sorted": [i for items in by_clip.values() for i in items]}
  orders["shuffled"] = []
  while by_clip:  # rounds over the clips, each begun with another clip than the last one ended with
    last = orders["shuffled"][-1]["video"] if orders["shuffled"] else None
    clips = list(rng.permutation(list(by_clip)))
    if clips[0] == last and len(clips) > 1:
      clips.append(clips.pop(0))
    for clip in clips:
      orders["shuffled"].append(by_clip[clip].pop())
      if not by_clip[clip]:
        del by_clip[clip]
  folders = {}
  for name, items in orders.items():
    folders[name] = folder / name
    folders[name].mkdir()
    (folders[name] / "bench_q.json").write_text(json.dumps(items))
    (folders[name] / "videos").symlink_to(data / "videos")
  return folders


def run(model: Model, data: Path) -> tuple[dict[str, float], dict[Any, str | None]]:
  """The figures of one run (CPU seconds, frames encoded, different frames), and its answers."""
  model.visual.forget()
  with tempfile.TemporaryDirectory() as out:
    start = time.process_time()
    evaluate(model, "bench-q", data, Path(out) / "run", Settings(MODE, batch_size=BATCH))
    cpu = time.process_time() - start
    _, predictions = read_predictions(Path(out) / "run")
  frames = {(p.video, f) for p in predictions for f in p.scene_frames}
  for item in json.loads((data / "bench_q.json").read_text()):
    frames |= {(item["video"], int(f)) for masks in item["annotation"] for f in masks}
  figures = {"cpu": cpu, "encoded": model.visual.counts["frames"], "frames": len(frames)}
  return figures, {p.id: p.pred for p in predictions}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--pairs", type=int, default=rows.PAIRS)
  args = parser.parse_args()
  model = vr_jax.load()
  with tempfile.TemporaryDirectory() as folder:
    files = make_files(Path(folder))
    (first, answers), (other, others) = (run(model, files[n]) for n in ("sorted", "shuffled"))
    equal = answers == others
    once = all(f["encoded"] == f["frames"] for f in (first, other))
    print(
      f"{len(answers)} questions: answers equal {equal}; frames encoded "
      f"{first['encoded']} sorted, {other['encoded']} shuffled, of {first['frames']} there are",
      flush=True,
    )
    value, detail = NAN, "the sides do not agree"
    if equal and once:
      sides = {name: lambda name=name: run(model, files[name])[0] for name in files}
      reached = alternate(sides, args.pairs)
      seconds = [typical(reached, name, "cpu") for name in ("shuffled", "sorted")]
      value = ratio(reached, "cpu", "shuffled", "sorted")
      detail = f"{seconds[0]:.2f} against {seconds[1]:.2f} s of CPU"
  row("eval.order_x", value, f"<= {GOAL}", detail=detail)


if __name__ == "__main__":
  main()
