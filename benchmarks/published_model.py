"""The published PyTorch model at a middle size, for comparisons; from a checkout of its code.

The checkout is github.com/DAMO-NLP-SG/VideoRefer; extra [torch] and `pip install timm`.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import sys
import types
from pathlib import Path

import numpy as np

SCENE = 16  # frames of a video


def sizes(width: int) -> tuple[dict, dict]:
  """config.json of the model and of its tower."""
  llm = {
    "model_type": "videorefer_qwen2",
    "architectures": ["VideoReferQwen2ForCausalLM"],
    "hidden_size": width,
    "intermediate_size": width * 16 // 3,
    "num_hidden_layers": 28,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "vocab_size": 5300,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "mm_vision_tower": "siglip_vision_tower",
    "mm_projector_type": "stc_connector_v35",
    "mm_region_encoder_type": "pooling",
    "mm_hidden_size": width // 2,
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "image_aspect_ratio": "square",
    "num_frames": SCENE,
    "use_mm_proj": True,
    "tune_mm_mlp_adapter": False,
    "tune_region_encoder": False,
    "tokenizer_model_max_length": 2048,
  }
  tower = {
    "model_type": "siglip_vision_model",
    "hidden_size": width // 2,
    "intermediate_size": width * 15 // 8,
    "num_hidden_layers": 10,
    "num_attention_heads": 4,
    "image_size": 96,
    "patch_size": 8,
  }
  return llm, tower


def pixels(frames: np.ndarray):
  """Frames u8 [n,S,S,3] as the published processor gives them: float32 [n,3,S,S]."""
  import torch

  scaled = frames.astype(np.float32) * np.float32(0.00392156862745098)
  return torch.from_numpy(((scaled - 0.5) / 0.5).transpose(0, 3, 1, 2).copy())


def bare(name: str, folder: Path | str) -> types.ModuleType:
  """A package whose own __init__ is not run."""
  package = sys.modules[name] = types.ModuleType(name)
  package.__path__ = [str(folder)]
  return package


def import_published(checkout: Path) -> types.ModuleType:
  """The published model's module, without what it imports besides: video readers, torchvision."""
  importlib.import_module("transformers").Qwen2Model  # noqa: B018  (it replaces its own module)
  transformers = sys.modules["transformers"]
  if not hasattr(transformers, "TRANSFORMERS_CACHE"):  # gone in transformers 5
    transformers.TRANSFORMERS_CACHE = ""
  if importlib.util.find_spec("torchvision") is None:  # timm asks for this of it
    for name in ("torchvision", "torchvision.ops", "torchvision.ops.misc"):
      bare(name, "")
    sys.modules["torchvision.ops.misc"].FrozenBatchNorm2d = None
  timm = Path(importlib.util.find_spec("timm").origin).parent
  bare("timm", timm).__version__ = importlib.metadata.version("timm")
  bare("timm.models", timm / "models")
  data = bare("timm.data", timm / "data")
  vars(data).update(vars(importlib.import_module("timm.data.constants")))
  sys.modules["timm.models.layers"] = importlib.import_module("timm.layers")  # its old name
  bare("videorefer", checkout / "videorefer")
  bare("videorefer.model", checkout / "videorefer" / "model")
  module = importlib.import_module("videorefer.model.videorefer_qwen2")
  # Frames are prepared here.
  no_processor = types.SimpleNamespace(from_pretrained=lambda name: None)
  sys.modules["videorefer.model.encoder"].SiglipImageProcessor = no_processor
  return module


def make_published(checkout: Path, folder: Path, width: int, region: int):
  """The published model with random weights, written to `folder` in the published format too.

  `region` is the id of `<region>`.
  """
  import torch
  import transformers

  module = import_published(checkout)
  llm, tower = sizes(width)
  tower_folder = folder / "siglip_vision_tower"
  tower_folder.mkdir()
  torch.manual_seed(0)
  vision = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**tower))
  vision.save_pretrained(tower_folder)
  config = module.VideoReferQwen2Config(**llm)
  config.mm_vision_tower = str(tower_folder)
  config._attn_implementation = "sdpa"
  model = module.VideoReferQwen2ForCausalLM(config)
  model.get_vision_tower().load_model()
  for part in (model.get_model().mm_projector, model.get_model().region_encoder):
    for p in part.parameters():
      torch.nn.init.normal_(p, 1.0 if p.ndim == 1 else 0.0, 0.05)
  tokenizer = types.SimpleNamespace(convert_tokens_to_ids=lambda tokens: [region])
  for m in model.modules():
    m.tokenizer = tokenizer
  from safetensors.torch import save_file

  state = {k: v for k, v in model.state_dict().items() if not k.startswith("model.vision_tower")}
  save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")
  (folder / "config.json").write_text(json.dumps(llm))
  return model.float()
