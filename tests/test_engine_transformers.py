"""Grounding DINO and SAM 2 video with random weights, built from configs, on real frames."""

import json
import string
from pathlib import Path

import numpy as np
import pytest
from chat_server import ChatServer, sensible

from data_pipes.engine.roles import Clip, Context

pytestmark = pytest.mark.torch
CONTEXT = Context(lambda: None, "20_segment")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
  """Matrices this small are not worth a second one, which waits at full speed for its share."""
  import torch

  before = torch.get_num_threads()
  torch.set_num_threads(1)
  yield
  torch.set_num_threads(before)


def words() -> list[str]:
  pieces = list(string.ascii_lowercase) + [f"##{c}" for c in string.ascii_lowercase]
  return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", "a", "ball", "red", *pieces]


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> Path:
  import torch
  from transformers import (
    BertTokenizer,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessorPil,
    SwinConfig,
  )

  folder = tmp_path_factory.mktemp("dino")
  vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words()))}
  BertTokenizer(vocabulary).save_pretrained(folder)
  GroundingDinoImageProcessorPil(size={"shortest_edge": 96, "longest_edge": 128}).save_pretrained(
    folder
  )
  torch.manual_seed(0)
  config = GroundingDinoConfig(
    backbone_config=SwinConfig(
      window_size=7, embed_dim=12, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], image_size=128,
      out_features=["stage2", "stage3", "stage4"], out_indices=[2, 3, 4],
    ),
    text_config={
      "model_type": "bert", "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1,
      "num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 64,
    },
    d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=20,
    max_text_len=32, use_timm_backbone=False,
  )  # fmt: skip
  GroundingDinoForObjectDetection(config).save_pretrained(folder)
  return folder


@pytest.fixture(scope="module")
def tracker(tmp_path_factory) -> Path:
  import torch
  from transformers import Sam2HieraDetConfig, Sam2VideoConfig, Sam2VideoModel, Sam2VisionConfig

  folder = tmp_path_factory.mktemp("sam2")
  side = 128
  torch.manual_seed(1)
  vision = Sam2VisionConfig(
    backbone_config=Sam2HieraDetConfig(
      hidden_size=16, image_size=[side, side], blocks_per_stage=[1, 1, 2, 1],
      embed_dim_per_stage=[16, 32, 64, 128], num_attention_heads_per_stage=[1, 2, 4, 8],
      window_size_per_stage=[8, 4, 8, 4], global_attention_blocks=[3],
      window_positional_embedding_background_size=[7, 7],
    ),
    backbone_channel_list=[128, 64, 32, 16],
    backbone_feature_sizes=[[side // 4] * 2, [side // 8] * 2, [side // 16] * 2],
  )  # fmt: skip
  config = Sam2VideoConfig(
    vision_config=vision,
    prompt_encoder_config={"image_size": side},
    image_size=side,
    memory_attention_num_layers=1,
    memory_attention_rope_feat_sizes=[side // 16] * 2,
    memory_fuser_num_layers=1,
  )
  Sam2VideoModel(config).save_pretrained(folder)
  return folder


@pytest.fixture
def clip(golden) -> Clip:
  """Real frames: an H.264 file of the golden cases."""
  from data_pipes.video import open_video

  path = golden / "media" / "clip_mp4.mp4"
  video = open_video(path)
  return Clip(str(path), "A red ball.", len(video), video.fps, *video.size)


def test_a_noun_becomes_boxes_and_masks_on_all_frames(detector, tracker, clip):
  from data_pipes.engine.backends.transformers_models import DinoSam2

  options = {"threshold": 0.0, "text_threshold": 0.0, "most": 2, "most_boxes": 30}
  agent = DinoSam2(CONTEXT, str(detector), str(tracker), **options)
  numbers = [0, 2, 4]
  tracks = agent.tracks(clip, "red ball", numbers)
  assert len(tracks) == 2
  for track in tracks:
    assert list(track.masks) == numbers
    assert all(m.shape == (clip.height, clip.width) for m in track.masks.values())
    assert any(m.any() for m in track.masks.values())
    x1, y1, x2, y2 = track.prompt["box"]
    assert 0 <= x1 < x2 <= clip.width
    assert 0 <= y1 < y2 <= clip.height
    assert track.prompt["frame"] in numbers
    assert 0 <= track.scores["cycle_iou"] <= 1
  agent.cycle = False
  again = agent.tracks(clip, "red ball", numbers)
  np.testing.assert_array_equal(again[0].masks[numbers[0]], tracks[0].masks[numbers[0]])


def test_our_box_and_pixels_are_those_of_the_published_processor(tracker, clip):
  """The session that we fill by hand holds what SAM 2's own preparation is stated to make."""
  import torch

  from data_pipes.engine.backends.transformers_models import _MEAN, _STD, DinoSam2

  agent = object.__new__(DinoSam2)
  agent.side, agent.device = 128, torch.device("cpu")
  frames = clip.open().frames([0, 1])
  session = agent._session(frames)
  assert (session.video_height, session.video_width) == (clip.height, clip.width)
  pixels = session.processed_frames[0].numpy()
  assert pixels.shape == (3, 128, 128)
  back = (pixels.transpose(1, 2, 0) * _STD + _MEAN) * 255
  assert abs(back.mean() - frames[0].mean()) < 2


def test_a_detector_that_finds_nothing_or_too_much(detector, tracker, clip):
  from data_pipes.engine.backends.transformers_models import DinoSam2, separate_boxes
  from data_pipes.errors import InputError

  nothing = DinoSam2(CONTEXT, str(detector), str(tracker), threshold=1.0)
  assert nothing.tracks(clip, "red ball", [0, 2, 4]) == []
  many = DinoSam2(CONTEXT, str(detector), str(tracker), threshold=0.0, text_threshold=0.0,
                  most_boxes=1)  # fmt: skip
  with pytest.raises(InputError, match=r"ambiguous: [0-9]+ boxes for 'red ball'"):
    many.tracks(clip, "red ball", [0, 2, 4])
  boxes = [((0, 0, 10, 10), 0.5), ((1, 0, 11, 10), 0.9), ((30, 30, 90, 90), 0.3), ((5, 5, 6, 6), 1)]
  assert separate_boxes(boxes, (60, 60)) == [((1, 0, 11, 10), 0.9), ((30, 30, 60, 60), 0.3)]


def test_a_model_that_is_not_there(tmp_path, tracker):
  from data_pipes.engine.backends.transformers_models import DinoSam2
  from data_pipes.errors import InputError

  with pytest.raises(InputError, match=r"detector '.*' cannot be loaded"):
    DinoSam2(CONTEXT, str(tmp_path), str(tracker))


def test_the_engine_runs_on_local_models_and_an_endpoint(detector, tracker, tmp_path, golden):
  """All five agents: the two models find and follow, an endpoint plays the others."""
  from data_pipes.engine import command, stages

  (tmp_path / "videos").mkdir()
  (tmp_path / "videos" / "a.mp4").symlink_to((golden / "media" / "clip_mp4.mp4").resolve())
  (tmp_path / "c.json").write_text(json.dumps([{"video": "a.mp4", "caption": "A red ball rolls."}]))
  c = stages.engine_config().unlock()
  c.workers, c.shards, c.grid_frames = 1, 1, 4
  c.input.videos, c.input.files = str(tmp_path / "videos"), (str(tmp_path / "c.json"),)
  c.shots.min_seconds, c.shots.min_motion = 0.1, 0.0
  c.masks = {"min_area": 0.0, "max_area": 1.0, "max_components": 1e9, "max_flicker": 1.0,
             "min_coherence": 0.0, "min_appearance": 0.0, "min_visible": 0.0}  # fmt: skip
  with ChatServer(sensible) as server:
    endpoint = {"kind": "openai", "base_url": server.url, "model": "m", "frames": 2, "size": 64}
    c.roles = dict.fromkeys(c.roles, endpoint) | {
      "segmentor": {
        "kind": "transformers", "detector": str(detector), "tracker": str(tracker),
        "threshold": 0.0, "text_threshold": 0.0, "most_boxes": 30,
      },
    }  # fmt: skip
    summary = command.run(c.lock(), tmp_path / "w")
  assert {e["stage"]: e["kept"] for e in summary["stages"]}["60_assemble"] == 2, summary["stages"]
  out = tmp_path / "w" / "out"
  (item,) = json.loads((out / "videorefer-detailed-caption.json").read_text())
  assert item["conversations"][1]["value"] == "A bright thing moves over the plain ground."
  assert any(m["segmentation"] for m in item["annotation"][0].values())
  agents = json.loads(next(out.glob("*detailed*.jsonl")).read_text())["agents"]
  assert agents["20_segment"]["backend"] == f"transformers {detector} + {tracker}"
  assert agents["30_annotate"]["backend"] == "openai m"
