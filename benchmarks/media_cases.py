"""Files that readers get wrong, one folder a case: what is right, and what ours gives.

    python benchmarks/media_cases.py FOLDER

A case is a folder with its files and a README, of which the sentence behind "Right:" says what is
right. Frame k of the numbered clips bears k in eight blocks along the top, bit 0 left, white = 1.
Cases that are not known here are opened, and what they hold is shown without a verdict. The exit
code is 1 where one failed.
"""

import argparse
import contextlib
import itertools
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import av
import numpy as np
from PIL import Image

from data_pipes.check import Checks
from data_pipes.check_report import check
from data_pipes.errors import InputError
from data_pipes.video import open_video, scene_ids
from vr_jax.evaluation.benchmarks.videomme import read_srt
from vr_jax.inference.regions import Region, read_regions

Outcome = tuple[str, bool]  # what ours gives, and whether that is right
Case = Callable[[Path], Outcome]


def number(frame: np.ndarray) -> int:
  """The number that a frame bears."""
  grey, block = frame.mean(-1), frame.shape[1] // 8
  return sum(int(grey[4, block * i + block // 2] > 127) << i for i in range(8))


def ranges(numbers: Sequence[int]) -> str:
  """0..39, 100..139"""
  groups: list[list[int]] = []
  for n in numbers:
    if groups and n == groups[-1][-1] + 1:
      groups[-1].append(n)
    else:
      groups.append([n])
  return ", ".join(f"{g[0]}..{g[-1]}" if len(g) > 1 else str(g[0]) for g in groups)


def numbered(name: str, right: Iterable[int], least: int = 0) -> Case:
  """All frames at once, each alone, and those of the scene bear these numbers.

  With `least`, so many of them are enough.
  """
  expected = list(right)

  def case(folder: Path) -> Outcome:
    video = open_video(folder / name)
    together = [number(frame) for frame in video.frames(range(len(video)))]
    alone = [number(video.frames([i])[0]) for i in range(len(video))]
    scene = scene_ids(video, 16)
    given = [number(frame) for frame in video.frames(scene)]
    right = expected[: len(together)] if len(together) >= least > 0 else expected
    ok = together == alone == right and given == [right[i] for i in scene]
    same = "" if together == alone else f"; alone {ranges(alone)}"
    return f"{len(video)} frames: {ranges(together)}{same}", ok

  return case


def area(
  video: str, spec: str | Callable[[Path], Region], right: int | None, says: str = ""
) -> Case:
  """A region has so many pixels; or (None) is refused in one line that holds `says`."""

  def case(folder: Path) -> Outcome:
    region = f"{folder}/{spec}" if isinstance(spec, str) else spec(folder)
    try:
      (by_frame,) = read_regions(folder / video, region).values()
    except InputError as error:
      line = str(error).replace(f"{folder}/", "")
      return f"refused: {line}", right is None and says in line and "\n" not in line
    pixels = int(next(iter(by_frame.values())).sum())
    return f"{pixels} pixels", pixels == right

  return case


def colon(folder: Path) -> Outcome:
  (name,) = (p.name for p in folder.iterdir() if p.suffix == ".mp4")
  with contextlib.chdir(folder):
    counts = [len(open_video(f"{head}{name}")) for head in ("", "./")]
  return f"{counts} frames", counts == [40, 40]


def photo(folder: Path) -> Outcome:
  video = open_video(folder / "exif.jpg", upright=True)
  mask = read_regions(video, "box:2,2,30,120")["object 0"][0]
  height, width = video.size
  whole = int(mask.sum()) == 28 * 118
  return f"{width} wide x {height} high, the box {int(mask.sum())} pixels", whole and height == 128


def folder_of(name: str, files: Sequence[str]) -> Case:
  """Frame i of a folder is the i-th of these files."""

  def case(folder: Path) -> Outcome:
    video = open_video(folder / name)
    stored = [np.asarray(Image.open(folder / name / file).convert("RGB")) for file in files]
    frames = video.frames(range(len(video)))
    same = [np.array_equal(a, b) for a, b in zip(frames, stored, strict=False)]
    return f"{len(frames)} frames, {sum(same)} in their place", same == [True] * len(files)

  return case


def late(folder: Path) -> Outcome:
  frame = open_video(folder / "late.mp4").time_to_frame(2.5)
  return f"@2.5s is frame {frame}", frame == 12


def mirrored(folder: Path) -> Outcome:
  path = folder / "hflip.mp4"
  with av.open(str(path)) as container:
    stored = next(itertools.islice(container.decode(video=0), 2, None)).to_ndarray(format="rgb24")
  frame = open_video(path).frames([2])[0].astype(int)
  ours = {
    "np.fliplr": np.abs(frame - np.fliplr(stored)).max() <= 2,
    "np.rot90(…, 2)": np.abs(frame - np.rot90(stored, 2)).max() <= 2,
  }
  names = [name for name, same in ours.items() if same]
  return (
    f"frame 2 equals {' and '.join(names) or 'neither'} of the stored one",
    "np.fliplr" in names,
  )


def not_seen(folder: Path) -> Outcome:
  (by_frame,) = read_regions(folder / "base.mp4", str(folder / "rle.json")).values()
  areas = {frame: int(mask.sum()) for frame, mask in by_frame.items()}
  return f"pixels by frame {areas}", areas[4] == 0 and any(areas.values())


def subtitles(folder: Path) -> Outcome:
  _, _, text = read_srt(folder / "s.srt")[0]
  return repr(text), text == "It costs 30"


def one_sample(folder: Path) -> Outcome:
  counts = {}
  with tempfile.TemporaryDirectory() as name:
    lines = Path(name) / "vl3.jsonl"
    items = json.loads((folder / "vl3.json").read_text())
    lines.write_text("".join(json.dumps(item) + "\n" for item in items))
    for file in (folder / "vl3.json", lines):
      summary = check([file], Checks(folder))
      counts[file.suffix] = (summary["good"], list(summary["defects"]))
  return f"{counts}", list(counts.values()) == [(1, [])] * 2


CASES: dict[str, Case] = {
  "animated_webp": numbered("an.webp", range(12)),
  "array_logits": area(
    "base.mp4",
    lambda folder: Region(mask=np.load(folder / "mask.npz")["mask"], frame=3),
    None,
    "accepted: bool, 0/1",
  ),
  "avi_h263_all_keyframes": numbered("k_h263.avi", range(100)),
  "avi_h264_b1": numbered("av_x264bf1.avi", range(100)),
  "colon_in_name": colon,
  "exif_photo": photo,
  "frames_appledouble": folder_of("f_mac", [f"{i:05}.jpg" for i in range(4)]),
  "frames_unpadded": folder_of("f_num", [f"{i}.png" for i in range(12)]),
  "hevc_cut_at_cra": numbered("oh_c1.ts", range(24, 60)),
  "late_start": late,
  "m1v_elementary": numbered("mpeg1.m1v", range(60)),
  "mask_davis_palette": area("base.mp4", "davis.png@3", None, "1, 2"),
  "mask_rgba": area("base.mp4", "rgba_white.png@3", 1200),
  "mirrored": mirrored,
  "mkv_cover_first": numbered("cover_first.mkv", range(40)),
  "rle_missing_segmentation": not_seen,
  "srt_no_numbers": subtitles,
  "truncated_faststart": numbered("fs_cut.mp4", range(60), least=57),
  "ts_concatenated": numbered("cat.ts", [*range(40), *range(100, 140)]),
  "videollama3_list": one_sample,
}


def unknown(folder: Path) -> Outcome:
  """What a case that is not known here holds."""
  given = []
  for path in sorted(p for p in folder.iterdir() if p.name != "README"):
    try:
      video = open_video(path, upright=True)
      numbers = ranges([number(frame) for frame in video.frames(range(len(video)))])
      given.append(f"{path.name}: {len(video)} frames: {numbers}")
    except InputError as error:
      given.append(str(error).replace(f"{folder}/", ""))
  return "; ".join(given), True


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("folder", type=Path)
  folders = sorted(p for p in parser.parse_args().folder.iterdir() if p.is_dir())
  failed = 0
  print("| case | right | given | |\n|---|---|---|---|")
  for folder in folders:
    readme = (folder / "README").read_text() if (folder / "README").is_file() else ""
    right = re.search(r"Right:\s*(.*?)\s*(?:Today:|$)", " ".join(readme.split()))
    try:
      given, ok = CASES.get(folder.name, unknown)(folder)
    except InputError as error:
      given, ok = f"refused: {error}", False
    verdict = ("ok" if ok else "failed") if folder.name in CASES else "?"
    failed += verdict == "failed"
    cells = (folder.name, right[1] if right else "", given, verdict)
    print("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |", flush=True)
  print(f"\n{len(folders)} cases, {failed} failed", file=sys.stderr)
  return min(failed, 1)


if __name__ == "__main__":
  sys.exit(main())
