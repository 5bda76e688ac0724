"""Pre-training of vr-mini's tower on crowded pictures, with dense targets.

As SigLIP's patches come to know what words say about them, every patch of a thing, and the mean
over the thing's mask, must tell its colour, shape, marking, size and place and its nearest
neighbour (`data_pipes.embedded.states`) by a linear map, which is dropped afterwards.

Letters: X picture, S pixel, N patch, O thing, D tower width, V state.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

from data_pipes.embedded.states import FIELDS, SLICES, STATE
from data_pipes.embedded.stills import picture_rows
from vr_jax.models.region import pool_regions
from vr_jax.models.siglip import Siglip, SiglipConfig, pixels
from vr_jax.models.variants import get_variant
from vr_jax.training.loss import LossSums
from vr_jax.training.start import starting_params
from vr_jax.training.task import Task

PATCH_SCALE = 0.2  # of the patch kernel at the start: dull backdrops would drown everything else


class StateTower(nn.Module):
  """The tower with linear heads for states and for "is there a thing?"."""

  cfg: SiglipConfig

  def setup(self):
    self.img = Siglip(self.cfg)
    self.states = nn.Dense(STATE)
    self.thing = nn.Dense(1)

  def __call__(
    self, rows: dict[str, Array]
  ) -> tuple[Float[Array, "X N D"], Float[Array, "X O D"], Float[Array, "X N V"], Array, Array]:
    """Features, pooled features, then the heads: states of patches and things, thing or not."""
    features, _ = self.img(pixels(rows["frames"]))
    features = features.astype(jnp.float32)
    pooled = pool_regions(features[:, None], rows["masks"][:, :, None])[:, :, 0]
    thing = self.thing(features)[..., 0]
    return features, pooled, self.states(features), self.states(pooled), thing


def state_loss(
  predicted: Float[Array, "*b V"],
  target: Float[Array, "*b V"],
  weight: Float[Array, "*b"],
  fields: Iterable[str] = tuple(FIELDS),
) -> Float[Array, ""]:
  """Mean over the weighted places: cross entropy of the classes, squared error of the values."""
  total = jnp.zeros(weight.shape)
  for name in fields:
    p, t = predicted[..., SLICES[name]], target[..., SLICES[name]]
    if FIELDS[name][1] == "class":
      total += optax.softmax_cross_entropy(p, t)
    else:
      total += 4 * jnp.square(p - t).sum(-1)
  return (total * weight).sum() / jnp.maximum(weight.sum(), 1)


def tower_loss(model: StateTower, params, rows: dict[str, Array]) -> LossSums:
  """Loss of a batch of pictures; the weight is their number."""
  masks, states = rows["masks"].astype(jnp.float32), rows["states"].astype(jnp.float32)
  _, _, by_patch, by_thing, thing = model.apply({"params": params}, rows)
  seen = (masks.any(-1) & states.any(-1)).astype(jnp.float32)
  owners = masks.sum(1)
  of_patch = jnp.einsum("XON,XOV->XNV", masks, states)
  loss = state_loss(by_thing, states, seen)
  loss += 0.5 * state_loss(by_patch, of_patch, (owners == 1).astype(jnp.float32))
  loss += jax.nn.softplus(jnp.where(owners > 0, -1, 1) * thing).mean()
  count = jnp.float32(len(masks))
  return LossSums(loss * count, count, jnp.zeros((), jnp.int32))


def accuracies(
  predicted: Float[Array, "*b V"], target: Float[Array, "*b V"], weight: Bool[Array, "*b"]
) -> dict[str, float]:
  """Share of right classes, and mean absolute error of the values, by field."""
  out = {}
  for name, (_, kind) in FIELDS.items():
    p, t = predicted[..., SLICES[name]], target[..., SLICES[name]]
    right = p.argmax(-1) == t.argmax(-1) if kind == "class" else np.abs(p - t).mean(-1)
    out[name] = float(right[weight].mean())
  return out


def tower_task(config: ConfigDict) -> Task:
  """The task of configs/mini_tower.py: `config.crowds` videos of 40 pictures each, in memory."""
  cfg = get_variant(config.model_name)
  seeds = range(config.crowd_seed, config.crowd_seed + config.crowds)
  with ProcessPoolExecutor(config.input.threads, get_context("spawn")) as pool:
    sizes = ([cfg.img.image_size] * len(seeds), [cfg.img.grid] * len(seeds))
    made = list(pool.map(picture_rows, seeds, *sizes))
  pictures = {key: np.concatenate([rows[key] for rows in made]) for key in made[0]}
  size, B = len(pictures["frames"]), config.input.batch_size
  model = StateTower(cfg.img)

  def batch(position: int) -> dict[str, np.ndarray]:
    chosen = np.random.default_rng((config.seed, position)).integers(0, size, B)
    return {key: values[np.sort(chosen)] for key, values in pictures.items()}

  def batches(position: int, total_steps: int) -> Iterator[dict[str, np.ndarray]]:
    return (batch(p) for p in range(position, total_steps))

  def init(key):
    params = model.init(key, jax.tree.map(jnp.asarray, batch(0)))["params"]
    embedding = params["img"]["embedding"]
    return params | {
      "img": params["img"]
      | {"embedding": embedding | {"kernel": embedding["kernel"] * PATCH_SCALE}}
    }

  return Task(
    init=init,
    loss=lambda params, rows: tower_loss(model, params, rows),
    data_size=size,
    batches=batches,
    model=cfg.to_dict(),
    start=lambda shapes: starting_params(config, shapes),
    fields=("crowds", "crowd_seed"),
  )
