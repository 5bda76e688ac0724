"""The questions of a conversation, each with its objects."""

import re
from collections.abc import Callable
from typing import Any

from data_pipes.errors import InputError, shown
from data_pipes.tokenizer import REGION
from data_pipes.video import Video
from vr_jax.inference.regions import MarkedObject, Region, objects_of
from vr_jax.inference.requests import Request

NAMED = re.compile(r"<region ([^<>\n]+)>")  # an object by its name


def questions_of(
  request: Request, source: Video | None, convert: Callable[[Any], Any] | None
) -> tuple[list[str], list[MarkedObject]]:
  """The questions, in which `<region>` stands for each object, and these objects in their order.

  An object of an earlier question is what its regions up to that question mark, so that a further
  turn changes nothing of what stands before it.

  Raises:
    InputError: as `objects_of`; or a question has not one `<region>` for each object.
  """
  texts: list[str] = []
  objects: list[MarkedObject] = []
  earlier: list[Region] = []  # with a name
  turns = [(turn.question, turn.regions, 0) for turn in request.turns]
  question = (request.preface() if request.preface else "") + request.question
  for text, given, annotated in (*turns, (question, request.regions, len(request.annotation))):
    mentioned = [name.strip() for name in NAMED.findall(text)]
    named = {region.name: None for region in given if region.name is not None}
    earlier = [old for old in earlier if not any(_replaces(new, old) for new in given)]
    needed = [old for old in earlier if old.name in named or str(old.name) in mentioned]
    if source is None and (given or needed or annotated):
      raise InputError("regions without a video; accepted: a video or an image with them")
    marked = [] if source is None else objects_of([*given, *needed], source, convert)
    fresh = len(named) + sum(region.name is None for region in given)  # of this question's regions
    by_name = {str(region.name) for region in [*given, *needed] if region.name is not None}
    if unknown := [name for name in mentioned if name not in by_name]:
      accepted = ", ".join(sorted(by_name)) or "names of its objects"
      raise InputError(f"question {shown(text)}: no object {unknown[0]!r}; accepted: {accepted}")
    by_place = iter([one for one in marked[:fresh] if one.name not in mentioned])
    count = len([one for one in marked[:fresh] if one.name not in mentioned]) + annotated
    if text.count(REGION) != count:
      raise InputError(
        f"question {text!r}: found {text.count(REGION)} {REGION} but {count} objects; "
        f"accepted: one {REGION} for each object"
      )
    for tag in re.finditer(f"{REGION}|{NAMED.pattern}", text):
      if tag[1] is not None:
        objects.append(next(one for one in marked if one.name == tag[1].strip()))
      elif (one := next(by_place, None)) is not None:  # else it is annotated, and comes last
        objects.append(one)
    texts.append(NAMED.sub(REGION, text))
    earlier += [region for region in given if region.name is not None]
  return texts, objects


def _replaces(new: Region, old: Region) -> bool:
  """Whether a region that comes again stands in the place of the earlier one."""
  return new.name is not None and new.name == old.name and new.frame == old.frame
