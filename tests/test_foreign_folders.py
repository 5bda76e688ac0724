"""Folders of other people: what their library would do is done, or one line says why not."""

import dataclasses
import json
import random
import time

import flax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_interop_tables import random_adapter, small
from test_interop_videorefer import model, random_params
from test_interop_videorefer import write as write_published

from data_pipes.errors import InputError
from vr_jax import cli
from vr_jax.checkpoint import export, load_params, make_meta, read_tokenizer_files
from vr_jax.interop import hf_decoder, peft
from vr_jax.interop.convert import convert
from vr_jax.interop.source import Source
from vr_jax.interop.sources import open_source
from vr_jax.interop.table import Tree, arrays, collect, slots
from vr_jax.loading import load

QUIET = {"report": lambda line: None, "logits": "never"}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 15231233024\n"


def tensors_of(cfg, seed=0):
  """Random tensors of a decoder under the names of transformers."""
  rng = np.random.default_rng(seed)
  shapes = hf_decoder.decoder_shapes(cfg)
  params = {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
  return collect(nested(params), slots(shapes, hf_decoder.rows(cfg)))


def nested(params):
  return flax.traverse_util.unflatten_dict(params, sep="/")


@pytest.fixture(params=["qwen2-7b"])
def folder(request, tmp_path):
  """A small decoder folder of transformers."""
  return write_decoder(tmp_path / "decoder", small(request.param))


def write_decoder(folder, cfg, **fields):
  folder.mkdir()
  save_file(tensors_of(cfg), folder / "model.safetensors")
  (folder / "config.json").write_text(json.dumps(hf_decoder.hf_config(cfg) | fields))
  return folder


def edit(folder, name="config.json", **fields):
  file = folder / name
  file.write_text(json.dumps(json.loads(file.read_text()) | fields))


# --- Which file a tensor is from ----------------------------------------------------------------


def save_index(folder, weight_map, name="model.safetensors.index.json"):
  (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def in_shards(folder):
  """The weights of a folder in two shards with an index; returns the index's map."""
  tensors = load_file(folder / "model.safetensors")
  (folder / "model.safetensors").unlink()
  names = sorted(tensors)
  weight_map = {}
  for shard, part in (("a.safetensors", names[::2]), ("b.safetensors", names[1::2])):
    save_file({name: tensors[name] for name in part}, folder / shard)
    weight_map |= dict.fromkeys(part, shard)
  save_index(folder, weight_map)
  return weight_map


def test_a_tensor_in_two_files_is_named_with_both(folder):
  tensors = load_file(folder / "model.safetensors")
  save_file({"model.norm.weight": 0 * tensors["model.norm.weight"]}, folder / "old.safetensors")
  with pytest.raises(InputError, match=r"model\.norm\.weight is in model\.s.* and in old\.s"):
    open_source(folder)


def test_a_single_file_beside_an_index_of_an_earlier_save_is_refused_naming_both(folder):
  tensors = load_file(folder / "model.safetensors")
  save_file({name: 0 * array for name, array in tensors.items()}, folder / "old.safetensors")
  save_index(folder, dict.fromkeys(tensors, "old.safetensors"))
  with pytest.raises(InputError, match=r"model\.safetensors: and model\.safetensors\.index\.json"):
    open_source(folder)


def test_an_index_says_which_of_two_files_counts(folder):
  before = arrays(open_source(folder).params)
  weight_map = in_shards(folder)
  stale = {name: 0 * array for name, array in load_file(folder / "a.safetensors").items()}
  save_file(load_file(folder / "b.safetensors") | stale, folder / "b.safetensors")
  assert sorted(set(weight_map.values())) == ["a.safetensors", "b.safetensors"]
  after = arrays(open_source(folder).params)
  for path, value in before.items():
    np.testing.assert_array_equal(after[path], value, err_msg=path)


@pytest.mark.parametrize(
  ("change", "says"),
  [
    ({"model.norm.weight": "c.safetensors"}, "names shards that are not there: c.safetensors"),
    ({"model.norm.weight": "../a.safetensors"}, r"'\.\./a\.safetensors'; accepted: the name of"),
    ({"model.norm.weight": 3}, "model.norm.weight: 3; accepted: the name of a file"),
    ({"more.weight": "a.safetensors"}, r"names 1 tensors that their shards do not hold.*more"),
  ],
)
def test_an_index_that_names_what_is_not_there(change, says, folder):
  save_index(folder, in_shards(folder) | change)
  with pytest.raises(InputError, match=says):
    open_source(folder)


def test_several_indices_and_none_is_the_usual_one(folder):
  weight_map = in_shards(folder)
  (folder / "model.safetensors.index.json").unlink()
  for name in ("model.fp16", "model.bf16"):
    save_index(folder, weight_map, f"{name}.safetensors.index.json")
  with pytest.raises(InputError, match="2 indices"):
    open_source(folder)


@pytest.mark.parametrize(
  "name",
  ["model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "merges.txt"],
)
def test_a_git_lfs_pointer_is_called_that(name, folder):
  (folder / name).write_bytes(POINTER)
  with pytest.raises(InputError, match=rf"{name}: a Git LFS pointer.*git lfs pull"):
    open_source(folder)


def test_pointers_of_shards_of_pickles_and_of_parts(folder, tmp_path):
  in_shards(folder)
  (folder / "b.safetensors").write_bytes(POINTER)
  with pytest.raises(InputError, match=r"b\.safetensors: a Git LFS pointer"):
    open_source(folder)
  for file in folder.glob("*.safetensors*"):
    file.unlink()
  (folder / "pytorch_model.bin").write_bytes(POINTER)
  with pytest.raises(InputError, match=r"pytorch_model\.bin: a Git LFS pointer"):
    open_source(folder)
  for name in ("mm_projector.bin", "siglip.npz"):
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(InputError, match=f"{name}: a Git LFS pointer"):
      open_source(tmp_path / name)


# --- What a config says beside the sizes --------------------------------------------------------


YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
KINDS = ["yarn", "dynamic", "llama3", "longrope", "mrope", "su"]


@pytest.mark.parametrize("key", ["type", "rope_type"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_scaling_that_we_do_not_have_is_refused_wherever_it_stands(kind, key, folder):
  scaling = {key: kind} | YARN
  whole = {"rope_type": "default", "rope_theta": 1e6}
  for fields in (
    {"rope_scaling": scaling},
    {"rope_scaling": scaling, "rope_parameters": whole},
    {"rope_parameters": scaling | {"rope_theta": 1e6}},
    {"rope_parameters": {"full_attention": scaling, "sliding_attention": whole}},
    {"rope_parameters": {"full_attention": whole, "sliding_attention": scaling}},
  ):
    edit(folder, **{"rope_scaling": None, "rope_parameters": None} | fields)
    with pytest.raises(InputError, match=f"of type '{kind}' is not supported; accepted: default"):
      open_source(folder)


LINEAR = {"type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
  ("fields", "expected"),
  [
    ({"rope_scaling": LINEAR, "rope_theta": 5e5}, (5e5, 4.0)),
    ({"rope_scaling": LINEAR, "rope_parameters": {"rope_theta": 5e5}, "rope_theta": 5e5}, (5e5, 4)),
    ({"rope_parameters": LINEAR | {"rope_theta": 5e5}}, (5e5, 4.0)),
    ({"rope_scaling": LINEAR | {"rope_theta": 5e5}}, (5e5, 4.0)),
    ({"rope_scaling": {"rope_type": "default"}, "rope_theta": 5e5}, (5e5, 1.0)),
    ({"rope_scaling": None, "rope_theta": 5e5}, (5e5, 1.0)),
  ],
)
def test_linear_scaling_counts_wherever_it_stands_and_is_written_back(fields, expected, folder):
  edit(folder, rope_theta=None)
  edit(folder, **fields)
  cfg = open_source(folder).parts["llm"]
  assert (cfg.rope_base, cfg.rope_scale) == expected
  assert hf_decoder.decoder_config(hf_decoder.hf_config(cfg), "config.json") == cfg


@pytest.mark.parametrize(
  ("fields", "says"),
  [
    ({"rope_scaling": LINEAR, "rope_parameters": {"rope_theta": 5e5}}, "another rope_theta"),
    (
      {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
      "another factor",
    ),
    ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor=0.0"),
    ({"rope_scaling": [1]}, r"rope_scaling=\[1\], expected dict"),
  ],
)
def test_rotary_fields_that_contradict_each_other(fields, says, folder):
  edit(folder, rope_theta=None)
  edit(folder, **fields)
  with pytest.raises(InputError, match=says):
    open_source(folder)


@pytest.mark.parametrize(
  ("config", "method"),
  [
    ({"load_in_4bit": True}, "bitsandbytes"),
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
    ({"quant_method": "gptq", "bits": 4}, "gptq"),
    ({"quant_method": "awq", "bits": 4}, "awq"),
  ],
)
def test_quantised_folders_are_called_that(config, method, folder):
  edit(folder, quantization_config=config)
  with pytest.raises(InputError, match=rf"the weights are quantised \('{method}'\)"):
    open_source(folder)


@pytest.mark.parametrize("end", ["absmax", "SCB", "qweight"])
def test_quantised_tensors_without_a_word_in_the_config(end, folder):
  tensors = load_file(folder / "model.safetensors")
  tensors[f"model.layers.0.mlp.down_proj.{end}"] = np.zeros(3, np.uint8)
  save_file(tensors, folder / "model.safetensors")
  with pytest.raises(InputError, match=f"quantised weights, such as .*{end}"):
    open_source(folder)


# --- The head ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen2-7b", "gemma-2b", "gemma2-9b"])
def test_a_head_of_its_own_is_kept_apart_under_a_tied_flag(name, tmp_path):
  cfg = dataclasses.replace(small(name), tied_head=True)
  folder = write_decoder(tmp_path / "decoder", cfg)
  tensors = load_file(folder / "model.safetensors")
  table = tensors["model.embed_tokens.weight"]
  for head, tied in ((table, True), (table[::-1].copy(), False)):
    save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors")
    source = open_source(folder)
    assert source.parts["llm"].tied_head is tied
    assert any("lm_head.weight differs" in note for note in source.notes) is not tied
  np.testing.assert_array_equal(source.params.read("llm/embedder/output_embedding"), head)
  convert(folder, tmp_path / "vr", "vr", **QUIET)
  convert(tmp_path / "vr", tmp_path / "out", "hf", **QUIET)
  assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
  np.testing.assert_array_equal(
    load_file(tmp_path / "out/model.safetensors")["lm_head.weight"], head
  )


def test_a_published_folder_keeps_its_head_under_a_tied_flag(tmp_path):
  cfg = model("linear")
  folder = write_published(tmp_path / "published", cfg, random_params(cfg))
  edit(folder, tie_word_embeddings=True)
  source = open_source(folder)
  assert source.parts["llm"] == cfg.llm
  assert any("lm_head.weight differs" in note for note in source.notes)


def test_an_untied_flag_without_a_head_is_refused(folder):
  tensors = load_file(folder / "model.safetensors")
  del tensors["lm_head.weight"]
  save_file(tensors, folder / "model.safetensors")
  with pytest.raises(InputError, match=r"1 missing \(lm_head\.weight"):
    open_source(folder)


# --- Adapters ------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path):
  """An adapter of q, k and v and of the MLP, of rank 3 and alpha 6, as (config, folder)."""
  cfg = small("qwen2-7b")
  paths = ["layers/attn/q_einsum/w", "layers/attn/kv_einsum/w", "layers/mlp/linear"]
  peft.write_adapter(tmp_path / "adapter", cfg, random_adapter(cfg, 3, paths), alpha=6)
  return cfg, tmp_path / "adapter"


def merged(cfg, folder):
  """The decoder's parameters of `tensors_of`, and those with the adapter merged in."""
  base = hf_source(cfg)
  return arrays(base.params), arrays(base.with_adapter(peft.open_adapter(folder, cfg), "").params)


def hf_source(cfg):
  shapes = hf_decoder.decoder_shapes(cfg)
  rng = np.random.default_rng(0)
  params = {f"llm/{p}": rng.normal(size=s).astype(np.float32) for p, s in shapes.items()}
  return Source("test", "test", {"llm": cfg}, Tree(nested(params)))


def products(cfg, folder, scale):
  """What peft adds: `scale(module, rank)` times B A for each module, under transformers' names."""
  tensors = load_file(folder / "adapter_model.safetensors")
  change = {}
  for name, a in tensors.items():
    if ".lora_A." in name:
      module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
      b = tensors[name.replace("lora_A", "lora_B")]
      change[f"{module}.weight"] = scale(module, len(a)) * (b @ a)
  return change


def assert_adds(cfg, folder, scale):
  before, after = merged(cfg, folder)
  change = {path: after[path] - before[path] for path in before}
  shapes = {path: value.shape for path, value in change.items()}
  made = collect(nested(change), hf_decoder.decoder_slots(cfg, shapes, "llm/"))
  expected = products(cfg, folder, scale)
  for name, value in made.items():
    np.testing.assert_allclose(
      value, expected.get(name, np.zeros_like(value)), atol=2e-5, err_msg=name
    )


def cut_ranks(folder, module, rank):
  """Takes the last ranks of the modules of one name away."""
  file = folder / "adapter_model.safetensors"
  tensors = load_file(file)
  for name in [name for name in tensors if f".{module}." in name]:
    kept = tensors[name][:rank] if ".lora_A." in name else tensors[name][:, :rank]
    tensors[name] = np.ascontiguousarray(kept)
  save_file(tensors, file)


def test_rslora_divides_by_the_root_of_the_rank(adapter):
  cfg, folder = adapter
  edit(folder, "adapter_config.json", use_rslora=True)
  assert_adds(cfg, folder, lambda module, rank: 6 / 3**0.5)


@pytest.mark.parametrize("rslora", [False, True])
def test_modules_have_ranks_and_alphas_of_their_own(rslora, adapter):
  cfg, folder = adapter
  cut_ranks(folder, "v_proj", 1)
  patterns = {"alpha_pattern": {"layers.1.self_attn.q_proj": 5, r".*\.down_proj": 2}}
  edit(folder, "adapter_config.json", rank_pattern={"v_proj": 1}, use_rslora=rslora, **patterns)

  def scale(module, rank):
    alpha = 2 if "down_proj" in module else 5 if module.endswith("1.self_attn.q_proj") else 6
    return alpha / (rank**0.5 if rslora else rank)

  assert_adds(cfg, folder, scale)


def test_modules_that_were_saved_whole_take_the_place_of_the_base(adapter):
  cfg, folder = adapter
  file = folder / "adapter_model.safetensors"
  base = tensors_of(cfg, seed=9)
  whole = ["lm_head.weight", "model.layers.1.mlp.down_proj.weight"]
  tensors = load_file(file)
  tensors = {name: tensors[name] for name in tensors if "layers.1.mlp.down_proj" not in name}
  save_file(tensors | {f"base_model.model.{name}": base[name] for name in whole}, file)
  edit(folder, "adapter_config.json", modules_to_save=["lm_head", "down_proj"])
  _, after = merged(cfg, folder)
  made = collect(
    nested(after), hf_decoder.decoder_slots(cfg, {p: x.shape for p, x in after.items()}, "llm/")
  )
  for name in whole:
    np.testing.assert_array_equal(made[name], base[name])
  with pytest.raises(InputError, match=r"whole tensors too.*lm_head\.weight; merge it"):
    peft.read_adapter(folder, cfg)
  with pytest.raises(InputError, match=r"lm_head\.weight saved whole over a base"):
    peft.open_adapter(folder, dataclasses.replace(cfg, tied_head=True))
  edit(folder, "adapter_config.json", modules_to_save=["lm_head", "norm"])
  with pytest.raises(InputError, match="modules_to_save names 'norm'"):
    peft.open_adapter(folder, cfg)


INITIALISATIONS = ["pissa", "pissa_niter_16", "olora", "loftq", "corda", "lora_ga", "another"]


@pytest.mark.parametrize(
  ("fields", "says"),
  [
    *[({"init_lora_weights": kind}, f"init_lora_weights='{kind}'") for kind in INITIALISATIONS],
    ({"use_dora": True}, "use_dora=True"),
    ({"lora_bias": True}, "lora_bias=True"),
    ({"bias": "all"}, "bias='all'"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
    ({"use_qalora": True}, "use_qalora=True"),
    ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication="),
    ({"trainable_token_indices": [3]}, "trainable_token_indices="),
    ({"target_parameters": ["mlp.experts"]}, "target_parameters="),
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens="),
    ({"a_field_of_tomorrow": 1}, "a_field_of_tomorrow=1"),
    ({"a_field_of_tomorrow": 0}, "a_field_of_tomorrow=0"),
    ({"peft_type": "LOHA"}, "peft_type='LOHA'"),
    ({"peft_type": None}, "peft_type=None"),
    ({"r": 0}, "r=0"),
    ({"r": True}, "r=True"),
    ({"r": 4}, r"mis-shaped .*lora_A.weight \[3, 10\] instead of \[4, 10\]"),
    ({"lora_alpha": float("nan")}, "lora_alpha=nan"),
    ({"rank_pattern": {"q_proj": 2}}, "mis-shaped .*q_proj"),
    ({"rank_pattern": {"(": 2}}, r"rank_pattern: no pattern of module names"),
    ({"rank_pattern": {"q_proj": "2"}}, "q_proj='2', expected int"),
    ({"modules_to_save": "lm_head"}, "modules_to_save='lm_head'; accepted: a list"),
  ],
)
def test_an_adapter_that_says_what_we_do_not_read(fields, says, adapter):
  cfg, folder = adapter
  edit(folder, "adapter_config.json", **fields)
  with pytest.raises(InputError, match=says):
    peft.open_adapter(folder, cfg)


def test_an_adapter_with_every_field_of_peft_at_its_default_is_read(adapter):
  """As peft 0.21 writes it."""
  cfg, folder = adapter
  fields = """alora_invocation_tokens arrow_config auto_mapping corda_config eva_config
    exclude_modules kasa_config layer_replication layers_pattern layers_to_transform lora_ga_config
    megatron_config modules_to_save monteclora_config revision target_parameters
    trainable_token_indices use_bdlora velora_config""".split()
  switches = ["ensure_weight_tying", "fan_in_fan_out", "lora_bias", "use_dora", "use_qalora"]
  edit(
    folder,
    "adapter_config.json",
    **dict.fromkeys(fields) | dict.fromkeys(switches, False),
    alpha_pattern={}, rank_pattern={}, loftq_config={}, qalora_group_size=16,
    init_lora_weights=True, megatron_core="megatron.core", peft_version="0.21.2",
  )  # fmt: skip
  assert_adds(cfg, folder, lambda module, rank: 2)


# --- Numbers that no model has -------------------------------------------------------------------


# fmt: off
HOSTILE = [-1, 0, 1, 2, 7, 1 << 40, 10**30, float("inf"), float("nan"), -0.5, 1e-300, 1e300, 3.5,
           "", "x", "1", "a\0b", "a" * 6000, [], [1], ["x"], {}, {"a": 1}, None, True, False,
           [[[]]], [-1], [10**30], {"rope_type": "linear"}, {"factor": 0, "type": "linear"}]
# fmt: on


def places(fields, path=()):
  """The paths of everything in a JSON value."""
  items = fields.items() if isinstance(fields, dict) else ()
  return [path] * bool(path) + [p for key, value in items for p in places(value, (*path, key))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """What opens each of a few folders, and the JSON file of it that is spoilt."""
  root = tmp_path_factory.mktemp("hostile")
  cfg = model("linear")
  published = write_published(root / "published", cfg, random_params(cfg))
  generation = {"eos_token_id": [7, 8], "pad_token_id": 3, "repetition_penalty": 1.05}
  (published / "generation_config.json").write_text(json.dumps(generation))
  for to in ("hf", "torch"):
    convert(published, root / to, to, **QUIET)
  gemma = small("gemma3-4b")
  write_decoder(root / "gemma3", gemma, rope_scaling={"rope_type": "linear", "factor": 8.0})
  peft.write_adapter(root / "adapter", gemma, random_adapter(gemma, 3, ["layers/mlp/linear"]), 6)
  patterns = {"rank_pattern": {"down_proj": 3}, "alpha_pattern": {"down_proj": 5}}
  edit(root / "adapter", "adapter_config.json", use_rslora=True, modules_to_save=[], **patterns)
  files = {
    "published/config.json": "published",
    "published/generation_config.json": "published",
    "published/towers/siglip-tiny-patch7-31/config.json": "published",
    "hf/decoder/config.json": "hf/decoder",
    "hf/tower/config.json": "hf/tower",
    "torch/config.json": "torch",
    "gemma3/config.json": "gemma3",
    "adapter/adapter_config.json": "adapter",
  }

  def opens(name):
    folder = root / files[name]
    return peft.open_adapter(folder, gemma) if name.startswith("ad") else open_source(folder)

  return {root / name: lambda name=name: opens(name) for name in files}


@pytest.mark.parametrize("seed", range(3))
def test_a_hostile_field_is_read_or_is_one_short_line_in_less_than_a_second(seed, folders):
  rng = random.Random(seed)
  for file, opens in folders.items():
    text = file.read_text()
    opens()
    for _ in range(25):
      fields = json.loads(text)
      *path, last = rng.choice(places(fields))
      inside = fields
      for key in path:
        inside = inside[key]
      inside[last] = value = rng.choice(HOSTILE)
      file.write_text(json.dumps(fields))
      start = time.process_time()
      line = ""
      try:
        opens()
      except InputError as error:
        line = str(error)
      except Exception as error:
        raise AssertionError(f"{file.name}: {path} {last}={value!r}") from error
      assert "\n" not in line, (file.name, path, last, value)
      assert len(line) < 8000
      assert time.process_time() - start < 1, (file.name, path, last, value)
    file.write_text(text)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"hidden_size": ' + "9" * 5000 + "}", "\xff", ""])
def test_a_config_that_is_hardly_json(text, folder):
  (folder / "config.json").write_text(text, encoding="latin-1")
  with pytest.raises(InputError, match=r"config\.json: not JSON"):
    open_source(folder)


# --- Ids beyond the table ------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("rows", "generation", "says"),
  [
    (1004, {"eos_ids": [1002]}, None),
    (1003, {"eos_ids": [1002]}, None),  # <region> is 1003, and stands for an object
    (1002, {"eos_ids": [1000]}, "tokenizer has the id 1002"),
    (1004, {"eos_ids": [1004]}, "eos_token_id has the id 1004"),
    (1004, {"pad_id": 1004}, "pad_token_id has the id 1004"),
  ],
)
def test_an_id_beyond_the_table_is_refused(rows, generation, says, golden, tmp_path, capsys):
  cfg = model("linear")
  cfg = dataclasses.replace(cfg, llm=dataclasses.replace(cfg.llm, vocab_size=rows))
  files = read_tokenizer_files(golden / "tiny_videorefer_qwen2")
  export(tmp_path / "model", random_params(cfg), make_meta(cfg.to_dict(), files, generation))
  if says is None:
    assert load(tmp_path / "model").cfg.llm.vocab_size == rows
    return
  with pytest.raises(InputError, match=f"{says}, and the table of embeddings {rows} rows"):
    load(tmp_path / "model")
  command = ["convert", str(tmp_path / "model"), str(tmp_path / "out"), "--to", "hf"]
  assert cli.main([*command, "--logits", "never"]) == 2
  assert says in capsys.readouterr().err


# --- What a folder keeps on its way --------------------------------------------------------------


def test_the_length_that_a_decoder_was_made_for_is_kept(folder, tmp_path):
  edit(folder, max_position_embeddings=1234)
  convert(folder, tmp_path / "vr", "vr", **QUIET)
  convert(tmp_path / "vr", tmp_path / "out", "hf", **QUIET)
  assert json.loads((tmp_path / "out/config.json").read_text())["max_position_embeddings"] == 1234
  assert load_params(tmp_path / "vr").keys() == {"llm"}
