# mypy: ignore-errors
"""VideoRefer's successors in PyTorch: a tower for pictures of any size, objects as crops.

    patches -- vision_encoder (NaViT) -+- mm_projector (scene tokens) -----+
                                       +- region_encoder (object tokens) --+- decoder - logits
    input_ids -- embed_tokens -----------------------------------------------+

Letters as in modeling_videorefer.py, and: X tower row, N patch of such a row, n patch of all rows
of a row of the batch, M patch of a scene token, C cell of an object, K token of an object, G patch
of a context picture.

Inputs are what `PictureProcessor` makes: patches u8 [B,X,N,588], patch_segments i64 [B,X,N] (-1:
padding), patch_positions i64 [B,X,N,2]; scene i64 [B,V,M], scene_frame and scene_before i64 [B,V];
cells i64 [B,R,C,4], cell_weights f32, cell_places f32 [B,R,C,2], cell_counts i64 [B,R], cell_starts
i64 [B,R,K]; local and whole i64 [B,R,G]; input_ids, visual and attention_mask as there.

Source: PixelRefer (arXiv 2510.23603), VideoLLaMA3 (arXiv 2501.13106).
"""

import torch
import torch.nn.functional as F
from torch import nn

from .modeling_videorefer import (
  TowerAttention,
  TowerLayer,
  VideoReferForCausalLM,
  VideoReferModel,
  mlp,
  rotate,
)

PICTURES = (
  "patches", "patch_segments", "patch_positions", "scene", "scene_frame", "scene_before", "cells",
  "cell_weights", "cell_places", "cell_counts", "cell_starts", "local", "whole",
)  # fmt: skip
ITERATIONS = {"cells": 20, "placed_cells": 5, "cells_in_context": 3}
CHANGE = 0.1  # a token stays if its pixels, in units of 1/255, changed by more on average


def in_range(patches):
  """u8 to [-1, 1], float32."""
  return (patches.float() * 0.00392156862745098 - 0.5) / 0.5


# --- Tower ------------------------------------------------------------------------------------


class PictureAttention(TowerAttention):
  def forward(self, x, cos, sin, lengths):  # [P,D]
    q, k, v = (
      proj(x).unflatten(-1, (self.heads, -1)).transpose(0, 1)[None]
      for proj in (self.q_proj, self.k_proj, self.v_proj)
    )
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    parts = zip(*(t.split(lengths, 2) for t in (q, k, v)), strict=True)
    y = torch.cat([F.scaled_dot_product_attention(*part) for part in parts], 2)
    return self.out_proj(y[0].transpose(0, 1).flatten(1))


class PictureLayer(TowerLayer):
  def __init__(self, c):
    super().__init__(c)
    self.self_attn = PictureAttention(c["width"], c["heads"])

  def forward(self, x, cos, sin, lengths):
    x = x + self.self_attn(self.layer_norm1(x), cos, sin, lengths)
    return x + self.mlp(self.layer_norm2(x))


class PictureTower(nn.Module):
  """SigLIP-NaViT: all layers and the norm behind them; each picture sees itself alone."""

  def __init__(self, c):
    super().__init__()
    self.embeddings = nn.Module()
    patch = c["patch_size"]
    self.embeddings.patch_embedding = nn.Conv2d(3, c["width"], patch, stride=patch)
    self.encoder = nn.Module()
    self.encoder.layers = nn.ModuleList(PictureLayer(c) for _ in range(c["depth"]))
    self.post_layernorm = nn.LayerNorm(c["width"], eps=1e-6)
    self.head_dim = c["width"] // c["heads"]

  def forward(self, patches, positions, lengths):
    """Features [P,D] of P patches u8 [P,588] of pictures of these lengths, behind each other."""
    kernel = self.embeddings.patch_embedding
    x = F.linear(in_range(patches).to(kernel.weight.dtype), kernel.weight.flatten(1), kernel.bias)
    powers = torch.arange(0, self.head_dim // 2, 2, device=x.device).float() / (self.head_dim // 2)
    angles = (positions.float()[..., None] * (1.0 / 10_000.0**powers)).flatten(-2)
    for layer in self.encoder.layers:
      x = layer(x, angles.cos(), angles.sin(), lengths)
    return self.post_layernorm(x)

  def rows(self, patches, segments, positions):
    """Features [B,n,D]; zeros in padding."""
    B, X, N, _ = patches.shape
    row = torch.arange(B * X, device=patches.device)[:, None]
    number = (row * (N + segments.max().clamp(min=0) + 1) + segments.flatten(0, 1)).flatten()
    real = segments.flatten() >= 0
    lengths = torch.unique_consecutive(number[real], return_counts=True)[1].tolist()
    x = self(patches.flatten(0, 2)[real], positions.flatten(0, 2)[real], lengths)
    features = x.new_zeros(B * X * N, x.shape[-1])
    features[real] = x
    return features.unflatten(0, (B, X * N))


# --- Scene tokens -----------------------------------------------------------------------------


def kept_tokens(patches, scene, frame, before, dtype):
  """Which scene tokens [V] of a row the compressor keeps, from its pixels u8 [n,588]."""
  tokens = in_range(patches).to(dtype)[scene].flatten(1)
  change = (tokens - tokens[before.clamp(min=0)]).abs().float().mean(-1) * 255.0
  kept = ((change > CHANGE) | (before < 0)) & (frame >= 0)
  for number in frame[frame >= 0].unique().tolist():
    inside = (frame == number).nonzero()[:, 0]
    if not kept[inside].any():
      kept[inside[0]] = True
  return kept


class Projector(nn.Module):
  def __init__(self, width_in, width):
    super().__init__()
    self.readout = mlp(width_in, width)

  def forward(self, x):
    return self.readout(x)


# --- Object tokens ----------------------------------------------------------------------------


def k_means(x, start, iterations):
  """Centres of clusters of the cells [n,D], in the order of those they start from.

  An empty cluster keeps its centre; once the centres have settled the ones before stand.
  """
  centres = x[start]
  for _ in range(iterations):
    nearest = (x[:, None] - centres[None]).square().sum(-1).argmin(-1)
    member = F.one_hot(nearest, len(start)).to(x.dtype)
    count = member.sum(0)[:, None]
    new = torch.where(count > 0, member.T @ x / count.clamp(min=1), centres)
    if torch.allclose(centres, new, atol=1e-6, rtol=1e-5):
      break
    centres = new
  return centres


class CellEncoder(nn.Module):
  """Cells under a mask, joined to at most K, lifted to the decoder's width."""

  def __init__(self, kind, width_in, width, tokens):
    super().__init__()
    self.iterations, self.tokens = ITERATIONS[kind], tokens
    self.placed, self.context = kind != "cells", kind == "cells_in_context"
    if self.placed:
      self.pos_linear = nn.Linear(2, width_in)
    if self.context:
      for name in ("local", "global"):
        setattr(self, f"ln_{name}", nn.LayerNorm(width_in, eps=1e-5))
        attention = nn.MultiheadAttention(width_in, 8, batch_first=True)
        setattr(self, f"fusion_attention_{name}", attention)
    self.feat_linear = mlp(width_in, width)

  def forward(self, features, pictures):
    """(object tokens [B,R,K,E], which of them exist)."""
    B, R = pictures["cell_counts"].shape
    tokens = features.new_zeros(B, R, self.tokens, features.shape[-1], dtype=torch.float32)
    kept = torch.zeros(B, R, self.tokens, dtype=torch.bool, device=features.device)
    for b, r in (pictures["cell_counts"] >= 0).nonzero().tolist():
      tokens[b, r], kept[b, r] = self.one(
        features[b], {name: x[b, r] for name, x in pictures.items() if name in PICTURES[6:]}
      )
    return self.feat_linear(tokens.to(features.dtype)), kept

  def one(self, features, o):
    """The tokens [K,D] of one object, and which of them exist."""
    K, n = self.tokens, int(o["cell_counts"])
    x = (features[o["cells"][:n]].float() * o["cell_weights"][:n, :, None]).sum(1)
    if self.placed:
      x = x + self.pos_linear(o["cell_places"][:n].to(self.pos_linear.weight.dtype)).float()
    x = k_means(x, o["cell_starts"], self.iterations) if n > K else x
    x = F.pad(x, (0, 0, 0, K - len(x)))
    if not self.context:
      return x, torch.arange(K, device=x.device) < n
    for name, picture in (("local", o["local"]), ("global", o["whole"])):
      norm, attention = getattr(self, f"ln_{name}"), getattr(self, f"fusion_attention_{name}")
      around = features[picture[picture >= 0]][None]
      y = norm(x.to(norm.weight.dtype))[None]
      x = x + attention(y, around, around, need_weights=False)[0][0].float()
    return x, torch.ones(K, dtype=torch.bool, device=x.device)


# --- The model --------------------------------------------------------------------------------


class PictureVideoReferModel(VideoReferModel):
  def make_visual(self, cfg):
    img, region = cfg["img"], cfg["region"]
    tower = PictureTower(img)
    self.vision_encoder = nn.Module()
    self.vision_encoder.vision_encoder = tower
    if region["kind"] == "cells":  # its published names have one step more
      self.vision_encoder.vision_encoder = nn.Module()
      self.vision_encoder.vision_encoder.vision_model = tower
    self.mm_projector = Projector(img["width"], cfg["llm"]["width"])
    self.region_encoder = CellEncoder(
      region["kind"], img["width"], cfg["llm"]["width"], region["tokens"]
    )
    self.compare_dtype = getattr(torch, img["compare_dtype"])

  @property
  def tower(self):
    inner = self.vision_encoder.vision_encoder
    return getattr(inner, "vision_model", inner)

  def splice(self, pictures, input_ids, visual, attention_mask):
    """As of VideoReferModel, from pictures."""
    features = self.tower.rows(*(pictures[name] for name in PICTURES[:3]))
    rows, exists = [], []
    for b, scene in enumerate(pictures["scene"]):
      rows.append(features[b][scene].float().mean(1).to(features.dtype))
      patches = pictures["patches"][b].flatten(0, 1)
      frame, before = pictures["scene_frame"][b], pictures["scene_before"][b]
      exists.append(kept_tokens(patches, scene, frame, before, self.compare_dtype))
    rows = self.mm_projector(torch.stack(rows))
    objects, kept = self.region_encoder(features, pictures)
    exists = torch.cat([torch.stack(exists), kept.flatten(1)], 1)
    rows = torch.cat([rows, objects.flatten(1, 2).to(rows.dtype)], 1)
    return self.placed(rows, exists, input_ids, visual, attention_mask)


class PictureForCausalLM(VideoReferForCausalLM):
  """The model with its head; `generate` starts from pictures and text. One sample a row."""

  parts = PictureVideoReferModel
  _no_split_modules = ["DecoderLayer", "PictureLayer"]  # noqa: RUF012

  def forward(
    self, input_ids, visual, attention_mask, labels=None, num_items_in_batch=None,
    return_dict=True, **pictures,
  ):  # fmt: skip
    """Logits, and with `labels` the loss, as of VideoReferForCausalLM."""
    spliced = self.model.splice(self._checked(pictures), input_ids, visual, attention_mask)
    return self.scored(*spliced, visual, labels, num_items_in_batch)

  @torch.no_grad()
  def generate(self, input_ids, visual, attention_mask, **options):
    """New token ids [B,M]; options beside the pictures as of VideoReferForCausalLM.generate."""
    pictures = {name: options.pop(name) for name in PICTURES if name in options}
    spliced = self.model.splice(self._checked(pictures), input_ids, visual, attention_mask)
    return self.continued(*spliced[:2], **options)

  def _checked(self, pictures):
    if set(pictures) != set(PICTURES):
      raise TypeError(f"found {', '.join(pictures)}; accepted: all of {', '.join(PICTURES)}")
    return pictures
