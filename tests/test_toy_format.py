"""A foreign format is one file and one line of `sources.FORMATS`: a toy one, registered here."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from test_interop_videorefer import model, random_params

import vr_jax
from data_pipes.errors import InputError
from vr_jax.checkpoint import find_tokenizer_files, load_for_inference
from vr_jax.interop import sources
from vr_jax.interop.convert import convert
from vr_jax.interop.fields import read_json
from vr_jax.interop.npz import Npz
from vr_jax.interop.source import Source
from vr_jax.interop.table import DENSE, SAME, Mapped, Row, collect, slots
from vr_jax.interop.videorefer import model_shapes
from vr_jax.models.videorefer import PARTS, VideoReferConfig

# --- What a new file in vr_jax/interop would hold ---------------------------------------------

ROWS = [
  Row("llm/embedder/input_embedding", "words", DENSE),
  Row("llm/layers/(.*)", r"block.{l}.\1", SAME),
  Row("(.*)", r"rest.\1", SAME),
]


def is_toy(path):
  return (path / "toy.json").is_file()


def open_toy(path):
  fields = read_json(path / "toy.json")
  cfg = VideoReferConfig.from_dict(fields["model"])
  shapes = model_shapes(cfg)
  return Source(
    kind="toy folder",
    path=path,
    parts={part: getattr(cfg, part) for part in PARTS},
    params=Mapped(Npz(path / "weights.npz"), slots(shapes, ROWS), shapes),
    settings={key: value for key, value in fields["model"].items() if key not in PARTS},
    tokenizer_files=find_tokenizer_files(path),
    generation={"eos_ids": [1002]},
  )


TOY = sources.Format("a toy folder", open_toy, is_toy)

# ----------------------------------------------------------------------------------------------


@pytest.fixture
def registered(monkeypatch):
  monkeypatch.setattr(sources, "FORMATS", (*sources.FORMATS, TOY))


@pytest.fixture
def toy(golden, tmp_path):
  """(a folder in the toy format, its parameters)."""
  cfg = model("linear", heads=4, kv_heads=2)
  cfg = dataclasses.replace(cfg, llm=dataclasses.replace(cfg.llm, vocab_size=1004))
  params = random_params(cfg)
  folder = tmp_path / "toy"
  folder.mkdir()
  (folder / "toy.json").write_text(json.dumps({"model": cfg.to_dict()}))
  np.savez(folder / "weights.npz", **collect(params, slots(model_shapes(cfg), ROWS)))
  for name, content in find_tokenizer_files(golden / "tiny_videorefer_qwen2").items():
    (folder / name).write_bytes(content)
  return folder, params


def test_vr_convert_reads_it(registered, toy, tmp_path):
  folder, params = toy
  parity = convert(folder, tmp_path / "out", "vr", logits="never", report=lambda line: None)
  assert parity["source"]["kind"] == "toy folder"
  assert parity["bit_identical"]
  jax.tree.map(np.testing.assert_array_equal, load_for_inference(tmp_path / "out").params, params)


def test_a_model_loads_from_it_and_answers(registered, toy):
  picture = np.zeros((40, 48, 3), np.uint8)
  answer = vr_jax.load(toy[0]).ask([picture], "What is this?", max_new_tokens=2)
  assert len(answer.token_ids) == 2


def test_messages_name_it(registered, tmp_path):
  with pytest.raises(InputError, match=r"no such file or folder; accepted: .*, a toy folder$"):
    sources.open_source(tmp_path / "absent")


def test_without_its_line_it_is_unknown(toy):
  with pytest.raises(InputError, match=r"holds added_tokens\.json, .*; accepted: "):
    sources.open_source(toy[0])
