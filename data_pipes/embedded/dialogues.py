"""Training dialogues about a scene, in the published wording.

A dialogue is a list of messages and the things that its `<region>`s stand for, in order.
"""

import re
from dataclasses import dataclass

import numpy as np

from data_pipes.embedded.captions import detailed_caption, scene_caption, short_caption
from data_pipes.embedded.questions import TYPES, Balance, Choice, candidates
from data_pipes.embedded.scenes import Scene
from data_pipes.prompts import DESCRIBE, Turn, bench_q_prompt
from data_pipes.tokenizer import REGION

DESCRIBE_SCENE = "Describe the video."
DESCRIBE_BRIEF = f"Please describe the object {REGION} in the video in brief."
DESCRIBE_DETAIL = f"Please describe in detail the object {REGION} in the video."


@dataclass(frozen=True)
class Dialogue:
  turns: tuple[Turn, ...]
  things: tuple[int, ...]


def dialogue(pairs: list[tuple[str, str]], things: list[int]) -> Dialogue:
  """Questions and answers as messages, the media tag in front of the first."""
  turns = [
    Turn(role, text) for pair in pairs for role, text in zip(("human", "gpt"), pair, strict=True)
  ]
  turns[0] = Turn("human", f"<video>\n{turns[0].text}")
  return Dialogue(tuple(turns), tuple(things))


def scene_dialogue(scene: Scene) -> Dialogue:
  """Stage 1: the whole video in words."""
  return dialogue([(DESCRIBE_SCENE, scene_caption(scene))], [])


def caption_dialogue(scene: Scene, detailed: bool, rng: np.random.Generator) -> Dialogue:
  """Stages 2 (brief) and 2.5 (detailed): every thing of the scene, a turn each."""
  things = [int(i) for i in rng.permutation(len(scene.things))]
  if detailed:
    return dialogue([(DESCRIBE_DETAIL, detailed_caption(scene, i)) for i in things], things)
  return dialogue([(DESCRIBE_BRIEF, short_caption(scene.things[i])) for i in things], things)


def question_text(choice: Choice) -> str:
  """The question as VideoRefer-Bench-Q has it: `<object3><region>` for each thing."""
  mentions = [f"<object{i}>{REGION}" for i in choice.question.things]
  return choice.question.text.format(*mentions)


def question_dialogue(
  scene: Scene,
  balance: Balance,
  rng: np.random.Generator,
  questions: int = 5,
  captions: int = 0,
) -> Dialogue:
  """Stage 3: questions of different types, most with options, then detailed captions.

  An answer says the words of the right option, which the strict parser reads as its letter. (A
  decoder as small as vr-mini's takes longer to learn which letter stands before given words than
  to see the objects.)
  """
  choices, pairs = candidates(scene), []
  things: list[int] = []
  for k in rng.permutation(len(TYPES))[:questions]:
    question = balance.pick(choices, TYPES[k])
    if question is None:
      continue
    choice = balance.choose(question)
    text = question_text(choice)
    if rng.random() < 0.75:
      text = bench_q_prompt(text, choice.options)
    else:
      text = _free_form(text, rng)
    pairs.append((text, question.answer))
    things.extend(question.things)
  for i in rng.permutation(len(scene.things))[:captions]:
    request = DESCRIBE_DETAIL if rng.random() < 0.5 else DESCRIBE
    pairs.append((request, detailed_caption(scene, int(i))))
    things.append(int(i))
  return dialogue(pairs, things)


def _free_form(text: str, rng: np.random.Generator) -> str:
  """A question without options, as people write the object: `[<region>]` or `<region>` alone."""
  if rng.random() < 0.5:
    text = re.sub(rf"<object\d+>(?={REGION})", "", text)
  return text.replace(REGION, f"[{REGION}]") if rng.random() < 0.5 else text
