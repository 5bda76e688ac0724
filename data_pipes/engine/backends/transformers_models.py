"""Models of `transformers` on this machine: Grounding DINO and SAM 2 video as Segmentor, and any
image-text-to-text model as Annotator or region describer.

Frames are prepared here as the published processors do (their classes for SAM 2 need torchvision,
whose registry build does not load beside a CPU torch); no part of torchvision is used.
"""

import functools
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from data_pipes import hub
from data_pipes.drawing import outline, shrunk
from data_pipes.engine.prompts import prompt_hash, render
from data_pipes.engine.quality.masks import iou
from data_pipes.engine.roles import (
  Ambiguous,
  Clip,
  Context,
  Description,
  Masks,
  Track,
  model_version,
)
from data_pipes.errors import InputError, one_line
from data_pipes.frame_rules import uniform_frames

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # SAM 2's normalisation

Box = tuple[float, float, float, float]


class DinoSam2:
  """Noun -> boxes (Grounding DINO) on a few frames -> masks on all of them (SAM 2 video).

  Args:
    detector, tracker: folder or hub name of the two models.
    threshold, text_threshold: of the detector's scores.
    tries: frames that are searched; the one with the best box is the prompt.
    most: objects of a noun. most_boxes: with more separate boxes than this the noun is ambiguous.
    cycle: track back from both ends and store how much of the mask is found again.
  """

  hub_models = ("detector", "tracker")

  def __init__(
    self,
    context: Context,
    detector: str,
    tracker: str,
    device: str = "cpu",
    threshold: float = 0.25,
    text_threshold: float = 0.25,
    tries: int = 3,
    most: int = 1,
    most_boxes: int = 6,
    cycle: bool = True,
  ):
    import torch
    from transformers import (
      AutoTokenizer,
      GroundingDinoForObjectDetection,
      GroundingDinoImageProcessorPil,
      GroundingDinoProcessor,
      Sam2VideoModel,
    )

    self.device = torch.device(device)
    self.threshold, self.text_threshold = threshold, text_threshold
    self.tries, self.most, self.most_boxes, self.cycle = tries, most, most_boxes, cycle
    with _named("detector", detector):
      self.detector = _eval(GroundingDinoForObjectDetection, detector, self.device)
      self.processor = GroundingDinoProcessor(
        _pretrained(GroundingDinoImageProcessorPil, detector),
        _pretrained(AutoTokenizer, detector),
      )
    with _named("tracker", tracker):
      self.tracker = _eval(Sam2VideoModel, tracker, self.device)
    self.side = int(self.tracker.config.image_size)

  @staticmethod
  def identity(options: Mapping[str, Any], context: Context) -> dict[str, Any]:
    decides = {key: value for key, value in options.items() if key != "device"}
    versions = {name: model_version(options[name]) for name in ("detector", "tracker")}
    return {
      "backend": f"transformers {options['detector']} + {options['tracker']}",
      "options": decides,
      "versions": versions,
    }

  def tracks(self, clip: Clip, noun: str, frames: Sequence[int]) -> list[Track]:
    images = clip.open().frames(frames)
    tried = sorted(set(uniform_frames(len(images), self.tries).tolist()))
    seen = [(n, self._boxes(images[n], noun)) for n in tried]
    seen = [(n, boxes) for n, boxes in seen if boxes]
    if not seen:
      return []
    start, boxes = max(seen, key=lambda f: f[1][0][1])
    if len(boxes) > self.most_boxes:
      raise Ambiguous(
        f"ambiguous: {len(boxes)} boxes for {noun!r} on frame {frames[start]}, at most "
        f"{self.most_boxes}"
      )
    boxes = boxes[: self.most]
    masks, scores = self._carry(images, start, [box for box, _ in boxes])
    out = []
    for k, (box, score) in enumerate(boxes):
      prompt = {
        "frame": int(frames[start]),
        "box": [round(float(v), 1) for v in box],
        "score": round(score, 4),
      }
      numbers = {"object_score": scores[k]}
      if self.cycle:
        numbers["cycle_iou"] = self._cycle(images, masks[k], start)
      out.append(Track(dict(zip(frames, masks[k], strict=True)), prompt, numbers))
    return out

  def _boxes(self, frame: np.ndarray, noun: str) -> list[tuple[Box, float]]:
    """Boxes of a noun without overlaps, best first, xyxy in pixels."""
    import torch

    inputs = self.processor(
      images=Image.fromarray(frame), text=[[f"a {noun}"]], return_tensors="pt"
    )
    inputs = inputs.to(self.device)
    with torch.inference_mode():
      output = self.detector(**inputs)
    (result,) = self.processor.post_process_grounded_object_detection(
      output,
      inputs["input_ids"],
      threshold=self.threshold,
      text_threshold=self.text_threshold,
      target_sizes=[frame.shape[:2]],
    )
    pairs = zip(result["boxes"].tolist(), result["scores"].tolist(), strict=True)
    return separate_boxes([(tuple(box), score) for box, score in pairs], frame.shape[:2])

  def _carry(self, images, start: int, boxes: Sequence[Box]):
    """Masks [object][frame] bool [H, W] from boxes on frame `start`, both ways in time.

    Returns also each object's mean score of being visible.
    """
    import torch

    height, width = images[0].shape[:2]
    session = self._session(images)
    scale = torch.tensor([self.side / width, self.side / height] * 2)
    for number, box in enumerate(boxes):
      corners = (torch.tensor(box) * scale).reshape(1, 1, 2, 2)
      index = session.obj_id_to_idx(number + 1)
      inputs = {
        "point_coords": corners,
        "point_labels": torch.tensor([[[2, 3]]], dtype=torch.int32),  # the corners of a box
      }
      session.add_point_inputs(index, start, inputs)
    session.obj_with_new_inputs = [n + 1 for n in range(len(boxes))]
    return self._propagate(session, start, len(boxes), images)

  def _session(self, images):
    import torch
    from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

    height, width = images[0].shape[:2]
    size = (self.side, self.side)
    small = [Image.fromarray(f).resize(size, Image.Resampling.BILINEAR) for f in images]
    pixels = torch.from_numpy(np.stack([np.asarray(f) for f in small])).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (_MEAN, _STD))
    return Sam2VideoInferenceSession(
      video=(pixels - mean) / std,
      video_height=height,
      video_width=width,
      inference_device=self.device,
      inference_state_device=self.device,
      video_storage_device="cpu",
      dtype=torch.float32,
    )

  def _propagate(self, session, start: int, count: int, images):
    import torch

    height, width = images[0].shape[:2]
    masks = [[np.zeros((height, width), bool) for _ in images] for _ in range(count)]
    visible: list[list[float]] = [[] for _ in range(count)]
    with torch.inference_mode():
      self.tracker(inference_session=session, frame_idx=start)
      for reverse in (False, True):
        for output in self.tracker.propagate_in_video_iterator(
          session, start_frame_idx=start, reverse=reverse
        ):
          logits = torch.nn.functional.interpolate(
            output.pred_masks.float(), (height, width), mode="bilinear", align_corners=False
          )[:, 0]
          present = output.object_score_logits.reshape(-1)
          for k in range(count):
            if present[k] >= 0:
              masks[k][output.frame_idx] = (logits[k] > 0).cpu().numpy()
            visible[k].append(float(torch.sigmoid(present[k])))
    return masks, [round(float(np.mean(v)), 4) for v in visible]

  def _cycle(self, images, masks: Sequence[np.ndarray], start: int) -> float:
    """Tracks back from each end of the visible span; the worse IoU with the mask at the start."""
    worst = 1.0
    for step in (1, -1):
      end = start
      while 0 <= end + step < len(images) and masks[end + step].any():
        end += step
      if end == start or not masks[end].any():
        continue
      ys, xs = np.nonzero(masks[end])
      box = (float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1))
      (back,), _ = self._carry(images, end, [box])
      worst = min(worst, iou(back[start], masks[start]))
    return round(worst, 4)


def separate_boxes(boxes: list[tuple[Box, float]], size: tuple[int, int]):
  """Boxes inside the frame, best first, without those that mostly cover a better one."""
  height, width = size
  kept: list[tuple[Box, float]] = []
  for (x1, y1, x2, y2), score in sorted(boxes, key=lambda b: -b[1]):
    box = (max(0.0, x1), max(0.0, y1), min(float(width), x2), min(float(height), y2))
    if box[2] - box[0] < 2 or box[3] - box[1] < 2:
      continue
    if all(_box_iou(box, other) < 0.5 for other, _ in kept):
      kept.append((box, score))
  return kept


def _box_iou(a: Box, b: Box) -> float:
  width = min(a[2], b[2]) - max(a[0], b[0])
  height = min(a[3], b[3]) - max(a[1], b[1])
  inside = max(0.0, width) * max(0.0, height)
  areas = sum((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b))
  return inside / (areas - inside)


class _LocalCaptioner:
  """An image-text-to-text model with a chat template.

  Args:
    model: folder or hub name. frames: pictures shown. size: their longer side in pixels.
  """

  hub_models = ("model",)
  prompts: tuple[str, ...] = ()

  def __init__(
    self,
    context: Context,
    model: str,
    device: str = "cpu",
    frames: int = 8,
    size: int = 448,
    max_new_tokens: int = 128,
  ):
    self.frames, self.size, self.max_new_tokens = frames, size, max_new_tokens
    with _named("model", model), _loading:
      self.processor, self.model, self.turn = _captioner(model, device)

  @classmethod
  def identity(cls, options: Mapping[str, Any], context: Context) -> dict[str, Any]:
    return {
      "backend": f"transformers {options['model']}",
      "prompts": {name: prompt_hash(name) for name in cls.prompts},
      "options": {key: value for key, value in options.items() if key != "device"},
      "versions": {"model": model_version(options["model"])},
    }

  def _ask(self, images: Sequence[Image.Image], text: str) -> str:
    import torch

    content = [*({"type": "image", "image": image} for image in images),
               {"type": "text", "text": text}]  # fmt: skip
    inputs = self.processor.apply_chat_template(
      [{"role": "user", "content": content}],
      add_generation_prompt=True,
      tokenize=True,
      return_dict=True,
      return_tensors="pt",
    ).to(self.model.device)
    with self.turn, torch.inference_mode():
      ids = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
    new = ids[0, inputs["input_ids"].shape[1] :]
    return self.processor.decode(new, skip_special_tokens=True).strip()


_loading = threading.Lock()


@functools.cache
def _captioner(model: str, device: str) -> tuple[Any, Any, threading.Lock]:
  """Processor, model and whose turn it is: all roles of a process share one."""
  from transformers import AutoModelForImageTextToText, AutoProcessor

  processor = _pretrained(AutoProcessor, model)
  return processor, _eval(AutoModelForImageTextToText, model, device), threading.Lock()


class LocalAnnotator(_LocalCaptioner):
  prompts = ("annotator/motion@v1", "annotator/appearance@v1")

  def describe(self, clip: Clip, noun: str, masks: Masks | None) -> Description:
    seen = [n for n in sorted(masks) if masks[n].any()] if masks else list(range(clip.frames))
    places = uniform_frames(len(seen), min(self.frames, len(seen)))
    numbers = sorted({seen[i] for i in places})
    frames = clip.open().frames(numbers)
    pictures = [
      outline(f, masks[n], self.size) if masks else shrunk(f, self.size)
      for n, f in zip(numbers, frames, strict=True)
    ]
    motion, looks = (
      self._ask(pictures, render(name, noun=noun, outlined=bool(masks))) for name in self.prompts
    )
    return Description(motion, looks, static=False)


class LocalDescriber(_LocalCaptioner):
  prompts = ("describer/region@v1",)

  def region(self, clip: Clip, masks: Masks, frame: int) -> str:
    picture = outline(clip.open().frames([frame])[0], masks[frame], self.size)
    return self._ask([picture], render(self.prompts[0]))


def _pretrained(kind: Any, name: str) -> Any:
  """A class of transformers from a folder, or from the Hub at the revision in its name."""
  repo, revision = hub.parse_address(name) or (name, None)
  return kind.from_pretrained(repo, **({"revision": revision} if revision else {}))


def _eval(kind: Any, name: str, device: Any) -> Any:
  return _pretrained(kind, name).eval().to(device)


class _named:
  """Says which model could not be loaded."""

  def __init__(self, role: str, name: str):
    self.role, self.name = role, name

  def __enter__(self) -> None:
    pass

  def __exit__(self, kind, error, traceback) -> None:
    if isinstance(error, OSError | ValueError):
      line = one_line(error)
      raise InputError(f"{self.role} {self.name!r} cannot be loaded: {line}") from error
