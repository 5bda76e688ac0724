"""`vr convert`: round trips to the bit, resumption, proof, and everything a user may get wrong."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_interop_videorefer import model, random_params, write

from data_pipes.errors import InputError
from vr_jax import cli
from vr_jax.checkpoint import export, load_for_inference, load_params, make_meta
from vr_jax.interop import convert as conversion
from vr_jax.interop.convert import convert, summary
from vr_jax.interop.sources import open_source
from vr_jax.models.variants import DECODERS
from vr_jax.parity.golden import PASS, run_parity

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
  assert_same_tensors(weights(source / "siglip_vision_tower"), weights(out / "siglip_vision_tower"))
  for file in sorted(source.rglob("*.json")):
    name = file.relative_to(source)
    assert json.loads(file.read_text()) == json.loads((out / name).read_text()), name
  assert (out / "merges.txt").read_bytes() == (source / "merges.txt").read_bytes()
  convert(out, tmp_path / "again", "vr", logits="never", **QUIET)
  a, b = load_params(ours), load_params(tmp_path / "again")
  jax.tree.map(np.testing.assert_array_equal, a, b)
  assert {str(x.dtype) for x in jax.tree.leaves(a)} == {"bfloat16"}


@pytest.mark.parametrize(
  "ids",
  [
    ["i_two_regions", "multi_object"],
    pytest.param(["i_multi_frame", "multi_frame", "image_region", "long"], marks=pytest.mark.slow),
  ],
)
def test_the_written_folder_gives_the_recorded_logits_and_tokens(golden, ours, tmp_path, ids):
  """`vr parity` of the published code's outputs on what `--to videorefer` wrote."""
  convert(ours, tmp_path / "tiny_videorefer_qwen2", "videorefer", logits="never", **QUIET)
  (tmp_path / "arrays").symlink_to(golden / "arrays")
  index = json.loads((golden / "cases.json").read_text())
  stages = [stage for stage in index["stages"] if stage["stage"] in ("05_forward", "07_generate")]
  for stage in stages:
    stage["npz"] = f"arrays/{stage['stage']}_complete.npz"
    held = {key.split("/")[0] for key in np.load(golden / stage["npz"])}
    stage["cases"] = [case for case in stage["cases"] if case["id"] in held and case["id"] in ids]
  (tmp_path / "cases.json").write_text(json.dumps(index | {"stages": stages}))
  results = run_parity(tmp_path, ["05_forward", "07_generate"])
  assert [result for result in results if result.status != PASS] == []
  assert [result.case for result in results] == ids


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


# --- Other dtypes, other models ----------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
  """A small published model and random float32 parameters for it."""
  cfg = model("mlp2x_gelu")
  rng = np.random.default_rng(3)
  shapes = random_params(cfg)
  return cfg, jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)


def test_float32_round_trip_in_shards(small, tmp_path):
  cfg, params = small
  source = write(tmp_path / "source", cfg, params, beside=True)
  convert(source, tmp_path / "vr", "vr", logits="never", **QUIET)
  parity = convert(
    tmp_path / "vr", tmp_path / "out", "videorefer", shard_gb=4e-5, logits="never", **QUIET
  )
  assert parity["bit_identical"]
  index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
  shards = set(index["weight_map"].values())
  assert len(shards) > 2
  assert {f.name for f in (tmp_path / "out").glob("*.safetensors")} == shards
  back = weights(tmp_path / "out")
  assert_same_tensors({k: v for k, v in weights(source).items() if k in back}, back)


def test_a_model_without_its_last_tower_layer_is_written_one_layer_shorter(small, tmp_path):
  """A model trained here has only the layers that run; the published code then takes the last."""
  cfg, params = small
  write(tmp_path / "source", cfg, params)
  convert(tmp_path / "source", tmp_path / "vr", "vr", logits="never", **QUIET)
  shutil.rmtree(tmp_path / "vr/kept")
  parity = convert(tmp_path / "vr", tmp_path / "out", "videorefer", logits="never", **QUIET)
  assert parity["bit_identical"]
  fields = json.loads((tmp_path / "out/config.json").read_text())
  tower = json.loads((tmp_path / "out" / fields["mm_vision_tower"] / "config.json").read_text())
  assert (fields["mm_vision_select_layer"], tower["num_hidden_layers"]) == (-1, cfg.img.layers)
  assert open_source(tmp_path / "out").parts["img"].layers == cfg.img.layers


def test_a_cast_says_how_much_it_changed(small, tmp_path):
  cfg, params = small
  source = write(tmp_path / "source", cfg, params)
  parity = convert(source, tmp_path / "vr", "vr", dtype="bfloat16", logits="never", **QUIET)
  assert parity["passed"]
  assert not parity["bit_identical"]
  assert 0 < parity["largest_difference"] < 0.02
  worst = max(tensor["largest_difference"] for tensor in parity["tensors"])
  assert worst == parity["largest_difference"]


def test_a_lossy_result_is_held_to_the_cast_of_each_tensor_to_the_bit(small, tmp_path, monkeypatch):
  """One tensor's rounding is no tolerance for another: zeros in the place of small weights fail."""
  cfg, params = small
  params = jax.tree.map(np.copy, params)
  params["region"]["fc1"]["bias"] *= 1e-4  # far below what rounding does to the others
  source = write(tmp_path / "source", cfg, params)
  real = conversion.reopen

  def spoilt(*args):
    result = real(*args)

    class Spoilt:
      shapes = result.shapes

      def dtype(self, path):
        return result.dtype(path)

      def read(self, path, index=()):
        return result.read(path, index) * (path != "region/fc1/bias")

    return Spoilt()

  options = {"dtype": "bfloat16", "logits": "never", **QUIET}
  assert convert(source, tmp_path / "good", "vr", **options)["passed"] == "not proven"
  monkeypatch.setattr(conversion, "reopen", spoilt)
  parity = convert(source, tmp_path / "bad", "vr", **options)
  assert (parity["passed"], parity["wrong"]) == (False, ["region/fc1/bias"])
  assert "NOT what was written: region/fc1/bias" in summary(parity, "bad")


def test_what_no_other_implementation_saw_is_not_proven(small, tmp_path, capsys):
  cfg, params = small
  source = write(tmp_path / "source", cfg, params)
  command = ["convert", str(source), str(tmp_path / "out"), "--to", "vr", "--logits", "never"]
  assert cli.main(command) == 0
  printed = capsys.readouterr().out
  assert "not proven by another implementation: not asked for" in printed
  assert "passed" not in printed
  assert json.loads((tmp_path / "out/parity.json").read_text())["passed"] == "not proven"


# --- Kills ---------------------------------------------------------------------------------------

KILLED = """
import sys
from vr_jax.interop import targets
from vr_jax.interop.convert import convert, summary
real, written = targets.ShardWriter.write, 0
def write(self, name, array):
  global written
  real(self, name, array)
  written += 1
  if written == 20:
    print("here", flush=True)
    import time; time.sleep(60)
targets.ShardWriter.write = write
convert(sys.argv[1], sys.argv[2], "videorefer", logits="never", report=lambda line: None)
"""


def test_a_killed_conversion_goes_on_and_never_looks_complete(golden, ours, tmp_path):
  dst = tmp_path / "out"
  process = subprocess.Popen(
    [sys.executable, "-c", KILLED, str(ours), str(dst)],
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )
  assert process.stdout.readline() == b"here\n"
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert not dst.exists()
  with pytest.raises(InputError, match="accepted: a checkpoint of vr_jax, a published"):
    open_source(tmp_path / "out.partial")
  lines = []
  parity = convert(ours, dst, "videorefer", logits="never", report=lines.append)
  assert any(line.startswith("going on after 19 tensors") for line in lines)
  assert parity["bit_identical"]
  assert_same_tensors(weights(golden / "tiny_videorefer_qwen2"), weights(dst))
  assert not (tmp_path / "out.partial").exists()


def test_a_source_that_changed_is_converted_from_the_start(small, tmp_path, monkeypatch):
  cfg, params = small
  source = write(tmp_path / "source", cfg, params)
  monkeypatch.setattr(conversion, "_publish", lambda *args: time.sleep(0))
  convert(source, tmp_path / "out", "vr", logits="never", **QUIET)
  assert (tmp_path / "out.partial").is_dir()
  monkeypatch.undo()
  other = jax.tree.map(lambda x: x + 1, params)
  write(tmp_path / "source", cfg, other)
  convert(source, tmp_path / "out", "vr", logits="never", **QUIET)
  np.testing.assert_array_equal(
    load_params(tmp_path / "out")["region"]["fc1"]["bias"], other["region"]["fc1"]["bias"]
  )


def test_a_partial_folder_that_is_not_ours_is_left_alone(small, tmp_path):
  cfg, params = small
  source = write(tmp_path / "source", cfg, params)
  theirs = tmp_path / "out.partial"
  theirs.mkdir()
  (tmp_path / "elsewhere").mkdir()
  for name, content in (("thesis.txt", "all of it"), ("plan.json", '{"year": 1}')):
    (theirs / name).write_text(content)
    with pytest.raises(InputError, match=r"out\.partial: exists, and no conversion made it"):
      convert(source, tmp_path / "out", "vr", logits="never", **QUIET)
    assert (theirs / name).read_text() == content
  assert sorted(f.name for f in theirs.iterdir()) == ["plan.json", "thesis.txt"]
  shutil.rmtree(theirs)
  theirs.symlink_to(tmp_path / "elsewhere")
  with pytest.raises(InputError, match="no conversion made it"):
    convert(source, tmp_path / "out", "vr", logits="never", **QUIET)
  theirs.unlink()
  theirs.mkdir()  # empty: nobody's
  convert(source, tmp_path / "out", "vr", logits="never", **QUIET)
  assert not theirs.exists()


def test_two_conversions_to_one_place_leave_each_other_alone(small, tmp_path, monkeypatch):
  cfg, params = small
  source = write(tmp_path / "source", cfg, params)
  dst = tmp_path / "out"
  real = conversion._stream
  refused = []

  def meanwhile(*args):
    with pytest.raises(InputError) as error:
      convert(source, dst, "vr", logits="never", **QUIET)
    refused.append(str(error.value))
    return real(*args)

  monkeypatch.setattr(conversion, "_stream", meanwhile)
  parity = convert(source, dst, "vr", logits="never", **QUIET)
  assert parity["bit_identical"]
  assert len(refused) == 1
  assert "out.partial: " in refused[0]
  assert "is at work here" in refused[0]
  assert not (tmp_path / "out.partial").exists()
  assert open_source(dst).parts.keys() == {"img", "connector", "region", "llm"}


# --- What a user may get wrong --------------------------------------------------------------------


def change(folder, edit):
  """Rewrites the weights of a folder."""
  tensors = load_file(folder / "model.safetensors")
  edit(tensors)
  save_file(tensors, folder / "model.safetensors")


def poison(tensors):
  tensors["lm_head.weight"][3, 4] = np.nan
  tensors["model.norm.weight"][0] = np.inf


def enlarge(tensors):
  tensors["model.norm.weight"][0] = 1e6


def truncate(folder):
  file = folder / "model.safetensors"
  file.write_bytes(file.read_bytes()[:-100])


def unlink_shard(folder):
  index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def unknown(folder):
  fields = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps(fields | {"model_type": "llama"}))


def no_disk(folder, monkeypatch):
  usage = shutil._ntuple_diskusage(10, 10, 1000)
  monkeypatch.setattr(conversion.shutil, "disk_usage", lambda path: usage)


@pytest.mark.parametrize(
  ("spoil", "arguments", "says"),
  [
    (truncate, [], "model.safetensors: not a complete safetensors file"),
    (unlink_shard, [], "names shards that are not there: model-00001-of-00002.safetensors"),
    (lambda f: change(f, poison), [], "NaN or Inf in 2 tensors (llm/"),
    (lambda f: change(f, enlarge), ["--dtype", "float16"], "final_norm/scale (up to 1e+06)"),
    (unknown, [], "model_type='llama' is not one of videorefer_qwen2"),
    ("disk", [], "are needed and 0.0 GB free"),
    (shutil.rmtree, [], "no such file or folder; accepted: a checkpoint of vr_jax"),
    (lambda f: None, ["--dtype", "int8"], "--dtype 'int8': accepted: float32"),
    (lambda f: None, ["--to", "onnx"], "--to 'onnx': accepted: vr, videorefer"),
    (lambda f: None, ["--adapter", "nowhere"], "nowhere/adapter_config.json: no such file"),
    (lambda f: (f / "config.json").unlink(), [], "holds model.safetensors"),
  ],
)
def test_bad_input_is_one_line_exit_2_and_no_result(
  spoil, arguments, says, small, tmp_path, capsys, monkeypatch
):
  cfg, params = small
  params = jax.tree.map(np.copy, params)
  source = write(tmp_path / "source", cfg, params)
  if spoil == "disk":
    no_disk(source, monkeypatch)
  else:
    spoil(source)
  command = ["convert", str(source), str(tmp_path / "out"), "--to", "vr", "--logits", "never"]
  assert cli.main([*command, *arguments]) == 2
  error = capsys.readouterr().err.splitlines()[-1]
  assert error.startswith("vr convert: ")
  assert says in error
  assert not (tmp_path / "out").exists()
  assert not (tmp_path / "out.partial").exists()


def test_nonfinite_weights_pass_when_asked_to(small, tmp_path):
  cfg, params = small
  source = write(tmp_path / "source", cfg, params)
  change(source, poison)
  parity = convert(source, tmp_path / "out", "vr", allow_nonfinite=True, logits="never", **QUIET)
  assert parity["bit_identical"]
  assert np.isnan(load_params(tmp_path / "out")["llm"]["embedder"]["output_embedding"][3, 4])


def test_formats_that_cannot_say_a_model(small, golden, tmp_path):
  cfg, _ = small
  llm = dataclasses.replace(
    DECODERS["gemma-2b"],
    width=48,
    depth=1,
    heads=2,
    kv_heads=1,
    head_dim=8,
    mlp_dim=8,
    vocab_size=9,
  )
  gemma = dataclasses.replace(cfg, llm=llm)
  export(tmp_path / "gemma", random_params(gemma), make_meta(gemma.to_dict()))
  with pytest.raises(InputError, match="only Qwen2 decoders; --to torch takes this one"):
    convert(tmp_path / "gemma", tmp_path / "out", "videorefer", **QUIET)
  tower = golden / "tiny_videorefer_qwen2/siglip_vision_tower"
  with pytest.raises(InputError, match="holds img and no connector, region, llm: not a whole"):
    convert(tower, tmp_path / "out", "torch", **QUIET)
  assert not (tmp_path / "out").exists()
  odd = dataclasses.replace(gemma, llm=dataclasses.replace(llm, qkv_bias=True))
  export(tmp_path / "odd", random_params(odd), make_meta(odd.to_dict()))
  with pytest.raises(InputError, match="no model of transformers has qkv_bias=True"):
    convert(tmp_path / "odd", tmp_path / "out", "hf", **QUIET)


def test_nothing_is_written_over(small, tmp_path, capsys):
  cfg, params = small
  source = write(tmp_path / "source", cfg, params)
  (tmp_path / "out").mkdir()
  (tmp_path / "out/mine.txt").write_text("keep")
  assert cli.main(["convert", str(source), str(tmp_path / "out"), "--to", "vr"]) == 2
  assert "exists; nothing is written over" in capsys.readouterr().err
  assert (tmp_path / "out/mine.txt").read_text() == "keep"


def test_a_tensor_that_comes_back_wrong_is_exit_1(small, tmp_path, monkeypatch, capsys):
  """A table whose two directions disagree must not pass."""
  from vr_jax.interop import hf_tower

  cfg, params = small
  source = write(tmp_path / "source", cfg, params)
  rows = [
    row._replace(transform=row.transform._replace(save=lambda y: y.T[::-1]))
    if row.theirs == "encoder.layers.{l}.mlp.fc1.weight"
    else row
    for row in hf_tower.ROWS
  ]
  convert(source, tmp_path / "vr", "vr", logits="never", **QUIET)
  monkeypatch.setattr(hf_tower, "ROWS", rows)
  command = ["convert", str(tmp_path / "vr"), str(tmp_path / "out"), "--to", "videorefer"]
  assert cli.main([*command, "--logits", "never"]) == 1
  assert "largest difference" in capsys.readouterr().out
