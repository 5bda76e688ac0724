"""Pre-training of vr-mini-navit's tower on crowded pictures and crops of their things.

As `pretrain_tower`, with two kinds of pictures in the same rows: whole ones, whose patches must
tell all about the thing that they show, and crops, whose cells under the mask must tell its looks
(where it is, the region encoder is told). It starts from vr-mini's tower, whose layers it shares.

Letters: B row, X row of the tower, n patch of a row, V scene token, M patch of it, R crop, N cell,
D tower width, S state.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from data_pipes.embedded.states import FIELDS, STATE
from data_pipes.embedded.zooms import CROPS, Zoom, zooms
from data_pipes.navit_rows import TOWER_ROW, Crop, Ids, Sample, Shape, build_row, tokens_of
from data_pipes.patch_packing import pack_pictures
from vr_jax.assets import MINI_PARTS
from vr_jax.checkpoint import load_params
from vr_jax.mini.pretrain_tower import state_loss
from vr_jax.models.crops import cell_features
from vr_jax.models.navit import Navit, NavitConfig
from vr_jax.models.variants import get_variant
from vr_jax.params import Params
from vr_jax.training.loss import LossSums
from vr_jax.training.start import starting_params
from vr_jax.training.task import Task

TOWER_ROWS, PATCHES = 4, 256  # of a row; a picture is at most as large as the latter
ZOOMS = 8  # of a row at most: more than fit
LOOKS = tuple(name for name in FIELDS if name not in ("column", "row"))


class ZoomTower(nn.Module):
  """The tower with linear heads: states of patches and of cells, and "does the patch show one?"."""

  cfg: NavitConfig

  def setup(self):
    self.img = Navit(self.cfg)
    # Small, so that they do not pull at a tower that sees before they know what it says.
    dense = functools.partial(nn.Dense, kernel_init=nn.initializers.normal(0.01))
    self.states, self.looks, self.thing = dense(STATE), dense(STATE), dense(1)

  def __call__(
    self, rows: Mapping[str, Array]
  ) -> tuple[Float[Array, "B V M S"], Float[Array, "B V M"], Float[Array, "B R N S"]]:
    """States of the patches of scene tokens, whether each shows a thing, states of cells."""
    features = self.img.features(rows).astype(jnp.float32)
    patches = jax.vmap(lambda row, index: row[index])(features, rows["scene"])
    cells = cell_features(features, rows)
    return self.states(patches), self.thing(patches)[..., 0], self.looks(cells)


def zoom_loss(model: ZoomTower, params: Params, rows: Mapping[str, Array]) -> LossSums:
  """Loss of a batch; the weight is its rows."""
  by_patch, thing, by_cell = model.apply({"params": params}, rows)
  states, looks = rows["states"].astype(jnp.float32), rows["looks"].astype(jnp.float32)
  owners = rows["owners"]
  loss = state_loss(by_patch, states, (owners == 1).astype(jnp.float32))
  shown = (rows["scene_frame"] >= 0)[..., None] & (owners < 2)
  known = jax.nn.softplus(jnp.where(owners > 0, -1, 1) * thing)
  loss += (known * shown).sum() / jnp.maximum(shown.sum(), 1)

  counts = rows["cell_counts"]
  inside = jnp.arange(by_cell.shape[2]) < counts[..., None]
  mean = (by_cell * inside[..., None]).sum(2) / jnp.maximum(counts, 1)[..., None]
  loss += state_loss(mean, looks, (counts > 0).astype(jnp.float32), LOOKS)
  each = jnp.broadcast_to(looks[:, :, None], by_cell.shape)
  weight = inside / jnp.maximum(counts, 1)[..., None]
  loss += 0.5 * state_loss(by_cell, each, weight, LOOKS)
  count = jnp.float32(len(owners))
  return LossSums(loss * count, count, jnp.zeros((), jnp.int32))


def zoom_row(some: Sequence[Zoom], shape: Shape) -> dict[str, np.ndarray]:
  """As many of the pictures, each followed by its crops, as fit a row, with their targets."""
  sizes: list[int] = []
  scene: list[Zoom] = []
  crops: list[tuple[Crop, np.ndarray]] = []

  def fits(patches: int) -> bool:
    if len(pack_pictures([*sizes, patches], (shape.patches,))) > shape.tower_rows:
      return False
    sizes.append(patches)
    return True

  def add(crop: Crop, looks: np.ndarray) -> None:
    room = len(crops) < shape.objects and crop.cells <= shape.cells
    if room and fits(len(crop.picture.patches)):
      crops.append((crop, looks))

  for zoom in some:
    slots = sum(z.picture.tokens for z in scene) + zoom.picture.tokens
    if slots > shape.scene or not fits(len(zoom.picture.patches)):
      break
    scene.append(zoom)
    for crop, looks in zip(zoom.crops, zoom.crop_states, strict=True):
      add(crop, looks)
  pictures, objects = [z.picture for z in scene], [c for c, _ in crops]
  ids = Ids(0, 1, shape.tokens_per_object)
  tokens = sum(tokens_of(c, ids.tokens_per_object) for c in objects)
  text = np.repeat(ids[:2], [sum(p.tokens for p in pictures), tokens])  # nothing but visual slots
  row = build_row([Sample(text, text, pictures, objects)], shape, ids)
  names = (*TOWER_ROW, "scene", "scene_frame", "cells", "cell_weights", "cell_counts")
  row = {name: row[name] for name in names}
  M = shape.merge**2
  row["states"] = np.zeros((shape.scene, M, STATE), np.float16)
  row["owners"] = np.zeros((shape.scene, M), np.uint8)
  row["looks"] = np.zeros((shape.objects, STATE), np.float16)
  at = 0
  for zoom in scene:
    slots = slice(at, at := at + zoom.picture.tokens)
    row["states"][slots] = rearrange(zoom.states, "(v m) s -> v m s", m=M)
    row["owners"][slots] = rearrange(zoom.owners, "(v m) -> v m", m=M)
  row["looks"][: len(crops)] = np.array([s for _, s in crops]).reshape(-1, STATE)
  return row


def tower_from_squares(params: Mapping[str, Any], patch: int) -> Params:
  """A tower of squares, all layers that it runs, as one of any size with patches of `patch` pixels.

  Patches of another size look alike: on a patch enlarged bilinearly the new kernel gives what the
  old one gave (FlexiViT, arXiv 2212.08013). Positions come by rotation instead; of the old ones the
  mean stays, in the bias.
  """
  old = np.asarray(params["embedding"]["kernel"], np.float32)
  each = np.eye(old.shape[0], dtype=np.float32)
  axis = np.asarray(jax.image.resize(each, (patch, old.shape[0]), "linear"))
  inverse = np.linalg.pinv(np.kron(axis, axis).T)  # [patch², old²]
  kernel = (inverse @ old.reshape(old.shape[0] ** 2, -1)).reshape(patch, patch, *old.shape[2:])
  bias = np.asarray(params["embedding"]["bias"], np.float32)
  bias = bias + np.asarray(params["pos_embedding"], np.float32).mean((0, 1))
  layers = jax.tree.map(lambda x: np.asarray(x, np.float32), params["Transformer"]["encoderblock"])
  return {
    "embedding": {"kernel": kernel, "bias": bias},
    "Transformer": {"encoderblock": layers},
  }


def zoom_task(config: ConfigDict) -> Task:
  """The task of configs/mini_navit_tower.py: `config.crowds` crowds of 40 pictures, in memory."""
  cfg = get_variant(config.model_name)
  seeds = range(config.crowd_seed, config.crowd_seed + config.crowds)
  sizes = (config.crowd_pictures, cfg.region.tokens, cfg.img.max_tokens)
  with ProcessPoolExecutor(config.input.threads, get_context("spawn")) as pool:
    arguments = ([size] * len(seeds) for size in sizes)
    made = [zoom for some in pool.map(zooms, seeds, *arguments) for zoom in some]
  scene, objects, K = cfg.img.max_tokens // 2, ZOOMS * CROPS // 2, cfg.region.tokens
  shape = Shape(
    tower_rows=TOWER_ROWS,
    patches=PATCHES,
    scene=scene,
    objects=objects,
    cells=max(crop.cells for zoom in made for crop in zoom.crops),
    context=0,
    length=scene + objects * K,
    merge=cfg.img.merge,
    tokens_per_object=K,
  )
  model, B = ZoomTower(cfg.img), config.input.batch_size

  def batch(position: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng((config.seed, position))
    chosen = (rng.integers(0, len(made), ZOOMS) for _ in range(B))
    rows = [zoom_row([made[i] for i in some], shape) for some in chosen]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

  def batches(position: int, total_steps: int) -> Iterator[dict[str, np.ndarray]]:
    return (batch(p) for p in range(position, total_steps))

  def start(shapes: Params) -> Params:
    if config.model_init:
      return starting_params(config, shapes)
    return {"img": tower_from_squares(load_params(MINI_PARTS)["img"], cfg.img.patch_size)}

  return Task(
    init=lambda key: model.init(key, jax.tree.map(jnp.asarray, batch(0)))["params"],
    loss=lambda params, rows: zoom_loss(model, params, rows),
    data_size=len(made),
    batches=batches,
    model=cfg.to_dict(),
    start=start,
    fields=("crowds", "crowd_seed", "crowd_pictures"),
  )
