"""`vr data prepare`: decodes once and writes ArrayRecord shards."""

import json
import sys
from dataclasses import dataclass, field
from typing import Literal

from data_pipes.errors import InputError
from data_pipes.files import locked
from data_pipes.isolation import item_seconds
from data_pipes.prepare import Settings


@dataclass(frozen=True)
class Work:
  out: str = field(metadata={"help": "folder of the shards", "metavar": "OUT"})
  runner: Literal["local", "array", "ray"] = field(
    default="local",
    metadata={"help": "processes here (default), commands of an array job, or Ray tasks"},
  )
  jobs: int = field(default=2, metadata={"help": "processes of --runner local", "metavar": "N"})
  address: str | None = field(
    default=None, metadata={"help": "of the Ray cluster (default: start one here)"}
  )
  task: tuple[str, str] | None = field(
    default=None,
    metadata={"help": "run one task of an OUT begun before", "metavar": ("STAGE", "SHARD")},
  )
  item_seconds: float = item_seconds()
  json: bool = field(default=False, metadata={"help": "print the manifest"})


def run(settings: Settings, work: Work) -> int:
  part = f"task {' '.join(work.task)}" if work.task else None
  with locked(work.out, part=part):
    return _prepare(settings, work)


def _prepare(settings: Settings, work: Work) -> int:
  from data_pipes import jobs, prepare

  if settings.files:
    job = prepare.Prepare.start(work.out, settings, work.item_seconds)
  else:
    job = prepare.Prepare.resume(work.out, work.item_seconds)

  def progress(stage: str, done: int, total: int) -> None:
    print(f"{stage}: {done} of {total}", file=sys.stderr, flush=True)

  if work.task:
    stage, shard = work.task
    if not shard.isdecimal():
      raise InputError(f"--task: SHARD {shard!r}; accepted: a number")
    job.run(stage, int(shard))
    return 0
  job.check_sources()
  if work.runner == "array":
    print("\n".join(jobs.array_commands(job)))
    return 0
  if work.runner == "ray":
    jobs.run_ray(job, work.address, progress=progress)
  else:
    jobs.run_local(job, work.jobs, progress)
  manifest = json.loads(job.output("manifest", 0).read_text())
  print(json.dumps(manifest, indent=2) if work.json else prepare.summary(manifest, job.out))
  return 0
