"""`vr frames`: which frame has which number, at what time, and where its pixels are."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipes.drawing import contact_sheet, draw_objects, with_rulers
from data_pipes.errors import InputError, reading
from data_pipes.files import replaced
from data_pipes.frame_rules import uniform_frames
from data_pipes.video import Video, open_video
from vr_jax.inference.regions import frame_number, parse_seconds, read_regions

DEFAULT = 16  # frames, where none are named
MOST = 400  # frames of a sheet
CELL = 480  # pixels: the width of a sheet's frame, at most
PICTURES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Frames:
  video: str = field(
    metadata={"positional": True, "help": "a video, animation, image or folder of frames"}
  )
  out: str = field(
    metadata={"help": "a folder, for a picture a frame; or a contact sheet, sheet.png"}
  )
  at: str | None = field(
    default=None, metadata={"metavar": "12,40,1.5s", "help": "numbers and times of frames"}
  )
  every: str | None = field(
    default=None, metadata={"metavar": "1s", "help": "a frame each so many seconds, or frames (10)"}
  )
  region: tuple[str, ...] = field(
    default=(),
    metadata={"repeat": True, "metavar": "SPEC", "help": "drawn in, as `vr ask` takes it"},
  )
  fps: float | None = field(
    default=None, metadata={"help": "frames a second of a folder (default: 3)", "metavar": "F"}
  )


def run(options: Frames) -> None:
  video = open_video(options.video, fps=options.fps, upright=True)
  objects = read_regions(video, options.region)
  marked = {number for by_frame in objects.values() for number in by_frame}
  numbers = sorted(_chosen(options, video) or marked or _spread(video))
  out = Path(options.out)
  kind, unwritable = out.suffix.lower(), f"--out {out}: cannot be written"
  if out.is_dir() or not kind:
    with reading(unwritable):
      out.mkdir(parents=True, exist_ok=True)

    def write(number: int, frame: np.ndarray) -> np.ndarray:
      picture = _picture(video, number, frame, objects, frame.shape[1])
      with reading(unwritable):
        picture.save(out / f"{number:06d}.png")
      return frame[:0]

    _for_each(video, numbers, write)
  elif kind not in PICTURES:
    raise InputError(f"--out {out}: accepted: a folder, or a sheet ({', '.join(PICTURES)})")
  elif len(numbers) > MOST:
    raise InputError(f"--out {out}: {len(numbers)} frames; accepted: a folder, or up to {MOST}")
  else:

    def draw(number: int, frame: np.ndarray) -> np.ndarray:
      width = min(CELL, frame.shape[1])
      return np.asarray(_picture(video, number, frame, objects, width))

    cells = [Image.fromarray(cell) for cell in _for_each(video, numbers, draw)]
    sheet = contact_sheet(cells, columns=math.ceil(math.sqrt(len(cells))))
    with reading(unwritable), replaced(out) as part:
      sheet.save(part, format=Image.registered_extensions()[kind])
  print(f"{out}: {len(numbers)} of the frames of {_summary(video)}")


def _for_each(
  video: Video, numbers: Sequence[int], call: Callable[[int, np.ndarray], np.ndarray]
) -> list[np.ndarray]:
  """What `call` makes of each frame, called as it is decoded; `numbers` ascend."""
  following = iter(numbers)
  return video.frames(numbers, lambda frame: call(next(following), frame))


def _picture(
  video: Video,
  number: int,
  frame: np.ndarray,
  objects: Mapping[str, Mapping[int, np.ndarray]],
  width: int,
) -> Image.Image:
  masks = {i: by_frame[number] for i, by_frame in enumerate(objects.values()) if number in by_frame}
  masks = {i: mask for i, mask in masks.items() if mask.shape == frame.shape[:2]}
  image = draw_objects(frame, masks, width, names=dict(enumerate(objects)))
  time = "" if video.times is None else f"   {video.times[number]:.3f} s"
  return with_rulers(image, frame.shape[:2], f"{number}{time}")


def _chosen(options: Frames, video: Video) -> set[int]:
  """The frames that --at and --every name."""
  numbers = set()
  try:
    for text in options.at.split(",") if options.at else ():
      numbers.add(frame_number(text.strip(), video))
  except InputError as error:
    raise InputError(f"--at {options.at}: {error}") from None
  if options.every is None:
    return numbers
  seconds = parse_seconds(options.every)
  if seconds is None and options.every.isdecimal() and int(options.every) > 0:
    return numbers | set(range(0, len(video), int(options.every)))
  if not seconds:
    raise InputError(f"--every {options.every}: accepted: a time such as 1s, or frames such as 10")
  if video.times is None:
    raise InputError(f"--every {options.every}: {video.name}: the {video.kind} has no times")
  return numbers | _on_show(video.times, seconds)


def _on_show(times: np.ndarray, step: float) -> set[int]:
  """The frames on show `step` seconds apart, from the first frame on."""
  ends = np.append(times[1:], times[-1] + step if len(times) < 2 else 2 * times[-1] - times[-2])
  # A microsecond of slack, as in Video.time_to_frame.
  before, after = (np.ceil((t - times[0] - 1e-6) / step) for t in (times, ends))
  return set(np.flatnonzero(after > before).tolist())


def _spread(video: Video) -> list[int]:
  return np.unique(uniform_frames(len(video), min(DEFAULT, len(video)))).tolist()


def _summary(video: Video) -> str:
  height, width = video.size
  parts = [f"{video.name}: {len(video)} frames", f"{width}x{height} (width x height)"]
  if video.times is not None:
    parts += [f"{video.fps:.6g} a second", f"{video.times[0]:.3f} to {video.times[-1]:.3f} s"]
  return ", ".join(parts)
