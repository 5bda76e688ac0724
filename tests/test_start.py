"""What a run starts from: models, weights of several sources, tokenizer files."""

import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from data_pipes.errors import InputError
from data_pipes.tokenizer import Tokenizer
from vr_jax.checkpoint import export, make_meta, make_tokenizer, read_tokenizer_files
from vr_jax.configs import base_config, load_config
from vr_jax.interop import videorefer as published
from vr_jax.interop.sources import open_source
from vr_jax.interop.table import Part, Safetensors, arrays
from vr_jax.models.variants import get_variant
from vr_jax.models.videorefer import init_params
from vr_jax.training.start import (
  fit_vocabulary,
  generation,
  model_config,
  starting_params,
  tokenizer_files,
)


def config_with(**fields):
  config = base_config()
  config.update(fields)
  return config


@pytest.fixture(scope="module")
def folder(golden):
  return golden / "tiny_videorefer_qwen2"


@pytest.fixture(scope="module")
def model(folder):
  """The tiny published model: (config, parameters, shapes)."""
  loaded = published.load(folder)
  cfg = loaded.config
  return cfg, loaded.params, jax.eval_shape(lambda k: init_params(cfg, k), jax.random.key(0))


@pytest.fixture(scope="module")
def checkpoint(folder, model, tmp_path_factory):
  """The same model as a checkpoint of ours."""
  path = tmp_path_factory.mktemp("ours") / "checkpoint"
  meta = make_meta(
    model[0].to_dict(), read_tokenizer_files(folder), {"eos_ids": [7], "pad_id": None}
  )
  export(path, jax.tree.map(np.asarray, model[1]), meta)
  return path


def assert_trees_equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_variant_with_fields_changed():
  cfg = model_config(
    config_with(model_name="vr-mini", model=(("llm.remat", "dots"), ("num_frames", 8)))
  )
  assert (cfg.name, cfg.llm.remat, cfg.num_frames) == ("vr-mini", "dots", 8)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({}, "model_name is not set; give a variant, or a checkpoint"),
    ({"model_name": "vr-mny"}, "'vr-mny' is not one of vr-mini"),
    ({"model_name": "vr-mini", "model": (("llm.dept", 3),)}, "no such field; did you mean 'depth'"),
    ({"model_name": "vr-mini", "model": (("llm.depth", 3.5),)}, "llm.depth=3.5: expected int"),
    ({"model_name": "vr-mini", "model": (("name.x", 1),)}, "'name' has no fields"),
  ],
)
def test_models_that_are_not_there(fields, message):
  with pytest.raises(InputError, match=message):
    model_config(config_with(**fields))


def test_a_checkpoint_of_ours_brings_its_model_tokenizer_and_settings(checkpoint, model, folder):
  config = config_with(model_init=(("", str(checkpoint)),))
  assert model_config(config) == model[0]
  assert tokenizer_files(config) == read_tokenizer_files(folder)
  tokenizer = make_tokenizer(tokenizer_files(config))
  assert len(tokenizer) == model[0].llm.vocab_size
  assert generation(config, tokenizer)["eos_ids"] == [7]
  assert_trees_equal(starting_params(config, model[2]), model[1])


def test_a_published_folder_does_too(folder, model):
  config = config_with(model_init=(("", str(folder)),))
  tokenizer = make_tokenizer(tokenizer_files(config))
  assert generation(config, tokenizer)["repetition_penalty"] == 1.05
  assert_trees_equal(starting_params(config, model[2]), model[1])


def test_answers_end_where_the_family_of_the_decoder_ends_a_turn(folder, tmp_path):
  """Gemma: config.json names <eos> alone, generation_config.json <end_of_turn> too, and so does the
  template; whatever part the folder is taken for."""
  gemma = tmp_path / "gemma"
  gemma.mkdir()
  for file in folder.glob("*token*"):
    shutil.copy(file, gemma)
  (gemma / "config.json").write_text('{"model_type": "gemma2", "eos_token_id": 1}')
  tokenizer = Tokenizer.from_folder(gemma)
  end = tokenizer.id_of("<|im_end|>")
  for part in ("llm", ""):
    config = config_with(model_init=(("img", str(tmp_path / "none")), (part, str(gemma))))
    assert generation(config, tokenizer)["eos_ids"] == (1, end)
  assert generation(config_with(tokenizer=str(gemma)), tokenizer)["eos_ids"] == (1, end)
  (gemma / "generation_config.json").write_text('{"eos_token_id": [1, 106]}')
  assert generation(config, tokenizer)["eos_ids"] == (1, 106, end)
  (gemma / "config.json").unlink()
  assert generation(config, tokenizer)["eos_ids"] == (1, 106, end)


def test_parts_come_from_different_sources_and_the_rest_stays_open(folder, checkpoint, model):
  config = config_with(
    model_init=(("img", str(folder / "siglip_vision_tower")), ("llm", str(checkpoint)))
  )
  params = starting_params(config, model[2])
  assert set(params) == {"img", "llm"}
  assert_trees_equal(params, {k: model[1][k] for k in ("img", "llm")})


def test_what_came_from_where_is_printed(folder, model, capsys):
  config = config_with(
    model_init=(("img", str(folder / "siglip_vision_tower")), ("region", str(folder)))
  )
  params = starting_params(config, model[2])
  assert_trees_equal(params, {k: model[1][k] for k in ("img", "region")})
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == 4
  by_part = {line.split()[1]: line for line in lines}
  assert "SigLIP folder; the first 3 of 4 layers" in by_part["img"]
  assert "published VideoRefer folder" in by_part["region"]
  assert by_part["llm"].endswith("from initialised")


def test_a_connector_of_a_published_stage_and_a_tower_of_another_grid(folder, model, tmp_path):
  """safetensors as the trainer's mm_projector.bin; a big_vision npz for the tower."""
  source = open_source(folder)
  names = [n for n in Safetensors(folder) if n.startswith("model.mm_projector.")]
  tensors = {n: Safetensors(folder).read(n) for n in names}
  save_file(tensors, tmp_path / "mm_projector.safetensors")
  tower = {f"img/{k}": v for k, v in arrays(Part(source.params, "img/"), "float32").items()}
  fine = np.random.default_rng(0).normal(size=(1, 64, 64)).astype(np.float32)
  np.savez(tmp_path / "tower.npz", **(tower | {"img/pos_embedding": fine}))
  config = config_with(
    model_init=(
      ("connector", str(tmp_path / "mm_projector.safetensors")),
      ("img", str(tmp_path / "tower.npz")),
    )
  )
  params = starting_params(config, model[2])
  assert_trees_equal(params["connector"], model[1]["connector"])
  assert params["img"]["pos_embedding"].shape == (1, 16, 64)
  np.testing.assert_array_equal(params["img"]["pos_embedding"][0, [0, -1]], fine[0, [0, -1]])


def test_what_dont_load_names_stays_open(folder, model):
  config = config_with(model_init=(("", str(folder)),), dont_load=("connector/.*", "region/fc1/.*"))
  params = starting_params(config, model[2])
  assert set(params) == {"img", "llm", "region"}
  assert set(params["region"]) == {"fc2"}


def test_a_rule_of_dont_load_that_matches_nothing_is_refused(folder, model):
  config = config_with(model_init=(("", str(folder)),), dont_load=("llm/embeder/.*",))
  with pytest.raises(InputError) as error:
    starting_params(config, model[2])
  assert str(error.value) == (
    "config.dont_load: rule llm/embeder/.* matches no parameter; did you mean llm/embedder/.*?"
  )


def test_a_packaged_name_works_and_the_model_is_the_checkpoints(folder, model, tmp_path):
  config = load_config("transfer_lora:init=vr-mini,rank=8")
  cfg = model_config(config)
  assert (cfg.name, cfg.llm.lora_rank, cfg.llm.width) == (
    "vr-mini",
    8,
    get_variant("vr-mini").llm.width,
  )
  assert tokenizer_files(config)
  assert model_config(load_config(f"transfer_lora:init={folder}")).llm.width == model[0].llm.width
  assert model_config(load_config("transfer_lora:init=nowhere")).llm.width == 3584
  assert open_source("vr-mini").whole


def test_weights_that_do_not_fit_are_listed(folder):
  other = model_config(config_with(model_name="vr-mini"))
  shapes = jax.eval_shape(lambda k: init_params(other, k), jax.random.key(0))
  with pytest.raises(InputError, match=r"region/fc1/kernel has shape \[64, 128\] instead of"):
    starting_params(config_with(model_init=(("region", str(folder)),)), shapes)
  with pytest.raises(
    InputError, match=r"llm/embedder/output_embedding is not expected|and \d+ more"
  ):
    starting_params(config_with(model_init=(("", str(folder)),)), shapes)


@pytest.mark.parametrize(
  ("init", "message"),
  [
    ((("", "nowhere"),), "nowhere: no such file or folder; accepted: a checkpoint of vr_jax, a"),
    ((("tower", "nowhere"),), "part 'tower': accepted: img, connector, region, llm"),
  ],
)
def test_sources_that_are_none(init, message, model):
  with pytest.raises(InputError, match=message):
    starting_params(config_with(model_init=init), model[2])


def test_a_decoder_gets_the_rows_of_the_model():
  table = np.arange(12, dtype=np.float32).reshape(6, 2)
  for rows in (4, 6, 8):
    found = {"llm/embedder/input_embedding": table}
    fit_vocabulary(found, {"llm/embedder/input_embedding": np.empty((rows, 2))})
    fitted = found["llm/embedder/input_embedding"]
    np.testing.assert_array_equal(fitted[:6], table[:rows])
    np.testing.assert_array_equal(fitted[6:], np.repeat([[5, 6]], max(0, rows - 6), axis=0))


def test_no_tokenizer_is_said_plainly(tmp_path):
  with pytest.raises(InputError, match=r"config.tokenizer is not set"):
    tokenizer_files(config_with())
  with pytest.raises(InputError, match="no tokenizer files"):
    tokenizer_files(config_with(tokenizer=str(tmp_path)))
