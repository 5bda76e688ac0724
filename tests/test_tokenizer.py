"""Tokenizer and chat template against the published ones (golden json/prompts.json)."""

import json
import shutil

import pytest

from data_pipes.errors import InputError
from data_pipes.tokenizer import REGION, Tokenizer

FOLDER = "tiny_videorefer_qwen2"


@pytest.fixture(scope="module")
def published(golden):
  return json.loads((golden / "json/prompts.json").read_text())


@pytest.fixture(scope="module", params=["tokenizer.json", "vocab.json and merges.txt", "old files"])
def tokenizer(request, golden, tmp_path_factory):
  """The same tokenizer from each set of files that published folders hold."""
  folder = tmp_path_factory.mktemp("tokenizer")
  shutil.copytree(golden / FOLDER, folder, dirs_exist_ok=True)
  if request.param != "tokenizer.json":
    (folder / "tokenizer.json").unlink()
  if request.param == "old files":  # added tokens in a file of their own
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["added_tokens_decoder"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
  return Tokenizer.from_folder(folder)


def test_encode_and_decode_equal_the_published_tokenizers(tokenizer, published):
  for case in published["tokenizer"]:
    assert tokenizer.encode(case["text"]) == case["slow"]
    assert case["fast"] == "same"
    assert tokenizer.decode(case["slow"]) == case["decode"]
    assert tokenizer.decode(case["slow"], skip_special=True) == case["decode_skip_special"]


def test_any_ids_decode_as_published(tokenizer, published):
  for case in published["decode_random_ids"]:
    assert tokenizer.decode(case["ids"]) == case["text"]
    assert tokenizer.decode(case["ids"], skip_special=True) == case["skip_special"]
    assert tokenizer.decode(case["ids"], skip_special=True).strip() == case["strip"]


def test_special_ids(tokenizer, published):
  special = published["special"]
  assert tokenizer.eos_id == special["eos"][1]
  assert tokenizer.pad_id == special["pad"][1]
  assert tokenizer.bos_id is None
  assert tokenizer.region_id == special["region"]
  assert len(tokenizer) == special["len_tokenizer"]
  assert tokenizer.id_of(special["eos"][0]) == special["eos"][1]


def test_chat_template(tokenizer, published):
  for case in published["chat_template"]:
    assert tokenizer.render(case["messages"], case["add_generation_prompt"]) == case["text"]


def test_region_is_added_as_the_next_free_id(golden, tmp_path):
  config = json.loads((golden / FOLDER / "tokenizer_config.json").read_text())
  del config["added_tokens_decoder"]["1003"]
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  tokens = json.loads((golden / FOLDER / "tokenizer.json").read_text())
  tokens["added_tokens"] = [t for t in tokens["added_tokens"] if t["content"] != REGION]
  (tmp_path / "tokenizer.json").write_text(json.dumps(tokens))
  tokenizer = Tokenizer.from_folder(tmp_path)
  assert tokenizer.region_id == 1003
  assert len(tokenizer) == 1004
  assert tokenizer.encode(f"a{REGION}b") == [64, 1003, 65]


def test_templates_see_what_published_ones_use(golden, tmp_path):
  shutil.copytree(golden / FOLDER, tmp_path, dirs_exist_ok=True)
  (tmp_path / "chat_template.jinja").write_text(
    "{% for m in messages %}\n"
    "  {% if m.role not in ['user', 'assistant'] %}\n"
    "    {{ raise_exception('no ' + m.role) }}\n"
    "  {% endif %}\n"
    "{{ m.content | trim }}{{ eos_token }}\n"
    "{% endfor %}\n"
  )
  tokenizer = Tokenizer.from_folder(tmp_path)
  # trim_blocks and lstrip_blocks: lines of statements leave nothing.
  assert tokenizer.render([{"role": "user", "content": " hi "}]) == "hi<|im_end|>\n"
  with pytest.raises(InputError, match="no system"):
    tokenizer.render([{"role": "system", "content": "x"}])


def test_a_template_can_not_change_what_it_is_given(golden, tmp_path):
  shutil.copytree(golden / FOLDER, tmp_path, dirs_exist_ok=True)
  (tmp_path / "chat_template.jinja").write_text("{{ messages.append(1) }}")
  with pytest.raises(InputError, match="refuses"):
    Tokenizer.from_folder(tmp_path).render([{"role": "user", "content": "hi"}])


def test_defective_folders_are_named(golden, tmp_path):
  (tmp_path / "tokenizer.model").write_bytes(b"sentencepiece")
  with pytest.raises(
    InputError, match=r"tokenizer\.model \(sentencepiece\) alone is not read; put"
  ):
    Tokenizer.from_folder(tmp_path)
  (tmp_path / "tokenizer.model").unlink()
  with pytest.raises(InputError, match=r"no tokenizer; tokenizer\.json, or vocab\.json"):
    Tokenizer.from_folder(tmp_path)
  (tmp_path / "tokenizer.json").write_text("{")
  with pytest.raises(InputError, match=r"tokenizer\.json: not a tokenizer file"):
    Tokenizer.from_folder(tmp_path)
  shutil.copytree(golden / FOLDER, tmp_path, dirs_exist_ok=True)
  (tmp_path / "tokenizer_config.json").write_text("[")
  with pytest.raises(InputError, match=r"tokenizer_config\.json: not JSON"):
    Tokenizer.from_folder(tmp_path)


def test_lists_that_disagree_on_an_id_are_refused(golden, tmp_path):
  shutil.copytree(golden / FOLDER, tmp_path, dirs_exist_ok=True)
  config = json.loads((tmp_path / "tokenizer_config.json").read_text())
  config["added_tokens_decoder"]["1007"] = config["added_tokens_decoder"].pop("1003")
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  with pytest.raises(InputError, match="'<region>' has id 1003 by the vocabulary and 1007"):
    Tokenizer.from_folder(tmp_path)


def test_no_template_is_said(golden, tmp_path):
  shutil.copytree(golden / FOLDER, tmp_path, dirs_exist_ok=True)
  config = json.loads((tmp_path / "tokenizer_config.json").read_text())
  del config["chat_template"]
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  with pytest.raises(InputError, match="no chat template"):
    Tokenizer.from_folder(tmp_path).render([{"role": "user", "content": "hi"}])


@pytest.mark.torch
def test_equal_to_transformers_on_the_same_files(golden, published):
  transformers = pytest.importorskip("transformers")
  theirs = transformers.AutoTokenizer.from_pretrained(golden / FOLDER)
  ours = Tokenizer.from_folder(golden / FOLDER)
  for case in published["tokenizer"]:
    assert ours.encode(case["text"]) == theirs(case["text"], add_special_tokens=False)["input_ids"]
  for case in published["chat_template"]:
    text = theirs.apply_chat_template(
      case["messages"], tokenize=False, add_generation_prompt=case["add_generation_prompt"]
    )
    assert ours.render(case["messages"], case["add_generation_prompt"]) == text
