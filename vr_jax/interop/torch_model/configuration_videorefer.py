"""Configuration of VideoRefer in PyTorch."""

from transformers import PretrainedConfig


class VideoReferConfig(PretrainedConfig):
  """`videorefer` holds the fields of the model as vr_jax stores them: img, llm, …."""

  model_type = "videorefer_torch"

  def __init__(self, videorefer=None, **kwargs):
    self.videorefer = videorefer or {}
    super().__init__(**kwargs)
