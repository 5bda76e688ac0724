"""`vr ask` and `vr describe`: an answer about objects in a video, or a file of answers."""

import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from data_pipes.errors import InputError
from vr_jax.commands.loading import Loading, load_model
from vr_jax.inference.options import Options


@dataclass(frozen=True)
class Scene:
  video: str | None = field(
    default=None, metadata={"help": "a video, GIF, image or folder of frames"}
  )
  region: tuple[str, ...] = field(
    default=(),
    metadata={
      "repeat": True,
      "metavar": "SPEC",
      "help": "mask.png@FRAME, box:x1,y1,x2,y2@FRAME, point:x,y@FRAME or rle.json; FRAME is a "
      "frame number or a time such as 1.5s. SPECs with the same ID= in front are one object",
    },
  )
  fps: float | None = field(
    default=None,
    metadata={
      "help": "frames a second of a folder of frames, for times in SPECs (default: 3)",
      "metavar": "N",
    },
  )


@dataclass(frozen=True)
class Questions:
  question: str | None = field(
    default=None, metadata={"help": "holds one <region> for each object"}
  )
  jsonl: str | None = field(
    default=None,
    metadata={
      "metavar": "REQUESTS",
      "help": 'instead, a question a line: {"video": …, "question": …, "regions": [SPEC, …]}',
    },
  )
  out: str | None = field(
    default=None,
    metadata={"metavar": "ANSWERS", "help": "of --jsonl: a line an answer; resumable"},
  )
  chat: bool = field(
    default=False,
    metadata={
      "help": "go on with the questions of standard input, a line each; <region NAME> is the "
      "object NAME; a line /region SPEC marks one for the next question"
    },
  )


@dataclass(frozen=True)
class Output:
  save_video: str | None = field(
    default=None,
    metadata={"metavar": "F.mp4", "help": "the clip with objects and answer drawn in"},
  )
  json: bool = field(default=False, metadata={"help": "print the answer and what it rests on"})


def ask(
  scene: Scene, questions: Questions, options: Options, loading: Loading, output: Output
) -> int:
  single = scene.video or scene.region or scene.fps or questions.question or output.save_video
  if questions.chat and (questions.jsonl or output.save_video):
    raise InputError("--chat goes without --jsonl and --save-video")
  if questions.jsonl and (single or not questions.out):
    raise InputError(
      "--jsonl goes with --out, and without --video, --region, --fps, --question and --save-video"
    )
  if questions.jsonl and questions.out:
    return _answer_file(questions.jsonl, questions.out, options, loading, output)
  if questions.chat:
    return _chat(scene, questions.question, options, loading, output)
  if not scene.video or not questions.question:
    raise InputError("accepted: --video and --question, or --jsonl and --out")
  return _answer("ask", scene, questions.question, options, loading, output)


def describe(scene: Scene, options: Options, loading: Loading, output: Output) -> int:
  from vr_jax.inference.model import DESCRIBE

  if not scene.video:
    raise InputError("accepted: --video")
  return _answer("describe", scene, DESCRIBE, options, loading, output)


def _answer_file(
  requests: str, out: str, options: Options, loading: Loading, output: Output
) -> int:
  from vr_jax.inference import bulk

  summary = bulk.run(
    lambda: load_model(loading), requests, out, checkpoint=loading.checkpoint, **asdict(options)
  )
  print(json.dumps(asdict(summary)) if output.json else f"{summary}: {out}")
  return 2 if summary.refused else 0


def _chat(
  scene: Scene, question: str | None, options: Options, loading: Loading, output: Output
) -> int:
  """Questions one after the other about one video, with all that was said before."""
  from data_pipes.video import open_video
  from vr_jax.inference.regions import parse_regions

  specs = list(scene.region)
  parse_regions(specs)
  model = load_model(loading)
  video = open_video(scene.video, fps=scene.fps, upright=True) if scene.video else None
  messages: list[dict] = []
  show = None if output.json else lambda piece: print(piece, end="", flush=True)
  for line in itertools.chain([question or ""], _lines()):
    if line.startswith("/region "):
      specs.append(line.removeprefix("/region ").strip())
      continue
    if not line:
      continue
    try:
      message = {"role": "user", "content": line, "regions": parse_regions(specs)}
      answer = model.ask(video, [*messages, message], on_text=show, **asdict(options))
    except InputError as error:
      print(f"vr ask: {error}", file=sys.stderr)
      specs = []
      continue
    print(json.dumps(answer.to_dict()) if output.json else "", flush=True)
    for warning in () if messages else answer.warnings:
      print(f"vr ask: warning: {warning}", file=sys.stderr)
    messages += [message, {"role": "assistant", "content": answer.text}]
    specs = []
  return 0


def _lines() -> Iterator[str]:
  """Lines of standard input, with a sign that one is awaited where a person types."""
  while True:
    if sys.stdin.isatty():
      print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
      return
    yield line.strip()


def _answer(
  command: str, scene: Scene, question: str, options: Options, loading: Loading, output: Output
) -> int:
  from data_pipes.video import open_video
  from vr_jax.inference import annotated_video
  from vr_jax.inference.model import Request
  from vr_jax.inference.regions import parse_regions

  regions = parse_regions(scene.region)
  model = load_model(loading)
  video = open_video(scene.video or "", fps=scene.fps, upright=True)
  show = None if output.json else lambda piece: print(piece, end="", flush=True)
  answer = model.ask(video, question, regions, on_text=show, **asdict(options))
  print(json.dumps(answer.to_dict(), indent=2) if output.json else "")
  for warning in answer.warnings:
    print(f"vr {command}: warning: {warning}", file=sys.stderr)
  if output.save_video:
    annotated_video.write(output.save_video, Request(video, question, regions), answer)
    print("\n".join((output.save_video, *annotated_video.segments(answer))), file=sys.stderr)
  return 0
