"""The answer shown on the clip: an H.264 file with the objects drawn in and the answer below.

Every frame of the clip is shown at its own time, turned as a player turns it. Below the picture
stand the question and the answer, then a track for each object: a block for each frame it was
marked on, in the object's colour. The blocks of one object token are joined and bear its number. A
line runs through the tracks with the frame, whose number and time stand below.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipes.drawing import colour_of, draw_objects, ink_on, shortened
from data_pipes.errors import InputError
from data_pipes.files import replaced
from data_pipes.masks import encode_mask, segmentation_to_mask
from data_pipes.tokenizer import REGION
from data_pipes.video import open_video
from vr_jax.inference.regions import objects_of
from vr_jax.inference.requests import Answer, Request

WIDTHS = (480, 960)  # pixels that the picture is at least and at most wide
HELD = 0.5  # seconds that a mask stays on show after its frame
STILL = 2.0  # seconds that an image is shown
LINES = 8  # of text that there is room for at least; more if the picture is high
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
  if not path.parent.is_dir():
    raise InputError(f"{path}: cannot be written; accepted: a file in a folder that is there")
  video = open_video(request.video, fps=request.fps, upright=True)
  # As run lengths until their frame is drawn: many masks at full size would fill the memory.
  objects = [marked.masks for marked in objects_of(request.regions, video, encode_mask)]
  objects += request.annotation
  fps = Fraction(video.fps or DEFAULT_FPS).limit_denominator(60_000)
  stills = round(STILL * fps) if video.kind == "image" else 1  # times that a frame is written
  numbers = range(len(video))
  ticks, unit = video.pts(numbers) or (list(numbers), 1 / fps)
  seconds = [float((tick - ticks[0]) * unit) for tick in ticks]
  names = [entry["name"] for entry in answer.objects]
  plates = {i: "" if name == f"object {i}" else name for i, name in enumerate(names)}
  width = min(max(video.size[1], WIDTHS[0]), WIDTHS[1]) // 2 * 2
  height = round(video.size[0] * width / video.size[1])
  panel = _Panel(width, height, _question(request.question, names), answer, seconds)
  shown = _held(objects, seconds)

  with replaced(path) as part:
    try:
      container = av.open(str(part), "w", format="mp4", options={"movflags": "faststart"})
    except (av.FFmpegError, OSError) as error:
      raise InputError(f"{path}: cannot be written ({error})") from None
    with container:
      stream = container.add_stream("libx264", rate=fps)
      stream.pix_fmt = "yuv420p"
      stream.options = {"crf": "20", "preset": "veryfast"}
      stream.codec_context.time_base = unit
      remaining = iter(numbers)

      def add(frame: np.ndarray) -> np.ndarray:
        n = next(remaining)
        masks = {i: segmentation_to_mask(m, *video.size) for i, m in shown[n].items()}
        image = panel.below(draw_objects(frame, masks, width, names=plates), n)
        if n == 0:
          stream.width, stream.height = image.size
        for i in range(stills):
          encoded = av.VideoFrame.from_image(image)
          encoded.pts, encoded.time_base = ticks[n] - ticks[0] + i, unit
          container.mux(stream.encode(encoded))
        return np.empty(0)  # encoded as they are decoded, so that not all are held

      video.frames(numbers, add)
      container.mux(stream.encode(None))


def segments(answer: Answer) -> list[str]:
  """A line for each object: the frames that each of its tokens stands for."""
  lines = []
  for entry in answer.objects:
    spans = [
      f"{number}: {frames[0]}" + (f"-{frames[-1]}" if len(frames) > 1 else "")
      for number, frames in enumerate(entry["tokens"], 1)
    ]
    lines.append(f"{entry['name']}: frames of its tokens: {', '.join(spans)}")
  return lines


def _question(question: str, names: Sequence[str]) -> str:
  """The question with the objects' names in the place of `<region>`."""
  remaining = iter(names)
  return re.sub(re.escape(REGION), lambda _: f"<{next(remaining)}>", question)


def _held(objects: Sequence[Mapping[int, Any]], seconds: Sequence[float]) -> list[dict[int, Any]]:
  """The masks on show at each frame: its own, or those of at most HELD seconds before."""
  shown: list[dict[int, Any]] = [{} for _ in seconds]
  for i, masks in enumerate(objects):
    for number in sorted(masks):
      for n in range(number, len(seconds)):
        if seconds[n] - seconds[number] > HELD + 1e-6:
          break
        shown[n][i] = masks[number]
  return shown


def _wrapped(text: str, width: float, font: ImageFont.FreeTypeFont) -> list[str]:
  """Lines at most `width` pixels wide; blank ones are left out."""
  lines = []
  for paragraph in text.splitlines():
    line = ""
    for word in paragraph.split():
      while word:
        longer = f"{line} {word}" if line else word
        if font.getlength(longer) <= width:
          line, word = longer, ""
        elif line:
          lines.append(line)
          line = ""
        else:  # a word wider than a line
          fits = next(
            n for n in range(len(word), 0, -1) if n == 1 or font.getlength(word[:n]) <= width
          )
          lines.append(word[:fits])
          word = word[fits:]
    lines += [line] * bool(line)
  return lines


@dataclasses.dataclass
class _Panel:
  """What stands below a picture of `width` x `height`; drawn once, but for what changes."""

  width: int
  height: int
  question: str
  answer: Answer
  seconds: Sequence[float]

  def __post_init__(self):
    self._size = max(13, self.width // 42)
    self._font = ImageFont.load_default(self._size)
    self._small = ImageFont.load_default(round(0.8 * self._size))
    self._margin = self._size
    room = self.width - 2 * self._margin
    names = [
      o["name"] if o["name"] == f"object {i}" else f"{i}  {o['name']}"
      for i, o in enumerate(self.answer.objects)
    ]
    names = [shortened(name, 0.3 * self.width, self._small) for name in names]
    longest = max((self._small.getlength(name) for name in names), default=0)
    self._left = round(2 * self._margin + longest)
    step = round(1.35 * self._size)
    lines = [(line, FAINT) for line in _wrapped(self.question, room, self._font)]
    text = _wrapped(self.answer.text, room, self._font) or ["(no answer)"]
    most = max(LINES, self.height // step - len(lines))
    if len(text) > most:
      text = [*text[: most - 1], f"… and {len(text) - most + 1} more lines"]
    lines += [(line, INK) for line in text]
    self._top = self._margin + step * len(lines) + self._margin // 2
    self._track = round(1.6 * self._size)
    self._end = self._top + self._track * len(names)
    height = self._end + round(1.6 * self._size)
    self._base = Image.new("RGB", (self.width, height + height % 2), GROUND)
    draw = ImageDraw.Draw(self._base)
    for i, (line, ink) in enumerate(lines):
      draw.text((self._margin, self._margin + i * step), line, ink, self._font)
    for i, name in enumerate(names):
      self._draw_track(draw, i, name)

  def _x(self, frame: float) -> float:
    return self._left + (self.width - self._margin - self._left) * frame / len(self.seconds)

  def _draw_track(self, draw: ImageDraw.ImageDraw, index: int, name: str) -> None:
    top = self._top + index * self._track
    bottom, middle = top + round(0.8 * self._track), top + 0.4 * self._track
    colour = colour_of(index)
    ink = ink_on(colour)
    draw.text((self._margin, middle), name, INK, self._small, anchor="lm")
    draw.rectangle((self._left, top, self.width - self._margin, bottom), fill="#2a2a2a")
    tokens = self.answer.objects[index]["tokens"]
    for number, frames in enumerate(tokens, 1):
      first, last = self._x(min(frames)), self._x(max(frames) + 1)
      draw.rectangle((first, middle - 1, last, middle + 1), fill=colour)
      for frame in frames:
        right = max(self._x(frame + 1) - 1, self._x(frame) + 2)
        draw.rectangle((self._x(frame), top, right, bottom), fill=colour)
      if number > 1:  # where one token ends and the next begins
        draw.line((first - 1, top, first - 1, bottom), fill=GROUND, width=2)
    taken = float(self._left)  # a number that has no room is left out
    for number, frames in enumerate(tokens, 1):
      half = 0.5 * self._small.getlength(str(number)) + 3
      centre = (self._x(min(frames)) + self._x(max(frames) + 1)) / 2
      centre = min(max(centre, self._left + half), self.width - self._margin - half)
      if centre - half >= taken:
        draw.rectangle((centre - half, top, centre + half, bottom), fill=colour)
        draw.text((centre, middle), str(number), ink, self._small, anchor="mm")
        taken = centre + half

  def below(self, picture: Image.Image, frame: int) -> Image.Image:
    """The picture with the panel below it, at an even height."""
    height = picture.height // 2 * 2
    whole = Image.new("RGB", (self.width, height + self._base.height), GROUND)
    whole.paste(picture)
    whole.paste(self._base, (0, height))
    if len(self.seconds) == 1:
      return whole
    draw = ImageDraw.Draw(whole)
    if self.answer.objects:
      x = self._x(frame + 0.5)
      draw.line((x, height + self._top - 3, x, height + self._end), fill=INK, width=2)
    text = f"frame {frame}   {self.seconds[frame]:.2f} s"
    corner = (self.width - self._margin, height + self._base.height - round(0.5 * self._margin))
    draw.text(corner, text, FAINT, self._small, anchor="rs")
    return whole
