"""vr-mini-navit: its data, its tower's pre-training, and runs that are killed and started again."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from data_pipes.embedded.make_set import make_set
from data_pipes.embedded.scenes import FRAMES
from data_pipes.embedded.states import SLICES
from data_pipes.embedded.zooms import CROPS, zooms
from data_pipes.navit_rows import Shape
from data_pipes.records import RecordFile
from data_pipes.tokenizer import Tokenizer
from vr_jax.assets import MINI_PARTS, VR_MINI_NAVIT
from vr_jax.checkpoint import load_params
from vr_jax.configs import load_config
from vr_jax.mini.pretrain_navit import LOOKS, ZoomTower, tower_from_squares, zoom_loss, zoom_row
from vr_jax.models.navit import NavitConfig
from vr_jax.models.variants import get_variant
from vr_jax.training import loop
from vr_jax.training.loop import train
from vr_jax.training.task import make_task

SHAPE = Shape(
  tower_rows=4, patches=256, scene=128, objects=16, cells=64, context=0, length=160, merge=2,
  tokens_per_object=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def small_set(tmp_path_factory):
  return make_set(tmp_path_factory.mktemp("set"), 3, 0, 0, dialogues=1)


@pytest.fixture(scope="module")
def seen():
  return zooms(30_000_002, 4, 2, 256)


def test_the_sft_files_hold_the_same_dialogues_with_one_mask_a_mention(small_set):
  for name, parts in (
    ("pixelrefer_stage1", ("scene_captions", "short_captions", "detailed_captions")),
    ("pixelrefer_stage2", ("qa",)),
  ):
    records = RecordFile(small_set / f"{name}.json")
    items = json.loads((small_set / f"{name}.json").read_text())
    assert len(records) == 3 * len(parts)
    assert all(isinstance(item["video"], list) and "annotation" not in item for item in items)
    for i in range(len(records)):  # parsing is strict
      objects = records[i].objects
      assert all(len(frames) == 1 and 0 <= min(frames) < FRAMES for frames in objects)
      assert all(s["counts"] for frames in objects for s in frames.values())
    answers = {t["value"] for item in items for t in item["conversations"] if t["from"] == "gpt"}
    for part in parts:
      before = json.loads((small_set / f"{part}.json").read_text())
      assert {
        t["value"] for x in before for t in x["conversations"] if t["from"] == "gpt"
      } <= answers
    assert not re.search(r"\[<region>", (small_set / f"{name}.json").read_text())


def test_the_tokenizer_has_the_tokens_in_the_published_order():
  tokenizer = Tokenizer.from_folder(VR_MINI_NAVIT)
  tokens = ("<image>", "<|stream_start|>", "<|stream_end|>", "<REGION>")
  first = tokenizer.id_of("<image>")
  assert [tokenizer.id_of(t) for t in tokens] == list(range(first, first + 4))
  assert first + 4 == len(tokenizer) <= get_variant("vr-mini-navit").llm.vocab_size


def test_a_zoom_tells_what_each_patch_and_crop_shows(seen):
  colours = SLICES["colour"]
  for zoom in seen:
    assert len(zoom.states) == len(zoom.owners) == len(zoom.picture.patches)
    assert not zoom.states[zoom.owners == 0].any()
    one = zoom.states[zoom.owners == 1]
    np.testing.assert_array_equal(one[:, colours].sum(-1), 1)
    assert 0 < len(zoom.crops) == len(zoom.crop_states) <= CROPS
    assert all(crop.cells > 0 and len(crop.picture.patches) <= 256 for crop in zoom.crops)
    np.testing.assert_array_equal(zoom.crop_states[:, colours].sum(-1), 1)


def test_rows_are_filled_and_targets_lie_with_their_patches(seen):
  row = zoom_row(seen, SHAPE)
  assert (row["patch_segments"] >= 0).mean() > 0.5
  count = int((row["scene_frame"] >= 0).sum())
  pictures = row["scene_frame"].max() + 1
  assert count == sum(z.picture.tokens for z in seen[:pictures])
  assert not row["owners"][count:].any()
  patches = row["patches"].reshape(-1, 588)
  first = seen[0].picture
  np.testing.assert_array_equal(patches[row["scene"][: first.tokens].ravel()], first.patches)
  np.testing.assert_array_equal(row["owners"][: first.tokens].ravel(), seen[0].owners)
  crops = int((row["cell_counts"] > 0).sum())
  assert crops > 1
  assert row["looks"][:crops].any(-1).all()
  assert not row["looks"][crops:].any()


def test_the_loss_sees_looks_alone_where_a_crop_cannot_tell_the_place(seen):
  model = ZoomTower(NavitConfig(width=8, depth=1, heads=1, mlp_dim=8))
  rows = {name: array[None] for name, array in zoom_row(seen, SHAPE).items()}
  shapes = jax.eval_shape(model.init, jax.random.key(0), rows)["params"]
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda s: rng.normal(0, 0.3, s.shape).astype(np.float32), shapes)
  loss = jax.jit(lambda params, rows: zoom_loss(model, params, rows).sum)
  before = float(loss(params, rows))
  assert np.isfinite(before)
  for name, same in (("column", True), ("colour", False)):
    other = rows["looks"].copy()
    other[..., SLICES[name]] = np.roll(other[..., SLICES[name]], 1, -1)
    assert (float(loss(params, rows | {"looks": other})) == before) == same
  assert "column" not in LOOKS


def test_a_tower_of_squares_sees_the_same_in_larger_patches():
  params = load_params(MINI_PARTS)["img"]
  made = tower_from_squares(params, 14)["embedding"]
  patch = np.random.default_rng(0).normal(size=(8, 8, 3)).astype(np.float32)
  larger = np.asarray(jax.image.resize(patch, (14, 14, 3), "linear"))
  old = np.einsum("pqc,pqcd->d", patch, np.asarray(params["embedding"]["kernel"], np.float32))
  np.testing.assert_allclose(np.einsum("pqc,pqcd->d", larger, made["kernel"]), old, atol=2e-4)


TINY = (
  *(("img.depth", 1), ("img.heads", 2), ("img.width", 16), ("img.mlp_dim", 16)),
  *(("connector.width", 16), ("region.width", 16), ("llm.width", 16), ("llm.depth", 1)),
  *(("llm.heads", 2), ("llm.kv_heads", 1), ("llm.head_dim", 8), ("llm.mlp_dim", 16)),
)


def tiny(small_set, steps):
  config = load_config(f"mini_navit:stage=2,data={small_set},steps={steps},batch=8").unlock()
  config.model, config.model_init, config.ckpt_steps = TINY, (), 2
  return config.lock()


def test_a_run_that_goes_on_draws_the_batches_it_would_have_drawn(small_set):
  task = make_task(tiny(small_set, 4))
  straight, later = list(task.batches(0, 4)), list(task.batches(2, 4))
  assert len(straight) == 4
  jax.tree.map(np.testing.assert_array_equal, straight[2:], later)
  assert (straight[0]["tokens"] != straight[1]["tokens"]).any()


class Killed(BaseException):
  """Ends a run as a kill does: nothing is saved on the way out."""


@pytest.mark.slow
def test_a_killed_and_resumed_run_ends_with_the_same_bits(small_set, tmp_path, monkeypatch):
  config = tiny(small_set, 4)
  assert train(config, tmp_path / "straight").finished

  make = loop.make_task

  def killed_task(config):
    task = make(config)

    def batches(position, total):
      for at, batch in enumerate(task.batches(position, total), position):
        if at == 3:
          raise Killed
        yield batch

    return dataclasses.replace(task, batches=batches)

  monkeypatch.setattr(loop, "make_task", killed_task)
  with pytest.raises(Killed):
    train(config, tmp_path / "run")
  assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["2"]
  monkeypatch.setattr(loop, "make_task", make)
  assert train(config, tmp_path / "run").finished
  straight, resumed = (load_params(tmp_path / name) for name in ("straight", "run"))
  jax.tree.map(np.testing.assert_array_equal, straight, resumed)
