"""The answer shown on the clip: an H.264 file with the objects drawn in and the answer below.

Below the picture stand the question and the answer, then a track for each object: a block for each
frame it was marked on, in the object's colour. The blocks of one object token are joined and bear
its number. A line runs through the tracks with the time.
"""

import dataclasses
import os
import textwrap
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipes.errors import InputError
from data_pipes.masks import segmentation_to_mask
from data_pipes.video import open_video
from vr_jax.evaluation.overlay import colour_of, draw_objects, luminance
from vr_jax.inference.model import Answer, Request
from vr_jax.inference.regions import objects_of

WIDTHS = (480, 960)  # pixels that the picture is at least and at most wide
HELD = 0.5  # seconds that a mask stays on show after its frame
STILL = 2.0  # seconds that an image is shown
DEFAULT_FPS = 3.0  # of frames in memory, which have no times
INK, FAINT, GROUND = "#f2f2f2", "#8c8c8c", "#161616"


def write(path: Path | str, request: Request, answer: Answer) -> None:
  """Writes the request's video with its objects and the answer to `path`, an .mp4 file.

  Raises:
    InputError: a file of another kind, or one that cannot be written.
  """
  path = Path(path)
  if path.suffix.lower() != ".mp4":
    raise InputError(f"{path}: accepted: a file that ends in .mp4")
  video = open_video(request.video)
  objects = [dict(marked.masks) for marked in objects_of(request.regions, video)]
  for annotation in request.annotation:
    objects.append({n: segmentation_to_mask(s, *video.size) for n, s in annotation.items()})
  fps = Fraction(video.fps or DEFAULT_FPS).limit_denominator(60_000)
  count = max(1, round(STILL * fps)) if video.kind == "image" else len(video)
  width = min(max(video.size[1], WIDTHS[0]), WIDTHS[1]) // 2 * 2
  panel = _Panel(width, count, request.question, answer)
  shown = _held(objects, count, count if video.kind == "image" else round(HELD * fps))

  beside = path.with_name(path.name + ".tmp")
  try:
    container = av.open(str(beside), "w", format="mp4")
  except (av.FFmpegError, OSError) as error:
    raise InputError(f"{path}: cannot be written ({error})") from None
  try:
    with container:
      stream = container.add_stream("libx264", rate=fps)
      stream.pix_fmt = "yuv420p"
      stream.options = {"crf": "20"}
      numbers = iter(range(count))

      def add(frame: np.ndarray) -> np.ndarray:
        n = next(numbers)
        image = panel.below(draw_objects(frame, shown[n], width), n)
        if n == 0:
          stream.width, stream.height = image.size
        container.mux(stream.encode(av.VideoFrame.from_image(image)))
        return np.empty(0)  # encoded as they are decoded, so that not all are held

      if video.kind == "image":
        (frame,) = video.frames([0])
        for _ in range(count):
          add(frame)
      else:
        video.frames(range(count), add)
      container.mux(stream.encode(None))
    os.replace(beside, path)
  finally:
    beside.unlink(missing_ok=True)


def _held(
  objects: Sequence[Mapping[int, np.ndarray]], count: int, hold: int
) -> list[dict[int, np.ndarray]]:
  """The masks on show at each frame: those of the frame, or of one at most `hold` frames before."""
  shown: list[dict[int, np.ndarray]] = [{} for _ in range(count)]
  for i, masks in enumerate(objects):
    for number in sorted(masks):
      for n in range(number, min(number + hold + 1, count)):
        shown[n][i] = masks[number]
  return shown


@dataclasses.dataclass
class _Panel:
  """What stands below the picture; drawn once, but for the line of the time."""

  width: int
  count: int
  question: str
  answer: Answer

  def __post_init__(self):
    self._size = max(13, self.width // 42)
    self._font = ImageFont.load_default(self._size)
    self._small = ImageFont.load_default(round(0.8 * self._size))
    self._margin = self._size
    names = [f"{i}  {o['name']}" for i, o in enumerate(self.answer.objects)]
    longest = max((self._small.getlength(name) for name in names), default=0)
    self._left = round(2 * self._margin + min(longest, 0.3 * self.width))
    columns = max(10, int((self.width - 2 * self._margin) / self._font.getlength("n")))
    lines = [(line, FAINT) for line in textwrap.wrap(self.question, columns)]
    lines += [(line, INK) for line in textwrap.wrap(self.answer.text, columns) or ["(no answer)"]]
    step = round(1.35 * self._size)
    self._top = self._margin + step * len(lines) + self._margin // 2
    self._track = round(1.6 * self._size)
    height = self._top + self._track * len(names) + self._margin
    self._base = Image.new("RGB", (self.width, height + height % 2), GROUND)
    draw = ImageDraw.Draw(self._base)
    for i, (line, ink) in enumerate(lines):
      draw.text((self._margin, self._margin + i * step), line, ink, self._font)
    for i, name in enumerate(names):
      self._draw_track(draw, i, name)

  def _x(self, frame: float) -> float:
    return self._left + (self.width - self._margin - self._left) * frame / self.count

  def _draw_track(self, draw: ImageDraw.ImageDraw, index: int, name: str) -> None:
    top = self._top + index * self._track
    bottom, middle = top + round(0.8 * self._track), top + 0.4 * self._track
    colour = colour_of(index)
    ink = "black" if luminance(colour) > 0.35 else "white"
    draw.text((self._margin, middle), name, INK, self._small, anchor="lm")
    draw.rectangle((self._left, top, self.width - self._margin, bottom), fill="#2a2a2a")
    for number, frames in enumerate(self.answer.objects[index]["tokens"], 1):
      first, last = self._x(min(frames)), self._x(max(frames) + 1)
      draw.rectangle((first, middle - 1, last, middle + 1), fill=colour)
      for frame in frames:
        right = max(self._x(frame + 1) - 1, self._x(frame) + 2)
        draw.rectangle((self._x(frame), top, right, bottom), fill=colour)
      label = str(number)
      half = 0.5 * self._small.getlength(label) + 3
      centre = min(max((first + last) / 2, self._left + half), self.width - self._margin - half)
      draw.rectangle((centre - half, top, centre + half, bottom), fill=colour)
      draw.text((centre, middle), label, ink, self._small, anchor="mm")

  def below(self, picture: Image.Image, frame: int) -> Image.Image:
    """The picture with the panel below it, at an even height."""
    height = picture.height // 2 * 2
    whole = Image.new("RGB", (self.width, height + self._base.height), GROUND)
    whole.paste(picture)
    whole.paste(self._base, (0, height))
    if self.answer.objects:
      x = self._x(frame + 0.5)
      ends = [height + self._top - 3, height + self._base.height - self._margin // 2]
      ImageDraw.Draw(whole).line((x, ends[0], x, ends[1]), fill=INK, width=2)
    return whole
