"""The same tasks as a job array: one command for each (phase, shard), for any scheduler.

A phase is a run of stages that need only their own shard. All commands of one phase may run at the
same time, on any machines that share the work directory; the next phase begins when all are done.
"""

from data_pipes.engine.graph import Graph
from data_pipes.engine.store import Store


def phases(graph: Graph) -> list[list[str]]:
  """Names of the stages of each phase; a stage that surveys all shards begins a new one."""
  out: list[list[str]] = [[]]
  for stage in graph.stages:
    if stage.survey is not None:
      out.append([])
    out[-1].append(stage.name)
  return out


def job_array(graph: Graph, store: Store, command: str) -> list[str]:
  """Lines of a shell script: phases with their commands, then the one that writes the files."""
  lines = ["# All commands of a phase may run at once; a phase begins when the one before is done."]
  for number, names in enumerate(phases(graph), 1):
    lines.append(f"# phase {number}: {', '.join(names)}")
    lines += [f"{command} --only {number}:{shard}" for shard in range(store.shards)]
  return [*lines, "# at the end: writes the published files", command]
