"""A region encoder that the product does not know: a class, and its name under KINDS."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_model

from data_pipes.errors import InputError
from vr_jax.models.region import KINDS, RegionConfig, RegionEncoder
from vr_jax.models.videorefer import VideoRefer, VideoReferConfig, init_params


class HighestUnderTheMask(RegionEncoder):
  """Pools to the highest feature under a mask, where the published encoder takes the mean."""

  def pool(self, features, masks):
    x = features.astype(jnp.float32)[:, None]
    seen = masks[..., None] > 0
    return jnp.where(seen, x, -jnp.inf).max(-2, where=seen, initial=-1e9)


@pytest.fixture
def cfg(monkeypatch):
  monkeypatch.setitem(KINDS, "highest", HighestUnderTheMask)
  region = dataclasses.replace(small_model.CONFIG.region, kind="highest")
  return dataclasses.replace(small_model.CONFIG, region=region)


def test_the_model_uses_it_everywhere(cfg):
  rows, params = small_model.rows(2), small_model.params()

  @jax.jit
  def run(params, rows):
    model = VideoRefer(cfg).bind({"params": params})
    features = model.encode_frames(rows["frames"])
    return model(rows)[0], model.region_tokens(rows), features

  hidden, (merged, kept), features = run(params, rows)
  published = jax.jit(lambda p, r: VideoRefer(small_model.CONFIG).apply({"params": p}, r)[0])
  assert np.isfinite(hidden).all()
  assert np.abs(hidden - published(params, rows)).max() > 1e-4
  # An object with a single frame keeps what its mask covers, pooled by the toy's rule.
  single = np.argwhere((rows["region_frames"] >= 0).sum(-1) == 1)
  assert len(single)
  for b, r in single:
    frame = rows["region_frames"][b, r, 0]
    mask = rows["region_masks"][b, r, frame] > 0
    expected = np.asarray(features)[b, frame][mask].max(0)
    np.testing.assert_allclose(merged[b, r, 0], expected, rtol=1e-6)
    assert kept[b, r].tolist() == [True] + [False] * (kept.shape[-1] - 1)


def test_checkpoints_name_it(cfg):
  stored = json.loads(json.dumps(cfg.to_dict()))
  assert VideoReferConfig.from_dict(stored) == cfg
  shapes = jax.eval_shape(lambda key: init_params(cfg, key), jax.random.key(0))
  assert set(shapes["region"]) == {"fc1", "fc2"}


def test_older_configs_have_the_published_one_and_others_are_refused():
  fields = small_model.CONFIG.to_dict()
  del fields["region"]["kind"]
  assert VideoReferConfig.from_dict(fields) == small_model.CONFIG
  with pytest.raises(InputError, match="region kind 'lowest' is not one of token_merge"):
    RegionConfig(kind="lowest")
