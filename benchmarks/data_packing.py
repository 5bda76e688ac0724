"""Row 5: frames encoded per unique frame, slots filled by packing, shapes of an epoch.

    python benchmarks/data_packing.py            # 20 seconds of one core

A fixed manifest of 10 000 samples in the shares of stage 3 (paper, Fig. 8): 35 % video with
regions (1 to 3 objects, half of them with 24 to 32 mask frames, half with one), 32 % video, 26 %
image with regions, 7 % text. The lengths of the published texts are not published; here gamma
distributions of 80 to 550 ids on average stand for them. Sizes are those of VideoRefer-7B.
"""

import numpy as np

from data_pipes.batch import Needs
from data_pipes.packing import make_buckets, plan_rows

SIZES = {"image_size": 384, "grid": 27, "tokens_per_object": 4, "scene_tokens": 1352}


def manifest(count: int) -> list[Needs]:
  """Samples in the shares above."""
  rng = np.random.default_rng(0)
  needs = []
  for kind in rng.choice(4, count, p=[0.35, 0.32, 0.26, 0.07]):
    objects = int(rng.integers(1, 4))
    if kind == 0:
      masks = int(rng.integers(24, 33)) if rng.random() < 0.5 else objects
      needs.append(Needs(16 + masks, 16, objects, masks, int(rng.gamma(3, 60)) + 40))
    elif kind == 1:
      needs.append(Needs(16, 16, 0, 0, int(rng.gamma(2, 80)) + 40))
    elif kind == 2:
      needs.append(Needs(1, 16, objects, 1, int(rng.gamma(2, 120)) + 40))
    else:
      needs.append(Needs(0, 0, 0, 0, int(rng.gamma(2, 250)) + 50))
  return needs


def main() -> None:
  needs = manifest(10_000)
  slots = np.array([n.length(4, 1352) for n in needs])
  frames = np.array([n.frames for n in needs])
  naive = slots.mean() / (-(-slots.max() // 64) * 64)
  print(f"one sample a row, one shape: slots filled {naive:.3f}, frames {frames.mean() / 48:.3f}")
  buckets = make_buckets(needs, (1472, 1664, 3072), sizes=SIZES, scene=16)
  held = sum(b.shape.length * len(b.numbers) for b in buckets)
  encoded = sum(b.shape.frames * len(b.numbers) for b in buckets)
  print(
    f"three buckets: slots filled {slots.sum() / held:.3f}, frames {frames.sum() / encoded:.3f}, "
    f"shapes {len(buckets)}"
  )
  for length in (8192, 16384):
    plan = plan_rows(needs, length, sizes=SIZES, scene=16)
    shape = plan.shape
    print(
      f"data.pack_eff {plan.fill['length']:.3f} at {length} (goal 0.95), frames filled "
      f"{plan.fill['frames']:.3f} of {shape.frames}, objects {plan.fill['objects']:.3f} of "
      f"{shape.objects}, clips {plan.fill['clips']:.3f} of {shape.clips}; data.execs 1 (goal 3)"
    )
    assert sum(len(row) for row in plan.rows) == len(needs)


if __name__ == "__main__":
  main()
