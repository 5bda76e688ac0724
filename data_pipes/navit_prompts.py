"""Questions and dialogues of VideoRefer's successors as token ids, with label masks.

No system prompt, one template for all of them. The pictures stand in the text with their times,
every `<image>` as often as its picture has tokens, and a marked object is `[<REGION>...<REGION>]`;
then the text is tokenised as a whole. Source: model/processor.py and `mm_infer`.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from data_pipes.errors import InputError
from data_pipes.prompts import (
  IGNORE,
  MEDIA_TAGS,
  ROLES,
  Text,
  Turn,
  from_human,
  ids_around,
  without_controls,
)
from data_pipes.tokenizer import REGION, Tokenizer

IMAGE_TOKEN, REGION_TOKEN = "<image>", "<REGION>"
_END = "<|im_end|>"


def special_id(tokenizer: Tokenizer, token: str) -> int:
  """The id of IMAGE_TOKEN, REGION_TOKEN or another; config.json's own may be stale, as upstream's.

  Raises InputError: the tokenizer has none.
  """
  index = tokenizer.id_of(token)
  if index is None:
    raise InputError(
      f"the tokenizer has no token {token!r}; accepted: the tokenizer files of VideoRefer-"
      "VideoLLaMA3, PixelRefer or PixelRefer-Lite"
    )
  return index


def image_text(tokens: int, time: float | None = None) -> str:
  """One picture of `tokens` tokens in the text."""
  return f"{'' if time is None else f'Time {_rounded(time)}s: '}{IMAGE_TOKEN * tokens}\n"


def video_text(tokens: Sequence[int], times: Sequence[float]) -> str:
  """The frames of a clip in the text: `Time 0.0s:<image>,Time 1.0s:<image>` and a newline."""
  frames = zip(tokens, times, strict=True)
  return ",".join(f"Time {_rounded(time)}s:{IMAGE_TOKEN * count}" for count, time in frames) + "\n"


def object_text(tokens: int) -> str:
  """A marked object in the text; `[]` where it has no tokens."""
  return f"[{REGION_TOKEN * tokens}]"


def timed_object_text(tokens: Sequence[int], times: Sequence[float]) -> str:
  """An object of PixelRefer-Lite in a video, with its tokens at each of its times."""
  seen = zip(tokens, times, strict=True)
  return f"[{','.join(f'Time {_rounded(time)}:{REGION_TOKEN * count}' for count, time in seen)}]"


def _rounded(time: float) -> str:
  return str(round(time, 1))  # of a numpy number numpy's own, see navit_frames.Scene


def render(messages: Iterable[tuple[str, str]], add_generation_prompt: bool = False) -> str:
  """(role, content) messages in the chat template, whatever template the tokenizer files hold."""
  text = "".join(f"<|im_start|>{role}\n{content}{_END}\n" for role, content in messages)
  return f"{text}<|im_start|>assistant\n" if add_generation_prompt else text


def question_text(
  question: str,
  tokenizer: Tokenizer,
  media: str | None,
  scene: Sequence[str],
  objects: Sequence[str],
  earlier: Sequence[Turn] = (),
  system: str = "",
  literal: bool = False,
) -> tuple[str, Text]:
  """A question as the model is asked it: the text after the template, and its ids.

  Args:
    question: with `<region>` once for each object, and `<video>` or `<image>` where the pictures
      go; by default in front of the first question.
    media: "video", "image" or None.
    scene: what the media tag becomes, `video_text` or one `image_text` for each tag; nothing for
      PixelRefer-Lite, whose prompts hold no pictures.
    objects: what each `<region>` becomes.
    earlier: questions and answers before; their objects come before the question's.
    system: a message before all, which the models have not been trained with.
    literal: control tokens and media tags in the messages are ordinary text.

  Raises InputError: tags or `<region>` are not as many as they must be.
  """
  turns = [*earlier, Turn("human", question)]
  spelled: list[str] = []
  if literal:
    messages = [{"role": "", "content": text} for text in (system, *(t.text for t in turns))]
    (first, *others), spelled = without_controls(messages, tokenizer)
    system = first["content"]
    turns = [Turn(t.role, m["content"]) for t, m in zip(turns, others, strict=True)]
  filled = _filled(turns, media, scene, objects)
  before = [("system", system)] if system else []
  prompt = render([*before, *((ROLES[t.role], t.text) for t in filled)], True)
  prompt, ids = ids_around(prompt, spelled, tokenizer, tokenizer.encode)
  return prompt, Text(ids, np.full_like(ids, IGNORE))


def dialogue_text(
  turns: Sequence[Turn],
  tokenizer: Tokenizer,
  media: str | None,
  scene: Sequence[str],
  objects: Sequence[str],
) -> Text:
  """A training dialogue; targets are each answer's text and `<|im_end|>`, not the newline after.

  Arguments as of `question_text`; `<region>` may stand in answers too. The first label is never a
  target, so dialogues can follow each other in a row.
  """
  header = len(tokenizer.encode(render([], add_generation_prompt=True)))
  ids: list[int] = []
  labels: list[int] = []
  for turn in _filled(from_human(turns), media, scene, objects):
    # Each message begins with a special token, so tokenising them apart changes nothing.
    message = tokenizer.encode(render([(ROLES[turn.role], turn.text)]))
    ids += message
    if turn.role == "human":
      labels += [IGNORE] * len(message)
    else:
      labels += [IGNORE] * header + message[header:-1] + [IGNORE]
  return Text(np.array(ids, np.int32), np.array(labels, np.int32))


def _filled(
  turns: Sequence[Turn], media: str | None, scene: Sequence[str], objects: Sequence[str]
) -> list[Turn]:
  """The turns with objects and pictures in them."""
  texts = list(_with_objects([turn.text for turn in turns], objects))
  human = [turn.role == "human" for turn in turns]
  tag = MEDIA_TAGS[media] if media else None
  if tag and not scene:
    texts = [text.replace(tag, "").strip() for text in texts]
  elif tag and not any(tag in text for text in texts):
    texts[0] = tag + texts[0]
  pieces = [text.split(tag) if tag else [text] for text in texts]
  tags = sum(len(parts) - 1 for parts, asks in zip(pieces, human, strict=True) if asks)
  if tags != len(scene):
    raise InputError(
      f"found {tags} {tag} in the text; accepted: {len(scene)}, one for each {media}"
    )
  pictures = iter(scene)
  filled = []
  for turn, text, (first, *rest), asks in zip(turns, texts, pieces, human, strict=True):
    if asks:
      # Each piece is stripped: a newline beside the tag goes, the pictures bring their own.
      text = first.strip() + "".join(next(pictures) + piece.strip() for piece in rest)
    filled.append(Turn(turn.role, text))
  return filled


def _with_objects(texts: Sequence[str], objects: Sequence[str]) -> Iterator[str]:
  """Each `<region>` of the texts, in order, replaced by its object."""
  count = sum(text.count(REGION) for text in texts)
  if count != len(objects):
    raise InputError(
      f"found {count} {REGION} but {len(objects)} objects; accepted: equal numbers, the i-th tag "
      "takes the i-th object"
    )
  left = iter(objects)
  for text in texts:
    first, *rest = text.split(REGION)
    yield first + "".join(next(left) + piece for piece in rest)
