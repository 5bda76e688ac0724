"""PixelRefer against the published PyTorch arithmetic: prefill, many questions, a training step.

    python benchmarks/successors_speed.py [--pairs 9] [--rows prefill questions train flops]

The PyTorch side is written from the published code's description, float32, two threads, the same
random weights: the tower runs attention inside each picture (what flash attention's varlen path
does) and runs anew for every question; the decoder is transformers' Qwen2 with PyTorch's attention;
answers come one by one. Its training step is the recipe's: two samples flattened in a row, gradient
checkpointing of every layer, gradients of the tower that its learning rate of 0 then throws away,
full logits. Frames and crops are prepared by the same code on both sides, inside the time.

The model keeps the shares of PixelRefer-2B's FLOPs on a video (tower and decoder about half each).
The rows print nan where tokens, or loss and gradient norm, do not agree.

`flops` is about PixelRefer-2B itself and computes nothing: FLOPs executed over needed, for a
question about 180 frames in 16:9 and for packed training rows of such clips.
"""

import argparse
import dataclasses
import functools
import importlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

# isort: split  (rows chooses the processors)
import jax
import jax.numpy as jnp
import numpy as np
import rows
from rows import NAN, alternate, ratio, row, typical
from safetensors.numpy import save_file

from data_pipes.navit_images import blank, to_patches
from data_pipes.navit_rows import (
  Sample,
  Shape,
  build_row,
  needed_shape,
  object_arrays,
  pack,
  scene_arrays,
  text_arrays,
)
from data_pipes.prompts import IGNORE
from vr_jax.attention import keys_of_pictures
from vr_jax.configs import base_config, load_config
from vr_jax.flops import count_flops
from vr_jax.inference.generate import bucket
from vr_jax.inference.options import Options
from vr_jax.inference.pictures import PictureModel, row_sizes
from vr_jax.inference.regions import Region
from vr_jax.inference.requests import Request
from vr_jax.interop.navit import config_json, model_slots, tower_json, tower_prefix
from vr_jax.interop.proof import torch_inputs, torch_model
from vr_jax.interop.sources import open_source
from vr_jax.interop.table import arrays, collect, nested
from vr_jax.loading import load
from vr_jax.models.connector import ConnectorConfig
from vr_jax.models.costs import decoder_flops, picture_flops
from vr_jax.models.decoder import DecoderConfig, KVCache
from vr_jax.models.navit import NavitConfig
from vr_jax.models.region import RegionConfig
from vr_jax.models.variants import get_variant
from vr_jax.models.videorefer import VideoRefer, VideoReferConfig, init_params
from vr_jax.params import by_path
from vr_jax.training.loss import model_loss
from vr_jax.training.schedule import make_optimizer
from vr_jax.training.step import TrainState, make_step, micro_batches

TOKENIZER = Path(__file__).parents[1] / "tests/golden/successors/data_side/tokenizer"
SIDE, FRAMES, NEW_TOKENS, SUPERVISED = 224, 16, 16, 20
QUESTIONS = (
  "What is <region>?",
  "Which colour?<region>",
  "Does <region> move?",
  "Where is <region>?",
)


def middle() -> VideoReferConfig:
  llm = DecoderConfig(
    width=256, depth=14, heads=4, kv_heads=1, head_dim=64, mlp_dim=1536, vocab_size=1007,
    activation="silu", norm_plus_one=False, scale_embedding=False, qkv_bias=True, rope_base=1e6,
    tied_head=True,
  )  # fmt: skip
  return VideoReferConfig(
    name="middle",
    img=NavitConfig(width=160, depth=14, heads=4, mlp_dim=600, max_tokens=64 * FRAMES),
    connector=ConnectorConfig("mlp2x_gelu", llm.width),
    region=RegionConfig(llm.width, 32, kind="placed_cells"),
    llm=llm,
    num_frames=FRAMES,
    image_aspect_ratio="any",
    max_text_ids=16_384,
  )


def publish(cfg: VideoReferConfig, folder: Path) -> None:
  """The model as a published folder, random weights."""
  shutil.copytree(TOKENIZER, folder)
  shapes = jax.eval_shape(lambda key: init_params(cfg, key), jax.random.key(0))
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda s: (0.08 * rng.standard_normal(s.shape)).astype(np.float32), shapes)
  table = model_slots(
    {k: x.shape for k, x in by_path(params).items()}, cfg, tower_prefix("placed_cells")
  )
  save_file(collect(params, table), folder / "model.safetensors")
  fields = config_json(cfg, {}, {"eos_ids": (1006,), "pad_id": 1000}, "float32")
  (folder / "config.json").write_text(json.dumps(fields))
  tower = folder / fields["mm_vision_encoder"]
  tower.mkdir(parents=True)
  for name, content in tower_json(cfg.img).items():
    (tower / name).write_text(json.dumps(content))


def requests() -> list[Request]:
  """8 objects x 4 questions about one clip of moving noise."""
  rng = np.random.default_rng(0)
  clip = rng.integers(0, 256, (FRAMES, SIDE, SIDE, 3)).astype(np.uint8)
  boxes = [Region(box=(24 * i, 10 * i, 24 * i + 40, 10 * i + 60), frame=i) for i in range(8)]
  return [Request(clip, question, [box]) for box in boxes for question in QUESTIONS]


# --- The published arithmetic -----------------------------------------------------------------


class Theirs:
  """The parts of torch_model/, with transformers' decoder in the place of its own."""

  def __init__(self, parts, cfg: VideoReferConfig):
    import torch
    import transformers

    self.torch, self.parts, self.cfg = torch, parts, cfg
    fields = {
      "hidden_size": cfg.llm.width, "intermediate_size": cfg.llm.mlp_dim,
      "num_hidden_layers": cfg.llm.depth, "num_attention_heads": cfg.llm.heads,
      "num_key_value_heads": cfg.llm.kv_heads, "vocab_size": cfg.llm.vocab_size,
      "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "max_position_embeddings": 32768,
      "attn_implementation": "sdpa",
    }  # fmt: skip
    config = transformers.Qwen2Config(**fields)
    config.rope_theta = 1e6
    if getattr(config, "rope_parameters", None) is not None:
      config.rope_parameters["rope_theta"] = 1e6
    self.decoder = transformers.Qwen2ForCausalLM(config).float().eval()
    state = {k: v for k, v in parts.state_dict().items() if k in self.decoder.state_dict()}
    missing, _ = self.decoder.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"}, missing

  def embeds(self, samples: Iterable[Sample], ids):
    """Embeddings of samples behind each other, their positions, and the ids."""
    torch, out = self.torch, []
    for sample in samples:
      shape = needed_shape(
        [[sample]], merge=self.cfg.img.merge, tokens_per_object=ids.tokens_per_object
      )
      one = build_row([sample], shape, ids)
      inputs = torch_inputs(torch, {k: x[None] for k, x in one.items() if k != "segments"})
      text = [inputs.pop(name) for name in ("input_ids", "visual", "attention_mask")]
      spliced, positions, order = self.parts.model.splice(inputs, *text)
      count = int((positions >= 0).sum())
      out.append((spliced[:, :count], positions[:, :count], order[0, :count]))
    return out

  def answer(self, sample: Sample, ids, count: int) -> list[int]:
    with self.torch.no_grad():
      ((embeds, _, _),) = self.embeds([sample], ids)
      step = self.decoder(inputs_embeds=embeds, use_cache=True, logits_to_keep=1)
      tokens = [int(step.logits[0, -1].argmax())]
      while len(tokens) < count and tokens[-1] != 1006:
        last = self.torch.tensor([[tokens[-1]]])
        step = self.decoder(input_ids=last, past_key_values=step.past_key_values, use_cache=True)
        tokens.append(int(step.logits[0, -1].argmax()))
    return tokens

  def train(self, micro_batches: list[list[Sample]], ids, lr: float):
    """(loss, norm) of a step; parameters move."""
    torch, F = self.torch, self.torch.nn.functional
    if not hasattr(self, "optimizer"):
      self.decoder.train()
      self.decoder.gradient_checkpointing_enable({"use_reentrant": False})
      tower = list(self.parts.model.tower.parameters())
      visual = [
        *self.parts.model.mm_projector.parameters(),
        *self.parts.model.region_encoder.parameters(),
      ]
      self.trained = [*visual, *self.decoder.parameters()]
      for p in self.parts.parameters():
        p.requires_grad_(False)
      for p in (*tower, *visual):
        p.requires_grad_(True)  # the tower's gradients are computed, then multiplied by 0
      self.parts.model.embed_tokens = self.decoder.model.embed_tokens
      for layer in self.parts.model.tower.encoder.layers:
        layer.forward = functools.partial(
          torch.utils.checkpoint.checkpoint, type(layer).forward, layer, use_reentrant=False
        )
      self.optimizer = torch.optim.AdamW(self.trained, lr=lr, weight_decay=0.0)
    losses = []
    for samples in micro_batches:
      parts = self.embeds(samples, ids)
      embeds = torch.cat([e for e, _, _ in parts], 1)
      positions = torch.cat([p for _, p, _ in parts], 1)
      number = torch.cat([torch.full((e.shape[1],), i) for i, (e, _, _) in enumerate(parts)])
      slots = torch.arange(len(number))
      mask = (number[:, None] == number) & (slots[:, None] >= slots)
      mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)[None, None]
      labels = [
        torch.from_numpy(np.where(s.labels != IGNORE, s.ids, IGNORE).astype(np.int64))[order]
        for s, (_, _, order) in zip(samples, parts, strict=True)
      ]
      for one in labels:
        one[0] = IGNORE
      labels = torch.cat(labels)
      logits = self.decoder(
        inputs_embeds=embeds, attention_mask=mask, position_ids=positions
      ).logits
      loss = F.cross_entropy(logits[0, :-1], labels[1:], ignore_index=IGNORE)
      (loss / len(micro_batches)).backward()
      losses.append(float(loss))
    norm = float(torch.nn.utils.clip_grad_norm_(self.trained, 1.0))
    self.optimizer.step()
    self.optimizer.zero_grad()
    for p in self.parts.model.tower.parameters():
      p.grad = None
    return float(np.mean(losses)), norm


# --- The rows ---------------------------------------------------------------------------------


def read(model: PictureModel, queries: list[Request]) -> list[Sample]:
  """Samples of requests, each read by itself as the published scripts do."""
  reader = model.reader(Options(scene_frames=FRAMES, share=False))
  return [reader.read([(0, one)])[0].questions[0].sample for one in queries]


def speed_of_answers(
  model: PictureModel, theirs: Theirs, name: str, queries, count: int, goal: str, pairs: int
):
  """Ours all together and shared; theirs two of them, one by one."""
  tokens: dict[str, list] = {}
  two = [queries[0], queries[-1]]
  batch = len(queries) if len(queries) > 2 else 1

  def ours():
    model.visual.forget()
    start = time.perf_counter()
    answers = model.ask_many(queries, max_new_tokens=count, batch_size=batch, scene_frames=FRAMES)
    seconds = time.perf_counter() - start
    tokens["ours"] = [list(answers[0].token_ids), list(answers[-1].token_ids)]
    return {"answers": len(queries) / seconds}

  def torch():
    start = time.perf_counter()
    tokens["torch"] = [theirs.answer(s, model.ids, count) for s in read(model, two)]
    return {"answers": 2 / (time.perf_counter() - start)}

  reached = alternate({"ours": ours, "torch": torch}, pairs)
  speeds = [typical(reached, side, "answers") for side in ("ours", "torch")]
  value, detail = ratio(reached, "answers"), f"{speeds[0]:.2f} against {speeds[1]:.2f} answers/s"
  if tokens["ours"] != tokens["torch"]:
    value, detail = NAN, f"the sides do not agree: {tokens}"
  row(name, value, goal, detail=detail)


def training_samples(model: PictureModel, seed: int = 0) -> list[Sample]:
  """Four clips with an object, 20 supervised ids at the end of each."""
  rng = np.random.default_rng(seed)
  samples = []
  for sample in read(model, [requests()[i] for i in (0, 5, 14, 27)]):
    answer = rng.integers(10, 900, SUPERVISED).astype(np.int32)
    ids = np.concatenate([sample.ids, answer])
    labels = np.where(np.arange(len(ids)) < len(sample.ids), IGNORE, ids)
    samples.append(dataclasses.replace(sample, ids=ids, labels=labels))
  return samples


def speed_of_training(cfg, params, model: PictureModel, theirs: Theirs, pairs: int) -> None:
  samples, trained = training_samples(model), ("connector", "region", "llm")
  config = base_config()
  config.lr = 1e-5
  options = {"decay": "constant"}
  config.schedule = (*((f"{part}/.*", options) for part in trained), (".*", None))
  optimizer = make_optimizer(config, params, total_steps=1000)
  pairs_of_samples = [samples[:2], samples[2:]]
  shape = needed_shape(
    pairs_of_samples, merge=cfg.img.merge, tokens_per_object=32, patches=row_sizes(cfg.img)[-1]
  )
  batch = [build_row(two, shape, model.ids) for two in pairs_of_samples]
  loss = model_loss(VideoRefer(cfg, trained=trained), budget=2 * SUPERVISED)
  step = make_step(loss, optimizer, accum_mean="published")
  ready = micro_batches({k: np.stack([one[k] for one in batch]) for k in batch[0]}, 2)
  held = {"state": TrainState.create(jax.tree.map(jnp.array, params), config.schedule, optimizer)}
  last: dict[str, tuple[float, float]] = {}

  def ours():
    start = time.perf_counter()
    held["state"], metrics = step(held["state"], ready)
    last["ours"] = float(metrics["loss"]), float(metrics["grad_norm"])
    return {"samples": len(samples) / (time.perf_counter() - start)}

  def torch():
    start = time.perf_counter()
    last["torch"] = theirs.train(pairs_of_samples, model.ids, config.lr)
    return {"samples": len(samples) / (time.perf_counter() - start)}

  ours(), torch()
  errors = [abs(a / b - 1) for a, b in zip(last["ours"], last["torch"], strict=True)]
  print(f"# relative errors of loss and gradient norm {errors[0]:.1e}, {errors[1]:.1e}", flush=True)
  value, detail = NAN, f"the sides do not agree: {last}"
  if max(errors) <= 1e-4:
    reached = alternate({"ours": ours, "torch": torch}, pairs)
    speeds = [typical(reached, side, "samples") for side in ("ours", "torch")]
    value, detail = ratio(reached, "samples"), f"{speeds[0]:.2f} against {speeds[1]:.2f} samples/s"
  row("cpu.successor_train_x", value, ">= 1.3", detail=detail)


# --- FLOPs ------------------------------------------------------------------------------------


def flops_of_answering(cfg: VideoReferConfig, text: int = 60) -> None:
  """A question about 180 frames of 1280x720: tower rows, and the prefill in its bucket."""
  frames = [to_patches(blank(720, 1280, 3), cfg.img.max_tokens, 2, 180) for _ in range(180)]
  packed = pack(frames, row_sizes(cfg.img))
  D, F, layers = cfg.img.width, cfg.img.mlp_dim, cfg.img.layers
  tower = 0
  for one in packed.rows:
    N, keys = len(one.patches), keys_of_pictures(jnp.asarray(one.segments)[None])
    tower += layers * N * (2 * (4 * D * D + 2 * D * F) + 4 * keys * D)
    tower += 2 * 3 * cfg.img.patch_size**2 * D * N
  V = sum(p.tokens for p in frames)
  slots, n = bucket(V + text), sum(len(one.patches) for one in packed.rows)
  empty = dict.fromkeys(("objects", "cells", "context"), 0) | {"cells": 1}
  shape = Shape(
    tower_rows=1, patches=n, scene=bucket(V), length=slots, merge=2, tokens_per_object=32, **empty
  )
  sample = Sample(np.zeros(0, np.int32), np.zeros(0, np.int32))
  batch = {
    **scene_arrays([sample], {}, shape), **object_arrays([], {}, shape),
    **text_arrays([sample], shape, None), "patches": np.broadcast_to(np.uint8(0), (1, n, 588)),
  }  # fmt: skip
  del batch["segments"]
  structs = {k: jax.ShapeDtypeStruct((1, *x.shape), x.dtype) for k, x in batch.items()}
  features = jax.ShapeDtypeStruct((1, n, D), jnp.float32)
  cache = jax.eval_shape(functools.partial(KVCache.empty, cfg.llm, 1, slots))
  params = jax.eval_shape(functools.partial(init_params, cfg), jax.random.key(0))
  prefill = functools.partial(VideoRefer(cfg).apply, method="prefill_pictures")
  done = tower + count_flops(prefill, {"params": params}, features, structs, cache)
  need = sum(picture_flops(cfg.img, len(p.patches)) for p in frames)
  need += decoder_flops(cfg.llm, V + text, 0) + 2 * V * (D + cfg.llm.width) * cfg.llm.width
  detail = (
    f"{done / 1e12:.1f} / {need / 1e12:.1f} TF; tower {tower / 1e12:.1f}, {V} tokens in {slots}"
  )
  row("flop.successor_answer", done / need, "<= 1.08", detail=detail)


def flops_of_training() -> None:
  from vr_jax.sharding import make_mesh
  from vr_jax.training.ahead_of_time import executed_flops, make_abstract_step, needed_flops

  config = load_config("pixelrefer_stage1", ["config.input.batch_size=1"])
  config.model = (*config.model, ("llm.remat", "none"))
  step = make_abstract_step(config, make_mesh([("data", 1), ("fsdp", 1)], jax.devices()[:1]))
  done, need = executed_flops(step), needed_flops(step)
  row(
    "flop.successor_train",
    done / need,
    "<= 1.05",
    detail=f"{done / 1e12:.1f} / {need / 1e12:.1f} TF",
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--pairs", type=int, default=rows.PAIRS)
  known = ("prefill", "questions", "train", "flops")
  parser.add_argument("--rows", nargs="*", default=known, choices=known)
  args = parser.parse_args()
  if "flops" in args.rows:
    flops_of_answering(get_variant("pixelrefer-2b"))
    flops_of_training()
  if set(args.rows) == {"flops"}:
    return
  torch = importlib.import_module("torch")
  torch.set_num_threads(rows.THREADS)
  with tempfile.TemporaryDirectory() as home:
    folder = Path(home, "middle")
    publish(middle(), folder)
    source, model = open_source(folder), load(folder)
    with torch_model(source) as (_, parts):
      theirs = Theirs(parts, source.model_config())
      queries = requests()
      if "prefill" in args.rows:
        speed_of_answers(
          model, theirs, "cpu.successor_prefill_x", queries[:1], 1, ">= 1.5", args.pairs
        )
      if "questions" in args.rows:
        speed_of_answers(
          model, theirs, "cpu.successor_many_x", queries, NEW_TOKENS, ">= 8", args.pairs
        )
      if "train" in args.rows:
        params = nested(arrays(source.params, "float32"))
        speed_of_training(source.model_config(), params, model, theirs, args.pairs)


if __name__ == "__main__":
  main()
