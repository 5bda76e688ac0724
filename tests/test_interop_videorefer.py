"""Published folders: the golden one, folders of other shapes, and what is wrong with bad ones."""

import dataclasses
import json
import shutil

import flax
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from data_pipes.errors import InputError
from vr_jax.interop import hf_tower, videorefer
from vr_jax.interop.generation import Generation
from vr_jax.interop.table import Safetensors, collect, slots
from vr_jax.models.connector import KINDS, ConnectorConfig
from vr_jax.models.decoder import DecoderConfig
from vr_jax.models.region import RegionConfig
from vr_jax.models.siglip import SiglipConfig
from vr_jax.models.videorefer import VideoReferConfig, init_params

TOWER_NAMES = "model.vision_tower.vision_tower."


def flat(tree):
  return flax.traverse_util.flatten_dict(tree, sep="/")


def assert_same(ours, theirs):
  assert flat(ours).keys() == flat(theirs).keys()
  for path, array in flat(ours).items():
    np.testing.assert_array_equal(array, flat(theirs)[path], err_msg=path)


# --- The golden folder ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published():
  from conftest import GOLDEN

  return videorefer.load(GOLDEN / "tiny_videorefer_qwen2")


def test_golden_config(golden, published):
  assert videorefer.is_published(golden / "tiny_videorefer_qwen2")
  assert not videorefer.is_published(golden / "towers/siglip_full_72")
  assert not videorefer.is_published(golden)
  cfg = published.config
  assert cfg.img == SiglipConfig(
    image_size=56, patch_size=14, width=64, depth=4, heads=4, mlp_dim=112, select_layer=-2
  )
  assert cfg.connector == ConnectorConfig(kind="stc_connector_v35", width=128)
  assert cfg.region == RegionConfig(width=128, tokens=4)
  assert (cfg.num_frames, cfg.image_aspect_ratio, cfg.max_text_ids) == (16, "square", 2048)
  llm = cfg.llm
  assert (llm.width, llm.depth, llm.heads, llm.kv_heads, llm.head_dim) == (128, 3, 4, 2, 32)
  assert (llm.mlp_dim, llm.vocab_size, llm.rope_base, llm.norm_eps) == (160, 1004, 1e6, 1e-6)
  assert (llm.qkv_bias, llm.tied_head, llm.norm_plus_one, llm.scale_embedding) == (1, 0, 0, 0)
  assert published.generation == Generation((1002, 1000), 1000, 1.05)


def test_golden_parameters_go_back_to_the_same_tensors(golden, published):
  tensors = Safetensors(golden / "tiny_videorefer_qwen2")
  back = videorefer.to_published(published.config, published.params)
  for name, array in back.items():
    np.testing.assert_array_equal(array, tensors.read(name).astype(np.float32), err_msg=name)
    assert array.flags.c_contiguous
  skipped = {name for name in published.skipped if not name.startswith("siglip_vision_tower:")}
  assert set(back) | skipped == set(tensors)
  assert not set(back) & skipped
  assert all(".encoder.layers.3." in n or ".head." in n or ".post_" in n for n in skipped)
  (note,) = published.notes
  assert "siglip_vision_tower" in note
  assert note.endswith("holds the same weights")


def test_bfloat16_parameters_hold_the_file_exactly(golden, published):
  half = videorefer.load(golden / "tiny_videorefer_qwen2", dtype="bfloat16").params
  assert {x.dtype for x in jax.tree.leaves(half)} == {np.dtype(ml_dtypes.bfloat16)}
  assert_same(jax.tree.map(lambda x: x.astype(np.float32), half), published.params)


@pytest.mark.parametrize("select_layer", [-1, 0, 2, None])
def test_standalone_tower_goes_back_to_the_same_tensors(golden, select_layer):
  folder = golden / "towers/siglip_full_72"
  cfg, params = hf_tower.load_tower(folder, select_layer, pool=select_layer is None)
  assert (cfg.width, cfg.heads, cfg.depth, cfg.image_size, cfg.grid) == (48, 3, 3, 72, 5)
  shapes = {path: array.shape for path, array in flat(params).items()}
  back = collect(params, slots(shapes, hf_tower.ROWS, theirs="vision_model."))
  tensors = Safetensors(folder)
  for name, array in back.items():
    np.testing.assert_array_equal(array, tensors.read(name), err_msg=name)
  if select_layer is None:
    assert set(back) == {name for name in tensors if name.startswith("vision_model.")}


def test_vision_half_without_prefix(golden, tmp_path):
  source = golden / "towers/siglip_full_72"
  tensors = Safetensors(source)
  vision = {n: tensors.read(n) for n in tensors if n.startswith("vision_model.")}
  save_file(
    {n.removeprefix("vision_model."): t for n, t in vision.items()}, tmp_path / "a.safetensors"
  )
  fields = json.loads((source / "config.json").read_text())["vision_config"]
  (tmp_path / "config.json").write_text(json.dumps(fields))
  assert_same(hf_tower.load_tower(tmp_path)[1], hf_tower.load_tower(source)[1])


def test_connector_alone_and_in_the_checkpoint(golden, published):
  _, params = videorefer.load_connector(golden / "tiny_videorefer_qwen2", "stc_connector_v35")
  assert_same(params, published.params["connector"])
  file = golden / "projectors/linear.safetensors"
  cfg, params = videorefer.load_connector(file, "linear")
  assert cfg.width == 40
  assert params["readout"]["fc1"]["kernel"].shape == (24, 40)
  with pytest.raises(InputError, match=r"kind mlp2x_gelu needs the tensor 0\.weight"):
    videorefer.load_connector(file, "mlp2x_gelu")
  with pytest.raises(InputError, match="'mlp9x_gelu'"):
    videorefer.load_connector(file, "mlp9x_gelu")


# --- Folders of other shapes ------------------------------------------------------------------


def model(kind="linear", *, heads=6, kv_heads=3, tied=False, select_layer=-2, aspect="pad"):
  width = 24 if kind.startswith("spatial") else 48
  return VideoReferConfig(
    name="published",
    img=SiglipConfig(
      image_size=31,
      patch_size=7,
      width=24,
      depth=3,
      heads=2,
      mlp_dim=20,
      select_layer=select_layer,
    ),
    connector=ConnectorConfig(kind=kind, width=width),
    region=RegionConfig(width=width),
    llm=DecoderConfig(
      width=width,
      depth=2,
      heads=heads,
      kv_heads=kv_heads,
      head_dim=width // heads,
      mlp_dim=36,
      vocab_size=50,
      activation="silu",
      norm_eps=1e-5,
      norm_plus_one=False,
      scale_embedding=False,
      tied_head=tied,
      qkv_bias=True,
      rope_base=5e5,
    ),
    num_frames=4,
    image_aspect_ratio=aspect,
    max_text_ids=300,
  )


def random_params(cfg, seed=0):
  """Values that float16 and bfloat16 hold exactly."""
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(lambda key: init_params(cfg, key), jax.random.key(0))
  return jax.tree.map(lambda s: rng.integers(-128, 128, s.shape).astype(np.float32) / 64, shapes)


def config_json(cfg):
  llm = cfg.llm
  return {
    "model_type": "videorefer_qwen2",
    "hidden_size": llm.width,
    "num_hidden_layers": llm.depth,
    "num_attention_heads": llm.heads,
    "num_key_value_heads": llm.kv_heads,
    "intermediate_size": llm.mlp_dim,
    "vocab_size": llm.vocab_size,
    "rms_norm_eps": llm.norm_eps,
    "rope_theta": llm.rope_base,
    "tie_word_embeddings": llm.tied_head,
    "mm_vision_tower": "towers/siglip-tiny-patch7-31",
    "mm_hidden_size": cfg.img.width,
    "mm_vision_select_layer": cfg.img.select_layer,
    "mm_projector_type": cfg.connector.kind,
    "num_frames": cfg.num_frames,
    "image_aspect_ratio": cfg.image_aspect_ratio,
    "tokenizer_model_max_length": cfg.max_text_ids,
    "eos_token_id": 7,
  }


def whole_tower(cfg, params):
  """The tower's tensors under published names, with the layers and the norm that do not run."""
  shapes = {f"img/{k}": v.shape for k, v in flat(params["img"]).items()}
  tensors = collect({"img": params["img"]}, slots(shapes, hf_tower.ROWS, "img/", "vision_model."))
  layer = "vision_model.encoder.layers.{}."
  first = {n: t for n, t in tensors.items() if n.startswith(layer.format(0))}
  for i in range(cfg.img.layers, cfg.img.depth):
    tensors |= {n.replace(layer.format(0), layer.format(i)): 0 * t for n, t in first.items()}
  tensors["vision_model.post_layernorm.weight"] = np.ones(cfg.img.width, np.float32)
  tensors["vision_model.post_layernorm.bias"] = np.zeros(cfg.img.width, np.float32)
  return tensors


def write(folder, cfg, params, *, shards=1, dtype=np.float32, beside=True, inside=True, extra=()):
  """A published folder: the tower beside it, inside the shards, or both."""
  tensors = videorefer.to_published(cfg, params)
  tower = whole_tower(cfg, params)
  tensors = {n: t for n, t in tensors.items() if not n.startswith(TOWER_NAMES)} | dict(extra)
  if inside:
    tensors |= {TOWER_NAMES + name: tensor for name, tensor in tower.items()}
  tensors = {name: np.ascontiguousarray(t.astype(dtype)) for name, t in tensors.items()}
  folder.mkdir(exist_ok=True)
  (folder / "config.json").write_text(json.dumps(config_json(cfg)))
  names = sorted(tensors)
  if shards == 1:
    save_file(tensors, folder / "model.safetensors")
  else:
    weight_map = {}
    for i in range(shards):
      file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
      save_file({n: tensors[n] for n in names[i::shards]}, folder / file)
      weight_map |= dict.fromkeys(names[i::shards], file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  if beside:
    img = cfg.img
    at = folder / "towers/siglip-tiny-patch7-31"
    at.mkdir(parents=True, exist_ok=True)
    save_file({n: np.ascontiguousarray(t) for n, t in tower.items()}, at / "model.safetensors")
    fields = {
      "model_type": "siglip_vision_model",
      "hidden_size": img.width,
      "image_size": img.image_size,
      "patch_size": img.patch_size,
      "num_hidden_layers": img.depth,
      "num_attention_heads": img.heads,
      "intermediate_size": img.mlp_dim,
    }
    (at / "config.json").write_text(json.dumps(fields))
  return folder


@pytest.mark.parametrize(
  ("cfg", "how"),
  [
    (model("stc_connector_v35"), {"shards": 3, "dtype": np.float16}),
    (model("stp_connector", heads=4, kv_heads=4, tied=True), {"dtype": ml_dtypes.bfloat16}),
    (model("spatial_conv", kv_heads=1, select_layer=-1, aspect="square"), {"inside": False}),
    (model("spatial_pool", select_layer=1), {"shards": 2}),
    (model("mlp2x_gelu", heads=4, kv_heads=2, tied=True), {"shards": 2, "inside": False}),
    (model("linear", heads=3, kv_heads=3), {}),
  ],
  ids=lambda value: value.connector.kind if isinstance(value, VideoReferConfig) else "",
)
def test_folders_of_other_shapes_load(tmp_path, cfg, how):
  params = random_params(cfg)
  loaded = videorefer.load(write(tmp_path / "published", cfg, params, **how))
  assert loaded.config == cfg
  assert_same(loaded.params, params)
  assert loaded.generation == Generation((7,))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("kv_heads", "tied"), [(3, False), (6, True)])
def test_the_table_covers_every_parameter_once(kind, kv_heads, tied):
  cfg = model(kind, kv_heads=kv_heads, tied=tied)
  shapes = jax.eval_shape(lambda key: init_params(cfg, key), jax.random.key(0))
  shapes = {path: s.shape for path, s in flat(shapes).items()}
  cover = {path: np.zeros(shape, int) for path, shape in shapes.items()}
  names = []
  for slot in videorefer.model_slots(cfg, shapes):
    cover[slot.ours][slot.at] += 1
    names.append((slot.theirs, slot.part))
  assert all((array == 1).all() for array in cover.values())
  assert len(names) == len(set(names))


def test_tower_from_the_shards_alone(tmp_path):
  cfg = model()
  cfg = dataclasses.replace(cfg, img=dataclasses.replace(cfg.img, width=128))
  params = random_params(cfg)
  loaded = videorefer.load(write(tmp_path / "published", cfg, params, beside=False))
  assert loaded.config == cfg
  assert_same(loaded.params, params)
  assert "from the shards" in loaded.notes[0]
  assert "image size 31 (from its name), 2 heads (assumed" in loaded.notes[1]


def test_tower_from_the_shards_whose_heads_cannot_be_told(tmp_path):
  cfg = model()
  folder = write(tmp_path / "published", cfg, random_params(cfg), beside=False)
  with pytest.raises(InputError, match=r"heads of a tower of width 24.*mm_vision_tower"):
    videorefer.load(folder)


def test_towers_that_differ_are_reported_and_the_shards_are_taken(tmp_path):
  cfg = model()
  params, other = random_params(cfg), random_params(cfg, seed=1)
  folder = write(tmp_path / "published", cfg, params)
  write(tmp_path / "other", cfg, params | {"img": other["img"]})
  shutil.copytree(tmp_path / "other/towers", folder / "towers", dirs_exist_ok=True)
  loaded = videorefer.load(folder)
  assert "a copy that differs in" in loaded.notes[0]
  assert_same(loaded.params["img"], params["img"])


def test_a_tied_head_may_be_saved_twice(tmp_path):
  cfg = model(tied=True)
  params = random_params(cfg)
  copy = {"lm_head.weight": params["llm"]["embedder"]["input_embedding"]}
  loaded = videorefer.load(write(tmp_path / "published", cfg, params, extra=copy))
  assert "lm_head.weight" in loaded.skipped
  assert_same(loaded.params, params)


# --- What is wrong with bad ones --------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
  cfg = model()
  return write(tmp_path / "published", cfg, random_params(cfg))


def edit(folder, **fields):
  file = folder / "config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_every_tensor_that_does_not_fit_is_named_at_once(tmp_path):
  cfg = model()
  params = random_params(cfg)
  folder = write(tmp_path / "published", cfg, params)
  tensors = {name: Safetensors(folder).read(name) for name in Safetensors(folder)}
  del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
  tensors["model.extra.weight"] = np.zeros(3, np.float32)
  tensors["model.mm_projector.bias"] = np.zeros(47, np.float32)
  tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.int8)
  save_file(tensors, folder / "model.safetensors")
  with pytest.raises(InputError) as error:
    videorefer.load(folder)
  text = str(error.value)
  assert "\n" not in text
  assert "2 missing (" in text
  assert "model.layers.1.mlp.up_proj.weight" in text
  assert "model.norm.weight, nearest model.extra.weight" in text
  assert "1 unexpected (model.extra.weight)" in text
  assert "1 mis-shaped (model.mm_projector.bias [47] instead of [48])" in text
  assert "lm_head.weight I8" in text


@pytest.mark.parametrize(
  ("fields", "says"),
  [
    ({"model_type": "llava"}, "model_type='llava'.*videorefer_qwen2"),
    ({"mm_projector_type": "mlp3x_gelu"}, "mm_projector_type='mlp3x_gelu'.*mlp2x_gelu"),
    ({"hidden_size": "48"}, "hidden_size='48', expected int"),
    ({"hidden_size": None}, "hidden_size=None, expected int"),
    ({"num_hidden_layers": 3}, r"missing .*model\.layers\.2"),
    ({"num_hidden_layers": 1}, r"unexpected .*model\.layers\.1"),
    ({"vocab_size": 51}, r"model\.embed_tokens\.weight \[50, 48\] instead of \[51, 48\]"),
    ({"mm_hidden_size": 25}, "mm_hidden_size=25.*24"),
    ({"mm_vision_select_layer": -9}, "select_layer=-9"),
    ({"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
    ({"use_sliding_window": True}, "use_sliding_window=True"),
    ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio='anyres'"),
    ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature"),
  ],
)
def test_configs_that_do_not_fit(folder, fields, says):
  edit(folder, **fields)
  with pytest.raises(InputError, match=says):
    videorefer.load(folder)


def test_files_that_are_broken_or_absent(folder, tmp_path):
  with pytest.raises(InputError, match="no such file"):
    videorefer.load(tmp_path / "nowhere")
  file = folder / "model.safetensors"
  whole = file.read_bytes()
  for length in (0, 100, len(whole) - 10):
    file.write_bytes(whole[:length])
    with pytest.raises(InputError, match=r"model\.safetensors: not a complete safetensors file"):
      videorefer.load(folder)
  file.unlink()
  with pytest.raises(InputError, match=r"expected a \.safetensors file"):
    videorefer.load(folder)
  (folder / "pytorch_model.bin").write_bytes(b"")
  with pytest.raises(InputError, match=r"found pytorch_model\.bin"):
    videorefer.load(folder)
  (folder / "config.json").write_text("{")
  with pytest.raises(InputError, match="not JSON"):
    videorefer.load(folder)


def test_a_shard_that_is_not_there(tmp_path):
  cfg = model()
  folder = write(tmp_path / "published", cfg, random_params(cfg), shards=3)
  (folder / "model-00002-of-00003.safetensors").unlink()
  with pytest.raises(InputError, match="not there: model-00002-of-00003"):
    videorefer.load(folder)


def test_no_tower_at_all_and_a_tower_of_another_kind(tmp_path):
  cfg = model()
  folder = write(tmp_path / "published", cfg, random_params(cfg), inside=False)
  config = folder / "towers/siglip-tiny-patch7-31/config.json"
  fields = json.loads(config.read_text())
  for wrong, says in [
    ({"model_type": "clip_vision_model"}, "clip_vision_model"),
    ({"layer_norm_eps": 1e-5}, "layer_norm_eps"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"num_hidden_layers": 2}, r"unexpected .*encoder\.layers\.2"),
  ]:
    config.write_text(json.dumps(fields | wrong))
    with pytest.raises(InputError, match=says):
      videorefer.load(folder)
  shutil.rmtree(folder / "towers")
  with pytest.raises(InputError, match="no vision tower"):
    videorefer.load(folder)
