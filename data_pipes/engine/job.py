"""A run of the engine as a job (data_pipes.jobs), for Ray and for job arrays.

A stage of the job is a phase: a run of stages of the graph that need only their own shard. Tasks of
one phase may run at the same time, on any machines that share the work directory.
"""

from functools import partial
from pathlib import Path
from typing import Any

from data_pipes.engine import pipeline
from data_pipes.engine import stages as engine_stages
from data_pipes.engine.calls import spent_by_file
from data_pipes.engine.graph import Graph, GraphRef
from data_pipes.engine.options import ITEM_SECONDS
from data_pipes.engine.pools import Pools
from data_pipes.engine.store import Store


def phases(graph: Graph) -> list[list[str]]:
  """Names of the stages of each phase; a stage that surveys all shards begins a new one."""
  out: list[list[str]] = [[]]
  for stage in graph.stages:
    if stage.survey is not None:
      out.append([])
    out[-1].append(stage.name)
  return out


class EngineJob:
  """The job (data_pipes.jobs.Job) that fills a work directory.

  A process builds the graph and opens stages for its first task and keeps them for the next ones.

  Args:
    folder: the work directory, with its run.json.
    line: the shell command of the whole run.
    name: of this process's files of calls and progress.
    budget_usd: what this process may have spent at the end.
  """

  def __init__(
    self,
    ref: GraphRef,
    folder: str | Path,
    *,
    line: str = "vr engine run",
    retry_quarantined: bool = False,
    name: str = "local",
    budget_usd: float | None = None,
    item_seconds: float = ITEM_SECONDS,
  ):
    self.ref, self.store = ref, Store(Path(folder).absolute())
    self.line, self.retry_quarantined = line, retry_quarantined
    self.name, self.budget_usd, self.item_seconds = name, budget_usd, item_seconds
    self._opened: tuple[Graph, Pools] | None = None
    # A survey's stage begins a phase, before which all that it looks at is done.
    self._notes: dict[str, Any] = {}

  def __getstate__(self) -> dict[str, Any]:
    return {
      **vars(self),
      "_opened": None,
      "_notes": {},
    }  # models and graphs belong to their process

  def _open(self) -> tuple[Graph, Pools]:
    if self._opened is None:
      set_up = None
      if workdir := getattr(self.ref.settings, "get", lambda key: None)("workdir"):
        retry = self.retry_quarantined
        options = (workdir, self.name, self.budget_usd)
        engine_stages.set_calls(*options, alone=True, retry=retry)
        set_up = partial(engine_stages.set_calls_of_stage, *options, retry)
      self._opened = self.ref.build(), Pools(self.ref, self.item_seconds, set_up)
    return self._opened

  @property
  def stages(self) -> tuple[str, ...]:
    """Numbers of the phases, from 1."""
    return tuple(str(number) for number, _ in enumerate(phases(self.ref.build()), 1))

  def shards(self, stage: str) -> int:
    return self.store.shards

  def done(self, stage: str, shard: int) -> bool:
    """Never known before its inputs are read: `run` finds what is left, or nothing."""
    return False

  def run(self, stage: str, shard: int) -> None:
    """Does the phase's stages of a shard. Raises StopRun as the pipeline does."""
    graph, pools = self._open()
    pipeline.run_stages(
      self.ref,
      self.store,
      stages=phases(graph)[int(stage) - 1],
      shards=[shard],
      graph=graph,
      retry_quarantined=self.retry_quarantined,
      name=self.name,
      pools=pools,
      notes=self._notes,
    )

  def command(self, stage: str, shard: int) -> str:
    return f"{self.line} --only {stage}:{shard}"

  def heading(self, stage: str) -> str:
    """A phase in words, for a job array."""
    return f"phase {stage}: {', '.join(phases(self.ref.build())[int(stage) - 1])}"

  def split(self, workers: int) -> "list[EngineJob]":
    """One a worker: each may spend what it has, and its part of what is left of the budget."""
    names = [f"ray-{i}" for i in range(workers)]
    budgets: dict[str, float | None] = dict.fromkeys(names)
    if self.budget_usd is not None:
      spent = spent_by_file(self.store.folder / "calls")
      left = max(0.0, self.budget_usd - sum(spent.values()))
      budgets = {name: spent.get(name, 0.0) + left / workers for name in names}
    return [
      EngineJob(
        self.ref,
        self.store.folder,
        line=self.line,
        retry_quarantined=self.retry_quarantined,
        name=name,
        budget_usd=usd,
        item_seconds=self.item_seconds,
      )
      for name, usd in budgets.items()
    ]
