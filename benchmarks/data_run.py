"""The whole way by the user's commands: check, prepare, train from shards, with counts and times.

    [VR_MEDIA_DIR=DIR] python benchmarks/data_run.py [--clips 320] [--steps 10]

Writes H.264 clips of a moving box (160x120, 36 to 60 frames), two questions each, adds the real
clips of VR_MEDIA_DIR, images, text, and a few items that are wrong; then runs `vr data check`,
`vr data prepare` and `vr train` (packed rows, vr-mini) as processes of their own. The wrong items
must end as rejects, everything else in the shards.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np
from PIL import Image

from data_pipes.frame_rules import grid_frames
from data_pipes.masks import encode_mask, mask_from_box
from data_pipes.video import open_video

ROOT = Path(__file__).parent.parent
SIZE = (120, 160)
WRONG = {  # class -> what is changed of a sound item
  "media-absent": {"video": "none.mp4"},
  "media-empty": {"video": "empty.mp4"},
  "path": {"video": "../clip0.mp4"},
  "region-count": {"annotation": []},
  "duplicate-id": {"id": "clip0-0"},
}


def write_clip(path: Path, number: int) -> list[tuple[int, int]]:
  """A box that moves over noise; returns where its corner (x, y) is in each frame."""
  rng = np.random.default_rng(number)
  noise = np.kron(rng.integers(0, 120, (15, 20, 3)), np.ones((8, 8, 1))).astype(np.uint8)
  step, at = rng.integers(-2, 3, 2), rng.integers(20, 60, 2)
  places = []
  with av.open(str(path), "w") as container:
    stream = container.add_stream("libx264", rate=12, options={"preset": "ultrafast"})
    stream.height, stream.width, stream.pix_fmt = *SIZE, "yuv420p"
    for k in range(36 + number % 25):
      x, y = np.clip(at + k * step, 0, (SIZE[1] - 30, SIZE[0] - 30))
      picture = noise.copy()
      picture[y : y + 30, x : x + 30] = (230, 40 * (number % 6), 60)
      container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
      places.append((int(x), int(y)))
    container.mux(stream.encode())
  return places


def talk(tag: str, question: str = "What is <region>?") -> list[dict]:
  head = f"{tag}\n" if tag else ""
  return [
    {"from": "human", "value": head + question},
    {"from": "gpt", "value": "A box that moves."},
  ]


def write_items(folder: Path, clips: int, real: str | None) -> tuple[int, Path]:
  """(sound items, the annotation file)."""
  items = []

  def add(name: str, frames: int, boxes: dict[int, tuple], size: tuple[int, int]) -> None:
    masks = {
      str(n): {"segmentation": encode_mask(mask_from_box(b, *size))} for n, b in boxes.items()
    }
    for k in range(2):
      items.append({
        "id": f"{Path(name).stem}-{k}", "video": name, "conversations": talk("<video>"),
        "annotation": [masks],
      })  # fmt: skip

  for i in range(clips):
    places = write_clip(folder / f"clip{i}.mp4", i)
    boxes = {
      n: (*places[n], places[n][0] + 30, places[n][1] + 30)
      for n in dict.fromkeys(grid_frames(len(places)).tolist()[::4])
    }
    add(f"clip{i}.mp4", len(places), boxes, SIZE)
  for path in sorted(Path(real).glob("*.mp4")) if real else ():
    (folder / path.name).symlink_to(path.resolve())
    video = open_video(path)
    height, width = video.size
    numbers = grid_frames(len(video)).tolist()[::8]
    box = (width * 0.3, height * 0.3, width * 0.6, height * 0.7)
    add(path.name, len(video), dict.fromkeys(numbers, box), video.size)
  for i in range(10):
    Image.new("RGB", (90, 60), (20 * i, 90, 90)).save(folder / f"image{i}.png")
    mask = encode_mask(mask_from_box((10, 10, 50, 50), 60, 90))
    items.append({
      "id": f"image{i}", "image": f"image{i}.png", "conversations": talk("<image>"),
      "annotation": [{"0": {"segmentation": mask}}],
    })  # fmt: skip
    items.append({"id": f"text{i}", "conversations": talk("", "Hello?")})
  sound = len(items)
  (folder / "empty.mp4").write_bytes(b"")
  items += [{**items[1], "id": f"wrong-{kind}", **change} for kind, change in WRONG.items()]
  path = folder / "items.json"
  path.write_text(json.dumps(items))
  return sound, path


def run(*words: str, accepted: int = 0) -> tuple[str, str]:
  """(stdout, a line of seconds) of one `vr` command."""
  before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
  env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
    [sys.executable, "-m", "vr_jax", *words], env=env, capture_output=True, text=True, check=False
  )
  wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
  assert done.returncode == accepted, done.stderr
  cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
  return done.stdout, f"{wall:.0f} s ({cpu:.0f} s CPU)"


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--clips", type=int, default=320)
  parser.add_argument("--steps", type=int, default=10)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    sound, items = write_items(folder, args.clips, os.environ.get("VR_MEDIA_DIR"))
    media, out = str(folder), str(folder / "shards")
    text, seconds = run("data", "check", str(items), "--media", media, "--json", accepted=2)
    summary = json.loads(text)
    defects = {kind: entry["items"] for kind, entry in summary["defects"].items()}
    notices = {kind: entry["items"] for kind, entry in summary["notices"].items()}
    print(f"check: {summary['items']} items in {seconds}; defects {defects}; notices {notices}")
    assert defects == dict.fromkeys(WRONG, 1), defects
    text, seconds = run(
      "data", "prepare", str(items), "--media", media, "--out", out, "--scene-frames", "8", "16",
      "--json",
    )  # fmt: skip
    manifest = json.loads(text)
    kept = {k: manifest[k] for k in ("samples", "clips", "frames", "rejects", "notices")}
    print(f"prepare: {kept} in {seconds}; {manifest['frame_bytes'] / 1e6:.0f} MB of frames")
    assert manifest["samples"] == sound
    assert manifest["rejects"] == defects
    _, seconds = run(
      "train", "--config", f"mini_stages:stage=2,data={media},steps={args.steps}",
      f"--config.input.files={(out,)}", "--config.input.pack=1024",
      "--config.input.batch_size=2", "--config.log_steps=1", "--workdir", str(folder / "w"),
    )  # fmt: skip
    lines = [json.loads(x) for x in (folder / "w/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    print(f"train: {len(losses)} steps of packed rows, loss {losses[0]:.3f} to {losses[-1]:.3f}, "
          f"in {seconds}; unreadable {lines[-1].get('unreadable')}")  # fmt: skip


if __name__ == "__main__":
  main()
