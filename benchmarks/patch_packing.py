"""Patches that the tower executes over those that pictures have, at the published limits.

200 samples, half of them clips and half images, of the sizes and lengths in SIZES and SECONDS, one
frame a second up to 768, `mm_max_length` 8192, one to three objects each; every sample's crops and
scene go through the tower. Prints a line for each way to call it. No pixels are read.

    python benchmarks/patch_packing.py
"""

import random

import numpy as np

from data_pipes.navit_frames import MAX_FRAMES
from data_pipes.navit_images import PATCH, smart_resize
from data_pipes.object_crops import PIXELREFER, crop_size
from data_pipes.patch_packing import choose_buckets, grouped, pack_pictures, patches_of

MAX_LENGTH, TOKENS = 8192, 32
# height, width of clips and of images; seconds of clips.
CLIPS = ((360, 640), (480, 854), (720, 1280), (1080, 1920), (640, 360), (1280, 720), (480, 640))
IMAGES = ((480, 640), (427, 640), (640, 480), (768, 1024), (1365, 2048), (3024, 4032), (224, 224))
SECONDS = (2, 3, 5, 8, 13, 21, 34, 60, 120, 300, 900)


def samples(seed: int) -> list[list[int]]:
  """Patches of each picture of each sample."""
  draw = random.Random(seed)
  made = []
  for i in range(200):
    video = i % 2 == 0
    size = draw.choice(CLIPS if video else IMAGES)
    frames = min(draw.choice(SECONDS), MAX_FRAMES) if video else 1
    scene = patches(size, 2 if video else 1, frames)
    objects = draw.randint(1, 3)
    crops = [patches(crop(draw, size), 1, objects) for _ in range(objects)]
    made.append([scene] * frames + crops)
  return made


def patches(size: tuple[int, int], stride: int, pictures: int) -> int:
  budget = MAX_LENGTH * (PATCH * stride) ** 2 // pictures
  height, width = smart_resize(*size, factor=PATCH * stride, max_pixels=budget)
  return height * width // PATCH**2


def crop(draw: random.Random, size: tuple[int, int]) -> tuple[int, int]:
  """The scaled crop of an object, an ellipse of 1/30 to 2/3 of each side."""
  sides = [max(2, int(side * draw.uniform(1 / 30, 2 / 3))) for side in size]
  area = int(np.pi / 4 * sides[0] * sides[1])
  part = [min(side + 2 * 2 * PATCH, whole) for side, whole in zip(sides, size, strict=True)]
  height, width = crop_size(part, area, PIXELREFER, TOKENS)
  return height, width


def main() -> None:
  planned, run = samples(0), samples(1)
  largest = MAX_LENGTH * 4
  for title, together in (("each sample alone", 1), ("4 samples together", 4), ("16", 16)):
    buckets = choose_buckets(grouped(planned, together), largest=largest)
    calls = grouped(run, together)
    rows = [pack_pictures(call, buckets) for call in calls]
    executed, needed = sum(map(patches_of, rows)), sum(map(sum, calls))
    print(
      f"{title}: buckets {', '.join(map(str, buckets))}; {sum(map(len, rows))} rows, {executed} "
      f"patches executed over {needed} needed = {executed / needed:.3f}"
    )


if __name__ == "__main__":
  main()
