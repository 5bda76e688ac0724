"""The data engine's runner and client, alone.

    python benchmarks/engine_runner.py [overhead[:ITEMS]] [shards] [requests] [kills]

overhead  100 000 synthetic items through three stages: ms an item-stage (goal <= 3), memory (flat)
shards    4 000 items through three stages, of which one surveys all, in 20, 400 and 2 000 shards:
          CPU of an item-stage, and what a shard-stage adds to it
requests  64 calls in flight against a loopback server with 200 ms latency (goal >= 95 % of ideal)
kills     a run on an endpoint, killed 10 times at random: same bytes, no answered call repeated
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from rows import Spread, row

from data_pipes.engine.backends.chat import ChatClient, Endpoint
from data_pipes.engine.calls import Calls
from data_pipes.engine.graph import Graph, GraphRef, Item, Outcome, Stage, digest
from data_pipes.engine.pipeline import run_stages
from data_pipes.engine.stages import threads_for
from data_pipes.engine.store import Store

TESTS = Path(__file__).resolve().parent.parent / "tests"
ITEMS, ITEMS_A_SHARD = 100_000, 1000
FEW_ITEMS, SHARDS = 4000, (20, 400, 2000)
LATENCY, IN_FLIGHT, CALLS, KILLS = 0.2, 64, 6400, 10


@dataclass(frozen=True)
class Number:
  key: str
  number: int


def synthetic(settings: dict) -> Graph:
  """Three stages that do nothing."""

  def process(item: Item) -> Outcome:
    return Outcome([Number(item.key, item.row["number"] + 1)])

  names = ("a", "b", "c")
  stages = [
    Stage(name, Number, lambda: process, {"version": 1}, after=before, workers=4)
    for name, before in zip(names, (None, *names), strict=False)
  ]
  items = settings["items"]
  return Graph(tuple(stages), lambda: ({"key": f"{i:08d}", "number": i} for i in range(items)))


def asks(settings: dict) -> Graph:
  """One stage that asks an endpoint."""
  workdir = Path(settings["workdir"])
  schema = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}

  def make():
    calls = Calls(workdir / "calls")
    client = ChatClient(Endpoint(settings["url"], "m", concurrency=IN_FLIGHT), lambda: calls, "ask")

    def process(item: Item) -> Outcome:
      client.ask([{"role": "user", "content": f"item {item.key}"}], schema, "text")
      return Outcome([Number(item.key, 1)])

    return process

  items = [{"key": f"{i:06d}"} for i in range(settings["items"])]
  return Graph(
    (Stage("ask", Number, make, {"v": 1}, workers=threads_for(IN_FLIGHT)),), lambda: items
  )


def overhead(items: int = ITEMS) -> None:
  memory: list[tuple[float, float]] = []  # share done, resident MiB

  def watch(progress) -> None:
    done = sum(c["done"] for c in progress.stages.values())
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    memory.append((done / (3 * items), pages * 4096 / 2**20))

  with tempfile.TemporaryDirectory() as folder:
    store = Store(folder, max(1, items // ITEMS_A_SHARD))
    start, cpu = time.perf_counter(), time.process_time()
    ref = GraphRef("engine_runner:synthetic", {"items": items})
    run_stages(ref, store, graph=synthetic({"items": items}), report=watch)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
  early = max(m for share, m in memory if share <= 0.25)
  late = max(m for share, m in memory if share >= 0.75)
  wall, cpu = (1e3 * seconds / (3 * items) for seconds in (wall, cpu))
  row("engine_ms_an_item", wall, "<= 3", detail=f"{items} items, 3 stages; CPU {cpu:.3f} ms")
  row("engine_memory_growth", late / early, "<= 1.1", detail=f"{early:.0f} to {late:.0f} MiB")


def surveyed(settings: dict) -> Graph:
  """The three stages; the third looks at all rows of the second before it begins."""

  def survey(rows):
    return dict.fromkeys(row["key"] for row in rows if row["number"] < 0)

  graph = synthetic(settings)
  *others, last = graph.stages
  return Graph((*others, replace(last, survey=survey)), graph.source)


def shards() -> None:
  seconds = {}
  for number in SHARDS:
    with tempfile.TemporaryDirectory() as folder:
      settings = {"items": FEW_ITEMS}
      cpu = time.process_time()
      ref = GraphRef("engine_runner:surveyed", settings)
      run_stages(ref, Store(folder, number), graph=surveyed(settings))
      seconds[number] = time.process_time() - cpu
    detail = f"{FEW_ITEMS} items, 3 stages; CPU {seconds[number]:.2f} s"
    row(
      f"engine_us_an_item_{number}_shards", 1e6 * seconds[number] / (3 * FEW_ITEMS), detail=detail
    )
  few, *_, many = SHARDS
  added = 1e3 * (seconds[many] - seconds[few]) / (3 * (many - few))
  row("engine_ms_a_shard", added, detail="CPU that a shard of a stage costs beside its items")


def requests() -> None:
  server = subprocess.Popen(
    [sys.executable, TESTS / "chat_server.py", str(LATENCY)], stdout=subprocess.PIPE, text=True
  )
  try:
    assert server.stdout is not None
    url = f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
    shares, cpu = [], []
    for _ in range(3):
      with tempfile.TemporaryDirectory() as folder:
        settings = {"workdir": folder, "url": url, "items": CALLS}
        ref = GraphRef("engine_runner:asks", settings)
        start, before = time.perf_counter(), time.process_time()
        run_stages(ref, Store(folder, 4), graph=asks(settings))
        rate = CALLS / (time.perf_counter() - start)
        shares.append(rate / (IN_FLIGHT / LATENCY))
        cpu.append(1e3 * (time.process_time() - before) / CALLS)
    detail = f"of {IN_FLIGHT / LATENCY:.0f}/s, {CALLS} calls; CPU {median(cpu):.2f} ms a call"
    row("engine_calls_of_ideal", Spread.over(shares), ">= 0.95", detail=detail)
  finally:
    server.kill()


def kills() -> None:
  sys.path.insert(0, str(TESTS))
  import test_engine_chat as chat
  from chat_server import ChatServer, sensible

  from data_pipes.embedded.captions import scene_caption
  from data_pipes.embedded.render import render, write_video
  from data_pipes.embedded.scenes import make_scene
  from data_pipes.engine import command

  def slow(body, number):
    time.sleep(0.02)
    return sensible(body)

  rng = random.Random(0)
  with tempfile.TemporaryDirectory() as name, ChatServer(slow) as server:
    folder = Path(name)
    seeds = range(4)
    for seed in seeds:
      write_video(folder / f"{seed}.mp4", render(make_scene(seed))[0])
    listed = [{"video": f"{s}.mp4", "caption": scene_caption(make_scene(s))} for s in seeds]
    (folder / "captions.json").write_text(json.dumps(listed))
    command.run(chat.config(folder, server.url), folder / "whole")
    needed = {json.dumps(b, sort_keys=True) for b in server.bodies}
    server.bodies.clear()
    arguments = [str(folder), server.url, str(folder / "w"), str(TESTS)]
    killed = 0
    for _ in range(KILLS):
      process = subprocess.Popen([sys.executable, "-c", chat.RUN, *arguments])
      goal = len(server.bodies) + rng.randrange(1, max(2, len(needed) // KILLS))
      while process.poll() is None and len(server.bodies) < goal:
        time.sleep(0.002)
      killed += process.poll() is None
      process.kill()
      process.wait()
    subprocess.run([sys.executable, "-c", chat.RUN, *arguments], check=True)
    requests = Counter(json.dumps(b, sort_keys=True) for b in server.bodies)
    cut = chat.cut_off_requests(folder / "w" / "calls")
    repeated = sum(max(0, n - 1 - cut[digest(json.loads(b), 16)]) for b, n in requests.items())
    whole = folder / "whole"
    files = [*whole.rglob("*.parquet"), *(whole / "out").iterdir()]
    differ = [
      p for p in files if (folder / "w" / p.relative_to(whole)).read_bytes() != p.read_bytes()
    ]
    detail = f"of {len(files)} after {killed} kills"
    row("engine_files_that_differ", len(differ), "<= 0", detail=detail)
    detail = f"{requests.total()} calls for {len(needed)} needed, {cut.total()} cut off in flight"
    row("engine_answered_repeated", repeated, "<= 0", detail=detail)


if __name__ == "__main__":
  parts = {"overhead": overhead, "shards": shards, "requests": requests, "kills": kills}
  for part in sys.argv[1:] or parts:
    name, _, items = part.partition(":")
    if name not in parts:
      sys.exit(__doc__)
    parts[name](*map(int, items.split()))
