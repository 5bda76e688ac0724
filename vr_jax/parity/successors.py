"""Golden stages 01 to 06 of VideoRefer-VideoLLaMA3, PixelRefer and PixelRefer-Lite: the parts."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from data_pipes.navit_rows import (
  Crop,
  Ids,
  Picture,
  Row,
  Sample,
  build_row,
  needed_shape,
  pack,
)
from data_pipes.tokenizer import Tokenizer
from vr_jax.interop.generation import Generation
from vr_jax.interop.sources import open_source
from vr_jax.interop.table import arrays, nested
from vr_jax.models.connector import Connector
from vr_jax.models.crops import k_means
from vr_jax.models.navit import Navit, downsampled, kept_tokens, token_changes
from vr_jax.models.region import KINDS
from vr_jax.models.siglip import pixels
from vr_jax.models.videorefer import VideoRefer, VideoReferConfig
from vr_jax.parity.golden import Case, CaseResult, Golden, compare_cases


class Checkpoint(NamedTuple):
  """A checkpoint of a golden folder, ready to run."""

  cfg: VideoReferConfig
  params: Any
  tokenizer: Tokenizer
  generation: Generation

  @property
  def model(self) -> VideoRefer:
    return VideoRefer(self.cfg)

  @property
  def ids(self) -> Ids:
    image, region = (self.tokenizer.id_of(t) for t in ("<image>", "<REGION>"))
    assert image is not None
    assert region is not None
    return Ids(image, region, self.cfg.region.tokens)

  def rows(self, rows: list[list[Sample]], where: str) -> Row:
    """A batch of the given rows, in sizes that cases share."""
    cfg = self.cfg
    shape = needed_shape(rows, merge=cfg.img.merge, tokens_per_object=cfg.region.tokens)
    names = ("tower_rows", "patches", "scene", "objects", "cells", "context", "length")
    sizes = {name: getattr(shape, name) for name in names}
    shape = dataclasses.replace(shape, **{name: n and room(n) for name, n in sizes.items()})
    made = [build_row(samples, shape, self.ids, where) for samples in rows]
    return {name: np.stack([row[name] for row in made]) for name in made[0]}


@functools.cache
def checkpoint(golden: Golden, name: str) -> Checkpoint:
  """A checkpoint of the golden folder, in float32."""
  source = open_source(golden.path(name))
  params = jax.tree.map(jnp.asarray, nested(arrays(source.params, "float32")))
  tokenizer = Tokenizer.from_folder(golden.path(name))
  return Checkpoint(source.model_config(), params, tokenizer, Generation(**source.generation))


def room(n: int, smallest: int = 8) -> int:
  """The next power of two, so that cases share compiled programs."""
  return max(smallest, 1 << (n - 1).bit_length())


# --- 01_vision --------------------------------------------------------------------------------


def vision(golden: Golden) -> Iterator[CaseResult]:
  """Tower features of packed pictures; for some cases every hidden state."""
  return compare_cases(golden.cases("01_vision"), functools.partial(_vision, golden))


def pictures_of(pixels_u8: np.ndarray, grids: np.ndarray, merges: np.ndarray) -> list[Picture]:
  """The pictures of a packed call; an entry of t frames is t pictures."""
  pictures, at = [], 0
  for (t, h, w), merge in zip(grids, merges, strict=True):
    for _ in range(t):
      patches = pixels_u8[at : at + h * w]
      pictures.append(Picture(patches, (int(h), int(w)), int(merge)))
      at += h * w
  return pictures


@functools.partial(jax.jit, static_argnums=(0, 3))
def _encode(tower: Navit, params, packed, intermediates: bool):
  return tower.apply({"params": params}, *packed, intermediates=intermediates)


def _vision(golden: Golden, case: Case) -> dict[str, np.ndarray]:
  loaded = checkpoint(golden, case.meta["checkpoint"])
  pictures = pictures_of(case["pixels_u8"], case["grid_thw"], case["strides"])
  size = room(sum(len(p.patches) for p in pictures))
  packed = pack(pictures, (size,), pictures[0].patches.shape[-1])
  rows = [x[None] for x in packed.rows[0]]
  features, out = _encode(Navit(loaded.cfg.img), loaded.params["img"], rows, "hidden_0" in case)
  order = np.concatenate([packed.start[id(p)] + np.arange(len(p.patches)) for p in pictures])
  arrays = {"features": np.asarray(features)[0, order]}
  return arrays | {
    f"hidden_{i}": np.asarray(x)[0, order] for i, x in enumerate(out.get("hidden", ()))
  }


# --- 02_projector -----------------------------------------------------------------------------


def projector(golden: Golden) -> Iterator[CaseResult]:
  """Scene tokens of features: downsampled, then lifted to the decoder's width."""
  return compare_cases(golden.cases("02_projector"), functools.partial(_projector, golden))


def _projector(golden: Golden, case: Case) -> dict[str, np.ndarray]:
  loaded = checkpoint(golden, case.meta["checkpoint"])
  x = golden.array(case.meta["x"])
  pictures = pictures_of(x, np.array(case.meta["grid_thw"]), np.array(case.meta["strides"]))
  M, index, at = loaded.cfg.img.merge**2, [], 0
  for picture in pictures:
    each = picture.merge**2
    index.append(at + np.arange(picture.tokens)[:, None] * each + np.arange(M) % each)
    at += len(picture.patches)
  down = downsampled(jnp.asarray(x)[None], jnp.asarray(np.concatenate(index))[None])
  connector = Connector(loaded.cfg.connector)
  y = connector.apply({"params": loaded.params["connector"]}, down[:, None])
  return {"down": down[0], "y": y[0]}


# --- 03_compressor ----------------------------------------------------------------------------


def compressor(golden: Golden) -> Iterator[CaseResult]:
  """Which scene tokens of a video stay, and by how much each changed."""
  return compare_cases(golden.cases("03_compressor"), _compressor)


def _compressor(case: Case) -> dict[str, np.ndarray]:
  frames = case["frames_u8"]
  (_, h, w), merge = case.meta["grid"], case.meta["stride"]
  pictures = [Picture(patches, (h, w), merge) for patches in frames]
  F, n = len(frames), pictures[0].tokens
  values = pixels(jnp.asarray(frames)).reshape(F * n, -1)
  before = np.where(np.arange(F * n) < n, -1, np.arange(F * n) - n)
  changes = token_changes(values, jnp.asarray(before))
  kept = kept_tokens(changes, jnp.asarray(np.repeat(np.arange(F), n)))
  return {"keep": np.asarray(kept).reshape(F, n), "diff": np.asarray(changes).reshape(F, n)}


# --- 05_kmeans --------------------------------------------------------------------------------


def k_means_cases(golden: Golden) -> Iterator[CaseResult]:
  """Centres of the clusters, from the start that the published code drew."""
  return compare_cases(golden.cases("05_kmeans"), _k_means)


_centres = jax.jit(k_means, static_argnums=3)


def _k_means(case: Case) -> dict[str, np.ndarray]:
  x = case["x"]
  padded = np.zeros((room(len(x)), x.shape[1]), np.float32)
  padded[: len(x)] = x
  valid = np.arange(len(padded)) < len(x)
  return {"y": _centres(padded, valid, case["init"], case.meta["iterations"])}


# --- 06_region --------------------------------------------------------------------------------


def region(golden: Golden) -> Iterator[CaseResult]:
  """Object tokens of features that are given, all objects in one row."""
  return compare_cases(golden.cases("06_region"), functools.partial(_region, golden))


@functools.partial(jax.jit, static_argnums=0)
def _objects(encoder, params, features, batch):
  return encoder.apply({"params": params}, features, batch, method="objects")


def _region(golden: Golden, case: Case) -> dict[str, np.ndarray]:
  loaded = checkpoint(golden, case.meta["checkpoint"])
  crops, features = [], []

  def picture(name: str) -> Picture | None:
    """A picture that stands for features: each of its patches holds the number of its own."""
    if name not in case:
      return None
    x = case[name]
    numbers = sum(map(len, features)) + np.arange(x.shape[0] * x.shape[1])
    features.append(x.reshape(-1, x.shape[-1]))
    return Picture(numbers.astype("<u4").view(np.uint8).reshape(-1, 4), x.shape[:2])

  for i in range(sum(case.meta["groups"])):
    crop = picture(f"feat_{i}")
    assert crop is not None
    crops.append(
      Crop(
        picture=crop,
        mask=case[f"mask_{i}"],
        box=case["boxes"][i] if "boxes" in case else None,
        local=picture(f"local_{i}"),
        whole=picture(f"raw_{i}"),
        start=case.get(f"init_{i}"),
      )
    )
  ids, cfg = Ids(-1, -2, loaded.cfg.region.tokens), loaded.cfg
  counts = [min(crop.cells, ids.tokens_per_object) for crop in crops]
  if crops[0].whole is not None:
    counts = [ids.tokens_per_object] * len(crops)
  text = np.full(sum(counts), ids.region)
  samples = [Sample(text, text, objects=crops)]
  shape = needed_shape([samples], merge=cfg.img.merge, tokens_per_object=ids.tokens_per_object)
  row = {name: x[None] for name, x in build_row(samples, shape, ids, case.id).items()}
  numbers = row["patches"].reshape(-1, 4).copy().view("<u4")[:, 0]
  given = np.concatenate(features)[numbers][None]
  encoder = KINDS[cfg.region.kind](cfg.region)
  tokens, kept = map(np.asarray, _objects(encoder, loaded.params["region"], given, row))
  return {"out": tokens[kept], "counts": kept[0].sum(-1).astype(np.int32)}
