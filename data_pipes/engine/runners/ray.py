"""The same tasks on Ray Core: one remote call for each (stage, shard), on a shared work directory.

An actor holds the stages that it has opened, so a model is loaded once an actor. Sizes of the pool
are computed from what the cluster has, and a plan that cannot run is refused instead of hanging.
"""

from typing import Any

from data_pipes.engine.calls import spent_by_file
from data_pipes.engine.graph import Graph, GraphRef, StopRun
from data_pipes.engine.runners import local
from data_pipes.engine.runners.array import phases
from data_pipes.engine.store import Store
from data_pipes.errors import InputError


class ShardWorker:
  """Runs tasks of a run in its own process; becomes a Ray actor."""

  def __init__(self, ref: GraphRef, folder: str, name: str, budget_usd: float | None):
    self.ref, self.store, self.name = ref, Store(folder), name
    self.graph = ref.build()
    workdir = getattr(ref.settings, "get", lambda key: None)("workdir")
    if workdir:
      from data_pipes.engine import stages

      stages.set_calls(workdir, name, budget_usd, own=True)

  def run(self, names: list[str], shard: int, retry_quarantined: bool) -> str:
    """Does these stages of a shard; returns why the run has to stop, "" if it has not."""
    try:
      local.run_tasks(
        self.ref,
        self.store,
        stages=names,
        shards=[shard],
        graph=self.graph,
        retry_quarantined=retry_quarantined,
        name=self.name,
        everything_in_threads=True,
      )
    except StopRun as stop:
      return str(stop)
    return ""


def run_on_ray(
  ref: GraphRef,
  store: Store,
  *,
  graph: Graph,
  address: str | None = None,
  budget_usd: float | None = None,
  retry_quarantined: bool = False,
  num_gpus: float = 0.0,
) -> None:
  """Does all tasks on the Ray cluster at `address` (None: one on this machine).

  Each actor takes one CPU and `num_gpus`; a budget is shared out over the actors in equal parts.

  Raises:
    InputError: Ray is not installed, or the cluster has no free CPU or GPU for one actor.
    StopRun: as the local runner.
  """
  try:
    import ray
  except ImportError as error:
    raise InputError(f"--runner ray: {error}; install the extra [ray]") from None
  ours = not ray.is_initialized()
  if ours:
    ray.init(address=address, include_dashboard=False, log_to_driver=False)
  try:
    free = ray.available_resources()
    count = int(free.get("CPU", 0))
    if num_gpus:
      count = min(count, int(free.get("GPU", 0) / num_gpus))
    count = min(count, store.shards)
    if count < 1:
      raise InputError(f"--runner ray: found free {free}; needed: 1 CPU and {num_gpus:g} GPU")
    kind = ray.remote(ShardWorker).options(
      num_cpus=1, num_gpus=num_gpus, max_restarts=3, max_task_retries=3
    )
    folder = str(store.folder.absolute())
    shares = _shares(store, [f"ray-{i}" for i in range(count)], budget_usd)
    actors = [kind.remote(ref, folder, name, usd) for name, usd in shares.items()]
    for names in phases(graph):
      _run_phase(ray, actors, names, store.shards, retry_quarantined)
  finally:
    if ours:
      ray.shutdown()


def _shares(store: Store, names: list[str], budget_usd: float | None) -> dict[str, float | None]:
  """What each process may have spent at the end: what it has, and its part of what is left."""
  if budget_usd is None:
    return dict.fromkeys(names)
  spent = spent_by_file(store.folder / "calls")
  left = max(0.0, budget_usd - sum(spent.values()))
  return {name: spent.get(name, 0.0) + left / len(names) for name in names}


def _run_phase(ray: Any, actors: list, names: list[str], shards: int, retry: bool) -> None:
  """Gives every free actor the next shard until all are done."""
  waiting = list(range(shards))[::-1]
  in_work: dict[Any, Any] = {}
  stopped = ""
  free = list(actors)
  while waiting or in_work:
    while free and waiting and not stopped:
      actor = free.pop()
      in_work[actor.run.remote(names, waiting.pop(), retry)] = actor
    if not in_work:
      break
    (done,), _ = ray.wait(list(in_work))
    free.append(in_work.pop(done))
    stopped = ray.get(done) or stopped
  if stopped:
    raise StopRun(stopped)
