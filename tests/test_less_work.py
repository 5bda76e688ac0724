"""Work left out of a training step: the results stay, the FLOPs go."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_model
from rounding import (
  assert_same_up_to_rounding,
  connector_roundings,
  gradient_roundings,
  loss_roundings,
)

from vr_jax.configs import base_config
from vr_jax.flops import count_flops
from vr_jax.models.connector import Connector, ConnectorConfig, scene_token_count
from vr_jax.models.costs import connector_flops, decoder_flops, tower_flops
from vr_jax.models.decoder import DecoderConfig
from vr_jax.models.region import RegionConfig
from vr_jax.models.siglip import SiglipConfig
from vr_jax.models.videorefer import PARTS, VideoRefer, VideoReferConfig, init_params
from vr_jax.params import merge
from vr_jax.training.loss import model_loss
from vr_jax.training.schedule import make_optimizer, split_by_table
from vr_jax.training.step import TrainState, make_step, micro_batches
from vr_jax.training.videorefer_task import FRAME_CUTS, in_order_of_frames, trained_parts

T, P, R, L = 4, 8, 2, 60  # scene frames, frames, objects, slots of a row
CFG = VideoReferConfig(
  name="small",
  img=SiglipConfig(image_size=32, patch_size=4, width=48, depth=3, heads=4, mlp_dim=96),
  connector=ConnectorConfig(width=64),
  region=RegionConfig(width=64),
  llm=DecoderConfig(
    width=64, depth=3, heads=4, kv_heads=2, head_dim=16, mlp_dim=192, vocab_size=97, tied_head=False
  ),
  num_frames=T,
)
N = CFG.img.grid**2
V = scene_token_count(CFG.connector, T, CFG.img.grid)


def row(rng, frames, objects=R, media=True):
  """A row with `frames` frames: of an image (1), or T scene frames and the rest with masks."""
  image = frames == 1
  out = {
    "frames": np.zeros((P, 32, 32, 3), np.uint8),
    "scene": np.zeros(T, np.int32) if image else np.arange(T, dtype=np.int32),
    "region_masks": np.zeros((R, P, N), np.uint8),
    "region_frames": np.full((R, P), -1, np.int32),
    "tokens": rng.integers(1, 97, L).astype(np.int32),
    "visual": np.full(L, -1, np.int32),
    "valid": np.arange(L) < L - rng.integers(1, 6),
    "supervised": np.zeros(L, bool),
  }
  out["supervised"][rng.integers(L - 16, L - 12) : L - 7] = True
  if not media:
    out["supervised"][5:9] = True  # targets where rows with media hold scene tokens
    return out
  out["frames"][:frames] = rng.integers(0, 256, (frames, 32, 32, 3))
  out["visual"][3 : 3 + V] = np.arange(V)  # three text tokens stand before the media
  for r in range(objects):
    numbers = [0] if image else [r, *range(T, frames)]
    out["region_frames"][r, : len(numbers)] = numbers
    for p in numbers:
      out["region_masks"][r, p] = rng.random(N) < 0.3
    first = V + 5 + 6 * r
    out["visual"][first : first + 4] = V + 4 * r + np.arange(4)
  return out


def batch(*frames, seed=0):
  rng = np.random.default_rng(seed)
  rows = [row(rng, n or 1, media=n > 0) for n in frames]
  return {k: np.stack([r[k] for r in rows]) for k in rows[0]}


@pytest.fixture(scope="module")
def params():
  return small_model.params(CFG)


def schedule(*trained):
  return (*((f"{part}/.*", {"decay": "constant"}) for part in trained), (".*", None))


def gradient(params, rows, trained, model):
  train, frozen = split_by_table(params, schedule(*trained))
  loss = model_loss(model)
  return jax.jit(jax.value_and_grad(lambda p: loss(merge(p, frozen), rows).sum))(train)


def gradient_flops(trained, rows, cfg=CFG, **loss):
  shapes = jax.eval_shape(functools.partial(init_params, cfg), jax.random.key(0))
  train, frozen = split_by_table(shapes, schedule(*trained))
  total = model_loss(VideoRefer(cfg, trained=trained), **loss)

  def run(train, frozen, rows):
    return jax.value_and_grad(lambda p: total(merge(p, frozen), rows).sum)(train)

  return count_flops(run, train, frozen, rows)


# --- Stage 2: the prefix before the first object runs once, without a backward pass ------------


def test_the_prefix_split_gives_the_same_loss_and_gradients(params):
  # An image, a video, text alone (with targets inside the prefix), one mask frame.
  rows = batch(1, P, 0, T + 1)
  whole_loss, whole = gradient(params, rows, ("region",), VideoRefer(CFG))
  loss, split = gradient(params, rows, ("region",), VideoRefer(CFG, trained=("region",)))
  assert_same_up_to_rounding(loss, whole_loss, loss_roundings(CFG, L))
  assert_same_up_to_rounding(split, whole, gradient_roundings(CFG, L))
  assert float(jnp.abs(split["region"]["fc1"]["kernel"]).max()) > 0


@pytest.mark.slow
def test_the_prefix_split_with_windows_and_remat(params):
  llm = dataclasses.replace(CFG.llm, pattern=("local", "global"), window=9, remat="dots")
  cfg = dataclasses.replace(CFG, llm=llm)
  rows = batch(P, 1)
  whole_loss, whole = gradient(params, rows, ("region",), VideoRefer(cfg))
  loss, split = gradient(params, rows, ("region",), VideoRefer(cfg, trained=("region",)))
  assert_same_up_to_rounding(loss, whole_loss, loss_roundings(CFG, L))
  assert_same_up_to_rounding(split, whole, gradient_roundings(CFG, L))


def test_stage_2_costs_a_forward_pass_and_the_suffix_twice():
  rows = batch(P)
  flops = gradient_flops(("region",), rows, budget=16, chunk=16)
  forward = P * tower_flops(CFG.img) + connector_flops(CFG.connector, 48, T, CFG.img.grid)
  head = 2 * 64 * 97 * 16
  suffix = decoder_flops(CFG.llm, L, 0) - decoder_flops(CFG.llm, V, 0)
  needed = forward + decoder_flops(CFG.llm, L, 0) + suffix + 2 * head
  # Above it: the other half of the attention scores, the logits made again, the region encoder.
  assert needed < flops < 1.1 * needed


def test_what_trains_follows_from_the_schedule():
  config = base_config()
  config.schedule = schedule("region")
  assert trained_parts(config, CFG) == ("region",)
  config.schedule = (("img/.*", None), (".*", {}))
  assert trained_parts(config, CFG) == ("connector", "region", "llm")


@pytest.mark.parametrize("trained", [("connector",), ("region", "llm"), tuple(PARTS)])
def test_no_slot_is_constant_where_anything_before_the_objects_trains(trained):
  rows = batch(P)
  assert VideoRefer(CFG, trained=("region",)).constant_slots(rows) == V
  assert VideoRefer(CFG, trained=trained).constant_slots(rows) == 0
  short = {**rows, "tokens": rows["tokens"][:, :V]}
  assert VideoRefer(CFG, trained=("region",)).constant_slots(short) == 0


# --- Frozen parts: no backward pass, no weight gradients ---------------------------------------


def test_frozen_parts_cost_no_backward_pass():
  rows = batch(P)
  sizes = {"budget": 16, "chunk": 16}
  tower = P * tower_flops(CFG.img)
  connector = connector_flops(CFG.connector, 48, T, CFG.img.grid)
  decoder, head = decoder_flops(CFG.llm, L, 0), 2 * 64 * 97 * 16
  # Stage 1: decoder weights get no gradient, so that its backward pass costs one forward pass.
  flops = gradient_flops(("connector",), rows, **sizes)
  needed = tower + 3 * connector + 2 * decoder + 2 * head
  assert 0.95 * needed < flops < 1.1 * needed  # below: the features need no gradient
  # Stage 3: the tower is frozen.
  flops = gradient_flops(("connector", "region", "llm"), rows, **sizes)
  needed = tower + 3 * connector + 3 * decoder + 3 * head
  assert 0.95 * needed < flops < 1.1 * needed


def test_saved_dots_are_not_computed_again():
  rows = batch(P)
  decoder = decoder_flops(CFG.llm, L, 0)

  def flops(remat):
    llm = dataclasses.replace(CFG.llm, remat=remat)
    return gradient_flops(("connector", "region", "llm"), rows, dataclasses.replace(CFG, llm=llm))

  none, dots, full = (flops(remat) for remat in ("none", "dots", "full"))
  assert full - none > 0.8 * decoder  # one more forward pass
  scores = 4 * L * L * CFG.llm.heads * CFG.llm.head_dim * CFG.llm.depth
  assert dots - none <= scores  # attention alone: its products belong to no weight


# --- Images: encoded once, one slot of the connector -------------------------------------------


@pytest.mark.parametrize(
  "kind",
  [
    pytest.param("stc_connector_v35", marks=pytest.mark.slow),
    "stc_connector",
    "stp_connector",
    "linear",
  ],
)
def test_a_frame_that_stands_for_many_gives_the_tokens_of_equal_frames(kind):
  connector = Connector(ConnectorConfig(kind=kind, width=24))
  x = jax.random.normal(jax.random.key(0), (2, 1, 25, 16))
  equal = jnp.repeat(x, 5, axis=1)
  params = connector.init(jax.random.key(1), equal)
  once = connector.apply(params, x, stands_for=5)
  roundings = connector_roundings(connector.cfg, 16, 25)
  assert_same_up_to_rounding(once, connector.apply(params, equal), roundings)


def test_an_image_costs_one_frame():
  rows = FRAME_CUTS.cut(batch(1), 1)
  forward = count_flops(
    functools.partial(VideoRefer(CFG).apply, method="visual_table"),
    {"params": jax.eval_shape(functools.partial(init_params, CFG), jax.random.key(0))},
    jax.ShapeDtypeStruct((1, 1, N, 48), jnp.float32),
    rows,
  )
  needed = connector_flops(CFG.connector, 48, 1, CFG.img.grid)
  assert needed < forward < 1.1 * needed


@pytest.mark.slow
def test_micro_batches_are_cut_to_the_frames_they_hold(params):
  """Loss and updated parameters are those of the whole rows."""
  rows = in_order_of_frames(batch(P, 1, T + 1, 0, 1, P, T + 1, 1))
  assert [int(f.any((1, 2, 3)).sum()) for f in rows["frames"]] == [1, 0, 1, 1, T + 1, T + 1, P, P]
  config = base_config()
  config.schedule = schedule("connector", "region")
  optimizer = make_optimizer(config, params, total_steps=10)
  results = []
  for cuts in (None, FRAME_CUTS):
    step = make_step(model_loss(VideoRefer(CFG)), optimizer, cuts=cuts)
    state = TrainState.create(jax.tree.map(jnp.array, params), config.schedule, optimizer)
    state, metrics = step(state, micro_batches(rows, 4))
    results.append((metrics["micro_loss"], metrics["grad_norm"], state.opt_state["mu"]))
  (loss, norm, mu), (cut_loss, cut_norm, cut_mu) = results
  assert_same_up_to_rounding(cut_loss, loss, loss_roundings(CFG, L))
  assert_same_up_to_rounding((cut_norm, cut_mu), (norm, mu), gradient_roundings(CFG, L))


def test_cuts_hold_what_they_are_chosen_for():
  cuts = FRAME_CUTS
  assert cuts.sizes(batch(P)) == (1, T + 1, P)
  for frames, needed in ((1, 1), (T + 1, T + 1), (P, P), (0, 1)):
    rows = batch(frames)
    assert int(cuts.needed(rows)) == needed
    assert not rows["frames"][:, needed:].any()
    assert cuts.cut(rows, needed)["region_masks"].sum() == rows["region_masks"].sum()
  assert cuts.sizes(cuts.cut(batch(P), T + 1)) == (1, T + 1)
  assert cuts.sizes(cuts.cut(batch(P), 1)) == (1,)
  packed = {**batch(P), "scene": np.zeros((1, 2, T), np.int32)}
  assert cuts.sizes(packed) == (P,)
