"""A small graph of stages that only count, for tests of store and runners."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from data_pipes.engine.graph import Graph, GraphRef, Item, Outcome, Rejected, Stage, StopRun


@dataclass(frozen=True)
class Number:
  key: str
  origin: str  # key in stage a
  number: int
  parts: object


def ref(folder: Path | str, items: int = 40, **settings) -> GraphRef:
  return GraphRef("engine_toy:make", {"folder": str(folder), "items": items, **settings})


def make(settings: dict) -> Graph:
  """a: squares; b: two rows each, odd ones rejected; c: sums equal ones; d: drops by survey."""
  where, workers = settings.get("where", "thread"), settings.get("workers", 3)

  def logged(stage: str, function):
    if settings.get("broken_model") == stage:
      os._exit(7)
    with open(Path(settings["folder"]) / "opened.log", "a") as log:
      log.write(f"{stage} {os.getpid()}\n")

    def process(item: Item) -> Outcome:
      done = function(item)
      if settings.get("slow"):
        time.sleep(settings["slow"])
      with open(Path(settings["folder"]) / "done.log", "a") as log:
        log.write(f"{stage} {item.key}\n")
      return done

    return process

  def first(item: Item) -> Outcome:
    number = item.row["number"]
    if number == settings.get("poison"):
      raise RuntimeError("poisoned\nitem")
    if number == settings.get("deadly"):
      os._exit(9)
    while number == settings.get("endless"):
      pass
    if number == settings.get("stop_at") and not (Path(settings["folder"]) / "go").exists():
      raise StopRun("the budget is spent")
    return Outcome([Number(item.key, item.key, number**2, [number, None])])

  def second(item: Item) -> Outcome:
    n = item.row["number"]
    rows = [Number(f"{item.key}/{k}", item.key, n + k, {"é": n}) for k in range(2)]
    return Outcome(
      [r for r in rows if r.number % 2 == 0],
      [Rejected(r.key, f"odd: {r.number}", r) for r in rows if r.number % 2],
    )

  def third(item: Item) -> Outcome:
    return Outcome([Number(item.key, item.row["key"], sum(r["number"] for r in item.rows), {})])

  def fourth(item: Item) -> Outcome:
    if item.note:
      return Outcome(rejected=[Rejected(item.key, item.note)])
    parts = {"agents": dict(item.agents), "joined": item.joined["a"]["parts"]}
    return Outcome([Number(item.key, item.row["origin"], item.row["number"], parts)])

  def survey(rows) -> dict[str, str]:
    least: dict[int, str] = {}
    for row in sorted(rows, key=lambda r: r["key"]):
      least.setdefault(row["number"] % 10, row["key"])
    return {key: f"first of its kind: {digit}" for digit, key in least.items()}

  def stage(name, function, **options) -> Stage:
    identity = {"version": settings.get(f"version_{name}", 1), "backend": f"toy {name}"}
    return Stage(
      name,
      Number,
      lambda: logged(name, function),
      identity,
      where=where,
      workers=workers,
      **options,
    )

  source = [{"key": f"{i:05d}", "number": i} for i in range(settings["items"])]
  return Graph(
    (
      stage("a", first),
      stage("b", second, after="a"),
      stage("d", fourth, after="b", survey=survey, joins={"a": "origin"}),
      stage("c", third, after="a", group="number"),
    ),
    lambda: source,
  )
