"""Every format's table is a bijection with the parameters of every registered variant."""

import ast
import dataclasses
import math
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from data_pipes.errors import InputError
from vr_jax.interop import big_vision, hf_decoder, peft, torch_folder, videorefer
from vr_jax.interop.adapter import Merged
from vr_jax.interop.table import Mapped, Tree, arrays, outputs, slots
from vr_jax.models.variants import DECODERS, VARIANTS, get_variant


def wanted_slots(name, form):
  """(slots, shapes) of a variant in a format."""
  cfg = get_variant(name)
  shapes = videorefer.model_shapes(cfg)
  parts = {"img": cfg.img, "connector": cfg.connector, "region": cfg.region, "llm": cfg.llm}
  if form == "published":
    return list(videorefer.model_slots(cfg, shapes)), shapes
  if form == "torch":
    return torch_folder.output_slots(cfg, shapes), shapes
  scanned = form == "big_vision"
  return list(slots(shapes, big_vision.rows(parts, scanned=scanned))), shapes


FORMS = ("published", "torch", "big_vision", "big_vision unscanned")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_is_covered_once_at_full_size(name, form):
  wanted, shapes = wanted_slots(name, form)
  assert len({(slot.theirs, slot.part) for slot in wanted}) == len(wanted)
  assert len({(slot.ours, slot.at) for slot in wanted}) == len(wanted)
  covered = dict.fromkeys(shapes, 0)
  for slot in wanted:
    shape = shapes[slot.ours]
    assert all(0 <= i < n for i, n in zip(slot.at, shape, strict=False))
    covered[slot.ours] += math.prod(shape[len(slot.at) :])
  assert covered == {path: math.prod(shape) for path, shape in shapes.items()}
  total = sum(math.prod(output.shape) for output in outputs(wanted, shapes))
  assert total == sum(covered.values())


class Held:
  """Foreign tensors in memory."""

  path = "memory"

  def __init__(self, tensors):
    self._tensors = tensors

  def __iter__(self):
    return iter(self._tensors)

  def __contains__(self, name):
    return name in self._tensors

  def shape(self, name):
    return self._tensors[name].shape

  def dtype(self, name):
    return self._tensors[name].dtype

  def read(self, name, index=()):
    return self._tensors[name][index]


def small(name):
  """A decoder's switches with sizes that are all different."""
  cfg = DECODERS[name]
  kv_heads = 6 if cfg.heads == cfg.kv_heads else 3
  return dataclasses.replace(
    cfg, width=10, depth=2, heads=6, kv_heads=kv_heads, head_dim=4, mlp_dim=14, vocab_size=17
  )


@pytest.mark.parametrize("name", DECODERS)
def test_decoder_tables_give_every_number_back(name):
  cfg = small(name)
  shapes = hf_decoder.decoder_shapes(cfg)
  rng = np.random.default_rng(0)
  params = Tree({path: rng.normal(size=shape) for path, shape in shapes.items()})
  for table in (hf_decoder.rows(cfg), big_vision.SCANNED):
    wanted = list(slots(shapes, table))
    held = Held({output.name: output.make(params) for output in outputs(wanted, shapes)})
    for name_, array in held._tensors.items():
      held._tensors[name_] = array.astype(np.float32)
    back = arrays(Mapped(held, wanted, shapes))
    for path in shapes:
      np.testing.assert_array_equal(back[path], params.read(path).astype(np.float32), err_msg=path)


@pytest.mark.parametrize("name", DECODERS)
def test_configs_of_decoders_survive_the_way_to_transformers_and_back(name):
  cfg = DECODERS[name]
  fields = hf_decoder.hf_config(cfg)
  assert hf_decoder.decoder_config(fields, "config.json") == dataclasses.replace(
    cfg,
    pattern=cfg.pattern if len(set(cfg.pattern)) == 1 else cfg.layer_kinds(),
    query_scale=fields["query_pre_attn_scalar"] ** -0.5 if cfg.post_norms else cfg.query_scale,
  )


# --- Adapters ---------------------------------------------------------------------------------


def random_adapter(cfg, rank, paths, seed=0):
  rng = np.random.default_rng(seed)
  shapes = peft.adapter_shapes(cfg, rank, dict.fromkeys(paths))
  return {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}


@pytest.mark.parametrize("name", DECODERS)
def test_adapters_survive_the_peft_format_and_merge_as_their_product(name, tmp_path):
  cfg = small(name)
  shapes = hf_decoder.decoder_shapes(cfg)
  paths = [p for p in shapes if p.startswith("layers/attn/") and p.endswith("/w")]
  paths += ["layers/mlp/gating_einsum", "layers/mlp/linear"]
  adapter = random_adapter(cfg, 3, paths)
  peft.write_adapter(tmp_path, cfg, adapter, alpha=6)
  opened = peft.open_adapter(tmp_path, cfg)
  assert opened.scale == 2
  back = arrays(opened.params)
  assert back.keys() == adapter.keys()
  for path in adapter:
    np.testing.assert_array_equal(back[path], adapter[path], err_msg=path)

  rng = np.random.default_rng(1)
  base = {f"llm/{k}": rng.normal(size=v).astype(np.float32) for k, v in shapes.items()}
  merged = Merged(Tree(base), opened)
  # In their layout an adapter is B @ A, whatever the matrix.
  theirs = {o.name: o.make(Tree(adapter)) for o in outputs(
    slots(Tree(adapter).shapes, peft.rows(cfg)), Tree(adapter).shapes)}  # fmt: skip
  body = {path.removeprefix("llm/"): merged.read(path) for path in merged.shapes}
  before = {path.removeprefix("llm/"): array for path, array in base.items()}
  wanted = list(slots(shapes, hf_decoder.rows(cfg)))
  old = {o.name: o.make(Tree(before)) for o in outputs(wanted, shapes)}
  new = {o.name: o.make(Tree(body)) for o in outputs(wanted, shapes)}
  adapted = 0
  for tensor in old:
    stem = "base_model.model." + tensor.removesuffix(".weight")
    if f"{stem}.lora_A.weight" in theirs:
      delta = 2 * theirs[f"{stem}.lora_B.weight"] @ theirs[f"{stem}.lora_A.weight"]
      np.testing.assert_allclose(new[tensor], old[tensor] + delta, atol=1e-5, err_msg=tensor)
      adapted += 1
    else:
      np.testing.assert_array_equal(new[tensor], old[tensor], err_msg=tensor)
  assert adapted == 2 * 7


def test_an_adapter_of_some_matrices_leaves_the_others_alone(tmp_path):
  """PEFT's own choice is q_proj and v_proj; k_proj lies in one parameter of ours with v_proj."""
  cfg = small("qwen2-7b")
  adapter = random_adapter(cfg, 3, [f"layers/attn/{name}_einsum/w" for name in ("q", "kv")])
  peft.write_adapter(tmp_path, cfg, adapter, alpha=6)
  file = tmp_path / "adapter_model.safetensors"
  tensors = load_file(file)
  gone = [name for name in tensors if "k_proj" in name or "layers.0." in name]
  save_file({name: tensors[name] for name in tensors if name not in gone}, file)
  back = arrays(peft.open_adapter(tmp_path, cfg).params)
  for path, wanted in adapter.items():
    wanted[0] = 0
    if "kv_einsum" in path:
      wanted[:, 0] = 0
    np.testing.assert_array_equal(back[path], wanted, err_msg=path)
  (half,) = [name for name in tensors if "layers.1.self_attn.v_proj.lora_B" in name]
  save_file({name: tensors[name] for name in tensors if name not in [*gone, half]}, file)
  with pytest.raises(InputError, match=r"1 missing .*v_proj\.lora_B"):
    peft.open_adapter(tmp_path, cfg)


# --- The folder for PyTorch -------------------------------------------------------------------


@pytest.mark.parametrize("kind", torch_folder.CLASSES)
def test_the_code_of_a_torch_folder_imports_what_the_docs_name_and_nothing_else(kind):
  code = torch_folder.code(kind)
  needed = set()
  for name, text in code.items():
    for node in ast.parse(text).body:
      if isinstance(node, ast.ImportFrom) and node.level:
        assert f"{node.module}.py" in code, name
      elif isinstance(node, ast.ImportFrom):
        needed.add(node.module.split(".")[0])
      elif isinstance(node, ast.Import):
        needed |= {alias.name.split(".")[0] for alias in node.names}
  needed -= sys.stdlib_module_names
  more = {"einops"} if kind == "navit" else set()
  assert needed == {"torch", "transformers", "numpy", "av", "PIL", "tokenizers", "jinja2"} | more
