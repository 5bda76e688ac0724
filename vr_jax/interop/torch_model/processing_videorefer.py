# mypy: ignore-errors
"""From a video, regions and a question to the inputs of VideoReferForCausalLM, and back to text."""

import dataclasses
import json
from pathlib import Path

import torch

from data_pipes.batch import RowShape, build_row, collate, fit_shape, needs
from data_pipes.clips import read_clip
from data_pipes.errors import InputError
from data_pipes.prompts import question_prompt
from data_pipes.tokenizer import REGION, TOKENIZER_FILES, Tokenizer
from data_pipes.video import open_video
from vr_jax.inference.regions import Region, objects_of, parse_regions

CONFIG = "processor_config.json"
RENAMED = {"tokens": "input_ids", "valid": "attention_mask"}


class VideoReferProcessor:
  """Reads media and text for the model.

  processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
  inputs = processor("clip.mp4", "What is <region> doing?", ["box:40,60,200,220@12"])
  print(processor.decode(model.generate(**inputs)[0]))
  """

  model_input_names = ("frames", "scene", "region_masks", "region_frames", "input_ids", "visual",
                       "attention_mask")  # fmt: skip

  auto_class = "processing_videorefer.VideoReferProcessor"

  def __init__(self, tokenizer, model, files):
    """`model`: the `videorefer` fields of config.json; `files`: the tokenizer's, by name."""
    self.tokenizer, self.model, self.files = tokenizer, model, files

  @classmethod
  def from_pretrained(cls, folder, **kwargs):
    """From a folder with the tokenizer files and config.json, or a repository's name.

    A folder that `save_pretrained` wrote needs no config.json.
    """
    if not Path(folder).is_dir():
      from huggingface_hub import snapshot_download

      folder = snapshot_download(folder, allow_patterns=["*.json", "*.model", "*.txt", "*.jinja"])
    folder = Path(folder)
    model = json.loads((folder / CONFIG).read_text()).get("videorefer")
    model = model or json.loads((folder / "config.json").read_text())["videorefer"]
    files = {n: (folder / n).read_bytes() for n in TOKENIZER_FILES if (folder / n).is_file()}
    return cls(Tokenizer.from_folder(folder), model, files)

  def save_pretrained(self, folder):
    """Writes what `from_pretrained` and AutoProcessor need: settings, tokenizer, code."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    auto_map = {"AutoProcessor": self.auto_class}
    fields = {"auto_map": auto_map, "videorefer": self.model}
    (folder / CONFIG).write_text(json.dumps(fields, indent=2) + "\n")
    for name, content in self.files.items():
      (folder / name).write_bytes(content)
    for file in Path(__file__).parent.glob("*.py"):
      if file.name != "__init__.py":
        (folder / file.name).write_bytes(file.read_bytes())

  @classmethod
  def register_for_auto_class(cls, auto_class="AutoProcessor"):
    """AutoProcessor calls it when it loads the class; there is nothing to remember."""

  def __call__(self, video, question, regions=(), scene_frames=None):
    """The inputs of one question, tensors with a leading axis of 1.

    Args:
      video: path of a video, GIF, image or folder of frames, or frames uint8 [T,H,W,3].
      question: holds one `<region>` for each object; the i-th takes the i-th object.
      regions: strings such as "box:x1,y1,x2,y2@FRAME", "point:x,y@FRAME", "mask.png@FRAME",
        "rle.json", or Region objects; those with one name are one object on several frames.
      scene_frames: by default as many as the model was trained with.
    """
    img = self.model["img"]
    scene = scene_frames or self.model["num_frames"]
    grid = img["image_size"] // img["patch_size"]
    sizes = {
      "image_size": img["image_size"],
      "grid": grid,
      "tokens_per_object": self.model["region"]["tokens"],
      "scene_tokens": scene_tokens(self.model["connector"]["kind"], scene, grid),
    }
    regions = [parse_regions([r])[0] if isinstance(r, str) else r for r in regions]
    opened = open_video(video)
    objects = [marked.masks for marked in objects_of(regions, opened)]
    if question.count(REGION) != len(objects):
      raise InputError(f"{question.count(REGION)} {REGION} in the question, {len(objects)} objects")
    image = opened.kind == "image"
    _, text = question_prompt(question, self.tokenizer, "image" if image else "video")
    any_shape = RowShape(1, scene, 1, 1, 1, **sizes)
    clip = read_clip(
      video, any_shape, objects, image=image, aspect_ratio=self.model["image_aspect_ratio"]
    )
    region_id = self.tokenizer.region_id
    shape = fit_shape([needs(text, clip, region_id)], scene=scene, length_multiple=1, **sizes)
    row = collate([build_row(text, clip, dataclasses.replace(shape), region_id)])
    row.pop("supervised")
    tensors = {RENAMED.get(k, k): torch.from_numpy(v) for k, v in row.items()}
    return {k: v if v.dtype in (torch.uint8, torch.bool) else v.long() for k, v in tensors.items()}

  def decode(self, ids):
    """The answer in `ids`, without special tokens."""
    return self.tokenizer.decode([int(i) for i in ids], skip_special=True).strip()


def scene_tokens(kind, frames, grid):
  """Scene tokens of `frames` frames with grid x grid patches each."""
  if kind in ("linear", "mlp2x_gelu"):
    return grid * grid
  pad = 2 * int(kind in ("stc_connector", "spatial_conv"))
  t = (frames + pad) // (2 if kind.startswith("st") else 1)
  return t * ((grid + pad) // 2) ** 2


__all__ = ["Region", "VideoReferProcessor"]
