"""Row 8: samples a second a core from JPEG shards and from H.264; ratio to a PyTorch loader.

    VR_MEDIA_DIR=DIR python benchmarks/data_speed.py [--pairs 9 | --long]

Clips: dog.mp4, 2.mp4 and 4.mp4 in VR_MEDIA_DIR, or generated H.264 ones of 640x360. A sample is 16
scene frames at 384 pixels, with the mask of one object on 8 of them. Both sides read the same
samples with two workers, in turn (A B A B): CPU seconds of the process and its children, and wall
seconds; medians of the ratios. Grain's own cost is that of samples in which there is nothing to do;
the same samples through it and through a plain loop, in turn, show it within the noise. The other
side is decord, transformers' SiglipImageProcessor (Pillow form) and torch's DataLoader; without
decord, torch and transformers its row says so. Rows of H.264 are the same work on both sides; from
shards ours decodes JPEG, decoded once before.

`--long` writes files of one and two hours (a 10 s clip of 1080p, by stream copy): milliseconds to
open one whose index is kept, and the most memory that `vr ask` takes with vr-mini.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np

from data_pipes.batch import RowShape, empty_rows, rows_of
from data_pipes.frame_rules import uniform_frames
from data_pipes.jobs import run_local
from data_pipes.loader import make_dataset, prefetched
from data_pipes.loader_bench import bench
from data_pipes.masks import encode_mask, mask_from_box, segmentation_to_mask
from data_pipes.prepare import Prepare, Settings
from data_pipes.records import RecordFile
from data_pipes.samples import RowRules, Samples
from data_pipes.shards import ShardSet
from data_pipes.tokenizer import Tokenizer
from data_pipes.video import open_video

SIZES = {"image_size": 384, "grid": 27, "tokens_per_object": 4, "scene_tokens": 1352}
SHAPE = RowShape(frames=16, scene=16, objects=1, object_frames=8, length=1600, **SIZES)
TOKENIZER = Path(__file__).parent.parent / "tests/golden/tiny_videorefer_qwen2"
GOALS = {"jpeg": 25.0, "h264": 1.5, "ratio": 2.0}


def cpu_seconds() -> float:
  """Of this process and of its children that have ended."""
  kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
  return sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, kinds))


def write_items(folder: Path, media: Path, copies: int) -> Path:
  """An annotation file with `copies` samples of each clip."""
  items = []
  for clip in sorted(media.glob("*.mp4")):
    video = open_video(clip)
    height, width = video.size
    box = mask_from_box((width * 0.3, height * 0.3, width * 0.6, height * 0.7), height, width)
    numbers = uniform_frames(len(video), 16).tolist()[::2]
    annotation = {str(n): {"segmentation": encode_mask(box)} for n in numbers}
    talk = [
      {"from": "human", "value": "<video>\nWhat is <region>?"},
      {"from": "gpt", "value": "It."},
    ]
    items += [
      {
        "id": f"{clip.stem}{i}",
        "video": clip.name,
        "conversations": talk,
        "annotation": [annotation],
      }
      for i in range(copies)
    ]
  path = folder / "items.json"
  path.write_text(json.dumps(items))
  return path


def make_clips(folder: Path, count: int = 3, frames: int = 150) -> Path:
  """Generated clips of moving noise, 640x360 H.264."""
  rng = np.random.default_rng(0)
  for k in range(count):
    write_clip(folder / f"clip{k}.mp4", rng, 360, frames)
  return folder


def write_clip(path: Path, rng: np.random.Generator, height: int, frames: int) -> None:
  """Moving noise in 16:9 and H.264, 25 frames a second."""
  side = height // 18
  picture = np.kron(rng.integers(0, 255, (18, 32, 3)), np.ones((side, side, 1))).astype(np.uint8)
  with av.open(str(path), "w") as container:
    stream = container.add_stream("libx264", rate=25, options={"preset": "veryfast"})
    stream.height, stream.width, stream.pix_fmt = *picture.shape[:2], "yuv420p"
    for i in range(frames):
      frame = av.VideoFrame.from_ndarray(np.roll(picture, 2 * i, 1), format="rgb24")
      container.mux(stream.encode(frame))
    container.mux(stream.encode())


def write_looped(source: Path, path: Path, times: int) -> Path:
  """A clip so many times over, by stream copy."""
  with av.open(str(source)) as reading, av.open(str(path), "w") as writing:
    template = reading.streams.video[0]
    stream = writing.add_stream_from_template(template)
    packets = [(bytes(p), p) for p in reading.demux(template) if p.dts is not None]
    length = sum(p.duration for _, p in packets)
    for k in range(times):
      for data, packet in packets:
        copy = av.Packet(data)
        copy.pts, copy.dts = packet.pts + k * length, packet.dts + k * length
        copy.duration, copy.time_base = packet.duration, packet.time_base
        copy.is_keyframe, copy.stream = packet.is_keyframe, stream
        writing.mux(copy)
  return path


def long_files(folder: Path) -> None:
  """Rows of an hour's index and of `vr ask` on two hours of 1080p, with caches of their own."""
  os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
  rng = np.random.default_rng(0)
  write_clip(folder / "short.mp4", rng, 1080, 250)
  for name in ("hour.mp4", "hour.ts"):
    path = write_looped(folder / "short.mp4", folder / name, 360)
    first, *rest = (seconds(lambda path=path: open_video(path)) for _ in range(6))
    print(
      f"io.index_cached_ms.{path.suffix[1:]} {1000 * float(np.median(rest)):.1f} (goal < 50); "
      f"{len(open_video(path))} frames, made in {first:.2f} s"
    )
  path = write_looped(folder / "short.mp4", folder / "hours.mp4", 720)
  for note in ("programs compiled", "programs from the cache"):
    print(f"io.ask_peak_mb {ask_peak(path):.0f} (goal < 400); {note}")
  print(f"io.ask_peak_mb.short {ask_peak(folder / 'short.mp4'):.0f}; the same of a 10 s clip")


def seconds(call: Callable[[], object]) -> float:
  start = time.perf_counter()
  call()
  return time.perf_counter() - start


def ask_peak(video: Path) -> float:
  """The largest resident memory of `vr ask` with vr-mini, MB."""
  words = ["ask", "--video", str(video), "--region", "box:400,300,800,700@120"]
  words += ["--question", "What does <region> do in the video?"]
  process = subprocess.Popen([sys.executable, "-m", "vr_jax", *words], stdout=subprocess.DEVNULL)
  _, status, usage = os.wait4(process.pid, 0)
  if status:
    raise RuntimeError(f"vr ask ended with {os.waitstatus_to_exitcode(status)}")
  return usage.ru_maxrss / 1024


def timed(batches: Callable[[], int]) -> np.ndarray:
  """(CPU seconds, wall seconds) a sample."""
  cpu, wall = cpu_seconds(), time.perf_counter()
  count = batches()
  return np.array([cpu_seconds() - cpu, time.perf_counter() - wall]) / count


def ours(samples: Samples, batch: int) -> int:
  """Reads all batches; returns how many samples."""
  dataset = make_dataset([samples], batch_size=batch, seed=0, drop_remainder=True)
  return sum(batch for _ in prefetched(dataset, threads=2))


def beside_a_loop(samples: Samples, batch: int, pairs: int) -> np.ndarray:
  """p10, median, p90 of what the loader takes more of the CPU than a loop with the same calls."""
  options = {"batch_size": batch, "seed": 0, "shuffle": False, "drop_remainder": True}
  dataset = make_dataset([samples], **options)[:3]

  def loader() -> None:
    list(prefetched(dataset, threads=1))

  def loop() -> None:
    held = []  # as the loader holds batches ready: memory that is used again costs less
    for first in range(0, 3 * batch, batch):
      rows = empty_rows(samples.shape, batch)
      held.append(rows)
      for k, row in enumerate(rows_of(rows)):
        samples.fill(row, first + k)

  def cpu(run: Callable[[], None]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start

  overheads = []
  for pair in range(pairs + 1):
    sides = {run: cpu(run) for run in ((loader, loop) if pair % 2 else (loop, loader))}
    overheads.append(sides[loader] / sides[loop] - 1)
  return np.quantile(overheads[1:], (0.1, 0.5, 0.9))


def torch_loader(items: Path, media: Path, batch: int) -> Callable[[], int] | None:
  """The other side as such a function; None where it cannot run."""
  try:
    import decord
    import torch
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
  except ImportError as error:
    print(f"io.x skipped: {error}")
    return None
  processor = SiglipImageProcessorPil(size={"height": 384, "width": 384})
  records = json.loads(items.read_text())

  class Clips(torch.utils.data.Dataset):
    def __len__(self):
      return len(records)

    def __getitem__(self, i):
      reader = decord.VideoReader(str(media / records[i]["video"]), num_threads=1)
      (annotation,) = records[i]["annotation"]
      ids = sorted({*uniform_frames(len(reader), 16).tolist(), *map(int, annotation)})[:16]
      frames = reader.get_batch(ids).asnumpy()
      pixels = processor(images=list(frames), return_tensors="pt")["pixel_values"]
      masks = [segmentation_to_mask(a["segmentation"]) for a in annotation.values()]
      resized = torch.nn.functional.interpolate(
        torch.from_numpy(np.stack(masks))[None].float(), size=(27, 27), mode="bilinear"
      )
      return pixels, resized[0] > 0

  def run() -> int:
    loader = torch.utils.data.DataLoader(Clips(), batch_size=batch, num_workers=2)
    return sum(len(pixels) for pixels, _ in loader)

  return run


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--pairs", type=int, default=9)
  parser.add_argument("--grain-pairs", type=int, default=31)
  parser.add_argument("--copies", type=int, default=8, help="samples of each clip")
  parser.add_argument("--long", action="store_true", help="the rows of long files alone")
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    if args.long:
      long_files(folder)
      return
    given = os.environ.get("VR_MEDIA_DIR")
    media = Path(given) if given else make_clips(folder)
    items = write_items(folder, media, args.copies)
    settings = Settings((str(items),), str(media), shards=2, size=384)
    run_local(Prepare.start(folder / "shards", settings))
    tokenizer = Tokenizer.from_folder(TOKENIZER)
    shards, videos = ShardSet(folder / "shards"), RecordFile(items)
    for name, records, repeats in (("jpeg", shards, args.pairs), ("h264", videos, 1)):
      result = bench(
        records, tokenizer, SIZES, RowRules(), media=media, samples=3 * args.copies, batch_size=4,
        repeats=repeats,
      )  # fmt: skip
      rate = result["samples_per_second_per_core"]
      stages = ", ".join(f"{k} {v:.1f}" for k, v in result["cpu_ms_a_sample"].items())
      print(f"io.samples_s_core.{name} {rate:.1f} (goal {GOALS[name]}); ms a sample: {stages}")
      print(
        f"  {result['frames_a_sample']:.0f} frames a sample; Grain's own "
        f"{result['grain_us_a_sample']:.0f} us a sample, {result['loader_overhead']:.2%} of the "
        f"CPU time (goal 5 %); encodes per unique frame "
        f"{result['encodes_per_unique_frame']:.2f} (goal 1.00)"
      )
    low, middle, high = beside_a_loop(Samples(shards, tokenizer, SHAPE), 4, args.grain_pairs)
    print(
      f"  jpeg: CPU time of the loader with one thread beside a plain loop {middle:+.1%} (p10 "
      f"{low:+.1%}, p90 {high:+.1%} of {args.grain_pairs} pairs)"
    )
    theirs = torch_loader(items, media, 4)
    if theirs is None:
      return
    sources = {
      "jpeg": Samples(shards, tokenizer, SHAPE),
      "h264": Samples(videos, tokenizer, SHAPE, media_root=media),
    }
    ratios: dict[str, list[np.ndarray]] = {"jpeg": [], "h264": []}
    theirs()  # warm
    for _ in range(args.pairs):
      other = timed(theirs)
      for name, source in sources.items():
        ratios[name].append(other / timed(lambda source=source: ours(source, 4)))
    for name, measured in ratios.items():
      low, middle, high = np.quantile(measured, (0.1, 0.5, 0.9), axis=0)
      for k, clock in enumerate(("CPU", "wall")):
        print(
          f"io.x.{name} {middle[k]:.2f} (p10 {low[k]:.2f}, p90 {high[k]:.2f}; goal "
          f"{GOALS['ratio']}) times the PyTorch loader's samples per {clock} second"
        )


if __name__ == "__main__":
  main()
