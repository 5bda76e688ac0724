"""Question texts of the benchmarks, byte for byte as the published scripts put them together.

Each is the text after the media tag; `prompts.question_prompt` puts the tag and the chat template
around it. Sources: inference_videorefer_{d,q}_bench.py and inference_video_mcqa_*.py in
videorefer/eval of the published code.
"""

from collections.abc import Sequence

from data_pipes.tokenizer import REGION

DESCRIBE = f"Please give a detailed description of the highlighted object [{REGION}] in the video."
_LETTER_ONLY = "Answer with the option's letter from the given choices directly"


def bench_q_prompt(question: str, options: Sequence[str]) -> str:
  """VideoRefer-Bench-Q; `options` carry their letters, as in "(A) Two".

  A last option that ends in a dot makes two dots, as published.
  """
  return f"{question.replace(REGION, f'[{REGION}]')} {' '.join(options)}. {_LETTER_ONLY}."


def multiple_choice_prompt(question: str, options: Sequence[str]) -> str:
  """MVBench and Perception-Test; `options` are bare texts, any number of them."""
  lines = "".join(f"({chr(ord('A') + i)}) {option}\n" for i, option in enumerate(options))
  return f"Question: {question}\nOptions:\n{lines}{_LETTER_ONLY} and only give the best option."


def videomme_prompt(question: str, choices: Sequence[str], subtitles: str | None = None) -> str:
  """VideoMME; `choices` carry their letters, as in "A. Two."; `subtitles` None leaves them out."""
  before = "" if subtitles is None else f"This video's subtitles are listed below:\n{subtitles}\n"
  lines = "".join(f"{choice}\n" for choice in choices)
  return (
    f"{before}Select the best answer to the following multiple-choice question based on the video. "
    "Respond with only the letter (A, B, C, or D) of the correct option.\n"
    f"{question}\n{lines}{_LETTER_ONLY} and only give the best option. The best answer is: "
  )
