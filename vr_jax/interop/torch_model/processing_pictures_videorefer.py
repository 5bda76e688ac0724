# mypy: ignore-errors
"""From a video, regions and a question to the inputs of PictureForCausalLM, and back to text."""

import torch

from data_pipes.navit_frames import MAX_FRAMES
from data_pipes.navit_prompts import IMAGE_TOKEN, REGION_TOKEN, special_id
from data_pipes.navit_rows import Ids, build_row, needed_shape
from data_pipes.navit_samples import NavitRules, question_sample
from data_pipes.object_crops import CROP_RULES
from data_pipes.video import open_video
from vr_jax.inference.regions import objects_of, parse_regions

from .processing_videorefer import RENAMED, VideoReferProcessor


class PictureProcessor(VideoReferProcessor):
  """Reads media and text for the model; used as VideoReferProcessor."""

  auto_class = "processing_pictures_videorefer.PictureProcessor"

  def __call__(self, video, question, regions=(), scene_frames=None):
    """The inputs of one question, tensors with a leading axis of 1.

    Args:
      video, question, regions: as of VideoReferProcessor.
      scene_frames: by default one each second, at most 768.
    """
    img, region = self.model["img"], self.model["region"]
    rules = NavitRules(
      crop=CROP_RULES[region["kind"]],
      tokens=region["tokens"],
      max_length=img["max_tokens"],
      fps=None if scene_frames else 1.0,
      max_frames=scene_frames or MAX_FRAMES,
      frame_rule="filter",
      max_ids=None,
    )
    regions = [parse_regions([r])[0] if isinstance(r, str) else r for r in regions]
    opened = open_video(video, upright=True)
    objects = [marked.masks for marked in objects_of(regions, opened)]
    _, sample = question_sample(opened, question, self.tokenizer, rules, objects)
    image, marked = (special_id(self.tokenizer, t) for t in (IMAGE_TOKEN, REGION_TOKEN))
    shape = needed_shape([[sample]], merge=img["merge"], tokens_per_object=region["tokens"])
    row = build_row([sample], shape, Ids(image, marked, region["tokens"]))
    for name in ("supervised", "segments"):
      row.pop(name)
    tensors = {RENAMED.get(k, k): torch.from_numpy(v)[None] for k, v in row.items()}
    kept = (torch.uint8, torch.bool, torch.float32)
    return {k: v if v.dtype in kept else v.long() for k, v in tensors.items()}
