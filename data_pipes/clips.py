"""From a media file and the objects in it to a Clip: each frame once, at model resolution."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data_pipes.batch import Clip, RowShape
from data_pipes.errors import Defect, InputError
from data_pipes.files import path_below
from data_pipes.images import read_image, to_model
from data_pipes.masks import GridMask, grid_mask, segmentation_to_mask
from data_pipes.video import Video, open_video, read_scene, scene_ids

MAX_MASK_FRAMES = 32  # frames of an object in multi-frame mode


def media_path(root: str | os.PathLike, path: str) -> Path:
  """The media file an item names, from `root` or absolute; it must lie there. Raises Defect."""
  below = path_below(root, path)
  # Out and in again is right only as long as the folder keeps its name.
  if below is None or os.path.normpath(path).split(os.sep)[0] == "..":
    raise Defect(
      "path", f"media {path!r} leads out of the media folder; accepted: a path inside it"
    )
  return Path(root) / below


def read_clip(
  source: str | os.PathLike | np.ndarray | Sequence | Video,
  shape: RowShape,
  objects: Sequence[Mapping[int, Any]] = (),
  *,
  image: bool = False,
  aspect_ratio: str = "square",
  mask_rule: str = "keep",
  size: tuple[int, int] | None = None,
  start: float | None = None,
  end: float | None = None,
  room: np.ndarray | None = None,
) -> Clip:
  """Reads the scene frames and the frames of all masks in one pass.

  Args:
    source: what `open_video` takes; with `image`, the path of one image, an array [H, W, 3] or a
      Video of one frame.
    shape: gives T (0: no scene frames), the image size and the grid.
    objects: per object {frame number of the source: mask}, in merge order. A mask is a COCO
      segmentation, a uint8 or bool array [H, W] of the frame's size, None for an empty one, or a
      GridMask made with the same grid, aspect_ratio and mask_rule.
    image: the source is one image, whose frame 0 is every scene frame.
    aspect_ratio: "square" (published VideoRefer) or "pad".
    mask_rule: of `mask_to_grid`; under the published one small objects may vanish. An object that
      vanishes under that is counted in the clip, whatever the rule.
    size: (height, width) that polygons refer to; by default the frame's.
    start, end: seconds between which scene frames are taken.
    room: free frame slots of a row [.., S, S, 3], into which a video's frames are written as they
      are decoded, if they fit.

  Raises:
    InputError: unreadable media, a frame the media lacks, a mask of another size than its frame.
  """
  if image:
    if isinstance(source, Video):
      pixels, frame_size, name = source.frames([0])[0], source.size, source.name
    else:
      pixels = source if isinstance(source, np.ndarray) else read_image(str(source))
      name = "the image" if isinstance(source, np.ndarray) else str(source)
      frame_size = pixels.shape[:2]
    count, scene = 1, [0] * shape.scene
  else:
    video = open_video(source)
    name, count, frame_size = video.name, len(video), video.size
    scene = scene_ids(video, shape.scene, start, end) if shape.scene else []
  for i, by_frame in enumerate(objects):
    for number in by_frame:
      if not 0 <= number < count:
        raise InputError(
          f"object {i}: found frame {number}; accepted: 0 to {count - 1}, the frames of {name}"
        )
  cells, vanishing = _on_grid(objects, frame_size, size, shape.grid, aspect_ratio, mask_rule)
  clip = Clip({}, scene, cells, tuple(vanishing))
  numbers = clip.numbers()

  def at_model(frame: np.ndarray) -> np.ndarray:
    return to_model(frame, shape.image_size, aspect_ratio)

  if image:
    return replace(clip, frames={0: at_model(pixels)})
  into = None
  if room is not None and len(numbers) <= len(room):
    into = dict(zip(numbers, room, strict=False))
  frames = read_scene(video, numbers, at_model, into)
  return replace(clip, frames=dict(zip(numbers, frames, strict=True)), placed=into is not None)


def _on_grid(
  objects: Sequence[Mapping[int, Any]],
  frame_size: tuple[int, int],
  size: tuple[int, int] | None,
  grid: int,
  aspect_ratio: str,
  mask_rule: str,
) -> tuple[list[dict[int, np.ndarray]], list[tuple[int, int]]]:
  """Masks as cells [N] of the grid, and the (object, frame) that vanish by the published rule."""
  cells: list[dict[int, np.ndarray]] = []
  vanishing = []
  for i, by_frame in enumerate(objects):
    cells.append({})
    for number, mask in by_frame.items():
      if not isinstance(mask, GridMask):
        mask = whole_mask(mask, frame_size, size, f"object {i}, frame {number}")
        mask = grid_mask(mask, grid, aspect_ratio, mask_rule)
      cells[i][number] = mask.cells
      if mask.lost:
        vanishing.append((i, number))
  return cells, vanishing


def whole_mask(
  mask: Any, frame_size: tuple[int, int], size: tuple[int, int] | None, where: str
) -> np.ndarray:
  """The mask in pixels. Of another size than its frame it would mark another place."""
  if not isinstance(mask, np.ndarray):
    mask = segmentation_to_mask(mask, *(frame_size if mask is None or not size else size))
  if tuple(mask.shape) != tuple(frame_size):
    raise InputError(
      f"{where}: found a mask of {'x'.join(map(str, mask.shape))}; accepted: the size of the "
      f"frame, {frame_size[0]}x{frame_size[1]} (height x width)"
    )
  return mask


def choose_mask_frames(
  objects: Sequence[Mapping[int, Any]], single: bool, limit: int = MAX_MASK_FRAMES, draw=None
) -> list[dict[int, Any]]:
  """The annotated frames that a row takes of each object, in their order.

  Args:
    objects: per object {frame number: segmentation or None}.
    single: one frame an object, where it is seen if it is seen at all: the first, or the one at
      `draw(count)` of `count`. Otherwise all frames.
    limit: more annotated frames than this are thinned out to ids[int(i * count / limit)], as the
      published notebooks do.
  """
  chosen = []
  for by_frame in objects:
    numbers = list(by_frame)
    if single:
      numbers = [n for n in numbers if by_frame[n] is not None] or numbers
      at = draw(len(numbers)) if draw else 0
      numbers = numbers[at : at + 1]
    elif len(numbers) > limit:
      numbers = [numbers[int(i * len(numbers) / limit)] for i in range(limit)]
    chosen.append({n: by_frame[n] for n in numbers})
  return chosen
