"""What `vr engine` does: probe, run, status, report, review."""

import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from data_pipes.engine import export, stages
from data_pipes.engine.agents.ingest import check_media
from data_pipes.engine.backends.probe import Probed
from data_pipes.engine.backends.probe import probe as probe_backends
from data_pipes.engine.calls import ledger
from data_pipes.engine.graph import Graph, GraphRef, canonical
from data_pipes.engine.job import EngineJob, phases
from data_pipes.engine.options import RunOptions
from data_pipes.engine.pipeline import Progress, run_stages
from data_pipes.engine.store import Store, manifest
from data_pipes.errors import InputError
from data_pipes.files import locked
from data_pipes.jobs import RUNNERS, array_commands, run_ray

VIDEOS_A_SHARD = 200


def run(
  config: Mapping[str, Any],
  workdir: str | Path,
  *,
  command: str = "vr engine run",
  report: Callable[[str], None] = lambda line: None,
  **options: Any,
) -> dict[str, Any]:
  """Runs the engine, or goes on with a run that was stopped, and writes the published files.

  Args:
    config: `stages.engine_config()` with changes.
    command: how this was called, for the job array.
    report: takes a line about the progress now and then.
    **options: those of `RunOptions`.

  Returns the summary that `status` gives.

  Raises:
    InputError: something in the config or the work directory is not usable.
    StopRun: budget spent, endpoint down, disk full; the same command goes on from there.
  """
  chosen = RunOptions(**options)
  if chosen.only:
    parse_only(chosen.only)
  settings = stages.check_settings(config, workdir)
  with locked(workdir, canonical(settings), chosen.only):
    return _run(settings, workdir, chosen, command, report)


def _run(
  settings: Mapping[str, Any],
  workdir: str | Path,
  chosen: RunOptions,
  command: str,
  report: Callable[[str], None],
) -> dict[str, Any]:
  only = parse_only(chosen.only) if chosen.only else None
  check_media(workdir)
  store, settings = open_store(settings, workdir)
  ref = stages.graph_ref(settings)
  graph = ref.build()
  if only and only[1] >= store.shards:
    raise InputError(f"--only {only[0]}:{only[1]}: no such shard; this run has {store.shards}")
  if chosen.runner not in RUNNERS:
    raise InputError(f"--runner {chosen.runner}: accepted: {', '.join(RUNNERS)}")
  job = EngineJob(
    ref,
    workdir,
    line=command,
    retry_quarantined=chosen.retry_quarantined,
    budget_usd=chosen.budget_usd,
    item_seconds=chosen.item_seconds,
  )
  if chosen.runner == "array":
    return {"commands": _array(job)}
  name = f"{only[0]}-{only[1]:05d}" if only else "local"
  retry = chosen.retry_quarantined
  calls = (settings["workdir"], name, chosen.budget_usd)
  stages.set_calls(*calls, retry=retry)
  try:
    if chosen.runner == "ray":
      run_ray(job, chosen.address, gpus=settings["ray_gpus"])
    else:
      run_stages(
        ref,
        store,
        stages=phase(graph, only[0]) if only else None,
        shards=[only[1]] if only else None,
        graph=graph,
        retry_quarantined=retry,
        item_seconds=chosen.item_seconds,
        set_up=partial(stages.set_calls_of_stage, *calls, retry),
        name=name,
        report=lambda progress: report(progress_line(progress)),
      )
    if only is None:
      for part in (store.folder / "media").glob("*/.*.tmp"):  # not below: links lead to the user's
        part.unlink(missing_ok=True)  # a kill left it
      export.export(store)
      _write_manifest(store, ref)
  finally:
    stages.close_calls(settings["workdir"])
  return status(workdir)


def probe(config: Mapping[str, Any]) -> list[Probed]:
  """What the backends of a config can do, and their licences; see backends.probe."""
  settings = stages.check_settings(config, ".")
  return probe_backends({role: settings["roles"][role] for role in stages.roles_of(settings)})


def open_store(settings: Mapping[str, Any], workdir: str | Path) -> tuple[Store, dict[str, Any]]:
  """The run's folder, and the settings as it keeps them.

  The first run fixes the number of shards and the commits of models of the Hub.
  """
  stored = Path(workdir) / "run.json"
  shards = settings["shards"] or None
  if not stored.is_file() and shards is None:
    # Of the whole source: a trial must not decide the plan of the full run.
    videos = len(stages.list_sources({**settings, "input": {**settings["input"], "limit": 0}}))
    shards = max(1, -(-videos // VIDEOS_A_SHARD))
  store = Store(workdir, shards)
  before = store.settings()
  settings, licences = stages.pin_models(settings, before.get("config") or {})
  if before.get("config") != json.loads(json.dumps(settings)):
    licences = {**before.get("licences", {}), **licences}
    store.write_settings({"config": settings, **({"licences": licences} if licences else {})})
  return store, settings


def _array(job: EngineJob) -> list[str]:
  """Lines of a shell script: phases with their commands, then the one that writes the files."""
  return [
    "# All commands of a phase may run at once; a phase begins when the one before is done.",
    *array_commands(job, job.heading),
    "# at the end: writes the published files",
    job.line,
  ]


def phase(graph: Graph, name: str) -> list[str]:
  """The stages of a job array's phase."""
  every = phases(graph)
  if not 1 <= int(name) <= len(every):
    raise InputError(f"--only {name}: no such phase; accepted: 1 to {len(every)}")
  return every[int(name) - 1]


def parse_only(text: str) -> tuple[str, int]:
  """Reads PHASE:SHARD, a task of a job array."""
  name, colon, shard = text.partition(":")
  if not colon or not shard.isdigit() or not name.isdigit():
    raise InputError(f"--only {text!r}; accepted: PHASE:SHARD, such as 1:0")
  return name, int(shard)


def _write_manifest(store: Store, ref: GraphRef) -> None:
  store.write("manifest.json", json.dumps(manifest(store, ref.build()), indent=1) + "\n")


def status(workdir: str | Path) -> dict[str, Any]:
  """Where a run stands: attrition and reasons per stage, calls and cost, what works on it now."""
  store = Store(workdir)
  config = store.settings().get("config")
  if config is None:
    raise InputError(f"{workdir}: run.json names no config; start with vr engine run")
  entries = manifest(store, stages.graph_ref(config).build())
  live = []
  for path in sorted((store.folder / "progress").glob("*.json")):
    try:
      progress = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
      continue  # being replaced
    live.append({"name": path.stem, "running": _is_running(progress), **progress})
  calls = ledger(store.folder / "calls")
  return {
    "workdir": str(store.folder),
    "shards": store.shards,
    "stages": entries,
    "calls": calls,
    "usd": round(sum(c["usd"] for c in calls), 6),
    "progress": live,
    "projected": projected(entries, calls, config),
  }


def _is_running(progress: Mapping[str, Any]) -> bool:
  ended = progress["finished"] or progress["stopped"]
  return not ended and time.time() - progress["updated"] < 15


def projected(entries, calls, config) -> dict[str, Any]:
  """What all videos would cost, judged by those done (a dry run with input.limit)."""
  done = entries[0]["inputs"] if entries else 0
  spent = sum(c["usd"] for c in calls)
  if not config["input"]["limit"] or not done:
    return {}
  total = len(stages.list_sources({**config, "input": {**config["input"], "limit": 0}}))
  return {"videos": total, "usd": round(spent * total / done, 2)}


def status_lines(summary: Mapping[str, Any]) -> list[str]:
  """The status as a table for people."""
  out = [f"{summary['workdir']}: {summary['shards']} shards"]
  out.append(f"{'stage':14}{'shards':>12}{'inputs':>9}{'kept':>9}{'dropped':>9}{'failed':>8}  why")
  for e in summary["stages"]:
    why = "; ".join(f"{reason} {count}" for reason, count in list(e["reasons"].items())[:3])
    outdated = f" ({e['outdated']} outdated)" if e["outdated"] else ""
    shards = f"{e['shards']}/{e['of']}"
    out.append(
      f"{e['stage']:14}{shards:>12}{e['inputs']:>9}{e['kept']:>9}"
      f"{e['rejected']:>9}{e['quarantined']:>8}  {why}{outdated}"
    )
  for p in summary["progress"]:
    state = "running" if p["running"] else p["stopped"] or ("done" if p["finished"] else "killed")
    out.append(f"{p['name']}: {state}, {p['seconds']:g} s")
    if p["running"]:
      out += [f"  {line}" for line in _live_lines(p["stages"])]
  for c in summary["calls"]:
    out.append(
      f"calls {c['stage']} {c['model']} {c['status']}: {c['calls']}, {c['input_tokens']} + "
      f"{c['output_tokens']} tokens, {c['usd']:.4f} USD, {c['mean_seconds']:g} s each"
    )
  if summary["projected"]:
    p = summary["projected"]
    out.append(f"all {p['videos']} videos would cost about {p['usd']:.2f} USD")
  return out


def _live_lines(progress: Mapping[str, Mapping[str, Any]]) -> list[str]:
  out = []
  for name, c in progress.items():
    new = c["done"] - c["reused"]
    if c["seconds"] and new:
      rate = new / c["seconds"]
      left = (c["total"] - c["done"]) / rate
      out.append(f"{name}: {c['done']}/{c['total']} items, {rate:.3g}/s, {left:.0f} s left")
  return out


def progress_line(progress: Progress) -> str:
  """One line about all stages: items done and kept."""
  parts = [
    f"{name[3:]} {c['done']}/{c['total']}" for name, c in progress.stages.items() if c["total"]
  ]
  return " · ".join(parts) + (f" · stopped: {progress.stopped}" if progress.stopped else "")
