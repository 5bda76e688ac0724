"""Weights that the code wrote before the house was rebuilt (commit 06b30db) are read as they were.

`old/weights` holds three folders of one small model, packed, and what the code that wrote them read
back and answered: `checkpoint` (written by `export`), `converted` (`vr convert --to vr` of a
published folder, so it has `kept` tensors) and `published` (`--to videorefer` of `converted`).
"""

import hashlib
import json
import tarfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vr_jax
from vr_jax.interop.convert import convert
from vr_jax.interop.proof import fixed_row
from vr_jax.interop.sources import open_source
from vr_jax.interop.table import arrays, nested
from vr_jax.models.videorefer import VideoRefer

OLD = Path(__file__).parent / "old/weights"
RECORDED = json.loads((OLD / "recorded.json").read_text())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """Name -> unpacked folder."""
  root = tmp_path_factory.mktemp("old")
  for name in RECORDED:
    with tarfile.open(OLD / f"{name}.tar.xz") as archive:
      archive.extractall(root, filter="data")
  return {name: root / name for name in RECORDED}


@pytest.mark.parametrize("name", RECORDED)
def test_parameters_and_all_beside_them_are_read_as_before(folders, name):
  recorded, source = RECORDED[name], open_source(folders[name])
  assert source.kind == recorded["kind"]
  assert dict(source.settings) == recorded["settings"]
  assert json.loads(json.dumps(source.generation)) == recorded["generation"]
  assert sorted(source.tokenizer_files) == recorded["tokenizer_files"]
  assert sorted(source.kept.names if source.kept else ()) == recorded["kept"]
  params = {
    path: f"{array.dtype} {list(array.shape)} {hashlib.sha256(array.view(np.uint8)).hexdigest()}"
    for path, array in arrays(source.params).items()
  }
  assert params == recorded["params"]


@pytest.mark.parametrize("name", ["converted", "published"])
def test_logits_are_those_of_before(folders, name):
  source, recorded = open_source(folders[name]), RECORDED[name]
  cfg = source.model_config()
  params, model = nested(arrays(source.params, "float32")), VideoRefer(cfg)

  @jax.jit
  def forward(params, rows):
    hidden, spliced = model.apply({"params": params}, rows)
    return model.apply({"params": params}, hidden, method="logits"), spliced.valid.sum(1)

  with jax.default_matmul_precision("highest"):
    logits, lengths = jax.device_get(forward(params, jax.tree.map(jnp.asarray, fixed_row(cfg))))
  for row, length, last, best in zip(
    logits, lengths, recorded["logits"], recorded["argmax"], strict=True
  ):
    # Logits are up to 0.55; float32 sums in another order differ by some 1e-7.
    np.testing.assert_allclose(row[length - 1, : len(last)], last, atol=2e-6)
    assert row[:length].argmax(-1).tolist() == best


def test_a_question_is_answered_as_before(folders):
  picture = np.random.default_rng(3).integers(0, 256, (40, 48, 3)).astype(np.uint8)
  answer = vr_jax.load(folders["checkpoint"]).ask([picture], "What is this?", max_new_tokens=12)
  assert list(answer.token_ids) == RECORDED["checkpoint"]["token_ids"]


def test_an_old_converted_checkpoint_goes_back_to_its_published_folder(folders, tmp_path):
  options = {"logits": "never", "report": lambda line: None}
  parity = convert(folders["converted"], tmp_path / "out", "videorefer", **options)
  assert parity["bit_identical"]
  before = sorted(p.relative_to(folders["published"]) for p in folders["published"].rglob("*.*"))
  for name in before:
    if name.name != "parity.json":
      old, new = folders["published"] / name, tmp_path / "out" / name
      assert old.read_bytes() == new.read_bytes(), name
