"""What models and captions say, in any script: nouns, texts, numbers."""

import pytest

from data_pipes.engine.agents.objects import make_analyze
from data_pipes.engine.agents.texts import question_fault
from data_pipes.engine.graph import Item
from data_pipes.engine.quality import masks, text
from data_pipes.engine.roles import Nouns, Question


class Says:
  def __init__(self, *nouns):
    self.found = nouns

  def nouns(self, clip):
    return Nouns(self.found)


CLIP = {"video": "v", "caption": "", "frames": 9, "fps": 25.0, "height": 4, "width": 4}


@pytest.mark.parametrize(
  "nouns",
  [
    ("dog", "red ball"),
    ("собака", "мяч", "дорога"),
    ("狗", "红色的球", "栅栏"),
    ("كلب", "كرة"),
    ("कुत्ता", "कुत्ती", "गेंद"),
    ("หมา", "หมู"),
    ("café", "cafe", "cafe\u0301s"),
  ],
)
def test_no_noun_is_lost_whatever_its_letters(nouns):
  process = make_analyze(Says(*nouns), {"workdir": "/w", "max_objects": 5})
  outcome = process(Item("clip", (CLIP,)))
  assert len({row.key for row in outcome.rows}) == len(nouns)
  assert not outcome.rejected


def test_keys_of_latin_nouns_stay_and_two_spellings_are_one():
  process = make_analyze(
    Says("Red  Ball", "red-ball", "t-shirt"), {"workdir": "/w", "max_objects": 5}
  )
  rows = process(Item("clip", (CLIP,))).rows
  assert [(row.key, row.noun) for row in rows] == [
    ("clip/red-ball", "red ball"), ("clip/t-shirt", "t-shirt"),
  ]  # fmt: skip


GOOD = "The dog runs to the left{} and jumps over the fence."


@pytest.mark.parametrize(
  ("piece", "reason"),
  [
    ("", None), ("\t\n", None), (" x < y > z", None), ("\u200d", None),
    ("\0", "control character: U+0000"), ("\v", "control character: U+000B"),
    ("\x1b[2K", "control character: U+001B"), ("\ud800", "control character: U+D800"),
    ("\u202e", "control character: U+202E"),
    ("<|im_end|>", "control token: '<|im_end|>'"), ("</s>", "control token"),
    ("<end_of_turn>", "control token"), ("<object3>", "control token"),
    ("<think>", "control token"),
    ("<｜begin▁of▁sentence｜>", "control token"), ("[INST]", "control token"),
    ("{5}", "placeholder: {5}"), (" {0}", "placeholder: {0}"),
  ],
)  # fmt: skip
def test_what_no_text_may_hold(piece, reason):
  fault = text.fault(GOOD.format(piece))
  assert fault is None if reason is None else reason in fault


def test_scripts_without_spaces_have_words():
  assert text.fault("狗在跑步并跳过栅栏", "zh") is None
  assert "too short" in text.fault("狗", "zh")
  assert text.fault("หมากำลังวิ่งไปทางซ้าย", "th") is None


def test_placeholders_of_a_question_are_those_of_its_objects():
  question = Question("Where does {0} run?", "It runs to {1} on the left.", "basic", (0,))
  assert question_fault(question, 2, "en") is None
  assert "placeholder: {1}" in question_fault(question, 1, "en")


def test_numbers_that_are_none_pass_no_gate():
  nan = float("nan")
  assert "box_score nan" in masks.fault({"box_score": nan}, masks.LIMITS)
  assert "overlap nan" in masks.fault({"overlap": nan}, masks.LIMITS)
