"""Dialogues, label masks and questions against the published ids (golden prompts, forward, 07)."""

import json

import numpy as np
import pytest

from data_pipes import prompts
from data_pipes.errors import InputError
from data_pipes.prompts import IGNORE, Text, Turn
from data_pipes.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(golden):
  return Tokenizer.from_folder(golden / "tiny_videorefer_qwen2")


@pytest.fixture(scope="module")
def published(golden):
  return json.loads((golden / "json/prompts.json").read_text())


def _turns(messages):
  return [Turn(m["from"], m["value"]) for m in messages]


def test_pieces_around_a_tag_are_tokenised_alone(tokenizer, published):
  for case in published["tokenizer_multimodal_token"]:
    assert prompts.tokenize(case["text"], tokenizer, case["modal_token"]) == case["ids"]


def test_tag_moves_to_the_head_of_its_turn(published):
  for case in published["train_preprocess"]:
    moved = prompts.tag_to_head(_turns(case["conversations"]), case["modal_token"])
    assert moved == _turns(case["after_preprocess_multimodal"])


def test_templated_dialogues(tokenizer, published):
  compared = 0
  for case in published["train_preprocess"]:
    if "error" in case:
      continue
    text = prompts.dialogue_text(_turns(case["conversations"]), tokenizer, case["modal_token"])
    assert text.ids.tolist() == case["input_ids"]
    assert text.labels.tolist() == case["labels"]
    supervised = text.labels[text.labels != IGNORE]
    assert tokenizer.decode(supervised) == case["supervised_text"]
    compared += 1
  assert compared == 12


def test_plain_dialogues(tokenizer, published):
  compared = 0
  for case in published["train_preprocess"]:
    if "plain" in case:
      text = prompts.plain_text(_turns(case["conversations"]), tokenizer, case["modal_token"])
      assert text.ids.tolist() == case["plain"]["input_ids"]
      assert text.labels.tolist() == case["plain"]["labels"]
      compared += 1
  assert compared >= 5


def test_dialogues_that_upstream_refuses_are_refused(tokenizer, published):
  refused = [case for case in published["train_preprocess"] if "error" in case]
  assert refused
  for case in refused:
    with pytest.raises(InputError, match="accepted: human, gpt"):
      prompts.dialogue_text(_turns(case["conversations"]), tokenizer, case["modal_token"])


@pytest.mark.parametrize(
  "roles", [[], ["gpt"], ["gpt", "gpt", "human"], ["human", "human"], ["human", "gpt", "human"]]
)
def test_messages_alternate(tokenizer, roles):
  turns = [Turn(role, "<video>") for role in roles]
  with pytest.raises(InputError, match="accepted: human, gpt"):
    prompts.dialogue_text(turns, tokenizer, "<video>")


def test_plain_needs_one_question_with_the_tag(tokenizer):
  question, answer = Turn("human", "<video>\nq"), Turn("gpt", "a")
  for turns, tag in (
    ([question, answer, question, answer], "<video>"),
    ([Turn("human", "q"), answer], "<video>"),
    ([question, answer], None),
  ):
    with pytest.raises(InputError, match="without template"):
      prompts.plain_text(turns, tokenizer, tag)


def test_batches_hold_the_ids_of_training(tokenizer, golden):
  """The ids that upstream's dataset and collator gave the model, right-padded."""
  items = json.loads((golden / "data/train.json").read_text())
  arrays = np.load(golden / "arrays/05_forward_rows.npz")
  stages = json.loads((golden / "cases.json").read_text())["stages"]
  cases = next(s["cases"] for s in stages if s["stage"] == "05_forward")
  compared = 0
  for case in (c for c in cases if c["id"].startswith("b_")):
    for row, item in enumerate(case["meta"]["train_json_ids"]):
      tag = "<video>" if "video" in items[item] else "<image>" if "image" in items[item] else None
      text = prompts.dialogue_text(_turns(items[item]["conversations"]), tokenizer, tag)
      used = int(arrays[f"{case['id']}/attention_mask"][row].sum())
      assert used == len(text.ids)
      np.testing.assert_array_equal(text.ids, arrays[f"{case['id']}/input_ids"][row, :used])
      np.testing.assert_array_equal(text.labels, arrays[f"{case['id']}/labels"][row, :used])
      compared += 1
  assert compared == 17


def test_questions_of_inference(tokenizer, golden):
  arrays = np.load(golden / "arrays/07_generate_ids.npz")
  stages = json.loads((golden / "cases.json").read_text())["stages"]
  cases = next(s["cases"] for s in stages if s["stage"] == "07_generate")
  for case in cases:
    meta = case["meta"]
    media = None if meta["modal"] == "text" else meta["modal"]
    prompt, text = prompts.question_prompt(meta["instruct"], tokenizer, media)
    np.testing.assert_array_equal(text.ids, arrays[f"{case['id']}/input_ids"][0])
    assert (text.labels == IGNORE).all()
    assert prompt.replace(f"<{media}>", "") == meta["prompt_ids_decoded"]
    answer = tokenizer.decode(arrays[f"{case['id']}/generated_ids"], skip_special=True).strip()
    assert answer == meta["text"]


def test_text_questions_begin_with_a_newline(tokenizer):
  prompt, text = prompts.question_prompt("How are you?", tokenizer, None)
  assert "<|im_start|>user\n\nHow are you?<|im_end|>" in prompt
  assert (text.ids >= 0).all()


def test_questions_are_not_changed_in_place(tokenizer):
  messages = [{"role": "user", "content": "hi"}]
  prompts.question_prompt(messages, tokenizer, "video")
  assert messages == [{"role": "user", "content": "hi"}]
  with pytest.raises(InputError, match="empty"):
    prompts.question_prompt([], tokenizer, "video")


def test_cut_takes_the_first_ids():
  text = Text(np.arange(5, dtype=np.int32), np.arange(5, dtype=np.int32))
  assert text.cut(3).ids.tolist() == [0, 1, 2]
  assert text.cut(3).labels.tolist() == [0, 1, 2]
  assert text.cut(None) is text
  assert text.cut(9).ids.tolist() == [0, 1, 2, 3, 4]
