"""`vr convert`: round trips to the bit, resumption, proof, and everything a user may get wrong."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_interop_videorefer import model, random_params, write

from data_pipes.errors import InputError
from vr_jax import cli
from vr_jax.interop.convert import convert
from vr_jax.interop.sources import open_source
from vr_jax.interop.table import arrays
from vr_jax.training.checkpoint import load_for_inference, load_params

QUIET = {"report": lambda line: None}


def weights(folder):
  """Every tensor of a folder's safetensors files, by file-independent name."""
  files = sorted(folder.glob("*.safetensors"))
  return {name: array for file in files for name, array in load_file(file).items()}


def assert_same_tensors(a, b):
  assert a.keys() == b.keys()
  for name in a:
    assert a[name].dtype == b[name].dtype, name
    assert a[name].tobytes() == b[name].tobytes(), name


@pytest.fixture(scope="module")
def ours(golden, tmp_path_factory):
  """The golden folder as a checkpoint of ours."""
  dst = tmp_path_factory.mktemp("ours") / "golden"
  parity = convert(golden / "tiny_videorefer_qwen2", dst, "vr", logits="never", **QUIET)
  assert parity["passed"]
  return dst


def test_the_golden_folder_goes_in_and_out_and_back_bit_identically(golden, ours, tmp_path):
  source = golden / "tiny_videorefer_qwen2"
  parity = convert(ours, tmp_path / "out", "videorefer", logits="never", **QUIET)
  assert parity["bit_identical"]
  assert parity["largest_difference"] == 0
  out = tmp_path / "out"
  assert_same_tensors(weights(source), weights(out))
  assert_same_tensors(
    weights(source / "siglip_vision_tower"), weights(out / "siglip_vision_tower")
  )
  for file in sorted(source.rglob("*.json")):
    name = file.relative_to(source)
    assert json.loads(file.read_text()) == json.loads((out / name).read_text()), name
  assert (out / "merges.txt").read_bytes() == (source / "merges.txt").read_bytes()
  convert(out, tmp_path / "again", "vr", logits="never", **QUIET)
  a, b = load_params(ours), load_params(tmp_path / "again")
  jax.tree.map(np.testing.assert_array_equal, a, b)
  assert {str(x.dtype) for x in jax.tree.leaves(a)} == {"bfloat16"}


def test_a_converted_checkpoint_is_one_like_any_other(golden, ours):
  read = load_for_inference(ours)
  assert read.generation == {"eos_ids": [1002, 1000], "pad_id": 1000, "repetition_penalty": 1.05}
  assert "tokenizer.json" in read.tokenizer_files
  source = open_source(golden / "tiny_videorefer_qwen2")
  assert read.model["llm"]["vocab_size"] == source.parts["llm"].vocab_size == 1004


def test_parity_json_names_every_tensor(ours):
  parity = json.loads((ours / "parity.json").read_text())
  by_name = {tensor["name"]: tensor for tensor in parity["tensors"]}
  entry = by_name["llm/layers/attn/q_einsum/w[1]"]
  assert entry["shape"] == [4, 128, 32]
  assert (entry["dtype"], entry["from_dtype"], entry["largest_difference"]) == ("BF16", "BF16", 0)
  assert len(entry["sha256"]) == 64
  assert parity["parameters"] == len(open_source(ours).params.shapes)
  assert parity["differences"] == {}
