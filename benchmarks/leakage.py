"""How much of a benchmark gets into training data, and how much else is dropped for it.

    python benchmarks/leakage.py [recall:FOLDER[:CUTS]] [drops[:CLIPS]]

recall  cuts of 2 s and more of the videos in FOLDER, re-encoded, scaled, mirrored and all of it, go
        through the engine's shots and duplicates with those videos as the benchmark: the share of
        clips of 2 s and more that are dropped (goal >= 0.99), CUTS of each video
drops   the clips of tests/cases/unlike_clips.json, which no threshold was chosen by, against a
        benchmark of other such clips, and against each other: the share dropped (goal <= 0.01)
"""

import json
import sys
import tempfile
from collections import Counter
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from data_pipes.embedded.render import render
from data_pipes.embedded.scenes import make_scene
from data_pipes.engine.agents.ingest import benchmark_videos, look_at, look_over, make_shots
from data_pipes.engine.graph import Item
from data_pipes.engine.quality import duplicates
from data_pipes.engine.quality.shots import perceptual_hash
from data_pipes.engine.stages import engine_config
from data_pipes.video import Video, open_video

TESTS = Path(__file__).resolve().parent.parent / "tests"
LIST = TESTS / "cases" / "unlike_clips.json"
SECONDS, CUTS = (2.0, 8.0), 40
CHANGES = {  # width of the copy by that of the original, mirrored, H.264's crf
  "re-encoded": (1.0, False, 30),
  "scaled": (0.5, False, 23),
  "mirrored": (1.0, True, 23),
  "all three": (0.4, True, 32),
}


def copy_cut(path: Path, video: Video, start: int, end: int, change: str) -> None:
  """Writes frames [start, end) as a changed copy."""
  scale, mirrored, crf = CHANGES[change]
  height, width = (int(n * scale) // 2 * 2 for n in video.size)
  with av.open(str(path), "w") as container:
    stream = container.add_stream("libx264", rate=Fraction(video.fps or 25).limit_denominator(1001))
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    stream.options = {"crf": str(crf), "preset": "veryfast", "threads": "1"}
    for first in range(start, end, 32):
      for frame in video.frames(range(first, min(first + 32, end))):
        image = Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR)
        pixels = np.ascontiguousarray(np.asarray(image)[:, :: -1 if mirrored else 1])
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
    container.mux(stream.encode())


def clips_of(path: Path, folder: Path) -> list[dict]:
  """The engine's clips of a video: rows of its stage of shots."""
  settings = engine_config().to_dict()
  settings["input"] = {"videos": str(path.parent)}
  video = {"key": path.stem, "name": path.name, "caption": "", "given": None}
  outcome = make_shots(settings, folder / "media")(Item(path.stem, (video,)))
  return [vars(clip) for clip in outcome.rows]


def recall(folder: Path, cuts: int = CUTS, seed: int = 0) -> Counter[tuple[str, bool]]:
  """Counts of clips of 2 s and more, by the change and whether they were dropped."""
  rng = np.random.default_rng(seed)
  limit = engine_config().duplicates.distance
  paths = benchmark_videos([str(folder)], "/")
  looked = {path.name: look_over(path) for path in paths}
  index = {name: hashes for name, (hashes, _) in looked.items()}
  counts: Counter[tuple[str, bool]] = Counter()
  for path in paths:
    video = open_video(path)
    fps = video.fps or 25.0
    for number in range(cuts):
      change = list(CHANGES)[number % len(CHANGES)]
      longest = min(SECONDS[1], len(video) / fps)
      frames = int(rng.uniform(SECONDS[0], longest) * fps) + 1
      start = int(rng.integers(0, max(1, len(video) - frames)))
      with tempfile.TemporaryDirectory() as work:
        cut = Path(work, "videos", f"{number}.mp4")
        cut.parent.mkdir()
        copy_cut(cut, video, start, min(start + frames, len(video)), change)
        for clip in clips_of(cut, Path(work)):
          if clip["frames"] < SECONDS[0] * fps:
            continue
          pictures = look_at(Path(work, "media", clip["video"]))
          looks = {clip["key"]: pictures, **{n: all_of_it for n, (_, all_of_it) in looked.items()}}
          dropped = duplicates.survey([clip], index, limit, looks=looks.get)
          counts[change, clip["key"] in dropped] += 1
  return counts


def field(seed: int, frames: int = 9, size: int = 64) -> np.ndarray:
  """Pictures with the spectrum of natural ones (amplitude 1/f) in each colour, that move."""
  rng = np.random.default_rng(seed)
  f = np.hypot(np.fft.fftfreq(2 * size)[:, None], np.fft.fftfreq(2 * size))
  f[0, 0] = 1
  noise = np.fft.fft2(rng.normal(size=(3, 2 * size, 2 * size))) / f
  picture = np.real(np.fft.ifft2(noise)).transpose(1, 2, 0)
  picture = (picture - picture.mean()) / picture.std()
  steps = rng.uniform(-2, 2, 2)
  moved = [np.roll(picture, (steps * t).astype(int), (0, 1))[:size, :size] for t in range(frames)]
  return np.clip(128 + 50 * np.stack(moved), 0, 255).astype(np.uint8)


def make_clip(clip: dict) -> np.ndarray:
  """The frames of a line of the list: uint8 [T, H, W, 3]."""
  return render(make_scene(clip["seed"]))[0] if clip["kind"] == "scene" else field(clip["seed"])


def drops(clips: list[dict], others: list[dict]) -> dict[str, str]:
  """Which clips are dropped, and why, beside others that are the benchmark."""
  looks: dict[str, list[np.ndarray]] = {}
  rows, index = [], {}
  for clip in clips:
    frames = make_clip(clip)
    chosen = [frames[i] for i in duplicates.spread(len(frames))]
    key = f"{clip['kind']} {clip['seed']}"
    looks[key] = [duplicates.small_picture(f) for f in chosen]
    hashes, mirrored = ([f"{perceptual_hash(f[:, ::s]):016x}" for f in chosen] for s in (1, -1))
    rows.append({"key": key, "video_id": key, "hashes": hashes, "mirrored": mirrored})
  for other in others:
    frames, name = make_clip(other), f"benchmark {other['kind']} {other['seed']}"
    index[name] = [perceptual_hash(f) for f in frames]
    looks[name] = [duplicates.small_picture(f) for f in frames]
  return duplicates.survey(rows, index, engine_config().duplicates.distance, looks=looks.get)


def print_recall(folder: str, cuts: str = str(CUTS)) -> None:
  from rows import row  # it keeps its process on two processors: not for a test that imports this

  counts = recall(Path(folder), int(cuts))
  for change in (*CHANGES, ""):
    some = [n for (kind, _), n in counts.items() if kind == change or not change]
    hits = [n for (kind, hit), n in counts.items() if hit and (kind == change or not change)]
    name = (
      f"leakage_recall_{change.replace(' ', '_').replace('-', '_')}" if change else "leakage_recall"
    )
    row(
      name, sum(hits) / max(sum(some), 1), ">= 0.99", detail=f"of {sum(some)} clips of 2 s and more"
    )


def print_drops(count: str = "200") -> None:
  from rows import row

  listed = json.loads(LIST.read_text())
  clips = listed["clips"][:: len(listed["clips"]) // int(count)]
  dropped = drops(clips, listed["benchmark"])
  detail = f"of {len(clips)} clips beside {len(listed['benchmark'])} others"
  row("leakage_false_drops", len(dropped) / len(clips), "<= 0.01", detail=detail)


if __name__ == "__main__":
  parts = {"recall": print_recall, "drops": print_drops}
  for part in sys.argv[1:] or ["drops"]:
    name, *rest = part.split(":")
    if name not in parts or (name == "recall" and not rest):
      sys.exit(__doc__)
    parts[name](*rest)
