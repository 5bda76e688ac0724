"""What HTTP costs beside the model, and what clients that leave cost the others.

    python benchmarks/serving_http.py [--only S9 S10] [--requests 400]

S10 asks a server whose answers are there at once (`--stub`, a process of this script): all of a
request but the model, from the socket to the last byte. The time is that of the server's process by
the kernel's account, so the client and other load do not count. S9 asks `vr serve` with vr-mini: of
200 requests at once every second client leaves; the tokens that the others got in a second stand
against those of a run of the others alone, by turns.
"""

import argparse
import base64
import concurrent.futures
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from serving_process import ServerProcess

LIMIT_MS, LIMIT_MEMORY, LIMIT_SHARE = 2.0, 3.0, 0.9
DATA_URL = 48 << 20  # bytes
LEAVERS = 200
LONG = 32  # tokens of an answer
BODY = {"model": "vr-mini", "messages": [{"role": "user", "content": "What happens?"}]}


def stub() -> None:
  """Serves answers that are there at once, until it is killed; prints its address."""
  import uvicorn

  from vr_jax.inference.options import Options
  from vr_jax.inference.requests import Answer, Request, Timings, Usage
  from vr_jax.inference.tickets import Ticket
  from vr_jax.serving.answers import Completion
  from vr_jax.serving.app import make_app
  from vr_jax.serving.engine import Engine
  from vr_jax.serving.guard import Guard
  from vr_jax.serving.media import MediaOptions, Store
  from vr_jax.serving.objects import to_request
  from vr_jax.serving.settings import Capacity, Keys, Listening

  class Instant(Engine):
    def ask(self, chat, caller, deadline):
      medium = None if chat.media is None else self.store.resolve(chat.media, caller.owner)
      to_request(chat, medium)
      ticket = Ticket(Request(None, ""), Options())
      usage, timings = Usage(20, 0, 6), Timings(0, 0, 0, 0, 0)
      ticket.end(Answer("moves left", (1,) * 6, (), (), (), usage=usage, timings=timings))
      return ticket, medium

    def completion(self):
      return Completion("vr-mini", None, str)

  with tempfile.TemporaryDirectory() as folder:
    listening, media = Listening(max_body=64), MediaOptions()
    engine = Instant(listening, Capacity(), Store(media, Path(folder)), "vr-mini", 0)
    app = Guard(make_app(engine), listening, Keys(), engine.metrics, media.max_upload)
    listener = socket.create_server(("127.0.0.1", 0))
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", ws="none")).run([listener])


def cpu_seconds(pid: int) -> float:
  fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
  return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory(pid: int, name: str) -> int:
  """Bytes in memory, now (VmRSS) or at most (VmHWM)."""
  match = re.search(rf"{name}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
  assert match
  return int(match[1]) << 10


def cost_of_http(requests: int) -> None:
  with subprocess.Popen(
    [sys.executable, __file__, "--stub"], stdout=subprocess.PIPE, text=True
  ) as server:
    url = f"{server.stdout.readline().strip()}/v1/chat/completions"
    with httpx.Client(timeout=120) as client:
      for streams in (False, True):
        body = BODY | {"stream": streams}
        for _ in range(20):
          client.post(url, json=body).raise_for_status()
        costs = []
        for _ in range(5):
          before = cpu_seconds(server.pid)
          for _ in range(requests // 5):
            client.post(url, json=body)
          costs.append(1000 * (cpu_seconds(server.pid) - before) / (requests // 5))
        kind = "stream" if streams else "whole"
        print_row("S10", f"CPU ms a request, {kind}", statistics.median(costs), LIMIT_MS, "ms")
      before = memory(server.pid, "VmRSS")
      data = base64.b64encode(b"\0" * (DATA_URL * 3 // 4)).decode()
      part = {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{data}"}}
      reply = client.post(url, json=BODY | {"messages": [{"role": "user", "content": [part]}]})
      assert reply.status_code == 415, reply.text[:200]
      more = (memory(server.pid, "VmHWM") - before) / DATA_URL
      print_row("S10", "peak RSS for a data URL of 48 MiB, in its size", more, LIMIT_MEMORY, "x")
    server.kill()


def leaving_clients() -> None:
  server = ServerProcess("--rows", "4", "--new-tokens", "64", "--question-tokens", "64",
                         "--queue", "512", "--per-client", "512", seconds=1200)  # fmt: skip
  url = f"{server.url}/v1/chat/completions"

  def ask(i: int, leaves: bool) -> int:
    body = BODY | {"max_tokens": LONG, "temperature": 2.0, "seed": i, "stream": True}
    tokens = 0
    with httpx.Client(timeout=600) as client, client.stream("POST", url, json=body) as reply:
      for line in reply.iter_lines():
        tokens += line.startswith("data: {")
        if leaves and (i % 4 == 1 or tokens > 2):  # some in the queue, some in the midst
          return 0
    return tokens

  def throughput(leave: bool) -> float:
    staying = range(0, LEAVERS, 2)
    going = range(1, LEAVERS, 2) if leave else ()
    begun = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(LEAVERS) as threads:
      left = [threads.submit(ask, i, True) for i in going]
      tokens = sum(threads.map(lambda i: ask(i, False), staying))
      seconds = time.perf_counter() - begun
      concurrent.futures.wait(left)
    return tokens / seconds

  throughput(False)
  shares = [throughput(True) / throughput(False) for _ in range(3)]
  print_row("S9", "100 of 200 clients leave: tokens/s of the others ÷ alone",
            statistics.median(shares), LIMIT_SHARE, "", more=True)  # fmt: skip
  while server.metric("vr_rows_busy"):
    threading.Event().wait(0.1)
  assert server.end() == 0


def print_row(name: str, text: str, value: float, goal: float, unit: str, more=False) -> None:
  met = value >= goal if more else value <= goal
  sign, verdict = "≥" if more else "≤", "met" if met else "MISSED"
  load = os.getloadavg()[0]
  print(f"{name} | {text} | {value:.2f} {unit} | {sign} {goal:g} | {verdict} | load {load:.1f}")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--only", nargs="+", default=["S9", "S10"], choices=["S9", "S10"])
  parser.add_argument("--requests", type=int, default=400)
  parser.add_argument("--stub", action="store_true", help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.stub:
    stub()
    return
  if "S10" in options.only:
    cost_of_http(options.requests)
  if "S9" in options.only:
    leaving_clients()


if __name__ == "__main__":
  main()
