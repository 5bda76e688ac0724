"""Dialogues and questions as token ids, with label masks.

A media tag (`<video>`, `<image>`) is no vocabulary item: it becomes a negative id, and each piece
of text around it is tokenised alone. Equal to the published trainer and mm_infer, id for id
(videorefer/train.py:173-250, mm_utils.py:370-395, __init__.py:66-84).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data_pipes.errors import InputError
from data_pipes.tokenizer import REGION, Tokenizer

MEDIA_IDS = {"<image>": -200, "<video>": -201, "<audio>": -202}
MEDIA_TAGS = {"video": "<video>", "image": "<image>"}
CONTROL = "\ue000"  # of private use; stands for a control token while a template is filled
IGNORE = -100  # label of a position that is no target
ROLES = {"human": "user", "gpt": "assistant"}

# What VideoRefer-Bench asks, byte for byte as inference_videorefer_{d,q}_bench.py in
# videorefer/eval of the published code put it together: the text after the media tag.
DESCRIBE = f"Please give a detailed description of the highlighted object [{REGION}] in the video."
LETTER_ONLY = "Answer with the option's letter from the given choices directly"


def bench_q_prompt(question: str, options: Sequence[str]) -> str:
  """VideoRefer-Bench-Q; `options` carry their letters, as in "(A) Two".

  A last option that ends in a dot makes two dots, as published.
  """
  return f"{question.replace(REGION, f'[{REGION}]')} {' '.join(options)}. {LETTER_ONLY}."


@dataclass(frozen=True)
class Turn:
  """One message of a dialogue; `role` is the published word, `human` or `gpt`."""

  role: str
  text: str


@dataclass(frozen=True)
class Text:
  """Token ids before the media and `<region>` are expanded.

  Attributes:
    ids: int32 [n]; negative where a media tag stands.
    labels: int32 [n]; the id where it is a training target, IGNORE elsewhere.
  """

  ids: np.ndarray
  labels: np.ndarray

  def cut(self, max_ids: int | None) -> "Text":
    """The first `max_ids` ids, as published collation cuts (before expansion)."""
    return self if max_ids is None else Text(self.ids[:max_ids], self.labels[:max_ids])


def tokenize(text: str, tokenizer: Tokenizer, tag: str | None) -> list[int]:
  """Ids of `text` with each `tag` as its negative id (published tokenizer_multimodal_token)."""
  if tag not in MEDIA_IDS:
    return tokenizer.encode(text)
  first, *rest = text.split(tag)
  ids = tokenizer.encode(first)
  for piece in rest:
    ids.append(MEDIA_IDS[tag])
    ids.extend(tokenizer.encode(piece))
  return ids


def tag_to_head(turns: Sequence[Turn], tag: str | None) -> list[Turn]:
  """Moves the media tag to the head of the turn that has it (published preprocess_multimodal)."""
  return [
    Turn(t.role, f"{tag}\n{t.text.replace(tag, '').strip()}".strip())
    if tag and tag in t.text
    else t
    for t in turns
  ]


def from_human(turns: Sequence[Turn]) -> list[Turn]:
  """The dialogue without a first message that is not from `human`, checked to alternate.

  Raises:
    InputError: no messages, an odd number of them, or two of one side in a row.
  """
  kept = list(turns[1:] if turns and turns[0].role != "human" else turns)
  if not kept or len(kept) % 2 or [t.role for t in kept] != ["human", "gpt"] * (len(kept) // 2):
    roles = ", ".join(t.role for t in turns) or "nothing"
    raise InputError(f"conversations: found {roles}; accepted: human, gpt, human, gpt, ...")
  return kept


def dialogue_text(turns: Sequence[Turn], tokenizer: Tokenizer, tag: str | None) -> Text:
  """A templated dialogue; targets are each answer's text with its `<|im_end|>` and newline.

  Published `preprocess` after `preprocess_multimodal` (stages 2, 2.5 and 3). `tag` is None for a
  dialogue without media.
  """
  messages, ids = _dialogue(turns, tokenizer, tag)
  labels = ids.copy()
  end = 0
  for answer in range(1, len(messages), 2):
    question = tokenizer.render(messages[:answer], add_generation_prompt=True)
    labels[end : len(tokenize(question, tokenizer, tag))] = IGNORE
    end = len(tokenize(tokenizer.render(messages[: answer + 1]), tokenizer, tag))
  return Text(ids, labels)


def dialogue_length(turns: Sequence[Turn], tokenizer: Tokenizer, tag: str | None) -> int:
  """How many ids `dialogue_text` gives, for a third of its time: labels ask for two texts more."""
  return len(_dialogue(turns, tokenizer, tag)[1])


def _dialogue(
  turns: Sequence[Turn], tokenizer: Tokenizer, tag: str | None
) -> tuple[list[dict[str, str]], np.ndarray]:
  """The messages of a dialogue, and their ids."""
  turns = from_human(tag_to_head(turns, tag))
  messages = [{"role": ROLES[t.role], "content": t.text} for t in turns]
  return messages, np.array(tokenize(tokenizer.render(messages), tokenizer, tag), np.int32)


def turn_end(tokenizer: Tokenizer) -> int | None:
  """The token by which the chat template ends an answer; None where it ends in plain text."""
  if not tokenizer.has_template:
    return None
  question = [{"role": "user", "content": "a"}]
  begun = tokenizer.render(question, add_generation_prompt=True)
  answered = tokenizer.render([*question, {"role": "assistant", "content": "b"}])
  if not answered.startswith(begun):
    return None
  ids = tokenizer.encode(answered.removeprefix(begun))
  return next((i for i in ids if tokenizer.is_special(i)), None)


def plain_text(turns: Sequence[Turn], tokenizer: Tokenizer, tag: str | None) -> Text:
  """Question, one space, answer, no template; all but the media id are targets.

  Published `preprocess_plain` after `preprocess_multimodal` (stage 1).
  """
  turns = tag_to_head(turns, tag)
  if [t.role for t in turns] != ["human", "gpt"] or tag is None or tag not in turns[0].text:
    roles = ", ".join(t.role for t in turns) or "nothing"
    raise InputError(
      f"conversations: found {roles} with tag {tag}; accepted without template: one message of "
      "human holding the media tag, one of gpt"
    )
  ids = np.array(tokenize(" ".join(t.text for t in turns), tokenizer, tag), np.int32)
  return Text(ids, np.where(ids == MEDIA_IDS[tag], IGNORE, ids).astype(np.int32))


def dialogue(questions: Sequence[str], answers: Sequence[str], system: str = "") -> list[dict]:
  """Messages of user and assistant by turns, the last of the user; `system` comes first, if any."""
  messages = [{"role": "system", "content": system}] if system else []
  for i, question in enumerate(questions):
    messages.append({"role": "user", "content": question})
    if i < len(answers):
      messages.append({"role": "assistant", "content": answers[i]})
  return messages


def question_prompt(
  instruct: str | Sequence[Mapping[str, str]],
  tokenizer: Tokenizer,
  media: str | None,
  literal: bool = False,
) -> tuple[str, Text]:
  """The prompt of published mm_infer: (rendered text, ids with nothing supervised).

  Args:
    instruct: the question, or messages with `role` and `content`, of which the first that is not
      the system's takes the tag.
    media: "video", "image" or None; without media the text begins with a newline, as published.
    literal: control tokens and media tags in the messages are ordinary text.
  """
  tag = MEDIA_TAGS[media] if media else ""
  messages = [{"role": "user", "content": instruct}] if isinstance(instruct, str) else instruct
  if not messages:
    raise InputError("the question is empty: no message to put the media tag into")
  spelled: list[str] = []
  if literal:
    messages, spelled = without_controls(messages, tokenizer)
  at = int(messages[0]["role"] == "system" and len(messages) > 1)
  first = {**messages[at], "content": f"{tag}\n{messages[at]['content']}"}
  rendered = tokenizer.render([*messages[:at], first, *messages[at + 1 :]], True)
  prompt, ids = ids_around(
    rendered, spelled, tokenizer, lambda text: tokenize(text, tokenizer, tag)
  )
  return prompt, Text(ids, np.full_like(ids, IGNORE))


def ids_around(
  rendered: str, spelled: Sequence[str], tokenizer: Tokenizer, encode: Callable[[str], list[int]]
) -> tuple[str, np.ndarray]:
  """The prompt with its control tokens spelled out, and its ids int32.

  The template's own text is as it would be; each control that stood in a message goes by itself.
  """
  pieces = re.split(f"[{CONTROL}]", rendered) if spelled else [rendered]
  parts = [encode(pieces[0])]
  for text, piece in zip(spelled, pieces[1:], strict=True):
    parts += [tokenizer.encode_literally(text), encode(piece)]
  prompt = pieces[0] + "".join(t + p for t, p in zip(spelled, pieces[1:], strict=True))
  return prompt, np.array([i for part in parts for i in part], np.int32)


def without_controls(
  messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer
) -> tuple[list[dict[str, str]], list[str]]:
  """The messages with CONTROL in the place of each control token, and these in their order."""
  controls = sorted({*tokenizer.controls, *MEDIA_IDS}, key=len, reverse=True)
  pattern = re.compile("|".join(map(re.escape, [CONTROL, *controls])))
  spelled: list[str] = []

  def note(match: re.Match[str]) -> str:
    spelled.append(match[0])
    return CONTROL

  replaced = [{**m, "content": pattern.sub(note, m["content"])} for m in messages]
  return replaced, spelled
