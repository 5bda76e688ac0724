"""The `vr` command: parses and hands over; nothing else.

Exit codes: 0 done, 1 our fault (a traceback), 2 the user's input is wrong (one line on stderr), 143
training was stopped and has saved.
"""

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from data_pipes.errors import InputError


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one `vr` command and returns its exit code."""
  args = parse(sys.argv[1:] if argv is None else argv)
  try:
    return args.run(args) or 0
  except InputError as error:
    print(f"vr {args.command}: {error}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    return 130


def parse(argv: Sequence[str]) -> argparse.Namespace:
  """The arguments; `overrides` holds every `--config.key=value`."""
  parser = _parser()
  overrides = [a.removeprefix("--") for a in argv if a.startswith("--config.")]
  args = parser.parse_args([a for a in argv if not a.startswith("--config.")])
  args.overrides = overrides
  takers = ("train", "config", "compile", "engine")
  if overrides and args.command not in takers:
    parser.error(f"--config.… belongs to vr {', '.join(takers)}; not to vr {args.command}")
  return args


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="vr",
    description="VideoRefer in JAX: ask about objects in a video; train and check the model.",
  )
  commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

  def command(name: str, run, summary: str) -> argparse.ArgumentParser:
    sub = commands.add_parser(name, help=summary, description=summary)
    sub.set_defaults(run=run)
    return sub

  quickstart = command("quickstart", _quickstart, "make a small video set, train, score, ask")
  quickstart.add_argument("--workdir", default="vr-quickstart", help="default: %(default)s")
  quickstart.add_argument("--json", action="store_true", help="print the results as JSON")

  train = command("train", _train, "train, or resume what is in the work directory")
  train.add_argument(
    "--config", required=True, metavar="F.py[:ARGS]", help="a config file or a packaged name"
  )
  train.add_argument("--workdir", required=True)
  train.epilog = "Any field of the config: --config.key=value"

  sweep = command("sweep", _sweep, "run a config's sweep, or what is left of it, and compare")
  sweep.add_argument("config", metavar="F.py[:ARGS]", help="a config file with sweep(add)")
  sweep.add_argument("--workdir", help="default: sweeps/F")
  sweep.add_argument("--via", choices=["local", "slurm", "print"], default="local")
  sweep.add_argument("--jobs", type=int, default=1, metavar="N", help="members at a time (local)")
  sweep.add_argument("--seeds", type=int, default=1, metavar="N", help="of every member")
  sweep.add_argument("--slurm", default="", metavar="OPTIONS", help="of sbatch, in one string")
  sweep.add_argument("--only", metavar="NAME", help="one member, without the table")
  sweep.add_argument("--table", action="store_true", help="the table alone, of what is there")

  for name, summary in (
    ("ask", "answer a question about objects in a video"),
    ("describe", "describe an object in a video"),
  ):
    ask = command(name, _ask, summary)
    ask.add_argument("--checkpoint", help="a checkpoint folder (default: the packaged vr-mini)")
    ask.add_argument("--video", help="a video, GIF, image or folder of frames")
    ask.add_argument(
      "--region",
      action="append",
      default=[],
      metavar="SPEC",
      help="mask.png@FRAME, box:x1,y1,x2,y2@FRAME, point:x,y@FRAME or rle.json; FRAME is a frame "
      "number or a time such as 1.5s. SPECs with the same ID= in front are one object",
    )
    if name == "ask":
      ask.add_argument("--question", help="holds one <region> for each object")
      ask.add_argument(
        "--jsonl",
        metavar="REQUESTS",
        help='instead, a question a line: {"video": …, "question": …, "regions": [SPEC, …]}',
      )
      ask.add_argument("--out", metavar="ANSWERS", help="of --jsonl: a line an answer; resumable")
    ask.add_argument(
      "--save-video", metavar="F.mp4", help="the clip with objects and answer drawn in"
    )
    ask.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    ask.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    ask.add_argument("--top-k", type=int, default=0, metavar="K")
    ask.add_argument("--top-p", type=float, default=1.0, metavar="P")
    ask.add_argument("--seed", type=int, default=0, help="of the sampling")
    _answering(ask)
    ask.add_argument("--json", action="store_true", help="print the answer and what it rests on")

  _evaluation(command)
  convert = command("convert", _convert, "weights of one format into another, with proof")
  convert.add_argument("source", metavar="SRC", help="weights of any known format; see docs")
  convert.add_argument("result", metavar="DST", help="a folder (big_vision: a file) to write")
  convert.add_argument(
    "--to", required=True, metavar="FORMAT", help="vr, videorefer, hf, torch, big_vision or peft"
  )
  convert.add_argument("--dtype", help="float32, float16, bfloat16 (default: as the source)")
  convert.add_argument("--adapter", metavar="DIR", help="a PEFT adapter to merge into the decoder")
  convert.add_argument("--allow-nonfinite", action="store_true", help="go on over NaN and Inf")
  convert.add_argument("--shard-gb", type=float, default=5.0, help="default: %(default)s")
  convert.add_argument(
    "--logits",
    choices=["auto", "always", "never"],
    default="auto",
    help="compare both models on a batch (auto: with PyTorch, if they fit into memory)",
  )
  convert.add_argument("--json", action="store_true", help="print parity.json")

  parity = command("parity", _parity, "run a golden-case folder of the published code")
  parity.add_argument("folder")
  parity.add_argument("--stage", action="append", metavar="NAME", help="such as 03_region")
  parity.add_argument("--json", action="store_true", help="print the results as JSON")

  _data_commands(command("data", _data, "check, shard, count, show and time annotation files"))
  _engine_commands(command("engine", _engine, "make object-level data from videos with agents"))

  config = command("config", _config, "resolve configs without running them")
  config.add_argument("what", choices=["show", "diff", "shapes", "shardings"])
  config.add_argument("configs", nargs="+", metavar="F.py[:ARGS]")
  config.add_argument("--devices", type=int, help="shardings: of the mesh (default: those here)")
  config.add_argument("--json", action="store_true", help="print JSON")

  aot = command("compile", _compile, "compile the training step for hardware that is not here")
  aot.add_argument("--config", required=True, metavar="F.py[:ARGS]")
  aot.add_argument(
    "--target",
    required=True,
    help="tpu:v5e:8x8, v5p, v6e (or a slice's name, tpu:v5e-64), gpu:h100:HOSTSxGPUS, gpu:h200:…",
  )
  aot.add_argument("--slices", type=int, default=1, metavar="N", help="TPU slices (default 1)")
  aot.add_argument(
    "--quick", action="store_true", help="compile 1 and 2 decoder layers and extrapolate"
  )
  aot.add_argument("--json", action="store_true", help="print JSON")
  aot.epilog = "Exit code 3: it does not fit. Any field of the config: --config.key=value"
  return parser


def _engine_commands(engine: argparse.ArgumentParser) -> None:
  steps = engine.add_subparsers(dest="step", required=True, metavar="STEP")
  probe = steps.add_parser("probe", help="what the backends of a config can do, their licences")
  run = steps.add_parser("run", help="run the engine, or go on with a run that was stopped")
  for step in (probe, run):
    step.add_argument("--config", required=True, metavar="F.py[:ARGS]")
  run.add_argument("--workdir", required=True)
  run.add_argument("--budget-usd", type=float, metavar="USD", help="stop before more is spent")
  run.add_argument("--limit", type=int, metavar="N", help="only N videos: a trial, with a bill")
  run.add_argument("--retry-quarantined", action="store_true", help="try failed items again")
  run.add_argument("--runner", default="local", help="local (default), ray, or array (printed)")
  run.add_argument("--shards", type=int, metavar="N", help="fixed by the first run")
  run.add_argument("--address", help="of the Ray cluster")
  run.add_argument("--only", metavar="PHASE:SHARD", help="one task of a job array")
  for step in (probe, run):
    step.epilog = "Any field of the config: --config.key=value"
  review = steps.add_parser("review", help="sample for human checking; reads the verdicts back")
  review.add_argument("--n", type=int, default=100, help="of the kept, and as many of the dropped")
  review.add_argument("--seed", type=int, default=0)
  review.add_argument("--verdicts", metavar="FILE", help="of the page, Label Studio or CVAT")
  for step in (
    review,
    steps.add_parser("status", help="attrition, rates, cost, what is running"),
    steps.add_parser("report", help="data card and plots"),
  ):
    step.add_argument("workdir")
  for step in steps.choices.values():
    step.add_argument("--json", action="store_true", help="print the results as JSON")


def _answering(parser: argparse.ArgumentParser) -> None:
  """What `vr ask` and `vr eval` have in common."""
  parser.add_argument(
    "--scene-frames", type=int, metavar="N", help="default: as many as in training"
  )
  parser.add_argument(
    "--mask-rule",
    choices=["keep", "published", "area"],
    help="masks on the tower's grid: keep (default) leaves every object a cell, published may not",
  )
  parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="answers at once")
  parser.add_argument(
    "--weights", choices=["float32", "bfloat16", "int8"], help="default: as stored"
  )
  parser.add_argument(
    "--mesh", metavar="data=N,tensor=M", help="split rows and weights over devices"
  )


def _evaluation(command) -> None:
  """vr eval, vr score, vr report."""
  from vr_jax.evaluation.benchmarks import registry

  names = registry.names()
  run = command("eval", _eval, "a model's answers to a benchmark; goes on where it was stopped")
  run.add_argument("benchmark", choices=names)
  run.add_argument("--checkpoint", help="a checkpoint folder (default: the packaged vr-mini)")
  run.add_argument("--data", required=True, help="the benchmark's folder or annotation file")
  run.add_argument("--media", help="folder that video paths start from (default: in --data)")
  run.add_argument("--out", required=True, metavar="O", help="folder of the predictions")
  run.add_argument("--mode", default="multi", choices=["single", "multi"], help="mask frames")
  _answering(run)
  run.add_argument(
    "--published",
    action="store_true",
    help="as the published scripts: 8 scene frames, 2048 tokens, their mask rule",
  )
  run.add_argument("--subtitles", action="store_true", help="videomme: with subtitles")
  run.add_argument("--split", default="", help="needed where a benchmark has several")
  run.add_argument("--shard", metavar="K/N", help="every N-th item from the K-th on")
  run.add_argument("--limit", type=int, metavar="N", help="only the first N items")
  run.add_argument("--max-new-tokens", type=int, metavar="N")
  run.add_argument("--json", action="store_true", help="print run.json")

  score = command("score", _score, "predictions to scores with intervals")
  score.add_argument("benchmark", choices=(*names, "reviewer"))
  score.add_argument("predictions", metavar="O", help="of vr eval, or a published-shape file")
  score.add_argument("--parser", default="strict", choices=["strict", "published"])
  score.add_argument("--out", help="folder of the result (default: in O)")
  score.add_argument("--against", metavar="R", help="a result folder to compare with, item by item")
  score.add_argument("--common", action="store_true", help="compare the items that both have")
  score.add_argument("--judge", default="", metavar="URL|replay:FILE|rule", help="bench-d")
  score.add_argument("--judge-model", default="", metavar="NAME")
  score.add_argument("--judge-key-env", default="OPENAI_API_KEY", metavar="VARIABLE")
  score.add_argument("--judge-prompt", metavar="FILE", help="a system prompt of your own")
  score.add_argument("--judge-temperature", type=float, metavar="T")
  score.add_argument("--allow-alias", action="store_true", help="a judge's name without a date")
  score.add_argument("--repeats", type=int, default=1, metavar="K", help="judge each K times")
  score.add_argument("--budget", type=int, metavar="TOKENS", help="of the judge; stop after them")
  score.add_argument("--concurrency", type=int, default=8, metavar="N")
  score.add_argument("--max-failed", type=float, default=0.05, metavar="SHARE")
  score.add_argument("--tokenizer", default="ptb-py", choices=["ptb-py", "ptb-jar"])
  score.add_argument("--no-meteor", action="store_true", help="captions without Java")
  score.add_argument("--spice-home", metavar="DIR", help="CoreNLP 3.6.0, which SPICE needs")
  score.add_argument("--length-filter", default="none", choices=["none", "artemis"])
  score.add_argument("--accept-rate", type=float, metavar="SHARE", help="reviewer: re-weight to it")
  score.add_argument("--json", action="store_true", help="print result.json")

  report = command("report", _report, "results as a page and a table")
  report.add_argument("results", nargs="+", metavar="O", help="run or result folders")
  report.add_argument("--out", default="report", help="folder (default: %(default)s)")
  report.add_argument("--data", help="the benchmark's folder, for the frames of the gallery")
  report.add_argument("--media", help="folder that video paths start from")
  report.add_argument("--examples", type=int, default=24, metavar="N", help="in the gallery")
  report.add_argument("--common", action="store_true", help="compare the items that both have")


def _data_commands(data: argparse.ArgumentParser) -> None:
  verbs = data.add_subparsers(dest="verb", required=True, metavar="VERB")

  def verb(name: str, summary: str) -> argparse.ArgumentParser:
    return verbs.add_parser(name, help=summary, description=summary)

  check = verb("check", "validate annotation files and their media; exit code 2 on defects")
  check.add_argument("files", nargs="+", metavar="FILE", help="a JSON array of items")
  check.add_argument("--media", metavar="DIR", help="also open the media, relative to DIR")
  check.add_argument("--decode", action="store_true", help="also decode the frames that are needed")
  check.add_argument("--scene-frames", type=int, default=16, metavar="N", help="of --decode")
  check.add_argument(
    "--grid", type=int, default=0, metavar="G", help="count masks that vanish on it"
  )
  check.add_argument("--reject", nargs="+", default=[], metavar="NOTICE", help="count as defects")
  check.add_argument("--report", metavar="R.json", help="and every finding in R.json.items.jsonl")
  check.add_argument("--fix", metavar="DIR", help="write cleaned copies and lists of changes there")
  check.add_argument("--jobs", type=int, default=2, metavar="N", help="threads (default: 2)")
  check.add_argument("--json", action="store_true", help="print the summary as JSON")

  prepare = verb("prepare", "decode once and write ArrayRecord shards; goes on where it was ended")
  prepare.add_argument("files", nargs="*", metavar="FILE", help="a JSON array of items")
  prepare.add_argument("--media", metavar="DIR", default=".", help="the media are relative to DIR")
  prepare.add_argument("--out", required=True, metavar="OUT")
  prepare.add_argument("--shards", type=int, default=16, metavar="N", help="default: %(default)s")
  prepare.add_argument(
    "--scene-frames", type=int, nargs="+", default=[16], metavar="N", help="default: 16"
  )
  prepare.add_argument(
    "--size", type=int, default=384, help="of stored frames, 0: the source's (default: 384)"
  )
  prepare.add_argument("--aspect-ratio", default="square", help="square (default) or pad")
  prepare.add_argument("--format", default="jpeg", help="jpeg (default), or png, which is exact")
  prepare.add_argument("--quality", type=int, default=95, help="of jpeg (default: %(default)s)")
  prepare.add_argument(
    "--reject", nargs="+", default=[], metavar="NOTICE", help="see vr data check"
  )
  prepare.add_argument("--runner", choices=["local", "array", "ray"], default="local")
  prepare.add_argument(
    "--jobs", type=int, default=2, metavar="N", help="processes of --runner local"
  )
  prepare.add_argument("--address", help="of the Ray cluster (default: start one here)")
  prepare.add_argument(
    "--task", nargs=2, metavar=("STAGE", "SHARD"), help="run one task of an OUT begun before"
  )
  prepare.add_argument("--json", action="store_true", help="print the manifest")

  features = verb("features", "cache what a frozen tower makes of prepared shards")
  features.add_argument("shards", metavar="SHARDS", help="a folder of vr data prepare")
  features.add_argument("--checkpoint", required=True, help="whose tower; as in vr ask")
  features.add_argument("--out", required=True, metavar="CACHE")
  features.add_argument("--config", metavar="F.py[:ARGS]", help="whose mask mode, frames and seed")
  features.add_argument(
    "--frames", action="store_true", help="of the scene frames too, so that the tower never runs"
  )

  stats = verb("stats", "count by type, source, length, objects, mask area and frames")
  stats.add_argument("files", nargs="+", metavar="FILE", help="a JSON array, or a folder of shards")
  stats.add_argument("--html", metavar="PAGE", help="write a page with plots")
  stats.add_argument("--json", action="store_true")

  show = verb("show", "one item: frames with its objects drawn on them, and the dialogue")
  show.add_argument("file", metavar="FILE", help="a JSON array, or a folder of shards")
  show.add_argument("item", metavar="ITEM", help="its number, or id=ID")
  show.add_argument("--media", metavar="DIR", default=".", help="the media are relative to DIR")
  show.add_argument("--out", default="item.html", help="a .html page (default), or .png or .jpg")

  bench = verb("bench", "time the input pipeline alone, stage by stage")
  bench.add_argument("files", nargs="+", metavar="FILE", help="a JSON array, or a folder of shards")
  bench.add_argument("--media", metavar="DIR", default=".", help="the media are relative to DIR")
  bench.add_argument("--model", default="videorefer-7b", help="whose sizes (default: %(default)s)")
  bench.add_argument("--tokenizer", metavar="DIR", help="default: that of the packaged vr-mini")
  bench.add_argument("--masks", default="half", help="single, multi or half (default)")
  bench.add_argument("--samples", type=int, default=64, metavar="N", help="default: %(default)s")
  bench.add_argument("--threads", type=int, default=2, metavar="N", help="default: %(default)s")
  bench.add_argument("--json", action="store_true")


def _data(args: argparse.Namespace) -> int:
  verbs = {
    "check": _data_check,
    "prepare": _data_prepare,
    "features": _data_features,
    "stats": _data_stats,
    "show": _data_show,
    "bench": _data_bench,
  }
  return verbs[args.verb](args)


def _data_features(args: argparse.Namespace) -> int:
  from data_pipes.shards import ShardSet
  from vr_jax.configs import base_config, load_config
  from vr_jax.loading import load
  from vr_jax.training.feature_cache import frame_cache_size, make_cache, make_frame_cache
  from vr_jax.training.videorefer_task import row_rules

  model = load(args.checkpoint)
  config = load_config(args.config) if args.config else base_config()
  rules = row_rules(config, model.cfg)
  shards = ShardSet(args.shards)
  if args.frames:
    print(frame_cache_size(shards, model.cfg)[1], flush=True)
    count = make_frame_cache(args.out, shards, model.cfg, model.params, rules)
    print(f"{args.out}: features of {count} new scene frames")
  count = make_cache(args.out, shards, model.cfg, model.params, rules)
  print(f"{args.out}: object features of {count} samples")
  return 0


def _data_stats(args: argparse.Namespace) -> int:
  from data_pipes import stats

  result = stats.read_stats(args.files)
  print(stats.dumps(result) if args.json else "\n".join(stats.table(result)))
  if args.html:
    stats.write_page(args.html, result)
  return 0


def _data_show(args: argparse.Namespace) -> int:
  from data_pipes.show import find_item, write_item

  record, item = find_item(args.file, args.item)
  print(write_item(args.out, record, item, args.media))
  return 0


def _data_bench(args: argparse.Namespace) -> int:
  from data_pipes import loader_bench
  from vr_jax.training.videorefer_task import bench_inputs

  for file in args.files:
    inputs = bench_inputs(file, args.model, args.tokenizer, args.masks)
    options = loader_bench.Options(args.media, args.samples, args.threads)
    result = loader_bench.bench(*inputs, options)
    lines = [file, *loader_bench.table(result)]
    print(json.dumps({"file": file, **result}, indent=2) if args.json else "\n".join(lines))
  return 0


def _data_prepare(args: argparse.Namespace) -> int:
  from data_pipes import jobs, prepare

  if args.files:
    settings = prepare.Settings(
      tuple(args.files), args.media, args.shards, tuple(args.scene_frames), args.size,
      args.aspect_ratio, args.format, args.quality, tuple(args.reject),
    )  # fmt: skip
    job = prepare.Prepare.start(args.out, settings)
  else:
    job = prepare.Prepare.resume(args.out)

  def progress(stage: str, done: int, total: int) -> None:
    print(f"{stage}: {done} of {total}", file=sys.stderr, flush=True)

  if args.task:
    if not args.task[1].isdecimal():
      raise InputError(f"--task: SHARD {args.task[1]!r}; accepted: a number")
    job.run(args.task[0], int(args.task[1]))
    return 0
  if args.runner == "array":
    print("\n".join(jobs.array_commands(job)))
    return 0
  if args.runner == "ray":
    jobs.run_ray(job, args.address, progress=progress)
  else:
    jobs.run_local(job, args.jobs, progress)
  manifest = json.loads(job.output("manifest", 0).read_text())
  print(json.dumps(manifest, indent=2) if args.json else prepare.summary(manifest, job.out))
  return 0


def _data_check(args: argparse.Namespace) -> int:
  from data_pipes import check, check_report

  media = Path(args.media) if args.media else None
  checks = check.Checks(media, args.decode, args.scene_frames, args.grid, tuple(args.reject))
  summary = check_report.check(
    args.files,
    checks,
    check_report.Outputs(args.report and Path(args.report), args.fix and Path(args.fix), args.jobs),
    progress=lambda text: sys.stderr.isatty() and print(text, file=sys.stderr),
  )
  print(json.dumps(summary, indent=2) if args.json else "\n".join(check_report.table(summary)))
  return 2 if check_report.has_defects(summary) else 0


def _quickstart(args: argparse.Namespace) -> int | None:
  if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
    # Huge pages for the large buffers of a training step: a fifth of the CPU time. They are a
    # setting of the process, so it is started again.
    command = [sys.executable, "-m", "vr_jax", "quickstart", "--workdir", args.workdir]
    command += ["--json"] if args.json else []
    return subprocess.call(command, env={**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"})
  logging.basicConfig(format="%(message)s")
  from vr_jax.mini import quickstart

  # With --json the results alone go to stdout.
  with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
    results = quickstart.run(args.workdir)
  if args.json:
    print(json.dumps(results, indent=2))
  return None


def _train(args: argparse.Namespace) -> int:
  logging.basicConfig(format="%(message)s")
  logging.getLogger("vr_jax").setLevel(logging.INFO)
  from vr_jax.configs import load_config
  from vr_jax.program_cache import keep_on_disk
  from vr_jax.training.loop import train
  from vr_jax.training.processes import join

  config = load_config(args.config, args.overrides)
  join()
  keep_on_disk()
  return 0 if train(config, args.workdir).finished else 143


def _sweep(args: argparse.Namespace) -> int:
  from vr_jax import sweep

  return sweep.command(args)


def _ask(args: argparse.Namespace) -> int | None:
  from vr_jax.inference import annotated_video, bulk
  from vr_jax.inference.model import DESCRIBE, Request
  from vr_jax.inference.regions import parse_regions

  jsonl, question = getattr(args, "jsonl", None), getattr(args, "question", DESCRIBE)
  given = args.video or args.region or args.save_video or (question and args.command == "ask")
  if jsonl and (given or not args.out):
    raise InputError("--jsonl goes with --out, and without --video, --region, --question and video")
  if not jsonl and not (args.video and question):
    raise InputError("accepted: --video and --question, or --jsonl and --out")
  names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "scene_frames", "batch_size")
  options = {name: getattr(args, name) for name in names}
  options["mask_rule"] = args.mask_rule or "keep"
  regions = parse_regions(args.region)
  if jsonl:
    summary = bulk.run(lambda: _load(args), jsonl, args.out, checkpoint=args.checkpoint, **options)
    print(json.dumps(dataclasses.asdict(summary)) if args.json else f"{summary}: {args.out}")
    return 2 if summary.refused else 0
  model = _load(args)
  show = None if args.json else lambda piece: print(piece, end="", flush=True)
  answer = model.ask(args.video, question, regions, on_text=show, **options)
  print(json.dumps(answer.to_dict(), indent=2) if args.json else "")
  for warning in answer.warnings:
    print(f"vr {args.command}: warning: {warning}", file=sys.stderr)
  if args.save_video:
    annotated_video.write(args.save_video, Request(args.video, question, regions), answer)
    print("\n".join((args.save_video, *annotated_video.segments(answer))), file=sys.stderr)
  return 0


def _load(args: argparse.Namespace):
  from vr_jax.inference.placement import parse_mesh
  from vr_jax.loading import load
  from vr_jax.program_cache import keep_on_disk

  keep_on_disk()
  mesh = parse_mesh(args.mesh) if args.mesh else None
  return load(args.checkpoint, weights=args.weights, mesh=mesh)


def _eval(args: argparse.Namespace) -> None:
  from vr_jax.evaluation.run import Settings, evaluate, parse_shard, say

  names = ("mode", "scene_frames", "max_new_tokens", "batch_size", "mask_rule")
  names += ("published", "subtitles")
  shard = parse_shard(args.shard)
  run = evaluate(
    _load(args),
    args.benchmark,
    args.data,
    args.out,
    Settings(**{name: getattr(args, name) for name in names}),
    checkpoint=args.checkpoint,
    media=args.media,
    split=args.split,
    shard=shard,
    limit=args.limit,
    progress=say,
  )
  print(json.dumps(run, indent=2) if args.json else f"{args.out}: {run['counts']}")


def _score(args: argparse.Namespace) -> None:
  from vr_jax.evaluation import score

  score.command(args)


def _report(args: argparse.Namespace) -> None:
  from vr_jax.evaluation.pages.results import write_reports

  for path in write_reports(
    args.results, args.out, args.data, args.media, args.examples, args.common
  ):
    print(path)


def _convert(args: argparse.Namespace) -> int:
  from vr_jax.interop.convert import convert, summary

  parity = convert(
    args.source,
    args.result,
    args.to,
    dtype=args.dtype,
    adapter=args.adapter,
    allow_nonfinite=args.allow_nonfinite,
    shard_bytes=int(args.shard_gb * 1e9),
    logits=args.logits,
    report=lambda line: print(line, file=sys.stderr),
  )
  print(json.dumps(parity, indent=2) if args.json else summary(parity, args.result))
  return int(not parity["passed"])


@contextlib.contextmanager
def _no_warnings():
  """Logged and raised warnings are dropped: those of golden cases are what the cases are about."""
  before = logging.root.manager.disable
  logging.disable(logging.WARNING)
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      yield
  finally:
    logging.disable(before)


def _parity(args: argparse.Namespace) -> int:
  from vr_jax.parity.golden import FAIL, run_parity

  def report(result) -> None:
    if not args.json:
      print(result, flush=True)

  with _no_warnings():
    results = run_parity(args.folder, args.stage, report)
  if args.json:
    print(json.dumps([dataclasses.asdict(r) for r in results], indent=2))
  return int(any(r.status == FAIL for r in results))


def _engine(args: argparse.Namespace) -> int:
  from vr_jax.agent import engine

  return engine(args)


def _config(args: argparse.Namespace) -> None:
  from vr_jax import configs

  resolved = [configs.load_config(c, args.overrides) for c in args.configs]
  if args.what == "diff":
    if len(resolved) != 2:
      raise InputError(f"diff compares two configs; found {len(resolved)}")
    changes = configs.diff(*resolved)
    if args.json:
      print(json.dumps({key: [repr(v) for v in pair] for key, pair in changes.items()}, indent=2))
    else:
      print("\n".join(f"{key}: {a!r} -> {b!r}" for key, (a, b) in changes.items()))
    return
  for config in resolved:
    if args.what == "show":
      print(configs.to_json(config))
      continue
    from vr_jax.training import resolve

    lines = (
      resolve.shapes(config) if args.what == "shapes" else resolve.shardings(config, args.devices)
    )
    print(json.dumps(lines, indent=2) if args.json else resolve.table(lines))


def _compile(args: argparse.Namespace) -> int:
  from vr_jax.configs import load_config
  from vr_jax.hardware import parse_target, quiet
  from vr_jax.training.ahead_of_time import report

  target = parse_target(args.target, args.slices)
  quiet()
  config = load_config(args.config, args.overrides)
  result = report(args.config, config, target, quick=args.quick)
  print(json.dumps(result.to_dict(), indent=2) if args.json else result)
  return 0 if result.fits else 3


if __name__ == "__main__":
  sys.exit(main())
