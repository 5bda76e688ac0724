"""Our training step against the published PyTorch recipe: stages 3 and 2, a middle size, fp32, CPU.

    VIDEOREFER_DIR=VideoRefer python benchmarks/train_step.py    # [torch] and pip install timm

VIDEOREFER_DIR is a checkout of github.com/DAMO-NLP-SG/VideoRefer; without it the rows say that they
are skipped. Its modules run as its recipe runs them: gradient checkpointing of every layer, an
image 16 times and once more for its mask, mask frames by themselves, full logits, micro-batches as
in scripts/train (2 rows in stage 3, 1 in stage 2). Its flash attention is PyTorch's own on a CPU.

The model keeps the shares of the 7B model's FLOPs (tower 14 %, connector 11 %, decoder 75 %); the
eight rows are 3 videos with one mask frame, 1 with 32 and 4 images, all with 20 supervised tokens
(the mean of micro-batches' means, which the published trainer takes, is then the same whatever the
micro-batches are). First the loss and the norm of the gradient must agree to 1e-4.
"""

import argparse
import dataclasses
import os
import tempfile
import time
from pathlib import Path

# isort: split  (rows chooses the processors)
import jax
import numpy as np
import rows
from published_model import SCENE, make_published, pixels
from rows import NAN, alternate, ratio, row, typical

from vr_jax.configs import base_config
from vr_jax.interop import videorefer as published
from vr_jax.models.connector import scene_token_count
from vr_jax.models.costs import connector_flops, decoder_flops, tower_flops
from vr_jax.models.videorefer import VideoRefer
from vr_jax.training.loss import model_loss
from vr_jax.training.schedule import make_optimizer
from vr_jax.training.step import TrainState, make_step, micro_batches
from vr_jax.training.videorefer_task import FRAME_CUTS, in_order_of_frames

SUPERVISED, HEAD_TEXT, TEXT, REGION = 20, 3, 29, 5299
ROWS = (17, 1, 17, 1, 17, 1, 48, 1)  # frames of each
STAGES = {
  3: {"goal": 1.8, "per_micro_batch": 2, "trained": ("connector", "region", "llm"), "lr": 1e-5},
  2: {"goal": 2.5, "per_micro_batch": 1, "trained": ("region",), "lr": 1e-3},
}
IGNORE, VIDEO, IMAGE = -100, -201, -200


def shares(cfg) -> str:
  """Parts of the needed FLOPs of a stage-3 row with one mask frame."""
  length = HEAD_TEXT + TEXT + scene_tokens(cfg)
  parts = {
    "tower": 17 * tower_flops(cfg.img),
    "connector": 3 * connector_flops(cfg.connector, cfg.img.width, SCENE, cfg.img.grid),
    "decoder": 3 * decoder_flops(cfg.llm, length, SUPERVISED),
  }
  return ", ".join(f"{name} {100 * n / sum(parts.values()):.0f} %" for name, n in parts.items())


def scene_tokens(cfg) -> int:
  return scene_token_count(cfg.connector, SCENE, cfg.img.grid)


# --- The rows, once for each side ---------------------------------------------------------------


def make_samples(cfg, seed: int = 0) -> list[dict]:
  """Frames u8 [n,S,S,3], grid masks [n masks,N], text ids with one REGION, first supervised id."""
  rng = np.random.default_rng(seed)
  samples = []
  for frames in ROWS:
    ids = rng.integers(10, REGION, HEAD_TEXT + TEXT).astype(np.int32)
    ids[HEAD_TEXT + 4] = REGION
    masks = max(1, frames - SCENE)
    samples.append(
      {
        "frames": rng.integers(0, 256, (frames, *[cfg.img.image_size] * 2, 3), np.uint8),
        "masks": (rng.random((masks, cfg.img.grid**2)) < 0.2).astype(np.uint8),
        "ids": ids,
      }
    )
  return samples


def our_rows(cfg, samples: list[dict]) -> dict[str, np.ndarray]:
  """The batch of `data_pipes.batch`."""
  V, U, P = scene_tokens(cfg), cfg.region.tokens, max(ROWS)
  L = HEAD_TEXT + TEXT - 1 + V + U
  batch = []
  for s in samples:
    n, masks = len(s["frames"]), len(s["masks"])
    image = n == 1
    numbers = [0] if image else list(range(SCENE, n))
    ids = s["ids"]
    visual = np.full(L, -1, np.int32)
    visual[HEAD_TEXT : HEAD_TEXT + V] = np.arange(V)
    first = HEAD_TEXT + V + 4
    visual[first : first + U] = V + np.arange(U)
    tokens = np.zeros(L, np.int32)
    tokens[visual < 0] = ids[ids != REGION]
    region_masks = np.zeros((1, P, cfg.img.grid**2), np.uint8)
    region_masks[0, numbers] = s["masks"]
    region_frames = np.full((1, P - SCENE), -1, np.int32)
    region_frames[0, :masks] = numbers
    frames = np.zeros((P, *s["frames"].shape[1:]), np.uint8)
    frames[:n] = s["frames"]
    batch.append(
      {
        "frames": frames,
        "scene": np.zeros(SCENE, np.int32) if image else np.arange(SCENE, dtype=np.int32),
        "region_masks": region_masks,
        "region_frames": region_frames,
        "tokens": tokens,
        "visual": visual,
        "valid": np.ones(L, bool),
        "supervised": np.arange(L) >= L - SUPERVISED,
      }
    )
  return {k: np.stack([b[k] for b in batch]) for k in batch[0]}


def their_batches(cfg, samples: list[dict], size: int) -> list[dict]:
  """Keyword arguments of the published model's forward pass, micro-batch by micro-batch."""
  import torch

  batches = []
  for start in range(0, len(samples), size):
    out: dict = {k: [] for k in ("images", "frame", "masks", "ann_indices", "frame_nums", "ids")}
    for s in samples[start : start + size]:
      image, frames = len(s["frames"]) == 1, pixels(s["frames"])
      of_masks = frames if image else frames[SCENE:]
      before = sum(out["frame_nums"])
      out["images"].append((frames[0], "image") if image else (frames[:SCENE], "video"))
      out["frame"].append(of_masks)
      grid = s["masks"].reshape(-1, cfg.img.grid, cfg.img.grid)
      out["masks"].append(torch.from_numpy(grid.astype(np.float32)))
      out["ann_indices"].append([[before + i for i in range(len(of_masks))]])
      out["frame_nums"].append(len(of_masks))
      media = IMAGE if image else VIDEO
      out["ids"].append(np.insert(s["ids"].astype(np.int64), HEAD_TEXT, media))
    ids = torch.from_numpy(np.stack(out.pop("ids")))
    labels = ids.clone()
    labels[:, :-SUPERVISED] = IGNORE
    batches.append(
      {**out, "input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids).bool()}
    )
  return batches


# --- Theirs ---------------------------------------------------------------------------------------


class Theirs:
  """The published trainer's step: micro-batches, clipping, AdamW."""

  def __init__(self, model, cfg, samples, stage: dict):
    import torch

    self.torch, self.model = torch, model
    self.batches = their_batches(cfg, samples, stage["per_micro_batch"])
    model.train()
    model.config.use_cache = False
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.requires_grad_(False)
    inner = model.get_model()
    parts = {
      "connector": inner.mm_projector,
      "region": inner.region_encoder,
      "llm": torch.nn.ModuleList([inner.embed_tokens, inner.layers, inner.norm, model.lm_head]),
    }
    for name in stage["trained"]:
      parts[name].requires_grad_(True)
    self.trained = [p for p in model.parameters() if p.requires_grad]
    self.optimizer = torch.optim.AdamW(self.trained, lr=stage["lr"], weight_decay=0.0)

  def __call__(self) -> dict[str, float]:
    start = time.perf_counter()
    losses = []
    for batch in self.batches:
      loss = self.model(**batch).loss
      (loss / len(self.batches)).backward()
      losses.append(float(loss))
    self.norm = float(self.torch.nn.utils.clip_grad_norm_(self.trained, 1.0))
    self.optimizer.step()
    self.optimizer.zero_grad()
    self.loss = float(np.mean(losses))
    return {"rows": len(ROWS) / (time.perf_counter() - start)}


# --- Ours -----------------------------------------------------------------------------------------


class Ours:
  """The step that `vr train` runs: one row a micro-batch, in the order of their frames."""

  def __init__(self, cfg, params, samples, stage: dict):
    config = base_config()
    config.lr = stage["lr"]
    options = {"decay": "constant"}
    config.schedule = (*((f"{part}/.*", options) for part in stage["trained"]), (".*", None))
    optimizer = make_optimizer(config, params, total_steps=1000)
    batch = our_rows(cfg, samples)
    self.rows = micro_batches(in_order_of_frames(batch), len(ROWS))
    loss = model_loss(VideoRefer(cfg, trained=stage["trained"]), budget=2 * SUPERVISED)
    self.step = make_step(loss, optimizer, accum_mean="published", cuts=FRAME_CUTS)
    params = jax.tree.map(jax.numpy.array, params)  # the step donates them
    self.state = TrainState.create(params, config.schedule, optimizer)

  def __call__(self) -> dict[str, float]:
    start = time.perf_counter()
    self.state, metrics = self.step(self.state, self.rows)
    self.loss, self.norm = float(metrics["loss"]), float(metrics["grad_norm"])
    return {"rows": len(ROWS) / (time.perf_counter() - start)}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--width", type=int, default=128, help="of the decoder")
  parser.add_argument("--pairs", type=int, default=rows.PAIRS)
  parser.add_argument("--stages", type=int, nargs="*", default=list(STAGES))
  args = parser.parse_args()
  checkout = os.environ.get("VIDEOREFER_DIR")
  if not checkout:
    for stage in args.stages:
      print(f"cpu.train{stage}_x  skipped (no reference): VIDEOREFER_DIR is not set")
    return
  import torch

  torch.set_num_threads(rows.THREADS)
  with tempfile.TemporaryDirectory() as folder:
    model = make_published(Path(checkout), Path(folder), args.width, REGION)
    loaded = published.load(folder)
  llm = dataclasses.replace(loaded.config.llm, remat="dots")
  cfg = dataclasses.replace(loaded.config, llm=llm)
  print(f"needed FLOPs of a stage-3 row: {shares(cfg)}; load {os.getloadavg()[0]:.1f}", flush=True)
  samples = make_samples(cfg)
  for number in args.stages:
    stage = STAGES[number]
    # Both sides start anew from the same weights.
    start = {k: v.clone() for k, v in model.state_dict().items()}
    ours, theirs = Ours(cfg, loaded.params, samples, stage), Theirs(model, cfg, samples, stage)
    ours(), theirs()
    errors = [abs(a / b - 1) for a, b in ((ours.loss, theirs.loss), (ours.norm, theirs.norm))]
    print(
      f"stage {number}: loss {ours.loss:.6f} against {theirs.loss:.6f}, relative errors of "
      f"loss and gradient norm {errors[0]:.1e}, {errors[1]:.1e}",
      flush=True,
    )
    value, detail = NAN, "the sides do not agree"
    if max(errors) <= 1e-4:
      reached = alternate({"ours": ours, "torch": theirs}, args.pairs)
      speeds = [typical(reached, side, "rows") for side in ("ours", "torch")]
      value, detail = ratio(reached, "rows"), f"{speeds[0]:.2f} against {speeds[1]:.2f} rows/s"
    row(f"cpu.train{number}_x", value, f">= {stage['goal']}", detail=detail)
    model.load_state_dict(start)


if __name__ == "__main__":
  main()
