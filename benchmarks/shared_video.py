"""Many questions about one clip: what an answer costs, shared and in rows, against one by one.

    python benchmarks/shared_video.py [--checkpoint C] [--width 128] [--batch-size 32]

Prints, with their goals:
  infer.shared_x      cost of an answer one by one (nothing shared, one row) over that of 8 objects
                      x 4 questions together; median of pairs that alternate, and their p10-p90
  infer.same_answers  whether both gave the same tokens
  infer.compilations  programs compiled during 200 mixed requests after the warm-up

The default model is of a middle size, with random weights: tower, connector and decoder have about
the shares of the work that they have in the 7B model, which the packaged vr-mini's do not. The clip
is a small H.264 file made on the spot.
"""

import argparse
import tempfile
import time
from pathlib import Path

import av
import jax
import numpy as np

import vr_jax
from data_pipes.tokenizer import Tokenizer
from vr_jax.assets import VR_MINI
from vr_jax.compiling import compilations
from vr_jax.inference.model import Model
from vr_jax.models.connector import ConnectorConfig
from vr_jax.models.decoder import DecoderConfig
from vr_jax.models.region import RegionConfig
from vr_jax.models.siglip import SiglipConfig
from vr_jax.models.videorefer import VideoReferConfig, init_params

QUESTIONS = (
  "What is <region>?",
  "What colour is <region>?",
  "Does <region> move?",
  "Where is <region>?",
)
NEW_TOKENS = 16


def middle(width: int) -> VideoReferConfig:
  """The sizes of published_model.py."""
  return VideoReferConfig(
    name="middle",
    img=SiglipConfig(
      image_size=96, patch_size=8, width=width // 2, depth=10, heads=4, mlp_dim=width * 15 // 8
    ),
    connector=ConnectorConfig(width=width),
    region=RegionConfig(width=width),
    llm=DecoderConfig(
      width=width,
      depth=28,
      heads=4,
      kv_heads=1,
      head_dim=width // 4,
      mlp_dim=width * 16 // 3,
      vocab_size=5300,
      activation="silu",
      norm_plus_one=False,
      scale_embedding=False,
      tied_head=False,
      qkv_bias=True,
    ),
    num_frames=16,
  )


def load(checkpoint: str | None, width: int) -> Model:
  if checkpoint:
    return vr_jax.load(checkpoint)
  cfg = middle(width)
  params = jax.jit(lambda key: init_params(cfg, key))(jax.random.key(0))
  return Model(cfg, params, Tokenizer.from_folder(VR_MINI))


def make_clip(path: Path, frames: int = 48, size: int = 192) -> None:
  """Coloured squares that cross a grey ground, as H.264."""
  rng = np.random.default_rng(0)
  colours, lanes = rng.integers(40, 255, (8, 3)), np.arange(8) * size // 8
  with av.open(str(path), "w") as container:
    stream = container.add_stream("libx264", rate=12)
    stream.width = stream.height = size
    stream.pix_fmt = "yuv420p"
    for i in range(frames):
      image = np.full((size, size, 3), 128, np.uint8)
      for colour, top in zip(colours, lanes, strict=True):
        image[top : top + 20, 3 * i : 3 * i + 20] = colour
      container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
    container.mux(stream.encode(None))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--checkpoint", help="vr-mini, or a folder (default: random)")
  parser.add_argument("--width", type=int, default=128, help="of the random model's decoder")
  parser.add_argument("--batch-size", type=int, default=32, help="of the shared side")
  parser.add_argument("--pairs", type=int, default=9)
  args = parser.parse_args()
  model = load(args.checkpoint, args.width)
  with tempfile.TemporaryDirectory() as folder:
    clip = Path(folder) / "clip.mp4"
    make_clip(clip)
    requests = [
      vr_jax.Request(
        clip, question, [vr_jax.Region(box=(3 * f, top, 3 * f + 20, top + 20), frame=f)]
      )
      for top, f in zip(np.arange(8) * 24, range(4, 44, 5), strict=True)
      for question in QUESTIONS
    ]

    def timed(few, **options) -> tuple[float, list]:
      model.visual.forget()
      start = time.perf_counter()
      answers = model.ask_many(few, max_new_tokens=NEW_TOKENS, **options)
      return (time.perf_counter() - start) / len(few), [answer.token_ids for answer in answers]

    alone = {"share": False, "batch_size": 1}
    timed(requests, batch_size=args.batch_size)
    timed(requests[:2], **alone)
    ratios, same = [], True
    for i in range(args.pairs):
      picked = [(5 * i + j) % len(requests) for j in range(4)]
      one, texts = timed([requests[j] for j in picked], **alone)
      together, all_said = timed(requests, batch_size=args.batch_size)
      ratios.append(one / together)
      same &= texts == [all_said[j] for j in picked]
    low, median, high = np.percentile(ratios, (10, 50, 90))
    print(f"infer.shared_x      {median:.2f} (p10-p90 {low:.2f}-{high:.2f})   goal >= 8")
    print(f"infer.same_answers  {same}   goal True")

    model.warm_up(max_new_tokens=NEW_TOKENS)
    frames = np.full((6, 64, 64, 3), 90, np.uint8)
    mixed = [requests[i % len(requests)] for i in range(160)]
    mixed += [vr_jax.Request(clip, "What happens? " + "Say more. " * (i % 9)) for i in range(20)]
    mixed += [vr_jax.Request(frames, "What happens?") for _ in range(20)]
    before = compilations()
    assert len(model.ask_many(mixed, max_new_tokens=NEW_TOKENS)) == 200
    print(f"infer.compilations  {compilations() - before}   goal 0")


if __name__ == "__main__":
  main()
