"""Golden stages 01 to 04: tower, connectors, region encoder, token merge."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from data_pipes.masks import mask_to_grid, resize_mask
from vr_jax.interop import hf_tower, videorefer
from vr_jax.interop.fields import read_json
from vr_jax.models.connector import Connector
from vr_jax.models.region import (
  RegionConfig,
  RegionEncoder,
  merge_segments,
  merge_tokens,
  object_features,
)
from vr_jax.models.siglip import Siglip
from vr_jax.parity.golden import (
  PASS,
  Case,
  CaseResult,
  Golden,
  Produced,
  Skipped,
  compare_cases,
)

# --- 01_siglip --------------------------------------------------------------------------------


def siglip(golden: Golden) -> Iterator[CaseResult]:
  """Tower features; for some cases every hidden state, the normed last one and the pooled one."""
  return compare_cases(golden.cases("01_siglip"), functools.partial(_siglip, golden))


def _siglip(golden: Golden, case: Case) -> dict[str, np.ndarray]:
  folder = golden.path(case.meta["tower"]) if "tower" in case.meta else _checkpoint_tower(golden)
  model_type = read_json(folder / "config.json").get("model_type", "")
  if model_type.startswith("clip"):
    raise Skipped("CLIP towers are optional and not built")
  pixels = jnp.asarray(rearrange(case["pixel_values"], "b c h w -> b h w c"))
  scale = case.meta.get("scale_embeddings", 1.0)

  def run(select_layer, **kwargs):
    cfg, params = hf_tower.load_tower(folder, select_layer, pool=select_layer is None)
    embedding = {k: v * np.float32(scale) for k, v in params["embedding"].items()}
    pos_embedding = params["pos_embedding"] * np.float32(scale)
    params |= {"embedding": embedding, "pos_embedding": pos_embedding}
    apply = jax.jit(functools.partial(Siglip(cfg).apply, **kwargs))
    return apply({"params": params}, pixels)

  arrays = {"features": run(case.meta["select_layer"])[0]}
  if "last_hidden_state" in case or "hidden_0" in case:
    arrays["last_hidden_state"], out = run(None, intermediates=True)
    arrays["pooler_output"] = out["pooled"]
    arrays |= {f"hidden_{i}": hidden for i, hidden in enumerate(out["hidden"])}
  return arrays


def _checkpoint_tower(golden: Golden):
  fields = read_json(golden.checkpoint / "config.json")
  return golden.checkpoint / fields["mm_vision_tower"]


# --- 02_projectors ----------------------------------------------------------------------------


def projectors(golden: Golden) -> Iterator[CaseResult]:
  """Scene tokens of every connector kind; for some cases what s1, the sampler and s2 make."""
  return compare_cases(golden.cases("02_projectors"), functools.partial(_projector, golden))


def _projector(golden: Golden, case: Case) -> dict[str, np.ndarray]:
  file = golden.folder / case.meta["weights"].split(":")[0]  # "checkpoint: model.mm_projector.*"
  cfg, params = videorefer.load_connector(file, case.meta["mm_projector_type"])
  stages = jax.jit(functools.partial(Connector(cfg).apply, method="stages"))
  out = {k: np.asarray(v) for k, v in stages({"params": params}, case["x"]).items()}
  arrays = {"y": out["tokens"]}
  for name in ("s1", "s2"):
    if name in out:
      arrays[name] = rearrange(out[name], "b t h w c -> (b t) c h w")
  if "sampler" in out:
    arrays["sampler"] = rearrange(out["sampler"], "b t h w c -> b c t h w")
  return arrays


# --- 03_region --------------------------------------------------------------------------------


def region(golden: Golden) -> Iterator[CaseResult]:
  """Masks on the grid, pooled features, merged features and object tokens."""
  published = videorefer.load(golden.checkpoint)
  params, width = published.params["region"], published.config.llm.width
  cases = {case.id: case for case in golden.cases("03_region")}
  shared = cases.pop("shared")
  yield CaseResult("03_region", shared.id, PASS, note="features that the other cases use")
  yield from compare_cases(cases.values(), functools.partial(_region, shared, params, width))


@functools.partial(jax.jit, static_argnums=0)
def _encode(encoder: RegionEncoder, params, features, masks, frames):
  pooled, valid = object_features(features, masks, frames)
  merged, _ = merge_tokens(pooled, valid, encoder.cfg.tokens)
  tokens, kept = encoder.apply({"params": params}, features, masks, frames)
  return pooled, merged, tokens, kept


def _region(shared: Case, params, width: int, case: Case) -> Produced:
  meta = case.meta
  features = shared[meta["feats"]][meta["frames"]]
  grid = round(features.shape[1] ** 0.5)
  objects = meta["ann_indices"]  # [sample][object][frame]
  arrays, loose = {}, set()

  # One batch of padded rows. Each (object, frame) pair is a frame of its row.
  B, R = len(objects), _room(max(len(row) for row in objects))
  F = _room(max(len(frames) for row in objects for frames in row))
  P = _room(max(sum(map(len, row)) for row in objects))
  batch = np.zeros((B, P, *features.shape[1:]), np.float32)
  masks = np.zeros((B, R, P, grid * grid), np.uint8)
  region_frames = np.full((B, R, F), -1, np.int32)
  for b, row in enumerate(objects):
    pairs = [frame for frames in row for frame in frames]
    raw = case[f"masks_{b}"]
    if raw.size == 0:  # no mask at all: an object without annotation, one empty mask
      raw = np.zeros((len(pairs), grid, grid), np.uint8)
    on_grid = arrays[f"mask_bin_{b}"] = mask_to_grid(
      raw, grid, meta["image_aspect_ratio"], "published"
    )
    if f"mask_resized_{b}" in case:
      if meta["image_aspect_ratio"] == "pad":  # on the way to mask_bin, which is compared
        case[f"mask_resized_{b}"]
      else:
        arrays[f"mask_resized_{b}"] = resize_mask(raw, grid)
    if meta.get("fragile_mask"):  # a rounding decides a cell: go on with the published masks
      loose.add(f"mask_bin_{b}")
      on_grid = case.reference(f"mask_bin_{b}")
    batch[b, : len(pairs)] = features[pairs]
    start = 0
    for r, frames in enumerate(row):
      entries = np.arange(start, start := start + len(frames))
      masks[b, r, entries] = on_grid.reshape(-1, grid * grid)[entries]
      region_frames[b, r, : len(entries)] = entries

  encoder = RegionEncoder(RegionConfig(width=width, tokens=meta["region_token_num"]))
  out = _encode(encoder, params, batch, masks, region_frames)
  pooled, merged, tokens, kept = (np.asarray(x) for x in out)
  real = [(b, r) for b, row in enumerate(objects) for r in range(len(row))]
  arrays |= {
    "pooled": pooled[region_frames >= 0],
    "merged": merged[kept],
    "out": tokens[kept],
    "region_token_nums": np.array([kept[b, r].sum() for b, r in real]),
  }
  if meta.get("fragile"):
    loose |= {"merged", "out", "region_token_nums"}
  note = "fragile: a rounding decides" if loose else ""
  return Produced(arrays, loose=frozenset(loose), note=note)


def _room(n: int) -> int:
  """The next power of two, so that cases share compiled programs."""
  return 1 << (n - 1).bit_length()


# --- 04_token_merge ---------------------------------------------------------------------------


def token_merge(golden: Golden) -> Iterator[CaseResult]:
  """Similarities of neighbouring frames and merged features."""
  return compare_cases(golden.cases("04_token_merge"), _token_merge)


@functools.partial(jax.jit, static_argnums=2)
def _merge(x, valid, u):
  return merge_tokens(x, valid, u), merge_segments(x, valid, u)[1]


def _token_merge(case: Case) -> Produced:
  x = case["x"]
  n, d = x.shape
  frames = np.zeros((_room(n), d), np.float32)
  frames[:n] = x
  (tokens, kept), similarity = _merge(frames, np.arange(len(frames)) < n, case.meta["u"])
  arrays = {"y": np.asarray(tokens)[np.asarray(kept)], "sim": np.asarray(similarity)[: n - 1]}
  if case.meta.get("fragile"):
    return Produced(arrays, loose=frozenset({"y"}), note="fragile: a rounding decides")
  return Produced(arrays)
