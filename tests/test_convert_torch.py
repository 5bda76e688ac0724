"""Conversions against PyTorch: models of `transformers` built small, and our own PyTorch model."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from test_interop_videorefer import model, random_params
from test_successors import TOKENS, publish

from data_pipes.errors import InputError
from vr_jax.checkpoint import export, make_meta, read_tokenizer_files
from vr_jax.interop import hf_decoder, peft, proof
from vr_jax.interop.adapter import Adapter, Merged
from vr_jax.interop.convert import convert
from vr_jax.interop.sources import open_source
from vr_jax.interop.table import Safetensors, Tree, arrays, nested
from vr_jax.models.connector import KINDS
from vr_jax.models.lora import is_factor
from vr_jax.models.variants import DECODERS

pytestmark = pytest.mark.torch
QUIET = {"report": lambda line: None}
TOLERANCE = 1e-4

SMALL = {
  "vocab_size": 96,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 16,
  "max_position_embeddings": 128,
}
DECODER_CONFIGS = {
  "qwen2": SMALL | {"head_dim": 8, "tie_word_embeddings": False},
  "gemma": SMALL | {"num_key_value_heads": 1},
  "gemma2": SMALL | {"sliding_window": 8, "query_pre_attn_scalar": 24},
  "gemma3_text": SMALL
  | {
    "sliding_window": 8,
    "query_pre_attn_scalar": 24,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
  },
}


def randomised(module):
  """The module with random weights everywhere, norms and biases too."""
  import torch

  torch.manual_seed(0)
  with torch.no_grad():
    for parameter in module.parameters():
      parameter.copy_(torch.randn_like(parameter) * 0.2 + 0.1 * (parameter.ndim == 1))
  return module.eval()


@pytest.mark.parametrize("family", DECODER_CONFIGS)
def test_decoders_of_transformers_go_in_and_out_with_equal_logits(family, tmp_path):
  import transformers

  config = transformers.AutoConfig.for_model(family, **DECODER_CONFIGS[family])
  config.rope_theta = 10_000.0
  module = randomised(transformers.AutoModelForCausalLM.from_config(config))
  module.save_pretrained(tmp_path / "theirs")
  parity = convert(tmp_path / "theirs", tmp_path / "vr", "vr", **QUIET)
  assert parity["passed"] is True
  assert parity["logits"]["source"]["greedy_equal"] == 32
  source = open_source(tmp_path / "vr")
  found = proof.decoder_logits(source, tmp_path / "theirs")
  assert found["relative"] < TOLERANCE
  assert found["greedy_equal"] == 32
  parity = convert(tmp_path / "vr", tmp_path / "out", "hf", **QUIET)
  assert parity["bit_identical"]
  assert parity["logits"]["decoder"]["tolerance"] == TOLERANCE
  assert parity["logits"]["decoder"]["relative"] < TOLERANCE
  assert parity["logits"]["decoder"]["greedy_equal"] == 32


def test_a_cast_to_half_precision_is_held_to_its_own_tolerance(tmp_path):
  import transformers

  config = transformers.AutoConfig.for_model("qwen2", **DECODER_CONFIGS["qwen2"])
  randomised(transformers.AutoModelForCausalLM.from_config(config)).save_pretrained(tmp_path / "a")
  parity = convert(tmp_path / "a", tmp_path / "b", "hf", dtype="bfloat16", **QUIET)
  assert parity["passed"]
  found = parity["logits"]["decoder"]
  assert found["tolerance"] == proof.TOLERANCE["half"]
  assert TOLERANCE < found["relative"] < found["tolerance"]


MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def merge_with_peft(folder, adapter, merged):
  """peft's own merge of a base and an adapter as a folder, which has the logits of the two."""
  import torch
  import transformers
  from peft import PeftModel

  base = transformers.AutoModelForCausalLM.from_pretrained(folder)
  ids = torch.arange(12)[None]
  with torch.no_grad():
    before = base(ids).logits
    both = PeftModel.from_pretrained(base, adapter).eval()
    after = both(ids).logits
  assert (after - before).abs().max() > 0.1
  both.merge_and_unload().save_pretrained(merged)
  again = transformers.AutoModelForCausalLM.from_pretrained(merged)
  with torch.no_grad():
    np.testing.assert_allclose(again(ids).logits, after, atol=TOLERANCE)


@pytest.mark.parametrize(
  ("family", "options"),
  [
    ("qwen2", {"target_modules": MATRICES}),
    ("qwen2", {}),  # peft's own choice: q_proj and v_proj
    ("gemma3_text", {"target_modules": MATRICES, "layers_to_transform": [0, 2]}),
    (
      "qwen2",
      {
        "target_modules": MATRICES,
        "use_rslora": True,
        "rank_pattern": {"v_proj": 2, r"1\.self_attn\.q_proj": 6},
        "alpha_pattern": {"down_proj": 5, "layers.2.mlp.up_proj": 7},
        "modules_to_save": ["lm_head"],
      },
    ),
  ],
)
def test_an_adapter_of_peft_merges_to_its_logits(family, options, tmp_path):
  import torch
  import transformers
  from peft import LoraConfig, get_peft_model

  config = transformers.AutoConfig.for_model(family, **DECODER_CONFIGS[family])
  module = randomised(transformers.AutoModelForCausalLM.from_config(config))
  module.save_pretrained(tmp_path / "base")
  options = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 12} | options
  adapted = get_peft_model(module, LoraConfig(**options))
  with torch.no_grad():
    for name, parameter in adapted.named_parameters():
      if "lora_" in name or "modules_to_save" in name:
        parameter.copy_(torch.randn_like(parameter) * 0.1)
  adapted.save_pretrained(tmp_path / "adapter")
  merge_with_peft(tmp_path / "base", tmp_path / "adapter", tmp_path / "theirs")
  parity = convert(tmp_path / "base", tmp_path / "vr", "vr", adapter=tmp_path / "adapter", **QUIET)
  assert parity["passed"] is True
  assert parity["logits"]["source"]["relative"] < TOLERANCE
  found = proof.decoder_logits(open_source(tmp_path / "vr"), tmp_path / "theirs")
  assert found["relative"] < TOLERANCE
  assert found["greedy_equal"] == 32


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_peft_reads_our_adapter(family, tmp_path):
  import transformers

  config = transformers.AutoConfig.for_model(family, **DECODER_CONFIGS[family])
  module = randomised(transformers.AutoModelForCausalLM.from_config(config))
  module.save_pretrained(tmp_path / "base")
  source = open_source(tmp_path / "base")
  cfg = source.parts["llm"]
  rng = np.random.default_rng(0)
  paths = [
    path for path in hf_decoder.decoder_shapes(cfg) if re.search(r"einsum(/w)?$|linear", path)
  ]
  shapes = peft.adapter_shapes(cfg, 4, dict.fromkeys(paths))
  factors = {p: (rng.normal(size=s) * 0.1).astype(np.float32) for p, s in shapes.items()}
  peft.write_adapter(tmp_path / "adapter", cfg, factors, alpha=12)
  merge_with_peft(tmp_path / "base", tmp_path / "adapter", tmp_path / "theirs")
  merged = Merged(source.params, Adapter(Tree(factors), 4, 12))
  found = proof.decoder_logits(dataclasses.replace(source, params=merged), tmp_path / "theirs")
  assert found["relative"] < TOLERANCE
  assert found["greedy_equal"] == 32


def test_peft_reads_the_adapter_of_a_run(tmp_path):
  """A checkpoint with adapters leaves as PEFT's, and merged."""
  import transformers

  config = transformers.AutoConfig.for_model("qwen2", **DECODER_CONFIGS["qwen2"])
  module = randomised(transformers.AutoModelForCausalLM.from_config(config))
  module.save_pretrained(tmp_path / "base")
  source = open_source(tmp_path / "base")
  cfg = dataclasses.replace(source.parts["llm"], lora_rank=4, lora_alpha=12.0)
  rng = np.random.default_rng(0)
  weights = arrays(source.params)
  for path, shape in hf_decoder.decoder_shapes(cfg).items():
    if is_factor(path):
      weights[f"llm/{path}"] = (rng.normal(size=shape) * 0.1).astype(np.float32)
  export(tmp_path / "run", nested(weights), make_meta({"name": "run", "llm": vars(cfg)}))
  convert(tmp_path / "run", tmp_path / "adapter", "peft", logits="never", **QUIET)
  merge_with_peft(tmp_path / "base", tmp_path / "adapter", tmp_path / "theirs")
  found = proof.decoder_logits(open_source(tmp_path / "run"), tmp_path / "theirs")
  assert found["relative"] < TOLERANCE
  assert found["greedy_equal"] == 32
  parity = convert(tmp_path / "run", tmp_path / "merged", "hf", logits="always", **QUIET)
  assert parity["passed"]


TEXT_HALVES = {
  "a tower alone": None,
  "SigLIP": {"hidden_size": 32, "vocab_size": 50},
  # Of fixed resolution: transformers' SiglipModel as well, with Gemma's vocabulary and, in the
  # largest, a text half of another width than the tower's.
  "SigLIP 2": {"hidden_size": 24, "projection_size": 32, "vocab_size": 99},
}


@pytest.mark.parametrize("kind", TEXT_HALVES)
def test_siglip_goes_in_and_out_with_equal_features(kind, tmp_path):
  import transformers

  vision = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 40,
    "patch_size": 8,
  }
  text = TEXT_HALVES[kind]
  if whole := text is not None:
    text = text | {"intermediate_size": 40, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = transformers.SiglipConfig(vision_config=vision, text_config=text)
    module = transformers.SiglipModel(config)
  else:
    module = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**vision))
  randomised(module).save_pretrained(tmp_path / "theirs")
  if whole:  # released files name the model types and what differs from the defaults
    fields = {
      "architectures": ["SiglipModel"],
      "model_type": "siglip",
      "text_config": {"model_type": "siglip_text_model"} | text,
      "vision_config": {"model_type": "siglip_vision_model"} | vision,
    }
    (tmp_path / "theirs/config.json").write_text(json.dumps(fields))
  parity = convert(tmp_path / "theirs", tmp_path / "vr", "vr", **QUIET)
  assert parity["passed"] is True
  source = open_source(tmp_path / "vr")
  assert source.parts["img"].pool
  assert any("text_model" in name for name in open_source(tmp_path / "theirs").skipped) == whole
  parity = convert(tmp_path / "vr", tmp_path / "out", "hf", **QUIET)
  assert parity["bit_identical"]
  assert parity["logits"]["tower"]["relative"] < TOLERANCE
  import torch

  again = transformers.SiglipVisionModel.from_pretrained(tmp_path / "out")
  theirs = module.vision_model if whole else module
  pixels = torch.randn(1, 3, 40, 40)
  with torch.no_grad():
    pooled = theirs(pixels).pooler_output, again.eval()(pixels).pooler_output
  np.testing.assert_allclose(*pooled, atol=1e-6)


@pytest.mark.parametrize("family", ["gemma", "gemma2"])
def test_paligemma_goes_in_and_out_with_equal_logits(family, tmp_path):
  import transformers

  vision = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48}
  vision |= {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
  text = DECODER_CONFIGS[family] | {"model_type": family}
  config = transformers.PaliGemmaConfig(
    vision_config=vision | {"vision_use_head": False, "projection_dim": 32},
    text_config=text,
    projection_dim=32,
    image_token_index=95,
  )
  module = randomised(transformers.AutoModelForImageTextToText.from_config(config))
  module.save_pretrained(tmp_path / "theirs")
  parity = convert(tmp_path / "theirs", tmp_path / "vr", "vr", **QUIET)
  assert parity["passed"] is True
  assert parity["logits"]["source"]["relative"] < TOLERANCE
  source = open_source(tmp_path / "vr")
  assert list(source.parts) == ["img", "connector", "llm"]
  assert source.parts["llm"].prefix_lm
  parity = convert(tmp_path / "vr", tmp_path / "out", "hf", **QUIET)
  assert parity["passed"] is True
  assert parity["logits"]["paligemma"]["relative"] < TOLERANCE


def test_the_decoder_of_a_multimodal_gemma_3_has_the_logits_of_its_library(tmp_path):
  import transformers

  vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
  vision |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
  text = DECODER_CONFIGS["gemma3_text"] | {"model_type": "gemma3_text"}
  config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
  config.text_config.rope_theta = 10_000.0
  module = randomised(transformers.Gemma3ForConditionalGeneration(config))
  module.save_pretrained(tmp_path / "theirs")
  parity = convert(tmp_path / "theirs", tmp_path / "vr", "vr", **QUIET)
  assert parity["passed"] is True
  assert parity["logits"]["source"]["relative"] < TOLERANCE


def test_the_files_of_a_published_stage(golden, tmp_path):
  import torch

  folder = golden / "tiny_videorefer_qwen2"
  tensors = Safetensors(folder)
  for file, word in (
    ("mm_projector.bin", "mm_projector"),
    ("region_encoder.bin", "region_encoder"),
  ):
    torch.save(
      {
        f"base_model.model.{name}": torch.from_numpy(
          tensors.read(name).astype(np.float32)
        ).bfloat16()
        for name in tensors
        if word in name
      },
      tmp_path / file,
    )
  (tmp_path / "config.json").write_text((folder / "config.json").read_text())
  source, whole = open_source(tmp_path), open_source(folder)
  assert source.parts == {part: whole.parts[part] for part in ("connector", "region")}
  assert {str(source.params.dtype(path)) for path in source.params.shapes} == {"bfloat16"}
  for path in source.params.shapes:
    np.testing.assert_array_equal(source.params.read(path), whole.params.read(path), err_msg=path)
  assert list(open_source(tmp_path / "region_encoder.bin").parts) == ["region"]
  (tmp_path / "region_encoder.bin").write_bytes(b"PK\x03\x04 broken")
  with pytest.raises(InputError, match=r"region_encoder\.bin: not a complete PyTorch file"):
    open_source(tmp_path)


# --- Our own PyTorch model ------------------------------------------------------------------------


def decoder_like(name, **fields):
  """A registered decoder's switches at a small size."""
  cfg = DECODERS[name]
  sizes = {"width": 48, "depth": 3, "heads": 4, "kv_heads": 2, "head_dim": 16, "mlp_dim": 40}
  window = None if cfg.window is None else 16
  return dataclasses.replace(cfg, vocab_size=60, window=window, **(sizes | fields))


def normal_params(cfg, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: (rng.normal(size=x.shape) * 0.15).astype(np.float32), random_params(cfg)
  )


def checkpoint(folder, cfg, golden, params=None):
  meta = make_meta(
    cfg.to_dict(),
    read_tokenizer_files(golden / "tiny_videorefer_qwen2"),
    # A strong penalty, so that a random model does not say one word over and over.
    {"eos_ids": [1002, 1000], "pad_id": 1000, "repetition_penalty": 2.0},
  )
  export(folder, normal_params(cfg) if params is None else params, meta)
  return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS)
def test_our_pytorch_model_gives_equal_logits_for_every_decoder(name, golden, tmp_path):
  kv_heads = 4 if name == "gemma-7b" else 2
  cfg = dataclasses.replace(
    model("stc_connector_v35", heads=4, kv_heads=4), llm=decoder_like(name, kv_heads=kv_heads)
  )
  parity = convert(checkpoint(tmp_path / "vr", cfg, golden), tmp_path / "out", "torch", **QUIET)
  assert parity["bit_identical"]
  found = parity["logits"]["videorefer"]
  assert found["relative"] < TOLERANCE
  assert found["greedy_equal"] == 32


@pytest.mark.slow
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "stc_connector_v35"])
def test_our_pytorch_model_has_every_connector(kind, golden, tmp_path):
  width = 24 if kind.startswith("spatial") else 48
  llm = decoder_like("gemma-2b", width=width, depth=1)
  cfg = dataclasses.replace(model(kind, heads=4, kv_heads=4), llm=llm)
  parity = convert(checkpoint(tmp_path / "vr", cfg, golden), tmp_path / "out", "torch", **QUIET)
  assert parity["logits"]["videorefer"]["relative"] < TOLERANCE


def test_the_published_folder_runs_in_pytorch_with_our_logits(golden, tmp_path):
  parity = convert(golden / "tiny_videorefer_qwen2", tmp_path / "vr", "vr", **QUIET)
  found = parity["logits"]["videorefer"]
  # Some 12 000 terms from pixels to logits come to 5e-5 of the largest (tests/rounding.py).
  assert found["relative"] < TOLERANCE
  assert found["greedy_equal"] == 32


WITHOUT_JAX = """
import sys
class NoJax:
  def find_spec(self, name, path=None, target=None):
    if name.split(".")[0] in ("jax", "jaxlib", "ml_dtypes", "flax", "vr_jax", "data_pipes"):
      raise ImportError(f"{name} is not here")
sys.meta_path.insert(0, NoJax())
"""
PYTORCH_ONLY = os.environ.get("PYTORCH_ONLY")  # a Python with PyTorch that has never seen JAX
IS_WITHOUT_JAX = """
import importlib.util, sys
assert not any(map(importlib.util.find_spec, ("jax", "ml_dtypes", "flax", "vr_jax", "data_pipes")))
"""
ANSWER = """
import torch
from transformers import AutoModelForCausalLM, AutoProcessor
folder, video, question, *regions = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor(video, question, regions)
ids = model.generate(**inputs, max_new_tokens=24)[0]
print([int(i) for i in ids])
print(processor.decode(ids))
assert not {"jax", "flax", "vr_jax", "data_pipes"} & {name.split(".")[0] for name in sys.modules}
"""


def answered_by_pytorch(tmp_path, video, question, regions):
  """Token ids, as JSON, and text of the folder `out`, from a process without JAX."""
  environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
  program = (IS_WITHOUT_JAX if PYTORCH_ONLY else WITHOUT_JAX) + ANSWER
  done = subprocess.run(
    [PYTORCH_ONLY or sys.executable, "-c", program, str(tmp_path / "out"), video, question,
     *regions],
    capture_output=True,
    text=True,
    env=environment,
    cwd=tmp_path,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout.rstrip("\n").split("\n", 1)


@pytest.mark.parametrize("clip", ["clip_mp4.mp4", pytest.param("dog.mp4", marks=pytest.mark.media)])
def test_a_pytorch_only_process_repeats_the_answer_of_vr_ask(
  clip, golden, tmp_path, capsys, request
):
  """The second clip is a real one, in VR_MEDIA_DIR."""
  from vr_jax import cli

  small = model("stc_connector_v35", heads=4, kv_heads=4, aspect="square")
  llm = dataclasses.replace(decoder_like("gemma3-4b"), vocab_size=1004)
  cfg = dataclasses.replace(small, llm=llm)
  folder = checkpoint(tmp_path / "vr", cfg, golden)
  convert(folder, tmp_path / "out", "torch", logits="never", **QUIET)
  made_here = (golden / "media" / clip).is_file()
  media = golden / "media" if made_here else request.getfixturevalue("media_dir")
  video = str(media / clip)
  question = "What is [<region>] doing with [<region>]?"
  regions = ["cat=box:10,10,60,50@3", "cat=box:12,10,62,50@9", "point:40,40@5"]
  command = ["ask", "--checkpoint", str(tmp_path / "vr"), "--video", video, "--json"]
  command += [word for region in regions for word in ("--region", region)]
  assert cli.main([*command, "--question", question, "--max-new-tokens", "24"]) == 0
  answer = json.loads(capsys.readouterr().out)
  ids, text = answered_by_pytorch(tmp_path, video, question, regions)
  assert len(set(answer["token_ids"])) > 3
  assert json.loads(ids) == list(answer["token_ids"])
  assert text == answer["text"]


@pytest.mark.parametrize("kind", TOKENS)
def test_successors_go_out_and_back(kind, tmp_path):
  """Logits and greedy tokens of our PyTorch code, from .bin shards, and the exact way back."""
  import torch
  from safetensors.torch import load_file

  folder = publish(kind, tmp_path / "published")
  before = nested(arrays(open_source(folder).params, "float32"))
  tensors = load_file(folder / "model.safetensors")
  (folder / "model.safetensors").unlink()
  shards = {name: f"pytorch_model-0000{i % 2 + 1}-of-00002.bin" for i, name in enumerate(tensors)}
  for file in set(shards.values()):
    torch.save({n: x for n, x in tensors.items() if shards[n] == file}, folder / file)
  index = json.dumps({"weight_map": shards})
  (folder / "pytorch_model.bin.index.json").write_text(index)
  parity = convert(folder, tmp_path / "out", "torch", **QUIET)
  assert parity["passed"] is True
  assert {tensor["name"] for tensor in parity["tensors"]} <= set(tensors)
  compared = parity["logits"]["videorefer"]
  assert compared["relative"] < TOLERANCE
  assert compared["greedy_equal"] == 32
  assert convert(tmp_path / "out", tmp_path / "back", "vr", logits="never", **QUIET)["passed"]
  after = nested(arrays(open_source(tmp_path / "back").params, "float32"))
  jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["placed_cells", "cells_in_context"])
def test_a_pytorch_only_process_repeats_the_answer_of_a_successor(kind, golden, tmp_path, capsys):
  from vr_jax import cli

  folder = publish(kind, tmp_path / "published")
  convert(folder, tmp_path / "out", "torch", logits="never", **QUIET)
  video = str(golden / "media/clip_mp4.mp4")
  question, regions = "What is <region> doing?", ["box:10,10,60,50@3"]
  command = ["ask", "--checkpoint", str(folder), "--video", video, "--json", "--region", *regions]
  assert cli.main([*command, "--question", question, "--max-new-tokens", "24"]) == 0
  answer = json.loads(capsys.readouterr().out)
  ids, text = answered_by_pytorch(tmp_path, video, question, regions)
  assert json.loads(ids) == list(answer["token_ids"])
  assert text == answer["text"]


FINE_TUNE = """
import pathlib, sys
import numpy as np, torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoProcessor, Trainer, TrainingArguments
folder, video, out = sys.argv[1:]
load = lambda: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
model, processor = load(), AutoProcessor.from_pretrained(folder, trust_remote_code=True)
one = processor(video, "What is <region> doing?", ["box:10,10,60,50@3"])

# The loss is that of the logits: slots that do not exist are dropped, visual ones never count.
labels = torch.where(torch.arange(one["input_ids"].shape[1]) % 3 == 0, one["input_ids"], -100)
with torch.no_grad():
  plain, learned = model(**one), model(**one, labels=labels)
assert plain.loss is None and torch.equal(plain.logits, learned.logits)
seen = model.model.splice(**one)[1][0] >= 0
kept = torch.where((one["visual"] < 0) & one["attention_mask"], labels, -100)[0]
rows = model.model.splice(**one)[2][0]
under = kept[rows][seen][1:]
expected = torch.nn.functional.cross_entropy(learned.logits[0][seen][:-1], under)
assert abs(float(learned.loss - expected)) < 1e-5, (learned.loss, expected)
both = {name: torch.cat([x, x]) for name, x in one.items()}
with torch.no_grad():
  double = model(**both, labels=torch.cat([labels, labels]))
assert abs(float(double.loss - expected)) < 1e-5

for unknown in ({"max_new_token": 2}, {"num_beams": 4}, {"num_return_sequences": 3}):
  try:
    model.generate(**one, **unknown)
  except TypeError as error:
    assert next(iter(unknown)) in str(error), error
  else:
    raise AssertionError(unknown)
for wrong in ({"max_new_tokens": 0}, {"temperature": 0.0}):
  try:
    model.generate(**one, **wrong)
  except ValueError:
    continue
  raise AssertionError(wrong)

# A short fine-tune with PEFT and the Trainer.
class Items(torch.utils.data.Dataset):
  def __len__(self):
    return 4

  def __getitem__(self, index):
    # (The Trainer counts every label that is not -100, also the first and those of visual slots.)
    asked = kept.index_fill(0, torch.tensor([0]), -100)
    return {name: x[0] for name, x in one.items()} | {"labels": asked}

lora = LoraConfig(r=4, target_modules=r"model\\.layers.*(q|v)_proj", task_type="CAUSAL_LM")
tuned = get_peft_model(load().train(), lora)
settings = TrainingArguments(
  out, num_train_epochs=8, per_device_train_batch_size=2, learning_rate=0.05, report_to=[],
  save_strategy="no", logging_steps=1, use_cpu=True, label_names=["labels"],
)
trainer = Trainer(tuned, settings, train_dataset=Items(), processing_class=processor)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
assert abs(losses[0] - float(expected)) < 1e-3, (losses, expected)
assert losses[-1] < 0.97 * losses[0], losses
trainer.save_model(out)
again = PeftModel.from_pretrained(load(), out).eval()
with torch.no_grad():
  assert torch.allclose(again(**one).logits, tuned.eval()(**one).logits, atol=1e-5)

# What was saved opens alone.
whole = again.merge_and_unload()
whole.save_pretrained(f"{out}/whole")
processor.save_pretrained(f"{out}/whole")
AutoProcessor.from_pretrained(out, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(f"{out}/whole", trust_remote_code=True)
twice = processor(video, "What is <region> doing?", ["box:10,10,60,50@3"])
assert all(torch.equal(twice[name], one[name]) for name in one)
whole = AutoModelForCausalLM.from_pretrained(f"{out}/whole", trust_remote_code=True).eval()
with torch.no_grad():
  assert torch.allclose(whole(**one).logits, again(**one).logits, atol=1e-5)
print("done")
"""


def test_the_exported_model_is_fine_tuned_with_peft_and_the_trainer(golden, tmp_path):
  """Labels give the loss of the logits, unknown options are named, and what is saved opens."""
  llm = dataclasses.replace(decoder_like("qwen2-7b", depth=2), vocab_size=1004)
  cfg = dataclasses.replace(model("mlp2x_gelu", heads=4, kv_heads=4, aspect="square"), llm=llm)
  checkpoint(tmp_path / "vr", cfg, golden)
  convert(tmp_path / "vr", tmp_path / "out", "torch", logits="never", **QUIET)
  (tmp_path / "tune.py").write_text(FINE_TUNE)
  done = subprocess.run(
    [sys.executable, "tune.py", "out", str(golden / "media/clip_mp4.mp4"), "tuned"],
    capture_output=True,
    text=True,
    env=os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
    cwd=tmp_path,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  assert done.stdout.rstrip().endswith("done")
