"""Rows of the decoder's pre-training: the dialogue as with a video, states in place of pixels."""

import numpy as np
import pytest

from data_pipes.embedded.scenes import make_scene
from data_pipes.embedded.states import STATE, thing_states
from data_pipes.prompts import IGNORE, MEDIA_IDS
from data_pipes.tokenizer import Tokenizer
from vr_jax.assets import VR_MINI
from vr_jax.mini.pretrain_decoder import (
  SEEN,
  SIDE,
  TIMES,
  dialogue_rows,
  lay_out,
  scene_states,
)
from vr_jax.models.connector import scene_token_count
from vr_jax.models.variants import get_variant

LENGTH = 240


@pytest.fixture(scope="module")
def rows():
  return dialogue_rows(2_000_000, str(VR_MINI), LENGTH)


def test_positions_are_those_behind_all_scene_tokens(rows):
  cfg = get_variant("vr-mini")
  scene = scene_token_count(cfg.connector, cfg.num_frames, cfg.img.grid)
  assert scene == TIMES * SIDE * SIDE
  region_id = Tokenizer.from_folder(VR_MINI).region_id
  for row in rows[:8]:
    out = lay_out(row, LENGTH, region_id, np.random.default_rng(0))
    filled = out["positions"] >= 0
    assert filled[: filled.sum()].all()
    assert (np.diff(out["positions"][filled]) > 0).all()
    text = filled & (out["visual"] < 0)
    words = [k for k in row["ids"] if k not in (MEDIA_IDS["<video>"], region_id)]
    assert out["tokens"][text].tolist() == words
    assert out["supervised"].sum() == (row["labels"] != IGNORE).sum()
    before = row["ids"].tolist().index(MEDIA_IDS["<video>"])
    behind = out["positions"][before + TIMES * SEEN]  # the first text token after the video
    assert behind == before + scene
    objects = (out["visual"] >= TIMES * SEEN).sum()
    assert len(row["things"]) <= objects <= 4 * len(row["things"])


def test_scene_tokens_are_the_things_and_backdrop():
  scene = make_scene(3)
  states = thing_states(scene)
  found, places = scene_states(states, np.random.default_rng(0))
  assert found.shape == (TIMES * SEEN, STATE)
  assert (np.diff(places) > 0).all()
  assert places.max() < TIMES * SIDE * SIDE
  things = [s for s in found if s.any()]
  known = states.reshape(-1, STATE)
  assert all((s == known).all(-1).any() for s in things)
  assert TIMES <= len(things) <= TIMES * len(scene.things)
